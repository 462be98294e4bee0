"""Writes the joint matrix of folded.py, [W Bᵀ b; A · ·], from its parameters in one kernel, casts included."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 16, 128  # of a block


def join(w_OI: Tensor, bias_O: Tensor | None, a_PI: Tensor, b_QO: Tensor, out: Tensor) -> None:
    """Fills `out`, [O + Q, J], rows of adjacent elements; columns from I + Q on hold the bias each, or zeros.

    The other tensors are contiguous; where the experts share one A, it is repeated.
    """
    (outputs, inputs), rows = w_OI.shape, len(b_QO)
    grid = (triton.cdiv(outputs + rows, _ROWS), triton.cdiv(out.shape[1], _COLUMNS))
    sizes = (outputs, inputs, rows, len(a_PI), out.shape[1], out.stride(0))
    _join[grid](w_OI, bias_O, a_PI, b_QO, out, *sizes, BLOCK_R=_ROWS, BLOCK_C=_COLUMNS)


@triton.jit
def _join(  # type: ignore[no-untyped-def]
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
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    r = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
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
