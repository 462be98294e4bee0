"""The training's words, and `rmoe train` as a user has it who installed a wheel into an empty machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, process_env

import rmoe
from rmoe import cli
from rmoe.engine.command import parser


@pytest.mark.parametrize("words", ["0", "-1", "x", "1.5", "1e3", "", "²", "9" * 12])
def test_steps_are_a_whole_number(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["c.py", f"--steps={words}"])
    assert ended.value.code == 2
    assert f"--steps: {words!r} is no number of steps; it is a whole number, at least 1" in capsys.readouterr().err


def test_what_need_not_be_said() -> None:
    arguments = parser().parse_args(["c.py"])
    assert arguments.deepspeed_config == Path("zero2.json")
    assert arguments.steps is None
    assert parser().parse_args(["c.py", "--steps", "12"]).steps == 12


def test_rmoe_train_has_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list = []
    monkeypatch.setattr("rmoe.engine.command.start", seen.append)
    words = ["c.py", "--deepspeed_config", "x.json", "--resume", "--debug", "--cfg-options", "a.b=[1,2]"]
    assert cli.main(["train", *words]) == 0
    known = vars(parser().parse_args(words))
    assert {key: value for key, value in vars(seen[0]).items() if key in known} == known


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"rmoe {rmoe.__version__}\n"


def test_help_needs_nothing_heavy() -> None:
    code = "import sys; from rmoe.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy', 'rich', 'mmengine', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("words", [["demo/coer.py"], ["demo/core.py", "--deepspeed_config", "zero4.json"]])
def test_a_wrong_name_is_told_at_once(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *words]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert "did you mean 'demo/core.py'" in err or "did you mean 'zero" in err
    assert err.count("\n") == 1


def installed(folder: Path) -> Path:
    """A folder with the wheel of this tree in it, installed."""
    wheels, site, pip = folder / "wheels", folder / "site", [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    tree = folder / "tree"
    tree.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (tree / name).symlink_to(ROOT / name)
    words = ["cp", "-a", str(ROOT / "rmoe"), str(ROOT / "ds_configs"), str(tree)]  # pip builds in the tree
    subprocess.run(words, check=True)
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = wheels.glob("rmoe-*.whl")
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
    return site


@pytest.mark.slow
def test_a_wheel_trains_in_an_empty_folder(tmp_path: Path) -> None:
    site, empty = installed(tmp_path), tmp_path / "empty"
    assert sorted(path.name for path in (site / "rmoe/ds_configs").iterdir()) == sorted(
        path.name for path in (ROOT / "ds_configs").iterdir()
    )
    shipped = {path.relative_to(ROOT) for path in (ROOT / "rmoe/configs").rglob("*.py")}
    assert all((site / path).is_file() for path in shipped)
    empty.mkdir()
    env = process_env(tmp_path) | {"PYTHONPATH": str(site)}

    def rmoe_command(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(site / "bin" / "rmoe"), *words]
        return subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, timeout=240)

    size = ["--size", "32", "--upstream-classes", "2", "--upstream-train", "8", "--upstream-val", "1"]
    scenes = ["--scenes-train", "1", "--scenes-val", "1", "--jobs", "1"]
    data = rmoe_command("data", "scenes", "work_dirs/demo/data", *size, *scenes)
    assert data.returncode == 0, data.stderr
    options = ["model.num_classes=2", "model.kwargs.depths=(1,1,1,1)", "train_dataloader.batch_size=4"]
    options += [f"{part}_dataloader.dataset.num_classes=2" for part in ("train", "val")]
    run = rmoe_command("train", "demo/core.py", "--steps", "2", "--cfg-options", *options)
    assert run.returncode == 0, run.stdout + run.stderr
    before = run.stdout.partition("Iter(train)")[0].splitlines()
    assert before[0] == "rmoe: importing PyTorch, DeepSpeed and OpenMMLab (some seconds)"
    assert before[1] == "rmoe: reading demo/core.py and zero2.json"
    assert len(before) <= 40
    assert not re.search("FileClient|OneDL|Setting accelerator|UserWarning", run.stdout + run.stderr)
    assert re.findall(r"Iter\(train\)\s+\[(\d/\d)\].* loss: \d", run.stdout) == ["1/2", "2/2"]
    work = empty / "work_dirs" / "core"
    assert json.loads((work / "cost.json").read_text())["steps"] == 2
    (log,) = work.glob("*/*.log")
    assert all(text in log.read_text() for text in ("System environment", "Hooks will be executed", "depths"))
    assert (work / "core.py").is_file()
    assert sorted(os.listdir(empty)) == ["work_dirs"]
