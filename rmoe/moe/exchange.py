"""What travels between the processes that share the experts of a layer, with gradients.

A layer of E experts over a group of P processes holds E/P of them on each. Either tokens go to their experts and come
back (`exchange_tokens`), or the experts' weights go to every process and the tokens stay (`gather_experts`).
Nothing is padded: processes may hold different numbers of tokens, none included.

Shape suffixes: T tokens, C width, E experts, N pairs of a token and one of its experts, M pairs received, P processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

Group = Any  # a process group; torch names its type only where distributed is built in


def make_expert_groups(ep_size: int) -> None:
    """Makes DeepSpeed's groups of `ep_size` processes that share experts, unless they are there; collective."""
    from deepspeed.utils import groups

    if f"ep_size_{ep_size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=False)


def expert_group(ep_size: int) -> Group:
    """Returns the group of processes that share the experts with this one."""
    from deepspeed.utils import groups

    return groups._get_expert_parallel_group(f"ep_size_{ep_size}")


def exchange_tokens(
    rows_NC: Tensor, expert_N: Tensor, num_experts: int, group: Group, experts: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Sends every row to the process of its expert, applies `experts` there and brings the results back.

    Args:
        rows_NC: rows in any order.
        expert_N: int64 in 0 … E-1, global expert ids.
        num_experts: E.
        group: the expert parallel group; its r-th process holds the r-th E/P experts. Each of them must call.
        experts: (rows_MC, local expert ids of M rows) → M results; called once, also with no rows.

    Returns:
        The results in the order of `rows_NC`.
    """
    processes = dist.get_world_size(group)
    local = num_experts // processes
    sorted_N, order_N = expert_N.sort(stable=True)
    sent_E = torch.bincount(sorted_N, minlength=num_experts)
    received_E = torch.empty_like(sent_E)  # [P, E/P] flattened: what each process sends to each of our experts
    dist.all_to_all_single(received_E, sent_E, group=group)
    sent_P = sent_E.view(processes, local).sum(1).tolist()
    received_P = received_E.view(processes, local).sum(1).tolist()
    local_M = torch.arange(local, device=expert_N.device).repeat(processes).repeat_interleave(received_E)
    received_MC = _AllToAll.apply(rows_NC[order_N], sent_P, received_P, group)
    results_NC = _AllToAll.apply(experts(received_MC, local_M), received_P, sent_P, group)
    return torch.empty_like(results_NC).index_copy(0, order_N, results_NC)


def gather_experts(
    local: tuple[Tensor, ...], group: Group, dtype: torch.dtype
) -> tuple[list[Tensor], Callable[[], object]]:
    """Gathers tensors stacked over the experts of this process, [E/P, …] each, into those of all experts, [E, …] each.

    One collective each way. Backward, every process gets the sum over the group of its own experts' gradients, as if
    the tokens had come to it; the sum is made in the format of `local`.

    Args:
        local: of one dtype.
        group: the expert parallel group.
        dtype: what the experts are computed in, and travel in.

    Returns:
        The tensors, of `dtype`, whose values are on their way, and a function that waits for them and must be called.
    """
    works: list[Any] = []
    return list(_Gather.apply(group, dtype, works, *local)), works[0].wait


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, rows_NC: Tensor, sent_P: list[int], received_P: list[int], group: Group) -> Tensor:
        ctx.sent_P, ctx.received_P, ctx.group = sent_P, received_P, group
        received_MC = rows_NC.new_empty(sum(received_P), *rows_NC.shape[1:])
        dist.all_to_all_single(received_MC, rows_NC.contiguous(), received_P, sent_P, group=group)
        return received_MC

    @staticmethod
    def backward(ctx: Any, grad_MC: Tensor) -> tuple[Tensor, None, None, None]:
        grad_NC = grad_MC.new_empty(sum(ctx.sent_P), *grad_MC.shape[1:])
        dist.all_to_all_single(grad_NC, grad_MC.contiguous(), ctx.sent_P, ctx.received_P, group=ctx.group)
        return grad_NC, None, None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, group: Group, dtype: torch.dtype, works: list[Any], *local: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.shapes, ctx.dtype = group, [part.shape[1:] for part in local], local[0].dtype
        local_EN = torch.cat([part.flatten(1).to(dtype) for part in local], 1)
        every_EN = local_EN.new_empty(len(local_EN) * dist.get_world_size(group), local_EN.shape[1])
        works.append(dist.all_gather_into_tensor(every_EN, local_EN, group=group, async_op=True))
        parts = every_EN.split([shape.numel() for shape in ctx.shapes], 1)
        # `.data`: to autograd the arrival would be a change in place of what it has handed out.
        return tuple(part.unflatten(1, shape).data for part, shape in zip(parts, ctx.shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_EN = torch.cat([grad.flatten(1).to(ctx.dtype) for grad in grads], 1)
        local_EN = grad_EN.new_empty(len(grad_EN) // dist.get_world_size(ctx.group), grad_EN.shape[1])
        dist.reduce_scatter_tensor(local_EN, grad_EN, group=ctx.group)
        parts = local_EN.split([shape.numel() for shape in ctx.shapes], 1)
        return None, None, None, *(part.unflatten(1, shape) for part, shape in zip(parts, ctx.shapes, strict=True))


class SumOverProcesses(Function):
    """Sums over all processes a tensor of which each then computes the same loss.

    Each process adds that same loss to its own, and data parallelism averages the gradients; so the gradient of one
    process's part is the loss's gradient times the number of processes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Returns the sum of x over all processes."""
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Returns the gradient of one process's part."""
        return grad * dist.get_world_size()
