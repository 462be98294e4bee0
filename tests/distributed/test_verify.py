"""The self-check passes where all is well and names what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_alone(tmp_path: Path, launch: Any) -> None:
    """As a user starts it, without a launcher."""
    done = launch([ROOT / "launch" / "verify.py", "--work-dir", tmp_path / "work"], nproc=0)[0]
    assert "0 failed" in done.stdout
    assert done.stdout.count("PASS") == 14
    assert "processes 1, hosts 1, gloo, ep_size [1]" in done.stdout
    assert not (tmp_path / "work").exists()


def test_a_folder_that_is_there_is_kept(tmp_path: Path, launch: Any) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "step").write_text("years of work")
    done = launch([ROOT / "launch" / "verify.py", "--work-dir", tmp_path / "work"], nproc=0)[0]
    assert "0 failed" in done.stdout
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["step"]
    (tmp_path / "file").touch()
    done = launch([ROOT / "launch" / "verify.py", "--work-dir", tmp_path / "file"], nproc=0, check=False)[0]
    assert done.returncode == 2
    assert "verify.py: error: no folder can be made in" in done.stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, dict[str, str]], list[Any]]:
    """What failed by what was broken, and how the two processes ended."""
    from conftest import run_processes

    folder = tmp_path_factory.mktemp("pair")
    script = Path(__file__).with_name("break_verify.py")
    ended = run_processes(folder, [script, folder], 2, check=False)
    files = [folder / f"failed.{rank}" for rank in (0, 1)]
    assert all(file.exists() for file in files), ended[0].stderr[-3000:]
    assert files[0].read_text() == files[1].read_text()
    return json.loads(files[0].read_text()), ended


def test_a_pair(pair: tuple[dict[str, dict[str, str]], list[Any]]) -> None:
    assert pair[0]["nothing"] == {}


@pytest.mark.parametrize(
    ("broken", "name", "figure", "kinds"),
    [
        ("clip norm", "clip norm: ep_size 2, ZeRO 0", "more than 1e-05", {"clip norm", "gradients"}),
        ("checkpoint", "checkpoint: ep_size 1, ZeRO 2 → ep_size 2, ZeRO 0", "more than 1e-05", {"checkpoint"}),
        (
            "frozen",
            "frozen and trained: ep_size 1, ZeRO 0",
            "1.core.fc1.weight is frozen and has changed",
            {"frozen and trained"},
        ),
        ("one process", "groups", "process 1: ep_size 2: expert group [1], not [0, 1]", {"groups"}),
    ],
)
def test_what_is_broken_is_named(
    pair: tuple[dict[str, dict[str, str]], list[Any]], broken: str, name: str, figure: str, kinds: set[str]
) -> None:
    """And little else: with a wrong norm, weights are wrong as well, but nothing at ep_size 1."""
    failed = pair[0][broken]
    assert figure in failed[name]
    assert {one.partition(":")[0] for one in failed} == kinds
    if broken == "clip norm":
        assert not any("ep_size 2, ZeRO 0" not in one for one in failed)


def test_a_failure_is_shown_and_is_the_exit_code(pair: tuple[dict[str, dict[str, str]], list[Any]]) -> None:
    for one in pair[1]:
        assert one.returncode == 1
    assert "FAIL" in pair[1][0].stdout
    assert "gradients: ep_size 2, ZeRO 2" in pair[1][0].stdout.partition("failed")[2]
