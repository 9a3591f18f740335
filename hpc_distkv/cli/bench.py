"""`hpc-distkv bench`: figures of this machine, as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from hpc_distkv.cli.bench_draws import draws
from hpc_distkv.cli.bench_kernels import kernels
from hpc_distkv.cli.bench_policies import policies
from hpc_distkv.cli.bench_simulated import host, paper, rounds, scale
from hpc_distkv.cli.measured import measured, requests_of, workload
from hpc_distkv.cli.options import POSITIVE

if TYPE_CHECKING:
    from hpc_distkv.comm.transport import Comm
    from hpc_distkv.model.decoder import Decoder
    from hpc_distkv.start.options import EngineOptions


@click.group("bench")
def command() -> None:
    """Measure with synthetic token ids; prints JSON. Run under mpirun or srun for several ranks."""


@command.command()
@click.option(
    "--against-transformers",
    is_flag=True,
    help="Also run transformers' static-batch generate on the same device, and give the ratio.",
)
@workload(input_len=256, output_len=128, num_prompts=32)
def throughput(**options: Any) -> None:
    """Tokens per second, time to first token and peak memory."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.throughput import engine_throughput, transformers_throughput
        from hpc_distkv.comm.together import SetupError

        if options["against_transformers"] and comm.world.size > 1:
            raise SetupError("--against-transformers compares one rank: run without mpirun")
        requests = requests_of(options, model)
        figures = engine_throughput(comm, model, settings, requests)
        if options["against_transformers"]:
            import torch

            other = transformers_throughput(
                options["model"], model, torch.get_num_threads(), requests, settings.dummy
            )
            rate = "output_tokens_per_second"
            figures |= {"transformers": other, "ratio": figures[rate] / other[rate]}
        return figures

    measured(options, measure)


@command.command()
@workload(context=8000, output_len=64, repeats=3)
def remote(**options: Any) -> None:
    """Two ranks: a long decode with half of its KV remote, against all of it at home."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.lending import remote_against_local
        from hpc_distkv.comm.together import SetupError

        if comm.world.instances != 2 or comm.world.tp > 1:
            raise SetupError(
                "this benchmark needs two ranks: mpirun -n 2 hpc-distkv bench remote …"
            )
        return remote_against_local(
            comm, model, settings, options["context"], options["output_len"], options["repeats"]
        )

    measured(options, measure)


@command.command()
@workload(input_len=512, output_len=64, num_prompts=64)
def gpu(**options: Any) -> None:
    """One rank on a GPU: waits and copies of a step, and how busy the GPU is."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.gpu import profile_steps
        from hpc_distkv.bench.runs import run_once
        from hpc_distkv.comm.together import SetupError
        from hpc_distkv.ranks.rank import joined

        if comm.world.size > 1:
            raise SetupError("this benchmark profiles one rank: run without mpirun")
        if comm.device.place.type == "cpu":
            raise SetupError("this benchmark profiles a GPU: run it on a node that has one")
        requests = requests_of(options, model)
        engine = joined(comm, model, settings)
        run_once(engine, requests)
        return profile_steps(engine, requests)

    measured(options, measure)


@command.command()
@workload(context=4000, output_len=64)
def overlap(**options: Any) -> None:
    """Two ranks: how much of an exchange is hidden behind what its debtor computes."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.overlap import exchange_overlap
        from hpc_distkv.comm.together import SetupError

        if comm.world.instances != 2:
            raise SetupError(
                "this benchmark needs two instances: mpirun -n 2 hpc-distkv bench overlap …"
            )
        figures = exchange_overlap(comm, model, settings, options["context"], options["output_len"])
        if not figures["exchanges"]:
            raise SetupError("nothing was lent: give --policy lend and no --lend-cap")
        return figures

    measured(options, measure)


@command.command("unused-lending")
@workload(input_len=128, output_len=64, num_prompts=16, repeats=5)
def unused_lending(**options: Any) -> None:
    """An even load that fits: what it costs that ranks could lend, against every rank alone."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.lending import lending_against_alone
        from hpc_distkv.comm.together import SetupError

        if comm.world.tp > 1:
            raise SetupError("this benchmark runs ranks alone: --tensor-parallel-size must be 1")
        requests = requests_of(options, model)
        return lending_against_alone(comm, model, settings, requests, options["repeats"])

    measured(options, measure)


@command.command("trace-cost")
@click.option("--long-len", type=POSITIVE, help="Prompt tokens of one row more.")
@workload(input_len=128, output_len=48, num_prompts=8, repeats=8)
def trace_cost(**options: Any) -> None:
    """The same rows with --trace and without it."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.runs import synthetic
        from hpc_distkv.bench.trace_cost import traced_against_plain

        count, output_len = options["num_prompts"], options["output_len"]
        vocab_size = model.config.vocab_size
        requests = requests_of(options, model)
        if options["long_len"]:
            *_, long = synthetic(count + 1, options["long_len"], output_len, vocab_size)
            requests.append(long)
        return traced_against_plain(comm, model, settings, requests, options["repeats"])

    measured(options, measure)


@command.command()
@workload(document_len=3000, question_len=40, output_len=16, rows=64, repeats=1)
def prefix(**options: Any) -> None:
    """Rows with a document in common and different questions: prefix caching on against off."""

    def measure(comm: Comm, model: Decoder, settings: EngineOptions) -> dict[str, Any]:
        from hpc_distkv.bench.prefixes import questions, sharing

        rows, document, question = (options[n] for n in ("rows", "document_len", "question_len"))
        requests = questions(
            rows, document, question, options["output_len"], model.config.vocab_size
        )
        distinct = document + rows * question
        return sharing(comm, model, settings, requests, distinct, options["repeats"])

    measured(options, measure)


for other in (policies, kernels, draws, host, rounds, paper, scale):
    command.add_command(other)
