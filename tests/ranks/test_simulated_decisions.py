"""A simulated instance plans what a real one plans, step by step, with rBlocks in the host's memory
too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from clusters import options, run_cluster
from workloads import pressed, tier

from hpc_distkv.control.messages.requests import Request, Sampling, pack_tokens
from hpc_distkv.decide.instance import Instance
from hpc_distkv.decide.plan import Plan
from hpc_distkv.ranks.rank import EngineOptions
from hpc_distkv.simulate.cluster import Cluster, DeviceSpec, Measured
from hpc_distkv.simulate.deployment import Deployment
from hpc_distkv.simulate.models import ModelShape
from hpc_distkv.simulate.simulation import RoundTimes, Simulation
from hpc_distkv.simulate.workload import TraceRow

AT_ONCE = RoundTimes(floor=0.0, answer=0.0, per_instance=0.0)
SHAPE = ModelShape("tiny", 2, 64, 128, 4, 2, 16, 100)
ANY = Measured(1e-2, 1e-3, 1e-3, 1e-6, 1e-6, 1e-4, 1e9)
"""What steps last decides nothing here: `steady_pace` says what instances take them to last."""


def shown(plan: Plan) -> list[Any]:
    copies = [sorted((m.key, m.block) for m in p) for p in (plan.to_host, plan.from_host)]
    return [[(row.sequence.id, row.tokens) for row in plan.scheduled], *copies]


def grown() -> list[Request]:
    """A row larger than the pool behind some that are not."""
    lengths = [30, 40, 300, 20]
    return [
        Request(number, pack_tokens([number] * length), Sampling(40))
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (pressed(), tier(24, 60)),
        (pressed(), tier(24, 9)),
        (pressed(), options(24)),
        (grown(), tier(24, 40)),
    ],
)
def test_a_simulated_instance_plans_what_a_real_one_does(
    model,
    steady_pace,
    monkeypatch,
    rows: list[Request],
    settings: EngineOptions,
):
    plans: list[list[Any]] = []
    configs = []
    plan_step = Instance.plan

    def watch(self: Instance, ahead: bool = False) -> Plan:
        configs.append(self.config)
        plan = plan_step(self, ahead)
        if not plan.idle:
            plans.append(shown(plan))
        return plan

    monkeypatch.setattr(Instance, "plan", watch)
    monkeypatch.setattr("hpc_distkv.start.layout.copy_seconds", lambda *_: 2e-3)
    # Else a real instance would find what it has computed of a row before.
    outcome = run_cluster(model, rows, 1, replace(settings, enable_prefix_caching=False))
    real, config = list(plans), configs[0]
    plans.clear()
    made = [
        TraceRow(row.prompt_len, len(outcome.tokens[row.id]), limit=row.sampling.max_tokens)
        for row in rows
    ]
    cluster = Cluster(1, 1, DeviceSpec("toy", 1e9, 0), measured=ANY)
    simulation = Simulation(Deployment(cluster, SHAPE, 1, config), made, AT_ONCE)
    while simulation.advance():
        simulation.check()
    assert plans == real
    (counters,) = simulation.record.counters
    for name in ("blocks_to_host", "blocks_from_host", "peak_host", "preemptions", "prompt_tokens"):
        assert getattr(counters, name) == getattr(outcome.counters[0], name)
    assert (counters.blocks_to_host > 0) == (settings.host_kv_memory is not None)
