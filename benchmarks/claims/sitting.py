"""One sitting of a study: runs what is worth most first, until all of it is done or the time is over.

A run is done on a machine together with those that it is compared with: where another kind of machine, or another core
of the seed, has made those, they are made again here. Of upstream training only what is needed is done; its weights are
not kept from sitting to sitting, but they repeat bit for bit on one kind of machine, which their hash in the ledger
shows.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.claims.arms import Size
from benchmarks.claims.ledger import UPSTREAM, Cell, Context, Ledger, weights_hash
from benchmarks.claims.method import Study
from benchmarks.claims.runs import JSON, Trainings, describe, render, upstream_steps
from benchmarks.claims.statistics import pipeline_cost
from benchmarks.common import ALLOCATORS, Row
from rmoe.engine.cost import device_kind, software
from rmoe.errors import UserError
from rmoe.pipelines import Failed, Training

# Seconds of a step, for what no run on this kind of machine tells: on one core, or on a GPU that others share.
_GUESS = {
    "cpu": {"segmentation": 0.5, "detection": 0.65, UPSTREAM: 0.5},
    "cuda": {"segmentation": 0.15, "detection": 0.25, UPSTREAM: 0.12},
}
_MARGIN = 1.1  # of an estimate: other work may run beside


class Sitting:
    """Runs a study's cells that are not in the ledger.

    Args:
        study: what is to be run.
        ledger: what has been run, and what this sitting adds.
        folder: for data and work dirs.
        seconds: no run begins that would not end by then; None is no limit.
        device: "cpu", where each run has one core, or "cuda", where all share a GPU. Both train in float32.
    """

    def __init__(
        self, study: Study, ledger: Ledger, folder: Path, seconds: float | None = None, device: str = "cpu"
    ) -> None:
        os.environ.update(DS_ACCELERATOR=device, OMP_NUM_THREADS="1")
        if device == "cpu":  # a twelfth faster with huge pages, and the same to the last bit
            os.environ.update(CUDA_VISIBLE_DEVICES="", **ALLOCATORS["tuned"])
        self._study, self._ledger, self._folder = study, ledger, folder
        self._until = None if seconds is None else time.monotonic() + seconds
        self._json, self._guess = JSON[device], _GUESS[device]
        self._made: dict[tuple[Path, str], Trainings] = {}
        self._cores: dict[Cell, str] = {}  # hash of the weights of the stages that are trained here
        self._device = device_kind()
        self._over = False
        self.failed: dict[Cell, str] = {}  # and why

    def run(self, jobs: int) -> None:
        """Runs `jobs` trainings at a time, each on one core; a run that fails is left out, with those that need it.

        An interrupt or SIGTERM begins no more; what has begun is finished and recorded. A second one ends this at once.
        """
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self._run(jobs)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _run(self, jobs: int) -> None:
        running: dict[Future[float], tuple[Cell, Training]] = {}
        with ThreadPoolExecutor(jobs) as pool:
            while True:
                try:
                    while len(running) < jobs and (cell := self.next({one for one, _ in running.values()})) is not None:
                        training = self._training(cell)
                        _say("begins", cell)
                        running[pool.submit(_seconds, training)] = cell, training
                    if not running:
                        return
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:
                    if self._over:
                        raise
                    self._over = True
                    print("begins no more; waits for what runs", flush=True)
                    continue
                for future in finished:
                    self._finish(*running.pop(future), future)

    def next(self, running: set[Cell]) -> Cell | None:
        """Returns the run to begin now, or None: all is done, or what is left waits for others or has no time."""
        for wanted in () if self._over else self._study.cells:
            needed = self.missing(wanted)
            if needed and self._in_time(needed):
                for cell in needed:
                    if cell not in running and all(stage in self._cores for stage in self._before(cell)):
                        return cell
        return None

    def missing(self, wanted: Cell) -> list[Cell]:
        """Returns what is to be run for a cell to stand in the ledger beside those that it is compared with.

        Returns:
            Its stages, those of them that are not trained here; then the others; then itself. Nothing if it stands, or
            cannot be had.
        """
        if not self._possible(wanted) or self._stands(wanted):
            return []
        stages = [stage for stage in self._before(wanted) if stage not in self._cores]
        if any(stage in self.failed for stage in stages):
            return []
        if self._core(wanted) not in self._cores:
            return [*stages, wanted]
        here = self._context(wanted)
        found: dict[Cell, None] = {}
        for cell in filter(self._possible, (*self._study.compared_with(wanted), wanted)):
            if not self._ledger.find(cell, self._study.fingerprint(cell), here):
                found |= dict.fromkeys([*(one for one in self._before(cell) if one not in self._cores), cell])
        return list(found)

    def _possible(self, cell: Cell) -> bool:
        return cell not in self.failed

    def _stands(self, wanted: Cell) -> bool:
        study, ledger = self._study, self._ledger
        others = [*filter(self._possible, study.compared_with(wanted))]
        return any(
            all(ledger.find(other, study.fingerprint(other), Context(row["device"], row["core"])) for other in others)
            for row in ledger.find(wanted, study.fingerprint(wanted))
        )

    def _before(self, cell: Cell) -> list[Cell]:
        """Returns the upstream stages that are to be trained before a run: the seed's core, and what it starts from."""
        study, chain, core = self._study, list[Cell](), self._core(cell)
        name = study.stages[cell.name].after if cell.where == UPSTREAM else study.arms[cell.name].upstream
        while name is not None:
            chain.append(self._stage(name, cell))
            name = study.stages[name].after
        return [] if cell == core else list(dict.fromkeys([core, *chain[::-1]]))

    def _stage(self, name: str, cell: Cell) -> Cell:
        steps = upstream_steps(self._study.stages[name], self._study.size)
        return Cell(name, UPSTREAM, cell.seed, steps, "", cell.width)

    def _core(self, cell: Cell) -> Cell:
        return self._stage("core", cell)

    def _context(self, cell: Cell) -> Context:
        return Context(self._device, self._cores[self._core(cell)])

    def _in_time(self, cells: list[Cell]) -> bool:
        return self._until is None or sum(map(self.estimate, cells)) <= self._until - time.monotonic()

    def estimate(self, cell: Cell) -> float:
        """Returns the seconds that a run will take, by those on such a machine: the same ones, or others alike."""
        here = [row for row in self._ledger.rows if row["device"] == self._device]
        alike = [row for row in here if (row["where"], row["width"]) == (cell.where, cell.width)]
        same = [row for row in alike if row["arm"] == cell.name] or alike
        steps = self._steps(cell)
        pace = max(
            (row["wall_seconds"] / row["steps"] for row in same), default=self._guess[cell.where] * cell.width**2
        )
        return _MARGIN * pace * steps

    def _steps(self, cell: Cell) -> int:
        return cell.steps if cell.where == UPSTREAM else round(self._study.arms[cell.name].longer * cell.steps)

    def _training(self, cell: Cell) -> Training:
        size = self._study.size_of(cell)
        root = self._folder if cell.width == 1 else self._folder / f"width_{cell.width:g}"
        data = self._folder / "data"
        made = self._trainings(root, size, data)
        if cell.where == UPSTREAM:
            return made.upstream(cell.name, cell.seed)
        return made.downstream(cell.name, self._study.arms[cell.name], cell.where, cell.seed)

    def _trainings(self, root: Path, size: Size, data: Path) -> Trainings:
        """Returns the trainings of one size, whose data are drawn first."""
        key = (root, f"{size.label} {dict(size.steps)}")
        if key not in self._made:
            render(data / "pictures", size.pictures)
            render(data / f"scenes{size.label}", size.scenes)
            self._made[key] = Trainings(root, size, self._study.stages, data, self._json)
        return self._made[key]

    def _finish(self, cell: Cell, training: Training, future: Future[float]) -> None:
        try:
            row = self._described(cell, training, future.result())
        except (Failed, UserError) as error:
            self.failed[cell] = str(error)
            _say("failed", cell)
            print(error, flush=True)
            return
        if cell.where == UPSTREAM:
            self._cores[cell] = row["weights"]
        self._ledger.add(row)
        _say(f"done in {row['wall_seconds']:.0f} s", cell)

    def _described(self, cell: Cell, training: Training, seconds: float) -> Row:
        """Returns what the ledger says of a run.

        `wall_seconds` of a run that was resumed are fewer than it took, so they are at least those of its steps.
        """
        row = describe((cell.name, cell.where, cell.seed), training) | pipeline_cost(training)
        weights = weights_hash(training.folder)
        return row | {
            "planned_steps": cell.steps,
            "styles": cell.styles,
            "width": cell.width,
            "fingerprint": self._study.fingerprint(cell),
            "core": weights if cell == self._core(cell) else self._cores[self._core(cell)],
            "weights": weights,
            "wall_seconds": max(seconds, row["device_seconds"]),
            "versions": {name: number for name, number in software().items() if name != "commit"},
        }

    def left(self) -> Iterator[Cell]:
        """Yields the cells that this sitting leaves undone."""
        yield from (cell for cell in self._study.cells if not self._stands(cell))


def _seconds(training: Training) -> float:
    """Runs a training, if it is not complete, and returns how long that took."""
    start = time.monotonic()
    training.run()
    return time.monotonic() - start


def _say(what: str, cell: Cell) -> None:
    conditions = f"{cell.steps} steps, {cell.styles or 'pictures'}, width × {cell.width:g}"
    print(f"{time.strftime('%H:%M:%S')} {what}: {cell.where}/{cell.name}/{cell.seed} ({conditions})", flush=True)
