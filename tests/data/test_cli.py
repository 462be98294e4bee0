from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rmoe.cli import main
from rmoe.errors import UserError, run_guarded

_SMALL = {"size": 32, "upstream-size": 16, "upstream-classes": 2, "upstream-train": 1, "upstream-val": 1}
_SMALL |= {"scenes-train": 2, "scenes-val": 1, "categories": 3, "jobs": 1}
TINY = [f"--{name}={value}" for name, value in _SMALL.items()]


def test_scenes_then_check(tmp_path, capsys):
    out = tmp_path / "set"
    assert main(["data", "scenes", str(out), *TINY]) == 0
    assert main(["data", "scenes", str(out), *TINY]) == 0
    assert capsys.readouterr().out == f"{out}: written\n{out}: there already, with these parameters\n"
    assert main(["data", "check", "ade20k", str(out / "ade20k")]) == 0
    assert main(["data", "check", "imagenet", str(out / "upstream")]) == 0
    assert main(["data", "check", "coco", str(out / "coco")]) == 0
    assert capsys.readouterr().out.count("no problems found") == 3


def test_every_flag_reaches_the_manifest(tmp_path):
    flags = [*TINY, "--seed", "5", "--styles", "night,outline", "--long-tail", "0.5"]
    assert main(["data", "scenes", str(tmp_path / "set"), *flags]) == 0
    assert json.loads((tmp_path / "set" / "dataset.json").read_text())["parameters"] == {
        "seed": 5,
        "upstream_size": 16,
        "scene_size": 32,
        "upstream_classes": 2,
        "upstream_train": 1,
        "upstream_val": 1,
        "scenes_train": 2,
        "scenes_val": 1,
        "categories": 3,
        "styles": ["night", "outline"],
        "long_tail": 0.5,
    }


def test_a_users_error_is_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "precious").write_text("")
    assert main(["data", "scenes", str(tmp_path), *TINY]) == 2
    assert main(["data", "scenes", str(tmp_path / "set"), "--jobs", "0"]) == 2
    assert main(["data", "check", "coco", str(tmp_path), "--num-classes", "3"]) == 2
    assert main(["data", "prepare", "coco", str(tmp_path), str(tmp_path / "out"), "--synsets", "x"]) == 2
    captured = capsys.readouterr()
    first, second, *others = captured.err.splitlines()
    assert first.startswith(f"rmoe: error: {tmp_path} exists and is no data set")
    assert second == "rmoe: error: --jobs is 0; it is at least 1"
    assert [line.split(";")[0] for line in others] == [
        "rmoe: error: --num-classes is for ade20k",
        "rmoe: error: --synsets is for imagenet",
    ]
    assert not captured.out


def test_check_lists_problems_and_writes_them(tmp_path, capsys):
    file = tmp_path / "problems.json"
    assert main(["data", "check", "imagenet", str(tmp_path / "none"), "--json", str(file)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{tmp_path / 'none'}: 2 problems found"
    written = json.loads(file.read_text())
    assert [problem["message"] for problem in written["problems"]] == lines[:-1]
    assert {problem["kind"] for problem in written["problems"]} == {"missing-folder"}
    assert (written["layout"], written["counts"], written["notes"]) == ("imagenet", {}, [])


def test_run_guarded_ends_the_process(capsys):
    def fails():
        raise UserError("found 3;\nallowed is 2")

    with pytest.raises(SystemExit) as stop:
        run_guarded(fails, "train.py")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "train.py: error: found 3; allowed is 2\n"
    with pytest.raises(SystemExit) as stop:
        run_guarded(lambda: None)
    assert stop.value.code == 0


def test_errors_of_the_program_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_guarded(lambda: 1 // 0)


def test_help_answers_without_heavy_imports():
    code = "import sys; from rmoe.cli import main\ntry: main(['data', 'scenes', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'numpy', 'PIL', 'mmengine', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")
    assert "default: 0)" in done.stdout
