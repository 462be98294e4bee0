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
from rmoe.moe.state import moe_layers

BATCHES, IMAGES = 3, 8


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    world, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(IMAGES, 3, 16, 16, generator=generator) for _ in range(BATCHES)]
    for name, moe in json.loads(sys.argv[2]).items():
        subspaces = moe.pop("subspaces", False)
        values = {"num_experts": 4, "top_k": 1, "train_core": False, "rank": 2, "blocks": "all", **moe}
        model, _ = rmoe.upcycle(dense(gated=False), rmoe.ResidualMoEConfig.from_dict(values))
        how = rmoe.Calibration(tokens_per_expert=30, subspaces=subspaces)
        found = rmoe.calibrate(model, [batch[rank::world] for batch in batches], how, seed=5)
        layers = moe_layers(model)
        gates = {key: x for key, x in model.state_dict().items() if ".gate." in key}
        if subspaces:
            gates |= {f"{name}.{key}": x for name, one in layers.items() for key, x in one.every_parameter().items()}
        gathered: list[object] = [None] * world
        dist.all_gather_object(gathered, ({key: x.tolist() for key, x in gates.items()}, found))
        assert all(one == gathered[0] for one in gathered)
        if rank == 0:
            torch.save(gates, Path(sys.argv[1]) / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
