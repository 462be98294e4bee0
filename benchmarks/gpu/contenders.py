"""What is compared in the layer's part: rmoe's kinds, the dense network, and what others make of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from benchmarks.gpu.measure import INPUT_SETS, Step
from rmoe.config import ResidualMoEConfig
from rmoe.engine.ports import free_port
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.records import collect


class Cell(NamedTuple):
    """Holds the sizes of one comparison; hidden width 4C.

    Attributes:
        mode: "autocast": float32 parameters and tokens under bfloat16 autocast, as in training; "bfloat16": all in it.
    """

    tokens: int
    width: int
    experts: int
    mode: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype of parameters and tokens."""
        return torch.bfloat16 if self.mode == "bfloat16" else torch.float32

    def autocast(self) -> AbstractContextManager[Any]:
        """Opens autocast, where this cell is measured under it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mode == "autocast")

    def network(self) -> Mlp:
        """Makes a dense network of this size."""
        with self.device:
            return Mlp(self.width, 4 * self.width).to(self.dtype)

    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        """Makes tokens and gradients, several sets of them."""

        def drawn() -> Tensor:
            return torch.randn(self.tokens, self.width, device=self.device, dtype=self.dtype)

        return [(drawn().requires_grad_(), drawn()) for _ in range(INPUT_SETS)]


class Arm(NamedTuple):
    """Holds a contender as it is timed: forward + backward, and forward alone in evaluation."""

    step: Step
    forward: Step


Forward = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # y, and a loss of its own if it has one


def _arm(cell: Cell, module: nn.Module, inputs: list[tuple[Tensor, Tensor]], forward: Forward | None = None) -> Arm:
    def plain(x_TC: Tensor) -> tuple[Tensor, None]:
        return module(x_TC), None

    run = forward or plain

    def step(number: int) -> None:
        x_TC, grad_TC = inputs[number]
        module.train()
        with cell.autocast():
            y_TC, loss = run(x_TC)
        grad_TC = grad_TC.to(y_TC.dtype)
        if loss is None:
            y_TC.backward(grad_TC)
        else:
            torch.autograd.backward([y_TC, loss], [grad_TC, None])
        x_TC.grad = None
        module.zero_grad()  # at the end: gradients of arms that wait their turn would fill the memory

    def evaluate(number: int) -> None:
        module.eval()
        with torch.no_grad(), cell.autocast():
            module(inputs[number][0])

    return Arm(step, evaluate)


def _dense(cell: Cell, inputs: Any, trained: bool = True) -> Arm:
    return _arm(cell, cell.network().requires_grad_(trained), inputs)


def _ours(cell: Cell, inputs: Any, **config: Any) -> Arm:
    given = {"num_experts": cell.experts, "top_k": 1, "gate_std": 1.0, "train_core": False, **config}
    layer = ResidualMoE(cell.network(), ResidualMoEConfig(**given))
    with torch.no_grad():
        for residual in layer.residuals():  # as after some steps: at the start they are zero
            residual.normal_(std=0.01)

    def forward(x_TC: Tensor) -> tuple[Tensor, Tensor]:
        with collect() as records:
            y_TC = layer(x_TC)
        return y_TC, records.loss()

    return _arm(cell, layer, inputs, forward)


class _Loop(nn.Module):
    """Is the obvious top-1 mixture: for each expert, pick its tokens, run it, put them back."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.gate = nn.Linear(cell.width, cell.experts, bias=False, device=cell.device)
        self.experts = nn.ModuleList(cell.network() for _ in range(cell.experts))

    def forward(self, x_TC: Tensor) -> Tensor:
        gate_T, expert_T = self.gate(x_TC.float()).float().softmax(-1).max(-1)
        y_TC: Tensor | None = None
        for e, expert in enumerate(self.experts):
            token_N = (expert_T == e).nonzero().squeeze(1)
            y_nC = expert(x_TC[token_N])
            y_TC = torch.zeros(x_TC.shape, dtype=y_nC.dtype, device=x_TC.device) if y_TC is None else y_TC
            y_TC = y_TC.index_add(0, token_N, gate_T[token_N, None].to(y_nC.dtype) * y_nC)
        assert y_TC is not None
        return y_TC


