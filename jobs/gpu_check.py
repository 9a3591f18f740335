"""Checks and measures this machine's GPU path: `make gpu-check`. Prints one JSON; takes minutes.
Ends with status 1 if a part fails.

In this order: the attention kernels against float64, torch's attention and the speed of a copy; a
batch end to end against transformers; what steps wait for; two ranks that share the GPU, one of
which lends to the other: how much of their exchanges is hidden, and whether tokens are those of one
rank. End-to-end figures are of random weights in the shape of Llama-3.2-1B.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
LIMIT = 110.0
"""Seconds after which a part is given up."""


def bench(*arguments: str, ranks: int = 1) -> dict[str, Any]:
    """What `hpc-distkv bench` prints; on trouble, the last lines of what it said."""
    command = [sys.executable, "-c", "from hpc_distkv.cli.main import main; main()", "bench"]
    if ranks > 1:
        launcher = Path(sys.executable).parent / "mpirun"
        found = str(launcher) if launcher.exists() else shutil.which("mpirun")
        if found is None:
            return {"left_out": "there is no mpirun"}
        command = [found, "-n", str(ranks), *command]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not over after {LIMIT:g} s"}
    if done.returncode:
        return {"error": done.stderr[-2000:]}
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures | {"took_s": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Run all parts, one after another."""
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device here")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_1B))
        model = ("--model", folder, "--load-format", "dummy", "--device", "cuda")
        batch = ("--num-prompts", "64", "--input-len", "512", "--max-num-batched-tokens", "8192")
        figures = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "kernels": bench("kernels", "--most-tokens", "1048576"),
            "throughput": bench(
                "throughput", *model, *batch, "--output-len", "128", "--against-transformers"
            ),
            "steps": bench("gpu", *model, *batch, "--output-len", "32"),
            "overlap": bench(
                *("overlap", *model, "--allow-gpu-sharing", "--max-num-batched-tokens", "2048"),
                ranks=2,
            ),
            "two_ranks_share": bench(
                *("remote", *model, "--allow-gpu-sharing", "--dtype", "float32"),
                *("--context", "4000", "--repeats", "1", "--max-num-batched-tokens", "2048"),
                ranks=2,
            ),
        }
    click.echo(json.dumps(figures, indent=2))
    faults = [name for name, part in figures.items() if isinstance(part, dict) and "error" in part]
    if not figures["two_ranks_share"].get("same_tokens", True):
        faults.append("two_ranks_share: other tokens than one rank")
    if faults:
        sys.exit(f"gpu-check: {', '.join(faults)}")


if __name__ == "__main__":
    main()
