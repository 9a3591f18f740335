"""Two ranks on one GPU, under mpirun: a row that needs both pools, with the tokens of one rank."""

from __future__ import annotations

import sys
from pathlib import Path

from clusters import Collect, engine_of
from families import prompt
from local_ranks import open_local

from hpc_distkv.comm.abort import aborting
from hpc_distkv.comm.device import DeviceError
from hpc_distkv.comm.mpi.start import open_mpi
from hpc_distkv.comm.transport import Comm
from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens, unpack_tokens
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.decoder import Decoder
from hpc_distkv.ranks.rank import EngineOptions
from hpc_distkv.start.loading import bind, load_model

ROWS = [(400, 40), (40, 60), (30, 60), (90, 60)]
"""(prompt, output) tokens: the first needs more than one of the pools."""


def answers(comm: Comm, model: Decoder, options: EngineOptions) -> dict[int, list[int]]:
    engine = engine_of(comm, model, options)
    rows = [
        Request(number, pack_tokens(prompt(tokens, number)), Sampling(output, 0.5, seed=number))
        for number, (tokens, output) in enumerate(ROWS)
    ]
    leader = Collect(engine, rows) if comm.world.rank == 0 else None
    instance = engine.run(leader)
    instance.check()
    borrowed = comm.share(instance.counters.blocks_borrowed)
    assert comm.world.size == 1 or sum(borrowed) > 0
    return {r.id: unpack_tokens(r.tokens) for r in leader.results} if leader else {}


def main(model_path: Path, sharing: bool) -> int:
    with aborting(open_mpi(stall_timeout=60.0)) as comm:
        options = EngineOptions(
            device="cuda",
            allow_gpu_sharing=sharing,
            num_blocks=20,
            block_size=16,
            max_num_batched_tokens=64,
            max_num_seqs=16,
            dtype="float32",
        )
        try:
            bind(comm, options)
        except DeviceError as error:
            print(error, file=sys.stderr, flush=True)
            comm.close()
            return 2
        config = ModelConfig.from_dir(model_path)
        model = load_model(comm, model_path, config, options)
        together = answers(comm, model, options)
        (alone,) = open_local(1)
        bind(alone, EngineOptions(device="cuda"))
        big = EngineOptions(num_blocks=200, block_size=16, max_num_batched_tokens=64)
        if comm.world.rank == 0:
            assert together == answers(alone, model, big)
            print("tokens equal", flush=True)
        comm.close()
        return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2] == "share"))
