"""A Slurm of two nodes on this machine, in a temporary directory, from Debian's packages."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "libpmix2")
PMIX = Path("/usr/lib/x86_64-linux-gnu/pmix2/lib/libpmix.so"), "libpmix-dev"
"""What Slurm's PMIx plugin loads, and the package that has it under this name."""
PROGRAMS = ("slurmctld", "slurmd", "munged", "srun")
NODES = 2
CPUS, MEMORY = 8, 32_000
"""Cores and MiB that a node pretends to have."""
START = 20.0
"""Seconds for the daemons to come up."""

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
TmpFS={folder}/tmp.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={control_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
ReturnToService=2
KillWait=10
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class UnavailableError(RuntimeError):
    """No Slurm can be had here; the text says why."""


def install(pmix: bool) -> None:
    """Have the programs, from Debian's packages if need be; with srun --mpi=pmix if so. Raises
    UnavailableError."""
    search = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if os.geteuid() != 0:
        raise UnavailableError("Slurm's daemons need root here")
    missing = [] if all(shutil.which(p, path=search) for p in PROGRAMS) else [*PACKAGES]
    if pmix and not PMIX[0].exists():
        missing.append(PMIX[1])
    if missing:
        if shutil.which("apt-get") is None:
            raise UnavailableError("there is no Slurm, and no apt-get to install it with")
        for words in (
            ("update", "-qq"),
            ("install", "-qq", "-y", "--no-install-recommends", *missing),
        ):
            quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(
                ["apt-get", *words], capture_output=True, text=True, env=quiet, check=False
            )
            if done.returncode:
                raise UnavailableError(f"apt-get {words[0]} failed: {done.stderr[-300:]}")
    os.environ["PATH"] = search


class SlurmCluster:
    """Owner of the daemons: munged, slurmctld, and a slurmd for each node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def run(self, *words: str | Path, **extra: str) -> str:
        """A Slurm command's output. `extra`: environment variables."""
        done = subprocess.run(
            [str(word) for word in words],
            capture_output=True,
            text=True,
            env={**self.environment, **extra},
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: Path, *options: str, **extra: str) -> str:
        """The id of the job."""
        return self.run("sbatch", "--parsable", *options, script, **extra).split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What scontrol knows of a job, or of the first task of an array."""
        first = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
        return dict(field.split("=", 1) for field in first.split() if "=" in field)

    def wait(self, done: Callable[[], bool], seconds: float, what: str) -> None:
        limit = time.monotonic() + seconds
        while not done():
            if time.monotonic() > limit:
                raise AssertionError(f"{what} takes too long\n{self.logs()}")
            time.sleep(0.2)

    def wait_for_state(self, job: str, state: str, seconds: float = 60.0) -> dict[str, str]:
        """Wait until a job is in a state; returns what is known of it."""
        self.wait(lambda: self.job(job)["JobState"] == state, seconds, f"job {job} → {state}")
        return self.job(job)

    def logs(self) -> str:
        """The end of all logs."""
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-2000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def stop(self) -> None:
        """End all jobs, then all daemons."""
        quiet = {"env": self.environment, "capture_output": True, "check": False, "timeout": 30}
        if len(self._daemons) == 2 + NODES:
            subprocess.run(["scancel", "--state=PENDING", "--user=root"], **quiet)
            subprocess.run(["scancel", "--signal=KILL", "--full", "--user=root"], **quiet)
            limit = time.monotonic() + 10
            while subprocess.run(["squeue", "--noheader"], **quiet).stdout:
                if time.monotonic() > limit:
                    break
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", *(f"tmp.node{n}" for n in range(1, NODES + 1))):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        folder.chmod(0o755)
        for parent in folder.parents:  # munged refuses a socket that others cannot reach
            if parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o011)
        host = socket.gethostname()
        ports = free_ports(NODES + 1)
        nodes = "\n".join(
            f"NodeName=node{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs={CPUS} "
            f"RealMemory={MEMORY} State=UNKNOWN"
            for n in range(1, NODES + 1)
        )
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(host=host, folder=folder, nodes=nodes, control_port=ports[0])
        )
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self._launch(
            "munged", "--foreground", "--force", f"--socket={folder}/munge.socket",
            f"--key-file={key}", f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        self.wait((folder / "munge.socket").exists, START, "munged")
        self._launch("slurmctld", "-D", "-i")
        for number in range(1, NODES + 1):
            self._launch("slurmd", "-D", "-N", f"node{number}")
        self.wait(self._ready, START, "Slurm's start")

    def _ready(self) -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            capture_output=True,
            text=True,
            env=self.environment,
            check=False,
        )
        return done.stdout.split() == ["idle"] * NODES

    def _launch(self, *words: str) -> None:
        with (self.folder / f"{words[0]}.{len(self._daemons)}.out.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(words, stdout=log, stderr=log, env=self.environment)
            )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
