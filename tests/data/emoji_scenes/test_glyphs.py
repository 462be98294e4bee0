from __future__ import annotations

import numpy as np
import pytest

from rmoe.data.emoji_scenes.dice import Dice
from rmoe.data.emoji_scenes.emoji import stamp
from rmoe.data.emoji_scenes.glyphs import DISTRACTORS, THINGS, UPSTREAM, class_name
from rmoe.data.emoji_scenes.textures import STUFF, colour_matrix, recolour, texture

OF_THINGS = "".join(thing.glyphs for thing in THINGS)


def picture(char: str) -> np.ndarray:
    """Returns the glyph on grey, float [38, 38, 3]."""
    patch = stamp(char, size=24).astype(float)
    return patch[..., :3] + (255 - patch[..., 3:]) * 0.5


def test_lists_name_every_glyph_once():
    for chars in (OF_THINGS, UPSTREAM, DISTRACTORS, [thing.name for thing in THINGS]):
        assert len(chars) == len(set(chars))
    assert not set(DISTRACTORS) & set(OF_THINGS)
    assert len({class_name(char) for char in UPSTREAM}) == len(UPSTREAM) == 120


def test_every_glyph_is_drawn_with_a_body():
    nothing = stamp("\u2606", size=24)  # not in the font: an empty box
    for char in {*OF_THINGS, *UPSTREAM}:
        alpha = stamp(char, size=24)[..., 3]
        assert (alpha > 160).sum() > 80, char
        assert (alpha != nothing[..., 3]).any(), char


def test_no_two_upstream_classes_look_alike():
    pictures = np.stack([picture(char).ravel() for char in UPSTREAM])
    for index, one in enumerate(pictures[:-1]):
        apart = np.abs(pictures[index + 1 :] - one).mean(-1)
        assert apart.min() > 5, (UPSTREAM[index], UPSTREAM[index + 1 + apart.argmin()])


@pytest.mark.parametrize("size", [9, 24, 60])
def test_a_stamp_is_as_large_as_asked_and_in_the_middle(size):
    patch = stamp("⚽", size=size)
    assert patch.shape == (size * 3 // 2 + 2, size * 3 // 2 + 2, 4)
    rows, columns = (np.flatnonzero((patch[..., 3] > 127).any(axis)) for axis in (1, 0))
    for found in (rows, columns):
        assert abs(np.ptp(found) + 1 - size) <= 1
        assert abs(found.mean() - (len(patch) - 1) / 2) <= 1
    assert (patch[..., :3] <= patch[..., 3:]).all()


def test_turning_and_flipping():
    upright = stamp("👢", size=40)
    assert (stamp("👢", size=40, degrees=180)[::-1, ::-1] == upright).mean() > 0.9
    assert (stamp("👢", size=40, flip=True)[:, ::-1] == upright).mean() > 0.9
    assert (np.rot90(stamp("👢", size=40, degrees=90)) == upright).all()
    assert (stamp("👢", size=40, degrees=20) != upright).mean() > 0.1


def test_a_sketch_has_the_same_mask_and_no_colour():
    plain, sketch = (stamp("🍎", size=40, sketch=sketch) for sketch in (False, True))
    assert (plain[..., 3] == sketch[..., 3]).all()
    assert np.ptp(sketch[..., :3].astype(int), axis=-1).max() == 0
    assert np.ptp(plain[..., :3].astype(int), axis=-1).max() > 100


@pytest.mark.parametrize("kind", STUFF)
def test_textures_vary(kind):
    made = [texture(kind, Dice(seed), 48) for seed in range(6)]
    assert all(one.shape == (48, 48, 3) and one.dtype == np.uint8 for one in made)
    assert all(one.astype(float).std(axis=(0, 1)).max() > 4 for one in made)
    assert (made[0] != made[1]).mean() > 0.5
    assert np.ptp([one.mean() for one in made]) > 3


def test_colour_is_not_the_whole_answer():
    """Shows that the kinds' colours overlap: the nearest mean colour names fewer than three quarters of textures."""
    means = {kind: np.array([texture(kind, Dice(seed), 32).mean(axis=(0, 1)) for seed in range(12)]) for kind in STUFF}
    centres = np.stack([colours.mean(0) for colours in means.values()])
    right = 0
    for index, colours in enumerate(means.values()):
        nearest = np.linalg.norm(colours[:, None] - centres, axis=-1).argmin(1)
        right += (nearest == index).mean() / len(means)
    assert right < 0.75


def test_recolour_by_hand():
    rgb = np.array([[200, 100, 0]], dtype=np.uint8)
    assert (recolour(rgb, colour_matrix()) == rgb).all()
    assert (recolour(rgb, colour_matrix(), 60) == [[255, 160, 60]]).all()
    assert (recolour(rgb, colour_matrix(saturation=0)) == 100).all()
    assert (recolour(rgb, colour_matrix(contrast=128)) == [[100, 50, 0]]).all()
    assert np.abs(recolour(rgb, colour_matrix(hue=120)).astype(int) - [[0, 200, 100]]).max() <= 1


def test_dice_are_fair_and_pinned():
    dice = Dice(1, 2, 3)
    assert [dice.between(0, 99) for _ in range(6)] == [67, 11, 51, 35, 70, 47]
    dice = Dice(5)
    rolls = [dice.between(1, 6) for _ in range(3000)]
    assert set(rolls) == set(range(1, 7))
    assert np.bincount(rolls)[1:].min() > 400
    assert sum(dice.chance(25) for _ in range(2000)) == pytest.approx(500, abs=80)
    assert np.bincount([dice.weighted([1, 0, 3]) for _ in range(2000)]) == pytest.approx([500, 0, 1500], abs=80)
    assert dice.bytes(3, 5).shape == (3, 5)
    assert dice.bytes(100, 100).mean() == pytest.approx(127.5, abs=4)