class _Grouped(nn.Module):
    """Is a top-1 mixture of torch's own grouped GEMM, as large language models are trained with it: without biases."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.gate = nn.Linear(cell.width, cell.experts, bias=False, device=cell.device)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(shape, device=cell.device, dtype=cell.dtype))

        self.w1_ECH = drawn(cell.experts, cell.width, 4 * cell.width)
        self.w2_EHC = drawn(cell.experts, 4 * cell.width, cell.width)

    def forward(self, x_TC: Tensor) -> Tensor:
        gate_T, expert_T = self.gate(x_TC.float()).float().softmax(-1).max(-1)
        expert_N, token_N = expert_T.sort()
        every_E = torch.arange(len(self.w1_ECH), device=expert_N.device)
        offs = torch.searchsorted(expert_N, every_E, right=True).to(torch.int32)
        h_NH = F.grouped_mm(x_TC.bfloat16()[token_N], self.w1_ECH.bfloat16(), offs=offs)
        y_NC = F.grouped_mm(F.gelu(h_NH), self.w2_EHC.bfloat16(), offs=offs)
        y_NC = y_NC * gate_T[token_N, None].to(y_NC.dtype)
        return torch.zeros_like(y_NC).index_add(0, token_N, y_NC)


def _lora(cell: Cell, inputs: Any) -> Arm:
    """Runs PEFT's LoRA of rank 8 on both linear layers of the same dense network, which is frozen."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=8, target_modules=["fc1", "fc2"])
    adapted: Any = get_peft_model(cell.network(), config, autocast_adapter_dtype=False)
    return _arm(cell, adapted, inputs)


def _stock(cell: Cell, inputs: Any) -> Arm:
    """Runs deepspeed.moe, nothing dropped, with networks of the same size."""
    import deepspeed.ops
    import torch.distributed as dist
    from deepspeed.moe.layer import MoE

    if not dist.is_initialized():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for a minute, called by nobody here
        with mock.patch.dict(os.environ, alone, MASTER_PORT=str(free_port())):
            deepspeed.init_distributed("nccl" if cell.device.type == "cuda" else "gloo", verbose=False)
    layer = MoE(cell.width, cell.network(), cell.experts, k=1, drop_tokens=False, use_rts=False).to(cell.device)
    layer.set_deepspeed_parallelism()
    return _arm(cell, _First(layer), inputs)


class _First(nn.Module):
    """Returns the first of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.module(x_TC)[0]


ARMS: dict[str, Callable[[Cell, Any], Arm]] = {
    "dense": _dense,
    "dense_frozen": lambda cell, inputs: _dense(cell, inputs, trained=False),
    "low_rank_8": lambda cell, inputs: _ours(cell, inputs, rank=8),
    "low_rank_32": lambda cell, inputs: _ours(cell, inputs, rank=32),
    "soft_8": lambda cell, inputs: _ours(cell, inputs, rank=8, top_k="all"),
    "soft_8_trained_core": lambda cell, inputs: _ours(cell, inputs, rank=8, top_k="all", train_core=True),
    "full": lambda cell, inputs: _ours(cell, inputs, residual="full"),
    "full_k2": lambda cell, inputs: _ours(cell, inputs, residual="full", top_k=2),
    "upper_bound": lambda cell, inputs: _ours(cell, inputs, residual="experts"),
    "lora_8": _lora,
    "torch_grouped": lambda cell, inputs: _arm(cell, _Grouped(cell), inputs),
    "loop": lambda cell, inputs: _arm(cell, _Loop(cell), inputs),
    "deepspeed": _stock,
}
# Peers that this benchmark only says whether they are there.
OTHERS = ("megablocks", "grouped_gemm", "sonicmoe")
FROZEN = {"dense_frozen", "low_rank_8", "low_rank_32", "soft_8", "lora_8"}


def core_flops(cell: Cell, arm: str) -> int:
    """Returns the FLOPs of the networks' own products, forward and backward: no residual's, no gate's."""
    forward = 2 * cell.tokens * 2 * cell.width * 4 * cell.width * (2 if arm == "full_k2" else 1)
    return forward * (2 if arm in FROZEN else 3)
