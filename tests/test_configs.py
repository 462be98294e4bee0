"""Every shipped config: what it says, how the pipelines' configs differ, and a short run of each.

As a script, this file is what runs them: `test_configs.py FOLDER` cuts the configs in FOLDER/wanted.json down to the
sizes below, trains and evaluates one after the other as launch/train.py would, and writes FOLDER/outcomes.json.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import timm
import torch
import yapf.yapflib.yapf_api
from conftest import ROOT, run_processes
from mmengine.config import Config
from safetensors import safe_open

import rmoe
from rmoe.backbones.pyramid import TimmPyramid
from rmoe.config import ResidualMoEConfig
from rmoe.data.emoji_scenes.params import SceneParams
from rmoe.data.emoji_scenes.scenes import metainfo, render
from rmoe.engine import launch
from rmoe.engine.check_values import check_values
from rmoe.engine.model_config import check_maps, for_one_process
from rmoe.engine.read_config import read_config
from rmoe.engine.task_config import join_tasks
from rmoe.errors import UserError

FOLDER = ROOT / "rmoe" / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*/*.py") if path.parent.name != "_base_")
NAMES = [str(path.relative_to(FOLDER)) for path in CONFIGS]

# The paper's table: with each pipeline, a cell.
TABLE = [
    "segmentation/upernet_swin_tiny_{}_ade20k_512_160k.py",
    "segmentation/upernet_cvt_13_{}_ade20k_512_160k.py",
    "segmentation/upernet_swin_large_{}_ade20k_640_160k.py",
    "detection/mask_rcnn_swin_tiny_{}_coco_1x.py",
    "detection/mask_rcnn_cvt_13_{}_coco_1x.py",
    "detection/atss_dyhead_swin_large_{}_coco_2x.py",
]
PIPELINES = {"dense": "Lower bound", "moe": "Upper bound", "residual": "RMoE-D", "intermediate_residual": "RMoE-I"}
STAGES = {"Lower bound": "dense", "Upper bound": "moe", "RMoE-D": "residual", "RMoE-I": "residual"}

# What configs are cut down to for their run. What is not named here stays as shipped.
SCENES = SceneParams(scene_size=64, scenes_train=4, scenes_val=2, upstream_classes=2, upstream_train=2, upstream_val=2)
CLASSES = {"classification": SCENES.upstream_classes, "detection": SCENES.categories}
DATA = {  # where a config looks for its data: what is there instead
    "data/ade/ADEChallengeData2016": "data/ade20k",
    "data/coco": "data/coco",
    "data/imagenet": "data/upstream",
    "data/imagenet22k": "data/upstream",
    "work_dirs/demo/data": "data",
}
SMALL = {
    "swin": {"embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2)},
    "cvt": {"embed_dims": (8, 16, 32), "depths": (1, 1, 2), "num_heads": (1, 1, 2)},
    "vit": {"embed_dim": 8, "depth": 4, "num_heads": 1},
    "swinv2": {"embed_dim": 8, "depths": (1, 1, 2, 2), "num_heads": (1, 1, 2, 2), "window_size": 4},
    "convnext": {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 2)},
    "eva02": {"embed_dim": 8, "depth": 4, "num_heads": 1},
}
PLAIN = ("vit", "eva02")  # without stages
WIDTHS = {
    "cvt": [8, 16, 32],
    **{family: [8, 8, 8, 8] for family in PLAIN},
    **{family: [8, 16, 32, 64] for family in ("swin", "swinv2", "convnext")},
}
SIMPLE = [2, 4, 8, 8]  # channels of a simple feature pyramid
SIDE = 64
CHANNELS = 32  # of necks and heads: DyHead's norms have 16 groups, and one value alone cannot be normed
KEYS: dict[str, Any] = {  # wherever they stand
    **dict.fromkeys(("size", "crop_size"), (SIDE, SIDE)),
    **dict.fromkeys(("input_size", "img_size"), SIDE),
    **dict.fromkeys(("channels", "feat_channels", "out_channels", "conv_out_channels", "fc_out_channels"), CHANNELS),
    **{"num_blocks": 1, "num_convs": 1, "nms_pre": 20, "max_per_img": 20, "max_per_image": 20, "num": 16},
    **{
        "num_layers": 1,
        "num_queries": 8,
        "num_points": 4,
        "num_feats": CHANNELS // 2,
        "post_process_channels": [8] * 4,
    },
    **dict.fromkeys(("embed_dims", "feedforward_channels"), CHANNELS),
    **{"norm_cfg": {"type": "GN", "num_groups": 1}},  # SyncBN needs GPUs
    **{"num_experts": 2, "ep_size": 1},
    **{"batch_size": 2, "num_workers": 0, "persistent_workers": False, "max_iters": 2, "val_interval": 2},
}
RESIZED = {"Resize": "scale", "RandomResize": "scale", "RandomChoiceResize": "scales"}

LOSSES = {
    "classification": {"loss_cls"},
    "segmentation": {"decode.loss_ce"},
    "Mask2FormerHead": {"decode.loss_cls", "decode.loss_mask", "decode.loss_dice"},
    "Mask2Former": {"loss_cls", "loss_mask", "loss_dice"},
    "MaskRCNN": {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox", "loss_mask"},
    "ATSS": {"loss_cls", "loss_bbox", "loss_centerness"},
}
BOTH = {"segmentation": "segmentation", "detection": "MaskRCNN"}
LOSSES["rmoe.MultiTask"] = {f"{task}/{name}" for task, kind in BOTH.items() for name in LOSSES[kind]}
METRICS = {
    "classification": {"accuracy/top1"},
    "segmentation": {"mIoU"},
    "Mask2FormerHead": {"mIoU"},
    "Mask2Former": {"coco/bbox_mAP", "coco/segm_mAP"},
    "MaskRCNN": {"coco/bbox_mAP", "coco/segm_mAP"},
    "ATSS": {"coco/bbox_mAP"},
    "rmoe.MultiTask": {"segmentation/mIoU", "detection/bbox_mAP", "detection/segm_mAP"},
}


def load(name: str) -> Config:
    config = Config.fromfile(FOLDER / name, import_custom_modules=False)
    join_tasks(config)
    return config


def docstring(name: str) -> str:
    return (FOLDER / name).read_text().split('"""')[1]


