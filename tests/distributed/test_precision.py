"""Float16 with a scaled loss: norm, clipping, updates and the scale itself are those of plain PyTorch's GradScaler, at
every ZeRO stage, in one process and in two, dense and with a mixture, over a gradient that overflows and a resumed run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import half_precision as precision
import pytest
import torch
from conftest import run_processes
from torch import nn

from rmoe.moe.records import collect
from rmoe.moe.state import global_state_dict

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]
SCRIPT = Path(precision.__file__)
STAGES = (0, 1, 2)
EVERY: dict[str, dict[str, Any]] = {
    **{f"dense {zero}": {"zero": zero} for zero in (*STAGES, 3)},
    **{f"unclipped {zero}": {"zero": zero, "clip": 0.0} for zero in STAGES},
    **{f"accumulated {zero}": {"zero": zero, "accumulation": 2} for zero in STAGES},
    **{f"growing {zero}": {"zero": zero, "grow": 2} for zero in STAGES},
    **{f"resumed {a} {b}": {"zero": a, "resume": b, "grow": 2} for a, b in ((0, 2), (1, 0), (2, 1))},
    **{f"moe {zero}": {"zero": zero, "moe": {}} for zero in STAGES},
    **{f"moe full {zero}": {"zero": zero, "moe": {"residual": "full"}} for zero in STAGES},
    "offloaded": {"zero": 2, "offload_optimizer": {"device": "cpu"}},
}
PAIR = {
    **EVERY,
    **{f"moe ep2 {zero}": {"zero": zero, "moe": {"ep_size": 2}} for zero in STAGES},
    **{f"moe full ep2 {zero}": {"zero": zero, "moe": {"residual": "full", "ep_size": 2}} for zero in STAGES},
    **{f"one expert {zero}": {"zero": zero, "moe": {"ep_size": 2}, "poison": True} for zero in STAGES},
    "moe ep2 resumed": {"zero": 2, "resume": 0, "grow": 2, "moe": {"ep_size": 2}},
}


def plain(moe: dict[str, Any] | None = None, clip: float = precision.CLIP, grow: int | None = None) -> dict[str, Any]:
    """The same steps on the whole batch, in plain PyTorch."""
    model = precision.build(moe)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=precision.LR)
    scaler = torch.amp.GradScaler("cpu", growth_interval=grow or 2000)
    norms, scales = [], []
    for step, (rows, labels) in enumerate(precision.batches()):
        with torch.autocast("cpu", torch.float16), collect() as records:
            logits = model(rows)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        loss = loss if (gates := records.loss()) is None else loss + gates
        scaler.scale(loss * precision.factor(step)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        norms.append(norm.item() if norm.isfinite() else float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return {"norms": norms, "scales": scales, "state": global_state_dict(model)}


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "pair"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By case, what each process found."""
    folder, processes = tmp_path_factory.mktemp("precision"), request.param
    cases = EVERY if processes == 1 else PAIR
    run_processes(folder, [SCRIPT, folder, json.dumps(cases)], processes)
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(processes)] for name in cases}


def assert_as_plain(results: dict[str, list[Any]], cases: list[str], wanted: dict[str, Any]) -> None:
    for name in cases:
        for one in results[name]:
            assert one["scales"] == wanted["scales"], name
            # Gradients travel in float16; weights move by a tenth in each of four steps, a hundredth is rounding.
            assert one["norms"] == pytest.approx(wanted["norms"], rel=2e-3), name
            torch.testing.assert_close(
                one["state"], wanted["state"], rtol=0, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
            )


def some(results: dict[str, list[Any]], *starts: str) -> list[str]:
    return [name for name in results if name.startswith(starts)]


def test_dense(results: dict[str, list[Any]]) -> None:
    wanted = plain()
    clipped = [norm for norm in wanted["norms"] if norm > precision.CLIP]
    assert wanted["norms"][precision.OVERFLOW] == float("inf")
    assert len(clipped) == precision.STEPS
    assert wanted["scales"] == [65536.0, 65536.0, 32768.0, 32768.0, 32768.0]
    assert_as_plain(results, some(results, "dense", "accumulated", "offloaded"), wanted)


def test_the_norm_is_told_without_clipping(results: dict[str, list[Any]]) -> None:
    wanted = plain(clip=0.0)
    for name in some(results, "unclipped"):
        assert results[name][0]["norms"][:2] == pytest.approx(wanted["norms"][:2], rel=2e-3), name
        assert results[name][0]["scales"] == wanted["scales"]


def test_the_scale_grows_and_goes_on_exactly_after_a_resume(results: dict[str, list[Any]]) -> None:
    wanted = plain(grow=2)
    assert wanted["scales"] == [65536.0, 131072.0, 65536.0, 65536.0, 131072.0]
    assert_as_plain(results, some(results, "growing", "resumed"), wanted)


@pytest.mark.parametrize("residual", ["low_rank", "full"])
def test_mixtures(results: dict[str, list[Any]], residual: str) -> None:
    """Of any ep_size."""
    names = some(results, "moe full") if residual == "full" else some(results, "moe 0", "moe 1", "moe 2", "moe ep2 ")
    names = [name for name in names if "resumed" not in name]
    assert_as_plain(results, names, plain({"residual": residual}))


def test_an_overflow_in_one_process_is_everybodys(results: dict[str, list[Any]]) -> None:
    """Of an expert that only the last process holds: all of them leave the step out."""
    for name in some(results, "one expert"):
        first, last = results[name]
        assert first["scales"] == last["scales"] == [65536.0, 65536.0, 32768.0, 32768.0, 32768.0]
        assert first["norms"] == last["norms"]
        torch.testing.assert_close(first["state"], last["state"])
        assert_as_plain(results, [name], plain({}))
