"""How often a drawn token is another one because its logits were rounded otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hpc_distkv.control.messages.requests import Sampling
from hpc_distkv.step.draws import Ids, Weights, draw_keys, race
from hpc_distkv.step.sampler import token_weights

CASES = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 1, top-k 40": {"temperature": 1.0, "top_k": 40},
}
ROWS = 16
"""Texts that a model makes at once."""


def draw_figures(path: str, draws: int, rows: int, noise: float) -> dict[str, Any]:
    """Draws from `rows` rows of a model's logits, `draws` in all, once as they are and once with
    normally distributed `noise` added to each: the number of draws, and of those that give two
    tokens, by the race and by the place among cumulative weights, for all `CASES`."""
    logits = model_logits(path, rows)
    errors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    each = -(-draws // len(logits))
    figures: dict[str, Any] = {"noise": noise, "rows": len(logits)}
    for name, settings in CASES.items():
        sampling = Sampling(max_tokens=1, **settings)  # type: ignore[arg-type]
        raced = cumulated = 0
        for position, (row, error) in enumerate(zip(logits, errors, strict=True)):
            pair = [token_weights(scores, sampling) for scores in (row, row + noise * error)]
            keys = draw_keys([(seed, position) for seed in range(each)])
            raced += sum(race(key, pair[0]) != race(key, pair[1]) for key in keys)
            uniform = np.random.default_rng(position).random(each)
            one, other = (places(weights, uniform) for weights in pair)
            cumulated += int(np.count_nonzero(one != other))
        count = each * len(logits)
        figures[name] = {"draws": count, "race": raced, "cumulative": cumulated}
    return figures


def places(weights: Weights, uniform: Weights) -> Ids:
    """The tokens at `uniform` parts of the cumulative weights: in the order of ids if all tokens
    may be drawn, else the most probable first."""
    order = np.arange(len(weights)) if weights.all() else np.argsort(-weights, kind="stable")
    cumulative = np.cumsum(weights[order])
    tokens: Ids = order[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")]
    return tokens


def model_logits(path: str, rows: int) -> torch.Tensor:
    """Float32 logits `[rows, vocab]` of texts that transformers draws from the model in `path`."""
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(0)
    make: Any = AutoModelForCausalLM
    model = make.from_pretrained(path, dtype=torch.float32).eval()
    begin = torch.full((ROWS, 1), model.config.bos_token_id or 0)
    steps = -(-rows // ROWS)
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings |= {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": steps}
    made = model.generate(begin, output_logits=True, return_dict_in_generate=True, **settings)
    logits: torch.Tensor = torch.cat(made.logits)[:rows].float()
    return logits
