"""docs/custom_data.md does what it says: its commands and configs are run as they stand there, in small."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import mmdet
import mmseg
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, run_processes
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from PIL import Image

from rmoe.backbones.pyramid import TimmPyramid
from rmoe.cli import main
from rmoe.engine.launch import parser, prepare, read_config
from rmoe.moe.records import collect
from rmoe.moe.state import moe_layers

TEXT = (ROOT / "docs" / "custom_data.md").read_text()
CONFIGS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()
]
OPTIONS = re.search(r"`--cfg-options ([^`]*)`", TEXT)[1].split()  # type: ignore[index]
STOCK = {
    "mmseg": "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
    "mmdet": "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
}
SIDE = 64
# So that a step takes a second: narrow models, small images, two steps.
NARROW = {"embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2)}
MODEL = [
    "model.backbone.kwargs.embed_dim=8",
    "model.backbone.kwargs.depths=[1,1,2,2]",
    "model.backbone.kwargs.num_heads=[1,1,2,2]",
]
UPERNET = [
    "model.decode_head.in_channels=[8,16,32,64]",
    "model.decode_head.channels=16",
    "model.auxiliary_head.in_channels=32",
    "model.auxiliary_head.channels=16",
]
MASK_RCNN = [
    "model.neck.in_channels=[8,16,32,64]",
    "model.roi_head.bbox_head.fc_out_channels=32",
    "model.roi_head.mask_head.num_convs=1",
    "model.train_cfg.rpn_proposal.max_per_img=20",
    "model.train_cfg.rcnn.sampler.num=16",
    "model.test_cfg.rpn.max_per_img=20",
]
RUN = [
    "train_cfg.max_iters=2",
    "train_cfg.val_interval=2",
    *(
        f"{split}_dataloader.{key}"
        for split in ("train", "val")
        for key in ("num_workers=0", "persistent_workers=False")
    ),
]
SMALL = f"({SIDE},{SIDE})"
STREET = [
    f"model.data_preprocessor.size={SMALL}",
    f"train_dataloader.dataset.pipeline.2.scale={SMALL}",
    f"train_dataloader.dataset.pipeline.3.crop_size={SMALL}",
    f"val_dataloader.dataset.pipeline.1.scale={SMALL}",
]
FRUIT = [
    f"train_dataloader.dataset.pipeline.3.transforms.0.0.scales=[{SMALL}]",
    f"train_dataloader.dataset.pipeline.3.transforms.1.0.scales=[{SMALL}]",
    f"train_dataloader.dataset.pipeline.3.transforms.1.2.scales=[{SMALL}]",
    f"val_dataloader.dataset.pipeline.1.scale={SMALL}",
]


def write_street(root: Path) -> None:
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("road\ncar\ntree\n")
    labels = np.repeat(np.arange(4, dtype=np.uint8), SIDE // 4)[:, None].repeat(SIDE, axis=1)
    for split in ("training", "validation"):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for name in "ab":
            Image.fromarray(labels).save(root / "annotations" / split / f"{name}.png")
            Image.fromarray(labels * 60).convert("RGB").save(root / "images" / split / f"{name}.png")


def write_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the page's own command in the folder of today, with a narrow random network instead of timm's download."""
    (code,) = [words[2] for words in COMMANDS if words[:2] == ["python", "-c"]]
    create = timm.create_model
    with monkeypatch.context() as narrow:
        narrow.setattr(timm, "create_model", lambda name, pretrained: create(name, **NARROW))
        exec(code)


