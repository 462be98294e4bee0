"""What the README says can be typed, can be typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rmoe.engine.command import parser
from rmoe.engine.read_config import read_config
from rmoe.engine.shipped import find_config, find_json

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_examples_run() -> None:
    upcycling, loop, rates = blocks("python")[:3]
    torch.manual_seed(0)
    small = "pretrained=False, img_size=64, window_size=2, embed_dim=12, depths=(1, 1, 2, 2), num_classes=3"
    names: dict = {"torch": torch}
    exec(upcycling.replace("pretrained=True", small), names)
    names |= {
        "criterion": torch.nn.functional.cross_entropy,
        "images": torch.randn(4, 3, 64, 64),
        "labels": torch.tensor([0, 1, 2, 0]),
    }
    exec(loop, names)
    names["loss"].backward()
    exec(rates, names)
    assert {group["lr"] for group in names["optimizer"].param_groups} == {1e-4, 4e-4}
    assert names["report"].blocks == ("layers.2.blocks.1.mlp", "layers.3.blocks.1.mlp")


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)$", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}[ \w-]*:", makefile, re.MULTILINE) for target in targets)


def test_flags_of_the_training_command_exist() -> None:
    known = parser().format_help()
    flags = "--deepspeed_config --steps --work-dir --resume --cfg-options --timeout --safe-config"
    for flag in flags.split():
        assert flag in README
        assert flag in known


def test_commands_of_an_installed_wheel_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^rmoe train (demo.*)$", README, re.MULTILINE)
    core, residual = (parser().parse_args(line.split()) for line in lines)
    assert core.steps == residual.steps == 100
    assert find_config(core.config).is_file()
    model = read_config(residual.config, residual.cfg_options or {}).model
    assert model.backbone.core == str(core.work_dir)
    assert model.backbone.moe.get("ep_size", 1) == 1  # the processes that `rmoe train` has
    assert "rmoe data scenes work_dirs/demo/data\n" in README  # where those configs look for it
    for name in re.findall(r"`(zero\w+\.json)`", README):
        assert find_json(Path(name)).is_file()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).is_file()
