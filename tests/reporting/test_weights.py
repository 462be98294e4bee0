"""What the experts of a mixture are, in numbers: weights factored, and what moved them."""

from __future__ import annotations

import pytest
import torch
from one_mixture import Net
from timm.layers import Mlp
from torch import nn

from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE
from rmoe.reporting.weights import effective_rank, matched_share, movement, weight_statistics


def test_effective_rank_by_hand():
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.ones(4, 7)) == pytest.approx(1, abs=1e-4)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 3**0.75)
    assert effective_rank(torch.zeros(2, 3)) == 0


def test_low_rank_residuals_in_numbers():
    net = Net().spread(own=1.0)
    (found,) = weight_statistics(net).values()
    layer = net.model.mlp
    deltas = [layer.residuals().delta(e) for e in range(4)]
    norms = [(d.w1_HC.square().sum() + d.w2_CH.square().sum()).sqrt().item() for d in deltas]
    assert found.residual_norm == pytest.approx(norms, rel=1e-5)
    core = layer.core.fc1.weight.square().sum() + layer.core.fc2.weight.square().sum()
    assert found.core_norm == pytest.approx(core.sqrt().item(), rel=1e-5)
    assert all(0 < rank <= 2 for ranks in found.effective_rank.values() for rank in ranks)
    thetas = torch.stack(
        [
            torch.cat([(layer.core.fc1.weight + d.w1_HC).flatten(), (layer.core.fc2.weight + d.w2_CH).flatten()])
            for d in deltas
        ]
    )
    assert found.cosine_experts[0][1] == pytest.approx(
        torch.cosine_similarity(thetas[0], thetas[1], dim=0).item(), rel=1e-4
    )
    assert found.cosine_residuals[2][2] == pytest.approx(1)


def test_at_the_start_residuals_are_nothing():
    (found,) = weight_statistics(Net()).values()
    assert found.residual_norm == [0.0] * 4
    assert found.cosine_residuals == [[0.0] * 4] * 4
    assert found.cosine_experts[0][3] == pytest.approx(1)
    assert found.effective_rank == {"w1": [0.0] * 4, "w2": [0.0] * 4}


def test_experts_of_their_own_are_mean_and_rest():
    net = Net(residual="experts", expert_init="core")
    (copied,) = weight_statistics(net).values()
    assert copied.residual_norm == pytest.approx([0.0] * 4, abs=1e-6)
    (moved,) = weight_statistics(net.spread(own=0.1)).values()
    assert moved.core_norm == pytest.approx(copied.core_norm, rel=1e-5)  # noise of mean zero
    assert min(moved.residual_norm) > 0.1


def test_the_order_of_hidden_units_does_not_hide_that_experts_are_alike():
    torch.manual_seed(0)
    net = Net(residual="experts", expert_init="core")
    (copied,) = weight_statistics(net).values()
    assert copied.matched == pytest.approx(1)
    w1_EHC, b1_EH, w2_ECH, _ = net.model.mlp.residuals()
    for e in range(4):
        order = torch.randperm(12)
        w1_EHC.data[e], b1_EH.data[e], w2_ECH.data[e] = w1_EHC[e, order], b1_EH[e, order], w2_ECH[e][:, order]
    (shuffled,) = weight_statistics(net).values()
    assert shuffled.core_norm < 0.8 * copied.core_norm
    assert shuffled.matched == pytest.approx(1)
    assert shuffled.by_chance < 0.9


def test_unlike_experts_are_no_more_alike_than_by_chance():
    (found,) = weight_statistics(Net(residual="experts", expert_init="random")).values()
    assert 1 / 4 < found.matched == pytest.approx(found.by_chance, abs=0.15)
    # All units of all experts in a plane: any order agrees well, and chance knows.
    layer = Net(residual="experts").model.mlp
    for x in (layer.residuals()[0].data, layer.residuals()[2].data.mT):
        x.copy_(torch.randn(4, 12, 2) @ torch.eye(2, 6))
    flat = nn.Module()
    flat.model = layer
    (found,) = weight_statistics(flat).values()
    assert 0.55 < found.by_chance == pytest.approx(found.matched, abs=0.1)
    assert matched_share(torch.eye(2)[:, None]) == 1 / 2  # two experts of one unit each, at right angles


def test_residuals_have_the_order_of_their_core():
    (found,) = weight_statistics(Net().spread(own=1.0)).values()
    assert found.matched is None


@pytest.mark.parametrize(("common", "own", "shared"), [(0.1, 0.0, 1.0), (0.0, 0.1, 0.0), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("kind", ["full", "experts"])
def test_what_moved_is_common_or_not(kind, common, own, shared):
    (found,) = movement(Net(residual=kind), Net(residual=kind).spread(common, own)).values()
    assert found.shared == pytest.approx(shared, abs=1e-6)
    assert (min(found.experts) > 0) == bool(common or own)
    # Experts of their own have a core only as their mean, which then moves; a frozen one does not.
    assert (found.core > 1e-6) == bool(kind == "experts" and common)


def test_other_experts_cannot_be_compared():
    few = Net()
    few.model.mlp = ResidualMoE(Mlp(6, 12), ResidualMoEConfig(num_experts=2))
    with pytest.raises(UserError, match="have other experts"):
        movement(Net(), few)
