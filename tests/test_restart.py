"""launch/restart.py over commands that take no time; tests/distributed/test_faults.py has it over a real launcher."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

IMPATIENT = "import restart, sys; restart._GRACE = 0.3; sys.exit(restart.main())"


def start(folder: Path, restarts: int, script: str) -> subprocess.Popen[str]:
    """`restart.py` over a shell script, which is given the file `said` and sees the other words after it."""
    words = [sys.executable, "-c", IMPATIENT, "--max-restarts", str(restarts), "bash", "-c", script, "bash"]
    words += [str(folder / "said")]
    return subprocess.Popen(words, cwd=ROOT / "launch", stderr=subprocess.PIPE, text=True)


def ended(folder: Path, restarts: int, script: str) -> tuple[int, list[str], str]:
    """Exit code, the lines that the script wrote, and what was said on stderr."""
    child = start(folder, restarts, script)
    said = child.communicate(timeout=30)[1]
    return child.returncode, (folder / "said").read_text().splitlines(), said


@pytest.mark.parametrize("code", [0, 1, 2, 85])
def test_what_would_come_again_or_was_asked_for_is_final(tmp_path: Path, code: int) -> None:
    assert ended(tmp_path, 3, f'echo "run ${{*:2}}" >>$1; exit {code}') == (code, ["run "], "")


@pytest.mark.parametrize(("last", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_faults_are_restarted_with_resume(tmp_path: Path, last: str, code: int) -> None:
    found, lines, said = ended(tmp_path, 2, f'echo "run ${{*:2}}" >>$1; {last}')
    assert (found, lines) == (code, ["run ", "run --resume", "run --resume"])
    assert said.splitlines()[-1] == f"restart.py: code {code}, restart 2 of 2: goes on from the last checkpoint"


def test_what_a_launcher_leaves_behind_is_killed_and_counts_as_a_fault(tmp_path: Path) -> None:
    """As when DeepSpeed's own process is killed: it returns 0, and its ranks go on."""
    code, processes, _ = ended(tmp_path, 1, "sleep 60 & echo $! >>$1")
    assert code == 137
    assert len(processes) == 2
    assert not [process for process in processes if Path("/proc", process).exists()]


@pytest.mark.parametrize("restarts", ["-1", "x", "1.5"])
def test_a_number_of_restarts(restarts: str, tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "launch" / "restart.py"), "--max-restarts", restarts, "true"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert f"'{restarts}' is no number of restarts; it is a whole number, at least 0" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_leave_goes_to_the_ranks_and_is_not_restarted(number: signal.Signals, tmp_path: Path) -> None:
    rank = "RANK=0 bash -c 'trap \"exit 85\" TERM; echo ready >>$0; while :; do sleep 0.05; done' $1"
    child = start(tmp_path, 3, f"trap 'exit 4' TERM; {rank} & wait $!; exit $?")
    while not (tmp_path / "said").exists():
        time.sleep(0.05)
    child.send_signal(number)
    assert "restart" not in child.communicate(timeout=30)[1]
    assert child.returncode == 85


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([], "there is no COMMAND; give that which starts launch/train.py"),
        (["no-such-srun", "x"], "there is no program 'no-such-srun'; COMMAND begins with one"),
    ],
)
def test_a_command_is_needed(command: list[str], said: str) -> None:
    words = [sys.executable, ROOT / "launch" / "restart.py", "--max-restarts", "1", *command]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
