"""One feed-forward network with its gate, forward and backward, against its peers: dense, stock deepspeed.moe, LoRA.

    python -m benchmarks.layer

    python -m benchmarks.layer --part balance

Five parts, each a ratio between contenders that take turns in one process:

- `grid`: tokens × width × number format, hidden width 4C, 8 experts, top-1; against the trained dense network.
- `gate`: gate with its loss, dispatch and combine alone, without any network, against the whole layer.
- `overhead`: what is left of the layer when there is next to no arithmetic, at a hidden width of 16 and rank 1, less
  the frozen dense network of that width; against the whole layer. That is `gate` and all calls for single experts.
- `growth`: 64 experts against 8 at the same number of tokens.
- `balance`: what a step counts of a gate's load and confidence, alone, against the whole layer that counts them. (The
  balance itself is made at the interval of a run's log.)

Timed are forward and backward, the gradient of the input and the gates' loss included, the optimizer's step not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd import Function

from benchmarks import common
from benchmarks.common import JUDGED, SETTINGS, Row
from rmoe.config import ResidualMoEConfig
from rmoe.moe.gate import count_choices
from rmoe.moe.gate_losses import gate_loss
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect

TOKENS, WIDTHS, EXPERTS = (1568, 6272, 25088), (96, 192, 384, 768), 8
GROWTH_TOKENS, MANY_EXPERTS = 6272, 64
NARROW = 16
# Tokens × width up to which all contenders are timed and the gate alone; and the settings that are not judged, in
# float32. The largest sizes take half the time of all.
SMALL, ASIDE = 25088 * 192, 6272 * 384
PACE, QUICK_PACE = {"seconds": 3.0, "rounds": (3, 40)}, {"seconds": 0.0, "rounds": (2, 2)}
PARTS = ("balance",)
STOCK = ("stock_dropless", "stock_capacity")
# What answers a target.
TARGETED = ("dense", "dense_frozen", "low_rank_8", "low_rank_16", "full", "upper_bound", "stock_dropless")

Step = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Cell:
    """Holds the sizes of one comparison."""

    tokens: int
    width: int
    dtype: str = "float32"
    experts: int = EXPERTS
    hidden: int | None = None  # None: 4 × width

    def network(self) -> Mlp:
        """Makes a dense network of this size."""
        return Mlp(self.width, self.hidden or 4 * self.width).to(getattr(torch, self.dtype))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    arguments = common.parse("layer", __doc__, argv, PARTS)
    tokens, widths = ((128,), (16, 32)) if arguments.quick else (TOKENS, WIDTHS)
    pace = QUICK_PACE if arguments.quick else PACE
    rows: list[Row] = []
    for setting, (allocator, threads) in SETTINGS.items():
        found = common.in_child(
            "benchmarks.layer:measure",
            allocator=allocator,
            threads=arguments.threads if arguments.quick else threads,
            tokens=tokens,
            widths=widths,
            growth_tokens=min(GROWTH_TOKENS, max(tokens)),
            judged=setting == JUDGED,
            pace=pace,
            part=arguments.part,
        )
        rows += [{"setting": setting} | row for row in found]
    config = {"experts": EXPERTS, "many_experts": MANY_EXPERTS, "top_k": 1, "hidden": "4C", "pace": pace}
    if arguments.part:
        common.publish(arguments, config, rows, table(rows), file=f"layer_{arguments.part}")
        return
    draw(arguments, rows)
    common.publish(arguments, config, rows, table(rows))


def measure(
    tokens: Sequence[int],
    widths: Sequence[int],
    growth_tokens: int,
    judged: bool,
    pace: dict[str, Any],
    part: str | None = None,
) -> list[Row]:
    """Measures all parts, or of the grid what is small and answers a target, or one part alone; in a child process."""
    common.join_group()  # stock deepspeed.moe asks for one
    cells = list(product(tokens, widths))
    if part == "balance":
        return [row for cell in cells for row in _balance_rows(Cell(*cell), pace)] if judged else []
    small = [(count, width) for count, width in cells if count * width <= (SMALL if judged else ASIDE)]
    rows: list[Row] = []
    for dtype in ("float32", "bfloat16") if judged else ("float32",):
        for count, width in cells if judged else small:
            names = CONTENDERS if judged and dtype == "float32" and (count, width) in small else TARGETED
            rows += _grid_rows(Cell(count, width, dtype), tuple(names), pace)
    if judged:
        for count, width in small:
            rows += _gate_rows(Cell(count, width), pace)
        for width in widths:
            rows += _growth_rows(Cell(growth_tokens, width), pace)
    return rows


def table(rows: Sequence[Row]) -> list[Row]:
    """Returns median ratios, one column for each contender."""
    shown = [row for row in rows if row["contender"] not in ("dense", "layer")]
    return common.pivot(shown, ("part", "setting", "dtype", "tokens", "width"), "contender", "ratio")


def draw(arguments: common.Arguments, rows: Sequence[Row]) -> None:
    """Draws ratios to the dense network over the width, for the largest number of tokens."""
    grid = [row for row in rows if row["part"] == "grid" and row["setting"] == JUDGED]
    most = max(row["tokens"] for row in grid)
    with common.picture(arguments, 2, f"Forward + backward of one layer, {most} tokens, dense = 1") as axes:
        for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
            for name in dict.fromkeys(row["contender"] for row in grid):
                points = [row for row in grid if (row["contender"], row["dtype"], row["tokens"]) == (name, dtype, most)]
                axis.plot([row["width"] for row in points], [row["ratio"] for row in points], marker="o", label=name)
            axis.set(title=dtype, xlabel="width C", ylabel="× dense", xscale="log")
            axis.set_xticks(widths := sorted({row["width"] for row in grid}), widths, minor=False)
        axes[-1].legend(fontsize="small")


def _timed(cell: Cell, steps: dict[str, Step], pace: dict[str, Any]) -> common.Times:
    """Measures seconds of forward + backward on the same tokens."""
    x_TC = torch.randn(cell.tokens, cell.width).to(getattr(torch, cell.dtype)).requires_grad_()
    grad_TC = torch.randn_like(x_TC)

    def call(step: Step) -> Callable[[], None]:
        def run() -> None:
            x_TC.grad = None
            step(x_TC, grad_TC)

        return run

    return common.alternate({name: call(step) for name, step in steps.items()}, **pace)


def _rows(part: str, cell: Cell, times: common.Times, reference: str) -> list[Row]:
    place = {"part": part, "dtype": cell.dtype, "tokens": cell.tokens, "width": cell.width}
    return [place | row for row in common.timing_rows(times, reference)]


def _grid_rows(cell: Cell, names: Sequence[str], pace: dict[str, Any]) -> list[Row]:
    """Measures all contenders against the dense one, and against stock deepspeed.moe's faster form."""
    times = _timed(cell, {name: CONTENDERS[name](cell) for name in names}, pace)
    stock = [min(both) for both in zip(*(times[name] for name in names if name in STOCK), strict=True)]
    rows = _rows("grid", cell, times, "dense")
    return [row | {"to_stock": common.paired_ratio(times[row["contender"]], stock).median} for row in rows]


