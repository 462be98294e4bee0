"""A sitting of the method study, the regimes or the ideas of others, and what its runs so far come to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.claims import comparison, ideas, method
from benchmarks.claims.ledger import Ledger
from benchmarks.claims.method_verdicts import arms_table, ideas_table, regime_table, verdicts
from benchmarks.claims.pictures import draw_method, draw_regime
from benchmarks.claims.sitting import Sitting

RUNS = "method_runs.json"


def hold(arguments: common.Arguments) -> None:
    """Runs what there is time for, and writes what all runs so far come to.

    Raises:
        UserError: the file of runs is damaged.
        SystemExit: 1, if a run failed.
    """
    studies, publish = _PARTS[str(arguments.part)]
    study = studies[arguments.quick]()
    ledger = Ledger(arguments.out / RUNS)
    folder = Path("work_dirs") / ("method_quick" if arguments.quick else "method")
    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    sitting = Sitting(study.only(arguments.only), ledger, folder, seconds, arguments.device)
    sitting.run(arguments.threads)
    publish(arguments, study, ledger)
    left = list(sitting.left())
    print(f"{len(left)} runs are left, about {sum(map(sitting.estimate, left)) / 3600:.1f} hours of one core")
    if sitting.failed:
        raise SystemExit(1)


def publish_method(arguments: common.Arguments, study: method.Study, ledger: Ledger) -> None:
    """Writes method.json and method.png, if there is a run."""
    arms, controls = comparison.rows(study, ledger), comparison.controls(study, ledger)
    steps = arguments.out / "step_real.json"
    measured = json.loads(steps.read_text())["rows"] if steps.exists() else []
    judged = verdicts(controls, measured)
    if arms:
        common.show(arms_table(arms), title="method")
        common.show(judged, title="targets")
        draw_method(arguments, arms)
        _write(arguments, {"arms": arms, "controls": controls, "verdicts": judged})


def publish_regime(arguments: common.Arguments, study: method.Study, ledger: Ledger) -> None:
    """Writes regime.json and regime.png, if there is a pair of runs."""
    rows = [row for row in comparison.regimes(study, ledger) if row["diff_to_dense"] is not None]
    if rows:
        common.show(regime_table(rows), title="regime")
        usual = (study.size.steps["segmentation"], len(study.size.scenes["styles"].split(",")), study.size.width)
        draw_regime(arguments, rows, usual)
        _write(arguments, {"rows": rows})


def publish_ideas(arguments: common.Arguments, study: method.Study, ledger: Ledger) -> None:
    """Writes ideas.json and ideas.png, if there is a run."""
    if rows := comparison.rows(study, ledger):
        common.show(ideas_table(rows), title="ideas")
        draw_method(arguments, rows, file="ideas")
        _write(arguments, {"rows": rows})


_PARTS = {
    "method": ((method.method, method.quick_method), publish_method),
    "regime": ((method.regime, method.quick_regime), publish_regime),
    "ideas": ((ideas.ideas, ideas.quick_ideas), publish_ideas),
}
PARTS = (*_PARTS,)


def _write(arguments: common.Arguments, content: dict[str, Any]) -> None:
    about = {"benchmark": arguments.name, "command": arguments.command(), "quick": arguments.quick, "runs": RUNS}
    path = arguments.out / f"{arguments.part}.json"
    path.write_text(json.dumps(about | content, indent=1, ensure_ascii=False) + "\n")
