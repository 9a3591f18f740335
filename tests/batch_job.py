"""Run `hpc-distkv generate` as a user does, alone or under mpirun, and read what it wrote."""

from __future__ import annotations

import codecs
import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mpirun import clean_environment, run_mpi

COMMAND = str(Path(sys.executable).with_name("hpc-distkv"))


def run_command(
    ranks: int, *args: str | Path, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """`hpc-distkv ARGS` with that many ranks; 0 stands for no mpirun at all."""
    return run_script(ranks, COMMAND, *args, timeout=timeout)


def run_script(
    ranks: int, *args: str | Path, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """A script of this Python with that many ranks; 0 stands for no mpirun at all."""
    words = [str(word) for word in args]
    if ranks:
        return run_mpi(ranks, words, timeout)
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=clean_environment(),
        check=False,
    )


class BatchJob:
    """A folder with a batch file, its results file and the figures of the last run."""

    def __init__(self, folder: Path, model: Path, rows: Iterable[dict[str, Any]]) -> None:
        self.model = model
        folder.mkdir(exist_ok=True)
        self.input = folder / "prompts.jsonl"
        self.output = folder / "results.jsonl"
        self.metrics = folder / "metrics.json"
        self.input.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(self, *options: str | int) -> list[str]:
        """What stands behind `hpc-distkv`: `options` override the small defaults of tests."""
        files = ["--model", self.model, "-i", self.input, "-o", self.output]
        sizes = ["--dtype", "float32", "--block-size", 16, "--threads", 1]
        if "--kv-memory" not in options:
            sizes += ["--num-blocks", 64]
        steps = ["--max-num-batched-tokens", 128, "--metrics", self.metrics]
        return [str(word) for word in ("generate", *files, *sizes, *steps, *options)]

    def run(
        self, ranks: int, *options: str | int, timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return run_command(ranks, *self.arguments(*options), timeout=timeout)

    def lines(self) -> list[dict[str, Any]]:
        """The results file; every line must be whole."""
        return [json.loads(line) for line in self.output.read_bytes().splitlines()]

    def answers(self) -> dict[str, tuple[str, int, str]]:
        """Text, output tokens and finish reason by custom_id; every row must be answered once."""
        lines = self.lines()
        found = {line["custom_id"]: answer(line) for line in lines}
        assert len(found) == len(lines)
        return found

    def figures(self) -> dict[str, Any]:
        """What --metrics wrote."""
        return json.loads(self.metrics.read_text())


def answer(line: dict[str, Any]) -> tuple[str, int, str]:
    """Text, output tokens and finish reason of a result line."""
    assert line["error"] is None, line
    body = line["response"]["body"]
    choice = body["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text, body["usage"]["completion_tokens"], choice["finish_reason"]


def completion(custom_id: str, prompt: str | list[int], tokens: int, **fields: Any) -> dict:
    """A row for /v1/completions."""
    body = {"prompt": prompt, "max_tokens": tokens, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, content: str, tokens: int) -> dict[str, Any]:
    """A row for /v1/chat/completions."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def random_ids(count: int, rng: random.Random) -> list[int]:
    """A prompt for the tiny model, without its special tokens."""
    return [rng.randrange(5, 300) for _ in range(count)]


class Oracle:
    """What transformers answers, one row at a time."""

    def __init__(self, model: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def answers(self, rows: Iterable[dict[str, Any]]) -> dict[str, tuple[str, int, str]]:
        """Like `BatchJob.answers`, greedy."""
        return {row["custom_id"]: self._answer(row) for row in rows}

    def _answer(self, row: dict[str, Any]) -> tuple[str, int, str]:
        import torch

        body = row["body"]
        ids = torch.tensor([self._prompt(body)])
        longest = body["max_tokens"]
        never = {"eos_token_id": None} if body.get("ignore_eos") else {}
        with torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=longest,
                do_sample=False,
                pad_token_id=0,
                **never,
            )
        tokens = made[0, ids.shape[1] :].tolist()
        ends = self._model.generation_config.eos_token_id
        if not never and tokens[-1] in (ends if isinstance(ends, list) else [ends]):
            return self._text(tokens[:-1]), len(tokens), "stop"
        return self._text(tokens), longest, "length"

    def _prompt(self, body: dict[str, Any]) -> list[int]:
        if "messages" in body:
            return self.tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, return_dict=False
            )
        prompt = body["prompt"]
        return self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    def _text(self, tokens: list[int]) -> str:
        """Of the bytes that the pieces of byte-level BPE spell; half a character at the end is
        none."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        spelled = {letter: byte for byte, letter in bytes_to_unicode().items()}
        added = self.tokenizer.added_tokens_decoder
        shown = [id for id in tokens if not (id in added and added[id].special)]
        pieces = self.tokenizer.convert_ids_to_tokens(shown)
        whole = bytes(spelled[letter] for letter in "".join(filter(None, pieces)))
        return codecs.getincrementaldecoder("utf-8")("replace").decode(whole)
