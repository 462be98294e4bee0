"""What a training step will cost, before anything is trained: FLOPs, memory, traffic and seconds of one process.

The model of a config is built and run, forward and backward, on tensors that have shapes and no values. What runs is
the code that trains, so the FLOPs and the live bytes are those of its own operators; what only values decide is
assumed even: every expert has equally many tokens, and no label is void. A detector, whose work hangs on what it finds,
is run for real on the CPU, on made-up images and objects; that takes its time, and shows the beginning of a training,
when few proposals are right and its mask head has less to do than later. ZeRO's shares, those of expert parallelism and
the traffic follow from sizes.

Seconds are a roofline's: each operator takes as long as its FLOPs at the reached share of the GPU's peak or as the
bytes that it moves, whichever is longer; then the optimizer and what is sent. What starts the operators, loads data and
evaluates is not counted: a step of few and small images, whose kernels end sooner than Python starts the next, takes
longer than this says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmengine.config import Config

from rmoe.engine.cost import Parameters
from rmoe.reporting.machines import GPUS, Cluster
from rmoe.reporting.traffic import BUCKET_BYTES, Message, Traffic, messages
from rmoe.reporting.work import Setting, Work, run_once

__all__ = ["Estimate", "Memory", "Seconds", "Setting", "Traffic", "estimate", "share_out"]

_ADAM_STATES = 2  # weights stay float32 under autocast; AdamW keeps two float32 of each
_ADAM_MOVES = 7  # bytes for each byte of weights: reads weight, gradient and both states, writes all but the gradient
_BANDWIDTH_SHARE = 0.8  # of a data sheet's, which a kernel that only copies reaches; a guess until it is measured
_LEAST_BACKWARD = 0.5  # of forward and backward together; with trained weights it is two thirds
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
class Seconds:
    """Seconds of one step.

    Attributes:
        compute: forward and backward.
        optimizer: AdamW's step over this process's share of the weights.
        communication: everything that is sent, were nothing else done meanwhile.
        hidden: of this, what passes while the backward pass computes.
    """

    compute: float
    optimizer: float
    communication: float
    hidden: float

    @property
    def step(self) -> float:
        """Returns the whole."""
        return self.compute + self.optimizer + self.communication - self.hidden

    @property
    def communication_share(self) -> float:
        """Returns the share of the step in which nothing is done but to send and wait."""
        return (self.communication - self.hidden) / self.step


@dataclass(frozen=True)
class Estimate:
    """Cost of one training step.

    Attributes:
        setting: what it is for, with the config's values filled in.
        cluster: what it runs on.
        flops: of one process, forward and backward; matrix products and convolutions.
        parameters: over all processes.
        memory: of one process.
        traffic: of one process.
        seconds: of all of them, which wait for one another.
    """

    setting: Setting
    cluster: Cluster
    flops: int
    parameters: Parameters
    memory: Memory
    traffic: Traffic
    seconds: Seconds


def estimate(cfg: Config, setting: Setting, cluster: Cluster | None = None) -> Estimate:
    """Returns the cost of one training step of a config.

    Args:
        cfg: of a classifier, a segmentor of mmseg or a detector of mmdet; dense cores and data sets need not be there.
        setting: how it is run.
        cluster: what it is run on; None: H100s in one node.

    Raises:
        UserError: ep_size does not fit, a size that neither the config nor the setting gives, or a model of another
            kind.
    """
    return share_out(work_of(cfg, setting), cluster)


def work_of(cfg: Config, setting: Setting) -> Work:
    """Runs the model once and leaves the random generators as they were: the first part of `estimate`."""
    with torch.random.fork_rng([]):
        return run_once(cfg, setting)


def share_out(work: Work, cluster: Cluster | None = None) -> Estimate:
    """Spreads the work over processes: the second part of `estimate`."""
    setting, ep_size = work.setting, work.setting.ep_size or 1
    cluster = cluster or Cluster(GPUS["h100"], per_node=setting.processes)
    assert cluster.processes == setting.processes
    replicas = setting.processes // ep_size  # of each expert
    experts, experts_trained = work.experts // ep_size, work.experts_trained // ep_size
    trained, part = work.shared_trained + experts_trained, work.shared_trained // setting.processes
    part += experts_trained // replicas
    arrived = work.sent_tokens + work.sent_experts if ep_size > 1 else 0
    gradients, (then, beside) = part if setting.zero == 2 else trained, work.together
    kept = gradients / max(1, work.shared_trained + work.experts_trained)
    updated = part if setting.zero else trained
    memory = Memory(
        weights=work.shared + experts,
        average=work.averaged * (work.shared + experts),
        gradients=gradients,
        optimizer=(_ADAM_STATES + 1 if setting.zero else _ADAM_STATES) * updated,
        buckets=BUCKET_BYTES * _BUCKETS[setting.zero],
        activations=work.activations + arrived,
        step=max(work.activations, round(kept * then) + beside) + arrived,
    )
    sent = messages(work)
    return Estimate(
        setting=setting,
        cluster=cluster,
        flops=work.flops,
        parameters=work.parameters,
        memory=memory,
        traffic=Traffic.of(sent),
        seconds=_seconds(work, cluster, sent, updated),
    )


def _seconds(work: Work, cluster: Cluster, sent: Sequence[Message], updated: int) -> Seconds:
    flops = cluster.share * cluster.gpu.peak(work.setting.precision)
    bandwidth = _BANDWIDTH_SHARE * cluster.gpu.bandwidth
    compute = sum(n * max(done / flops, moved / bandwidth) for (done, moved), n in work.operators.items())
    reduced = sum(one.seconds(cluster) for one in sent if one.kind == "reduce_gradients")
    return Seconds(
        compute=compute,
        optimizer=_ADAM_MOVES * updated / bandwidth,
        communication=sum(one.seconds(cluster) for one in sent),
        hidden=min(cluster.overlap * reduced, _LEAST_BACKWARD * compute),
    )
