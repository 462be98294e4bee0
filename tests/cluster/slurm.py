"""A real Slurm of two nodes on this machine, with its own folders, ports and key; nothing of it is left afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import packages

from rmoe.engine.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_CONF = """
ClusterName=rmoe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SchedulerParameters=sched_interval=2,bf_interval=2
KillWait=15
MessageTimeout=60
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=64000 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=64000 Gres=gpu:8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2
"""


def missing() -> str:
    """Why there can be no Slurm here, or nothing."""
    return packages.missing(PROGRAMS, "slurm-wlm", "munge")


@dataclass
class Slurm:
    """The running cluster."""

    folder: Path

    def call(self, *words: str, cwd: str | None = None, **env: str) -> str:
        """Runs one of Slurm's commands, or a script that does; what it printed."""
        done = subprocess.run(words, env=self.env(**env), cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def env(self, **more: str) -> dict[str, str]:
        """Of a user of this cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return kept | {"PATH": packages.PATH, "SLURM_CONF": str(self.folder / "slurm.conf")} | more

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows about the job."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def finish(self, number: str, timeout: float) -> str:
        """Waits until the job has ended; one that was requeued need not wait its two minutes. Its last state."""
        deadline, requeued = time.monotonic() + timeout, 0.0
        while time.monotonic() < deadline:
            job = self.job(number)
            if job["JobState"] == "PENDING" and job["Restarts"] != "0":
                requeued = requeued or time.monotonic()
                if time.monotonic() > requeued + 4:  # before that, nodes refuse it: "job credential revoked"
                    with contextlib.suppress(AssertionError):  # it may have started meanwhile
                        self.call("scontrol", "update", f"JobId={number}", "StartTime=now")
            elif job["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return job["JobState"]
            time.sleep(0.5)
        subprocess.run(["scancel", number], env=self.env(), check=False)
        return f"still {job['JobState']} ({job['Reason']}) after {timeout} s"


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Starts the daemons in `folder`, whose path must be short; ends them by their process numbers."""
    slurm = Slurm(folder)
    ports = [free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(_CONF.format(host=socket.gethostname(), folder=folder, ports=ports))
    for gpu in range(8):  # as far as Slurm is concerned
        os.mknod(folder / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    folder.chmod(0o755)
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*words: str | Path) -> None:
        with open(folder / f"{len(daemons)}.out", "wb") as out:
            daemons.append(
                subprocess.Popen(words, env=slurm.env(), stdout=out, stderr=out, start_new_session=True)  # type: ignore[arg-type]
            )

    try:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={folder}/munge.{ending}" for name, ending in files.items()]
        start("munged", "--foreground", "--force", *options)
        _wait_for((folder / "munge.socket").exists, folder)
        start("slurmctld", "-D", "-f", folder / "slurm.conf")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node, "-f", folder / "slurm.conf")
        _wait_for(lambda: _idle(slurm), folder)
        yield slurm
    finally:
        subprocess.run(["scancel", "--user=root"], env=slurm.env(), check=False, capture_output=True, timeout=30)
        for daemon in reversed(daemons):  # munged, which all of them need, last
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle(slurm: Slurm) -> bool:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"], env=slurm.env(), capture_output=True, text=True, timeout=60
    )
    return done.stdout.split() == ["idle", "idle"]


def _wait_for(ready, folder: Path, timeout: float = 60) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout
    while not ready():
        logs = "".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)
