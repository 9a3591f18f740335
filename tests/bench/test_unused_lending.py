"""What ranks that could lend are measured against."""

from __future__ import annotations

from pathlib import Path

from local_ranks import open_local

from hpc_distkv.bench import lending
from hpc_distkv.bench.runs import synthetic
from hpc_distkv.comm.device import Device
from hpc_distkv.model.config import ModelConfig
from hpc_distkv.model.weights import load_decoder
from hpc_distkv.ranks.rank import EngineOptions


class CountingDevice(Device):
    """Counts how often something is fetched from it."""

    fetched = 0

    def fetch(self, tensors):
        self.fetched += 1
        return super().fetch(tensors)


def test_ranks_alone_compute_on_the_device_of_the_ranks_together(
    tiny_model: Path, monkeypatch
) -> None:
    (comm,) = open_local(1)
    comm.device = device = CountingDevice()
    fetched: dict[str, int] = {}

    def measured(ways, repeats):
        for way, measure in ways.items():
            before = device.fetched
            measure()
            fetched[way] = device.fetched - before
        return {way: [1.0] for way in ways}

    monkeypatch.setattr(lending, "alternate", measured)
    model = load_decoder(tiny_model, ModelConfig.from_dir(tiny_model))
    options = EngineOptions(num_blocks=16, block_size=16, threads=1)
    requests = synthetic(3, 9, 5, model.config.vocab_size)
    lending.lending_against_alone(comm, model, options, requests, 1)
    assert fetched["lending"] == fetched["alone"] > 0
