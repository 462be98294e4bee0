"""Tests the neck behind a simple feature pyramid: its values by hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rmoe.backbones.level_convs import LevelConvs
from rmoe.errors import UserError


def test_each_map_for_itself_and_the_added_ones_are_every_other_cell():
    """Computes one level with convolutions whose only weight is in the middle, and norms by hand."""
    torch.manual_seed(0)
    neck = LevelConvs([2, 3], 4, 4)
    maps = [torch.randn(1, 2, 6, 10), torch.randn(1, 3, 3, 5)]
    with torch.no_grad():
        for level in neck.levels:
            level[2].weight[:] = 0
            level[2].weight[..., 1, 1] = torch.eye(4)
    found = neck(maps)
    for ours, level, given in zip(found, neck.levels, maps, strict=False):
        mixed = torch.einsum("bchw,oc->bohw", given, level[0].weight[..., 0, 0])
        once = nn.functional.layer_norm(mixed.movedim(1, -1), (4,), eps=level[1].eps)
        twice = nn.functional.layer_norm(once, (4,), eps=level[3].eps)
        torch.testing.assert_close(ours, twice.movedim(-1, 1))
    assert [tuple(x.shape) for x in found] == [(1, 4, 6, 10), (1, 4, 3, 5), (1, 4, 2, 3), (1, 4, 1, 2)]
    assert torch.equal(found[2], found[1][..., ::2, ::2])
    assert torch.equal(found[3], found[2][..., ::2, ::2])


def test_maps_do_not_see_one_another():
    neck = LevelConvs([2, 3], 4, 3)
    maps = [torch.randn(1, 2, 6, 10), torch.randn(1, 3, 3, 5)]
    before, after = neck(maps), neck([maps[0], maps[1] + 1])
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    "arguments",
    [
        ([], 4, 2),
        ([2, 3], 4, 1),
        ([2, "3"], 4, 2),
        (2, 4, 2),
        ([2, 0], 4, 2),
        ([2], 4.0, 2),
        (None, 4, 2),
        ([2], 4, True),
    ],
)
def test_what_is_refused(arguments):
    with pytest.raises(UserError, match="LevelConvs has in_channels=.*; give the channels of each map"):
        LevelConvs(*arguments)
