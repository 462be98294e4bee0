"""What a mixture is and does: weights factored, movement, load; and which expert each token went to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import segmentor
from timm.layers import Mlp
from torch import nn

import rmoe
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.state import moe_layers
from rmoe.reporting.analysis import (
    effective_rank,
    load_statistics,
    matched_share,
    movement,
    routing_maps,
    weight_statistics,
)

SWIN = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4}
CVT = {"embed_dims": (8, 8, 12), "depths": (1, 2, 2), "num_heads": (1, 1, 2)}
VIT = {"embed_dim": 12, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "kwargs", "out", "grids"),
    [
        ("swin_tiny_patch4_window7_224", SWIN, (0, 1, 2, 3), [(4, 5), (2, 3)]),
        ("vit_tiny_patch16_224", VIT, (0, 1), [(4, 5)]),  # the class token is no part of the map
        ("cvt_13", CVT, (0, 1, 2), [(8, 10), (4, 5)]),  # here the last stage alone has one
    ],
)
def test_maps_are_on_the_grids_of_their_layers(model, kwargs, out, grids):
    pyramid = TimmPyramid(model, kwargs, out, moe={"num_experts": 3}, allow_random_core=True).eval()
    maps = routing_maps(pyramid, lambda: pyramid(torch.randn(1, 3, 64, 80)))
    assert [one.expert_hw.shape for one in maps.values()] == grids
    assert [f"model.{name}" for name in maps] == list(moe_layers(pyramid))
    assert all(one.expert_hw.min() >= 0 and one.expert_hw.max() < 3 for one in maps.values())


@pytest.mark.parametrize(
    ("model", "kwargs", "size", "grids"),
    [
        ("vit_small_patch14_dinov2", {**VIT, "img_size": 28}, (70, 112), {(5, 8)}),
        ("vit_small_patch14_dinov2", {**VIT, "img_size": 28}, (64, 100), {(5, 8)}),  # padded to the patches
        (
            "swin_tiny_patch4_window7_224",
            {**SWIN, "depths": (1, 1, 1, 1)},
            (65, 79),
            {(17, 20), (9, 10), (5, 5), (3, 3)},
        ),
    ],
)
def test_maps_know_their_grids_at_any_stride_and_size(model, kwargs, size, grids):
    out = (0, 1) if "vit" in model else (0, 1, 2, 3)
    pyramid = TimmPyramid(model, kwargs, out, moe={"blocks": "all"}, allow_random_core=True).eval()
    maps = routing_maps(pyramid, lambda: pyramid(torch.randn(1, 3, *size)), size)
    assert {one.expert_hw.shape for one in maps.values()} == grids


def test_what_a_batch_pads_an_image_by_is_no_part_of_its_map():
    pyramid = TimmPyramid("vit_tiny_patch16_224", VIT, (0, 1), moe={"blocks": "all"}, allow_random_core=True).eval()
    found = next(iter(routing_maps(pyramid, lambda: pyramid(torch.randn(1, 3, 128, 128)), (100, 50)).values()))
    assert (found.expert_hw.shape, found.cell) == ((7, 4), (0.16, 0.32))
    assert found.probability_hwE.shape == (7, 4, 8)


def test_a_sliding_window_is_left_out_for_maps(tmp_path):
    window = {"mode": "slide", "crop_size": (32, 32), "stride": (16, 16)}
    run = rmoe.load(segmentor(tmp_path / "run", "swin", test_cfg=window), device="cpu")
    batch = run.inputs.collate([run.item(np.zeros((64, 96, 3), np.uint8))])
    maps = routing_maps(run.model, lambda: run.run(batch), (64, 96))
    assert {one.expert_hw.shape for one in maps.values()} == {(16, 24), (8, 12)}
    assert run.model.test_cfg.mode == "slide"


def test_tokens_on_an_unknown_grid_are_refused():
    net = Net()
    with pytest.raises(UserError, match="mlp has 8 tokens, and neither"):
        routing_maps(net, lambda: net(torch.zeros(8, 6)))


def test_a_token_that_no_expert_takes_has_none():
    net = Net(router="expert_choice", top_k=1)
    image = Picture([0] * 8, [0] * 8)  # each of the four experts takes two of the eight, and the same
    (found,) = routing_maps(net, lambda: image.answer(net)).values()
    assert sorted(found.expert_hw.ravel().tolist())[-6:] == [4] * 6
    (load,) = load_statistics(net, [image], ["sky"]).values()
    assert (load.none, sum(load.load)) == (0.75, 0.25)
    assert sum(load.by_class["sky"]) == 2


def test_a_token_is_where_it_was_in_the_image():
    """Two halves of an image that look different go to two experts, if the gate is made to tell them apart."""
    torch.manual_seed(0)
    pyramid = TimmPyramid(
        "vit_tiny_patch16_224",
        {**VIT, "class_token": False, "global_pool": "avg"},
        (0, 1),
        moe={},
        allow_random_core=True,
    )
    (layer,) = moe_layers(pyramid.eval()).values()
    image = torch.zeros(1, 3, 64, 96)
    image[..., 64:] = 5  # the right third: two columns of six
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    pyramid(image)
    hook.remove()
    left, right = seen[0].reshape(4, 6, -1)[2, 1], seen[0].reshape(4, 6, -1)[2, 5]
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.weight[3], layer.gate.weight[5] = left - right, right - left
    expert_hw = next(iter(routing_maps(pyramid, lambda: pyramid(image)).values())).expert_hw
    assert np.unique(expert_hw[:, :4]).tolist() == [3]
    assert np.unique(expert_hw[:, 4:]).tolist() == [5]


def test_a_dense_model_has_none():
    dense = TimmPyramid("vit_tiny_patch16_224", VIT, (0, 1))
    with pytest.raises(UserError, match="the model is dense"):
        routing_maps(dense, lambda: None)


class Net(nn.Module):
    """One layer of four experts, whose name in a run's model would be `model.mlp`; a token's first entries route it."""

    def __init__(self, **moe: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.mlp = ResidualMoE(Mlp(6, 12), ResidualMoEConfig(num_experts=4, rank=2, **moe))
        self.model.mlp.gate.weight.data = 50 * torch.eye(4, 6)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.mlp(x)

    def spread(self, common: float = 0.0, own: float = 0.0) -> Net:
        """Adds the same to all experts, and noise of mean zero over them."""
        for x in self.model.mlp.residuals():
            noise = torch.randn_like(x)
            x.data += common * torch.randn_like(x[:1]) + own * (noise - noise.mean(0))
        return self


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


class Picture:
    """2 × 4 pixels and as many tokens, each of which goes to the expert `to` says."""

    def __init__(self, to: list[int], labels: list[int]) -> None:
        self.tokens, self.labels = torch.eye(6)[to].view(1, 2, 4, 6), np.array(labels).reshape(2, 4)

    def answer(self, model: nn.Module) -> object:
        return model(self.tokens)

    @property
    def shape(self) -> tuple[int, int]:
        return (8, 16)  # of stride 4


@pytest.mark.parametrize("top_k", [1, "all"])
def test_load_by_hand(top_k):
    halves = Picture([0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 1, -1])
    (found,) = load_statistics(Net(top_k=top_k), [halves], ["sky", "grass", "sea"]).values()
    assert found.load == [0.5, 0.5, 0, 0]
    assert found.load_entropy == pytest.approx(0.5)
    assert found.gate_entropy == pytest.approx(0, abs=1e-6)
    assert found.by_class == {"sky": [4, 0, 0, 0], "grass": [0, 3, 0, 0]}
    assert found.information == pytest.approx(1)
    blind = Picture([0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0, 1, 1])
    (found,) = load_statistics(Net(top_k=top_k), [blind], ["sky", "grass", "sea"]).values()
    assert found.information == pytest.approx(0, abs=1e-9)
