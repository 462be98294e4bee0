"""The demo's own work: which runs it makes, and that they are those of the configs. That it runs is `make demo`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from mmengine.config import Config

from rmoe.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "launch" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)
    spec.loader.exec_module(module)
    return module


def test_the_commands_are_those_of_the_configs_docstrings(demo):
    runs = demo.trainings(demo.DEFAULT, "low_rank")
    assert set(runs) == set(demo.TITLES)
    assert len(runs) + 2 == demo.STEPS
    for one in runs.values():
        command = one.command()
        assert command[:3] == ["deepspeed", "--num_accelerators", "2"]
        for word in command[command.index("launch/train.py") :]:
            assert word.startswith(("work_dirs", "--")) or word in one.options or (ROOT / word).is_file()
        text = (ROOT / one.config).read_text().split('"""')[1]
        assert f"--deepspeed_config {one.json}" in " ".join(text.split())
        assert f"--work-dir {one.folder}" in " ".join(text.split())
        assert all(f"--cfg-options {option}" in " ".join(text.split()) for option in one.options)


def test_elsewhere_every_path_of_the_configs_is_changed(demo):
    for one in demo.trainings(Path("elsewhere"), "full").values():
        config = Config.fromfile(ROOT / one.config, import_custom_modules=False)
        config.merge_from_dict(dict(option.split("=") for option in one.options))
        used = str([config.model, config.train_dataloader, config.val_dataloader, config.val_evaluator])
        assert "elsewhere/data" in used
        assert "work_dirs" not in used
        assert ("'residual': 'full'" in used) == one.folder.name.endswith("residual_full")


class Steps:
    """A training of two steps, without any."""

    folder = Path("run")

    def current(self):
        return True

    def command(self):
        return ["train"]

    def run(self, show):
        for step in (1, 2):
            show(step, 2, "0.25")
        return True


def test_a_training_is_followed_in_a_file_and_on_a_terminal(demo, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_TELL", 0.0)
    demo._train(Steps())
    out, err = capsys.readouterr()
    assert out.endswith("step 1/2, loss 0.25\nstep 2/2, loss 0.25\n")
    assert not err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    demo._train(Steps())
    out, err = capsys.readouterr()
    assert "step 1/2" not in out
    assert "2/2" in err
    assert "loss 0.25" in err


def test_a_folder_of_somebody_else_is_refused(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "ROOT", ROOT)
    monkeypatch.setattr(demo, "_render", lambda folder: None)
    monkeypatch.setattr(demo.sys, "argv", ["demo.py", "--work-dir", str(tmp_path)])
    monkeypatch.setattr(demo.os.environ, "update", lambda **words: None)
    monkeypatch.setattr(demo.signal, "signal", lambda number, handler: None)
    (tmp_path / "core").mkdir()
    (tmp_path / "core" / "mine.txt").write_text("years of work")
    with pytest.raises(UserError, match="core is there already, and no pipeline has made it"):
        demo.main()
    assert (tmp_path / "core" / "mine.txt").read_text() == "years of work"
