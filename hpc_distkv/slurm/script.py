"""One template for all job scripts."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from hpc_distkv.slurm.options import (
    check_command,
    check_one_line,
    directive,
    further,
    options_in,
)

MARGIN = 30
"""Seconds between the end of the grace and the time limit: the last step, and the results."""
EARLY = 60
"""Seconds that Slurm may send its signal before the time it was told."""
FRUITLESS = 5
"""Starts in a row that were stopped before anything was answered, after which a job gives up."""
KINDS = ("gpu", "cpu", "array", "mpirun")
PATHS = {"model": "/path/to/model", "input": "prompts.jsonl", "output": "results.jsonl"}
"""What the script takes where neither it nor the environment of sbatch names a file."""
TASK = "${SLURM_ARRAY_TASK_ID}"


@dataclass(frozen=True)
class JobScript:
    """What a job script says. Its defaults are those of the scripts in `jobs/`. Raises
    ScriptError for what a script cannot hold."""

    kind: str = "gpu"
    """One of KINDS; "array" runs on GPUs, if there are any."""
    model: str | None = None
    """This and the next two: None leaves it to the environment of sbatch."""
    input: str | None = None
    output: str | None = None
    arguments: Sequence[str] = ()
    """Further ones of `hpc-distkv generate`."""
    dummy: bool = False
    """Whether the model's directory needs no weights."""
    side_files: Mapping[str, str] = field(default_factory=dict)
    """Options of `generate` that name a file which each task of an array writes for itself."""
    grace: int = 90
    """Seconds that ranks have to finish rows."""
    nodes: int = 4
    tasks_per_node: int = 4
    gpus_per_node: int = 4
    gpu_type: str | None = None
    cpus_per_task: int = 8
    shards: int = 8
    """Of an array."""
    time: str = "12:00:00"
    mpi: str = "pmix"
    job_name: str = "hpc-distkv"
    passed_on: Mapping[str, str] = field(default_factory=dict)
    """Options of sbatch, by their long names; "" is one without a value."""
    container: str | None = None
    """An image for Apptainer."""
    programs: str | None = None
    """Directory of hpc-distkv and mpirun; None: they are on the PATH."""
    lines: Sequence[str] = ()
    """Of the script, before anything starts: module load, source."""
    sbatch_lines: Sequence[str] = ()
    """Further options of sbatch."""
    needs: str | None = None
    """What takes the memory of a node, if that is known."""
    written_by: str = "hpc-distkv sbatch"

    def __post_init__(self) -> None:
        for text in _texts([getattr(self, each.name) for each in fields(self)]):
            check_one_line(text)
        for line in self.lines:
            check_command(line)
        self._further()

    def render(self) -> str:
        """The script."""
        source = files("hpc_distkv.slurm").joinpath("job.sh.j2").read_text(encoding="utf-8")
        environment = jinja2.Environment(
            trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True, autoescape=False,
        )  # fmt: skip
        array = self.kind == "array"
        changed = {
            "passed_on": [directive(*option) for option in self.passed_on.items()],
            "sbatch_lines": self._further(),
            "programs": self.programs and shlex.quote(self.programs),
            "container": self.container and shlex.quote(self.container),
            "arguments": " ".join(self._arguments()),
        }
        return environment.from_string(source).render(
            vars(self) | changed,
            slurm=self.kind != "mpirun",
            signal=self.grace + MARGIN,
            near=self.grace + MARGIN + EARLY,
            fruitless=FRUITLESS,
            log=self._own_log,
            files=[self._setting(name) for name in PATHS],
            errors=" ".join(self._side_file(o) for o in self.side_files if o == "--error-file"),
            # The id of an array's last task is that of the whole array.
            job_id=f"${{SLURM_ARRAY_JOB_ID}}_{TASK}" if array else "$SLURM_JOB_ID",
        )

    @property
    def folder(self) -> Path:
        """Where the job starts, as seen from where it is submitted."""
        return Path(self.passed_on.get("chdir", "."))

    @property
    def names(self) -> set[str]:
        """Long names of the options of sbatch that were asked for."""
        return {*self.passed_on, *(name for name, _ in self._asked())}

    @property
    def log(self) -> str:
        """The file that the job writes its log to, with sbatch's patterns for its number."""
        asked = [value for name, value in self._asked() if name == "output"]
        return asked[-1] if asked else self._own_log

    @property
    def _own_log(self) -> str:
        return f"{self.job_name}-{'%A_%a' if self.kind == 'array' else '%j'}.log"

    def _asked(self) -> Iterator[tuple[str, str]]:
        """Names and values of the options in the further lines."""
        for line in self._further():
            yield from options_in(line)

    def _further(self) -> list[str]:
        names = ["job-name", "nodes", "ntasks-per-node", "cpus-per-task", "time", *self.passed_on]
        names += ["gpus-per-node"] if self.gpus_per_node else []
        return [further(line, names) for line in self.sbatch_lines]

    def _arguments(self) -> Iterator[str]:
        """The words behind the files, as the script has them."""
        yield from (shlex.quote(word) for word in ("--grace", str(self.grace), *self.arguments))
        for option in self.side_files:
            yield from (option, self._side_file(option))
        if self.kind == "array":
            yield from ("--shard", f'"{TASK}/{self.shards}"')

    def _side_file(self, option: str) -> str:
        """In an array with the task's number before what tells the kind of file."""
        path = self.side_files[option]
        if self.kind != "array":
            return shlex.quote(path)
        folder, slash, name = path.rpartition("/")
        whole = name.removesuffix(".gz")
        stem = whole.rpartition(".")[0] or whole
        end = name[len(stem) :]
        return f'{shlex.quote(folder + slash + stem)}."{TASK}"{end and shlex.quote(end)}'

    def _setting(self, name: str) -> tuple[str, str]:
        """A variable of the script."""
        given, variable = getattr(self, name), name.upper()
        left_out = f"${{{variable}:-{shlex.quote(PATHS[name])}}}"
        value = left_out if given is None else shlex.quote(given)
        task = f".{TASK}" if name == "output" and self.kind == "array" else ""
        return variable, value + task


def _texts(value: Any) -> Iterator[str]:
    """All text in a field."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, Sequence):
        for each in value:
            yield from _texts(each)
