"""One template for all job scripts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import jinja2

MARGIN = 30
"""Seconds between the end of the grace and the time limit: the last step, and the results."""
KINDS = ("gpu", "cpu", "array", "mpirun")


@dataclass(frozen=True)
class JobScript:
    """What a job script says. Its defaults are those of the scripts in `jobs/`."""

    kind: str = "gpu"
    """One of KINDS; "array" runs on GPUs, if there are any."""
    model: str = "/path/to/model"
    input: str = "prompts.jsonl"
    output: str = "results.jsonl"
    arguments: Sequence[str] = ()
    """Further ones of `hpc-distkv generate`."""
    grace: int = 90
    """Seconds that ranks have to finish rows."""
    nodes: int = 4
    tasks_per_node: int = 4
    gpus_per_node: int = 4
    cpus_per_task: int = 8
    shards: int = 8
    """Of an array."""
    time: str = "12:00:00"
    mpi: str = "pmix"
    job_name: str = "hpc-distkv"
    partition: str | None = None
    account: str | None = None
    container: str | None = None
    """An image for Apptainer."""
    lines: Sequence[str] = ()
    """Of the script, before anything starts: module load, source."""
    sbatch_lines: Sequence[str] = ()
    """Further options of sbatch."""
    written_by: str = "hpc-distkv sbatch"

    def render(self) -> str:
        """The script."""
        source = files("hpc_distkv.slurm").joinpath("job.sh.j2").read_text()
        environment = jinja2.Environment(
            trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True, autoescape=False,
        )  # fmt: skip
        array = self.kind == "array"
        task = "${SLURM_ARRAY_TASK_ID}"
        arguments = ["--grace", str(self.grace), *self.arguments]
        words = [shlex.quote(word) for word in arguments]
        if array:
            words += ["--shard", f'"{task}/{self.shards}"']
        log = f"{self.job_name}-{'%A_%a' if array else '%j'}.log"
        return environment.from_string(source).render(
            kind=self.kind,
            written_by=self.written_by,
            slurm=self.kind != "mpirun",
            ranks=self.tasks_per_node,
            shards=self.shards,
            job_name=self.job_name,
            partition=self.partition,
            account=self.account,
            nodes=self.nodes,
            tasks=self.tasks_per_node,
            gpus=self.gpus_per_node,
            cpus=self.cpus_per_task,
            time=self.time,
            signal=self.grace + MARGIN,
            log=log,
            sbatch_lines=self.sbatch_lines,
            files=[
                ("MODEL", _setting("MODEL", self.model)),
                ("INPUT", _setting("INPUT", self.input)),
                ("OUTPUT", _setting("OUTPUT", self.output) + (f".{task}" if array else "")),
            ],
            lines=self.lines,
            mpi=self.mpi,
            container=self.container and shlex.quote(self.container),
            arguments=" ".join(words),
            # The id of an array's last task is that of the whole array.
            job_id=f"${{SLURM_ARRAY_JOB_ID}}_{task}" if array else "$SLURM_JOB_ID",
        )


def _setting(name: str, value: str) -> str:
    """The value of a variable; one that was not given may be set in the environment of sbatch."""
    given = value != getattr(JobScript, name.lower())
    return shlex.quote(value) if given else f"${{{name}:-{shlex.quote(value)}}}"
