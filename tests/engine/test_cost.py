"""What a step costs, against counts by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import nn

from rmoe.config import ResidualMoEConfig
from rmoe.engine.cost import Parameters, count_parameters, counted_flops, device_kind, peak_memory, software
from rmoe.moe.layer import ResidualMoE


def flops(run: object) -> int:
    result: list[int] = []
    with counted_flops(result):
        run()  # type: ignore[operator]
    return result[0]


def test_products_count_forward_and_backward() -> None:
    """y = x W: 2·4·8·16 forward, and as much for each of the two gradients."""
    layer, x = nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    assert flops(lambda: layer(x)) == 2 * 4 * 8 * 16
    assert flops(lambda: layer(x).sum().backward()) == 3 * 2 * 4 * 8 * 16


def test_products_in_place_count() -> None:
    """torch's own counter leaves them out."""
    a, b = torch.randn(4, 8), torch.randn(8, 16)
    assert flops(lambda: torch.zeros(4, 16).addmm_(a, b)) == 2 * 4 * 8 * 16


def test_attention_on_a_cpu_counts() -> None:
    """Two products of 10 × 10 × 8 forward and five backward, for 2 heads."""
    x = torch.randn(1, 2, 10, 8, requires_grad=True)
    product = 2 * 2 * 10 * 10 * 8
    assert flops(lambda: F.scaled_dot_product_attention(x, x, x)) == 2 * product
    assert flops(lambda: F.scaled_dot_product_attention(x, x, x).sum().backward()) == 7 * product


def test_a_low_rank_expert_costs_its_core_and_its_rank() -> None:
    """Per token: two core products 2·C·H, two residuals 2·R·(C + H) each, the router 2·C·E."""
    tokens, width, hidden, experts, rank = 64, 16, 32, 4, 2
    config = ResidualMoEConfig(num_experts=experts, top_k=1, rank=rank, noise=0.0)
    layer = ResidualMoE(Mlp(width, hidden), config).eval()
    core, residual, router = 2 * 2 * width * hidden, 2 * 2 * rank * (width + hidden), 2 * width * experts
    with torch.no_grad():
        counted = flops(lambda: layer(torch.randn(tokens, width)))
    assert core + router <= counted / tokens <= core + residual + router


def test_parameters_of_a_dense_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5).requires_grad_(False))
    assert count_parameters(model) == Parameters(total=16 + 25, active=16 + 25, trainable=16)


def test_what_experts_share_is_used_by_every_token() -> None:
    layer = ResidualMoE(Mlp(4, 8), ResidualMoEConfig(num_experts=4, top_k=1, rank=2, shared_a=True, train_core=False))
    dense, gate, of_a, of_b = 4 * 8 + 8 + 8 * 4 + 4, 4 * 4 + 4, 2 * (4 + 8), 2 * (8 + 4)
    assert count_parameters(layer) == Parameters(
        total=dense + gate + of_a + 4 * of_b, active=dense + gate + of_a + of_b, trainable=gate + of_a + 4 * of_b
    )


def test_soft_mixing_uses_all_experts_and_counts_their_products() -> None:
    tokens, width, hidden, experts, rank = 64, 16, 32, 4, 2
    config = ResidualMoEConfig(num_experts=experts, top_k="all", rank=rank, noise=0.0)
    layer = ResidualMoE(Mlp(width, hidden), config).eval()
    core, residual, router = 2 * 2 * width * hidden, 2 * 2 * experts * rank * (width + hidden), 2 * width * experts
    with torch.no_grad():
        counted = flops(lambda: layer(torch.randn(tokens, width)))
    assert counted == tokens * (core + residual + router)
    assert count_parameters(layer).active == count_parameters(layer).total


def test_experts_count_once_and_by_what_a_token_uses() -> None:
    layer = ResidualMoE(Mlp(4, 8), ResidualMoEConfig(num_experts=4, top_k=2, residual="full"))
    core, gate = 4 * 8 + 8 + 8 * 4 + 4, 4 * 4 + 4
    assert count_parameters(layer) == Parameters(core + gate + 4 * core, core + gate + 2 * core, gate + 4 * core)
    layer.ep_size = 2  # as if half of the experts lived elsewhere
    assert count_parameters(layer).total == core + gate + 8 * core


def test_where_it_ran() -> None:
    assert peak_memory() > 10**7
    assert device_kind()
    assert {"python", "torch", "deepspeed", "timm", "commit"} == software().keys()
