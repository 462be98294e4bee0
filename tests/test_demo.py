"""The demo's own work: what it runs, what it skips, and how it fails. That it runs is `make demo`."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[1]
LINE = "11/22 14:17 - INFO - Iter(train) [ 40/300]  lr: 9.6e-04  eta: 0:06:25  loss: 2.6019  decode.loss_ce: 2.6018"
FINISHES = (
    "import pathlib, sys; f = pathlib.Path(sys.argv[1]); [(f / n).touch() for n in ('cost.json', 'model.safetensors')]"
)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "launch" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "_installed", list)
    return module


def training(demo: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> object:
    one = demo.Training(folder / "core", "Core", "core.py", "zero0.json", [])
    command = [sys.executable, "-c", f"{code}; open(r'{folder / 'runs'}', 'a').write('x')", str(one.folder)]
    monkeypatch.setattr(demo.Training, "command", lambda self: command)
    return one


def test_the_commands_are_those_of_the_configs_docstrings(demo):
    for one in demo.trainings(demo.DEFAULT, "low_rank"):
        command = one.command()
        assert command[:3] == ["deepspeed", "--num_accelerators", "2"]
        for word in command[command.index("launch/train.py") :]:
            assert word.startswith("work_dirs") or word.startswith("--") or (ROOT / word).is_file()
        text = (ROOT / command[command.index("launch/train.py") + 1]).read_text().split('"""')[1]
        assert f"--deepspeed_config ds_configs/{one.json}" in " ".join(text.split())
        assert f"--work-dir {one.folder}" in " ".join(text.split())


def test_elsewhere_every_path_of_the_configs_is_changed(demo):
    for one in demo.trainings(Path("elsewhere"), "full"):
        config = Config.fromfile(ROOT / "rmoe/configs/demo" / one.config, import_custom_modules=False)
        config.merge_from_dict(dict(option.split("=") for option in one.options))
        used = str([config.model, config.train_dataloader, config.val_dataloader, config.val_evaluator])
        assert "elsewhere/data" in used
        assert "work_dirs" not in used
        assert ("'residual': 'full'" in used) == one.folder.name.endswith("residual_full")


def test_a_complete_step_is_skipped_unless_its_configuration_changed(demo, tmp_path, monkeypatch, capsys):
    one = training(demo, tmp_path, monkeypatch, FINISHES)
    first = demo._train(one, "")
    assert demo._train(one, "") == first
    assert (tmp_path / "runs").read_text() == "x"
    assert "complete in" in capsys.readouterr().out
    assert demo._train(one, "another core") != first
    assert (tmp_path / "runs").read_text() == "xx"
    assert "starting over" in capsys.readouterr().out


def test_an_interrupted_step_goes_on(demo, tmp_path, monkeypatch):
    with pytest.raises(demo.Failed):
        demo._train(training(demo, tmp_path, monkeypatch, "pass"), "")
    (tmp_path / "core" / "iter_5.pth").touch()
    demo._train(training(demo, tmp_path, monkeypatch, FINISHES), "")
    assert (tmp_path / "core" / "iter_5.pth").exists()


def test_a_failure_shows_the_command_the_log_and_the_code(demo, tmp_path, monkeypatch):
    one = training(demo, tmp_path, monkeypatch, "import sys; print('first'); print('reason'); sys.exit(7)")
    with pytest.raises(demo.Failed, match=r"(?s)reason.*-c.*left with exit code 7; all output: .*output.log"):
        demo._train(one, "")


def test_a_launcher_that_lies_is_caught(demo, tmp_path, monkeypatch):
    with pytest.raises(demo.Failed, match="not complete"):
        demo._train(training(demo, tmp_path, monkeypatch, "pass"), "")


def test_progress_is_read_from_the_log(demo):
    assert demo._STEP.findall(f"{LINE}\nsomething else") == [("40", "300", "2.6019")]


def test_an_interrupted_demo_leaves_nothing_running(demo, tmp_path, monkeypatch):
    note = tmp_path / "pid"
    code = "import subprocess as s, sys; child = s.Popen(['sleep', '99']); "
    code += "print(child.pid, end=' ', file=open(sys.argv[1], 'w')); child.wait()"

    def interrupt(bar, text):
        if note.exists() and note.read_text().endswith(" "):
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo._run_logged([sys.executable, "-c", code, str(note)], tmp_path / "output.log")
    stat = Path("/proc", note.read_text().strip(), "stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().split()[2] == "Z":  # a zombie where nobody reaps
            return
        time.sleep(0.1)
    pytest.fail("the grandchild still runs")