def _gate_rows(cell: Cell, pace: dict[str, Any]) -> list[Row]:
    """Measures what of the layer's time is neither the core's nor the experts' arithmetic."""
    narrow = Cell(cell.tokens, cell.width, hidden=NARROW)
    rows = []
    for name, config, thin in (("low_rank_8", {}, {"rank": 1}), ("full", {"residual": "full"}, {"residual": "full"})):
        steps = {
            "layer": _ours(cell, **config),
            name: _routing(cell, **config),
            "narrow": _ours(narrow, **thin),
            "narrow_dense": _dense(narrow, trained=False),
        }
        times = _timed(cell, steps, pace)
        rest = [a - b for a, b in zip(times["narrow"], times["narrow_dense"], strict=True)]
        rows += _rows("gate", cell, {"layer": times["layer"], name: times[name]}, "layer")
        rows += _rows("overhead", cell, {"layer": times["layer"], name: rest}, "layer")
    return rows


def _balance_rows(cell: Cell, pace: dict[str, Any]) -> list[Row]:
    """Measures what the counts of a gate's balance take of the layer's time."""
    names = ("low_rank_8", "full")
    times = {name: _timed(cell, {"layer": CONTENDERS[name](cell), name: _counting(cell)}, pace) for name in names}
    return [row for name in names for row in _rows("balance", cell, times[name], "layer")]


def _growth_rows(cell: Cell, pace: dict[str, Any]) -> list[Row]:
    """Measures many experts against few."""
    many = Cell(cell.tokens, cell.width, experts=MANY_EXPERTS)
    rows = []
    for name in ("low_rank_8", "full"):
        times = _timed(cell, {"layer": CONTENDERS[name](cell), name: CONTENDERS[name](many)}, pace)
        rows += _rows("growth", cell, times, "layer")
    return rows


def _dense(cell: Cell, trained: bool = True) -> Step:
    return _plain(cell.network().requires_grad_(trained))


def _plain(module: nn.Module) -> Step:
    def step(x_TC: Tensor, grad_TC: Tensor) -> None:
        module.zero_grad()
        module(x_TC).backward(grad_TC)

    return step


def _mixture(cell: Cell, **config: Any) -> ResidualMoE:
    given = {"num_experts": cell.experts, "top_k": 1, "train_core": False, **config}
    return ResidualMoE(cell.network(), ResidualMoEConfig(**given)).train()


