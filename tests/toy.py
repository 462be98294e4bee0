"""A run small enough for tests: sets of tokens of different sizes, a two-block network, a metric that counts.

Configs import it by `custom_imports`, in processes of their own too.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.structures import BaseDataElement
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.utils.data import Dataset

from rmoe.config import ResidualMoEConfig
from rmoe.engine.checkpoint import files
from rmoe.moe.layer import ResidualMoE

WIDTH = 8
# A mixture without noise: what it computes does not depend on the number of processes.
TOP_1: dict[str, Any] = {
    "num_experts": 4,
    "top_k": 1,
    "train_core": False,
    "rank": 2,
    "noise": 0.0,
    "losses": {"importance": 0.01, "z": 0.001},
}


@DATASETS.register_module()
class ToyTokens(Dataset):
    """Sample i is a set of 6 to 9 tokens; `noise` is an augmentation that draws from all three generators."""

    metainfo: ClassVar = {"classes": ("small", "large")}

    def __init__(self, length: int = 12, noise: float = 0.0, poison: int | None = None) -> None:
        self.length, self.noise, self.poison = length, noise, poison

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.randn(6 + index % 4, WIDTH, generator=torch.Generator().manual_seed(index))
        label = int(tokens.mean() > 0)
        drawn = torch.randn(()).item() + float(np.random.randn()) + random.gauss(0, 1)
        if self.poison == index:
            tokens = tokens * float("nan")
        return {
            "inputs": tokens + self.noise * drawn,
            "data_samples": BaseDataElement(metainfo={"label": label, "index": index}),
        }


class Block(nn.Module):
    def __init__(self, moe: Mapping[str, Any] | None, drop_path: float) -> None:
        super().__init__()
        self.norm, self.drop_path = nn.LayerNorm(WIDTH), DropPath(drop_path)
        self.mlp: nn.Module = Mlp(WIDTH, 2 * WIDTH)
        if moe is not None:
            self.mlp = ResidualMoE(self.mlp, ResidualMoEConfig.from_dict(moe))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)))


@MODELS.register_module()
class ToyModel(BaseModel):
    """Classifies a set of tokens by their mean; the embedding is frozen."""

    def __init__(
        self, moe: Mapping[str, Any] | None = None, drop_path: float = 0.0, blocks: int = 2, norm: bool = False
    ) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block(moe, drop_path) for _ in range(blocks)))
        self.head = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2)) if norm else nn.Linear(WIDTH, 2)
        self.backbone[0].requires_grad_(False)

    def forward(self, inputs: list[Tensor], data_samples: list[BaseDataElement], mode: str = "loss") -> Any:
        sizes = [len(x) for x in inputs]
        tokens = self.backbone(torch.cat(inputs)).split(sizes)
        logits = self.head(torch.stack([x.mean(0) for x in tokens]))
        if mode == "loss":
            labels = torch.tensor([sample.label for sample in data_samples], device=logits.device)
            return {"loss_cls": F.cross_entropy(logits.float(), labels)}
        guesses = logits.argmax(1).tolist()
        for sample, guess in zip(data_samples, guesses, strict=True):
            sample.set_metainfo({"guess": guess})
        return data_samples


@METRICS.register_module()
class ToyMetric(BaseMetric):
    """Share of right answers, and how many samples were judged."""

    def process(self, data_batch: Any, data_samples: list[dict[str, Any]]) -> None:
        self.results += [(sample["index"], sample["guess"] == sample["label"]) for sample in data_samples]

    def compute_metrics(self, results: list[tuple[int, bool]]) -> dict[str, float]:
        assert sorted(index for index, _ in results) == sorted({index for index, _ in results})
        return {"accuracy": sum(right for _, right in results) / len(results), "count": float(len(results))}


CONFIG = """
custom_imports = dict(imports=["toy"], allow_failed_imports=False)
stage = "residual"
model = dict(type="ToyModel", drop_path=0.2)
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(type="ToyTokens", length=12, noise=0.1))
val_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="ToyTokens", length=7))
val_evaluator = dict(type="ToyMetric")
val_cfg = dict(type="ValLoop")
train_cfg = dict(type="IterBasedTrainLoop", max_iters=6, val_interval=3)
optim_wrapper = dict(
    optimizer=dict(type="AdamW", lr=1e-2, weight_decay=0.05), clip_grad=dict(max_norm=0.5),
    constructor="rmoe.ParamGroups")
param_scheduler = [dict(type="PolyLR", eta_min=0.0, power=0.9, begin=0, end=6, by_epoch=False)]
default_hooks = dict(
    checkpoint=dict(type="CheckpointHook", interval=2, by_epoch=False, max_keep_ckpts=2, save_best="accuracy"),
    logger=dict(type="LoggerHook", interval=1, log_metric_by_epoch=False))
randomness = dict(seed=3)
"""


def write_config(path: Path, options: Mapping[str, Any] | None = None) -> Path:
    """The toy config at `path`, with `options` (dotted keys) set in it."""
    path.write_text(CONFIG)
    if options:
        cfg = Config.fromfile(path, import_custom_modules=False)
        cfg.merge_from_dict(dict(options))
        cfg.dump(path)
    return path


def write_json(path: Path, stage: int = 0, **keys: Any) -> Path:
    """A DeepSpeed JSON at `path`; `keys` win. At stage 3 parameters of any size are split, not only large ones."""
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    content = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero} | keys
    path.write_text(json.dumps(content))
    return path


class ResaveHook(Hook):
    """Saves once more what has just been resumed."""

    def before_train(self, runner: Any) -> None:
        if runner.iter:
            meta = {"epoch": runner.epoch, "iter": runner.iter}
            runner.save_checkpoint(runner.work_dir, f"again_{runner.iter}", meta=meta)


class FullDiskHook(Hook):
    """From iteration `at` on, no file of the process `rank` can have more than a kilobyte."""

    def __init__(self, at: int, rank: int) -> None:
        self.at, self.rank = at, rank

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter == self.at and get_rank() == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))

    def at_end(self, runner: Any) -> None:
        """Called at the end, whatever that was."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


class KillHook(Hook):
    """Ends the process as SIGKILL does: at the end of iteration `at`, or while its checkpoint is being written."""

    priority = "LOWEST"

    def __init__(self, at: int, while_saving: bool = False) -> None:
        self.at, self.while_saving = at, while_saving

    def before_train(self, runner: Any) -> None:
        if self.while_saving:
            write_marker = files.write_marker

            def kill_or_write(path: Path, iteration: int, *rest: Any) -> None:
                self.kill(iteration)
                write_marker(path, iteration, *rest)

            files.write_marker = kill_or_write

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self.while_saving:
            self.kill(runner.iter + 1)

    def kill(self, iteration: int) -> None:
        if iteration == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
