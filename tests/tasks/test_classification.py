"""Tests upstream classification: model, data set and metric."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.registry import DATASETS, METRICS, MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image

from rmoe.data.check import check_image_folder
from rmoe.errors import UserError
from rmoe.moe.records import collect
from rmoe.moe.state import moe_layers
from rmoe.tasks import classification
from rmoe.tasks.classification import Accuracy, ImageFolder, TimmClassifier, majority_top1

SMALL = {"embed_dim": 8, "depths": (2, 2, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4, "img_size": 32}
MODEL = {"type": "rmoe.TimmClassifier", "model": "swin_tiny_patch4_window7_224", "kwargs": SMALL, "num_classes": 3}
TRANSFORM = {"input_size": 32}


def build(**changed: object) -> TimmClassifier:
    torch.manual_seed(0)
    init_default_scope("mmengine")
    return MODELS.build(Config({"model": {**MODEL, **changed}}).model)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Writes two training images of each of three classes, and to validate three of "cat" and one of "ant"."""
    for split, counts in {"train": {"ant": 2, "bee": 2, "cat": 3}, "val": {"ant": 1, "cat": 3}}.items():
        for name, count in counts.items():
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((40, 50, 3), 20 * index, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{index}.jpg")
    return tmp_path


def test_modes():
    model = build().eval()
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 2])
    logits = model(images)
    assert torch.equal(logits, model.model(images))
    loss = model(images, labels, mode="loss")["loss_cls"]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    answers = model(images, labels, mode="predict")
    assert [answer["label"] for answer in answers] == [0, 1, 2, 2]
    assert torch.equal(torch.stack([answer["logits"] for answer in answers]), logits)


def test_label_smoothing_by_hand():
    model = build(label_smoothing=0.3).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 2])
    log_p = model(images).log_softmax(-1)
    expected = -(0.7 * log_p[[0, 1], labels] + 0.1 * log_p.sum(-1)).mean()
    torch.testing.assert_close(model(images, labels, mode="loss")["loss_cls"], expected)


@pytest.mark.parametrize("mixup", [None, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}])
def test_all_parameters_learn(mixup):
    model = build(mixup=mixup, label_smoothing=0.1)
    model(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), mode="loss")["loss_cls"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_with_experts_it_computes_the_same_and_gives_a_gate_loss():
    dense, mixture = build(), build(moe={"num_experts": 2}, allow_random_core=True)
    assert len(moe_layers(mixture)) == 2
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(mixture.eval()(images), dense.eval()(images))
    with collect() as records:
        mixture.train()(images, torch.tensor([0, 1]), mode="loss")
    assert records.loss() > 0


def test_weights_survive_mmengines_initialisation():
    model = build()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_a_classifier_is_a_core_for_a_pyramid(tmp_path):
    from rmoe.backbones.pyramid import TimmPyramid

    model = build()
    torch.save(model.state_dict(), tmp_path / "core.pth")
    pyramid = TimmPyramid(MODEL["model"], SMALL, core=str(tmp_path / "core.pth"))
    assert torch.equal(pyramid.model.layers[1].blocks[1].mlp.fc1.weight, model.model.layers[1].blocks[1].mlp.fc1.weight)


def test_folders_are_classes(root):
    train = ImageFolder(str(root), "train", 3, TRANSFORM)
    assert (len(train), train.metainfo) == (7, {"classes": ("ant", "bee", "cat")})
    item = train[6]
    assert (item["inputs"].shape, item["inputs"].dtype, item["labels"]) == ((3, 32, 32), torch.float32, 2)
    val = ImageFolder(str(root), "val", 3, TRANSFORM)
    assert [val[index]["labels"] for index in range(4)] == [0, 2, 2, 2]  # "bee" keeps its place
    assert torch.equal(val[0]["inputs"], val[0]["inputs"])


def test_in_mmengines_loader(root):
    init_default_scope("mmengine")
    config = {
        "dataset": {
            "type": "rmoe.ImageFolder",
            "root": str(root),
            "split": "val",
            "num_classes": 3,
            "transform": TRANSFORM,
        },
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "batch_size": 3,
        "num_workers": 0,
        "collate_fn": {"type": "default_collate"},
    }
    loader = Runner.build_dataloader(Config(config))
    assert isinstance(loader.sampler, DefaultSampler)
    assert isinstance(loader.dataset, DATASETS.get("rmoe.ImageFolder"))
    answers = [answer for batch in loader for answer in build().eval().val_step(batch)]
    assert [answer["label"] for answer in answers] == [0, 2, 2, 2]


def pack(root: Path) -> Path:
    """Packs the same set into a zip for training and a tar for each class for validation, and removes the folders."""
    shutil.make_archive(str(root / "packed" / "train"), "zip", root / "train")
    for folder in sorted((root / "val").iterdir()):
        shutil.make_archive(str(root / "packed" / "val" / folder.name), "tar", folder)
    return root / "packed"


def test_packed_or_not_it_is_the_same_set(root):
    """Reads in forked workers too, which share no position in an archive."""
    packed = pack(root)
    for split in ("train", "val"):
        plain, same = (ImageFolder(str(one), split, 3, TRANSFORM) for one in (root, packed))
        plain.transform = same.transform = timm.data.create_transform(**TRANSFORM)
        assert same.metainfo == plain.metainfo
        assert list(same.labels) == list(plain.labels)
        assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(same, plain, strict=True))
        loader = torch.utils.data.DataLoader(same, 1, num_workers=2, multiprocessing_context="fork")
        together = torch.cat([batch["inputs"] for batch in loader])
        assert torch.equal(together, torch.stack([plain[i]["inputs"] for i in range(len(plain))]))


