"""The paper's claims in miniature: its four pipelines and the arms between them, on the embedded set.

    python -m benchmarks.claims

Every arm of a seed starts from the same weights, sees the same images in the same order, and has the same schedule and
batch; they differ in the experts alone. Differences to dense are paired over the seeds, with Student's 95 % interval. A
pipeline costs the sum of its stages. Each run has one core to itself; as many run side by side as there are cores.

A run that is complete is not run again unless its configuration has changed, and one that was interrupted goes on: this
may be stopped at any time. Writes claims.json, one object for each task, metric and arm; claims_runs.json, every run
with its cost; claims.png; and into experts/, what `rmoe analyze` finds in some of the mixtures.

There is more, called by `--part`:
long      The paper's four pipelines and some arms with `LONGER` times the steps downstream, segmentation; writes
          long.json, long_runs.json, long.png and experts_long/.
ablation  One choice at a time, segmentation; writes ablation.json, ablation_runs.json and ablation.png.
again     A dense and a residual pipeline twice on this machine, each time from rendering the data on: both results in
          claims_again.json, beside those in claims_runs.json, which another machine may have made.
method    Which residual experts beat dense finetuning, with controls, segmentation and detection, up to 8 seeds: days
          of one core, over as many sittings as it takes (benchmarks/claims/method.py has the arms and their order).
          Each run that ends is written to method_runs.json at once and is not run again; method.json and method.png are
          made of what is there. `--minutes 0` runs nothing and makes them.
regime    The headline's arms under other conditions: steps, variety of the data, width of the backbone; regime.json and
          regime.png. Its runs are in method_runs.json, too.
ideas     Ideas of other papers for routing and residuals, each one changed key; ideas.json, ideas.png and, by
          benchmarks.tables, docs/arms.md. Its runs are in method_runs.json, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import common
from benchmarks.claims import study
from benchmarks.claims.arms import FULL, INSIDE, MODEL, QUICK, portion
from benchmarks.claims.pictures import draw, draw_choices, table
from benchmarks.claims.runs import carry_out, look_inside
from benchmarks.claims.statistics import again, results
from benchmarks.common import ROOT
from rmoe.errors import run_guarded


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parts = ("long", "ablation", "again", *study.PARTS)
    arguments = common.parse("claims", __doc__, argv, parts, sittings=True)
    if arguments.part in study.PARTS:
        os.chdir(ROOT)
        study.hold(arguments)
        return
    size = QUICK if arguments.quick else FULL
    folder = Path("work_dirs") / ("claims_quick" if arguments.quick else "claims")
    file, size, arms = portion(arguments.part, size)
    os.chdir(ROOT)
    runs, details = carry_out(folder, size, arms, arguments.threads)
    config = asdict(size) | {"arms": {name: asdict(arm) for name, arm in arms.items()}, "model": MODEL}
    if arguments.part == "again":
        _, second = carry_out(folder.with_name(f"{folder.name}_again"), size, arms, arguments.threads)
        published = json.loads((arguments.out / "claims_runs.json").read_text())["rows"]
        common.publish(arguments, config, compared := again(details, second, published), compared, file=file)
        return
    if file in INSIDE:
        inside, names = INSIDE[file]
        look_inside(runs, size.seeds[0], names, arguments.out / inside)
    rows = results(runs, size, arms)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{file}.json").write_text(json.dumps(rows, indent=1) + "\n")
    (draw_choices if arguments.part == "ablation" else draw)(arguments, rows, file)
    common.publish(arguments, config, details, table(rows), file=f"{file}_runs")


if __name__ == "__main__":
    run_guarded(main, "benchmarks.claims")
