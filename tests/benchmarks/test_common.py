from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import common
from benchmarks.common import Ratio


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    # Two is twice one in every round; the machine was ten times as slow in the second.
    one, two = [1.0, 10.0, 1.0], [2.0, 20.0, 2.0]
    assert common.paired_ratio(two, one) == Ratio(2.0, 2.0, 2.0)
    assert common.paired_ratio([1.0, 3.0, 2.0], [1.0, 1.0, 1.0]) == Ratio(2.0, 1.5, 2.5)
    assert common.paired_ratio([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="shorter"):
        common.paired_ratio([1.0, 2.0], [1.0])


def test_contenders_take_turns_and_the_first_changes() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = common.alternate(contenders, seconds=1e9, rounds=(1, 3), warmup=1)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(calls[start : start + 3]) for start in range(0, 12, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert [one[0] for one in rounds[1:]] == ["a", "b", "c"]


def test_rounds_end_when_their_time_is_spent_but_not_before_the_fewest() -> None:
    times = common.alternate({"a": lambda: None}, seconds=0.0, rounds=(4, 100), warmup=0)
    assert len(times["a"]) == 4


def test_timing_rows() -> None:
    rows = common.timing_rows({"dense": [1.0, 2.0], "ours": [0.5, 1.0]}, "dense")
    assert rows[1] == {"contender": "ours", "ratio": 0.5, "ratio_low": 0.5, "ratio_high": 0.5, "ms": 750.0, "rounds": 2}


def test_pivot_and_markdown() -> None:
    rows = [
        {"size": 1, "name": "a", "value": 0.5},
        {"size": 1, "name": "b", "value": 1234.5},
        {"size": 2, "name": "a", "value": 2.0},
    ]
    found = common.pivot(rows, ("size",), "name", "value")
    assert found == [{"size": 1, "a": 0.5, "b": 1234.5}, {"size": 2, "a": 2.0, "b": None}]
    assert (
        common.markdown(found) == "| size | a | b |\n| ---: | ---: | ---: |\n| 1 | 0.500 | 1,234 |\n| 2 | 2.00 | – |\n"
    )


def environment_of_a_child(names: list[str], fail: bool) -> dict[str, str | None]:
    """Runs in a child."""
    import os

    if fail:
        raise SystemExit(3)
    return {name: os.environ.get(name) for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("allocator", common.ALLOCATORS)
def test_a_child_has_the_allocator_and_threads_asked_for(allocator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")  # of the surroundings: must not reach the child
    names = ["OMP_NUM_THREADS", *(common.ALLOCATORS["tuned"] | common.ALLOCATORS["exact"])]
    found = common.in_child(
        "test_common:environment_of_a_child", allocator=allocator, threads=1, names=names, fail=False
    )
    expected = {name: common.ALLOCATORS[allocator].get(name) for name in names}
    assert found == expected | {"OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_child_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with pytest.raises(RuntimeError, match="exit code 3"):
        common.in_child(
            "test_common:environment_of_a_child", allocator="default", threads=1, processes=2, names=[], fail=True
        )


def test_publish_writes_what_a_number_depends_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = common.parse("layer", None, ["--quick", "--out", str(tmp_path)])
    common.publish(arguments, {"size": 3}, [{"ratio": 0.5}], [{"ratio": 0.5}])
    found = json.loads((tmp_path / "layer.json").read_text())
    assert found["command"] == "python -m benchmarks.layer --quick"
    assert found["config"] == {"size": 3}
    assert found["rows"] == [{"ratio": 0.5}]
    assert found["machine"]["threads"] == 1
    assert set(found["machine"]["allocators"]) == {"default", "tuned", "exact"}
    assert {"torch", "deepspeed", "timm", "python"} <= set(found["versions"])
    assert {"benchmark", "quick", "date", "commit", "dirty"} <= set(found)
    assert "0.500" in capsys.readouterr().out


def test_results_of_quick_runs_stay_out_of_the_repository() -> None:
    assert common.parse("layer", None, ["--quick"]).out == common.QUICK_RESULTS
    assert common.parse("layer", None, []).out == common.RESULTS
