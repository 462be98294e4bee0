"""One process of tests/distributed/test_precision.py: steps of a small model under DeepSpeed's float16 autocast.

half_precision.py OUT '{"name": {"zero": 2, "moe": {…}, …}}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from timm.layers import Mlp
from torch import Tensor, nn

from rmoe.config import ResidualMoEConfig
from rmoe.engine.checkpoint import resharding
from rmoe.engine.clipping import loss_scaler, mend_clipping
from rmoe.engine.optim import param_groups
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect
from rmoe.moe.state import global_state_dict, load_global_state_dict

WIDTH, ROWS, STEPS, CLIP, LR = 16, 8, 5, 0.1, 1.0
OVERFLOW = 2  # the step whose gradient is not finite
MOE = {"num_experts": 4, "top_k": 1, "rank": 2, "noise": 0.0, "gate_std": 1.0, "losses": {"importance": 0.1, "z": 0.01}}


def build(moe: Mapping[str, Any] | None) -> nn.Module:
    """Two networks with a norm before each, and a head; the same for every `ep_size`."""
    torch.manual_seed(0)
    networks: list[nn.Module] = [Mlp(WIDTH, 2 * WIDTH), Mlp(WIDTH, 2 * WIDTH)]
    if moe is not None:
        networks[1] = ResidualMoE(networks[1], ResidualMoEConfig.from_dict({**MOE, **moe}))
    first, second = networks
    model = nn.Sequential(nn.LayerNorm(WIDTH), first, nn.LayerNorm(WIDTH), second, nn.Linear(WIDTH, 3))
    generator = torch.Generator().manual_seed(1)
    state = global_state_dict(model)
    for key in sorted(state):
        if "deepspeed_experts" in key:
            state[key].normal_(std=0.1, generator=generator)
    load_global_state_dict(model, state)
    return model


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(ROWS, WIDTH, generator=generator), torch.randint(3, (ROWS,), generator=generator))
        for _ in range(STEPS)
    ]


def factor(step: int) -> float:
    """What the loss is multiplied by: in one step, too much for float16."""
    return 1e6 if step == OVERFLOW else 1.0


def initialize(zero: int, moe: Mapping[str, Any] | None, clip: float, steps: int, more: Mapping[str, Any]) -> Any:
    model = build(moe)
    engine, *_ = deepspeed.initialize(
        model=model,
        # Not Adam, which would hide a gradient of the wrong scale.
        optimizer=torch.optim.SGD(param_groups(model, LR, residual_lr_mult=1.0, exempt=False), lr=LR),
        config={
            "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size() // steps,
            "gradient_accumulation_steps": steps,
            "gradient_clipping": clip,
            "zero_optimization": {"stage": zero, **more},
            "torch_autocast": {"enabled": True, "dtype": "float16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
    )
    mend_clipping(engine)
    return engine


def train(
    zero: int,
    moe: Mapping[str, Any] | None = None,
    clip: float = CLIP,
    accumulation: int = 1,
    resume: int | None = None,
    grow: int | None = None,
    poison: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Trains; see the table of cases in the test.

    Args:
        zero: ZeRO stage.
        moe: of the mixture; None is dense.
        clip: what the gradient's norm is clipped to.
        accumulation: micro-batches of one step.
        resume: the ZeRO stage of a second engine, which goes on from the third step.
        grow: steps without an overflow, after which the scale doubles.
        poison: the overflow is in an expert of the last process alone.
        **more: of the JSON's zero_optimization.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    engine = initialize(zero, moe, clip, accumulation, more)
    norms, scales, own = [], [], ROWS // world // accumulation
    for step, (rows, labels) in enumerate(batches()):
        if resume is not None and step == OVERFLOW + 1:
            tensors, about = resharding.gather_tensors(engine)
            gathered: list[Any] = [None] * world
            dist.all_gather_object(gathered, tensors)
            engine = initialize(resume, moe, clip, accumulation, more)
            resharding.restore_tensors(
                engine, {key: x for one in gathered for key, x in one.items()}, json.loads(json.dumps(about))
            )
        scaler = loss_scaler(engine)
        scaler.growth_interval = grow or scaler.growth_interval
        for part in range(accumulation):
            here = slice((part * world + rank) * own, (part * world + rank + 1) * own)
            with collect() as records:
                loss = nn.functional.cross_entropy(engine(rows[here]).float(), labels[here])
            loss = loss + records.loss()
            hook = None
            if poison and step == OVERFLOW and rank == world - 1:
                expert = next(p for n, p in engine.module.named_parameters() if "deepspeed_experts" in n or "_E" in n)
                hook = expert.register_hook(lambda gradient: gradient * float("inf"))
            engine.backward(loss * (1.0 if poison else factor(step)))
            engine.step()
            if hook is not None:
                hook.remove()
        norms.append(float(engine.get_global_grad_norm()))
        scales.append(scaler.cur_scale)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=zero == 3):
        return {"norms": norms, "scales": scales, "state": global_state_dict(engine.module)}


def main() -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    for name, case in json.loads(sys.argv[2]).items():
        result = train(**case)
        torch.save(result, Path(sys.argv[1]) / f"{name}.{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
