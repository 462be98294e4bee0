"""What a training runs on: GPUs as their data sheets describe them, and how many of them are joined by what.

Sources, NVIDIA's own: the data sheets of A100 80GB (2021), H100 (2023), H200 (2023), HGX B200 (2025, an eighth of the
board's figures) and L40S (2023), and the Ada GPU architecture white paper, appendix A, for the RTX 4090. FLOP/s are
those without sparsity, with sums in float32; GPUs are those with NVLink (SXM) where there are several kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, isfinite

from rmoe.errors import UserError, nearest


@dataclass(frozen=True)
class Gpu:
    """Describes one GPU.

    Attributes:
        half: FLOP/s of matrix products in bfloat16 and float16.
        tf32: FLOP/s of those in float32, which torch computes in TF32 where rmoe trains.
        bandwidth: bytes/s of its own memory.
        memory: bytes of its own memory.
        peers: bytes/s that it sends to the other GPUs of its node, one way: half of what a data sheet says of NVLink
            or, where there is none, of PCIe.
        watts: of the board.
    """

    half: float
    tf32: float
    bandwidth: float
    memory: float
    peers: float
    watts: float

    def peak(self, precision: str) -> float:
        """Returns the FLOP/s of matrix products in a `Precision`."""
        return self.tf32 if precision == "float32" else self.half


GPUS = {
    "a100": Gpu(half=312e12, tf32=156e12, bandwidth=2.039e12, memory=80e9, peers=300e9, watts=400),
    "h100": Gpu(half=989e12, tf32=494e12, bandwidth=3.35e12, memory=80e9, peers=450e9, watts=700),
    "h200": Gpu(half=989e12, tf32=494e12, bandwidth=4.8e12, memory=141e9, peers=450e9, watts=700),
    "b200": Gpu(half=2250e12, tf32=1100e12, bandwidth=7.7e12, memory=180e9, peers=900e9, watts=1000),
    "l40s": Gpu(half=362e12, tf32=183e12, bandwidth=0.864e12, memory=48e9, peers=32e9, watts=350),
    "rtx4090": Gpu(half=165.2e12, tf32=82.6e12, bandwidth=1.008e12, memory=24e9, peers=32e9, watts=450),
}


def find_gpu(name: str) -> Gpu:
    """Returns the GPU of that name.

    Raises:
        UserError: there is none in the table.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu is {name!r}{nearest(name.lower(), GPUS)}")
    return GPUS[name.lower()]


@dataclass(frozen=True)
class Place:
    """Says how a group of processes lies on the nodes.

    Attributes:
        size: processes of the group.
        inside: of these, those on one node.
        sharing: groups like it that share the link of a node.
    """

    size: int
    inside: int
    sharing: int


@dataclass(frozen=True)
class Cluster:
    """Describes what a training runs on, and how well it is used.

    Attributes:
        gpu: every one of them.
        nodes: machines.
        per_node: GPUs of each.
        link: bytes/s that a node sends to the others, one way, all its network cards together.
        share: of the GPU's peak that matrix products reach, 0 to 1. The default is a guess until it is measured.
        overlap: share of the gradients' reduction that passes while the backward pass computes, 0 to 1. With 0 nothing
            does, which bounds the time from above.
    """

    gpu: Gpu
    nodes: int = 1
    per_node: int = 1
    link: float = 50e9
    share: float = 0.4
    overlap: float = 0.0

    def __post_init__(self) -> None:
        for name, value, most in (("link", self.link, None), ("share", self.share, 1.0)):
            if not (isfinite(value) and value > 0 and (most is None or value <= most)):
                limit = "a positive number of GB/s" if most is None else "more than 0 and at most 1"
                raise UserError(f"--{name} is {value / 1e9 if most is None else value:g}; it is {limit}")
        if not 0 <= self.overlap <= 1:
            raise UserError(f"--overlap is {self.overlap:g}; it is 0 (nothing is hidden) to 1 (all of it)")

    @property
    def processes(self) -> int:
        """Returns the number of GPUs."""
        return self.nodes * self.per_node

    def place(self, size: int, apart: int) -> Place:
        """Returns how a group lies whose `size` ranks are `apart` from one to the next.

        Nodes hold consecutive ranks. Where groups do not fit the nodes, as three processes on nodes of eight, all are
        taken to be as badly off as the worst.
        """
        inside = gcd(size, self.per_node // apart if self.per_node % apart == 0 else 1)
        return Place(size, inside, self.per_node // inside)
