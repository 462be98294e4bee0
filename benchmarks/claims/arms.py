"""What is trained: pipelines and the arms between them, on which tasks, how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config

from rmoe.data.emoji_scenes.textures import STUFF

SEEDS, HEADLINE_SEEDS = (0, 1, 2), (0, 1, 2, 3, 4)
HEADLINE = ("dense", "residual")
LONGER = 3  # times the steps downstream
EXPERTS: dict[str, Any] = {"num_experts": 8, "top_k": 1, "train_core": False}
# Of the backbones here, the one that learns from few images in few steps: docs/claims.md.
MODEL: dict[str, Any] = {
    "model": "cvt_13",
    "kwargs": {"_delete_": True, "embed_dims": (32, 96, 192), "depths": (1, 2, 4), "num_heads": (1, 3, 6)},
}
# The shipped upper bound, on one process.
OWN = Config.fromfile(Path(__file__).parents[2] / "rmoe/configs/_base_/upper_bound.py").upper_bound.to_dict()
OWN |= {"ep_size": 1}


@dataclass(frozen=True)
class Arm:
    """Is a way through the two stages.

    Attributes:
        upstream: the stage that it starts from, a key of `UPSTREAM`.
        moe: keys of `ResidualMoEConfig` downstream; None is dense.
        options: further dotted keys of the downstream config, and their values.
        longer: its steps as a multiple of the others'.
    """

    upstream: str
    moe: Mapping[str, Any] | None
    options: Mapping[str, Any] = field(default_factory=dict)
    longer: float = 1.0


@dataclass(frozen=True)
class Upstream:
    """Is a stage of upstream training.

    Attributes:
        moe: as of `Arm`.
        after: the stage that it starts from, if any.
        share: its steps as a part of core pretraining's.
        options: as of `Arm`, of the upstream config.
    """

    moe: Mapping[str, Any] | None = None
    after: str | None = None
    share: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)


UPSTREAM = {
    "core": Upstream(),
    "moe": Upstream(OWN),
    "core_longer": Upstream(None, "core", 0.2),
    "intermediate": Upstream(EXPERTS, "core", 0.2),
    "intermediate_short": Upstream(EXPERTS, "core", 0.05),
    "intermediate_long": Upstream(EXPERTS, "core", 0.6),
}
ARMS = {
    "dense": Arm("core", None),
    "moe": Arm("moe", OWN),
    "residual": Arm("core", EXPERTS),
    "intermediate_residual": Arm("intermediate", EXPERTS),
    "full_residual": Arm("core", EXPERTS | {"residual": "full"}),
    "core_trained": Arm("core", EXPERTS | {"train_core": True}),
    "upcycled": Arm("core", EXPERTS | {"residual": "experts"}),
    "experts_fixed": Arm("moe", OWN | {"train_residual": False}),
}
_PIPELINES = ("dense", "moe", "residual", "intermediate_residual", "full_residual")
LONG = {name: ARMS[name] for name in _PIPELINES} | {
    "straight_through": Arm("core", EXPERTS | {"combine": "straight_through"}),
    "rank_32_straight_through": Arm("core", EXPERTS | {"rank": 32, "combine": "straight_through"}),
    "no_residuals": Arm("core", EXPERTS | {"train_residual": False}),  # what freezing the cores does by itself
    "dense_core_longer": Arm("core_longer", None),  # RMoE-I's control: as many more steps upstream
}
_LR = "optim_wrapper.paramwise_cfg."
# One choice at a time, against `residual` of ARMS.
ABLATION = {
    "2 experts": Arm("core", EXPERTS | {"num_experts": 2}),
    "4 experts": Arm("core", EXPERTS | {"num_experts": 4}),
    "16 experts": Arm("core", EXPERTS | {"num_experts": 16}),
    "2 of 8": Arm("core", EXPERTS | {"top_k": 2}),
    "all blocks": Arm("core", EXPERTS | {"blocks": "all"}),
    "last two blocks": Arm("core", EXPERTS | {"blocks": "last_two"}),
    "rank 2": Arm("core", EXPERTS | {"rank": 2}),
    "rank 32": Arm("core", EXPERTS | {"rank": 32}),
    "residual lr × 3": Arm("core", EXPERTS, {f"{_LR}residual_lr_mult": 3.0}),
    "residual lr × 10": Arm("core", EXPERTS, {f"{_LR}residual_lr_mult": 10.0}),
    "gate lr × 10": Arm("core", EXPERTS, {f"{_LR}gate_lr_mult": 10.0}),
    "no decay of residuals": Arm("core", EXPERTS, {f"{_LR}residual_decay_mult": 0.0}),
    "decay of residuals × 100": Arm("core", EXPERTS, {f"{_LR}residual_decay_mult": 100.0}),
    "decay of gate × 100": Arm("core", EXPERTS, {f"{_LR}custom_keys": {".gate.": {"decay_mult": 100.0}}}),
    "no aux loss": Arm("core", EXPERTS | {"losses": {"importance": 0.0}}),
    "importance 0.05": Arm("core", EXPERTS | {"losses": {"importance": 0.05}}),
    "no noise": Arm("core", EXPERTS | {"noise": 0.0}),
    "straight-through": Arm("core", EXPERTS | {"combine": "straight_through"}),
    "intermediate": Arm("intermediate", EXPERTS),
    "intermediate × ¼": Arm("intermediate_short", EXPERTS),
    "intermediate × 3": Arm("intermediate_long", EXPERTS),
}


# Whose experts are looked into: runs (see `Key`) of the first seed, each with the run that it started from if that has
# the same experts.
ANALYSED: dict[str, tuple[tuple[str, str], tuple[str, str] | None]] = {
    "moe_upstream": (("moe", "upstream"), None),
    "moe_downstream": (("moe", "segmentation"), ("moe", "upstream")),
    "upcycled": (("upcycled", "segmentation"), None),
    "residual": (("residual", "segmentation"), None),
    "full_residual": (("full_residual", "segmentation"), None),
    "rank_32_straight_through": (("rank_32_straight_through", "segmentation"), None),
    "intermediate_residual": (("intermediate_residual", "segmentation"), ("intermediate", "upstream")),
}
# By the name of a part's files: the folder for that, and which of them. Upstream stages are the same in both.
INSIDE: dict[str, tuple[str, tuple[str, ...]]] = {
    "claims": ("experts", tuple(ANALYSED)),
    "long": ("experts_long", tuple(name for name, ((_, where), _) in ANALYSED.items() if where != "upstream")),
}


@dataclass(frozen=True)
class Task:
    """Is a downstream task.

    Attributes:
        base: its dense config, in `BASES`.
        stuff: classes besides the scenes' categories of things.
        options: dotted keys, and their values, that fit the config to `MODEL` and the data.
    """

    base: str
    stuff: int
    options: Mapping[str, Any]


CATEGORIES = 8  # of things
TASKS = {
    "segmentation": Task(
        "dense.py",
        len(STUFF),
        {
            "model.backbone.out_indices": (0, 1, 2),
            "model.decode_head.in_channels": [32, 96, 192],
            "model.decode_head.in_index": [0, 1, 2],
            "model.decode_head.loss_decode.class_weight": [0.5] * len(STUFF) + [2.0] * CATEGORIES,
        },
    ),
    "detection": Task(
        "detection_dense.py",
        0,
        {"model.backbone.out_indices": (1, 2), "model.neck.in_channels": [96, 192]},
    ),
}


@dataclass(frozen=True)
class Size:
    """Says how much is trained on what.

    Attributes:
        pictures, scenes: words of `rmoe data scenes`, for the set that cores are trained on and for the tasks' set.
        upstream_steps: of core pretraining.
        steps: of a downstream task.
        batch: images of a step, by task and "upstream"; one process.
        seeds: of all arms.
        headline_seeds: of `HEADLINE`.
        arms, tasks: which of them.
        width: channels of the backbone, as a multiple of `MODEL`'s.
        label: ends the names of what is made of other scenes than a folder's usual ones.
    """

    pictures: Mapping[str, str]
    scenes: Mapping[str, str]
    upstream_steps: int
    steps: Mapping[str, int]
    batch: Mapping[str, int]
    seeds: tuple[int, ...] = SEEDS
    headline_seeds: tuple[int, ...] = HEADLINE_SEEDS
    arms: tuple[str, ...] = tuple(ARMS)
    tasks: tuple[str, ...] = tuple(TASKS)
    width: float = 1.0
    label: str = ""

    def model(self, task: str | None = None) -> dict[str, Any]:
        """Returns the options that make a config's model `MODEL`, of this width: a task's, or those of a core."""
        given = {f"model.{'backbone.' * (task is not None)}{key}": value for key, value in MODEL.items()}
        if task is not None:
            given |= TASKS[task].options
        return {key: _widened(key, value, self.width) for key, value in given.items()}


def _widened(key: str, value: Any, width: float) -> Any:
    if key.endswith(".kwargs"):
        return {**value, "embed_dims": tuple(round(width * one) for one in value["embed_dims"])}
    return [round(width * one) for one in value] if key.endswith(".in_channels") else value


FULL = Size(
    pictures={"scenes-train": "1", "scenes-val": "1"},
    scenes={
        "styles": "plain,night",
        "categories": str(CATEGORIES),
        "scenes-train": "2000",
        "upstream-train": "1",
        "upstream-val": "1",
    },
    upstream_steps=800,
    steps={"segmentation": 400, "detection": 400},
    batch={"upstream": 64, "segmentation": 8, "detection": 4},
)
_TINY = {
    "size": "64",
    "upstream-size": "32",
    "upstream-train": "2",
    "upstream-val": "1",
    "scenes-train": "8",
    "scenes-val": "2",
    "categories": str(CATEGORIES),
}
QUICK = Size(
    pictures=_TINY,
    scenes=_TINY,
    upstream_steps=2,
    steps={"segmentation": 2, "detection": 2},
    batch={"upstream": 8, "segmentation": 2, "detection": 2},
    seeds=(0, 1),
    headline_seeds=(0, 1),
    arms=("dense", "residual", "moe"),
    tasks=("segmentation",),
)


def portion(part: str | None, size: Size) -> tuple[str, Size, Mapping[str, Arm]]:
    """Returns what a part of this benchmark runs: the name of its files, how much of what, and the arms."""
    if part == "long":
        steps = {"segmentation": LONGER * size.steps["segmentation"]}
        return "long", replace(size, tasks=("segmentation",), steps=steps, headline_seeds=size.seeds), LONG
    headline = {name: ARMS[name] for name in HEADLINE}
    if part == "ablation":
        return "ablation", replace(size, tasks=("segmentation",), headline_seeds=size.seeds), headline | ABLATION
    if part == "again":
        return "claims_again", replace(size, seeds=size.seeds[:1], headline_seeds=size.seeds[:1]), headline
    return "claims", size, {name: ARMS[name] for name in size.arms}
