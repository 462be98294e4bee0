"""Weights and optimizer state without the layout of the run that wrote them.

A checkpoint's tensors are named `KIND/NAME`: KIND is `weight`, `average` (of the weights, where a run keeps one) or a
state of the optimizer (`exp_avg`, `step`, …), NAME that of a parameter or buffer in the model, an expert's with its
global id. A tensor is always whole, in the shape that its parameter has in the model. So any number of processes, any
ep_size and any ZeRO stage can write it, and any other read it: DeepSpeed's own files of ZeRO partitions are silently
wrong where ep_size changes.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups
from mmengine.dist import all_gather_object
from torch import Tensor, nn

from rmoe.engine.checkpoint.files import AVERAGE, WEIGHT
from rmoe.engine.clipping import loss_scaler
from rmoe.engine.optim import change_settings, checked_settings, settings
from rmoe.errors import UserError
from rmoe.moe.gate import GATES_WITHOUT, absent_of_gates
from rmoe.moe.state import moe_layers

_COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
_STEP = "step"


def gather_tensors(engine: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns what a checkpoint of `engine` holds. All processes call it.

    Args:
        engine: what `deepspeed.initialize` returned, at any ZeRO stage.

    Returns:
        This process's share of the tensors, on the CPU: of each tensor there is one in all processes together. And
        the engine's counters, the scale of the loss and the optimizer's settings, which JSON can hold; the same on
        every process.

    Raises:
        UserError: the optimizer keeps a state that is neither of its parameter's shape nor a single number.
    """
    names = _Names(engine.module)
    tensors: dict[str, Tensor] = {}
    numbers: set[str] = set()
    with _whole_parameters(engine):
        tensors |= gather_weights(engine.module)
    for holder in _holders(engine, names):
        for kind, value in sorted(_state(engine, holder.values).items()):
            if _is_number(kind, value, holder.values):
                numbers.add(kind)
            for part in holder.parts:
                whole = _whole(engine, part, holder.values, kind, value)
                if names.leads(part.name):
                    tensors |= {f"{kind}/{key}": _copy(one) for key, one in names.split(part.name, whole)}
    return tensors, {
        "optimizer": type(_base_optimizer(engine)).__name__,
        "numbers": sorted(numbers),
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "loss_scale": scaler.state_dict() if (scaler := loss_scaler(engine)) else None,
        "groups": [
            {"parameters": [names.of[p] for p in parameters], "settings": settings(group)}
            for group, parameters in zip(engine.optimizer.param_groups, _parameters_of_groups(engine), strict=True)
        ],
    }


def gather_weights(module: nn.Module, kind: str = WEIGHT) -> dict[str, Tensor]:
    """Returns this process's share of the weights of a model whose parameters are whole, see `gather_tensors`."""
    names = _Names(module)
    leading = {name: x for name, x in names.weights().items() if names.leads(name)}
    return {kind + key: _copy(one) for name, x in leading.items() for key, one in names.split(name, x)}


