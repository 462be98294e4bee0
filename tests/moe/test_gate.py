from __future__ import annotations

import math

import pytest
import torch
from no_sync import Waits, no_sync
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rmoe.config import GateLosses, ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.gate import Gate, Routing, absent_of_gates, drop_over_capacity
from rmoe.moe.gate_losses import GateSums, gate_balance, gate_loss


def gate(**config: object) -> Gate:
    """A gate of three experts for tokens of three features that are the logits."""
    module = Gate(3, ResidualMoEConfig(**{"num_experts": 3, "top_k": 1, "noise": 0.0, **config}))  # type: ignore[arg-type]
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
    module = gate(noise=5.0, top_k=2)
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

    def function(x_TC: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)  # the same noise each time
        routing = torch.func.functional_call(module, {"weight": weight, "bias": bias}, x_TC)
        return routing.gate_TK, routing.sums.probability_E, routing.sums.z

    inputs = [t.detach().double().requires_grad_() for t in (LOGITS + 0.1, module.weight, module.bias)]
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


def test_losses_of_several_gates_at_once_are_those_of_each_in_value_and_gradient() -> None:
    weights = GateLosses(importance=0.5, load=0.4, balance=0.3, z=0.2)
    each = []
    for seed in range(3):
        torch.manual_seed(seed)
        x_E = [torch.rand(4, dtype=torch.float64) + 0.1 for _ in range(4)]
        each.append(GateSums(*x_E, *(torch.rand((), dtype=torch.float64) + 1 for _ in range(3))))
    inputs = [part.requires_grad_() for sums in each for part in (sums.probability_E, sums.load_E, sums.z)]

    def plain(sums: GateSums) -> Tensor:
        importance, load = (x_E.var(correction=0) / x_E.mean().square() for x_E in (sums.probability_E, sums.load_E))
        balance = 4 * (sums.probability_E * sums.first_E).sum() / sums.tokens**2
        return 0.5 * importance + 0.4 * load + 0.3 * balance + 0.2 * sums.z / sums.tokens

    together = gate_loss(GateSums(*map(torch.stack, zip(*each, strict=True))), weights)
    expected = torch.stack([plain(sums) for sums in each])
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(torch.stack([gate_loss(sums, weights) for sums in each]), expected)
    scale = torch.tensor([1.0, -2.0, 3.0])
    found, exact = (torch.autograd.grad((scale * losses).sum(), inputs) for losses in (together, expected))
    torch.testing.assert_close(found, exact)


def test_sums_of_a_batch_in_training() -> None:
    module = gate(losses=GateLosses(importance=1.0, balance=1.0, z=1.0))
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


# ---- bias, temperature, all experts ----------------------------------------------------------------------------------


def test_bias_and_temperature_by_hand() -> None:
    module = gate(temperature=2.0, top_k="all")
    with torch.no_grad():
        module.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    torch.testing.assert_close(module(LOGITS).gate_TK, ((LOGITS + module.bias) / 2).softmax(-1))


@pytest.mark.parametrize("combine", ["residual", "straight_through", "softmax"])
@pytest.mark.parametrize("top_k", ["all", 3])
def test_all_experts_are_weighed_by_their_probabilities(combine: str, top_k: int | str) -> None:
    module = gate(top_k=top_k, combine=combine, noise=5.0)
    state = torch.get_rng_state()
    routing = module(LOGITS)
    assert torch.equal(torch.get_rng_state(), state), "noise was drawn"
    assert routing.expert_TK.tolist() == [[0, 1, 2]] * 3
    torch.testing.assert_close(routing.gate_TK, LOGITS.softmax(-1))
    (grad,) = torch.autograd.grad(routing.gate_TK[0, 0], module.bias)
    p = LOGITS[0].softmax(-1)
    torch.testing.assert_close(grad, p[0] * (torch.eye(3)[0] - p))


def test_all_experts_are_counted_by_their_probabilities() -> None:
    sums = gate(top_k="all", losses=GateLosses(balance=1.0))(LOGITS).sums
    assert sums.chosen_E.tolist() == [3, 3, 3]
    assert sums.first_E.tolist() == [1, 1, 1]
    share = LOGITS.softmax(-1).mean(0)
    torch.testing.assert_close(gate_balance(sums).largest_share, share.max())


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": "all", "capacity_factor": 1.5},
        {"top_k": "all", "balance_rate": 0.1},
        {"top_k": "all", "losses": {"load": 1.0}},
        {"balance_rate": 0.1, "losses": {"load": 1.0}},
    ],
)
def test_keys_that_contradict_each_other(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match="set"):
        ResidualMoEConfig.from_dict({"noise": 1.0, **wrong})


