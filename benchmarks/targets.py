"""The project's speed and memory targets, each beside what was measured.

    python -m benchmarks.layer; python -m benchmarks.step; python -m benchmarks.scaling; python -m benchmarks.gpu
    python -m benchmarks.targets

Reads layer.json, step.json and scaling.json and, where a GPU was measured, gpu_layer.json and gpu_step.json; writes
targets.json: a list of one object for each target. `measured` is the worst of the sizes, `at` says which; it is taken
in the first of `benchmarks.common.SETTINGS`, with the worst in the others beside it. null: not measured.

No limit is below the floor of the arithmetic: `full` needs all of the dense network's products and a gate besides, and
stock deepspeed.moe computes the same experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.common import ALL_CORES, DEFAULT, JUDGED, Row

# (sizes, which cells of the grid, highest ratio to the trained dense network in float32)
Limits = tuple[tuple[str, Callable[[Row], bool], float], ...]
LOW_RANK: Limits = (
    ("C ≥ 384, T ≥ 6272", lambda row: row["width"] >= 384 and row["tokens"] >= 6272, 0.78),
    ("C ≥ 384, T 1568", lambda row: row["width"] >= 384 and row["tokens"] == 1568, 0.85),
    ("C 192", lambda row: row["width"] == 192, 0.95),
    ("C 96", lambda row: row["width"] == 96, 1.10),
)
FULL: Limits = (
    ("C ≥ 384, T ≥ 6272", lambda row: row["width"] >= 384 and row["tokens"] >= 6272, 1.00),
    ("C < 384, T ≥ 6272", lambda row: row["width"] < 384 and row["tokens"] >= 6272, 1.15),
    ("T 1568", lambda row: row["tokens"] == 1568, 1.20),
)
STOCK, GATE, GROWTH = 0.85, 0.08, {"low_rank_8": 1.10, "full": 1.25}
STEP, MEMORY = {"low_rank": 1.00, "full": 1.03}, {"low_rank": 1.00, "full": 1.15}
MORE_IN_BFLOAT16 = 0.20
FULL_FLOOR, STOCK_FLOOR = 1.02, 1.00
# (mixture, its ep_size, highest ratio) in two processes, with at least so many tokens in each mixture of each.
SCALING, SCALING_TOKENS = (("low_rank", 1, 1.03), ("full", 2, 1.10)), 3_000
# On one Hopper GPU, bfloat16 under autocast, 8 experts.
GPU_LAYER = {"low_rank_8": 0.90, "full": 1.10}
GPU_LAUNCHES, GPU_WAITS = {"low_rank_8": 40, "full": 70}, 0
GPU_STEP = {"low_rank": 1.00, "full": 1.03}
_ASIDE = {DEFAULT: "measured_default_allocator", ALL_CORES: "measured_all_cores"}
LAYER_COMMAND, STEP_COMMAND = "python -m benchmarks.layer", "python -m benchmarks.step"
SCALING_COMMAND, GPU_COMMAND = "python -m benchmarks.scaling", "python -m benchmarks.gpu --part"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = common.parse("targets", __doc__, argv)
    parts = {"layer": layer_targets, "step": step_targets, "scaling": scaling_targets}
    rows = [row for name, of in parts.items() for row in of(_rows(arguments.out / f"{name}.json"))]
    rows += gpu_targets(*(_gpu_rows(arguments.out / f"gpu_{name}.json") for name in ("layer", "step")))
    common.show(table(rows), "targets")
    path = arguments.out / "targets.json"
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(f"{sum(row['met'] is True for row in rows)} of {len(rows)} targets met; {path} written")


def _rows(path: Path) -> list[Row]:
    """Returns what a benchmark wrote; nothing where it was not run."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def layer_targets(rows: Sequence[Row]) -> Iterator[Row]:
    """Returns the targets of one layer."""
    for dtype, more in (("float32", 0.0), ("bfloat16", MORE_IN_BFLOAT16)):
        grid = [row for row in rows if row["part"] == "grid" and row["dtype"] == dtype]
        for title, names, limits, floor in (
            ("low_rank 8 and 16", ("low_rank_8", "low_rank_16"), LOW_RANK, 0.0),
            ("full", ("full",), FULL, FULL_FLOOR),
        ):
            mine = [row for row in grid if row["contender"] in names]
            for sizes, fits, limit in limits:
                what = f"{title}, {dtype}, {sizes}"
                limit = max(limit + more, floor)
                yield _target(what, "dense FFN, trained", limit, filter(fits, mine), "ratio", LAYER_COMMAND)
        for name in ("full", "upper_bound"):
            mine = [row for row in grid if row["contender"] == name]
            against = "stock deepspeed.moe layer, same experts"
            limit = max(STOCK + more, STOCK_FLOOR)
            yield _target(f"{name}, {dtype}", against, limit, mine, "to_stock", LAYER_COMMAND)
    gate = [row for row in rows if row["part"] == "gate" and row["contender"] != "layer"]
    yield _target("gate + dispatch + combine alone", "the layer", GATE, gate, "ratio", LAYER_COMMAND)
    for name, limit in GROWTH.items():
        mine = [row for row in rows if row["part"] == "growth" and row["contender"] == name]
        yield _target(f"64 experts, {name}", "8 experts", limit, mine, "ratio", LAYER_COMMAND)


