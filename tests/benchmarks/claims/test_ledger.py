"""The ledger keeps what was run, whatever happens while it is written; and what makes a run another one is explicit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.claims import arms, ledger, method
from benchmarks.claims.arms import Arm, Upstream
from benchmarks.claims.ledger import UPSTREAM, Cell, Context, Ledger, fingerprint, recipe, weights_hash
from benchmarks.claims.runs import Trainings
from rmoe.config import ResidualMoEConfig
from rmoe.engine.calibration import check_calibration
from rmoe.errors import UserError

HERE = Context("a machine", "c0ffee")
DENSE = Cell("dense", "segmentation", 3, 1200, "plain,night", 1.0)


def row(cell: Cell = DENSE, context: Context = HERE, **more: Any) -> dict[str, Any]:
    """What a sitting writes of a run, in part."""
    found = {"arm": cell.name, "where": cell.where, "seed": cell.seed, "planned_steps": cell.steps}
    found |= {"styles": cell.styles, "width": cell.width, "device": context.device, "core": context.core}
    return found | {"fingerprint": "abc", "mIoU": 40.0} | more


def test_what_was_added_is_there_the_next_time(tmp_path: Path) -> None:
    path = tmp_path / "results" / "runs.json"
    Ledger(path).add(row())
    again = Ledger(path)
    assert again.find(DENSE, "abc") == again.find(DENSE, "abc", HERE) == [row()]
    assert not again.find(DENSE, "other")
    assert not again.find(DENSE, "abc", HERE._replace(core="other"))
    assert not again.find(DENSE, "abc", HERE._replace(device="other"))
    for name, value in {"name": "soft", "where": "detection", "seed": 4, "steps": 400}.items():
        assert not again.find(DENSE._replace(**{name: value}), "abc")


def test_a_run_again_takes_the_place_of_the_older_one(tmp_path: Path) -> None:
    kept = Ledger(tmp_path / "runs.json")
    kept.add(row())
    kept.add(row(mIoU=41.0, fingerprint="def"))
    assert [one["mIoU"] for one in Ledger(tmp_path / "runs.json").rows] == [41.0]
    kept.add(row(context=HERE._replace(core="other")))
    assert len(Ledger(tmp_path / "runs.json").rows) == 2


def test_two_processes_lose_nothing_of_each_other(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path / "runs.json"), Ledger(tmp_path / "runs.json")
    first.add(row())
    second.add(row(DENSE._replace(seed=4)))
    assert len(second.rows) == len(Ledger(tmp_path / "runs.json").rows) == 2


def test_a_process_killed_while_it_writes_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.json"
    Ledger(path).add(row())
    before = path.read_bytes()

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        Ledger(path).add(row(DENSE._replace(seed=4)))
    assert path.read_bytes() == before
    monkeypatch.undo()
    Ledger(path).add(row(DENSE._replace(seed=4)))  # whatever lies beside it
    assert len(Ledger(path).rows) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3}', '{"rows": [{"arm": "dense"}]}', '{"rows": ["x"]}'])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "runs.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"runs\.json is damaged .*last commit"):
        Ledger(path)
    assert path.read_text() == text


FULL_SIZE = method.method().size


def of(arm: Arm, size: arms.Size = FULL_SIZE, where: str = "segmentation", **stages: Upstream) -> str:
    return fingerprint(size, method.STAGES | stages, where, arm)


def test_what_makes_another_run() -> None:
    size, arm = FULL_SIZE, method.ARMS["soft"]
    found = [
        of(arm),
        of(arm, where="detection"),
        of(replace(arm, moe={**(arm.moe or {}), "rank": 9})),
        of(replace(arm, options={})),
        of(replace(arm, longer=1.1)),
        of(replace(arm, upstream="core_longer")),
        of(arm, replace(size, steps={**size.steps, "segmentation": 400})),
        of(arm, replace(size, batch={**size.batch, "segmentation": 9})),
        of(arm, replace(size, batch={**size.batch, UPSTREAM: 9})),
        of(arm, replace(size, scenes={**size.scenes, "styles": "plain"})),
        of(arm, replace(size, pictures={**size.pictures, "seed": "1"})),
        of(arm, replace(size, upstream_steps=801)),
        of(arm, replace(size, width=2.0)),
        of(arm, core=Upstream(share=2.0)),
    ]
    assert len(set(found)) == len(found)


def test_what_makes_no_other_run() -> None:
    size, arm = FULL_SIZE, method.ARMS["soft"]
    same = {
        of(arm),
        of(arm, replace(size, seeds=(9,), headline_seeds=(), arms=(), tasks=(), label="_x")),
        of(arm, replace(size, steps={**size.steps, "detection": 1}, batch={**size.batch, "detection": 1})),
        of(arm, moe_all=Upstream(None)),  # a stage that it does not start from
        of(Arm(upstream=arm.upstream, moe=dict(reversed((arm.moe or {}).items())), options=arm.options)),
    }
    assert len(same) == 1


def test_a_new_version_is_another_run_of_what_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("dense", "soft", "one_full", "full_calibrated", "upper_bound_all")

    def changed(version: str) -> list[str]:
        before = {name: of(method.ARMS[name]) for name in names}
        monkeypatch.setitem(ledger.VERSIONS, version, 2)
        return [name for name in names if of(method.ARMS[name]) != before[name]]

    assert changed("calibrate") == ["full_calibrated"]
    assert changed("low_rank") == ["soft"]
    assert changed("full") == ["one_full", "full_calibrated"]
    assert changed("experts") == ["upper_bound_all"]
    assert changed("gate") == [*names[1:]]
    assert changed("all") == [*names]


def test_no_run_that_stands_is_invalid() -> None:
    """These are what method_runs.json was begun with. If they change by intent, what stands there is run again."""
    assert {name: of(method.ARMS[name]) for name in method.HEADLINE} == {
        "dense": "096dc21856b9",
        "full_calibrated": "4c2467936189",
        "soft": "49bf11329480",
    }


def test_the_recipe_is_the_one_that_the_runs_had(tmp_path: Path) -> None:
    """Where this fails, a config that the study is made of has changed. If that changes what a run comes to, raise
    `ledger.VERSIONS`: what has it is run again. If it does not, the hash alone is to be changed."""
    trainings = Trainings(tmp_path, FULL_SIZE, method.STAGES, tmp_path / "data")
    trainings.downstream("dense", method.ARMS["dense"], "segmentation", 0)
    trainings.downstream("dense", method.ARMS["dense"], "detection", 0)
    found = {where: recipe(Path(one.config), tmp_path) for (_, where, _), one in trainings.runs.items()}
    assert found == json.loads((Path(__file__).parent / "recipe.json").read_text())


def test_every_mixture_says_what_it_is_made_of() -> None:
    """A default that changes must change no arm."""
    names = {"num_experts", "top_k", "residual", "combine", "blocks", "noise", "gate_std", "losses"}
    for name, one in {**method.ARMS, **method.STAGES}.items():
        if one.moe:
            check_calibration(one.options.get("calibrate"), [ResidualMoEConfig.from_dict(one.moe)])
            needed = names | ({"rank"} if one.moe["residual"] == "low_rank" else set())
            needed |= {"expert_init"} if one.moe["residual"] == "experts" else {"train_core"}
            assert needed <= one.moe.keys(), name


def test_the_hash_is_of_weights_alone(tmp_path: Path) -> None:
    weights = {"b": torch.arange(3.0), "a": torch.ones(2, 2)}
    found = []
    for number, (tensors, about) in enumerate(
        [
            (weights, {"date": "yesterday"}),
            (weights, {"date": "today"}),
            (weights | {"b": torch.tensor([0.0, 1.0, 2.0 + 1e-6])}, {}),
            ({"c": weights["b"], "a": weights["a"]}, {}),
            (weights | {"a": torch.ones(4)}, {}),
            (weights | {"a": torch.ones(2, 2, dtype=torch.float64)}, {}),
            (weights | {"a": torch.ones(2, 2, dtype=torch.bfloat16)}, {}),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", about)
        found.append(weights_hash(folder))
    assert found[0] == found[1]
    assert len({*found}) == len(found) - 1