def content(name: str) -> str:
    return (FOLDER / name).read_text().split('"""')[2]


def task(config: Config) -> str:
    return {"mmengine": "classification", "mmseg": "segmentation", "mmdet": "detection"}[config.default_scope]


def backbone(config: Config) -> Any:
    return config.model.get("backbone", config.model)


def work_dir(name: str) -> str:
    """Where a run is, from its config's docstring or by default."""
    return f"work_dirs/{(name if name.startswith('demo/') else Path(name).name).removesuffix('.py')}"


def origin(name: str) -> str | None:
    """The config whose run leaves what this one begins with."""
    core = backbone(load(name)).get("core")
    return next((other for other in NAMES if work_dir(other) == core), core)


def arms(name: str) -> list[str]:
    """The options that a config's docstring offers, as they follow --cfg-options."""
    return re.findall(r"^    (model\.[\w.]+=\w+(?: model\.[\w.]+=\w+)*)  ", docstring(name), re.MULTILINE)


def sizes(name: str) -> list[str]:
    """The options that make another size of a config's backbone, as they follow --cfg-options in its docstring."""
    found = re.findall(
        r"^    [\w ]+  (model\.backbone\.(?:model|out_indices)=.*(?:\n {8}.*)*)", docstring(name), re.MULTILINE
    )
    return [" ".join(words.split()) for words in found]


ARMS = [(name, arm) for name in NAMES for arm in arms(name)]
PUBLISHED = [name for name in NAMES if "pretrained=True" in content(re.sub("(intermediate_)?residual", "dense", name))]
SIZES = [(name, words) for name in NAMES for words in ["", *sizes(name)] if name in PUBLISHED or words]
HALF = ["detection/atss_dyhead_swin_large_residual_coco_2x.py", "detection/mask_rcnn_swin_tiny_residual_coco_1x.py"]
RUNS = [  # what is added to the command in the docstring
    *((name, "") for name in NAMES),
    *((name, f"--cfg-options {arm}") for name, arm in ARMS),
    *((name, "--deepspeed_config ds_configs/zero2_bf16.json") for name in HALF),
]


# --- the runs ---------------------------------------------------------------------------------------------------------


