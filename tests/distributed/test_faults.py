"""Processes told to leave, killed or hung: all end in time, say why, and the run goes on as if nothing had been."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Finished, run_processes
from fault_injection import MARK
from safetensors.torch import load_file
from toy import write_config, write_json

from rmoe.engine import faults
from rmoe.engine.ports import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
TRAIN = ROOT / "launch" / "train.py"
DEEPSPEED = Path(sys.executable).parent / "deepspeed"
MOE = {"num_experts": 4, "top_k": 1, "rank": 2, "noise": 1.0, "ep_size": 2, "losses": {"importance": 0.01}}
WILD = {"model.moe": MOE, "model.drop_path": 0.3, "train_dataloader.num_workers": 1}
TIMEOUT = 6.0  # seconds without progress
SLACK = 15.0  # seconds that a busy machine may take longer


def command(folder: Path, name: str, mishap: dict[str, Any] | None, *words: str, **options: Any) -> list[str]:
    """The arguments of launch/train.py for the run in `folder / name`, with `mishap` on its way."""
    hooks = {"custom_hooks": [{"type": "fault_injection.MishapHook", **mishap}]} if mishap else {}
    config = write_config(folder / f"{name}_{len(list(folder.iterdir()))}.py", {**WILD, **hooks, **options})
    written = write_json(config.with_suffix(".json"), 2)
    return [str(config), "--deepspeed_config", str(written), "--work-dir", str(folder / name), *words]


def struck(folder: Path, kind: str, grace: float, **options: Any) -> tuple[list[Finished], float]:
    """Two processes, the second of which meets the mishap after step 5; and how long they lasted then."""
    words = command(folder, "run", {"kind": kind, "at": 5}, "--timeout", str(TIMEOUT), **options)
    ended = run_processes(folder, [TRAIN, *words], 2, check=False, grace=grace)
    return ended, time.time() - float((folder / "run" / MARK).read_text())


def only_line(ended: Finished) -> str:
    """The one line that a user looks for."""
    assert ended.returncode == faults.FAULT, ended.stderr[-3000:]
    lines = [line for line in ended.stderr.splitlines() if line.startswith("rmoe: error:")]
    assert len(lines) == 1, ended.stderr[-3000:]
    assert "--resume goes on" in lines[0]
    return lines[0]


def assert_same_weights(a: Path, b: Path) -> None:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work dir of a run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    run_processes(folder, [TRAIN, *command(folder, "whole", None)], 2)
    assert not (folder / "whole" / faults.HEARTBEATS).exists()
    return folder / "whole"


def test_a_run_told_to_leave_saves_and_goes_on(tmp_path: Path, whole: Path) -> None:
    """SIGTERM to one process of two and to its loader's worker; step 5 is no step that is saved otherwise."""
    words = command(tmp_path, "run", {"kind": "terminate", "at": 5})
    left = run_processes(tmp_path, [TRAIN, *words], 2, check=False, grace=30)
    assert [one.returncode for one in left] == [faults.PREEMPTED] * 2, left[1].stderr[-3000:]
    assert "rmoe: left on SIGTERM after step 5: iter_5 is saved; --resume goes on" in left[0].stderr
    assert "Traceback" not in left[0].stderr + left[1].stderr
    assert not (tmp_path / "run" / faults.HEARTBEATS).exists()
    run_processes(tmp_path, [TRAIN, *words, "--resume"], 2)
    assert_same_weights(tmp_path / "run", whole)
    assert sorted(path.name for path in (tmp_path / "run").glob("iter_*")) == ["iter_5", "iter_6"]


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    ended, seconds = struck(tmp_path, "kill", 30)
    assert ended[1].returncode == -9
    assert "ends after step 5: rank 1 (process " in only_line(ended[0])
    assert "is gone or stopped" in only_line(ended[0])
    assert seconds < TIMEOUT + SLACK


@pytest.mark.parametrize("kind", ["hang", "hang_unheard"])
def test_a_hung_process_ends_all(kind: str, tmp_path: Path) -> None:
    """Also where the folder of the heartbeats is removed at that moment: it is made again."""
    ended, seconds = struck(tmp_path, kind, 30)
    for rank, one in enumerate(ended):
        assert f"rank {rank} on" in only_line(one)
        assert "rank 1 (process" in only_line(one)
        assert "hangs at fault_injection.py" in only_line(one)
    assert "ends after step 5" in only_line(ended[0])
    assert TIMEOUT < seconds < TIMEOUT + SLACK


def test_a_stopped_process_ends_the_others(tmp_path: Path) -> None:
    ended, seconds = struck(tmp_path, "stop", 0.5)
    assert "rank 1 (process" in only_line(ended[0])
    assert "is gone or stopped" in only_line(ended[0])
    assert seconds < TIMEOUT + SLACK


def test_the_error_of_another_process_is_passed_on(tmp_path: Path) -> None:
    ended, _ = struck(tmp_path, "fail", 30)
    assert ended[1].returncode == 1
    assert "ArithmeticError: a mishap of its own" in ended[1].stderr
    assert "rank 1 (process" in only_line(ended[0])
    assert "ended (ArithmeticError: a mishap of its own)" in only_line(ended[0])


def test_a_process_that_never_comes(tmp_path: Path) -> None:
    start = "import sys; from rmoe.engine import launch, processes; processes._APART = 2.0; launch.main(sys.argv[1:])"
    words = command(tmp_path, "run", None, "--timeout", "2")
    ended = run_processes(tmp_path, ["-c", start, *words], 1, env={"WORLD_SIZE": "2"}, check=False)[0]
    assert ended.returncode == faults.FAULT, ended.stderr[-3000:]
    assert "rmoe: error: rank 0 has not met the other processes, of 2, at 127.0.0.1:" in ended.stderr


def test_torchrun_restarts_a_killed_run(tmp_path: Path, whole: Path) -> None:
    """From the last good checkpoint, that of step 4, on."""
    words = command(tmp_path, "run", {"kind": "kill", "at": 5})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    ended = run_processes(tmp_path, [*torchrun, str(TRAIN), *words, "--resume"], 0, env=env)[0]
    assert "iter_4" in "".join(path.read_text() for path in (tmp_path / "run").glob("*/*.log"))
    assert ended.returncode == 0
    assert_same_weights(tmp_path / "run", whole)
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["steps"] == 6


def test_a_killed_run_of_deepspeeds_launcher_is_restarted(tmp_path: Path, whole: Path) -> None:
    """From the last good checkpoint, that of step 4, on; the first attempt is without --resume."""
    words = command(tmp_path, "run", {"kind": "kill", "at": 5}, "--timeout", str(TIMEOUT))
    deepspeed = [str(DEEPSPEED), "--num_accelerators", "2", "--master_port", str(free_port())]
    restart = [str(ROOT / "launch" / "restart.py"), "--max-restarts", "1"]
    ended = run_processes(tmp_path, [*restart, *deepspeed, str(TRAIN), *words], 0)[0]
    assert "restart.py: code 247, restart 1 of 1: goes on from the last checkpoint" in ended.stderr
    assert "ends after step 5: rank 1 (process " in ended.stderr
    assert "iter_4" in "".join(path.read_text() for path in (tmp_path / "run").glob("*/*.log"))
    assert_same_weights(tmp_path / "run", whole)
