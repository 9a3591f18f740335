"""The benchmark of attention kernels, on one device without ranks."""

from __future__ import annotations

import json

import click

from hpc_distkv.cli.options import POSITIVE


@click.command()
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1, … or cpu.")
@click.option("--length", "lengths", multiple=True, type=POSITIVE, help="Tokens of decoded rows.")
@click.option("--batch", "batches", multiple=True, type=POSITIVE, help="Rows decoded together.")
@click.option("--most-tokens", type=POSITIVE, default=4_194_304, show_default=True)
@click.option("--block-size", type=POSITIVE, default=32, show_default=True)
def kernels(
    device: str,
    lengths: tuple[int, ...],
    batches: tuple[int, ...],
    most_tokens: int,
    block_size: int,
) -> None:
    """Attention kernels alone, with the heads of Llama 3 8B: bandwidth of decodes against that of a
    copy, operations per second of prompts, errors against float64, and torch's attention."""
    import torch

    from hpc_distkv.bench import kernels as bench

    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise click.BadParameter(f"{device}: {reason}", param_hint="--device") from error
    prompts = tuple(
        (rows, queries, tokens)
        for rows, queries, tokens in bench.PROMPTS
        if rows * tokens <= most_tokens
    )
    figures = bench.kernel_figures(
        where, lengths or bench.LENGTHS, batches or bench.BATCHES, prompts, most_tokens, block_size
    )
    click.echo(json.dumps(figures, indent=2))
