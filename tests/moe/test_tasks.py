"""Gates that know several tasks, and what experts tell of tasks."""

from __future__ import annotations

import itertools
import math
import threading

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rmoe
from rmoe.config import Calibration, GateLosses, ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.gate import Gate
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect
from rmoe.moe.routers import ROUTERS
from rmoe.moe.tasks import current_task, task_information

WIDTH = 4


def gate(**config: object) -> Gate:
    torch.manual_seed(0)
    chosen = ResidualMoEConfig(**{"num_experts": 3, "top_k": 1, "noise": 0.0, "tasks": 2, **config})  # type: ignore[arg-type]
    return ROUTERS[chosen.router](WIDTH, chosen)


def layer(**config: object) -> ResidualMoE:
    """A mixture whose gate is sure, whose experts differ, and whose tasks prefer others."""
    torch.manual_seed(0)
    made = ResidualMoE(
        Mlp(WIDTH, 8), ResidualMoEConfig(**{"num_experts": 3, "top_k": 1, "tasks": 2, "rank": 2, "noise": 0.0} | config)
    )
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def tokens(count: int = 30, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


# ---- the mutual information ------------------------------------------------------------------------------------------


def test_information_by_hand() -> None:
    """Tasks that use experts alike tell nothing; two tasks with experts of their own tell one bit."""
    assert task_information(torch.tensor([[0.5, 0.5], [0.5, 0.5]])).item() == pytest.approx(0, abs=1e-7)
    assert task_information(torch.eye(2)).item() == pytest.approx(math.log(2))
    # P(e) = (3/4, 1/4): its entropy, less half that of the second task, (1/2, 1/2)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) - 0.5 * math.log(2)
    assert task_information(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).item() == pytest.approx(expected)


def test_information_is_that_of_the_joint_distribution() -> None:
    """Σ P(m, e) log (P(m, e) / P(m) P(e)), in float64, for several layers at once, in value and gradient."""
    share_LME = torch.rand(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    share_LME.requires_grad_()

    def plain(share_ME: Tensor) -> Tensor:
        joint = share_ME / 3
        m, e = joint.sum(1), joint.sum(0)
        pairs = itertools.product(range(3), range(5))
        return sum((joint[i, j] * (joint[i, j] / (m[i] * e[j])).log() for i, j in pairs), torch.zeros(()))

    found, expected = task_information(share_LME), torch.stack([plain(one) for one in share_LME])
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(x.sum(), share_LME, retain_graph=True)[0] for x in (found, expected)]
    # The reference lets P(m) = Σ_e P(m, e) move, which is 1/M: gradients agree along what keeps the sums.
    inside = [grad - grad.mean(-1, keepdim=True) for grad in grads]
    torch.testing.assert_close(*inside)


def test_information_has_a_finite_gradient_where_no_token_goes() -> None:
    share = torch.eye(2, requires_grad=True)
    (grad,) = torch.autograd.grad(task_information(share), share)
    assert grad.isfinite().all()


def test_the_loss_of_a_layer_is_its_weight_times_the_information() -> None:
    """Every task counts alike, whatever its number of tokens and however its passes are split."""
    moe = layer(losses=GateLosses(importance=0.0, task_information=0.5)).double().train()
    x = {0: tokens(10).double(), 1: tokens(40, 2).double()}
    with collect() as records:
        for number, part in ((0, x[0]), (1, x[1][:15]), (1, x[1][15:])):
            with rmoe.task(number):
                moe(part)
    shares = []
    for number in x:
        logits = x[number] @ moe.gate.weight.T + moe.gate.bias + moe.gate.task_bias[number]
        shares.append(logits.softmax(-1).mean(0))
    expected = -0.5 * task_information(torch.stack(shares))
    torch.testing.assert_close(records.loss(), expected)
    torch.testing.assert_close(-0.5 * records.information()[moe], expected)
    own = [moe.gate.weight, moe.gate.bias, moe.gate.task_bias]
    torch.testing.assert_close(
        torch.autograd.grad(records.loss(), own, retain_graph=True), torch.autograd.grad(expected, own)
    )


def test_the_other_losses_are_over_all_tasks() -> None:
    moe, plain = (
        layer(losses={"importance": 1.0, "z": 0.1}).train(),
        layer(losses={"importance": 1.0, "z": 0.1}, tasks=1),
    )
    with torch.no_grad():
        moe.gate.task_bias.zero_()
    plain.load_state_dict({key: x for key, x in moe.state_dict().items() if "task_bias" not in key})
    x = tokens(30)
    with collect() as records:
        for number, part in enumerate(x.split((10, 20))):
            with rmoe.task(number):
                moe(part)
    with collect() as expected:
        plain.train()(x)
    torch.testing.assert_close(records.loss(), expected.loss())
    torch.testing.assert_close(records.loads()[moe], expected.loads()[plain])
    for number, size in enumerate((10, 20)):
        with collect() as alone:
            plain(x[:10] if number == 0 else x[10:])
        assert alone.sums[plain, 0].tokens == size
        torch.testing.assert_close(records.loads(number)[moe], alone.loads()[plain])
        torch.testing.assert_close(records.balance(number)[moe], alone.balance()[plain])


# ---- gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ["linear", "cosine"])
def test_each_task_has_a_bias_of_its_own(router: str) -> None:
    module, x = gate(router=router, temperature=2.0), tokens()
    plain = gate(router=router, temperature=2.0, tasks=1)
    assert not module.task_bias.any()
    torch.nn.init.normal_(module.task_bias)
    for number in (0, 1):
        with torch.no_grad(), rmoe.task(number):
            plain.bias.copy_(module.bias + module.task_bias[number])
            torch.testing.assert_close(module(x), plain(x))


def test_a_task_gate_sends_each_task_to_its_expert() -> None:
    """One core, one set of residuals for each task: y = FFN(x; θ0 + Δ_t), and only Δ_t has a gradient."""
    moe, x = layer(num_experts=2, router="task", residual="full").train(), tokens()
    assert not any(parameter.requires_grad for parameter in moe.gate.parameters())
    for number in (0, 1):
        with rmoe.task(number), collect() as records:
            found = moe(x)
        assert (records.routing[moe].expert_TK == number).all()
        assert (records.routing[moe].gate_TK == 1).all()
        assert records.loss() == 0
        core, delta = moe.theta(), moe.residuals().delta(number)
        hidden = nn.functional.gelu(x @ (core.w1_HC + delta.w1_HC).T + core.b1_H + delta.b1_H)
        torch.testing.assert_close(found, hidden @ (core.w2_CH + delta.w2_CH).T + core.b2_C + delta.b2_C)
        grads = torch.autograd.grad(found.square().sum(), [*moe.deepspeed_moe.parameters()])
        assert all(grad[number].any() and not grad[1 - number].any() for grad in grads)


@pytest.mark.parametrize("how", ["layer", "thread"])
def test_recomputing_layers_know_their_task(how: str) -> None:
    """Activation checkpointing runs a layer again in backward, outside of the task; the gradients are those without."""
    moe = layer(residual="full").train()
    with torch.no_grad():
        moe.gate.task_bias.copy_(torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]))
    gradients = []
    for recomputes in (False, True):
        x = tokens().requires_grad_()
        parts = []
        for number in (0, 1):
            with rmoe.task(number):
                parts.append(checkpoint(moe, 2 * x, use_reentrant=False) if recomputes else moe(2 * x))
        total = parts[0].square().sum() + 3 * parts[1].square().sum() + (parts[0] * parts[1]).sum()
        found: list[Tensor] = []
        own = [x, *(parameter for parameter in moe.parameters() if parameter.requires_grad)]

        def backward(total: Tensor = total, own: list[Tensor] = own, found: list[Tensor] = found) -> None:
            found += torch.autograd.grad(total, own)

        if how == "thread":
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
        else:
            backward()
        gradients.append(found)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    assert current_task() is None


