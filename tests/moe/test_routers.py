"""Kinds of gates, and experts that are left out while training."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor

from rmoe.config import Calibration, GateLosses, ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.gate import Gate
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.routers import ROUTERS

WIDTH, EXPERTS = 5, 4


def gate(**config: object) -> Gate:
    torch.manual_seed(0)
    chosen = ResidualMoEConfig(**{"num_experts": EXPERTS, "noise": 0.0, **config})  # type: ignore[arg-type]
    return ROUTERS[chosen.router](WIDTH, chosen)


def tokens(count: int = 30) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(1))


def test_cosines_by_hand() -> None:
    module = gate(router="cosine", temperature=2.0)
    with torch.no_grad():
        module.bias.copy_(torch.arange(4.0))
        module.log_scale.fill_(math.log(3.0))
    x = tokens(1)
    cosines = [float(w @ x[0] / (w.norm() * x[0].norm())) for w in module.weight.detach()]
    expected = [(3 * cosine + e) / 2 for e, cosine in enumerate(cosines)]
    torch.testing.assert_close(module.logits(x)[:, 0].tolist(), expected)


def test_lengths_do_not_matter_to_cosines() -> None:
    module, x = gate(router="cosine"), tokens()
    logits = module.logits(x)
    with torch.no_grad():
        module.weight.mul_(7)
    torch.testing.assert_close(module.logits(0.01 * x), logits)


def test_the_scale_of_cosines_is_bounded_and_zeros_are_no_trouble() -> None:
    module = gate(router="cosine")
    with torch.no_grad():
        module.log_scale.fill_(50.0)
    assert module.logits(tokens()).abs().max() <= 100 * (1 + 1e-5)
    logits = module.logits(torch.zeros(2, WIDTH, requires_grad=True))
    assert torch.equal(logits, torch.zeros(EXPERTS, 2))
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_gradients_of_cosines() -> None:
    module = gate(router="cosine", top_k=2, losses=GateLosses(importance=1.0, z=1.0)).double()
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), x)
        return routing.gate_TK, routing.sums.probability_E, routing.sums.z

    inputs = [t.detach().double().requires_grad_() for t in (tokens(3), *module.parameters())]
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("residual", ["low_rank", "full"])
def test_any_router_leaves_the_function(residual: str) -> None:
    core, x = Mlp(WIDTH, 2 * WIDTH), tokens()
    expected = core(x)
    for router in ("linear", "cosine"):
        config = ResidualMoEConfig(num_experts=EXPERTS, residual=residual, router=router, expert_drop=0.4)  # type: ignore[arg-type]
        torch.testing.assert_close(ResidualMoE(core, config)(x), expected)


def test_a_layer_keeps_its_router_in_its_state() -> None:
    config = ResidualMoEConfig(num_experts=EXPERTS, router="cosine")
    one, other = (ResidualMoE(Mlp(WIDTH, 8), config) for _ in range(2))
    assert "gate.log_scale" in one.state_dict()
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.eval()(tokens()), other.eval()(tokens()))


@pytest.mark.parametrize("top_k", [1, 2])
def test_dropped_experts_get_no_token_and_the_others_share_them(top_k: int) -> None:
    module = gate(expert_drop=0.5, top_k=top_k, combine="softmax", balance_rate=0.001)
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        routing = module(tokens(200))
        used = set(routing.expert_TK.flatten().tolist())
        seen.add(frozenset(used))
        assert len(used) >= top_k
        kept = module.logits(tokens(200)).T[:, sorted(used)].softmax(1).topk(top_k).values
        torch.testing.assert_close(routing.gate_TK, kept)
        torch.testing.assert_close(routing.probability_TE, module.logits(tokens(200)).T.softmax(1))
    assert len(seen) > 4


def test_the_share_of_dropped_experts_is_the_one_asked_for() -> None:
    torch.manual_seed(0)
    module = Gate(WIDTH, ResidualMoEConfig(num_experts=64, expert_drop=0.25, noise=0.0))
    lost = [module._without_some(torch.zeros(64, 1)).isinf().sum().item() for _ in range(100)]
    assert 0.22 * 6400 < sum(lost) < 0.28 * 6400
    assert torch.equal(module.eval()._without_some(torch.zeros(64, 1)), torch.zeros(64, 1))


def test_a_high_chance_leaves_as_many_as_a_token_uses() -> None:
    module = gate(expert_drop=0.999, top_k=3, combine="softmax")
    for _ in range(20):
        routing = module(tokens())
        assert routing.gate_TK.isfinite().all()
        assert (routing.expert_TK.sort(1).values.diff() > 0).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"router": "cosin"}, "did you mean 'cosine'"),
        ({"expert_drop": 1.0}, "less than 1"),
        ({"expert_drop": -0.1}, "from 0"),
        ({"expert_drop": float("nan")}, "a finite number"),
        ({"expert_drop": 0.1, "top_k": "all"}, "set it to 0, or top_k lower"),
        ({"expert_drop": 0.1, "losses": GateLosses(load=0.1)}, "set one of them to 0"),
    ],
)
def test_what_cannot_be(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResidualMoEConfig(**config)  # type: ignore[arg-type]


def test_cosines_are_not_calibrated() -> None:
    with pytest.raises(UserError, match="calibrate sets linear gates.*'cosine'"):
        Calibration().check(ResidualMoEConfig(router="cosine"))
