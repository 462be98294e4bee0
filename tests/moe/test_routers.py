"""Kinds of gates, and experts that are left out while training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rmoe.config import Calibration, GateLosses, ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.experts import reference
from rmoe.moe.gate import Gate
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.merged import exact_network
from rmoe.moe.records import collect
from rmoe.moe.routers import ROUTERS

WIDTH, EXPERTS = 5, 4


def gate(**config: object) -> Gate:
    torch.manual_seed(0)
    chosen = ResidualMoEConfig(**{"num_experts": EXPERTS, "top_k": 1, "noise": 0.0, **config})  # type: ignore[arg-type]
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


@pytest.mark.parametrize("router", ["cosine", "mlp"])
def test_gradients_of_routers(router: str) -> None:
    module = gate(router=router, top_k=2, losses=GateLosses(importance=1.0, z=1.0)).double()
    names = [name for name, _ in module.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), x)
        return routing.gate_TK, routing.sums.probability_E, routing.sums.z

    inputs = [t.detach().double().requires_grad_() for t in (tokens(3), *module.parameters())]
    assert torch.autograd.gradcheck(function, inputs)


def test_a_hidden_layer_by_hand() -> None:
    module: Any = gate(router="mlp", num_experts=2, temperature=2.0)
    assert (module.weight.shape, module.hidden.shape) == ((2, 2), (2, WIDTH))
    with torch.no_grad():
        module.hidden.copy_(torch.eye(2, WIDTH))
        module.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        module.bias.copy_(torch.tensor([0.0, 10.0]))
    found = module.logits(torch.tensor([[5.0, -1.0, 7.0, 7.0, 7.0], [1.0, 2.0, 7.0, 7.0, 7.0]]))
    assert found.tolist() == [[2.5, 2.5], [12.5, 10.5]]  # (1·5, 1·1 + 2·2) / 2; (3·5 + 10, 3·1 + 4·2 + 10) / 2
    assert ROUTERS["mlp"](64, ResidualMoEConfig(num_experts=2)).weight.shape == (2, 8)


def test_all_of_a_hidden_layer_learns_and_is_saved() -> None:
    config = ResidualMoEConfig(num_experts=EXPERTS, router="mlp", residual="full", gate_std=1.0)
    moe = ResidualMoE(Mlp(WIDTH, 8), config)
    moe(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moe.gate.parameters())
    again = ResidualMoE(Mlp(WIDTH, 8), config)
    again.load_state_dict(moe.state_dict())
    assert torch.equal(again.eval()(tokens()), moe.eval()(tokens()))
    one = ResidualMoE(Mlp(WIDTH, 8), config).eval()
    one.gate.weight.data.zero_()
    torch.testing.assert_close(exact_network(one)(tokens(), one.core.act), one(tokens()))  # type: ignore[union-attr,arg-type]


@pytest.mark.parametrize("residual", ["low_rank", "full"])
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "task"])
def test_any_router_leaves_the_function(router: str, residual: str) -> None:
    core, x = Mlp(WIDTH, 2 * WIDTH), tokens().view(5, 6, WIDTH)
    more: Any = {"combine": "residual"} if router == "expert_choice" else {"top_k": 1, "expert_drop": 0.4}
    config = ResidualMoEConfig(num_experts=EXPERTS, residual=residual, router=router, **more)  # type: ignore[arg-type]
    torch.testing.assert_close(ResidualMoE(core, config)(x), core(x))


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


@pytest.mark.parametrize("combine", ["straight_through", "residual"])
def test_a_dropped_expert_is_not_chosen_for_its_bias(combine: str) -> None:
    module = gate(expert_drop=0.5, combine=combine, balance_rate=0.001)
    module.choice_bias[2] = 10.0
    for seed in range(20):
        torch.manual_seed(seed)
        assert (module(tokens()).gate_TK > 0).all()  # NaN is not, either


def test_the_share_of_dropped_experts_is_the_one_asked_for() -> None:
    torch.manual_seed(0)
    module = Gate(WIDTH, ResidualMoEConfig(num_experts=64, top_k=1, expert_drop=0.25, noise=0.0))
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
        ({"expert_drop": 0.1, "top_k": "all"}, "top_k='all' leaves none: set it to 0, or top_k to 1"),
        ({"expert_drop": 0.1}, "top_k='auto' leaves none: set it to 0, or top_k to 1"),
        ({"expert_drop": 0.1, "top_k": 1, "losses": GateLosses(load=0.1)}, "set one of them to 0"),
    ],
)
def test_what_cannot_be(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResidualMoEConfig(**config)  # type: ignore[arg-type]


@pytest.mark.parametrize("router", ["cosine", "mlp", "expert_choice"])
def test_others_than_linear_gates_are_not_calibrated(router: Any) -> None:
    with pytest.raises(UserError, match=f"calibrate sets linear gates.*'{router}'"):
        Calibration().check(ResidualMoEConfig(router=router))


# ---- experts that choose ---------------------------------------------------------------------------------------------


def choosing(spread: float = 0.0, **config: Any) -> ResidualMoE:
    """A layer whose experts choose; `spread` moves its residuals away from zero."""
    torch.manual_seed(0)
    chosen: Any = {"num_experts": EXPERTS, "router": "expert_choice", "top_k": 2, "rank": 2, "gate_std": 1.0, **config}
    moe = ResidualMoE(Mlp(WIDTH, 2 * WIDTH), ResidualMoEConfig(**chosen))
    for parameter in moe.deepspeed_moe.parameters():
        parameter.data.add_(spread * torch.randn_like(parameter))
    return moe


def test_experts_choose_by_hand() -> None:
    # Two images of two tokens, two experts: each takes one token of each image.
    module: Any = gate(router="expert_choice", num_experts=2, combine="residual")
    logits_ED = torch.tensor([[0.0, 1.0, 5.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    score_ED = logits_ED.softmax(0)
    value_KD, expert_KD = module._choose(score_ED, torch.Size([2, 2, WIDTH]))
    p = score_ED
    # Image 0: expert 0 takes token 1, expert 1 token 0. Image 1: expert 0 takes token 2, expert 1 token 3.
    torch.testing.assert_close(value_KD, torch.tensor([[p[1, 0], p[0, 1], p[0, 2], p[1, 3]], [0, 0, 0, 0]]))
    assert expert_KD[0].tolist() == [1, 0, 0, 1]


def test_a_token_has_none_to_all_of_the_experts_and_the_core_where_it_has_none() -> None:
    moe, x = choosing(0.5, top_k=1).eval(), tokens(24).view(2, 12, WIDTH)
    with collect() as records:
        y = moe(x)
    routing = records.routing[moe]
    taken_TE = routing.gate_TK > 0
    assert taken_TE.sum() == 2 * EXPERTS * 3  # ⌈1 · 12 / 4⌉ of each image for each expert
    counts = torch.zeros(2, EXPERTS)
    counts.scatter_add_(1, routing.expert_TK.reshape(2, -1), taken_TE.reshape(2, -1).float())
    assert (counts == 3).all()
    assert set(taken_TE.sum(1).tolist()) >= {0, 1, 2}
    none_T = ~taken_TE.any(1)
    torch.testing.assert_close(y.view(24, WIDTH)[none_T], moe.core(x).view(24, WIDTH)[none_T])  # type: ignore[operator]
    assert (routing.gate_TK.diff(dim=1) <= 0).all()


@settings(max_examples=30)
@given(top_k=st.integers(1, 3), tokens=st.integers(1, 9), images=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_experts_that_choose_equal_the_definition(top_k: int, tokens: int, images: int, seed: int) -> None:
    moe = choosing(0.5, top_k=top_k).double().eval()
    x = torch.randn(images, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expert_TK, gate_TK = [], []
    for image in x:  # each expert in turn goes through the tokens of an image
        p = moe.gate.logits(image).softmax(0)
        count = -(-top_k * tokens // EXPERTS)
        taken = [set(p[e].argsort(descending=True)[:count].tolist()) for e in range(EXPERTS)]
        for t in range(tokens):
            expert_TK.append([e if t in taken[e] else EXPERTS for e in range(EXPERTS)])
            gate_TK.append(p[:, t])
    chosen = torch.tensor(expert_TK), torch.stack(gate_TK)
    expected = reference(x.flatten(0, 1), *chosen, moe.theta(), moe.residuals(), moe.core.act, True)  # type: ignore[union-attr,arg-type]
    found = moe(x)
    torch.testing.assert_close(found, expected.view_as(x))
    inputs = [moe.gate.weight, *moe.deepspeed_moe.parameters()]
    grads = (torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected))
    torch.testing.assert_close(*grads)


def test_experts_that_choose_do_not_see_batchmates_nor_the_order_of_tokens() -> None:
    moe, x = choosing(0.5).eval(), tokens(36).view(3, 12, WIDTH)
    torch.testing.assert_close(moe(x)[1], moe(x[1:2])[0])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(moe(x[:, order]), moe(x)[:, order])
    torch.testing.assert_close(moe(x.view(3, 3, 4, WIDTH)), moe(x).view(3, 3, 4, WIDTH))


def test_loads_of_experts_that_choose_are_even() -> None:
    moe = choosing(0.5, noise=1.0, losses=GateLosses(importance=0.1, balance=0.1, z=0.1))
    with collect() as records:
        loss = moe(tokens(40).view(2, 20, WIDTH)).square().sum()
    (loss + records.loss()).backward()
    assert moe.gate.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    (load_E,) = records.loads().values()
    torch.testing.assert_close(load_E, torch.full((EXPERTS,), 0.5))
    (sums,) = records.sums.values()
    assert sums.first_E.sum() == 40


def test_experts_that_choose_are_the_same_when_run_again() -> None:
    results = []
    for again in (False, True):
        moe = choosing(0.5, noise=1.0, recompute=again)
        x = tokens(24).view(2, 12, WIDTH).requires_grad_()
        torch.manual_seed(1)
        with collect() as records:
            y = checkpoint(moe, x, use_reentrant=False) if again else moe(x)
        (y.square().sum() + records.loss()).backward()
        results.append([y, x.grad, *(p.grad for p in moe.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results)


def test_experts_that_choose_are_no_one_network() -> None:
    moe = choosing(0.5)
    moe.gate.weight.data.zero_()
    with pytest.raises(UserError, match="which no one network does"):
        exact_network(moe)


@pytest.mark.slow
def test_experts_that_choose_can_be_exported() -> None:
    moe, x = choosing(0.5).eval(), tokens(24).view(2, 12, WIDTH)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(moe, (x,), dynamic_shapes=({0: batch},)).module()
    for images in (x, tokens(60).view(5, 12, WIDTH), x[:1]):
        torch.testing.assert_close(program(images), moe(images))


def test_tokens_of_no_image_are_refused() -> None:
    with pytest.raises(UserError, match=r"router='expert_choice' got an input of shape \(12, 5\).*router='linear'"):
        choosing()(tokens(12))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"capacity_factor": 1.0}, "and capacity_factor has no meaning there: leave it out"),
        ({"expert_drop": 0.1}, "expert_drop has no meaning"),
        ({"balance_rate": 0.001}, "balance_rate has no meaning"),
        ({"gate_input": "image"}, "gate_input has no meaning"),
        ({"losses": GateLosses(load=0.1)}, "losses.load has no meaning"),
        ({"top_k": "all"}, "top_k is all of 4: set top_k lower"),
        ({"residual": "full"}, "combine is 'straight_through', exchange 'auto': use combine='residual'"),
        ({"exchange": "tokens", "top_k": 1}, "exchange 'tokens': use combine='residual' and exchange='weights'"),
    ],
)
def test_what_experts_that_choose_do_not_go_with(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choosing(**config)


def test_residuals_that_experts_choose_travel_as_weights() -> None:
    config: Any = {"num_experts": 4, "residual": "full", "combine": "residual", "top_k": 1}
    assert ResidualMoEConfig(**config).sends_tokens
    assert not ResidualMoEConfig(**config, router="expert_choice").sends_tokens
