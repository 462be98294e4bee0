"""`rmoe configs`: every shipped config, as it tells of itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

from conftest import ROOT
from setuptools import Distribution

from rmoe.cli import main
from rmoe.reporting.catalogue import FOLDER, Entry, entries, show

PATHS = {path for path in FOLDER.glob("*/*.py") if path.parent.name != "_base_"}


def test_it_lists_every_config_once_by_a_path_to_type(monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    found = entries()
    assert len(found) == len(PATHS)
    assert {Path(one.config).resolve() for one in found} == PATHS
    assert all(one.config.startswith("rmoe/configs/") for one in found)


def test_elsewhere_paths_are_whole(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert {Path(one.config) for one in entries()} == PATHS


def test_what_it_tells(monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    (found,) = entries(["segmentation/upernet_swin_tiny", "lower BOUND"])
    assert found == Entry(
        config="rmoe/configs/segmentation/upernet_swin_tiny_dense_ade20k_512_160k.py",
        task="segmentation",
        backbone="swin_tiny_patch4_window7_224",
        pipeline="Lower bound",
        published="mIoU 44.51, multi-scale 45.81 (arXiv 2103.14030 and its code)",
        hardware="8 GPUs with 2 images each (16 in all; keep that product)",
        full_scale="no",
        batch=16,
    )


def test_the_batch_is_the_one_that_the_hardware_makes():
    for one in entries():
        told = re.search(r"(\d+) in all", one.hardware)
        assert (told and int(told[1])) == one.batch, one.config


def test_only_the_demo_has_been_run_at_full_scale():
    for one in entries():
        assert one.full_scale.startswith("yes") == one.pipeline.startswith("Demo") == ("/demo/" in one.config)


def test_the_command(capsys, tmp_path):
    assert main(["configs", "RMoE-I", "mask_rcnn", "--json", str(tmp_path / "list.json")]) == 0
    listed = json.loads((tmp_path / "list.json").read_text())
    assert {one["backbone"] for one in listed} == {"cvt_13", "swin_tiny_patch4_window7_224"}
    shown = capsys.readouterr().out
    assert all(one["config"] in shown for one in listed)
    assert "AP + 1.4 over dense" in shown


def test_paths_are_text(capsys):
    show([Entry("/env[bold]/:fire:\x1b/a.py", "detection", "cvt_13", "RMoE-D", "", "", "no")])
    assert "/env[bold]/:fire:?/a.py" in capsys.readouterr().out


def test_no_such_config(capsys):
    assert main(["configs", "swin_tiny", "nonsense"]) == 2
    message = capsys.readouterr().err
    assert "configs has all of swin_tiny, nonsense; use fewer words" in message
    assert "RMoE-D" in message


def test_a_wheel_has_the_configs_and_their_bases(monkeypatch):
    monkeypatch.chdir(ROOT)
    build = Distribution({"script_name": "setup.py"})
    build.parse_config_files(["setup.cfg"])
    command = build.get_command_obj("build_py")
    command.ensure_finalized()
    packed = {name for package, _, _, names in command.data_files if package == "rmoe" for name in names}
    assert packed >= {str(path.relative_to(FOLDER.parent)) for path in FOLDER.glob("*/*.py")}
