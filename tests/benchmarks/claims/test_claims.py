"""The claims' arithmetic by hand, and that the arms of a seed differ in the experts alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from torch import nn

from benchmarks.claims import arms as claims
from benchmarks.claims import statistics
from benchmarks.claims.arms import ARMS, QUICK, UPSTREAM
from benchmarks.claims.pictures import table
from benchmarks.claims.runs import plan
from benchmarks.claims.statistics import again, cost, difference, pipeline_cost, quality, ratio, results
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.config import ResidualMoEConfig
from rmoe.engine.optim import param_groups
from rmoe.pipelines import Training


def test_differences_are_between_values_of_one_seed() -> None:
    found = quality({"residual": {1: 22.0, 0: 11.0}, "dense": {1: 20.0, 0: 10.0, 2: 99.0}}, "residual")
    assert (found["seeds"], found["values"], found["mean"]) == ([0, 1], [11.0, 22.0], 16.5)
    assert found["diff_to_dense"] == 1.5
    assert (found["diff_to_residual"], found["interval95_to_residual"]) == (0, [0, 0])
    assert (found["diff_to_moe"], found["interval95_to_moe"]) == (None, None)


def test_cost_ratios_are_of_one_seed() -> None:
    seconds = {
        "residual": {0: 110.0, 1: 210.0},
        "dense": {0: 100.0, 1: 200.0, 2: 7.0},
    }
    keys = ("pipeline_device_seconds", "finetune_device_seconds", "pipeline_flops", "finetune_flops")
    costs = {name: {seed: dict.fromkeys(keys, x) for seed, x in each.items()} for name, each in seconds.items()}
    found = cost(costs, "residual")
    assert found["pipeline_device_seconds"] == 160
    assert found["cost_vs_dense"] == found["finetune_flops_vs_dense"] == pytest.approx((1.10 + 1.05) / 2)
    assert found["cost_interval95"][0] < 1.05 < 1.10 < found["cost_interval95"][1]
    assert found["cost_vs_moe"] is None


def test_every_mixture_is_a_valid_one() -> None:
    arms = [*ARMS.values(), *claims.LONG.values(), *claims.ABLATION.values()]
    for arm in [*arms, *UPSTREAM.values()]:
        if arm.moe:
            ResidualMoEConfig.from_dict(arm.moe)
    assert {arm.upstream for arm in arms} == set(UPSTREAM)


def test_choices_of_the_optimizer_are_of_parameters_that_there_are() -> None:
    model = nn.Module()
    model.backbone = TimmPyramid(
        "cvt_13",
        {"embed_dims": (4, 4, 8), "depths": (1, 1, 2), "num_heads": (1, 1, 1)},
        (0, 1, 2),
        moe=claims.EXPERTS,
        allow_random_core=True,
    )

    def settings(**options: Any) -> dict[int, tuple[float, float]]:
        groups = param_groups(model, 1.0, 1.0, **options)
        return {id(x): (group["lr"], group["weight_decay"]) for group in groups for x in group["params"]}

    plain = settings()
    arms = {name: arm for name, arm in claims.ABLATION.items() if arm.options}
    assert len(arms) == 6
    for name, arm in arms.items():
        changed = settings(**{key.removeprefix(claims._LR): value for key, value in arm.options.items()})
        assert {key for key in plain if plain[key] != changed[key]}, name


def test_a_part_keeps_away_from_the_runs_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Config, "dump", lambda config, path: path.touch()
    )  # formatting some hundred takes most of a minute
    _, whole, arms = claims.portion(None, claims.FULL)
    file, longer, some = claims.portion("long", claims.FULL)
    assert (file, longer.tasks, longer.steps) == ("long", ("segmentation",), {"segmentation": 1200})
    first, second = plan(tmp_path, whole, arms), plan(tmp_path, longer, some)
    shared = [key for key in second if key in first]
    assert {first[key].folder == second[key].folder for key in shared if key[1] == "upstream"} == {True}
    assert {first[key].folder == second[key].folder for key in shared if key[1] != "upstream"} == {False}
    seeds = [seed for _, where, seed in second if where != "upstream"]
    assert seeds == sorted(len(some) * [0, 1, 2])  # one after the other: what is done is done for all arms


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Training]:
    """The quick plan, with what finished runs leave: dense cost 100 s and 10 steps of 7 FLOPs, others more."""
    planned = plan(tmp_path_factory.mktemp("claims"), QUICK, {name: ARMS[name] for name in QUICK.arms})
    for (name, _, _), training in planned.items():
        training.folder.mkdir(parents=True)
        more = 0 if name in ("dense", "core") else 50
        cost = {"device_seconds": 100 + more, "steps": 10, "flops_per_step": 7 + more}
        (training.folder / "cost.json").write_text(json.dumps(cost))
    return planned


def test_stages_come_in_order_and_are_shared(runs: dict[Any, Training]) -> None:
    keys = list(runs)
    assert len(keys) == 2 * (2 + 3)  # seeds × (core, moe; three arms)
    for key, training in runs.items():
        for before in training.after:
            assert keys.index(key) > [one.folder for one in runs.values()].index(before.folder)
    assert runs["dense", "segmentation", 0].after == runs["residual", "segmentation", 0].after


def test_every_run_has_a_config_of_its_own(tmp_path: Path) -> None:
    runs = plan(tmp_path, QUICK, {"importance 0.05": ARMS["dense"]})
    assert len({training.config for training in runs.values()}) == len(runs) == 2 * (1 + 1)


def test_arms_of_a_seed_differ_in_the_experts_alone(runs: dict[Any, Training]) -> None:
    dense, residual = (
        Config.fromfile(runs[name, "segmentation", 1].config, import_custom_modules=False).to_dict()
        for name in ("dense", "residual")
    )
    assert residual["model"]["backbone"].pop("moe") == {"num_experts": 8, "top_k": 1, "train_core": False}
    assert (dense.pop("stage"), residual.pop("stage")) == ("dense", "residual")
    assert dense == residual
    assert dense["randomness"]["seed"] == 1
    assert dense["param_scheduler"][-1]["end"] == dense["train_cfg"]["max_iters"] == 2


@pytest.mark.parametrize("where", ["upstream", "segmentation"])
def test_the_upper_bound_is_the_shipped_one(runs: dict[Any, Training], where: str) -> None:
    name = {"upstream": "cvt_13_moe_imagenet1k", "segmentation": "upernet_cvt_13_moe_ade20k_512_160k"}[where]
    files = (f"rmoe/configs/{where}/{name}.py", runs["moe", where, 0].config)
    shipped, ours = (Config.fromfile(file, import_custom_modules=False).model for file in files)
    assert ours.get("backbone", ours).moe == shipped.get("backbone", shipped).moe | {"ep_size": 1}


def test_a_pipeline_costs_the_sum_of_its_stages(runs: dict[Any, Training]) -> None:
    found = pipeline_cost(runs["moe", "segmentation", 0])
    assert found["finetune_device_seconds"] == 150
    assert found["pipeline_device_seconds"] == 300
    assert found["pipeline_flops"] == 2 * 10 * 57


def test_a_second_run_is_compared_figure_by_figure() -> None:
    first = [{"arm": "dense", "where": "detection", "seed": 1, "box AP": 10.0, "mask AP": 5.0}]
    published = [first[0] | {"seed": seed, "box AP": 9.0 + seed, "mask AP": 5.25} for seed in (0, 1)]
    box, mask = again(first, [first[0] | {"mask AP": 5.5}], published)
    assert (box["metric"], box["first"], box["again"], box["equal"]) == ("box AP", 10.0, 10.0, True)
    assert (mask["metric"], mask["first"], mask["again"], mask["equal"]) == ("mask AP", 5.0, 5.5, False)
    assert (box["claims_runs"], mask["claims_runs"]) == (10.0, 5.25)


def test_the_rows_of_claims(runs: dict[Any, Training], monkeypatch: pytest.MonkeyPatch) -> None:
    class FinishedRun:
        def __init__(self, folder: Path) -> None:
            self.values = lambda: {"mIoU": float(folder.name[-1])}
            self.train_loss = lambda: 2.0 if folder.name.startswith("dense") else 1.5

    monkeypatch.setattr(statistics, "Run", FinishedRun)
    rows = {row["arm"]: row for row in results(runs, QUICK, {name: ARMS[name] for name in QUICK.arms})}
    assert list(rows) == ["dense", "residual", "moe"]
    wanted = {"arm", "task", "metric", "seeds", "values", "mean", "diff_to_dense", "interval95"}
    wanted |= {"pipeline_device_seconds", "cost_vs_dense", "cost_vs_moe"}
    assert all(wanted <= row.keys() for row in rows.values())
    assert (rows["dense"]["values"], rows["dense"]["diff_to_dense"]) == ([0.0, 1.0], 0)
    assert rows["residual"]["train_loss"]["diff_to_dense"] == -0.5
    assert rows["residual"]["cost_vs_dense"] == pytest.approx(250 / 200)
    assert rows["residual"]["cost_vs_moe"] == pytest.approx(250 / 300)
    assert difference(rows["moe"]) == (0, [0, 0])
    assert ratio(rows["residual"], "cost", "moe") == (pytest.approx(250 / 300), pytest.approx([250 / 300] * 2))
    assert ratio(rows["residual"], "flops").interval is None
    assert table(rows.values())[0]["95 %"] == "+0.00 … +0.00"