def test_processes_share_the_indexing_of_archives(root, monkeypatch):
    packed, shares = pack(root), []
    whole = ImageFolder(str(packed), "val", 3, TRANSFORM)
    monkeypatch.setattr(classification, "all_gather_object", lambda one: shares.append(one) or shares)
    for rank in range(2):
        monkeypatch.setattr(classification, "get_dist_info", lambda rank=rank: (rank, 2))
        if rank:
            assert list(ImageFolder(str(packed), "val", 3, TRANSFORM).labels) == list(whole.labels)
        else:
            with pytest.raises(IndexError):  # the other process has not answered yet
                ImageFolder(str(packed), "val", 3, TRANSFORM)
    assert [len(share) for share in shares] == [1, 1]


def test_majority(root):
    train, val = (ImageFolder(str(root), split, 3, TRANSFORM) for split in ("train", "val"))
    assert majority_top1(train, val) == 75.0  # "cat" is the commonest; 3 of 4


def test_what_a_user_can_get_wrong(root):
    def refused(message: str, split: str = "val", classes: int = 3, folder: Path = root) -> None:
        with pytest.raises(UserError, match=message):
            ImageFolder(str(folder), split, classes, TRANSFORM)[0]

    refused("there is no .*/test; the layout is", split="test")
    refused("there is no .*nowhere/train", folder=root / "nowhere")
    refused("has 3 classes; the config says num_classes=4", classes=4)
    broken = root / "val" / "ant" / "0.jpg"
    broken.write_bytes(broken.read_bytes()[:400])
    refused("ant/0.jpg is no readable image")
    (root / "val" / "dog").mkdir()
    refused("has the class 'dog', which .*train has not")
    (root / "train" / "dog").mkdir()
    (root / "empty" / "dog").mkdir(parents=True)
    refused("empty holds no image", split="empty", classes=4)
    shutil.rmtree(root / "train" / "dog")
    shutil.rmtree(root / "val" / "dog")
    packed = pack(root)
    refused(r"0.jpg in .*packed/val/ant.tar is no readable image", folder=packed)
    cut = packed / "val" / "cat.tar"
    cut.write_bytes(cut.read_bytes()[:700])
    refused("cat.tar cannot be read to its end", folder=packed)


def test_images_of_other_depths_and_orientations(root):
    path = root / "val" / "ant" / "0.jpg"
    Image.fromarray(np.full((40, 50), 40_000, dtype=np.uint16)).save(path, "PNG")
    with pytest.raises(UserError, match="ant/0.jpg has mode I;16, of more than 8 bits a channel"):
        ImageFolder(str(root), "val", 3, TRANSFORM)[0]
    image, exif = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)), Image.Exif()
    exif[0x0112] = 3
    image.save(path, "PNG", exif=exif)
    val = ImageFolder(str(root), "val", 3, TRANSFORM)
    val.transform = np.asarray
    assert val[0]["inputs"].tolist() == np.asarray(image).tolist()


