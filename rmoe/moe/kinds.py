"""Kinds of residual: what the experts of a layer have as parameters, and what Δ is made of them.

A kind is a `NamedTuple` of tensors that are stacked over the experts, with two methods: `initial`, how they start, and
`scaled`, which returns Δ in a form that the arithmetic knows, `LowRank` or `Full`. A new kind is a class here, an entry
of `KINDS`, its name in `rmoe.config.Residual` and what the configuration has to know of it in `rmoe.config.KINDS`.

Shape suffixes: C model width, H hidden width, E experts, R residual rank, S places of a support, M singular values; I
and O the inputs and outputs of either linear layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.experts import Full, LowRank, Network, Own


class Segments(NamedTuple):
    """Holds Δ_e = (B_e + b_e)ᵀ(A_e + a_e) - B_eᵀA_e for either matrix, without biases: a and b train, from 0 on.

    B_eᵀA_e is a segment of the core's singular value decomposition, another one for each expert, divided by the `scale`
    of Δ (GOAT, arXiv 2502.16894). GOAT takes the mean of the segments off the core, which leaves the function for even
    gates; here each expert's own start is taken off, which leaves it for every gate. Expanded as bᵀ(A + a) + Bᵀa, of
    twice the rank, Δ is 0 at the start bit for bit, and what is learnt is not rounded away beside what was there.
    """

    a1_ERC: Tensor
    b1_ERH: Tensor
    a2_ERH: Tensor
    b2_ERC: Tensor
    start_a1_ERC: Tensor
    start_b1_ERH: Tensor
    start_a2_ERH: Tensor
    start_b2_ERC: Tensor

    @classmethod
    def initial(cls, config: ResidualMoEConfig, core: Network) -> Segments:
        """Returns residuals of zero effect.

        Raises:
            UserError: the core's matrices have fewer singular values than the experts take.
        """
        pairs = (_segments(weight, config) for weight in (core.w1_HC, core.w2_CH))
        starts = [factor for pair in pairs for factor in pair]
        return cls(*(torch.zeros_like(factor) for factor in starts), *starts)

    def scaled(self, scale: float) -> LowRank:
        """Returns `scale` times Δ as factors of rank 2R."""
        return LowRank(
            torch.cat([self.start_a1_ERC + self.a1_ERC, self.a1_ERC], 1),
            torch.cat([self.b1_ERH, self.start_b1_ERH], 1),
            torch.cat([self.start_a2_ERH + self.a2_ERH, self.a2_ERH], 1),
            torch.cat([self.b2_ERC, self.start_b2_ERC], 1),
        ).scaled(scale)


class Sparse(NamedTuple):
    """Holds Δ_e that is 0 but on a fixed random support of the core's matrices (DeRS-SM, arXiv 2503.01359); no biases.

    All experts have the same support: it is kept once, and a weighted sum of experts is as sparse as each. Parameters,
    gradients and optimizer states are sparse; the arithmetic is that of residuals of the core's shape.
    """

    w1_ES: Tensor
    w2_ES: Tensor
    places1_S: Tensor  # int32, in the flattened matrix, ascending
    places2_S: Tensor
    shapes: tuple[torch.Size, torch.Size]

    @classmethod
    def initial(cls, config: ResidualMoEConfig, core: Network) -> Sparse:
        """Returns residuals that are zero. Their support does not depend on torch's generators: processes need not have
        the same seed, but all have this.
        """
        weights, generator = (core.w1_HC, core.w2_CH), torch.Generator("cpu").manual_seed(0)
        places = []
        for weight in weights:
            count = max(1, round(config.density * weight.numel()))
            drawn_S = torch.randperm(weight.numel(), generator=generator, device="cpu")[:count]
            places.append(drawn_S.sort().values.to(weight.device, torch.int32))
        first, second = (core.w1_HC.new_zeros(config.num_experts, len(places_S)) for places_S in places)
        return cls(first, second, places[0], places[1], (core.w1_HC.shape, core.w2_CH.shape))

    def scaled(self, scale: float) -> Full:
        """Returns Δ in the core's shape: no configuration asks for another scale than 1."""
        assert scale == 1
        experts, (outputs, width) = len(self.w1_ES), self.shapes[0]
        w1_EHC, w2_ECH = (
            values_ES.new_zeros(experts, shape.numel()).index_copy(1, places_S.long(), values_ES).unflatten(1, shape)
            for values_ES, places_S, shape in zip(self[:2], self[2:4], self.shapes, strict=True)
        )
        return Full(w1_EHC, w1_EHC.new_zeros(experts, outputs), w2_ECH, w2_ECH.new_zeros(experts, width))

    def check(self) -> None:
        """Checks a support that was read from a file.

        Raises:
            UserError: it is none of these matrices.
        """
        for places_S, shape in zip(self[2:4], self.shapes, strict=True):
            if places_S[0] < 0 or places_S[-1] >= shape.numel() or not (places_S.diff() > 0).all():
                raise UserError(
                    f"the support of sparse residuals is damaged: it takes ascending places from 0 to "
                    f"{shape.numel() - 1}; copy the file again"
                )


KINDS: dict[str, type[LowRank | Full | Segments | Sparse]] = {
    "low_rank": LowRank,
    "segments": Segments,
    "sparse": Sparse,
    "full": Full,
    "experts": Own,
}
SHARED = ("places1_S", "places2_S", "shapes")  # names of what all experts have in common
FIXED = ("start_a1_ERC", "start_b1_ERH", "start_a2_ERH", "start_b2_ERC")  # names of parameters that are never trained


def _segments(weight_OI: Tensor, config: ResidualMoEConfig) -> tuple[Tensor, Tensor]:
    """Returns A [E, R, I] and B [E, R, O] whose products are the first R singular values of each of E equal segments,
    divided by the scale. The singular vectors' signs are such that the largest number of each of A is positive.
    """
    many, rank, length = config.num_experts, config.rank, min(weight_OI.shape) // config.num_experts
    if length < rank:
        raise UserError(
            f"residual='segments' takes rank x experts singular values, {rank} x {many}, and a matrix of the core has "
            f"{min(weight_OI.shape)}: lower rank or num_experts"
        )
    left_OM, value_M, right_MI = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    sign_M1 = right_MI.gather(1, right_MI.abs().argmax(1, keepdim=True)).sign()
    root_M1 = (value_M[:, None] / config.scale).sqrt() * sign_M1
    b_MO, a_MI = root_M1 * left_OM.T, root_M1 * right_MI
    a_ERI, b_ERO = (x[: many * length].unflatten(0, (many, length))[:, :rank].to(weight_OI) for x in (a_MI, b_MO))
    return a_ERI, b_ERO