def cut_down(config: Config, folder: Path) -> Config:
    """The config in a small size; its data and its core are in `folder`."""
    part = backbone(config)
    family = part.model.partition("_")[0]
    part.kwargs = {**part.get("kwargs", {}), **SMALL[family]}
    if part.kwargs.pop("pretrained", False):
        part.allow_random_core = True
    if part is config.model and family != "cvt":
        part.kwargs.img_size = SIDE  # classifiers have one size; pyramids and CvTs take any
    if family in PLAIN and "out_indices" in part:
        part.out_indices = tuple(range(SMALL[family]["depth"]))[-len(part.out_indices) :]
    if part.get("core"):
        part.core = str(folder / part.core)
    config.default_hooks.logger.interval = 1
    config.experiment_name = uuid4().hex  # or the logs of runs within a second mix
    tasks = config.model.get("tasks") or {}

    def cut(key: str, node: Any, classes: int | None, indices: Any) -> Any:
        if key in tasks:
            classes, indices = CLASSES.get(key), tasks[key].backbone.out_indices
        simple = len(part.get("strides") or ()) > len(indices)
        widths = SIMPLE if simple else [WIDTHS[family][index] for index in indices]
        if key == "kwargs":
            return node  # of a backbone, cut above
        if isinstance(node, dict):
            node = dict(node)
            if (kind := node.get("type")) in RESIZED:
                one = (SIDE, SIDE)
                node[RESIZED[kind]] = one if isinstance(node[RESIZED[kind]], tuple) else [one, one]
            if kind == "rmoe.Coco":
                named = str(folder / "data/coco/annotations/instances_val2017.json")
                node.update(type="rmoe.DetDataset", classes=named, num_classes=classes)
            if "in_channels" in node:
                level = node.get("in_index", 0)
                node["in_channels"] = widths if isinstance(node["in_channels"], list) else CHANNELS
                if isinstance(level, int) and "in_index" in node:
                    node["in_channels"] = widths[level]
            return {inner: cut(inner, value, classes, indices) for inner, value in node.items()}
        if key in ("num_classes", "num_things_classes") and classes:
            return classes
        if key == "class_weight" and classes:
            return [*node[:classes], node[-1]]
        if key in KEYS:
            return KEYS[key]
        if isinstance(node, (list, tuple)):
            return type(node)(cut("", value, classes, indices) for value in node)
        if isinstance(node, str):
            place = max((known for known in DATA if f"{node}/".startswith(f"{known}/")), key=len, default=None)
            return str(folder / f"{DATA[place]}{node.removeprefix(place)}") if place else node
        return node

    found = cut("", config.to_dict(), CLASSES.get(task(config)), part.get("out_indices", ()))
    if tasks:
        found["train_dataloader"]["batch_size"] = sum(found["train_dataloader"]["sampler"]["batch_sizes"].values())
    return Config(found, filename=config.filename)


def main(folder: Path) -> None:
    read, outcomes = launch.read_config, {}
    launch.read_config = lambda *given: cut_down(read(*given), folder)
    yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, True)  # of the logged config: half of all the time

    def run(name: str, options: str) -> None:
        if (key := f"{name} {options}") in outcomes:
            return
        if (before := origin(name)) in NAMES:
            run(before, "")
        command = re.search(r"launch/train\.py ((?:.*\\\n)*.*)", docstring(name))[1].replace("\\\n", "")
        out = str(folder / work_dir(name)) + options.replace("/", "")
        words = [*command.split(), *options.split(), "--work-dir", out]
        try:
            launch.train(launch.parser().parse_args(words))
            outcomes[key] = ""
        except (Exception, SystemExit):
            outcomes[key] = traceback.format_exc()
        gc.collect()
        gc.freeze()  # with every data set, mmengine looks for garbage

    os.chdir(ROOT)
    for name, options in json.loads((folder / "wanted.json").read_text()):
        run(name, options)
        (folder / "outcomes.json").write_text(json.dumps(outcomes))


