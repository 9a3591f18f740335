"""What looks wrong about a job, from what its ranks say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from hpc_distkv.observe.environment import Facts, Gpu, facts, launcher, problems, slurm

GPUS = [Gpu("H100", f"GPU-{n}", 79.6) for n in range(4)]
LINK = 10e-6


def rank(host="nid1", cores=(0, 1), devices=(), versions=None, local=None, trouble=None) -> Facts:
    return Facts(
        host, list(cores), versions or {"torch": "2.13.0"}, list(devices), None, trouble, local
    )


def links(ranks, slow=()):
    return [
        [0.0 if a == b else (1e-3 if {a, b} == set(slow) else LINK) for b in range(ranks)]
        for a in range(ranks)
    ]


def test_nothing_is_wrong_with_a_job_as_it_should_be():
    ranks = [rank(f"nid{n // 4}", (n % 4,), GPUS, local=("SLURM_LOCALID", n % 4)) for n in range(8)]
    nodes = [n // 4 for n in range(8)]
    assert problems(ranks, [n % 4 for n in range(8)], nodes, links(8)) == []


WRONG = {
    "other versions": ([rank(), rank(versions={"torch": "2.6.0"})], [0, 0], [0, 1], "torch"),
    "local rank": ([rank(local=("SLURM_LOCALID", 0)), rank(local=("SLURM_LOCALID", 1))], [0, 0],
                   [0, 1], "SLURM_LOCALID=1"),
    "all on one core": ([rank(cores=(0,)), rank(cores=(0,))], [0, 1], [0, 0], "less than a core"),
    "torch for CPUs": ([rank(trouble="torch sees no GPU")], [0], [0], "torch sees no GPU"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said_once(wrong):
    ranks, local, nodes, words = WRONG[wrong]
    (said,) = problems(ranks, local, nodes, links(len(ranks)))
    assert words in said


def test_gpus_that_ranks_cannot_have_are_said():
    assert problems([rank()], [0], [0], [], "rank 1 sees none") == ["rank 1 sees none"]


def test_a_slow_link_is_named_among_those_like_it():
    """Links between nodes may be slower than those within; one is slower than all of its kind."""
    nodes = [0, 0, 0, 1, 1, 1]
    trips = [
        [1e-6 * (3 if x == y else 60) * (a != b) for b, y in enumerate(nodes)]
        for a, x in enumerate(nodes)
    ]
    ranks = [rank(cores=(n,)) for n in range(6)]
    assert problems(ranks, [0, 1, 2] * 2, nodes, trips) == []
    trips[1][4] = trips[4][1] = 900e-6
    (said,) = problems(ranks, [0, 1, 2] * 2, nodes, trips)
    assert "between instances 1 and 4 a round trip takes 900 µs" in said


def test_a_process_knows_where_it_is():
    found = facts({"OMPI_COMM_WORLD_LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "1"})
    assert found.local_rank == ("OMPI_COMM_WORLD_LOCAL_RANK", 3)
    assert found.visible == "1"
    assert found.cores
    assert "torch" in found.versions
    assert launcher({"PMI_SIZE": "2"}).endswith("2 ranks")
    assert slurm({}) is None
    assert slurm({"SLURM_JOB_ID": "7", "SLURM_MPI_TYPE": "pmix"}) == "JOB_ID=7 MPI_TYPE=pmix"


def test_the_gpus_that_torch_sees_are_listed(monkeypatch):
    torch = pytest.importorskip("torch")
    gpu = SimpleNamespace(name="H100", uuid="af-12", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    found = facts({})
    assert found.devices == [Gpu("H100", "af-12", 80.0)] * 2
    assert found.versions["CUDA of torch"] == "13.0"
    assert found.versions["NCCL of torch"] == "2.28.9"
