"""What a training step sends: a mode that sees each collective of this process, and a hook that writes them down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """Notes name and number format of every collective that this thread begins inside, whoever asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sent = next(x for x in tree_leaves(args) if isinstance(x, Tensor))
            self.seen.append(f"{func.__name__.partition('.')[0].strip('_')} {sent.dtype}".replace("torch.", ""))
        return func(*args, **(kwargs or {}))


class CollectivesHook(Hook):
    """Writes `collectives.json`: of each training step, from its batch to the updated weights, what was sent."""

    def before_train(self, runner: Any) -> None:
        self.steps: list[list[str]] = []
        train_step = runner.model.train_step

        def counted(*args: Any, **kwargs: Any) -> Any:
            with Collectives() as seen:
                result = train_step(*args, **kwargs)
            self.steps.append(seen.seen)
            return result

        runner.model.train_step = counted

    def after_train(self, runner: Any) -> None:
        if is_main_process():
            Path(runner.work_dir, "collectives.json").write_text(json.dumps(self.steps))