class Runs:
    """What the runs left in `folder`."""

    def __init__(self, folder: Path, wanted: list[tuple[str, str]]) -> None:
        self.folder = folder
        render(folder / "data", SCENES)
        (folder / "wanted.json").write_text(json.dumps(wanted))
        run_processes(folder, [__file__, folder], nproc=1, timeout=850)
        self.outcomes = json.loads((folder / "outcomes.json").read_text())

    def work_dir(self, name: str, options: str) -> Path:
        return Path(str(self.folder / work_dir(name)) + options.replace("/", ""))

    def scalars(self, name: str, options: str) -> dict[str, float]:
        """The last values of everything logged."""
        (file,) = self.work_dir(name, options).glob("*/vis_data/scalars.json")
        return {key: value for line in file.read_text().splitlines() for key, value in json.loads(line).items()}

    def weights(self, name: str, options: str) -> dict[str, list[int]]:
        """Their shapes."""
        with safe_open(self.work_dir(name, options) / "model.safetensors", "pt") as file:
            keys = file.keys()
            return {key: file.get_slice(key).get_shape() for key in keys}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All runs that a selected test asks for, by one process."""
    here = [item for item in request.session.items if item.path == request.path]
    chosen = [item.callspec.params for item in here if "runs" in item.fixturenames]
    return Runs(tmp_path_factory.mktemp("configs"), [(one["name"], one["options"]) for one in chosen])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "options"), RUNS)
def test_it_trains_and_is_evaluated(runs, name, options):
    assert not (outcome := runs.outcomes[f"{name} {options}"]), outcome
    config, logged = load(name), runs.scalars(name, options)
    named = (config.model.type, config.model.get("decode_head", {}).get("type"))
    kind = next((one for one in named if one in LOSSES), task(config))
    assert LOSSES[kind] | METRICS[kind] | {"loss"} <= set(logged)
    assert all(math.isfinite(logged[key]) for key in LOSSES[kind] | {"loss"})
    mixture = bool(backbone(config).get("moe"))
    assert ("loss_moe_aux" in logged) == mixture
    weights = runs.weights(name, options)
    assert any("gate" in key for key in weights) == mixture
    assert weights.get("bbox_head.scales.0.scale") == ([] if kind == "ATSS" else None)  # DeepSpeed stumbles over it


HEADS = [  # one run of each kind of head and pyramid
    "segmentation/linear_dinov2_base_residual_ade20k_512_40k.py",
    "segmentation/mask2former_dinov2_base_dense_ade20k_512_160k.py",
    "segmentation/dpt_dinov3_base_residual_ade20k_512_160k.py",
    "detection/mask2former_swinv2_base_dense_coco_50e.py",
    "detection/mask_rcnn_eva02_base_residual_coco_1x.py",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "options"), [(name, "") for name in HEADS])
def test_a_run_of_each_head_is_loaded_and_answers(runs, name, options):
    assert not runs.outcomes[f"{name} {options}"]
    picture = np.random.default_rng(0).integers(256, size=(50, 70, 3), dtype=np.uint8)
    (answer,) = rmoe.load(runs.work_dir(name, options)).predict(picture)
    found = answer.labels if task(load(name)) == "segmentation" else answer.masks
    assert found.shape[-2:] == (50, 70)
    counts = json.loads((runs.work_dir(name, options) / "cost.json").read_text())["params_by_part"]
    if "linear" in name:
        assert {part for part, count in counts.items() if count["trained"]} == {"residual", "gate", "head"}


# --- what they say, and how they differ -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_says_how_to_run_it_and_what_to_expect(name):
    text = docstring(name)
    assert f"launch/train.py rmoe/configs/{name}" in text
    assert "--deepspeed_config ds_configs/" in text
    assert not {"strategy", "runner_type", "launcher"} & set(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_its_card_is_complete_and_begins_as_the_docstring_does(name):
    card = load(name).card
    told = {"pipeline", "published", "hardware", "full_scale"}
    assert set(card) == (told if name.startswith("demo/") else told | {"batch"})
    assert docstring(name).startswith(f"{card.pipeline}: ")


def test_a_dumped_config_is_safe_and_its_values_pass_the_checks(tmp_path):
    config = load("upstream/swin_tiny_moe_imagenet1k.py")
    config.dump(tmp_path / "config.json")
    read = read_config(tmp_path / "config.json", {"card.hardware": "a laptop"}, safe=True)
    check_values(read)
    assert read.card == config.card | {"hardware": "a laptop"}
    read.card = "prose"
    with pytest.raises(UserError, match="card is 'prose'; it takes a dict or None"):
        check_values(read)


@pytest.mark.parametrize("name", [name for name in NAMES if "_moe_" in name])
def test_upper_bounds_have_the_mixture_of_one_base(name):
    config = load(name)
    assert backbone(config).moe == load("_base_/upper_bound.py").upper_bound
    assert "upper_bound" not in config


@pytest.mark.parametrize("name", NAMES)
def test_schedules_end_with_training(name):
    config = load(name)
    assert config.param_scheduler[-1].end == config.train_cfg.max_iters
    for one, following in zip(config.param_scheduler, config.param_scheduler[1:], strict=False):
        assert one.end == following.begin


@pytest.mark.parametrize("name", NAMES)
def test_what_it_begins_with_is_what_another_config_leaves(name):
    before = origin(name)
    assert before is None or before in NAMES


@pytest.mark.parametrize(("name", "arm"), ARMS)
def test_an_arm_is_one_changed_key(name, arm):
    """Besides, fixed experts are on every process: their ep_size becomes 1."""
    changed = load(name)
    changed.merge_from_dict(
        launch.parser().parse_args([name, "--deepspeed_config", "", "--cfg-options", *arm.split()]).cfg_options
    )
    before, after = (asdict(ResidualMoEConfig.from_dict(backbone(one).moe)) for one in (load(name), changed))
    assert len({key for key in before if before[key] != after[key]} - {"ep_size"}) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if "mask2former" in name])
def test_a_mask2former_is_made_a_mixture_by_the_words_in_its_docstring(name):
    told = " ".join(docstring(name).split())
    (words,) = re.findall(r"As a mixture: --cfg-options (stage=\S+) (\S+)\. ", told)
    config = load(name)
    config.merge_from_dict(
        launch.parser().parse_args([name, "--deepspeed_config", "", "--cfg-options", *words]).cfg_options
    )
    assert ResidualMoEConfig.from_dict(backbone(config).moe) == ResidualMoEConfig(num_experts=8)
    assert config.stage == "residual"


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_core_says_whose_it_is_and_its_licence(name):
    told = " ".join(docstring(name.replace("_residual_", "_dense_")).split())
    marks = timm.models.get_pretrained_cfg(backbone(load(name)).model)
    assert {"apache-2.0": "Apache License 2.0", "mit": "MIT licence"}.get(marks.license, "DINOv3 License") in told
    mean, std = (torch.tensor(load(name).model.data_preprocessor[key]) for key in ("mean", "std"))
    torch.testing.assert_close(mean, 255 * torch.tensor(marks.mean), rtol=0, atol=1e-3)
    torch.testing.assert_close(std, 255 * torch.tensor(marks.std), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("name", "words"), SIZES)
def test_each_size_has_published_weights_and_maps_that_the_heads_take(name, words):
    config = load(name)
    options = ["--cfg-options", *words.split()] if words else []
    config.merge_from_dict(launch.parser().parse_args([name, "--deepspeed_config", "", *options]).cfg_options or {})
    part = for_one_process(config.model).backbone
    assert timm.models.get_pretrained_cfg(part.model).has_weights
    part.pop("type")
    with torch.device("meta"):
        check_maps(config.model, SimpleNamespace(backbone=TimmPyramid(**part)))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("cell", TABLE)
def test_the_papers_table(cell, pipeline):
    name = cell.format(pipeline)
    assert NAMES.count(name) == 1
    dense, config = load(cell.format("dense")).to_dict(), load(name).to_dict()
    assert config.pop("card")["pipeline"] == PIPELINES[pipeline]
    assert dense.pop("card")["pipeline"] == "Lower bound"
    assert config.pop("stage") == STAGES[PIPELINES[pipeline]]
    assert dense.pop("stage") == "dense"
    core, moe = config["model"]["backbone"].pop("core"), config["model"]["backbone"].pop("moe", None)
    dense["model"]["backbone"].pop("core")
    assert dense == config
    upstream = {"dense": "core", "moe": "moe", "residual": "core", "intermediate_residual": "intermediate"}[pipeline]
    assert f"_{upstream}_imagenet" in core
    assert (moe is None) == (pipeline == "dense")


@pytest.mark.parametrize("name", [name for name in NAMES if "residual" in name])
def test_residual_configs_differ_from_the_dense_ones_in_the_experts_alone(name):
    lower, ours = load(re.sub("(intermediate_)?residual", "dense", name)).to_dict(), load(name).to_dict()
    assert ours["model"]["backbone"].pop("moe")["num_experts"] == 8
    assert (lower.pop("stage"), ours.pop("stage")) == ("dense", "residual")
    assert lower.pop("card")["hardware"] == ours.pop("card")["hardware"]
    if "intermediate" in name:
        lower["model"]["backbone"].pop("core"), ours["model"]["backbone"].pop("core")
    assert lower == ours


def test_the_mixtures_are_those_of_their_pretraining():
    for name in NAMES:
        if (before := origin(name)) in NAMES and (theirs := backbone(load(before)).get("moe")):
            ours = backbone(load(name)).moe
            for key in ("num_experts", "top_k", "residual", "expert_init", "combine"):
                assert ours.get(key) == theirs.get(key), (name, before)


def test_the_demo_fits_the_embedded_data_set():
    core, dense = load("demo/core.py"), load("demo/dense.py")
    assert core.num_classes == SceneParams().upstream_classes
    assert dense.num_classes == len(metainfo()["classes"])
    small = dict(core.model.kwargs)
    small.pop("img_size")
    assert small == dense.model.backbone.kwargs


def test_the_published_recipe_of_upernet():
    config = load("segmentation/upernet_swin_tiny_dense_ade20k_512_160k.py")
    assert (config.optim_wrapper.optimizer.lr, config.optim_wrapper.optimizer.weight_decay) == (6e-5, 0.01)
    assert config.train_dataloader.batch_size * 8 == 16


if __name__ == "__main__":
    main(Path(sys.argv[1]))
