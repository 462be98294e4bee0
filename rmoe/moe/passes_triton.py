"""The functions of passes.py on a GPU, one Triton kernel each (two for `place_pairs`, and a scan between them).

A kernel adds in float32, whatever it reads and writes. No result depends on the order in which programs run, and
nothing is read back by the host.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmoe.moe.passes import Dtypes

_NUMBERS = 4096  # of a tile: 32 for each thread of four warps


def place_pairs(expert_P: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sorts pairs by expert, as `rmoe.moe.passes.place_pairs`, by counting."""
    pairs, wide = len(expert_P), triton.next_power_of_2(max(groups, 2))
    block = max(16, min(1024, 2 * _NUMBERS // wide))
    blocks = triton.cdiv(pairs, block)
    place: dict[str, Any] = {"device": expert_P.device, "dtype": torch.int32}
    count_GB, place_P = torch.empty(groups, blocks, **place), torch.empty(pairs, **place)
    end_G = torch.empty(groups, **place)
    _count[(blocks,)](expert_P, count_GB, pairs, blocks, groups, wide, block)
    until_GB = count_GB.view(-1).cumsum(0, dtype=torch.int32)
    _place[(blocks,)](expert_P, count_GB, until_GB, place_P, end_G, pairs, blocks, groups, wide, block)
    return place_P, end_G


def to_experts(x_TC: Tensor, place_P: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns sorted rows beside columns of ones, as `rmoe.moe.passes.to_experts`."""
    (tokens, width), pairs = x_TC.shape, len(place_P)
    x_NJ = torch.empty(pairs, width + columns, device=x_TC.device, dtype=dtype)
    rows, wide = _tile(width + columns)
    grid = (triton.cdiv(pairs, rows),)
    _to_experts[grid](x_TC.contiguous(), x_NJ, place_P, pairs, pairs // tokens, width, width + columns, rows, wide)
    return x_NJ


def from_experts(
    y_NC: Tensor,
    place_P: Tensor,
    k: int,
    dtype: torch.dtype,
    weighed: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Sums sorted rows over the choices of each token, as `rmoe.moe.passes.from_experts`."""
    tokens, width = len(place_P) // k, y_NC.shape[1]
    out_TC = torch.empty(tokens, width, device=y_NC.device, dtype=dtype)
    rows, wide = _tile(width)
    more = weighed or (place_P,) * 3  # not read
    grid = (triton.cdiv(tokens, rows),)
    _from_experts[grid](y_NC.contiguous(), out_TC, place_P, *more, tokens, k, width, weighed is not None, rows, wide)
    return out_TC


def from_experts_backward(
    grad_TC: Tensor, y_NC: Tensor, place_P: Tensor, gate_P: Tensor, bias_GC: Tensor, expert_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of y_NC and of gate_P, as `rmoe.moe.passes.from_experts_backward`."""
    tokens, width = grad_TC.shape
    y_NC = y_NC.contiguous()
    grad_NC, grad_P = torch.empty_like(y_NC), torch.empty_like(gate_P)
    rows, wide = _tile(width)
    of = (grad_TC.contiguous(), y_NC, grad_NC, grad_P, place_P, gate_P, bias_GC, expert_P)
    grid = (triton.cdiv(tokens, rows),)
    _from_experts_backward[grid](*of, tokens, len(place_P) // tokens, width, rows, wide)
    return grad_NC, grad_P


def weights_of(
    delta: tuple[Tensor, Tensor],
    core: tuple[Tensor, Tensor | None] | None,
    groups: int,
    columns: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Forms θ0 + Δ of one linear layer, as `rmoe.moe.passes.weights_of`."""
    weight_EOI, bias_EO = (d.contiguous() for d in delta)
    core_weight_OI, core_bias_O = (None if c is None else c.contiguous() for c in core or (None, None))
    experts, outputs, inputs = weight_EOI.shape
    w_GOJ = weight_EOI.new_empty(groups, outputs, inputs + columns, dtype=dtype)
    b_GO = w_GOJ[..., inputs] if columns else bias_EO.new_empty(groups, outputs, dtype=dtype)
    rows, wide = _tile(inputs + columns, 1024)
    _weights_of[(triton.cdiv(outputs, rows), triton.cdiv(inputs + columns, wide))](
        *(weight_EOI, bias_EO, w_GOJ, b_GO),
        *(weight_EOI if core_weight_OI is None else core_weight_OI, bias_EO if core_bias_O is None else core_bias_O),
        *(experts, groups, outputs, inputs, inputs + columns),
        *(core_weight_OI is not None, core_bias_O is not None, rows, wide),
    )
    return w_GOJ, b_GO


def gradients_of(
    grad_GOJ: Tensor, grad_bias_GO: Tensor, end_G: Tensor, experts: int, inputs: int, dtypes: Dtypes
) -> list[Tensor | None]:
    """Casts the gradients of one linear layer's weights, as `rmoe.moe.passes.gradients_of`; reads none that is 0."""
    groups, outputs, columns = grad_GOJ.shape
    shapes = ((experts, outputs, inputs), (experts, outputs), (outputs, inputs), (outputs,))
    made = [
        None if dtype is None else torch.empty(shape, device=grad_GOJ.device, dtype=dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    rows, wide = _tile(inputs, 1024)
    _gradients_of[(triton.cdiv(outputs, rows), triton.cdiv(inputs, wide))](
        *(grad_GOJ.contiguous(), grad_bias_GO, end_G),
        *(grad_GOJ if x is None else x for x in made),  # not written
        *(*grad_bias_GO.stride(), experts, groups, outputs, inputs, columns),
        *(x is not None for x in made),
        *(rows, wide),
    )
    return made


def _tile(columns: int, most: int = 2**20) -> tuple[int, int]:
    """Returns how many rows and columns a program takes, powers of two."""
    wide = min(triton.next_power_of_2(columns), most)
    return max(1, _NUMBERS // wide), wide


@triton.jit
def _count(expert_P, count_GB, pairs, blocks, groups, G: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, G)
    expert = tl.load(expert_P + p, mask=p < pairs, other=G).to(tl.int32)
    hits = (expert[:, None] == g[None, :]).to(tl.int32)
    tl.store(count_GB + g * blocks + tl.program_id(0), tl.sum(hits, 0), mask=g < groups)


@triton.jit
def _place(  # type: ignore[no-untyped-def]
    expert_P, count_GB, until_GB, place_P, end_G, pairs, blocks, groups, G: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    p = block * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, G)
    expert = tl.load(expert_P + p, mask=p < pairs, other=G).to(tl.int32)
    hits = (expert[:, None] == g[None, :]).to(tl.int32)
    here = g * blocks + block
    until = tl.load(until_GB + here, mask=g < groups, other=0)
    before = until - tl.load(count_GB + here, mask=g < groups, other=0)
    place = tl.sum(hits * (tl.cumsum(hits, 0) - 1 + before[None, :]), 1)
    tl.store(place_P + p, place, mask=p < pairs)
    tl.store(end_G + g, until, mask=(g < groups) & (block == blocks - 1))


@triton.jit
def _to_experts(  # type: ignore[no-untyped-def]
    x_TC, x_NJ, place_P, pairs, k, C: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDE)[None, :]
    here = (p < pairs)[:, None]
    place = tl.load(place_P + p, mask=p < pairs, other=0).to(tl.int64)
    x = tl.load(x_TC + (p // k).to(tl.int64)[:, None] * C + c, mask=here & (c < C), other=1.0)
    tl.store(x_NJ + place[:, None] * J + c, x.to(x_NJ.dtype.element_ty), mask=here & (c < J))


@triton.jit
def _from_experts(  # type: ignore[no-untyped-def]
    y_NC,
    out_TC,
    place_P,
    gate_P,
    bias_GC,
    expert_P,
    tokens,
    k,
    C: tl.constexpr,
    WEIGHED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDE)[None, :]
    there = t < tokens
    mask = there[:, None] & (c < C)
    total = tl.zeros((ROWS, WIDE), tl.float32)
    for choice in range(k):
        p = t.to(tl.int64) * k + choice
        place = tl.load(place_P + p, mask=there, other=0).to(tl.int64)
        y = tl.load(y_NC + place[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
        if WEIGHED:
            expert = tl.load(expert_P + p, mask=there, other=0)
            y += tl.load(bias_GC + expert[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
            y *= tl.load(gate_P + p, mask=there, other=0.0).to(tl.float32)[:, None]
        total += y
    tl.store(out_TC + t.to(tl.int64)[:, None] * C + c, total.to(out_TC.dtype.element_ty), mask=mask)


@triton.jit
def _from_experts_backward(  # type: ignore[no-untyped-def]
    grad_TC,
    y_NC,
    grad_NC,
    grad_P,
    place_P,
    gate_P,
    bias_GC,
    expert_P,
    tokens,
    k,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, WIDE)[None, :]
    there = t < tokens
    mask = there[:, None] & (c < C)
    grad = tl.load(grad_TC + t.to(tl.int64)[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
    for choice in range(k):
        p = t.to(tl.int64) * k + choice
        place = tl.load(place_P + p, mask=there, other=0).to(tl.int64)
        expert = tl.load(expert_P + p, mask=there, other=0)
        y = tl.load(y_NC + place[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
        y += tl.load(bias_GC + expert[:, None] * C + c, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_P + p, tl.sum(y * grad, 1).to(grad_P.dtype.element_ty), mask=there)
        gate = tl.load(gate_P + p, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_NC + place[:, None] * C + c, (grad * gate[:, None]).to(grad_NC.dtype.element_ty), mask=mask)


@triton.jit
def _weights_of(  # type: ignore[no-untyped-def]
    weight_EOI,
    bias_EO,
    w_GOJ,
    b_GO,
    core_OI,
    core_bias_O,
    experts,
    groups,
    outputs,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    CORE: tl.constexpr,
    CORE_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    there = o < outputs
    first = there & (tl.program_id(1) == 0)
    row = o.to(tl.int64)
    mask = there[:, None] & (j < I)
    core = tl.zeros((ROWS, WIDE), tl.float32)
    core_bias = tl.zeros((ROWS,), tl.float32)
    if CORE:
        core = tl.load(core_OI + row[:, None] * I + j, mask=mask, other=0.0).to(tl.float32)
    if CORE_BIAS:
        core_bias = tl.load(core_bias_O + o, mask=there, other=0.0).to(tl.float32)
    for g in range(groups):
        of_group = row + tl.cast(g, tl.int64) * outputs
        w = core + tl.load(weight_EOI + of_group[:, None] * I + j, mask=mask & (g < experts), other=0.0).to(tl.float32)
        b = core_bias + tl.load(bias_EO + of_group, mask=there & (g < experts), other=0.0).to(tl.float32)
        if J > I:
            w += tl.where(j == I, b[:, None], 0.0)
        else:
            tl.store(b_GO + of_group, b.to(b_GO.dtype.element_ty), mask=first)
        tl.store(w_GOJ + of_group[:, None] * J + j, w.to(w_GOJ.dtype.element_ty), mask=there[:, None] & (j < J))


@triton.jit
def _gradients_of(  # type: ignore[no-untyped-def]
    grad_GOJ,
    grad_bias_GO,
    end_G,
    weight_EOI,
    bias_EO,
    core_OI,
    core_bias_O,
    bias_stride_G,
    bias_stride_O,
    experts,
    groups,
    outputs,
    I: tl.constexpr,  # noqa: E741
    J: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    CORE: tl.constexpr,
    CORE_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    o = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * WIDE + tl.arange(0, WIDE)[None, :]
    there = o < outputs
    first = there & (tl.program_id(1) == 0)
    row = o.to(tl.int64)
    mask = there[:, None] & (i < I)
    core = tl.zeros((ROWS, WIDE), tl.float32)
    core_bias = tl.zeros((ROWS,), tl.float32)
    start = tl.load(end_G) * 0
    for g in range(groups):
        end = tl.load(end_G + g)
        filled = end > start
        start = end
        of_group = row + tl.cast(g, tl.int64) * outputs
        w = tl.load(grad_GOJ + of_group[:, None] * J + i, mask=mask & filled, other=0.0).to(tl.float32)
        of_bias = tl.cast(g, tl.int64) * bias_stride_G + row * bias_stride_O
        b = tl.load(grad_bias_GO + of_bias, mask=first & filled, other=0.0).to(tl.float32)
        if WEIGHT:
            to = weight_EOI + of_group[:, None] * I + i
            tl.store(to, w.to(weight_EOI.dtype.element_ty), mask=mask & (g < experts))
        if BIAS:
            tl.store(bias_EO + of_group, b.to(bias_EO.dtype.element_ty), mask=first & (g < experts))
        core += w
        core_bias += b
    if CORE:
        tl.store(core_OI + row[:, None] * I + i, core.to(core_OI.dtype.element_ty), mask=mask)
    if CORE_BIAS:
        tl.store(core_bias_O + o, core_bias.to(core_bias_O.dtype.element_ty), mask=first)