# ---- images ----------------------------------------------------------------------------------------------------------

PIXELS = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))  # two images of six tokens


@pytest.mark.parametrize("k", [1, 2, "all"])
def test_tokens_of_an_image_share_a_decision(k: int | str) -> None:
    config = {"top_k": k, "losses": GateLosses(importance=1.0, balance=1.0, z=1.0)}
    routing = gate(gate_input="image", **config)(PIXELS)
    means = gate(**config)(PIXELS.mean((1, 2)))
    for image, of_image in zip(routing[:3], means[:3], strict=True):
        assert torch.equal(image, of_image.repeat_interleave(6, 0))
    for found, expected in zip(routing.sums, means.sums, strict=True):
        torch.testing.assert_close(found, 6 * expected)


def test_an_image_does_not_depend_on_its_batchmates_nor_on_the_order_of_its_tokens() -> None:
    module = gate(gate_input="image").eval()
    torch.testing.assert_close(module(PIXELS)[2][:6], module(PIXELS[:1])[2])
    shuffled = PIXELS.flatten(1, 2)[:, torch.tensor([3, 0, 5, 1, 2, 4])]
    torch.testing.assert_close(module(shuffled)[2], module(PIXELS)[2])


def test_the_gate_of_images_has_a_gradient_from_every_token() -> None:
    module, x = gate(gate_input="image"), PIXELS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(module(x).gate_TK.sum(), x)
    torch.testing.assert_close(grad, grad.mean((1, 2), keepdim=True).expand_as(grad))
    assert grad.abs().min() > 0


def test_tokens_without_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"shape \(3, 3\).*gate_input='token'"):
        gate(gate_input="image")(LOGITS)


def test_capacity_of_images() -> None:
    module = gate(gate_input="image", capacity_factor=0.5)
    expert_TK = module(PIXELS[:1].repeat(4, 1, 1, 1)).expert_TK.view(4, 6)
    assert (expert_TK == expert_TK[:, :1]).all()
    assert (expert_TK[:, 0] == 3).sum() == 3


# ---- balance by bias -------------------------------------------------------------------------------------------------


def test_the_bias_moves_against_the_imbalance_by_hand() -> None:
    module = gate(balance_rate=0.25)
    module.balance(torch.tensor([4.0, 1.0, 1.0]), step=True)
    assert module.choice_bias.tolist() == [-0.25, 0.25, 0.25]
    module.balance(torch.tensor([4.0, 1.0, 1.0]), step=False)
    module.balance(torch.tensor([0.0, 4.0, 2.0]), step=True)  # 4, 5, 3 in both parts together
    assert module.choice_bias.tolist() == [-0.25, 0.0, 0.5]


@pytest.mark.parametrize("k", [1, 2])
def test_the_bias_enters_the_choice_alone(k: int) -> None:
    module = gate(balance_rate=0.1, top_k=k, combine="residual")
    module.choice_bias += torch.tensor([0.0, 0.0, 2.0])
    routing = module(LOGITS)
    assert (routing.expert_TK[:, 0] == 2).all()
    p = LOGITS.softmax(-1)
    torch.testing.assert_close(routing.gate_TK, p.gather(-1, routing.expert_TK))
    torch.testing.assert_close(routing.probability_TE, p)
    assert torch.equal(module.eval()(LOGITS).expert_TK, routing.expert_TK)


def test_the_bias_brings_an_uneven_gate_to_balance() -> None:
    module = gate(balance_rate=0.01)
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 0.0, 0.0])
    before = module(x).sums.chosen_E
    for _ in range(100):
        module.balance(module(x).sums.chosen_E, step=True)
    after = module(x).sums.chosen_E
    assert before.max() > 150
    assert after.max() < 110


# ---- state -----------------------------------------------------------------------------------------------------------


def test_a_state_of_before_gates_had_biases_reads_as_zeros() -> None:
    model, old = nn.ModuleDict({"gate": gate(balance_rate=0.1)}), gate(noise=1.0).state_dict()
    with torch.no_grad():
        model["gate"].bias.add_(1.0)
        model["gate"].choice_bias.add_(1.0)
    with pytest.warns(UserWarning, match="without gate.bias, gate.choice_bias: read as zeros"):
        model.load_state_dict({"gate.weight": old["weight"] + 1})
    assert not model["gate"].bias.any()
    assert not model["gate"].choice_bias.any()
    with pytest.raises(RuntimeError, match=r"Missing key.*gate\.weight.*gate\.bias"):
        model.load_state_dict({})


