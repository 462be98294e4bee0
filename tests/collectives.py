"""What a training step sends: a mode that sees each collective of this process, and a hook that writes them down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.scaling import Collectives


class Formats(Collectives):
    """Notes name and number format of every collective, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def note(self, name: str, func: Any, args: Sequence[Any]) -> None:
        sent = next(x for x in tree_leaves(args) if isinstance(x, Tensor))
        self.seen.append(f"{name} {sent.dtype}".replace("torch.", ""))


class CollectivesHook(Hook):
    """Writes `collectives.json`: of each training step, from its batch to the updated weights, what was sent."""

    def before_train(self, runner: Any) -> None:
        self.steps: list[list[str]] = []
        train_step = runner.model.train_step

        def counted(*args: Any, **kwargs: Any) -> Any:
            with Formats() as seen:
                result = train_step(*args, **kwargs)
            self.steps.append(seen.seen)
            return result

        runner.model.train_step = counted

    def after_train(self, runner: Any) -> None:
        if is_main_process():
            Path(runner.work_dir, "collectives.json").write_text(json.dumps(self.steps))
