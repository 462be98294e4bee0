"""The functions of folded_passes.py on a GPU, one Triton kernel each: casts, gate values and sums inside.

A kernel adds in float32, whatever it reads and writes. Strides come with every operand that lies tokens first in one
layer and features first in the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmoe.moe.folded_passes import ONES, Gates, Linear

_ROWS, _COLUMNS = 16, 128  # of a block of weights
_RANKS, _TOKENS = 32, 64  # of a block of activations


def gates_of(expert_TK: Tensor, gate_TK: Tensor, experts: int, rank: int, drops: bool) -> Gates:
    """Returns gate values as they are, for `weigh` and `gate_gradient` of this module."""
    return Gates(expert_TK, gate_TK, None, experts, rank)


def join(layers: Sequence[Linear], dtype: torch.dtype, ready: Callable[[], object] | None) -> list[Tensor]:
    """Returns [W Bᵀ b; A · ·] of both layers, as `rmoe.moe.folded_passes.join`."""
    found = [layer.empty(dtype) for layer in layers]
    if ready is not None:
        ready()
    of_layers, blocks = list[object](), list[int]()
    for layer, joined in zip(layers, found, strict=True):
        factors = (layer.a_ERI.flatten(0, 1).contiguous(), layer.b_ERO.flatten(0, 1).contiguous())
        wide = triton.cdiv(joined.shape[1], _COLUMNS)
        sizes = (layer.outputs, layer.inputs, layer.rows, len(factors[0]), joined.shape[1], joined.stride(0), wide)
        of_layers += [layer.w_OI.contiguous(), layer.b_O, *factors, joined, *sizes]
        blocks.append(triton.cdiv(len(joined), _ROWS) * wide)
    _join[(sum(blocks),)](*of_layers, blocks[0], BLOCK_R=_ROWS, BLOCK_C=_COLUMNS)
    return found


def weigh(u_PT: Tensor, gates: Gates, out_ST: Tensor) -> None:
    """Writes g ⊙ u and rows of 1/16, as `rmoe.moe.folded_passes.weigh`."""
    expert_TK, gate_TK = gates.expert_TK, gates.gate_TK
    tokens, choices = expert_TK.shape
    _weigh[(triton.cdiv(tokens, _TOKENS), triton.cdiv(len(out_ST), _RANKS))](
        *(u_PT, expert_TK, gate_TK, out_ST),
        *(tokens, choices, gates.rank, gates.rows, len(u_PT), len(out_ST)),
        *(*u_PT.stride(), *expert_TK.stride(), *gate_TK.stride(), *out_ST.stride()),
        **{"ONE": 1 / ONES, "BLOCK_R": _RANKS, "BLOCK_T": _TOKENS},
    )


def gate_gradient(v_QTs: Sequence[Tensor], u_PTs: Sequence[Tensor], gates: Gates) -> Tensor:
    """Returns the gradient of gate_TK, as `rmoe.moe.folded_passes.gate_gradient`."""
    expert_TK, (tokens, choices) = gates.expert_TK, gates.expert_TK.shape
    grad_TK = torch.empty_like(gates.gate_TK, memory_format=torch.contiguous_format)
    factors = [part for pair in zip(v_QTs, u_PTs, strict=True) for part in pair]
    _gate_gradient[(triton.cdiv(tokens, _TOKENS), choices)](
        *(*factors, expert_TK, grad_TK),
        *(tokens, choices, gates.experts, gates.rank, len(u_PTs[0])),
        *(step for part in factors for step in part.stride()),
        *expert_TK.stride(),
        **{"BLOCK_T": _TOKENS, "BLOCK_R": min(16, triton.next_power_of_2(gates.rank))},
    )
    return grad_TK


@triton.jit
def _join_block(  # type: ignore[no-untyped-def]
    block,
    w_ptr,
    bias_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    outputs,
    inputs,
    rows,
    rows_a,
    columns,
    stride,
    wide,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = (block // wide * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    c = (block % wide * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    above, below = r < outputs, (r >= outputs) & (r < outputs + rows)
    left, right = c < inputs, (c >= inputs + rows) & (c < columns)
    middle = (c >= inputs) & (c < inputs + rows)
    # Each element has one source; the others load zeros.
    x = tl.load(w_ptr + r.to(tl.int64) * inputs + c, mask=above & left, other=0.0).to(tl.float32)
    x += tl.load(a_ptr + (r - outputs) % rows_a * inputs + c, mask=below & left, other=0.0).to(tl.float32)
    x += tl.load(b_ptr + (c - inputs) * outputs + r, mask=above & middle, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + r + c * 0, mask=above & right, other=0.0).to(tl.float32)
    out_at = out_ptr + r.to(tl.int64) * stride + c
    tl.store(out_at, x.to(out_ptr.dtype.element_ty), mask=(above | below) & (c < columns))


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    w1_ptr,
    bias1_ptr,
    a1_ptr,
    b1_ptr,
    out1_ptr,
    outputs1,
    inputs1,
    rows1,
    rows_a1,
    columns1,
    stride1,
    wide1,
    w2_ptr,
    bias2_ptr,
    a2_ptr,
    b2_ptr,
    out2_ptr,
    outputs2,
    inputs2,
    rows2,
    rows_a2,
    columns2,
    stride2,
    wide2,
    blocks1,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0)
    if block < blocks1:
        _join_block(
            block,
            w1_ptr,
            bias1_ptr,
            a1_ptr,
            b1_ptr,
            out1_ptr,
            outputs1,
            inputs1,
            rows1,
            rows_a1,
            columns1,
            stride1,
            wide1,
            BLOCK_R,
            BLOCK_C,
        )
    else:
        _join_block(
            block - blocks1,
            w2_ptr,
            bias2_ptr,
            a2_ptr,
            b2_ptr,
            out2_ptr,
            outputs2,
            inputs2,
            rows2,
            rows_a2,
            columns2,
            stride2,
            wide2,
            BLOCK_R,
            BLOCK_C,
        )


@triton.jit
def _weigh(  # type: ignore[no-untyped-def]
    u_ptr,
    expert_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    choices,
    rank,
    rows,
    rows_u,
    rows_out,
    u_row,
    u_token,
    expert_token,
    expert_choice,
    gate_token,
    gate_choice,
    out_row,
    out_token,
    ONE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    q = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    there = t < tokens
    gate = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
    for k in range(choices):
        expert = tl.load(expert_ptr + t * expert_token + k * expert_choice, mask=there, other=-1)
        value = tl.load(gate_ptr + t * gate_token + k * gate_choice, mask=there, other=0.0).to(tl.float32)
        gate += tl.where(expert == q // rank, value, 0.0)
    u_at = u_ptr + q % rows_u * u_row + t * u_token
    u = tl.load(u_at, mask=there & (q < rows), other=0.0).to(tl.float32)
    x = tl.where(gate == 0.0, 0.0, u * gate)  # as `rmoe.moe.masked.times_gates`
    x = tl.where(q < rows, x, ONE)
    tl.store(out_ptr + q * out_row + t * out_token, x.to(out_ptr.dtype.element_ty), mask=there & (q < rows_out))


@triton.jit
def _gate_gradient(  # type: ignore[no-untyped-def]
    v1_ptr,
    u1_ptr,
    v2_ptr,
    u2_ptr,
    expert_ptr,
    grad_ptr,
    tokens,
    choices,
    experts,
    rank,
    rows_u,
    v1_row,
    v1_token,
    u1_row,
    u1_token,
    v2_row,
    v2_token,
    u2_row,
    u2_token,
    expert_token,
    expert_choice,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    t, k = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64), tl.program_id(1)
    there = t < tokens
    expert = tl.load(expert_ptr + t * expert_token + k * expert_choice, mask=there, other=experts)
    total = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)[None, :]
        mask = (there & (expert < experts))[:, None] & (r < rank)
        row, of_t = expert[:, None] * rank + r, t[:, None]
        row_u = row % rows_u
        v1 = tl.load(v1_ptr + row * v1_row + of_t * v1_token, mask=mask, other=0.0).to(tl.float32)
        u1 = tl.load(u1_ptr + row_u * u1_row + of_t * u1_token, mask=mask, other=0.0).to(tl.float32)
        v2 = tl.load(v2_ptr + row * v2_row + of_t * v2_token, mask=mask, other=0.0).to(tl.float32)
        u2 = tl.load(u2_ptr + row_u * u2_row + of_t * u2_token, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(v1 * u1 + v2 * u2, 1)
    tl.store(grad_ptr + t * choices + k, total.to(grad_ptr.dtype.element_ty), mask=there)
