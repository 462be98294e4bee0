from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rmoe.config import GateLosses, ResidualMoEConfig
from rmoe.moe.gate import Gate, GateSums, drop_over_capacity, gate_loss


def gate(**config: object) -> Gate:
    """A gate of three experts for tokens of three features that are the logits."""
    module = Gate(3, ResidualMoEConfig(**{"num_experts": 3, "noise": 0.0, **config}))  # type: ignore[arg-type]
    torch.nn.init.eye_(module.weight)
    return module


LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 1.5]])


@pytest.mark.parametrize("combine", ["residual", "softmax"])
def test_gate_values_are_the_probabilities_of_the_best(combine: str) -> None:
    routing = gate(top_k=2, combine=combine)(LOGITS)
    assert routing.expert_TK.tolist() == [[0, 1], [1, 2], [2, 0]]
    torch.testing.assert_close(routing.gate_TK, LOGITS.softmax(-1).gather(-1, routing.expert_TK))


def test_straight_through_is_one_forward_and_the_probability_backward() -> None:
    module = gate(combine="straight_through")
    routing = module(LOGITS)
    assert torch.equal(routing.gate_TK, torch.ones(3, 1))
    (grad,) = torch.autograd.grad(routing.gate_TK[0].sum(), module.weight)
    p = LOGITS[0].softmax(-1)
    expected = (torch.eye(3)[0] - p)[:, None] * LOGITS[0]  # d log p_0 / d W
    torch.testing.assert_close(grad, expected)


def test_straight_through_of_two_sums_to_one() -> None:
    routing = gate(combine="straight_through", top_k=2)(LOGITS)
    torch.testing.assert_close(routing.gate_TK.sum(-1), torch.ones(3))


def test_noise_in_training_only() -> None:
    module = gate(noise=5.0, top_k=3)
    assert not torch.equal(module(LOGITS).gate_TK, module(LOGITS).gate_TK)
    module.eval()
    assert torch.equal(module(LOGITS).gate_TK, module(LOGITS).gate_TK)
    assert module(LOGITS).sums is None


def test_routing_is_float32_under_bfloat16() -> None:
    module = gate().to(torch.bfloat16)
    x = LOGITS.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        routing = module(x)
    assert routing.gate_TK.dtype == torch.float32
    torch.testing.assert_close(routing.probability_TE, x.float().softmax(-1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_gradients_of_all_that_the_gate_gives(k: int, noise: float) -> None:
    module = gate(top_k=k, noise=noise, losses=GateLosses(importance=1.0, load=1.0 if noise else 0.0, z=1.0)).double()

    def function(x_TC: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # the same noise each time
        routing = torch.func.functional_call(module, {"weight": weight}, x_TC)
        return routing.gate_TK, routing.sums.probability_E, routing.sums.z

    inputs = [t.detach().double().requires_grad_() for t in (LOGITS + 0.1, module.weight)]
    assert torch.autograd.gradcheck(function, inputs)


def sums_of(probability_TE: Tensor, load_TE: Tensor, logits_TE: Tensor) -> GateSums:
    first = torch.bincount(probability_TE.argmax(-1), minlength=probability_TE.shape[1]).float()
    z = logits_TE.logsumexp(-1).square().sum()
    tokens = torch.tensor(float(len(probability_TE)))
    return GateSums(probability_TE.sum(0), load_TE.sum(0), first, first, probability_TE.amax(1).sum(), z, tokens)


def test_losses_by_hand() -> None:
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.25]])
    sums = sums_of(p, p, p.log())
    # importance: sums 2.5 and 1.5, mean 2, variance 1/4
    assert gate_loss(sums, GateLosses(importance=1.0)).item() == pytest.approx(0.25 / 4)
    assert gate_loss(sums, GateLosses(importance=0.0, load=2.0)).item() == pytest.approx(2 * 0.25 / 4)
    # balance: 2 · (0.625 · 0.75 + 0.375 · 0.25)
    assert gate_loss(sums, GateLosses(importance=0.0, balance=1.0)).item() == pytest.approx(1.125)
    assert gate_loss(sums, GateLosses(importance=0.0, z=1.0)).item() == pytest.approx(0.0, abs=1e-12)
    shifted = sums_of(p, p, p.log() + 3.0)
    assert gate_loss(shifted, GateLosses(importance=0.0, z=1.0)).item() == pytest.approx(9.0)


