"""The group of processes: where its variables come from, what they must be, and how the processes meet."""

from __future__ import annotations

import os
import re
import socket
from datetime import timedelta

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # CUDA libraries without a driver would mislead DeepSpeed

import deepspeed
import deepspeed.ops

from rmoe.engine import faults
from rmoe.engine.faults import Fault
from rmoe.engine.ports import free_port
from rmoe.errors import UserError

_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_COUNTS = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # some launchers set one of them
_STEP = ("PROCID", "STEP_NUM_TASKS", "LOCALID", "NODEID", "STEP_NUM_NODES", "JOB_ID", "STEP_ID")
_NAMED = ("STEP_TASKS_PER_NODE", "STEP_NODELIST")
_LAST_PORT = 65535
_APART = 60.0  # seconds that processes may always start one after the other


def set_place() -> None:
    """Gives this process its place in a group: its launcher's, else srun's, else that of a group of its own.

    Raises:
        UserError: the variables of a launcher are incomplete, or not what they must be.
    """
    set_slurm()
    if not any(name in os.environ for name in _PLACE[:3]):
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free_port())
    check_place()


def check_place() -> None:
    """Checks the variables by which processes find each other.

    Raises:
        UserError: see `set_place`.
    """
    advice = "start the ranks by deepspeed, torchrun or srun, or unset RANK, LOCAL_RANK and WORLD_SIZE for one process"
    if lacking := [name for name in _PLACE if not os.environ.get(name)]:
        there = ", ".join(name for name in _PLACE if os.environ.get(name))
        raise UserError(f"the launcher has set {there}, but not {', '.join(lacking)}; {advice}")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", *_COUNTS):
        if name in os.environ and not re.fullmatch(r"[0-9]{1,9}", os.environ[name]):
            raise UserError(f"{name} is {os.environ[name]!r}; it is a whole number, not negative; {advice}")
    rank, processes, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= processes:
        raise UserError(f"RANK is {rank} of WORLD_SIZE {processes}; ranks are 0 to WORLD_SIZE - 1; {advice}")
    if not 1 <= port <= _LAST_PORT:
        raise UserError(f"MASTER_PORT is {port}; it is 1 to {_LAST_PORT}; give a free one, such as --master_port 29511")
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], port)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"MASTER_ADDR is {os.environ['MASTER_ADDR']!r}, a host that this one does not know ({error}); give the "
            "name or the address of the first process's machine"
        ) from error


def set_slurm() -> None:
    """Takes this process's place in the group from Slurm, where srun started it and no other launcher did.

    Only a step of srun's has SLURM_STEP_NUM_TASKS: a batch script and an interactive shell have the allocation's
    variables, and Python started from there is alone. MASTER_ADDR and MASTER_PORT win where they are set.

    Raises:
        UserError: a variable of the step is missing or no number.
    """
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ:
        return
    step = {name: os.environ.get(f"SLURM_{name}", "") for name in (*_STEP, *_NAMED)}
    if bad := [
        name for name in step if not (step[name] if name in _NAMED else re.fullmatch("[0-9]{1,10}", step[name]))
    ]:
        raise UserError(f"SLURM_{bad[0]} is {step[bad[0]]!r}; a step of srun's has it: start the ranks by srun")
    shares = re.findall(r"(\d+)(?:\(x(\d+)\))?", step["STEP_TASKS_PER_NODE"])  # 4(x2),3 is 4, 4, 3
    here = [share for share, times in shares for _ in range(int(times or 1))]
    if not int(step["NODEID"]) < len(here):
        raise UserError(
            f"SLURM_NODEID is {step['NODEID']}, and SLURM_STEP_TASKS_PER_NODE {step['STEP_TASKS_PER_NODE']!r} does not "
            "go as far; start the ranks by srun"
        )
    os.environ.update(
        RANK=step["PROCID"],
        WORLD_SIZE=step["STEP_NUM_TASKS"],
        LOCAL_RANK=step["LOCALID"],
        LOCAL_WORLD_SIZE=here[int(step["NODEID"])],
    )
    alone = step["STEP_NUM_NODES"] == "1"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1" if alone else first_host(step["STEP_NODELIST"]))
    # Below the ports that systems give away, the same in all processes, another one for each job and step.
    os.environ.setdefault("MASTER_PORT", str(20000 + (7 * int(step["JOB_ID"]) + int(step["STEP_ID"])) % 12000))


def first_host(nodes: str) -> str:
    """Returns the first host of a list as Slurm writes it: of `gpu[07-09,12],login` it is gpu07."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def backend() -> str:
    """Returns the name of what the processes speak through."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def join(timeout: float) -> None:
    """Joins the other processes; communication that takes longer than `timeout` seconds fails.

    Raises:
        UserError: another program listens at the port where they are to meet.
        Fault: they have not met.
    """
    _check_port()
    faults.limit_groups(timeout)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # else all would speak for the first one
    else:
        # It is compiled for a minute, into a folder that all share, for a function that nothing here calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            neighbours = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, neighbours)))
    try:
        deepspeed.init_distributed(backend(), timeout=timedelta(seconds=max(timeout, _APART)))
    except torch.distributed.DistError as error:
        rank, _, processes, address, port = (os.environ[name] for name in _PLACE)
        raise Fault(
            f"rank {rank} has not met the other processes, of {processes}, at {address}:{port} in "
            f"{max(timeout, _APART):g} s; see that all are started and reach that address"
        ) from error
    faults.limit_group(timeout)


def _check_port() -> None:
    """Checks that the first process can listen there, unless its launcher does already."""
    met = torch.distributed.is_initialized() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if met or os.environ["RANK"] != "0":
        return
    port = int(os.environ["MASTER_PORT"])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise UserError(
                f"the processes are to meet at MASTER_PORT {port}, which this one cannot have ({error.strerror}): "
                "another program has it; give a free one, such as --master_port 29511"
            ) from error
