"""The cost of a whole pipeline: its stages are found, and their hours add up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config

from rmoe.cli import main
from rmoe.engine.read_config import read_config
from rmoe.engine.shipped import CONFIGS
from rmoe.errors import UserError
from rmoe.reporting import budget
from rmoe.reporting.budget import Cost, costs, stages
from rmoe.reporting.estimate import share_out, work_of
from rmoe.reporting.machines import GPUS, Cluster
from rmoe.reporting.work import Setting, Work

KWARGS = dict(img_size=32, depth=2, embed_dim=48, num_heads=3)


def write(folder: Path, name: str, core: str | None, steps: int | None, **moe: Any) -> Path:
    model = dict(type="rmoe.TimmClassifier", model="vit_tiny_patch16_224", kwargs=KWARGS, num_classes=7, core=core)
    model["moe"] = dict(num_experts=8, blocks="last_two") | moe if core else None
    dataset = dict(transform=dict(input_size=32))
    cfg = Config(dict(model=model, train_dataloader=dict(batch_size=4, dataset=dataset)))
    if steps:
        cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=steps)
    cfg.dump(folder / f"{name}.py")
    return folder / f"{name}.py"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("upstream/swin_tiny_core_imagenet1k.py", []),
        ("segmentation/upernet_swin_tiny_dense_ade20k_512_160k.py", ["swin_tiny_core_imagenet1k"]),
        (
            "segmentation/upernet_swin_tiny_intermediate_residual_ade20k_512_160k.py",
            ["swin_tiny_core_imagenet1k", "swin_tiny_intermediate_imagenet1k"],
        ),
        ("detection/atss_dyhead_swin_large_moe_coco_2x.py", ["swin_large_moe_imagenet22k"]),
    ],
)
def test_stages_of_the_papers_pipelines(name: str, expected: list[str]) -> None:
    path = CONFIGS / name
    found = stages(path, Config.fromfile(path, import_custom_modules=False))
    assert [stage for stage, _ in found] == [*expected, path.stem]


def test_a_core_that_is_a_file_begins_the_pipeline(tmp_path: Path) -> None:
    path = write(tmp_path, "alone", "swin.pth", 10)
    assert [name for name, _ in stages(path, read_config(path, {}))] == ["alone"]


def test_a_circle_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "one", "work_dirs/two", 10)
    write(tmp_path, "two", "work_dirs/one", 10)
    with pytest.raises(UserError, match="needs this very config first; change `core`"):
        stages(path, read_config(path, {}))


def found(path: Path, gpus: int = 8, **cluster: Any) -> tuple[Work, list[Cost]]:
    cfg = read_config(path, {})
    work = work_of(cfg, Setting(processes=gpus))
    cluster = Cluster(GPUS["h100"], **{"per_node": gpus} | cluster)
    return work, list(costs(path, cfg, work, cluster))


def test_hours_by_hand(tmp_path: Path) -> None:
    write(tmp_path, "before", None, 300)
    work, lines = found(write(tmp_path, "after", "work_dirs/before", 1000))
    assert [(one.config, one.gpus) for one in lines] == [(n, g) for n in ("before", "after") for g in (8, 64, 512)]
    at_eight = lines[3]
    seconds = share_out(work).seconds
    # 1000 steps of 4 images on each of 8, as the run was given: the schedule has no batch of its own.
    assert at_eight.images == 1000 * 32
    assert at_eight.seconds_per_step == pytest.approx(seconds.step)
    assert at_eight.hours == pytest.approx(1000 * seconds.step / 3600)
    assert at_eight.gpu_hours == pytest.approx(8 * at_eight.hours)
    assert at_eight.communication_share == pytest.approx(seconds.communication_share)
    # Eight times as many GPUs, an eighth of the steps, and no less to send.
    assert lines[4].gpu_hours >= at_eight.gpu_hours
    assert lines[4].hours == pytest.approx(1000 / 8 * lines[4].seconds_per_step / 3600)


def test_a_published_batch_counts_images_whatever_this_run_has(tmp_path: Path) -> None:
    path = write(tmp_path, "own", None, 1000)
    path.write_text(path.read_text() + "card = dict(batch=16)\n")
    _, lines = found(path)
    assert {one.images for one in lines} == {16_000}


def test_numbers_of_gpus_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "wide", "core.pth", 10, ep_size=16, num_experts=16)
    _, lines = found(path, gpus=16, nodes=2, per_node=8)
    assert [one.gpus for one in lines] == [64, 512]


def test_an_earlier_stage_without_a_length_is_named(tmp_path: Path) -> None:
    write(tmp_path, "before", None, None)
    with pytest.raises(UserError, match="before does not say in steps how long it trains; give it train_cfg.max_iters"):
        found(write(tmp_path, "after", "work_dirs/before", 1000))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "before", None, 300)
    path, numbers = write(tmp_path, "after", "work_dirs/before", 1000), tmp_path / "estimate.json"
    assert main(["estimate", str(path), "--gpus", "8", "--json", str(numbers)]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("The whole pipeline", "GPU-hours", "kWh", "before", "after", "all"))
    assert max(map(len, shown.splitlines())) <= budget._WIDTH
    listed = json.loads(numbers.read_text())["pipeline"]
    assert len(listed) == 6
    assert all(one["hours"] > 0 for one in listed)


def test_numbers_of_gpus_that_all_do_not_fit_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "alone", None, 10)
    assert main(["estimate", str(path), "--gpus", "12", "--nodes", "2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "No hours: none of 8, 64, 512 is a number of whole nodes of 6 GPUs and a multiple of ep_size 1." in said


def test_the_name_of_a_config_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    cost = Cost("[red]own\x1b[2J:fire:", 8, 1, 1.0, 0.5, 1.0)
    budget.Console(width=100).print(budget._pipeline([cost], Cluster(SimpleNamespace(watts=1.0))))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    assert "[red]own?[2J:fire:" in shown
    assert "\x1b" not in shown


def test_the_table_fits_a_narrow_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = Cost("upernet_swin_tiny_intermediate_residual_ade20k_512_160k", 512, 384_307_200, 1.25, 0.5, 1234.5)
    width = 80
    console = budget.Console(width=width)
    console.print(budget._pipeline([cost, cost], Cluster(SimpleNamespace(watts=700.0))))  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    assert "632,064.0" in "".join(lines)  # 512 × 1234.5 GPU-hours
