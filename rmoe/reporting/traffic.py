"""What the processes of a training send one another in a step: collectives, their bytes, and the seconds they take.

Bytes are those of ring algorithms: of S bytes over P processes each sends (P - 1)/P · S in an all-gather or a
reduce-scatter, twice that in an all-reduce. A ring is as fast as its slowest hop, so

    seconds = bytes / min(GPU to GPU in a node, link of a node ÷ rings that share it) + calls · latency.

DeepSpeed reduces gradients by all-reduce at every ZeRO stage of 0 to 2, and gathers the updated weights from stage 1
on. Frozen parameters send nothing. What the gates' losses, the logged loss and the gradient's norm send is a few
hundred bytes, but each is one call more, which has its latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil, log2
from typing import Literal

from rmoe.reporting.machines import Cluster, Place
from rmoe.reporting.work import Work

BUCKET_BYTES = 4 * 50_000_000  # of reduce_bucket_size elements, as ds_configs/ have it; DeepSpeed's default is 5e8
# Seconds of a call: before anything moves, and for each doubling of the processes in a node and of the nodes. NCCL
# chooses among its algorithms by such a table (src/graph/tuning.cc, protocol "Simple": 8.4, 3.4 and 14 microseconds).
LATENCY, LATENCY_INSIDE, LATENCY_BETWEEN = 8.4e-6, 3.4e-6, 14e-6
_SMALL_CALLS = 2  # the logged loss and the gradient's norm
_TOKEN_CALLS = 5  # counts, rows to their experts and back; and both again backward
_WEIGHT_CALLS = 2  # an all-gather; a reduce-scatter backward

Kind = Literal["all_to_all", "gather_experts", "reduce_gradients", "gather_weights", "small"]


@dataclass(frozen=True)
class Message:
    """Is what one process sends in a step by one kind of collective over one group.

    Attributes:
        kind: as the attributes of `Traffic` are called; `small` is in none of them.
        sent: bytes.
        calls: collectives.
        processes: of the group.
        apart: ranks from one of the group to the next.
    """

    kind: Kind
    sent: float
    calls: int
    processes: int
    apart: int

    def seconds(self, cluster: Cluster) -> float:
        """Returns how long it takes, were nothing else done meanwhile."""
        if self.processes == 1:
            return 0.0
        place = cluster.place(self.processes, self.apart)
        hops = LATENCY + LATENCY_INSIDE * ceil(log2(place.inside))
        hops += LATENCY_BETWEEN * ceil(log2(place.size / place.inside))
        return self._moving(place, cluster) + self.calls * hops

    def _moving(self, place: Place, cluster: Cluster) -> float:
        leaves = place.inside < place.size
        if self.kind == "all_to_all":  # to each other process as much
            away = self.sent * (place.size - place.inside) / (place.size - 1)
            return max((self.sent - away) / cluster.gpu.peers, away * cluster.per_node / cluster.link)
        inside = self.sent / cluster.gpu.peers if place.inside > 1 else 0.0
        return max(inside, place.sharing * self.sent / cluster.link if leaves else 0.0)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a step.

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

    @classmethod
    def of(cls, sent: Sequence[Message]) -> Traffic:
        """Returns the sums of the messages of a step."""
        kinds = cls.__dataclass_fields__
        return cls(**{kind: round(sum(one.sent for one in sent if one.kind == kind)) for kind in kinds})

    @property
    def total(self) -> int:
        """Returns the sum."""
        return sum(asdict(self).values())


def messages(work: Work) -> list[Message]:
    """Returns everything that one process sends in a step of its `work`, in as many processes as its setting says."""
    setting, ep_size = work.setting, work.setting.ep_size or 1
    everyone, replicas = setting.processes, setting.processes // ep_size
    if everyone == 1:
        return []
    found = [Message("small", 0.0, _SMALL_CALLS + (work.layers > 0), everyone, 1)]
    # What every process has, then the experts that it holds.
    experts = work.experts_trained // ep_size
    for reduced, updated, processes, apart in (
        (work.shared_reduced, work.shared_trained, everyone, 1),
        (experts, experts, replicas, ep_size),
    ):
        if updated and processes > 1:
            sent = others(processes) * reduced
            found.append(Message("reduce_gradients", 2 * sent, ceil(reduced / BUCKET_BYTES), processes, apart))
            if setting.zero:
                found.append(Message("gather_weights", others(processes) * updated, 1, processes, apart))
    if ep_size > 1 and work.sent_tokens:
        sent = 4 * others(ep_size) * work.sent_tokens
        found.append(Message("all_to_all", sent, _TOKEN_CALLS * work.layers, ep_size, 1))
    if ep_size > 1 and work.sent_experts:
        sent = 2 * others(ep_size) * work.sent_experts
        found.append(Message("gather_experts", sent, _WEIGHT_CALLS * work.layers, ep_size, 1))
    return found


def others(processes: int) -> float:
    """Returns the share of a tensor that belongs to other processes than this one."""
    return (processes - 1) / processes
