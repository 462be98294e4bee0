"""The gate of a GPU in one kernel each way, where a token uses its best expert or all of them.

It computes what `rmoe.moe.gate.Gate` does: logits in float32, softmax with and without noise, the choice, the gate
values, and over each block of tokens what the losses sum. Backward it computes the gradient of the logits and brings
that to the tokens; another kernel brings it to the weight and the bias.

Shape suffixes: T tokens, C model width, E experts, K experts per token: 1, or E.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from rmoe.moe.experts import first_order

_TOKENS, _COLUMNS = 64, 64  # of a block
_LEAST = 16  # experts of a block's product
_PROGRAMS = 512  # among which the weight's gradient is shared out, where there are so many blocks


class Found(NamedTuple):
    """Holds what the gate decided, and sums over the tokens; float32 but for the experts, which are int64."""

    gate_TK: Tensor
    expert_TK: Tensor
    probability_TE: Tensor  # without gradient
    probability_E: Tensor
    z: Tensor
    first_E: Tensor  # without gradient, as all that follow
    chosen_E: Tensor
    confidence: Tensor
    tokens: Tensor


def route(
    x_TC: Tensor,
    weight_EC: Tensor,
    bias_E: Tensor,
    noise_ET: Tensor | None,
    choice_bias_E: Tensor | None,
    temperature: float,
    chooses: bool,
    normalises: bool,
) -> Found:
    """Routes tokens.

    Args:
        x_TC: float32, bfloat16 or float16.
        weight_EC: float32, as `bias_E`.
        noise_ET: added to the logits where experts are chosen; None for none.
        choice_bias_E: added to the probabilities where experts are chosen.
        temperature: divides the logits.
        chooses: whether a token uses its best expert, rather than all.
        normalises: whether the gate value of a choice is 1, with the gradient of log p.
    """
    if x_TC.stride(1) != 1:  # as one image of convolutions, whose channels come first; the kernels read whole rows
        x_TC = x_TC.contiguous()
    switches = (noise_ET, choice_bias_E, 1.0 / temperature, chooses, normalises and chooses)
    return Found(*_Route.apply(x_TC, weight_EC, bias_E, *switches))


class _Route(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        weight_EC: Tensor,
        bias_E: Tensor,
        noise_ET: Tensor | None,
        choice_bias_E: Tensor | None,
        factor: float,
        chooses: bool,
        normalises: bool,
    ) -> tuple[Tensor, ...]:
        (tokens, width), experts = x_TC.shape, len(weight_EC)
        block_e = max(_LEAST, triton.next_power_of_2(experts))
        blocks = triton.cdiv(tokens, _TOKENS)
        probability_TE = torch.empty(tokens, experts, device=x_TC.device)
        score_TE = probability_TE if noise_ET is None else torch.empty_like(probability_TE)
        lse_T = torch.empty(tokens, device=x_TC.device)
        gate_TK = torch.empty(tokens, 1, device=x_TC.device) if chooses else torch.empty_like(score_TE)
        expert_TK = torch.empty(tokens, 1 if chooses else experts, dtype=torch.int64, device=x_TC.device)
        parts = torch.empty(blocks, 4, block_e, device=x_TC.device)
        _forward[(blocks,)](
            *(x_TC, weight_EC.contiguous(), bias_E.contiguous(), noise_ET, choice_bias_E),
            *(probability_TE, score_TE, lse_T, gate_TK, expert_TK, parts),
            *(tokens, width, experts, x_TC.stride(0), factor),
            **{
                "CHOOSES": chooses,
                "NORMALISES": normalises,
                "BLOCK_E": block_e,
                "BLOCK_T": _TOKENS,
                "BLOCK_C": _COLUMNS,
            },
        )
        sums = parts.sum(0)
        ctx.save_for_backward(x_TC, weight_EC, probability_TE, score_TE, lse_T, expert_TK)
        ctx.factor, ctx.chooses, ctx.normalises, ctx.block_e = factor, chooses, normalises, block_e
        ctx.set_materialize_grads(False)
        of_experts, of_all = sums[:3, :experts], sums[3]
        rest = (of_experts[1], of_experts[2], of_all[0], of_all[2])
        ctx.mark_non_differentiable(expert_TK, probability_TE, *rest)
        return gate_TK, expert_TK, probability_TE, of_experts[0], of_all[1], *rest

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_TK: Tensor | None, _e: Any, _p: Any, grad_E: Tensor | None, grad_z: Any, *_: Any
    ) -> Any:
        x_TC, weight_EC, probability_TE, score_TE, lse_T, expert_TK = ctx.saved_tensors
        (tokens, experts), wants = probability_TE.shape, ctx.needs_input_grad
        grad_TE = torch.empty_like(probability_TE)
        grad_x = torch.empty(x_TC.shape, dtype=x_TC.dtype, device=x_TC.device) if wants[0] else None
        _backward[(triton.cdiv(tokens, _TOKENS),)](
            *(probability_TE, score_TE, lse_T, expert_TK),
            *(None if g is None else g.contiguous() for g in (grad_TK, grad_E, grad_z)),
            *(grad_TE, weight_EC.contiguous(), grad_x, tokens, x_TC.shape[1], experts, ctx.factor),
            **{"CHOOSES": ctx.chooses, "NORMALISES": ctx.normalises},
            **{"BLOCK_E": ctx.block_e, "BLOCK_T": _TOKENS, "BLOCK_C": _COLUMNS},
        )
        of_linear = _of_linear(grad_TE, x_TC, ctx.block_e) if wants[1] or wants[2] else (None, None)
        return grad_x, *(x if want else None for x, want in zip(of_linear, wants[1:3], strict=True)), *(None,) * 5


def _of_linear(grad_TE: Tensor, x_TC: Tensor, block_e: int) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the router's weight, [E, C], and bias, [E], float32."""
    (tokens, experts), width = grad_TE.shape, x_TC.shape[1]
    wide, blocks = triton.cdiv(width, _COLUMNS), triton.cdiv(tokens, _TOKENS)
    each = triton.cdiv(blocks, max(1, _PROGRAMS // wide))  # blocks of a program
    parts = torch.empty(triton.cdiv(blocks, each), experts * (width + 1), device=x_TC.device)
    sizes = (tokens, width, experts, x_TC.stride(0), each)
    _weight_gradient[(len(parts), wide)](
        *(grad_TE, x_TC, parts, *sizes), **{"BLOCK_E": block_e, "BLOCK_T": _TOKENS, "BLOCK_C": _COLUMNS}
    )
    total = parts.sum(0)
    return total[: experts * width].view(experts, width), total[experts * width :]


def squared_variation(x_LE: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Returns weight · variance / mean² of each row, [L], and its gradient, [L, E]; float32."""
    rows, experts = x_LE.shape
    found_L, slope_LE = x_LE.new_empty(rows), torch.empty_like(x_LE, memory_format=torch.contiguous_format)
    block_e = triton.next_power_of_2(experts)
    _squared_variation[(rows,)](x_LE.contiguous(), found_L, slope_LE, experts, weight, BLOCK_E=block_e)
    return found_L, slope_LE


@triton.jit
def _softmax(logits):  # type: ignore[no-untyped-def]
    """Returns the softmax over experts, and log Σ exp."""
    largest = tl.max(logits, 1)
    weights = tl.exp(logits - largest[:, None])
    total = tl.sum(weights, 1)
    return weights / total[:, None], largest + tl.log(total)


@triton.jit
def _best(score, e, experts, BLOCK_E: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the first of the largest, and with NaN some expert."""
    place = tl.where(score == tl.max(score, 1)[:, None], e[None, :], BLOCK_E)
    return tl.minimum(tl.min(place, 1), experts - 1)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    noise_ptr,
    choice_bias_ptr,
    probability_ptr,
    score_ptr,
    lse_ptr,
    gate_ptr,
    expert_ptr,
    parts_ptr,
    tokens,
    width,
    experts,
    stride,
    factor,
    CHOOSES: tl.constexpr,
    NORMALISES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0)
    t, e, c = block * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_C)
    in_t, in_e = t < tokens, e < experts
    inside = in_t[:, None] & in_e[None, :]
    at = t[:, None] * experts + e[None, :]
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, width, BLOCK_C):
        in_c = start + c < width
        x_at = t.to(tl.int64)[:, None] * stride + (start + c)[None, :]
        x = tl.load(x_ptr + x_at, mask=in_t[:, None] & in_c[None, :], other=0.0).to(tl.float32)
        weight_at = e[None, :] * width + (start + c)[:, None]
        weight = tl.load(weight_ptr + weight_at, mask=in_c[:, None] & in_e[None, :], other=0.0)
        logits = tl.dot(x, weight, logits, input_precision="ieee")
    bias = tl.load(bias_ptr + e, mask=in_e, other=0.0)
    logits = tl.where(in_e[None, :], (logits + bias[None, :]) * factor, float("-inf"))
    probability, lse = _softmax(logits)
    tl.store(probability_ptr + at, probability, mask=inside)
    tl.store(lse_ptr + t, lse, mask=in_t)
    first = tl.where(in_e[None, :], probability, float("-inf"))
    largest = tl.max(first, 1)
    score = probability
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + e[None, :] * tokens + t[:, None], mask=inside, other=0.0)
        score, _ = _softmax(logits + noise)
        tl.store(score_ptr + at, score, mask=inside)
    if CHOOSES:
        by = tl.where(in_e[None, :], score, float("-inf"))
        if choice_bias_ptr is not None:
            by += tl.load(choice_bias_ptr + e, mask=in_e, other=0.0)[None, :]
            by = tl.where(score == 0.0, float("-inf"), by)  # as in `Gate._choose`
        best = _best(by, e, experts, BLOCK_E)
        value = tl.sum(tl.where(e[None, :] == best[:, None], score, 0.0), 1)
        if NORMALISES:
            value = value / value  # 1, or NaN
        tl.store(gate_ptr + t, value, mask=in_t)
        tl.store(expert_ptr + t, best.to(tl.int64), mask=in_t)
        first_count = tl.sum(tl.where((e[None, :] == best[:, None]) & inside, 1.0, 0.0), 0)
        chosen_count = first_count
    else:
        best = _best(first, e, experts, BLOCK_E)
        tl.store(gate_ptr + at, score, mask=inside)
        tl.store(expert_ptr + at, (e[None, :] + tl.zeros((BLOCK_T, 1), tl.int32)).to(tl.int64), mask=inside)
        first_count = tl.sum(tl.where((e[None, :] == best[:, None]) & inside, 1.0, 0.0), 0)
        chosen_count = tl.sum(tl.where(inside, 1.0, 0.0), 0)
    part = parts_ptr + block * 4 * BLOCK_E + e
    tl.store(part, tl.sum(tl.where(inside, probability, 0.0), 0))
    tl.store(part + BLOCK_E, first_count)
    tl.store(part + 2 * BLOCK_E, chosen_count)
    confidence = tl.sum(tl.where(in_t, largest, 0.0), 0)
    z = tl.sum(tl.where(in_t, lse * lse, 0.0), 0)
    count = tl.sum(tl.where(in_t, 1.0, 0.0), 0)
    scalars = tl.where(e == 0, confidence, tl.where(e == 1, z, tl.where(e == 2, count, 0.0)))
    tl.store(part + 3 * BLOCK_E, scalars)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    probability_ptr,
    score_ptr,
    lse_ptr,
    expert_ptr,
    grad_gate_ptr,
    grad_sum_ptr,
    grad_z_ptr,
    grad_ptr,
    weight_ptr,
    grad_x_ptr,
    tokens,
    width,
    experts,
    factor,
    CHOOSES: tl.constexpr,
    NORMALISES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    t, e = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    in_t, in_e = t < tokens, e < experts
    inside = in_t[:, None] & in_e[None, :]
    at = t[:, None] * experts + e[None, :]
    probability = tl.load(probability_ptr + at, mask=inside, other=0.0)
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if grad_sum_ptr is not None:
        of_sum = tl.load(grad_sum_ptr + e, mask=in_e, other=0.0)[None, :]
        grad += probability * (of_sum - tl.sum(probability * of_sum, 1)[:, None])
    if grad_z_ptr is not None:
        lse = tl.load(lse_ptr + t, mask=in_t, other=0.0)
        grad += 2.0 * tl.load(grad_z_ptr) * lse[:, None] * probability
    if grad_gate_ptr is not None:
        score = tl.load(score_ptr + at, mask=inside, other=0.0)
        if CHOOSES:
            of_gate = tl.load(grad_gate_ptr + t, mask=in_t, other=0.0)
            best = tl.load(expert_ptr + t, mask=in_t, other=0)
            is_best = e[None, :] == best[:, None]
            value = tl.sum(tl.where(is_best, score, 0.0), 1)
            scaled = of_gate if NORMALISES else of_gate * value  # the gradient of log p
            grad += scaled[:, None] * (tl.where(is_best, 1.0, 0.0) - score)
        else:
            of_gate = tl.load(grad_gate_ptr + at, mask=inside, other=0.0)
            grad += score * (of_gate - tl.sum(score * of_gate, 1)[:, None])
    grad *= factor
    tl.store(grad_ptr + at, grad, mask=inside)
    if grad_x_ptr is not None:
        grad = tl.where(inside, grad, 0.0)
        for start in range(0, width, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            of_weight = in_e[:, None] & (c < width)[None, :]
            weight = tl.load(weight_ptr + e[:, None] * width + c[None, :], mask=of_weight, other=0.0)
            grad_x = tl.dot(grad, weight, input_precision="ieee")
            x_at = t.to(tl.int64)[:, None] * width + c[None, :]
            mask = in_t[:, None] & (c < width)[None, :]
            tl.store(grad_x_ptr + x_at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_gradient(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    parts_ptr,
    tokens,
    width,
    experts,
    stride,
    each,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_e, in_c = e < experts, c < width
    weight = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
    bias = tl.zeros((BLOCK_E,), tl.float32)
    for block in range(part * each, (part + 1) * each):
        t = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_t = t < tokens
        grad_at = grad_ptr + t[None, :] * experts + e[:, None]
        grad = tl.load(grad_at, mask=in_e[:, None] & in_t[None, :], other=0.0)
        x_at = x_ptr + t[:, None] * stride + c[None, :]
        x = tl.load(x_at, mask=in_t[:, None] & in_c[None, :], other=0.0).to(tl.float32)
        weight = tl.dot(grad, x, weight, input_precision="ieee")
        bias += tl.sum(grad, 1)
    own = parts_ptr + part * experts * (width + 1)
    tl.store(own + e[:, None] * width + c[None, :], weight, mask=in_e[:, None] & in_c[None, :])
    tl.store(own + experts * width + e, bias, mask=in_e & (tl.program_id(1) == 0))


@triton.jit
def _squared_variation(x_ptr, found_ptr, slope_ptr, experts, weight, BLOCK_E: tl.constexpr):  # type: ignore[no-untyped-def]
    row, e = tl.program_id(0), tl.arange(0, BLOCK_E)
    in_e = e < experts
    x = tl.load(x_ptr + row * experts + e, mask=in_e, other=0.0)
    mean = tl.sum(x, 0) / experts
    off = tl.where(in_e, x / mean - 1.0, 0.0)
    found = tl.sum(off * off, 0) / experts
    tl.store(found_ptr + row, weight * found)
    tl.store(slope_ptr + row * experts + e, (off - found) * (2.0 * weight / (experts * mean)), mask=in_e)
