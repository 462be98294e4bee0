"""One process of tests/distributed/test_calibrate.py: calibrates on its share of the batches, gates to a file.

calibrate_gates.py OUT '{"name": {"ep_size": 2, …}, …}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from place import dense

import rmoe

BATCHES, IMAGES = 3, 8


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(IMAGES, 3, 16, 16, generator=generator) for _ in range(BATCHES)]
    for name, moe in json.loads(sys.argv[2]).items():
        values = {"num_experts": 4, "rank": 2, "blocks": "all", **moe}
        model, _ = rmoe.upcycle(dense(), rmoe.ResidualMoEConfig.from_dict(values))
        found = rmoe.calibrate(
            model, [batch[rank::world] for batch in batches], rmoe.Calibration(tokens_per_expert=30), seed=5
        )
        gates = {key: x for key, x in model.state_dict().items() if ".gate." in key}
        gathered: list[object] = [None] * world
        dist.all_gather_object(gathered, ({key: x.tolist() for key, x in gates.items()}, found))
        assert all(one == gathered[0] for one in gathered)
        if rank == 0:
            torch.save(gates, Path(sys.argv[1]) / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
