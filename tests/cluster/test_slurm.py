"""The batch scripts on a real Slurm of two nodes: they train, make room and come back, and survive a killed rank."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, process_env
from fault_injection import MARK
from safetensors.torch import load_file
from toy import write_config, write_json

sys.path.append(str(Path(__file__).parent))
import slurm as slurm_here

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]
SCRIPTS = ROOT / "launch" / "slurm"
MOE = {"num_experts": 4, "top_k": 1, "rank": 2, "noise": 1.0, "ep_size": 2}
SECONDS = 240  # for one job, on a busy machine


@pytest.fixture(scope="module")
def slurm() -> Iterator[slurm_here.Slurm]:
    if reason := slurm_here.missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # sockets have short paths
    try:
        with slurm_here.cluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder)


def submit(slurm: slurm_here.Slurm, folder: Path, name: str, mishap: dict[str, Any] | None) -> str:
    """Sends a two-node job off, through submit.sh and pretrain_core.sbatch; its number."""
    hooks = {"custom_hooks": [{"type": "fault_injection.MishapHook", **mishap}]} if mishap else {}
    config = write_config(folder / f"{name}.py", {"model.moe": MOE, "model.drop_path": 0.3, **hooks})
    words = [
        SCRIPTS / "submit.sh",
        f"--output={folder}/{name}.log",
        f"--chdir={ROOT}",
        SCRIPTS / "pretrain_core.sbatch",
    ]
    words += [config, write_json(folder / f"{name}.json", 2), folder / name]
    env = {key: process_env(folder)[key] for key in ("PYTHONPATH", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")}
    env |= {"GPUS": "2", "GPUS_PER_NODE": "1", "CPUS_PER_TASK": "1", "MASTER_ADDR": "127.0.0.1"}
    return slurm.call("bash", *map(str, words), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="", **env)


@pytest.fixture(scope="module")
def whole(slurm: slurm_here.Slurm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work dir of a job that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    state = slurm.finish(submit(slurm, folder, "whole", None), SECONDS)
    assert state == "COMPLETED", (folder / "whole.log").read_text()[-4000:]
    return folder / "whole"


def finished(slurm: slurm_here.Slurm, folder: Path, mishap: str, requeued: int) -> str:
    """What a job said that met the mishap after step 5 and came back."""
    number = submit(slurm, folder, "run", {"kind": mishap, "at": 5})
    state, said = slurm.finish(number, SECONDS), (folder / "run.log").read_text()
    assert state == "COMPLETED", said[-4000:]
    assert (folder / "run" / MARK).exists()
    assert slurm.job(number)["Restarts"] == str(requeued)
    return said


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


def assert_no_orphans(folder: Path) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text()
        except OSError:
            continue
        assert str(folder) not in words or "pytest" in words, words


def test_two_nodes(whole: Path) -> None:
    assert json.loads((whole / "cost.json").read_text())["devices"] == 2


@pytest.mark.parametrize(("why", "by"), [("slurm_wants_the_node", "SIGUSR1"), ("slurm_preempts", "SIGTERM")])
def test_a_job_that_makes_room_comes_back(
    slurm: slurm_here.Slurm, whole: Path, tmp_path: Path, why: str, by: str
) -> None:
    """Warned as before the end of its time, or preempted: it saves, leaves with 85, is requeued and goes on from that
    very step.
    """
    said = finished(slurm, tmp_path, why, 1)
    assert f"rmoe: left on {by} after step 5: iter_5 is saved" in said
    assert "told to leave: requeued" in said
    assert "resuming from" in said
    assert "iter_5" in said.partition("resuming from")[2].splitlines()[0]
    assert "Traceback" not in said
    assert_same_weights(tmp_path / "run", whole)
    assert_no_orphans(tmp_path)


def test_a_job_with_a_killed_rank_comes_back(slurm: slurm_here.Slurm, whole: Path, tmp_path: Path) -> None:
    """Within its allocation, without the queue."""
    said = finished(slurm, tmp_path, "kill", 0)
    assert "task 1: Killed" in said
    assert "restart.py: code 137, restart 1 of 3" in said
    assert "iter_4" in said.partition("resuming from")[2].splitlines()[0]
    assert_same_weights(tmp_path / "run", whole)
    assert_no_orphans(tmp_path)


def test_slurm_takes_the_headers_as_they_are(slurm: slurm_here.Slurm) -> None:
    for script in ("finetune_residual.sbatch", "grid.sbatch"):
        slurm.call("sbatch", "--test-only", str(SCRIPTS / script))
    slurm.call("sbatch", "--test-only", "--nodes=2", str(SCRIPTS / "pretrain_core.sbatch"))


def test_the_chain_runs_its_stages_one_after_the_other(slurm: slurm_here.Slurm, tmp_path: Path) -> None:
    """Real jobs and steps, in which a rank only notes what it was told; where the first stage fails, none follows."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "python").write_text(f"""#!/bin/bash
if [[ $SLURM_PROCID == 0 ]]; then echo "$SLURM_JOB_NAME $SLURM_STEP_NUM_TASKS ${{@: -1}}" >>{tmp_path}/said; fi
[[ $* != *bad.py* ]]
""")
    (tmp_path / "python").chmod(0o755)
    env = {"GPUS": "2", "GPUS_PER_NODE": "1", "CPUS_PER_TASK": "1", "PYTHON": str(tmp_path / "python")}
    states = []
    for core in ("a.py", "bad.py"):
        words = ["bash", "launch/slurm/chain.sh", "work", core, "b.py", "c.py"]
        numbers = slurm.call(*words, cwd=str(tmp_path), **env).split()
        states.append([slurm.finish(number, SECONDS) for number in numbers])
    assert all(slurm.job(number)["Requeue"] == "1" for number in numbers)
    assert states == [["COMPLETED"] * 3, ["FAILED", "CANCELLED", "CANCELLED"]]
    stages = ["core 2 300", "intermediate 8 model.core=work/core", "downstream 8 model.backbone.core=work/intermediate"]
    *said, last = (tmp_path / "said").read_text().splitlines()
    assert said == stages
    assert last in (stages[0], "core 2 --resume")  # the latter where Slurm could not start it and queued it again
