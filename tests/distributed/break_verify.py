"""`rmoe.engine.verify` on two processes: as it is, and with something broken on purpose; what failed goes to a file.

break_verify.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor, nn

from rmoe.engine import clipping, launch, verify
from rmoe.engine.checkpoint import resharding


def local_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Of the experts of this process only."""
    return torch.stack([p.grad.norm() for p in parameters]).norm()


BREAKAGES = {
    "nothing": {},
    "clip norm": {"target": clipping, "attribute": "global_grad_norm", "new": local_norm},
    "checkpoint": {"target": resharding, "attribute": "_load_states", "new": lambda *given: None},
    "frozen": {"target": verify, "attribute": "_MOE", "new": {**verify._MOE, "train_core": True}},
    "one process": {
        "target": groups,
        "attribute": "_get_expert_parallel_group",
        "new": groups._get_expert_data_parallel_group,
    },
}


def main(out: Path) -> None:
    launch.join(60)
    failed = {}
    for name, breakage in BREAKAGES.items():
        if name == "one process" and dist.get_rank() == 0:
            breakage = {}
        with patch.object(**breakage) if breakage else patch.object(verify, "STAGES", verify.STAGES):
            failed[name] = {one.name: one.figure for one in verify.run(out / "work") if not one.passed}
    (out / f"failed.{dist.get_rank()}").write_text(json.dumps(failed))
    with patch.object(verify, "TOLERANCE", -1.0):
        sys.exit(verify.main(["--work-dir", str(out / "work")]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
