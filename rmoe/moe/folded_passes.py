"""What stands between the products of folded.py: weights joined, g ⊙ A x written, gate values' gradients summed.

Each function is one kernel in folded_triton.py, which a GPU takes where Triton is installed. Here the same is written
in torch's operators: for every other device and for float64, and as what those kernels are tested against.

Shape suffixes as in folded.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from rmoe.moe.masked import by_expert, times_gates
from rmoe.moe.triton_here import has_triton

# Rows of ones, whose weights are b alike: each enters with 1/16, exact in any format, and sizes stay multiples of 16.
ONES = 16
_ALIGNMENT = 16  # bytes at which each row of an operand begins


def passes_for(x: Tensor, dtype: torch.dtype) -> ModuleType:
    """Returns the module whose functions compute for x in `dtype`: this one, or folded_triton.py."""
    fast = has_triton(x) and dtype != torch.float64
    return import_module("rmoe.moe.folded_triton" if fast else __name__)


class Gates(NamedTuple):
    """Says which experts each token uses, with what weight."""

    expert_TK: Tensor  # E for a choice that the capacity dropped
    gate_TK: Tensor
    gate_ET: Tensor | None  # the same, 0 where an expert is not chosen; None where the kernels do without
    experts: int
    rank: int

    @property
    def rows(self) -> int:
        """Returns Q."""
        return self.experts * self.rank


class Linear(NamedTuple):
    """Holds the parameters of one linear layer and of its residuals."""

    w_OI: Tensor
    b_O: Tensor | None
    a_ERI: Tensor
    b_ERO: Tensor

    @property
    def outputs(self) -> int:
        """Returns O."""
        return len(self.w_OI)

    @property
    def inputs(self) -> int:
        """Returns I."""
        return self.w_OI.shape[1]

    @property
    def rows(self) -> int:
        """Returns Q."""
        return self.b_ERO.shape[0] * self.b_ERO.shape[1]

    def empty(self, dtype: torch.dtype) -> Tensor:
        """Returns room for [W Bᵀ b; A · ·], [O + Q, J]."""
        return matrix(self.w_OI, self.outputs + self.rows, self.inputs + self.rows + ONES, dtype)


def matrix(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Returns a matrix that is not filled, whose rows begin at whole 16 bytes."""
    step = _ALIGNMENT // dtype.itemsize
    return like.new_empty(rows, -(-columns // step) * step, dtype=dtype)[:, :columns]


def gates_of(expert_TK: Tensor, gate_TK: Tensor, experts: int, rank: int, drops: bool) -> Gates:
    """Prepares gate values for `weigh` and `gate_gradient`; `drops` says whether an expert may be E."""
    return Gates(expert_TK, gate_TK, by_expert(expert_TK, gate_TK, experts, drops), experts, rank)


def join(layers: Sequence[Linear], dtype: torch.dtype, ready: Callable[[], object] | None) -> list[Tensor]:
    """Returns [W Bᵀ b; A · ·] of each layer, [O + Q, J]: what stands below Bᵀ and b is not filled.

    Args:
        layers: whose W and b are here.
        dtype: of the matrices.
        ready: waits until A and B are here, too.
    """
    found = [layer.empty(dtype) for layer in layers]
    for layer, joined in zip(layers, found, strict=True):
        joined[: layer.outputs, : layer.inputs].copy_(layer.w_OI)
        joined[: layer.outputs, layer.inputs + layer.rows :] = 0 if layer.b_O is None else layer.b_O[:, None]
    if ready is not None:
        ready()
    for layer, joined in zip(layers, found, strict=True):
        b_QO = layer.b_ERO.flatten(0, 1)
        joined[: layer.outputs, layer.inputs : layer.inputs + layer.rows].copy_(b_QO.T)
        joined[layer.outputs :, : layer.inputs].unflatten(0, layer.b_ERO.shape[:2]).copy_(layer.a_ERI)
    return found


def weigh(u_PT: Tensor, gates: Gates, out_ST: Tensor) -> None:
    """Writes g ⊙ u into the first Q rows of `out_ST`, S ≥ Q, and 1/16 into those below.

    Args:
        u_PT: A x, or B grad; P is R where the experts share one A.
        gates: of the tokens.
        out_ST: written.
    """
    assert gates.gate_ET is not None
    by_rank = (gates.experts, gates.rank)
    u_ERT = u_PT.unflatten(0, (-1, gates.rank))
    times_gates(u_ERT, gates.gate_ET, out=out_ST[: gates.rows].unflatten(0, by_rank))
    if len(out_ST) > gates.rows:
        out_ST[gates.rows :] = 1 / ONES


def gate_gradient(v_QTs: Sequence[Tensor], u_PTs: Sequence[Tensor], gates: Gates) -> Tensor:
    """Returns the gradient of gate_TK, Σ over both layers and the ranks of the chosen expert of v · u.

    Args:
        v_QTs: B grad of both layers.
        u_PTs: A x of both.
        gates: of the tokens; a choice that the capacity dropped gets 0.
    """
    pairs = zip(v_QTs, u_PTs, strict=True)
    v1_ERT, u1_ERT, v2_ERT, u2_ERT = (part.unflatten(0, (-1, gates.rank)) for pair in pairs for part in pair)
    of_rank_ERT = (v1_ERT * u1_ERT).addcmul_(v2_ERT, u2_ERT)
    # Room for expert E, whose gradient is 0.
    grad_ET = gates.gate_TK.new_zeros(gates.experts + 1, of_rank_ERT.shape[-1])
    torch.sum(of_rank_ERT, 1, dtype=grad_ET.dtype, out=grad_ET[:-1])
    return grad_ET.gather(0, gates.expert_TK.T).T
