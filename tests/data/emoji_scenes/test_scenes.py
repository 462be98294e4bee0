from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from rmoe.data.emoji_scenes.glyphs import THINGS, UPSTREAM, class_name
from rmoe.data.emoji_scenes.params import STYLES, SceneParams
from rmoe.data.emoji_scenes.scenes import MIN_VISIBLE, metainfo, render, scene, upstream_image
from rmoe.data.emoji_scenes.textures import STUFF
from rmoe.errors import UserError

TINY = SceneParams(
    upstream_size=24,
    scene_size=64,
    upstream_classes=3,
    upstream_train=2,
    upstream_val=1,
    scenes_train=12,
    scenes_val=3,
    categories=5,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "set"
    assert render(out, TINY)
    return out


def sha256(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def test_upstream_has_the_layout_of_an_image_folder(root):
    for split, count in (("train", 2), ("val", 1)):
        classes = sorted(folder.name for folder in (root / "upstream" / split).iterdir())
        assert classes == sorted(class_name(char) for char in UPSTREAM[:3])
        for name in classes:
            files = sorted((root / "upstream" / split / name).iterdir())
            assert [file.name for file in files] == [f"{index:05d}.jpg" for index in range(count)]
            assert all(Image.open(file).size == (24, 24) for file in files)


def test_scenes_have_the_layout_and_conventions_of_ade20k(root):
    info = json.loads((root / "ade20k" / "classes.json").read_text())
    assert info["classes"][:8] == list(STUFF)
    assert info["classes"][8:] == [thing.name for thing in THINGS[:5]]
    assert info["isthing"] == [False] * 8 + [True] * 5
    assert len({tuple(colour) for colour in info["palette"]}) == 13
    seen = set()
    for split, count in (("training", 12), ("validation", 3)):
        images = sorted((root / "ade20k" / "images" / split).iterdir())
        maps = sorted((root / "ade20k" / "annotations" / split).iterdir())
        assert [path.stem for path in images] == [path.stem for path in maps]
        assert len(images) == count
        for path in maps:
            labels = Image.open(path)
            assert labels.mode == "L"
            assert labels.size == (64, 64)
            seen |= set(np.unique(labels).tolist())
    assert 0 in seen
    assert max(seen) <= 13
    assert len([value for value in seen if 1 <= value <= 8]) >= 5
    assert len([value for value in seen if value > 8]) == 5


def test_the_defaults_are_large_enough():
    params = SceneParams()
    assert params.upstream_classes >= 100
    assert params.categories >= 20
    assert len(STUFF) >= 5
    assert len(metainfo()["classes"]) == len(STUFF) + params.categories


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_shows_the_same_pixels_as_the_label_maps(root, split):
    ade = {"train": "training", "val": "validation"}[split]
    coco = COCO(str(root / "coco" / "annotations" / f"instances_{split}2017.json"))
    names = {category["id"]: category["name"] for category in coco.loadCats(coco.getCatIds())}
    assert names == {9 + index: thing.name for index, thing in enumerate(THINGS[:5])}
    images = coco.loadImgs(sorted(coco.getImgIds()))
    maps = sorted((root / "ade20k" / "annotations" / ade).iterdir())
    for image, path in zip(images, maps, strict=True):
        jpeg = root / "coco" / f"{split}2017" / image["file_name"]
        assert jpeg.read_bytes() == (root / "ade20k" / "images" / ade / f"{path.stem}.jpg").read_bytes()
        labels = np.array(Image.open(path))
        assert labels.shape == (image["height"], image["width"])
        covered = np.zeros_like(labels)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"], iscrowd=None)):
            mask = coco.annToMask(annotation).astype(bool)
            assert not covered[mask].any(), "visible masks overlap"
            covered[mask] = annotation["category_id"]
            assert annotation["area"] == mask.sum() >= MIN_VISIBLE
            assert annotation["bbox"] == rle.toBbox(annotation["segmentation"]).tolist()
        assert (covered == np.where(labels > len(STUFF), labels, 0)).all()


def test_ids_are_unique_over_both_splits(root):
    splits = [json.loads((root / f"coco/annotations/instances_{s}2017.json").read_text()) for s in ("train", "val")]
    for kind in ("images", "annotations"):
        ids = [item["id"] for split in splits for item in split[kind]]
        assert len(ids) == len(set(ids)) > 0


def test_crowds_are_one_annotation_of_many_objects():
    made = [scene(TINY, "train", index) for index in range(40)]
    crowds = [instance for one in made for instance in one.instances if instance.crowd]
    assert len(crowds) >= 2
    assert any(_parts(instance.mask) >= 3 for instance in crowds)


def _parts(mask: np.ndarray) -> int:
    """Returns a lower bound of the number of separate pieces: runs of columns that hold a pixel."""
    return int(np.count_nonzero(np.diff(mask.any(0).astype(int), prepend=0) == 1))


def test_nearer_objects_hide_farther_ones():
    plain = [scene(dataclasses.replace(TINY, scene_size=96), "train", index) for index in range(30)]
    boxes_overlap = 0
    for one in plain:
        total = sum(instance.mask.astype(int) for instance in one.instances)
        assert np.max(total) == 1
        for i, first in enumerate(one.instances):
            for second in one.instances[i + 1 :]:
                boxes = [np.ix_(m.any(1), m.any(0)) for m in (first.mask, second.mask)]
                both = np.zeros((2, 96, 96), dtype=bool)
                for layer, box in zip(both, boxes, strict=True):
                    layer[box] = True
                boxes_overlap += bool(both.all(0).any())
    assert boxes_overlap > 30


@pytest.mark.distributed
def test_equal_parameters_give_equal_bytes_for_any_number_of_processes(root, tmp_path):
    assert render(tmp_path / "again", TINY, jobs=2)
    assert sha256(tmp_path / "again") == sha256(root)


def test_another_seed_gives_other_pictures():
    first, second = (scene(dataclasses.replace(TINY, seed=seed), "train", 0) for seed in (0, 1))
    assert (first.image != second.image).mean() > 0.5
    assert (first.labels != second.labels).mean() > 0.1


def test_pictures_do_not_depend_on_how_many_there_are():
    more = dataclasses.replace(TINY, scenes_train=500, upstream_train=9, upstream_classes=7)
    assert (scene(TINY, "train", 4).image == scene(more, "train", 4).image).all()
    assert (upstream_image(TINY, "train", 1, 1) == upstream_image(more, "train", 1, 1)).all()


def test_splits_differ():
    assert (scene(TINY, "train", 0).image != scene(TINY, "val", 0).image).mean() > 0.5
    assert (upstream_image(TINY, "train", 0, 0) != upstream_image(TINY, "val", 0, 0)).mean() > 0.5


def test_the_pixels_are_the_ones_that_were_published():
    """Fails if FreeType or Pillow ever draw differently: raise `FORMAT` then and pin the new digest."""
    total = hashlib.sha256()
    for style in STYLES:
        params = dataclasses.replace(TINY, styles=(style,))
        for index in range(4):
            made = scene(params, "train", index)
            total.update(made.image.tobytes() + made.labels.tobytes())
            total.update(repr([(item.value, item.crowd, int(item.mask.sum())) for item in made.instances]).encode())
            total.update(upstream_image(params, "train", index, index).tobytes())
    assert total.hexdigest() == "5f01d655c164e043c7651324c717e4a68d31ba036e761041375f2a2b1f55c0f4"


def test_the_files_are_the_ones_that_were_published(root):
    """Covers the pixels and the files that Pillow's JPEG and PNG libraries write (equal in Pillow 11.3 and 13.0)."""
    published = "4767ca27ef8574e6add4ee0c7b06bbb6294570dd5b857765d7cd331be6408293"
    assert json.loads((root / "dataset.json").read_text())["sha256"] == published


def test_the_manifest_says_what_is_there(root):
    manifest = json.loads((root / "dataset.json").read_text())
    assert manifest["parameters"] == {**dataclasses.asdict(TINY), "styles": ["plain"]}
    assert manifest["counts"]["upstream_train"] == 6
    assert manifest["counts"]["scenes_val"] == 3
    loaded = json.loads((root / "coco/annotations/instances_train2017.json").read_text())["annotations"]
    assert manifest["counts"]["instances_train"] == len(loaded)
    assert manifest["files"] == sum(path.is_file() for path in root.rglob("*")) - 1
    assert "CC BY-SA 4.0" in manifest["licence"]
    assert "OpenMoji" in manifest["credit"]


def test_categories_set_the_number_of_classes():
    few, many = (dataclasses.replace(TINY, categories=count) for count in (2, 32))
    for params in (few, many):
        values = {item.value for index in range(40) for item in scene(params, "train", index).instances}
        assert max(values) <= len(STUFF) + params.categories
        assert len(values) > params.categories * 0.9
    assert len(metainfo(32)["classes"]) == len(set(metainfo(32)["classes"])) == len(STUFF) + 32


def test_long_tail_makes_the_first_classes_common():
    params = dataclasses.replace(TINY, long_tail=1.0, categories=20, upstream_classes=10, upstream_train=10)
    values = [item.value for index in range(60) for item in scene(params, "train", index).instances]
    counts = np.bincount(values, minlength=29)[9:]
    assert counts[:4].sum() > 2 * counts[10:14].sum()
    assert [params.upstream_count("train", rank) for rank in (0, 1, 4, 9)] == [10, 5, 2, 1]
    assert params.upstream_count("val", 9) == TINY.upstream_val
    balanced = [TINY.upstream_count("train", rank) for rank in range(3)]
    assert balanced == [2, 2, 2]


def test_styles_change_the_picture_and_not_the_labels():
    made = {style: scene(dataclasses.replace(TINY, styles=(style,)), "train", 3) for style in STYLES}
    for style in STYLES:
        assert (made[style].labels == made["plain"].labels).all()
    spread = {style: np.ptp(one.image.astype(int), axis=-1).mean() for style, one in made.items()}
    assert spread["outline"] == 0 < spread["plain"]
    assert made["night"].image.mean() < 0.7 * made["plain"].image.mean()
    casts = [one.image.reshape(-1, 3).mean(0) for one in (made["plain"], made["tinted"])]
    assert np.abs(casts[0] - casts[1]).max() > 15


def test_each_image_has_one_of_the_styles_by_chance():
    params = dataclasses.replace(TINY, styles=("plain", "outline"))
    grey = [np.ptp(scene(params, "train", index).image.astype(int), axis=-1).max() == 0 for index in range(20)]
    assert 3 < sum(grey) < 17


def test_a_second_run_leaves_the_set_alone(root):
    before = sha256(root)
    assert not render(root, TINY)
    assert sha256(root) == before


def test_other_parameters_are_refused(root):
    with pytest.raises(UserError, match=r"holds a data set with seed 0 \(asked for: 7\); choose another folder"):
        render(root, dataclasses.replace(TINY, seed=7))


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is no data set of this command; choose a folder that does not exist"):
        render(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "set").write_text("precious")
    with pytest.raises(UserError, match="is no data set"):
        render(tmp_path / "set", TINY)


def test_a_set_with_a_file_missing_is_refused(tmp_path):
    small = dataclasses.replace(TINY, scenes_train=1, scenes_val=1)
    render(tmp_path / "set", small)
    (tmp_path / "set" / "ade20k" / "classes.json").unlink()
    with pytest.raises(UserError, match=r"holds \d+ files, but \d+ were written; remove it and run again"):
        render(tmp_path / "set", small)


def test_an_empty_folder_is_filled_and_nothing_is_left_beside_it(tmp_path):
    (tmp_path / "set").mkdir()
    assert render(tmp_path / "set", dataclasses.replace(TINY, scenes_train=1, scenes_val=1))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rmoe.data.emoji_scenes.scenes._write_jpeg", full)
    with pytest.raises(UserError, match="No space left on device"):
        render(tmp_path / "set", TINY)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": 33}, "categories is 33; it is a whole number from 2 to 32"),
        ({"seed": -1}, "seed is -1; it is a whole number from 0 to"),
        ({"scene_size": 8}, "scene_size is 8; it is a whole number from 32 to 1024"),
        ({"scenes_train": 0}, "scenes_train is 0; it is a whole number from 1 to"),
        ({"long_tail": float("nan")}, "long_tail is nan; it is a number from 0 to 4"),
        ({"styles": ("nite",)}, "style 'nite' is unknown; did you mean 'night'"),
        ({"styles": ("plain", "plain")}, "each once"),
        ({"styles": ()}, "name one or more"),
    ],
)
def test_parameters_out_of_range_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **change)