def write_fruit(root: Path) -> None:
    (root / "annotations").mkdir(parents=True)
    (root / "classes.txt").write_text("apple\npear\n")
    square = {"bbox": [8, 8, 40, 40], "area": 1600, "iscrowd": 0, "segmentation": [[8, 8, 48, 8, 48, 48, 8, 48]]}
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": SIDE, "width": SIDE} for i in (1, 2)],
        "categories": [{"id": 10, "name": "apple"}, {"id": 20, "name": "pear"}],
        "annotations": [{"id": i, "image_id": i, "category_id": 10 * i, **square} for i in (1, 2)],
    }
    for split in ("train2017", "val2017"):
        (root / split).mkdir()
        for i in (1, 2):
            Image.new("RGB", (SIDE, SIDE), (90 * i, 60, 60)).save(root / split / f"{i}.jpg")
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.mark.distributed
@pytest.mark.slow
def test_a_class_list_and_a_few_lines_are_enough(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("rmoe", "launch", "ds_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_street(tmp_path / "data" / "street")
    write_fruit(tmp_path / "data" / "fruit")
    write_core(monkeypatch)
    (tmp_path / "street.py").write_text(CONFIGS[0])
    (tmp_path / "fruit.py").write_text(CONFIGS[1])
    checks, trainings = ([words for words in COMMANDS if words[0] == name] for name in ("rmoe", "deepspeed"))
    assert len(checks) == len(trainings) == 2
    for words in checks:
        assert main(words[1:]) == 0, capsys.readouterr().out
    small = ([*UPERNET, *STREET], [*MASK_RCNN, *FRUIT])
    runs = [[*words[2:], "--cfg-options", *MODEL, *RUN, *one] for words, one in zip(trainings, small, strict=True)]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    run_processes(tmp_path, [ROOT / "tests" / "several_runs.py", tmp_path / "runs.json"], 1, timeout=280)
    assert json.loads((tmp_path / "runs.json.0").read_text()) == ["done", "done"]
    for run, metric in (("street", "mIoU"), ("fruit", "coco/segm_mAP")):
        folder = tmp_path / "work_dirs" / run
        assert (folder / "model.safetensors").is_file()
        assert any(metric in path.read_text() for path in folder.rglob("scalars.json"))


def sample(library: str) -> Any:
    """The truth of an image, for a model of this library."""
    if library == "mmseg":
        return SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, SIDE, SIDE, dtype=torch.int64)))
    shapes = dict.fromkeys(("img_shape", "batch_input_shape", "pad_shape", "ori_shape"), (SIDE, SIDE))
    made = DetDataSample(metainfo={**shapes, "img_id": 1, "scale_factor": (1.0, 1.0)})
    masks = BitmapMasks(np.ones((1, SIDE, SIDE), dtype=np.uint8), SIDE, SIDE)
    boxes, no_boxes = torch.tensor([[4.0, 4, 60, 60]]), torch.zeros(0, 4)
    made.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([3]), masks=masks)
    made.ignored_instances = InstanceData(bboxes=no_boxes, labels=torch.zeros(0, dtype=torch.int64))
    return made


@pytest.mark.parametrize(("library", "by_options"), [("mmseg", False), ("mmdet", True)])
def test_a_config_that_mmseg_or_mmdet_ships_trains_with_experts(tmp_path, monkeypatch, library, by_options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_core(monkeypatch)
    stock = Path({"mmseg": mmseg, "mmdet": mmdet}[library].__file__).parent / ".mim" / "configs" / STOCK[library]
    path = tmp_path / "mine.py"
    path.write_text(f'_base_ = ["{stock}"]\n{CONFIGS[2]}')
    options = [*(OPTIONS if by_options else []), *MODEL, *(UPERNET if library == "mmseg" else MASK_RCNN)]
    path = stock if by_options else path
    words = parser().parse_args([str(path), "--deepspeed_config", "unread.json", "--cfg-options", *options])
    config = read_config(path, words.cfg_options)
    left = {"type", "model", "core", "moe", "kwargs"}  # nothing of the stock backbone
    assert set(config.model.backbone) == left
    prepare(config, {}, processes=1, work_dir=tmp_path / "run", resume=False)
    init_default_scope(config.get("default_scope"))
    model = revert_sync_batchnorm(MODELS.build(config.model)).train()
    assert isinstance(model.backbone, TimmPyramid)
    with collect() as records:
        losses = model.loss(torch.randn(2, 3, SIDE, SIDE), [sample(library), sample(library)])
    total, _ = model.parse_losses(losses)
    (total + records.loss()).backward()
    assert len(moe_layers(model)) == 2
    assert all(layer.gate.weight.grad is not None for layer in moe_layers(model).values())
