"""Runs that build on one another: what is run, what is skipped, and how it fails."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from mmengine.config import Config

from rmoe import pipelines
from rmoe.errors import UserError
from rmoe.pipelines import Failed, Training, moved, run_logged, with_classes

LINE = "11/22 14:17 - INFO - Iter(train) [ 40/300]  lr: 9.6e-04  eta: 0:06:25  loss: 2.6019  decode.loss_ce: 2.6018"
FINISHES = (
    "import pathlib, sys; f = pathlib.Path(sys.argv[1]); [(f / n).touch() for n in ('cost.json', 'model.safetensors')]"
)


@pytest.fixture(autouse=True)
def _as_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "installed", list)


def training(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Training:
    """A run of `code` instead of launch/train.py, which counts its runs."""
    config, json = folder / "config.py", folder / "ds.json"
    config.write_text("steps = 3\n")
    json.write_text("{}")
    one = Training(folder / "run", str(config), str(json))
    command = [sys.executable, "-c", f"{code}; open(r'{folder / 'runs'}', 'a').write('x')", str(one.folder)]
    monkeypatch.setattr(Training, "command", lambda self: command)
    return one


def test_the_command():
    one = Training(Path("out"), "a.py", "b.json", ["x=1"])
    words = ["launch/train.py", "a.py", "--deepspeed_config", "b.json", "--work-dir", "out", "--resume"]
    assert one.command() == ["python", *words, "--cfg-options", "x=1"]
    several = Training(Path("out"), "a.py", "b.json", processes=2).command()
    assert several[:3] == ["deepspeed", "--num_accelerators", "2"]
    assert several[5:] == words


def test_a_config_is_moved_with_all_that_it_reads_in_a_folder():
    dataset = {"root": "old/data", "classes": "old/data/classes.json", "num_classes": 3}
    config = Config({"a": {"core": "old", "other": "older/x"}, "pipeline": [{"root": "no"}, dataset], "num_classes": 3})
    assert moved(config, Path("old"), Path("new/place")) == {
        "a.core": "new/place",
        "pipeline.1.root": "new/place/data",
        "pipeline.1.classes": "new/place/data/classes.json",
    }
    assert with_classes(config, 5) == {"pipeline.1.num_classes": 5, "num_classes": 5}


def test_only_what_names_a_path_is_moved():
    dataset = {"data_root": "./", "ann_file": "ann.json", "data_prefix": {"img_path": "images"}, "split": "val"}
    config = Config({"dataset": dataset, "evaluator": {"ann_file": "ann.json"}, "scope": "mmseg"})
    assert moved(config, Path("./"), Path("new")) == {"dataset.data_root": "new", "evaluator.ann_file": "new/ann.json"}


def test_progress_is_read_whole(tmp_path):
    seen = []
    line = LINE.replace("2.6019", "nan") + "\n"
    code = f"import time; print({line[:70]!r}, end='', flush=True); time.sleep(0.5); print({line[70:]!r}, end='')"
    run_logged([sys.executable, "-c", code], tmp_path / "log", lambda *told: seen.append(told))
    assert seen == [(40, 300, "nan")]


def test_a_complete_run_is_skipped_unless_something_changed(tmp_path, monkeypatch):
    one = training(tmp_path, monkeypatch, FINISHES)
    assert one.run()
    assert not one.run()
    (tmp_path / "config.py").write_text("steps = 3\ncard = dict(published='nothing')\n")  # which is prose
    assert not one.run()
    assert (tmp_path / "runs").read_text() == "x"
    (tmp_path / "ds.json").write_text("{ }")
    assert not one.current()
    assert one.run()
    before = Training(tmp_path / "before", one.config, one.json, ["seed=1"])
    after = Training(one.folder, one.config, one.json, after=[before])
    assert after.fingerprint() != one.fingerprint()
    assert after.run()
    assert (tmp_path / "runs").read_text() == "xxx"


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    with pytest.raises(Failed):
        training(tmp_path, monkeypatch, "pass").run()
    (tmp_path / "run" / "iter_5").touch()
    training(tmp_path, monkeypatch, FINISHES).run()
    assert (tmp_path / "run" / "iter_5").exists()


def test_a_failure_shows_the_command_the_log_and_the_code(tmp_path, monkeypatch):
    one = training(tmp_path, monkeypatch, "import sys; print('first'); print('reason'); sys.exit(7)")
    with pytest.raises(Failed, match=r"(?s)reason.*-c.*returned exit code 7; all output: .*output.log"):
        one.run()


def test_a_launcher_that_lies_is_caught(tmp_path, monkeypatch):
    with pytest.raises(Failed, match="not complete"):
        training(tmp_path, monkeypatch, "pass").run()


def test_progress_is_read_from_the_log(tmp_path):
    seen = []
    code = f"print({LINE!r}); print('something else')"
    run_logged([sys.executable, "-c", code], tmp_path / "log", lambda *told: seen.append(told))
    assert seen == [(40, 300, "2.6019")]


def test_an_interrupted_command_leaves_nothing_running(tmp_path, monkeypatch):
    note = tmp_path / "pid"
    code = "import subprocess as s, sys; child = s.Popen(['sleep', '99']); "
    code += "print(child.pid, end=' ', file=open(sys.argv[1], 'w')); child.wait()"

    def interrupt(show, text):
        if note.exists() and note.read_text().endswith(" "):
            raise KeyboardInterrupt

    monkeypatch.setattr(pipelines, "_tell", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_logged([sys.executable, "-c", code, str(note)], tmp_path / "output.log")
    stat = Path("/proc", note.read_text().strip(), "stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().split()[2] == "Z":  # a zombie where nobody reaps
            return
        time.sleep(0.1)
    pytest.fail("the grandchild still runs")


def test_what_it_has_not_made_is_left_alone(tmp_path, monkeypatch):
    one = training(tmp_path, monkeypatch, FINISHES)
    one.folder.mkdir()
    assert one.run()  # an empty folder is fine
    (one.folder / "fingerprint").unlink()
    (one.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="run is there already, and no pipeline has made it.*move it away"):
        one.run()
    assert (one.folder / "thesis.tex").read_text() == "years of work"
    elsewhere = tmp_path / "elsewhere"
    one.folder.rename(elsewhere)
    (elsewhere / "fingerprint").write_text("another's")
    one.folder.symlink_to(elsewhere)
    with pytest.raises(UserError, match="move it away"):
        one.run()
    assert (elsewhere / "thesis.tex").exists()
    one.folder.unlink()
    one.folder.write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        one.run()
