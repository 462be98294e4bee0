"""Whether a GPU computes what the definition says: every path against `reference`, and losses against the CPU's.

Errors are ‖found − expected‖ / ‖expected‖. Inputs are drawn afresh at every run; what is expected is computed from the
same numbers in float64: token by token on the CPU or, of many tokens, by the layer's own arithmetic on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rmoe
from benchmarks.common import Row
from benchmarks.gpu.measure import Arguments, Report, attempt, finish, tf32
from rmoe.config import ResidualMoEConfig
from rmoe.moe import mix as mixing
from rmoe.moe.experts import Full, LowRank, Network, Residuals, reference

# The most that an output or a gradient may be off, and a loss of 20 steps. Two layers of products lie between; bfloat16
# tells 2⁻⁸ apart, float16 2⁻¹¹, TF32 2⁻¹¹.
BOUNDS = {"float32": 1e-5, "tf32": 3e-3, "float16": 5e-3, "bfloat16": 2e-2}
# Of one token, a gate's gradient is a handful of dot products, over whose roundings nothing averages.
ONE_TOKEN_BOUNDS = {**BOUNDS, "float16": 1e-2}
LOSS_BOUNDS = {"float32": 2e-3, "tf32": 2e-2, "bfloat16": 5e-2}
STEPS, PATHS = (
    20,
    ("masked_low_rank", "folded_low_rank", "mix_networks", "grouped_rows", "mix_weights", "rows_of_one_expert"),
)


class Case(NamedTuple):
    """Holds one mixture that is checked; the last expert has no token."""

    name: str
    residual: str
    experts: int = 8
    rank: int = 8
    k: int = 1
    mixes: bool = True
    drops: bool = False
    tokens: int = 192
    width: int = 64

    @property
    def many(self) -> bool:
        """Says whether the definition, token by token, would take too long."""
        return self.tokens > 1000


CASES = (
    Case("low rank", "low_rank"),
    Case("low rank, dropped choices", "low_rank", drops=True),
    Case("low rank, soft", "low_rank", k=8),
    Case("low rank, two outputs", "low_rank", k=2, mixes=False),
    Case("low rank, many columns", "low_rank", experts=72),
    Case("full", "full", mixes=False),
    Case("full, two choices", "full", k=2, mixes=False),
    Case("full, dropped choices", "full", mixes=False, drops=True),
    Case("full inside one network", "full", k=2),
    Case("networks of their own", "experts", mixes=False),
    Case("networks of their own, dropped", "experts", mixes=False, drops=True),
    Case("one token, seven choices", "full", k=7, mixes=False, tokens=1),
    Case("low rank, many tokens", "low_rank", tokens=20_000, width=384),
    Case("low rank, soft, many tokens", "low_rank", k=8, tokens=20_000, width=384),
    Case("full, many tokens", "full", k=2, mixes=False, tokens=20_000, width=384),
)


def main(arguments: Arguments) -> Report:
    """Checks layers and losses and prints the worst of each."""
    report = Report(arguments, "parity", {"bounds": BOUNDS, "loss_bounds": LOSS_BOUNDS, "seed": torch.seed()})
    device = arguments.device
    precisions = ("float32", "bfloat16") if device.type == "cpu" else tuple(BOUNDS)
    for case in CASES:
        if case.many and arguments.dry:
            case = case._replace(tokens=1001, width=16)
        for precision in precisions:
            place = {"part": "layer", "contender": case.name, "precision": precision}
            row = attempt(report, place, _check, case, precision, device)
            if row is not None:
                report.add({**place, **row})
    place = {"part": "grouped_mm", "contender": "gradients of groups without rows"}
    row = attempt(report, place, _left_by_empty_groups, device)
    if row is not None:
        report.add({**place, **row})
        print(f"torch's grouped GEMM leaves {row['left']} as gradients of groups without rows")
    for residual, config in _MODELS.items():
        place = {"part": "losses", "contender": residual}
        expected = attempt(report, place, _losses, config, "float32", torch.device("cpu"))
        for precision in () if expected is None else [p for p in precisions if p in LOSS_BOUNDS]:
            place |= {"precision": precision}
            found = attempt(report, place, _losses, config, precision, device)
            if found is not None:
                error = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
                report.add({**place, **_verdict(error, LOSS_BOUNDS[precision], "loss"), "losses": found})
    finish(report, table(report.rows))
    return report


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns the worst of what was checked, for each precision and arithmetic."""
    worst: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if "error" in row:
            key = (row["part"], row["precision"], row.get("path") or "–")
            if key not in worst or not row["error"] <= worst[key]["error"]:  # NaN is the worst
                worst[key] = row
    return [
        {"part": part, "precision": precision, "arithmetic": path}
        | {"error": row["error"], "at": row["at"], "of": row["contender"], "bound": row["bound"]}
        for (part, precision, path), row in worst.items()
    ]


def _verdict(error: float, bound: float, at: str) -> Row:
    row: Row = {"error": error, "bound": bound, "at": at}
    if not error <= bound:  # NaN is not
        row["failed"] = f"off by {error:.2g} at {at}, more than {bound:g}"
    return row


