"""Ideas of other papers: each is what its keys say, and the page has them all."""

from __future__ import annotations

from pathlib import Path

from benchmarks import tables
from benchmarks.claims import ideas
from benchmarks.claims.ideas import IDEAS, run_as
from benchmarks.claims.method import ARMS, at
from benchmarks.claims.method_verdicts import changed, ideas_table
from rmoe.config import Calibration, ResidualMoEConfig


def test_every_arm_can_be_built_and_changes_one_that_there_is() -> None:
    arms = ideas.ideas().arms
    for name, idea in IDEAS.items():
        assert run_as(idea.of) in arms
        assert (idea.arm is None) == (name in ARMS)
        arm = arms[run_as(name)]
        assert arm == ARMS.get(run_as(name), arm)  # whose runs are shared
        moe = ResidualMoEConfig.from_dict(arm.moe or {})
        if section := arm.options.get("calibrate"):
            Calibration.from_dict(section).check(moe)


def test_each_is_run_at_the_rate_of_the_candidate_that_it_goes_back_to() -> None:
    arms, rate = ideas.ideas().arms, "optim_wrapper.optimizer.lr"
    usual = {"full_random", "cosine", "sparse", "expert_drop", "full_trained_core"}
    assert {name for name in IDEAS if run_as(name) == name} > usual
    assert not any(rate in arms[name].options for name in usual)
    for name in ("dense", "soft", "subspaces", "top_1", "upper_bound_all"):
        assert (run_as(name), arms[run_as(name)].options[rate]) == (at(name), 2e-3)


def test_what_an_idea_changes_is_told() -> None:
    assert changed("cosine") == "`router='cosine'`"
    assert changed("bias_balanced") == "`losses={'importance': 0.0}`, `balance_rate=0.001`"
    assert changed("sparse") == "`residual='sparse'`, `density=0.02`"
    assert changed("expert_choice") == "`top_k=2`, `router='expert_choice'`"
    assert changed("segments") == "`residual='segments'`"
    assert changed("full_fixed_gate").endswith("`gate_lr_mult=0.0`, no `calibrate`")


def test_every_run_has_its_rival_among_the_runs() -> None:
    study = ideas.ideas()
    names = {cell.name for cell in study.cells}
    assert {study.rivals[run_as(name)] for name in IDEAS} <= names
    for cell in study.cells:  # at whatever rate, each runs beside dense at its best
        assert cell.name == at("dense") or at("dense") in {one.name for one in study.compared_with(cell)}
    assert all(other in study.cells for cell in study.cells for other in study.compared_with(cell))


def test_the_page_has_all_of_them_with_or_without_runs(tmp_path: Path) -> None:
    assert [row["arm"] for row in ideas_table([])] == [f"`{name}`" for name in IDEAS]
    text = tables.opened((tables.DOCS / "arms.md").read_text(), tables.arms(tmp_path))
    assert text.count("\n| `") == len(IDEAS)
    assert tables.opened(text, tables.arms(tmp_path)) == text
