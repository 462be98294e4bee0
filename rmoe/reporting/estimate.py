"""What a training step will cost, before anything is trained: FLOPs, memory and traffic of one process.

The model of a config is built and run, forward and backward, on tensors that have shapes and no values. What runs is
the code that trains, so the FLOPs and the live bytes are those of its own operators; what only values decide is
assumed even: every expert has equally many tokens, and no label is void. A detector, whose work hangs on what it finds,
is run for real on the CPU, on made-up images and objects; that takes its time, and shows the beginning of a training,
when few proposals are right and its mask head has less to do than later. ZeRO's shares, those of expert parallelism and
the traffic follow from sizes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from mmengine.config import Config

from rmoe.engine.cost import Parameters
from rmoe.reporting.work import Setting, Work, run_once

__all__ = ["Estimate", "Memory", "Setting", "Traffic", "estimate", "share_out"]

_ADAM_STATES = 2  # weights stay float32 under autocast; AdamW keeps two float32 of each
_BUCKET_BYTES = 4 * 50_000_000  # of reduce_bucket_size elements, as ds_configs/ have it; DeepSpeed's default is 5e8
_BUCKETS = (0, 1, 2)  # by ZeRO stage; where one is reduced while the other is filled (overlap_comm), two


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        weights: parameters and buffers.
        average: their moving average, where the config has an `rmoe.EMAHook`.
        gradients: of parameters, in this process's share from stage 2 on.
        optimizer: AdamW's states and, from ZeRO stage 1 on, DeepSpeed's second copy of the weights they belong to.
        buckets: DeepSpeed's buffers to reduce gradients from, as large and as many as ds_configs/ say. They are
            reserved as a whole on a GPU; on a CPU only what is used becomes resident.
        activations: most bytes of other tensors that are alive at once in forward and backward.
        step: most bytes of gradients and activations together: the former come while the latter go. Where gradients
            accumulate over several batches, it is the sum of both instead.
    """

    weights: int
    average: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    step: int

    @property
    def total(self) -> int:
        """Returns the most bytes at once."""
        return self.weights + self.average + self.optimizer + self.buckets + self.step


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a step, by ring algorithms.

    Attributes:
        all_to_all: tokens to their experts and back, and so their gradients.
        gather_experts: experts to the tokens, and their gradients back.
        reduce_gradients: all-reduce over the processes that share a parameter.
        gather_weights: updated weights, from ZeRO stage 1 on.
    """

    all_to_all: int
    gather_experts: int
    reduce_gradients: int
    gather_weights: int

    @property
    def total(self) -> int:
        """Returns the sum."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Estimate:
    """Cost of one training step.

    Attributes:
        setting: what it is for, with the config's values filled in.
        flops: of one process, forward and backward; matrix products and convolutions.
        parameters: over all processes.
        memory: of one process.
        traffic: of one process.
    """

    setting: Setting
    flops: int
    parameters: Parameters
    memory: Memory
    traffic: Traffic

    def __str__(self) -> str:
        s, m, t = self.setting, self.memory, self.traffic
        height, width = s.image_size or (0, 0)
        rows = [
            ("images", f"{s.micro_batch} of {height} × {width} on each of {s.processes} processes, {s.precision}"),
            ("experts", f"spread over {s.ep_size} processes; ZeRO stage {s.zero}"),
            ("parameters", "{:,} total, {:,} active, {:,} trainable".format(*asdict(self.parameters).values())),
            ("FLOPs", f"{self.flops:.4g} in each process and step"),
            *((f"memory: {name}", _megabytes(value)) for name, value in asdict(m).items()),
            ("memory: total", _megabytes(m.total)),
            *((f"sent: {name.replace('_', ' ')}", _megabytes(value)) for name, value in asdict(t).items()),
            ("sent: total", _megabytes(t.total)),
        ]
        return "\n".join(f"{name:<24} {value:>16}" if "MB" in value else f"{name:<24} {value}" for name, value in rows)


def estimate(cfg: Config, setting: Setting) -> Estimate:
    """Returns the cost of one training step of a config.

    Args:
        cfg: of a classifier, a segmentor of mmseg or a detector of mmdet; dense cores and data sets need not be there.
        setting: how it is run.

    Raises:
        UserError: ep_size does not fit, a size that neither the config nor the setting gives, or a model of another
            kind.
    """
    with torch.random.fork_rng([]):
        return share_out(run_once(cfg, setting))


def share_out(work: Work) -> Estimate:
    """Spreads the work over processes: the second part of `estimate`."""
    setting, ep_size = work.setting, work.setting.ep_size or 1
    replicas = setting.processes // ep_size  # of each expert
    experts, experts_trained = work.experts // ep_size, work.experts_trained // ep_size
    trained, part = work.shared_trained + experts_trained, work.shared_trained // setting.processes
    part += experts_trained // replicas
    once = round(_others(setting.processes) * work.shared_trained + _others(replicas) * experts_trained)
    arrived = work.sent_tokens + work.sent_experts if ep_size > 1 else 0
    gradients, (then, beside) = part if setting.zero == 2 else trained, work.together
    kept = gradients / max(1, work.shared_trained + work.experts_trained)
    memory = Memory(
        weights=work.shared + experts,
        average=work.averaged * (work.shared + experts),
        gradients=gradients,
        optimizer=(_ADAM_STATES + 1) * part if setting.zero else _ADAM_STATES * trained,
        buckets=_BUCKET_BYTES * _BUCKETS[setting.zero],
        activations=work.activations + arrived,
        step=max(work.activations, round(kept * then) + beside) + arrived,
    )
    traffic = Traffic(
        all_to_all=round(4 * _others(ep_size) * work.sent_tokens),
        gather_experts=round(2 * _others(ep_size) * work.sent_experts),
        reduce_gradients=2 * once,
        gather_weights=once if setting.zero else 0,
    )
    return Estimate(setting, work.flops, work.parameters, memory, traffic)


def _others(processes: int) -> float:
    """Returns the share of a tensor that belongs to other processes than this one."""
    return (processes - 1) / processes


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