def _check(case: Case, precision: str, device: torch.device) -> Row:
    """Returns the largest error of the output and of all gradients, and which arithmetic ran."""
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    inputs, expert_TK = _problem(case, dtype)
    names = ["x", "gate", *(f"core.{name}" for name in Network._fields)]
    names = names[: 2 if case.residual == "experts" else None]
    names += list((LowRank if case.residual == "low_rank" else Full)._fields)
    grad_TC = torch.randn(case.tokens, inputs[0].shape[1]).to(dtype)
    exact = [x.double() for x in (*inputs, grad_TC)]
    if case.many:
        found = _run(case, [x.to(device) for x in exact[:-1]], expert_TK.to(device), exact[-1].to(device), mixing.mix)
        expected = [x.cpu() for x in found]
    else:
        expected = _run(case, exact[:-1], expert_TK, exact[-1], reference)
    bound = (ONE_TOKEN_BOUNDS if case.tokens == 1 else BOUNDS)[precision]
    with tf32(precision == "tf32"), _watched() as called:
        found = _run(case, [x.to(device) for x in inputs], expert_TK.to(device), grad_TC.to(device), mixing.mix)
    worst, at = 0.0, "y"
    for name, a, b in zip(["y", *names], found, expected, strict=True):
        error = (a.double().cpu() - b).norm() / b.norm() if b.any() else a.double().cpu().norm()
        if not error <= worst:
            worst, at = error.item(), name
        if name in Full._fields + LowRank._fields and case.k < case.experts and a[-1].any():
            return {**_verdict(math.nan, bound, f"{name} of the expert without tokens"), "path": called}
    return {**_verdict(worst, bound, at), "path": ", ".join(called)}


def _left_by_empty_groups(device: torch.device) -> Row:
    """Says what torch's grouped GEMM leaves as the gradient of a group without rows: zeros, or memory as it was.

    The layer relies on neither.
    """
    x_NI, grad_NO = (torch.randn(512, 256, device=device, dtype=torch.bfloat16) for _ in range(2))
    end_G = torch.tensor([0, 256, 256, 512], device=device, dtype=torch.int32)
    left = 0.0
    for _ in range(8):
        spoiled = torch.full((4, 256, 256), torch.nan, device=device, dtype=torch.bfloat16)
        del spoiled  # the product's result takes its place
        grad_GOI = F.grouped_mm(grad_NO.mT, x_NI, offs=end_G)
        left += grad_GOI[[0, 2]].abs().sum().item()
    return {"left": "zeros" if left == 0 else "memory as it was"}


def _problem(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Draws x, gate values, weights of the core if there is one, residuals; and experts, of which the last has none."""
    width, hidden = case.width, 4 * case.width

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)

    core = [random(hidden, width), random(hidden), random(width, hidden), random(width)]
    if case.residual == "low_rank":
        residuals = [random(case.experts, case.rank, size) for size in (width, hidden, hidden, width)]
    else:
        residuals = [random(case.experts, *w.shape) for w in core]
    scores_TE = torch.rand(case.tokens, case.experts)
    if case.k < case.experts:
        scores_TE[:, -1] = -1
    expert_TK = scores_TE.topk(case.k).indices
    if case.drops:
        expert_TK[torch.rand(expert_TK.shape) < 0.2] = case.experts
    gate_TK = torch.rand(case.tokens, case.k).add(0.1).to(dtype)
    x_TC = torch.randn(case.tokens, width).to(dtype)
    return [x_TC, gate_TK, *(() if case.residual == "experts" else core), *residuals], expert_TK


def _run(case: Case, inputs: list[Tensor], expert_TK: Tensor, grad_TC: Tensor, function: Any) -> list[Tensor]:
    x_TC, gate_TK, *weights = (x.detach().requires_grad_() for x in inputs)
    core = Network(*weights[:4]) if case.residual != "experts" else None
    kind: type[Residuals] = LowRank if case.residual == "low_rank" else Full
    y_TC = function(x_TC, expert_TK, gate_TK, core, kind(*weights[-4:]), nn.GELU(), case.mixes)
    return [y_TC.detach(), *torch.autograd.grad(y_TC, [x_TC, gate_TK, *weights], grad_TC)]


@contextmanager
def _watched() -> Iterator[list[str]]:
    """Collects the names of the arithmetics that `mix` calls."""
    called: list[str] = []
    with ExitStack() as stack:
        for name in PATHS:
            if (function := getattr(mixing, name, None)) is not None:

                def watched(*arguments: Any, name: str = name, function: Any = function, **more: Any) -> Any:
                    called.append(name)
                    return function(*arguments, **more)

                stack.enter_context(mock.patch.object(mixing, name, watched))
        yield called


# The gates draw no noise: two devices draw different numbers.
_MODELS: dict[str, dict[str, Any]] = {
    "low_rank": {"top_k": 1, "train_core": False},
    "soft low_rank, trained core": {"top_k": "all", "train_core": True},
    "full": {"residual": "full"},
    "full, two choices, capacity": {"residual": "full", "top_k": 2, "capacity_factor": 1.0},
    "experts": {"residual": "experts"},
}


def _losses(config: dict[str, Any], precision: str, device: torch.device) -> list[float]:
    """Returns the losses of 20 steps of a small ViT on made-up images, the same on every device."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "num_classes": 10,
    }
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    moe = ResidualMoEConfig(num_experts=8, noise=0.0, gate_std=1.0, blocks="alternate", **config)
    model = rmoe.upcycle(model, moe).model.to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    with tf32(precision == "tf32"):
        for _ in range(STEPS):
            images, labels = torch.randn(8, 3, 32, 32, generator=g), torch.randint(10, (8,), generator=g)
            images, labels = images.to(device), labels.to(device)
            with (
                torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"),
                rmoe.collect() as records,
            ):
                loss = F.cross_entropy(model(images).float(), labels)
            loss = loss + records.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found