def test_sums_of_a_batch_in_training() -> None:
    module = gate(losses=GateLosses(importance=1.0, z=1.0))
    sums = module(LOGITS).sums
    assert sums is not None
    torch.testing.assert_close(sums.probability_E, LOGITS.softmax(-1).sum(0))
    assert sums.first_E.tolist() == [1, 1, 1]
    assert sums.tokens == 3
    torch.testing.assert_close(sums.z, LOGITS.logsumexp(-1).square().sum())


def test_load_is_the_chance_of_being_chosen_again() -> None:
    torch.manual_seed(0)
    module = gate(noise=1.5, losses=GateLosses(load=1.0), top_k=2)
    x = LOGITS[:1]
    drawn = torch.stack([module(x).sums.load_E for _ in range(2000)])
    assert ((drawn >= 0) & (drawn <= 1)).all()
    # Over the noise, expert e counts as often as it is among the two best: estimated by sampling the choice itself.
    chosen = torch.zeros(3)
    for _ in range(2000):
        chosen[(x + 0.5 * torch.randn(1, 3)).topk(2).indices[0]] += 1
    assert drawn.mean(0).argsort().tolist() == chosen.argsort().tolist()


def test_balanced_gate_costs_nothing_and_a_collapsed_one_does() -> None:
    zero = torch.zeros(())
    even = GateSums(*[torch.ones(4)] * 4, zero, zero, torch.tensor(4.0))
    one = torch.tensor([4.0, 0, 0, 0])
    collapsed = GateSums(*[one] * 4, zero, zero, torch.tensor(4.0))
    weights = GateLosses(importance=1.0, load=1.0)
    assert gate_loss(even, weights) == 0
    assert gate_loss(collapsed, weights).item() == pytest.approx(6.0)  # twice (std/mean)² = 3


def test_the_gate_learns_from_every_loss() -> None:
    for name in ("importance", "load", "balance", "z"):
        module = gate(noise=1.0, losses=GateLosses(**{"importance": 0.0, name: 1.0}))
        sums = module(LOGITS + torch.tensor([1.0, 0.0, 0.0])).sums
        gate_loss(sums, module.config.losses).backward()
        assert module.weight.grad is not None, name
        assert module.weight.grad.abs().sum() > 0, name


def test_capacity_keeps_the_highest_gate_values_whatever_the_order() -> None:
    expert_TK = torch.tensor([[0], [0], [0], [1]])
    value_TK = torch.tensor([[0.5], [0.9], [0.7], [0.6]])
    kept = drop_over_capacity(expert_TK, value_TK, num_experts=2, factor=1.0)
    assert kept.flatten().tolist() == [2, 0, 0, 1]
    order = [2, 0, 3, 1]
    assert drop_over_capacity(expert_TK[order], value_TK[order], 2, 1.0).tolist() == kept[order].tolist()


def test_capacity_is_rounded_up() -> None:
    expert_TK = torch.zeros(10, 1, dtype=torch.int64)
    value_TK = torch.rand(10, 1)
    kept = drop_over_capacity(expert_TK, value_TK, num_experts=4, factor=1.05)
    assert (kept == 0).sum() == math.ceil(1.05 * 10 / 4)


def test_capacity_in_training_only() -> None:
    module = gate(capacity_factor=0.1)
    assert (module(LOGITS).expert_TK == 3).sum() == 0  # one token for each expert: the capacity is at least one
    same = LOGITS[:1].repeat(6, 1)
    assert (module(same).expert_TK == 3).sum() == 5
    assert (module.eval()(same).expert_TK == 3).sum() == 0