def test_the_choice_bias_is_saved_and_nothing_to_a_gate_without_balance() -> None:
    module = gate(balance_rate=0.1)
    module.balance(torch.tensor([4.0, 1.0, 1.0]), step=True)
    again = gate(balance_rate=0.2)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.choice_bias, module.choice_bias)
    assert set(gate().state_dict()) == {"weight", "bias"}
    with pytest.raises(RuntimeError, match="Unexpected key.*choice_bias"):
        gate().load_state_dict(module.state_dict())


# ---- nothing waits for the device ------------------------------------------------------------------------------------

LOSSES = GateLosses(importance=1.0, balance=1.0, z=1.0)
GATES = {
    "one": {},
    "two": {"top_k": 2},
    "all": {"top_k": "all"},
    "load": {"losses": GateLosses(load=1.0), "noise": 1.0, "top_k": 2},
    "capacity": {"capacity_factor": 0.5},
    "capacity_two": {"capacity_factor": 0.5, "top_k": 2},
    "balance": {"balance_rate": 0.1, "top_k": 2},
    "image": {"gate_input": "image", "temperature": 0.5},
    "straight_through": {"combine": "straight_through", "noise": 1.0},
}


def everything(module: Gate, x: Tensor) -> Routing:
    """Runs what a training step asks of a gate."""
    routing = module(x)
    (routing.gate_TK.sum() + gate_loss(routing.sums, module.config.losses)).backward()
    gate_balance(routing.sums)
    module.balance(routing.sums.chosen_E, step=True)
    return routing


@pytest.mark.parametrize("name", GATES)
def test_no_gate_waits_for_the_device(name: str) -> None:
    module = gate(**{"losses": LOSSES, **GATES[name]})
    with no_sync():
        everything(module, PIXELS)


@pytest.mark.parametrize("name", GATES)
def test_no_shape_depends_on_values(name: str) -> None:
    module = gate(**{"losses": LOSSES, **GATES[name]})
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        routing = everything(module, mode.from_tensor(PIXELS))
    assert routing.expert_TK.shape == (12, module.config.experts_per_token)


def test_the_watch_for_waiting_sees_it() -> None:
    x = torch.arange(3)
    waiting = [torch.Tensor.item, torch.Tensor.nonzero, torch.Tensor.bincount, torch.unique, lambda x: x[x > 1]]
    waiting += [lambda x: x.tolist(), lambda x: bool(x.any()), lambda x: x.numpy()]
    for wait in waiting:
        with no_sync(), pytest.raises(Waits):
            wait(x[:1] if wait is torch.Tensor.item else x)
    with no_sync():
        assert x[x].shape == (3,)


def test_an_expert_out_of_reach_is_not_chosen_for_its_bias() -> None:
    module = gate(balance_rate=0.1)
    with torch.no_grad():
        module.bias.copy_(torch.tensor([200.0, 0.0, 0.0]))  # the others' probability is 0 in float32
    module.choice_bias += torch.tensor([-1.0, 0.1, 0.0])
    routing = module(LOGITS)
    assert routing.expert_TK.flatten().tolist() == [0, 0, 0]
    assert torch.equal(routing.gate_TK, torch.ones(3, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_choices_bias_keeps_its_bits_in_half_precision(dtype: torch.dtype) -> None:
    module = gate(balance_rate=0.001)
    module.choice_bias += 1
    module.to(dtype).balance(torch.tensor([4.0, 1.0, 1.0]), step=True)
    assert module.weight.dtype == dtype
    torch.testing.assert_close(module.choice_bias, torch.tensor([0.999, 1.001, 1.001]), rtol=0, atol=1e-6)
    assert module.to("meta").choice_bias.is_meta


def test_images_without_tokens_have_no_decision_to_share() -> None:
    routing = gate(gate_input="image").eval()(torch.zeros(2, 0, 3))
    assert routing.expert_TK.shape == routing.gate_TK.shape == (0, 1)


def test_a_gate_runs_without_values() -> None:
    routing = gate().to("meta")(LOGITS.to("meta"))
    assert routing.probability_TE.is_meta
    assert routing.probability_TE.shape == (3, 3)


def test_only_the_gate_of_a_mixture_may_lack_its_bias_in_a_file() -> None:
    """Attention may have a layer called gate, too, whose bias nothing stands for."""
    own = {f"{name}gate.{key}": torch.ones(2) for name in ("attn.", "mlp.", "") for key in ("weight", "bias")}
    own |= {f"{name}deepspeed_moe.experts.deepspeed_experts.0.A": torch.ones(2) for name in ("mlp.", "")}
    state = {key: x for key, x in own.items() if not key.endswith("bias")}
    assert set(absent_of_gates(state, own)) == {"mlp.gate.bias", "gate.bias"}
    assert set(absent_of_gates({"weight": torch.ones(2)}, {"weight": torch.ones(2), "bias": torch.ones(2)})) == {"bias"}
