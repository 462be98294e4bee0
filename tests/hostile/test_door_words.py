"""The command line, the launcher's variables, folders for results and damaged runs: one line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest
from toy import write_config

from rmoe.cli import main as rmoe
from rmoe.engine import launch, processes
from rmoe.engine.lock import check_folder
from rmoe.engine.read_config import read_config
from rmoe.errors import UserError
from rmoe.reporting.report import Run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cfg-options", "randomness.seed"], "'randomness.seed' is not KEY=VALUE"),
        (["--cfg-options", "=3"], "is not KEY=VALUE"),
        *((["--timeout", text], f"--timeout: {text} is no time") for text in ("inf", "nan", "0", "-1", "1e9")),
        (["--timeout", "x"], "--timeout: invalid"),
        (["--work-dir", ""], "--work-dir.*empty"),
        (["--no-such"], "unrecognized"),
    ],
    ids=str,
)
def test_words_of_the_command_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.parser().parse_args(["c.py", "--deepspeed_config", "x.json", *words])
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "key", ["model.", "model..moe", "param_scheduler.0.", "param_scheduler.9.power", "train_cfg.a.b.", ""]
)
def test_keys_of_options(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--cfg-options"):
        read_config(write_config(tmp_path / "x.py"), {key: 1})


PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("name", PLACE)
def test_a_place_is_whole(name: str, place: pytest.MonkeyPatch) -> None:
    processes.check_place()
    place.delenv(name)
    with pytest.raises(UserError, match=f"but not {name}"):
        processes.set_place()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in ("two", "-1", "1", "1.0")),
        *(("WORLD_SIZE", value) for value in ("two", "0", "-2")),
        *(("LOCAL_RANK", value) for value in ("-1", "x")),
        *(("MASTER_PORT", value) for value in ("x", "0", "70000", "-1")),
        *(("MASTER_ADDR", value) for value in ("no.such.host.invalid", "a" * 300, "x..y")),
        ("LOCAL_WORLD_SIZE", "x"),
    ],
)
def test_a_place_is_one_that_can_be(name: str, value: str, place: pytest.MonkeyPatch) -> None:
    place.setenv(name, value)
    with pytest.raises(UserError, match=name):
        processes.set_place()


def test_a_port_that_another_program_has(place: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(UserError, match="MASTER_PORT.*another program has it"):
            processes.join(10)


@pytest.mark.parametrize(
    ("name", "value"),
    [("PROCID", None), ("PROCID", "x"), ("NODEID", "9"), ("STEP_TASKS_PER_NODE", None), ("JOB_ID", "")],
)
def test_a_step_of_srun_is_whole(name: str, value: str | None, place: pytest.MonkeyPatch) -> None:
    for each in PLACE:
        place.delenv(each)
    step = {"JOB_ID": "12", "STEP_ID": "0", "PROCID": "1", "LOCALID": "1", "NODEID": "0", "STEP_NUM_TASKS": "2"}
    step |= {"STEP_NUM_NODES": "1", "STEP_NODELIST": "n1", "STEP_TASKS_PER_NODE": "2", name: value}
    for each, given in step.items():
        if given is not None:
            place.setenv(f"SLURM_{each}", given)
        else:
            place.delenv(f"SLURM_{each}", raising=False)
    with pytest.raises(UserError, match=f"SLURM_{name}"):
        processes.set_slurm()


def test_folders_for_results(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for folder in (
        tmp_path / "file",
        tmp_path / "file" / "x",
        tmp_path / "dangling",
        tmp_path / ("x" * 300),
        Path("a\0b"),
    ):
        with pytest.raises(UserError, match="cannot be written.*give another --work-dir"):
            check_folder(folder)
    check_folder(tmp_path / "new" / "one")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not os.geteuid(), reason="root may write everywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="read-only"):
        check_folder(tmp_path / "work")


@pytest.mark.parametrize(
    "words",
    [
        ["estimate", "c.py", "--gpus", "0"],
        ["estimate", "c.py", "--gpus", "-1"],
        ["estimate", "c.py", "--gpus", "1000000000"],
        ["estimate", "c.py", "--gpus", "1", "--micro-batch", "0"],
        ["estimate", "c.py", "--gpus", "1", "--ep-size", "-2"],
        ["estimate", "c.py", "--gpus", "1", "--image-size", "0", "32"],
        ["estimate", "c.py", "--gpus", "1", "--image-size", "-32", "32"],
        ["estimate", "c.py", "--gpus", "1", "--image-size", "32", "100000000"],
        ["analyze", "absent", "--images", "0", "--out", "out"],
        ["analyze", "absent", "--images", "-1", "--out", "out"],
        ["report", "absent", "--out", "out"],
    ],
    ids=" ".join,
)
def test_sizes_on_the_command_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert rmoe(words) == 2
    assert capsys.readouterr().err.startswith("rmoe: error: ")


COSTS = ("train_seconds", "device_seconds", "flops_per_step", "params_total", "params_active", "params_trainable")
GOOD_RUN = {
    "run.py": "val_evaluator = dict(type='IoUMetric')\nstage = 'dense'",
    "cost.json": json.dumps(dict.fromkeys(COSTS, 1.0)),
    "scalars.json": '{"mIoU": 40.0, "step": 1}',
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("run.py", text) for text in (None, "", "1 / 0", "val_evaluator = 3", "stage = 'dense'", "model = (")),
        ("run.py", "val_evaluator = dict(type='Other')\nstage = 'dense'"),
        ("run.py", "val_evaluator = [dict(type='IoUMetric')]\nstage = 'dense'"),
        *(("cost.json", text) for text in (None, "", "[]", "{", "3", "{}")),
        *(("scalars.json", text) for text in (None, "", "[]", "{", "3", '{"mIoU": "high"}', '{"mIoU": null}', "{}")),
    ],
    ids=str,
)
def test_a_report_of_what_is_no_finished_run(name: str, content: str | None, tmp_path: Path) -> None:
    for each, text in {**GOOD_RUN, name: content}.items():
        if text is not None:
            (tmp_path / each).write_text(text)
    with pytest.raises(UserError, match=str(tmp_path)):
        (Run(tmp_path).values(), Run(tmp_path).cost())


@pytest.mark.parametrize("words", [["data", "check", "coco", "x"], ["estimate", "c.py", "--gpus", "1"], ["configs"]])
def test_a_file_to_write_is_looked_at_first(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "absent" / "x.json", tmp_path):
        with pytest.raises(SystemExit) as ended:
            rmoe([*words, "--json", str(path)])
        assert ended.value.code == 2
        assert "--json" in capsys.readouterr().err