def restore_tensors(engine: Any, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Brings a freshly initialised `engine` to the state that `gather_tensors` saw, whatever the layout was there.

    Each process reads what it needs of `tensors`. All processes call it.

    Args:
        engine: what `deepspeed.initialize` returned, before its first step.
        tensors: of all processes of the run that called `gather_tensors`; values may be read when they are asked for.
        about: what `gather_tensors` returned besides.

    Raises:
        UserError: another model's or another optimizer's.
    """
    names, kind = _Names(engine.module), type(_base_optimizer(engine)).__name__
    if about["optimizer"] != kind:
        raise UserError(
            f"the checkpoint is of optimizer {about['optimizer']}, the config's is {kind}; resume with the former, or "
            "start a new run with load_from"
        )
    with _whole_parameters(engine, modified=True):
        restore_weights(engine.module, tensors)
    if engine.zero_optimization():
        engine.optimizer.refresh_fp32_params()
    _load_states(engine, names, tensors, set(about["numbers"]))
    saved = {name: group["settings"] for group in about["groups"] for name in group["parameters"]}
    for group, parameters in zip(engine.optimizer.param_groups, _parameters_of_groups(engine), strict=True):
        found = [saved.get(names.of[p]) for p in parameters]
        if any(one is None or one != found[0] for one in found):
            raise UserError(
                "the checkpoint's optimizer has other groups of parameters: resume with the model, optim_wrapper and "
                "paramwise_cfg of the run that wrote it, or start a new run with load_from"
            )
        change_settings(group, checked_settings(group, found[0]))  # type: ignore[arg-type]
    for name, value in about["counters"].items():
        setattr(engine, name, value)
    if (scaler := loss_scaler(engine)) and about["loss_scale"]:
        scaler.load_state_dict(about["loss_scale"])


class _Names:
    """The names of a model's tensors in a checkpoint."""

    def __init__(self, module: nn.Module) -> None:
        self.of = {parameter: name for name, parameter in module.named_parameters()}
        self._module = module
        self._parameters = {name: parameter for parameter, name in self.of.items()}
        self._layers = {
            f"{name}.deepspeed_moe.experts".removeprefix("."): layer for name, layer in moe_layers(module).items()
        }

    def weights(self) -> dict[str, Tensor]:
        """Returns parameters, those of experts stacked, and persistent buffers."""
        stacked = {name: p.detach() for name, p in self._parameters.items() if self.stacked(name)}
        single = {k: x for k, x in self._module.state_dict().items() if "deepspeed_experts." not in k}
        return {**single, **stacked}

    def split(self, name: str, x: Tensor) -> list[tuple[str, Tensor]]:
        """Returns `x`, of the shape of the parameter `name` or one number for all of it, under its names in a file."""
        keys = self.keys(name)
        each = [x] if not self.stacked(name) else x.unbind() if x.ndim else [x] * len(keys)
        return list(zip(keys, each, strict=True))

    def keys(self, name: str) -> list[str]:
        """Returns the names in a file of the parameter or buffer `name`: of experts, one for each of this process."""
        layer = self._layer(name)
        if layer is None:
            return [name]
        prefix, _, field = name.rpartition(".")
        first = layer.expert_rank() * layer.num_local_experts
        return [f"{prefix}.deepspeed_experts.{first + e}.{field}" for e in range(layer.num_local_experts)]

    def stacked(self, name: str) -> bool:
        """Returns whether the first dimension of the parameter `name` is that of experts."""
        return self._layer(name) is not None

    def leads(self, name: str) -> bool:
        """Returns whether this process, of those that hold the same values of a parameter or buffer, writes them.

        The nodes share the work: each writes about as many values as the others. The first call is collective.
        """
        return self._writers.get(name, 0) == dist.get_rank()

    @cached_property
    def _writers(self) -> dict[str, int]:
        """Returns the rank that writes a parameter, by name; it is the same on all processes that hold it."""
        first_of_nodes = all_gather_object(int(os.environ.get("LOCAL_RANK", "0")) == 0)
        node_of_rank = list(accumulate(map(int, first_of_nodes)))
        held = {name: tuple(dist.get_process_group_ranks(_replicas(p))) for name, p in self._parameters.items()}
        return shared_out(
            {name: getattr(p, "ds_numel", p.numel()) for name, p in self._parameters.items()}, held, node_of_rank
        )

    def _layer(self, name: str) -> Any:
        prefix, _, field = name.rpartition(".")
        layer: Any = self._layers.get(prefix)
        return layer if layer is not None and field in layer.deepspeed_moe.experts.own() else None


def shared_out(
    sizes: Mapping[str, int], held: Mapping[str, tuple[int, ...]], node_of_rank: Sequence[int]
) -> dict[str, int]:
    """Shares out what is to be written: the largest first, each to the node that has the least so far.

    Args:
        sizes: numbers of values, by name.
        held: the ranks that hold them, by name.
        node_of_rank: a number for each rank, the same for all ranks of a node.

    Returns:
        The rank that writes them, by name: on its node the first that holds them. It depends on nothing but what the
        same ranks hold, which all of these know.
    """
    writers, written = dict[str, int](), defaultdict[tuple[tuple[int, ...], int], int](int)
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        ranks = held[name]
        firsts = {node_of_rank[rank]: rank for rank in reversed(ranks)}
        node = min(firsts, key=lambda node: (written[ranks, node], node))
        written[ranks, node] += sizes[name]
        writers[name] = firsts[node]
    return writers


def _replicas(parameter: nn.Parameter) -> Any:
    """Returns the processes that hold the same values of a parameter."""
    if is_moe_param(parameter):
        return groups._get_expert_data_parallel_group(parameter.group_name)  # type: ignore[attr-defined]
    return groups._get_data_parallel_group()


@dataclass(frozen=True)
class _Part:
    """Which values of a parameter's state this process holds: `count` of them from `first` on, at `offset`."""

    name: str
    parameter: nn.Parameter
    offset: int
    first: int
    count: int


@dataclass(frozen=True)
class _Holder:
    """A tensor that the optimizer steps, and the parameters that are, in part, in it: at ZeRO stage 0 one is all."""

    values: Tensor
    parts: list[_Part]


def _holders(engine: Any, names: _Names) -> Iterator[_Holder]:
    """Yields all tensors that the optimizer steps, in the same order on every process."""
    of, stage, optimizer = names.of, engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for group in optimizer.param_groups:
            for p in group["params"]:
                yield _Holder(p, [_Part(of[p], p, 0, 0, p.numel())])
    elif stage < 3:
        for values, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
            yield _Holder(values, [_linked_part(of[p], p) for p in group])
    else:
        for values, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            yield _Holder(values, [_partitioned_part(of[p], p, optimizer) for p in group])


def _linked_part(name: str, p: Any) -> _Part:
    if (link := p._hp_mapping) is None:
        return _Part(name, p, 0, 0, 0)
    return _Part(
        name, p, link.hp_fragment_address.start, link.lp_fragment_address.start, link.hp_fragment_address.numel
    )


def _partitioned_part(name: str, p: Any, optimizer: Any) -> _Part:
    _, offset, count = optimizer.grad_position[optimizer.get_param_id(p)]
    first = dist.get_rank() * count
    return _Part(name, p, offset, first, max(0, min(count, p.ds_numel - first)))  # the last ones are padded


def _parameters_of_groups(engine: Any) -> list[list[nn.Parameter]]:
    """Returns the model's parameters of each group of the optimizer, whose own may be flat partitions."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [group["params"] for group in optimizer.param_groups]
    if stage < 3:
        return optimizer.bit16_groups
    found: dict[int, list[nn.Parameter]] = defaultdict(list)
    for i, group in enumerate(optimizer.fp16_groups):
        found[optimizer.sub_group_to_group_id[i]] += group
    return [found[i] for i in range(len(optimizer.param_groups))]


def _base_optimizer(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer if engine.zero_optimization() else engine.optimizer


def _state(engine: Any, values: Tensor) -> dict[str, Any]:
    """Returns what the optimizer keeps of `values`."""
    state = _base_optimizer(engine).state.get(values, {})
    return {kind: value for kind, value in state.items() if value is not None}


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _is_number(kind: str, value: Any, values: Tensor) -> bool:
    """Returns whether a state is one number for all of `values`."""
    return kind == _STEP or not isinstance(value, Tensor) or value.ndim < min(values.ndim, 1)


def _whole(engine: Any, part: _Part, values: Tensor, kind: str, value: Any) -> Tensor:
    """Returns a state of a whole parameter; with ZeRO, collective over the processes that share it."""
    if _is_number(kind, value, values):
        return torch.as_tensor(value, dtype=torch.float32).reshape(())
    if value.shape != values.shape:
        raise UserError(
            f"{type(_base_optimizer(engine)).__name__} keeps '{kind}' of shape {tuple(value.shape)} for {part.name}, "
            "which a checkpoint cannot spread over processes; use an optimizer such as AdamW or SGD"
        )
    if not engine.zero_optimization():
        return value
    shape = _shape(part.parameter)
    whole = torch.zeros(shape.numel(), dtype=value.dtype, device=engine.device)
    whole[part.first : part.first + part.count] = value[part.offset : part.offset + part.count]
    dist.all_reduce(whole, group=_replicas(part.parameter))
    return whole.view(shape)


@torch.no_grad()
def restore_weights(module: nn.Module, tensors: Mapping[str, Tensor], kind: str = WEIGHT) -> None:
    """Loads what all processes' `gather_weights` returned.

    Raises:
        UserError: another model's.
    """
    names = _Names(module)
    wanted = {kind + key: one for name, x in names.weights().items() for key, one in names.split(name, x)}
    known = {key for key in tensors if key.startswith(kind) and "deepspeed_experts." not in key}
    saved = {key.removeprefix(kind): tensors[key] for key in known if ".gate." in key}
    if gates := absent_of_gates(saved, {key.removeprefix(kind): x for key, x in wanted.items()}):
        raise UserError(
            f"{GATES_WITHOUT} {min(gates)}, whose training cannot go on: start a new run from the checkpoint's "
            "weights: another --work-dir and --cfg-options load_from=CHECKPOINT"
        )
    surplus = known - wanted.keys()
    wrong = sorted(surplus | (wanted.keys() - set(tensors)))
    wrong = wrong or sorted(key for key, x in wanted.items() if not _alike(tensors[key], x))
    finite = {kind + key for parameter in names.of.values() for key in names.keys(parameter)}
    wrong = wrong or sorted(key for key in finite if not tensors[key].isfinite().all())
    if wrong:
        raise UserError(
            f"the checkpoint is another model's: {len(wrong)} weights differ, such as {wrong[0].removeprefix(kind)}; "
            "resume with the model of the run that wrote it"
        )
    for key, x in wanted.items():
        x.copy_(tensors[key])


def _alike(saved: Tensor, own: Tensor) -> bool:
    return saved.shape == own.shape and saved.dtype == own.dtype


def _load_states(engine: Any, names: _Names, tensors: Mapping[str, Tensor], numbers: set[str]) -> None:
    kinds = sorted({key.partition("/")[0] for key in tensors} - {WEIGHT.rstrip("/"), AVERAGE.rstrip("/")})
    state = _base_optimizer(engine).state
    state.clear()
    for holder in _holders(engine, names):
        found: dict[str, Tensor] = {}
        for kind in kinds:
            parts = [part for part in holder.parts if f"{kind}/{names.keys(part.name)[0]}" in tensors]
            if not parts:
                continue  # never trained: at stage 0, without a gradient
            if kind in numbers:
                found[kind] = _number(names, parts, kind, tensors).to(_number_device(engine, holder.values))
            else:
                found[kind] = torch.zeros_like(holder.values)
                for part in parts:
                    _read(names, part, kind, tensors, found[kind])
        if found:
            state[holder.values] = found


def _number(names: _Names, parts: list[_Part], kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    several = {_taken(tensors, f"{kind}/{key}", ()).item() for part in parts for key in names.keys(part.name)}
    if len(several) > 1:
        raise UserError(
            f"the checkpoint's parameters have different values of '{kind}', from {min(several):g} to "
            f"{max(several):g}, and ZeRO keeps one for all; resume with zero_optimization.stage 0"
        )
    return torch.tensor(several.pop())


def _read(names: _Names, part: _Part, kind: str, tensors: Mapping[str, Tensor], target: Tensor) -> None:
    """Puts those values of a parameter's state that this process holds into their place in `target`."""
    if not part.count:
        return
    shape = _shape(part.parameter)
    stacked, one = names.stacked(part.name), shape[1:] if names.stacked(part.name) else shape
    pieces = [_taken(tensors, f"{kind}/{key}", one) for key in names.keys(part.name)]
    whole = torch.stack(pieces) if stacked else pieces[0]
    target.view(-1)[part.offset : part.offset + part.count] = whole.flatten()[part.first : part.first + part.count]


def _taken(tensors: Mapping[str, Tensor], key: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Reads a state from a checkpoint, and checks that it has finite values of its parameter's shape."""
    if key not in tensors:
        raise UserError(f"the checkpoint lacks {key}, which it has for other parameters; give an earlier checkpoint")
    x = tensors[key]
    if x.shape != shape or not x.is_floating_point() or not x.isfinite().all():
        raise UserError(
            f"the checkpoint's {key} is {x.dtype} of shape {tuple(x.shape)}; finite numbers of shape {tuple(shape)} "
            "belong there: resume with the model of the run that wrote it, or give an earlier checkpoint"
        )
    return x


def _number_device(engine: Any, values: Tensor) -> torch.device:
    """Returns where the optimizer keeps its counts: fused and capturable ones keep them on the device."""
    first = engine.optimizer.param_groups[0]
    return values.device if first.get("fused") or first.get("capturable") else torch.device("cpu")


def _whole_parameters(engine: Any, modified: bool = False) -> Any:
    """Makes parameters whole inside the block, at ZeRO stage 3 too."""
    sharded = engine.zero_optimization_partition_weights()
    return deepspeed.zero.GatheredParameters(
        list(engine.module.parameters()), modifier_rank=0 if modified else None, enabled=sharded
    )


def _copy(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True).contiguous()