def test_a_pass_of_no_task_is_refused() -> None:
    module = gate()
    with pytest.raises(UserError, match=r"ran in a forward pass of no task: run the model inside of rmoe.task\(N\)"):
        module(tokens())
    with rmoe.task(2), pytest.raises(UserError, match="of the task 2: .* N from 0 to 1"):
        module(tokens())
    with pytest.raises(UserError, match="the task is -1"), rmoe.task(-1):
        pass


def test_a_checkpoint_of_one_task_is_one_whose_tasks_are_alike() -> None:
    module, plain = gate(), gate(tasks=1)
    torch.nn.init.normal_(module.task_bias)
    with pytest.warns(UserWarning, match="task_bias: read as zeros"):
        module.load_state_dict(plain.state_dict())
    assert not module.task_bias.any()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"losses": {"task_information": 0.1}}, "for a mixture of several tasks"),
        ({"losses": {"task_information": -0.1}, "tasks": 2}, "0 .off. or positive"),
        ({"tasks": 0}, "tasks is 0"),
        ({"tasks": True}, "takes a whole number"),
        ({"router": "task"}, "set num_experts to tasks, at least 2"),
        ({"router": "task", "tasks": 3, "num_experts": 4}, "tasks is 3, num_experts 4 and top_k auto"),
        ({"router": "task", "tasks": 3, "num_experts": 3, "top_k": 2}, "top_k to 1"),
        ({"router": "task", "tasks": 3, "num_experts": 3, "balance_rate": 0.1}, "learns and balances nothing"),
        ({"router": "task", "tasks": 3, "num_experts": 3, "losses": {"task_information": 1.0}}, "learns and balances"),
    ],
)
def test_keys_that_contradict_each_other(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ResidualMoEConfig.from_dict(wrong)


def test_a_task_gate_is_not_calibrated() -> None:
    with pytest.raises(UserError, match="router is 'task'"):
        Calibration().check(ResidualMoEConfig(num_experts=2, tasks=2, router="task"))
