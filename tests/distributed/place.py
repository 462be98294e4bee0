"""One process of tests/distributed/test_placement.py: three steps of a small model under DeepSpeed, results to a file.

place.py OUT '{"zero": 2, "moe": {…}, "clip": 0.5}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.layers import SwiGLU
from torch import nn

import rmoe
from rmoe.backbones.build import add_weights
from rmoe.engine.clipping import mend_clipping
from rmoe.moe.records import collect
from rmoe.moe.state import global_state_dict, local_experts, moe_layers

IMAGES, STEPS = 8, 3


def dense(gated: bool) -> nn.Module:
    """A Swin, whose feed-forward networks may be gated, with a norm inside."""
    torch.manual_seed(0)
    model: Any = timm.create_model(
        "swin_tiny_patch4_window7_224",
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 2),
        window_size=2,
        img_size=16,
        drop_path_rate=0.0,
        num_classes=3,
    )
    for layer in model.layers if gated else ():
        for block in layer.blocks:
            width = block.mlp.fc1.in_features
            block.mlp = SwiGLU(width, 2 * width, norm_layer=nn.LayerNorm)
    return model


def build(moe: dict[str, Any], folder: Path, gated: bool) -> nn.Module:
    """Carried over from the checkpoint of a mixture whose residuals are as if trained, all experts in one process."""
    moe = {"num_experts": 4, "top_k": 1, "train_core": False, "noise": 0.0, "gate_std": 1.0, **moe}
    model, _ = rmoe.upcycle(dense(gated), rmoe.ResidualMoEConfig.from_dict({**moe, "ep_size": 1}))
    generator = torch.Generator().manual_seed(1)
    for layer in moe_layers(model).values():
        for parameter in layer.deepspeed_moe.parameters():
            parameter.data.normal_(std=0.3, generator=generator)
    path = folder / f"start_{dist.get_world_size()}_{dist.get_rank()}.safetensors"
    save_file({key: x.contiguous() for key, x in global_state_dict(model).items()}, path)
    add_weights(spread := dense(gated), str(path), moe)
    return spread


def train(zero: int, moe: dict[str, Any], clip: float, folder: Path, gated: bool = False) -> dict[str, Any]:
    world, rank = dist.get_world_size(), dist.get_rank()
    model = build(moe, folder, gated)
    parameters = {"name": "all", "params": [p for p in model.parameters() if p.requires_grad]}
    groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(parameters)
    engine, *_ = deepspeed.initialize(
        model=model,
        # Not Adam, which would hide a gradient of the wrong scale.
        optimizer=torch.optim.SGD(groups, lr=0.3, momentum=0.9),
        config={
            "train_micro_batch_size_per_gpu": IMAGES // world,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    mend_clipping(engine)
    generator = torch.Generator().manual_seed(2)
    losses, norms = [], []
    for _ in range(STEPS):
        images = torch.randn(IMAGES, 3, 16, 16, generator=generator)
        labels = torch.randint(3, (IMAGES,), generator=generator)
        own = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
        with collect() as records:
            loss = nn.functional.cross_entropy(engine(images[own]), labels[own])
        loss = loss + records.loss()
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss.detach_())
        losses.append(loss.item() / world)
        norms.append(float(engine.get_global_grad_norm()))
    # Evaluation: as many batches as there are ranks after this one, so any communication would hang.
    engine.eval()
    with whole(engine), local_experts(engine.module), torch.no_grad():
        for _ in range(1 + rank):
            logits = engine.module(images[:2])
        state = global_state_dict(engine.module)
    return {"losses": losses, "norms": norms, "logits": logits, "state": state}


def whole(engine: Any) -> Any:
    """Makes parameters whole that ZeRO 3 has split."""
    split = engine.zero_optimization_partition_weights()
    return deepspeed.zero.GatheredParameters([*engine.module.parameters()], enabled=split)


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    for name, case in json.loads(sys.argv[2]).items():
        result = train(**case, folder=Path(sys.argv[1]))
        if dist.get_rank() == 0:
            torch.save(result, Path(sys.argv[1]) / f"{name}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
