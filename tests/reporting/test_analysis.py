"""What tokens' experts tell of classes, and how even their load is; by hand."""

from __future__ import annotations

import pytest
import torch
from one_mixture import Net, Picture

from rmoe.reporting.analysis import load_statistics
from rmoe.reporting.routing import routing_maps


def test_a_token_that_no_expert_takes_has_none():
    net = Net(router="expert_choice", top_k=1)
    image = Picture([0] * 8, [0] * 8)  # each of the four experts takes two of the eight, and the same
    (found,) = routing_maps(net, lambda: image.answer(net)).values()
    assert sorted(found.expert_hw.ravel().tolist())[-6:] == [4] * 6
    (load,) = load_statistics(net, [image], ["sky"]).values()
    assert (load.none, sum(load.load)) == (0.75, 0.25)
    assert sum(load.by_class["sky"]) == 2


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


def test_every_token_counts_alike_whatever_the_size_of_its_image():
    net = Net(top_k=1)
    sure, unsure = Picture([0] * 8, [0] * 8), Picture([0] * 2, [0] * 2)
    unsure.tokens = torch.zeros_like(unsure.tokens)  # the gate is as likely to take any expert
    (found,) = load_statistics(net, [sure, unsure], ["sky"]).values()
    assert found.gate_entropy == pytest.approx(2 / 10, abs=1e-6)