@pytest.mark.parametrize("damage", [b"IDAT", b"IHDR"])
def test_an_image_with_damaged_chunks(root, damage):
    """Covers files at which Pillow raises SyntaxError and other errors."""
    path = root / "val" / "ant" / "0.jpg"
    Image.new("RGB", (40, 50)).save(path, "PNG")
    path.write_bytes(path.read_bytes().replace(damage, b"\xff\xff\xff\xff"))
    with pytest.raises(UserError, match="ant/0.jpg is no readable image"):
        ImageFolder(str(root), "val", 3, TRANSFORM)[0]


@pytest.mark.timeout(20)
def test_links_that_lead_back_are_followed_once(root):
    plain = ImageFolder(str(root), "train", 3, TRANSFORM)
    for folder in ("train", "train/ant"):
        for name in ("x", "y"):
            (root / folder / name).symlink_to(".")
    (root / "train" / "bee" / "up").symlink_to("..")
    again = ImageFolder(str(root), "train", 3, TRANSFORM)
    assert (list(again.labels), again.metainfo) == (list(plain.labels), plain.metainfo)


def test_what_the_check_counts_is_what_is_trained_on(root):
    """Finds images in folders within a class and of every suffix, as the check does; both leave hidden files out."""
    (root / "train" / "ant" / "more").mkdir()
    for name in ("more/a.jpg", "b.webp", "c.BMP", ".hidden.jpg"):
        Image.new("RGB", (40, 50)).save(root / "train" / "ant" / name)
    train = ImageFolder(str(root), "train", 3, TRANSFORM)
    assert len(train) == 10 == check_image_folder(root / "train").counts["images"]
    assert list(train.labels).count(0) == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0; it is a whole number from 1"),
        ({"num_classes": "3"}, "num_classes is '3'"),
        ({"num_classes": 3.0}, "num_classes is 3.0"),
        ({"root": None}, "root is None; it is a path"),
        ({"split": 1}, "split is 1; it is text"),
        ({"transform": None}, "transform is None; it is a dict"),
        ({"transform": {"input_sise": 32}}, "unknown argument 'input_sise'; did you mean 'input_size'"),
        ({"transform": {"input_size": 32, "is_training": True}}, "unknown argument 'is_training'"),
        ({"transform": {"input_size": 32, "auto_augment": "nonsense"}}, "create_transform refuses transform="),
    ],
)
def test_arguments(root, changed, message):
    given = {"root": str(root), "split": "train", "num_classes": 3, "transform": TRANSFORM, **changed}
    with pytest.raises(UserError, match=message):
        ImageFolder(**given)


def test_a_file_for_a_root(root):
    (root / "file").write_text("")
    with pytest.raises(UserError, match="there is no .*file/train; the layout is"):
        ImageFolder(str(root / "file"), "train", 3, TRANSFORM)


def test_accuracy_by_hand():
    init_default_scope("mmengine")
    metric = METRICS.build({"type": "rmoe.Accuracy"})
    assert isinstance(metric, Accuracy)
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [9, 8, 7, 6, 5, 4], [1, 1, 1, 1, 1, 1]])
    answers = [{"logits": row, "label": label} for row, label in zip(logits, [0, 4, 5, 0], strict=True)]
    metric.process({}, answers[:3])
    metric.process({}, answers[3:])
    metric.dataset_meta = {"classes": tuple("abcdef")}
    by_class = metric.class_values(metric.results)
    assert {name: by_class[name] for name in "aef"} == {
        "a": {"top1": 50.0, "top5": 50.0},
        "e": {"top1": 0.0, "top5": 100.0},
        "f": {"top1": 0.0, "top5": 0.0},
    }
    assert math.isnan(by_class["b"]["top1"])
    # right; fifth; sixth; a tie of six, which is never counted in the model's favour
    assert metric.evaluate(4) == {"accuracy/top1": 25.0, "accuracy/top5": 50.0}
    metric.process({}, [{"logits": torch.full((6,), float("nan")), "label": 0}])
    assert metric.evaluate(1) == {"accuracy/top1": 0.0, "accuracy/top5": 0.0}
