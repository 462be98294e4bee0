"""A model with mixtures, seen from outside: which layers it has, what each parameter is, its weights as one whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from rmoe.moe.layer import ResidualMoE
from rmoe.moe.stacked import EXPERT_KEY

Role = Literal["core", "residual", "gate", "other"]


@contextmanager
def local_experts(model: nn.Module) -> Iterator[None]:
    """Gives every process all experts inside the block, where layers then communicate nothing: for evaluation.

    Processes may then run different numbers of batches. Entering is collective over the expert groups.
    """
    layers = [layer for layer in moe_layers(model).values() if layer.ep_size > 1]
    for layer in layers:
        layer.every_expert_here = layer.every_expert()
    try:
        yield
    finally:
        for layer in layers:
            layer.every_expert_here = None


def moe_layers(model: nn.Module) -> dict[str, ResidualMoE]:
    """Returns the layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ResidualMoE)}


def roles(model: nn.Module) -> dict[str, Role]:
    """Returns what each parameter of a model is, by its name: of a mixture "core", "residual" or "gate", else "other".
    Optimizer groups and counts are made from it.
    """
    found: dict[str, Role] = dict.fromkeys((name for name, _ in model.named_parameters()), "other")
    return found | {name: role for name, _, role in mixed_parameters(model)}


def mixed_parameters(model: nn.Module) -> Iterator[tuple[str, ResidualMoE, Role]]:
    """Yields the name of each parameter of a mixture, its layer, and what it is there."""
    parts: dict[str, Role] = {"core": "core", "gate": "gate", "deepspeed_moe": "residual"}
    for layer_name, layer in moe_layers(model).items():
        for name, _ in layer.named_parameters():
            yield f"{layer_name}.{name}" if layer_name else name, layer, parts[name.partition(".")[0]]


@torch.no_grad()
def residual_norms(
    model: nn.Module, gathered: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext
) -> dict[str, Tensor]:
    """Returns ‖Δ_e‖ / ‖core‖ by layer, the mean over its experts: scalars, float32. Layers without a core have none.

    Norms are Frobenius norms over both weight matrices. Collective where processes share experts: one all-reduce.

    Args:
        model: with the layers.
        gathered: a context in which a layer's parameters are whole, where they are not always.
    """
    found = {}
    for name, layer in moe_layers(model).items():
        with gathered(layer):
            if (core := layer.theta()) is not None:
                residuals = layer.residuals()
                local = type(residuals)(*(x.float() for x in residuals))
                core_norm = _norm(core.w1_HC, core.w2_CH)
                deltas = [local.delta(e) for e in range(layer.num_local_experts)]
                found[name] = torch.stack([_norm(one.w1_HC, one.w2_CH) for one in deltas]).mean() / core_norm
    if found and any(layer.ep_size > 1 for layer in moe_layers(model).values()):
        means = torch.stack([*found.values()])
        dist.all_reduce(means)  # each expert is on as many processes
        found = dict(zip(found, means / dist.get_world_size(), strict=True))
    return found


def _norm(*matrices: Tensor) -> Tensor:
    return torch.stack([matrix.float().norm() for matrix in matrices]).norm()


def holds_experts(state: Mapping[str, Tensor]) -> bool:
    """Says whether a state dict is a mixture's, so that it fits an upcycled model only."""
    return any(EXPERT_KEY in key for key in state)


def experts_of(state: Mapping[str, Tensor]) -> tuple[tuple[str, ...], int]:
    """Returns the names of a mixture's layers in a state dict, in its order, and how many experts they have."""
    mark = f".deepspeed_moe.experts.{EXPERT_KEY}"
    places = [key.partition(mark)[::2] for key in state if mark in key]
    numbers = {int(rest.partition(".")[0]) for _, rest in places}
    return tuple(dict.fromkeys(layer for layer, _ in places)), len(numbers)


def global_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the whole model on the CPU, experts under global ids; collective, and the same on every process."""
    state = {key: x.cpu() for key, x in model.state_dict().items() if EXPERT_KEY not in key}
    for layer_name, layer in moe_layers(model).items():
        for name, stacked in layer.every_parameter().items():
            for e, x in enumerate(stacked.detach().cpu()):
                state[f"{_experts_prefix(layer_name)}{e}.{name}"] = x.clone()
    return state


def load_global_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `global_state_dict` gave, at any ep_size: each process takes its own experts. Strict.

    Raises:
        RuntimeError: keys or shapes differ, experts included (as `torch.nn.Module.load_state_dict`).
    """
    local = {key: x for key, x in state.items() if EXPERT_KEY not in key}
    known = set()
    for layer_name, layer in moe_layers(model).items():
        prefix, start = _experts_prefix(layer_name), layer.expert_rank() * layer.num_local_experts
        for e, name in product(range(layer.num_experts), layer.deepspeed_moe.experts.own()):  # type: ignore[union-attr,operator]
            known.add(f"{prefix}{e}.{name}")
            if start <= e < start + layer.num_local_experts and f"{prefix}{e}.{name}" in state:
                local[f"{prefix}{e - start}.{name}"] = state[f"{prefix}{e}.{name}"]
    if wrong := known.symmetric_difference(key for key in state if EXPERT_KEY in key):
        raise RuntimeError(
            f"the file and the model have other experts: {len(known - wrong)} tensors match, {len(wrong - known)} are "
            f"only in the file and {len(wrong & known)} only in the model, such as {min(wrong)}"
        )
    model.load_state_dict(local)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file that others may read as far as the umask lets them; safetensors itself lets nobody, and
    takes no tensor twice, as a model has it whose layers share weights: each gets a copy of its own.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode & 0o777
    whole = {name: x.contiguous() for name, x in tensors.items()}
    owner = {x.data_ptr(): name for name, x in whole.items()}
    written = {name: x if owner[x.data_ptr()] == name else x.clone() for name, x in whole.items()}
    save_file(written, path, dict(metadata) if metadata else None)
    path.chmod(mode)


def _experts_prefix(layer_name: str) -> str:
    return f"{layer_name}.deepspeed_moe.experts.{EXPERT_KEY}".removeprefix(".")