def _ours(cell: Cell, **config: Any) -> Step:
    layer = _mixture(cell, **config)
    for residual in layer.residuals():  # as after some steps: at the start they are zero
        nn.init.normal_(residual, std=0.01)

    def step(x_TC: Tensor, grad_TC: Tensor) -> None:
        layer.zero_grad()
        with collect() as records:
            y_TC = layer(x_TC)
        torch.autograd.backward([y_TC, records.loss()], [grad_TC, None])

    return step


def _routing(cell: Cell, **config: Any) -> Step:
    """Runs the gate with its loss, and rows that go to their experts and come back as they went."""
    layer = _mixture(cell, **config)

    def step(x_TC: Tensor, grad_TC: Tensor) -> None:
        layer.zero_grad()
        routing = layer.gate(x_TC)
        y_TC = _ThereAndBack.apply(x_TC, routing.expert_TK[:, 0], cell.experts)
        gates = routing.gate_TK
        if not layer.config.mixes_weights:
            y_TC = torch.einsum("tkc,tk->tc", y_TC[:, None], gates)
        loss = gate_loss(routing.sums, layer.config.losses)
        torch.autograd.backward([y_TC, gates, loss], [grad_TC, torch.ones_like(gates), None])

    return step


def _counting(cell: Cell) -> Step:
    """Counts choices and confidence as `Gate` does."""
    logits_ET = torch.randn(cell.experts, cell.tokens)
    probability_ET, expert_KT, zero_E = logits_ET.softmax(0), logits_ET.argmax(0)[None], torch.zeros(cell.experts)

    def step(x_TC: Tensor, grad_TC: Tensor) -> None:
        count_choices(expert_KT, zero_E)
        probability_ET.amax(0).sum()

    return step


class _ThereAndBack(Function):
    """Sorts rows by expert and puts them back, gradients too: what the layer moves, once each way."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, expert_T: Tensor, experts: int) -> Tensor:
        sorted_T, order_T = expert_T.sort(stable=True)
        torch.bincount(sorted_T, minlength=experts + 1).tolist()
        inverse_T = torch.empty_like(order_T).scatter_(0, order_T, torch.arange(len(order_T)))
        ctx.save_for_backward(x_TC, order_T, inverse_T)
        return x_TC.index_select(0, order_T).index_select(0, inverse_T)

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, None, None]:
        x_TC, order_T, inverse_T = ctx.saved_tensors
        x_TC.index_select(0, order_T)  # sorted again, for the weights' gradients
        return grad_TC.index_select(0, order_T).index_select(0, inverse_T), None, None


def _stock(cell: Cell, drop_tokens: bool) -> Step:
    """Runs deepspeed.moe with networks of the same size; capacity 1.25, or all tokens kept."""
    from deepspeed.moe.layer import MoE

    layer = MoE(
        cell.width, cell.network(), cell.experts, k=1, capacity_factor=1.25, drop_tokens=drop_tokens, use_rts=False
    )
    layer.set_deepspeed_parallelism()

    def step(x_TC: Tensor, grad_TC: Tensor) -> None:
        layer.zero_grad()
        y_TC, loss, _ = layer(x_TC)
        torch.autograd.backward([y_TC, loss], [grad_TC, None])

    return step


class _Loop(nn.Module):
    """Is the obvious top-1 mixture: for each expert, pick its tokens, run it, put them back."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.gate = nn.Linear(cell.width, cell.experts, bias=False)
        self.experts = nn.ModuleList(cell.network() for _ in range(cell.experts))

    def forward(self, x_TC: Tensor) -> Tensor:
        gate_T, expert_T = self.gate(x_TC.float()).softmax(-1).max(-1)
        y_TC = torch.zeros_like(x_TC)
        for e, expert in enumerate(self.experts):
            token_N = (expert_T == e).nonzero().squeeze(1)
            y_TC = y_TC.index_add(0, token_N, gate_T[token_N, None].to(x_TC.dtype) * expert(x_TC[token_N]))
        return y_TC


def _lora(cell: Cell) -> Step:
    """Runs PEFT's LoRA of rank 8 on both linear layers of the same dense network, which is frozen."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModuleNotFoundError("the benchmark compares with PEFT: pip install 'rmoe[bench]'") from error
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["fc1", "fc2"])
    return _plain(get_peft_model(cell.network(), config, autocast_adapter_dtype=False))


CONTENDERS: dict[str, Callable[[Cell], Step]] = {
    "dense": _dense,
    "dense_frozen": lambda cell: _dense(cell, trained=False),
    "low_rank_8": lambda cell: _ours(cell, rank=8),
    "low_rank_16": lambda cell: _ours(cell, rank=16),
    "full": lambda cell: _ours(cell, residual="full"),
    "upper_bound": lambda cell: _ours(cell, residual="experts"),
    "stock_dropless": lambda cell: _stock(cell, drop_tokens=False),
    "stock_capacity": lambda cell: _stock(cell, drop_tokens=True),
    "loop": lambda cell: _plain(_Loop(cell)),
    "lora_8": _lora,
}

if __name__ == "__main__":
    main()
