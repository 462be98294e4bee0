"""A sitting runs what is worth most first, in the time that there is, each run beside what it is compared with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common
from benchmarks.claims import method, sitting
from benchmarks.claims.ledger import UPSTREAM, Cell, Ledger
from benchmarks.claims.method import STEPS, Study
from benchmarks.claims.sitting import Sitting
from rmoe.pipelines import Failed

NAMES = ("dense", "soft", "one_low_rank_lr_1", "upper_bound_alternate")


def cell(name: str, seed: int = 0, **more: Any) -> Cell:
    return Cell(name, "segmentation", seed, STEPS, "plain,night", 1.0)._replace(**more)


def stage(name: str, seed: int = 0) -> Cell:
    return Cell(name, UPSTREAM, seed, 800, "", 1.0)


class Pretended(Sitting):
    """Runs nothing: a run takes no time and leaves what it is told to."""

    machine = "here"
    cores = "of "

    def __init__(self, study: Study, path: Path, seconds: float | None = None) -> None:
        super().__init__(study, Ledger(path), path.parent, seconds)
        self._device = self.machine
        self.begun: list[Cell] = []
        self.broken: set[Cell] = set()

    def _training(self, cell: Cell) -> Any:
        self.begun.append(cell)
        return cell

    def _described(self, cell: Cell, training: Any, seconds: float) -> dict[str, Any]:
        if cell in self.broken:
            raise Failed("it broke")
        weights = f"{self.cores}{cell.name} {cell.seed}"
        row = {"arm": cell.name, "where": cell.where, "seed": cell.seed, "planned_steps": cell.steps}
        row |= {"styles": cell.styles, "width": cell.width, "fingerprint": self._study.fingerprint(cell)}
        core = weights if cell == self._core(cell) else self._cores[self._core(cell)]
        row |= {"core": core, "weights": weights, "device": self._device}
        return row | {"wall_seconds": 900.0, "steps": cell.steps, "mIoU": 40.0}


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sitting, "_seconds", lambda training: 0.0)
    monkeypatch.setattr(sitting.signal, "signal", lambda *_: None)
    environment = dict(sitting.os.environ)
    yield
    sitting.os.environ.clear()
    sitting.os.environ.update(environment)


def study(*names: str, seeds: tuple[int, ...] = (0, 1)) -> Study:
    return replace(method.method(), cells=[cell(name, seed) for seed in seeds for name in names or NAMES])


def test_all_is_run_once_in_order(tmp_path: Path) -> None:
    one = Pretended(study(), tmp_path / "runs.json")
    one.run(jobs=1)
    assert one.begun == [
        *(stage("core"), cell("dense"), cell("soft"), cell("one_low_rank_lr_1")),
        *(stage("moe_alternate"), cell("upper_bound_alternate")),
        *(stage("core", 1), cell("dense", 1), cell("soft", 1), cell("one_low_rank_lr_1", 1)),
        *(stage("moe_alternate", 1), cell("upper_bound_alternate", 1)),
    ]
    assert not [*one.left()]
    again = Pretended(study(), tmp_path / "runs.json")
    again.run(jobs=1)
    assert again.begun == []  # not even a core


def test_a_later_sitting_trains_the_cores_that_it_needs_alone(tmp_path: Path) -> None:
    Pretended(study("dense", seeds=(0, 1, 2)), tmp_path / "runs.json").run(1)
    more = replace(method.method(), cells=[*study("dense", seeds=(0, 1, 2)).cells, cell("soft", 1)])
    one = Pretended(more, tmp_path / "runs.json")
    one.run(1)
    assert one.begun == [stage("core", 1), cell("soft", 1)]


@pytest.mark.parametrize("changed", ["machine", "cores"])
def test_on_another_machine_the_others_are_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    Pretended(study("dense", "soft"), tmp_path / "runs.json").run(1)
    monkeypatch.setattr(Pretended, changed, "elsewhere ")
    one = Pretended(study("dense", "soft", "one_low_rank_lr_1"), tmp_path / "runs.json")
    one.run(1)
    assert one.begun == [
        *(stage("core"), cell("dense"), cell("soft"), cell("one_low_rank_lr_1")),
        *(stage("core", 1), cell("dense", 1), cell("soft", 1), cell("one_low_rank_lr_1", 1)),
    ]


def test_while_a_core_is_trained_another_seed_begins(tmp_path: Path) -> None:
    one = Pretended(study("dense", "soft"), tmp_path / "runs.json")
    first = one.next(set())
    assert first == stage("core")
    second = one.next({first})
    assert second == stage("core", 1)
    assert one.next({first, second}) is None
    one._cores[first] = "trained"
    assert one.next({second}) == cell("dense")
    assert one.next({second, cell("dense")}) == cell("soft")  # a rival need not be ready, it must only be on its way


def test_what_fails_is_left_out_with_what_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = Pretended(study(), tmp_path / "runs.json")
    one.broken = {stage("core"), cell("soft", 1)}
    one.run(2)
    assert {row["seed"] for row in one._ledger.rows} == {1}
    assert cell("one_low_rank_lr_1", 1) in one.begun
    assert set(one.failed) == one.broken
    assert "it broke" in capsys.readouterr().out
    assert cell("soft", 1) in one.left()


def test_no_run_begins_that_would_not_end(tmp_path: Path) -> None:
    one = Pretended(study("dense", "soft"), tmp_path / "runs.json")
    guess = one.estimate(stage("core")) + one.estimate(cell("dense"))
    for seconds, begins in ((0.0, None), (0.9 * guess, None), (1.1 * guess, stage("core"))):
        assert Pretended(study("dense"), tmp_path / "runs.json", seconds).next(set()) == begins


def test_estimates_are_of_runs_that_were_done(tmp_path: Path) -> None:
    one = Pretended(study("dense"), tmp_path / "runs.json")
    guess = one.estimate(cell("dense"))
    one.run(1)
    assert one.estimate(cell("dense", 7)) == pytest.approx(1.1 * 900) != guess
    assert one.estimate(cell("dense_longer")) == pytest.approx(1.1 * 900 * 1300 / 1200)  # as another arm of the task
    assert one.estimate(cell("dense", steps=400)) == pytest.approx(1.1 * 300)
    assert one.estimate(cell("dense", width=2.0)) == pytest.approx(4 * guess)
    one._device = "another machine"  # whose seconds are others
    assert one.estimate(cell("dense", 7)) == guess


def test_an_interrupt_ends_what_runs_and_begins_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Pretended(study("dense"), tmp_path / "runs.json")
    waits: list[int] = []

    def wait(futures: Any, return_when: str) -> tuple[set[Future[float]], set[Future[float]]]:
        waits.append(len(futures))
        if len(waits) == 1:
            raise KeyboardInterrupt
        return set(futures), set()

    monkeypatch.setattr(sitting, "wait", wait)
    one.run(2)
    assert one.begun == [stage("core"), stage("core", 1)]
    assert [row["arm"] for row in one._ledger.rows] == ["core", "core"]


def test_a_rival_that_fails_again_costs_no_other_run(tmp_path: Path) -> None:
    small = study("dense", "one_full", seeds=(0,))  # whose rival is calibrated
    first = Pretended(small, tmp_path / "runs.json")
    first.broken = {cell("full_calibrated")}
    first.run(1)
    assert first.begun == [stage("core"), cell("dense"), cell("full_calibrated"), cell("one_full")]
    again = Pretended(small, tmp_path / "runs.json")
    again.broken = first.broken
    again.run(1)
    assert again.begun == [stage("core"), cell("full_calibrated")]
    assert not [*again.left()]


def test_a_folder_holds_one_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths, styles and steps do not share work dirs, but cores and data where these are the same."""
    monkeypatch.setattr(sitting, "render", lambda folder, words: rendered.append(str(folder.relative_to(tmp_path))))
    rendered: list[str] = []
    usual = method.quick_regime().cells[:2]
    cells = [
        *usual,
        *(cell._replace(**one) for cell in usual for one in ({"steps": 3}, {"styles": "plain"}, {"width": 0.5})),
    ]
    one = Sitting(replace(method.quick_regime(), cells=cells), Ledger(tmp_path / "runs.json"), tmp_path)
    found = {each: one._training(each) for each in cells}
    assert len({training.folder for training in found.values()}) == len(found) == 8
    assert len({before.folder for training in found.values() for before in training.after}) == 2  # by width
    assert sorted({*rendered}) == ["data/pictures", "data/scenes", "data/scenes_plain"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_devices_train_in_float32_and_see_what_they_need(tmp_path: Path, device: str) -> None:
    sitting.os.environ["CUDA_VISIBLE_DEVICES"] = "3"
    one = Sitting(method.quick_regime(), Ledger(tmp_path / "runs.json"), tmp_path, device=device)
    assert sitting.os.environ["CUDA_VISIBLE_DEVICES"] == ("" if device == "cpu" else "3")
    assert sitting.os.environ["DS_ACCELERATOR"] == device
    autocast = json.loads((common.ROOT / one._json).read_text())["torch_autocast"]["enabled"]
    assert autocast == ("auto" if device == "cpu" else False)  # "auto" is float32 on a CPU