def step_targets(rows: Sequence[Row]) -> Iterator[Row]:
    """Returns the targets of a whole training step, the worst of UPerNet and Mask R-CNN."""
    for what, key, limits in (
        ("training step", "ratio", STEP),
        ("peak memory of the step", "beyond_weights_ratio", MEMORY),
    ):
        for arm, limit in limits.items():
            mine = [row for row in rows if row["contender"] == arm]
            yield _target(f"{what}, {arm}", "dense step", limit, mine, key, STEP_COMMAND)


def scaling_targets(rows: Sequence[Row]) -> Iterator[Row]:
    """Returns the targets of a training step in two processes."""
    for residual, ep_size, limit in SCALING:
        mine = [
            row
            for row in rows
            if (row["processes"], row["residual"], row["ep_size"]) == (2, residual, ep_size)
            and row["tokens"] >= SCALING_TOKENS
        ]
        what = f"training step in two processes, {residual}, ep_size {ep_size}, T ≥ {SCALING_TOKENS:,}"
        yield _target(what, "dense step in two processes", limit, mine, "ratio", SCALING_COMMAND)


def gpu_targets(layer: Sequence[Row], step: Sequence[Row]) -> Iterator[Row]:
    """Returns the targets of a GPU; `at` names the card."""
    mine = [row for row in layer if row.get("mode") == "autocast" and row["experts"] == 8 and "ms" in row]
    trained = [row for row in mine if row["pass"] == "forward + backward"]
    command = f"{GPU_COMMAND} layer"
    for name, limit in GPU_LAYER.items():
        found = [row for row in trained if row["contender"] == name]
        found = [row for row in found if row["width"] >= 384 and row["tokens"] >= 25088]
        what = f"{name}, Hopper GPU, bfloat16, C ≥ 384, T ≥ 25,088"
        yield _target(what, "dense FFN, trained", limit, found, "ratio", command)
    counted = [row for row in trained if "launches" in row]
    for name, limit in GPU_LAUNCHES.items():
        found = [row for row in counted if row["contender"] == name]
        yield _target(f"launches of a layer, forward + backward, {name}", "", limit, found, "launches", command)
    found = [row for row in counted if row["contender"] in GPU_LAYER]
    yield _target("waits of the host in a layer, forward + backward", "", GPU_WAITS, found, "syncs", command)
    for arm, limit in GPU_STEP.items():
        found = [row for row in step if (row.get("task"), row.get("contender")) == ("Swin-L + UPerNet", arm)]
        what = f"training step of Swin-L + UPerNet, 640 px, Hopper GPU, {arm}"
        yield _target(what, "dense step", limit, [row for row in found if "ms" in row], "ratio", f"{GPU_COMMAND} step")


def _gpu_rows(path: Path) -> list[Row]:
    """Returns the rows of a GPU's result, none where there is none; each names its card."""
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    return [{**row, "setting": JUDGED, "gpu": content["machine"]["gpu"]} for row in content["rows"]]


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns the targets for print."""
    names = {"target": "target", "against": "against", "limit": "at most", "measured": "measured", "met": "met"}
    return [
        {new: row[old] for old, new in (names | {key: name for name, key in _ASIDE.items()}).items()} for row in rows
    ]


def _target(what: str, against: str, limit: float, rows: Iterable[Row], key: str, command: str) -> Row:
    found = list(rows)
    worst = _worst(found, key, JUDGED)
    measured = worst.get(key)
    return {
        "target": what,
        "against": against,
        "limit": round(limit, 2),
        "measured": measured,
        "met": None if measured is None else measured <= limit,
        "command": command,
        "at": {
            name: worst[name] for name in ("gpu", "task", "tokens", "width", "contender", "exchange") if name in worst
        },
        **{name: _worst(found, key, setting).get(key) for setting, name in _ASIDE.items()},
    }


def _worst(rows: Sequence[Row], key: str, setting: str) -> Row:
    """Returns the row with the highest value; an empty one where nothing was measured."""
    return max((row for row in rows if row["setting"] == setting), key=lambda row: row[key], default={})


if __name__ == "__main__":
    main()
