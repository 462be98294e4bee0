"""A dense feed-forward network turned into a residual mixture of experts, on `deepspeed.moe`.

One forward pass, in the order in which it runs: `Gate` chooses the experts of each token; `mix` (mix.py) applies the
core plus their residuals (experts.py); where experts are spread over processes, weights or tokens travel first
(exchange.py). What the gate decided is collected by `collect` (records.py), and by nothing else.

To DeepSpeed a layer whose residuals are trained is a `deepspeed.moe.layer.MoE`: they carry the marks of expert
parameters, and are named as its experts are. The gate, the arithmetic and the exchange are not DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, Literal

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.layers.exchange import exchange_tokens, gather_experts
from rmoe.layers.experts import KINDS, Network, Residuals
from rmoe.layers.gate import Gate, Routing
from rmoe.layers.mix import mix
from rmoe.layers.records import record

Role = Literal["core", "residual", "gate", "other"]
_EXPERT_KEY = "deepspeed_experts."


class ResidualMoE(nn.Module):
    """y = FFN(x; θ0 + Σ g_e(x) Δ_e) in place of y = FFN(x; θ0); see `rmoe.config.ResidualMoEConfig`.

    Right after construction it computes what `core` computed, for every routing (but not with combine="softmax", nor
    with experts drawn anew). With residual="experts" only the activation of `core` stays: there is no θ0.

    Args:
        core: a module with linear layers `fc1` and `fc2` and an activation `act`, as timm's `Mlp`; it becomes θ0.
        config: with ep_size > 1, torch.distributed must be initialised.

    Raises:
        UserError: a core that the layer cannot compute, or ep_size does not divide the number of processes.
    """

    def __init__(self, core: nn.Module, config: ResidualMoEConfig) -> None:
        # Not MoE's constructor, which would build a gate of its own and a copy of the core for each expert.
        nn.Module.__init__(self)
        _check_core(core, config)
        self.config = config
        self.num_experts, self.ep_size = config.num_experts, config.ep_size
        self.num_local_experts = config.num_experts // config.ep_size
        self.expert_group_name = f"ep_size_{config.ep_size}"
        if config.ep_size > 1:
            _check_processes(config.ep_size)
            self._create_process_groups()

        self.core = core if config.kind.has_core else nn.ModuleDict({"act": core.act})  # type: ignore[dict-item]
        network = _network(core)
        self.gate = Gate(network.w1_HC.shape[1], config).to(network.w1_HC.device)
        self.deepspeed_moe = nn.Module()  # DeepSpeed's checkpoints find the experts by these two names
        self.deepspeed_moe.experts = _Residual(config, network, self._expert_rank() * self.num_local_experts)
        self._every_expert: Residuals | None = None
        self.core.requires_grad_(config.train_core)
        if config.train_residual:
            self.__class__ = _TrainedResidualMoE
        else:
            self.deepspeed_moe.requires_grad_(False)
        self.train(core.training)

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape [..., C] → y [..., C]. In training, every process of the expert group must call it.

        Raises:
            UserError: fewer tokens than experts in a training batch.
        """
        x_TC = x.reshape(-1, x.shape[-1])
        self._check_tokens(len(x_TC))
        routing = self.gate(x_TC)
        record(self, routing)
        if self.config.recompute and torch.is_grad_enabled():
            return checkpoint(self._experts, x_TC, routing, use_reentrant=False).reshape(x.shape)
        return self._experts(x_TC, routing).reshape(x.shape)

    def _experts(self, x_TC: Tensor, routing: Routing) -> Tensor:
        if self.ep_size == 1:
            return self._mix(x_TC, routing.expert_TK, routing.gate_TK, self.residuals())
        if self._every_expert is not None:
            return self._mix(x_TC, routing.expert_TK, routing.gate_TK, self._every_expert)
        if self.config.sends_tokens:
            return self._send_tokens(x_TC, routing)
        return self._mix(x_TC, routing.expert_TK, routing.gate_TK, *self._gather())

    def _send_tokens(self, x_TC: Tensor, routing: Routing) -> Tensor:
        """Tokens go to their experts; a choice that the capacity dropped stays and gets the core."""
        mixes, residuals = self.config.mixes_weights, self.residuals()
        expert_N, gate_N1 = routing.expert_TK.flatten(), routing.gate_TK.to(x_TC.dtype).reshape(-1, 1)
        k = routing.expert_TK.shape[1]
        x_NC = x_TC.repeat_interleave(k, 0) if k > 1 else x_TC

        def experts(rows: Tensor, local_M: Tensor) -> Tensor:
            x_MC, gate_M1 = (rows[:, :-1], rows[:, -1:]) if mixes else (rows, rows.new_ones(len(rows), 1))
            return self._mix(x_MC, local_M[:, None], gate_M1, residuals)

        def send(rows: Tensor, expert_M: Tensor) -> Tensor:
            group = groups._get_expert_parallel_group(self.expert_group_name)
            return exchange_tokens(rows, expert_M, self.num_experts, group, experts)

        rows = torch.cat([x_NC, gate_N1], 1) if mixes else x_NC
        if self.training and self.config.capacity_factor is not None:
            sent, stay = expert_N < self.num_experts, expert_N == self.num_experts
            parts = [send(rows[sent], expert_N[sent]), experts(rows[stay], expert_N[stay] // self.ep_size)]
            order_N = torch.cat([sent.nonzero(), stay.nonzero()]).flatten()
            y_NC = torch.cat(parts).index_select(0, order_N.argsort())
        else:
            y_NC = send(rows, expert_N)
        return y_NC if mixes else torch.einsum("tkc,tk->tc", y_NC.unflatten(0, (-1, k)), gate_N1.view(-1, k))

    def _mix(
        self,
        x_TC: Tensor,
        expert_TK: Tensor,
        gate_TK: Tensor,
        residuals: Residuals,
        ready: Callable[[], object] | None = None,
    ) -> Tensor:
        theta = _network(self.core) if self.config.kind.has_core else None
        act: Any = self.core.act
        return mix(x_TC, expert_TK, gate_TK, theta, residuals, act, self.config.mixes_weights, ready)

    def residuals(self) -> Residuals:
        """Δ of the experts of this process, stacked."""
        return self.deepspeed_moe.experts.residuals()  # type: ignore[union-attr,operator]

    def _gather(self) -> tuple[Residuals, Callable[[], object]]:
        local = self.residuals()
        tensors, ready = gather_experts(local, groups._get_expert_parallel_group(self.expert_group_name))
        return type(local)(*tensors), ready

    @torch.no_grad()
    def every_expert(self) -> Residuals:
        """Δ of all experts; collective over the expert group."""
        if self.ep_size == 1:
            return self.residuals()
        residuals, ready = self._gather()
        ready()
        return residuals

    def _expert_rank(self) -> int:
        return 0 if self.ep_size == 1 else groups._get_expert_parallel_rank(self.expert_group_name)

    def _create_process_groups(self, use_data_before_expert_parallel_: bool = False) -> None:
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size, use_data_before_expert_parallel_=False)

    def _check_tokens(self, tokens: int) -> None:
        everywhere = tokens * (dist.get_world_size() if dist.is_initialized() else 1)
        if self.training and everywhere < self.num_experts:
            raise UserError(
                f"a layer got {everywhere} tokens for its {self.num_experts} experts; train with larger images or "
                "batches, with fewer experts, or leave this block dense"
            )


class _TrainedResidualMoE(ResidualMoE, MoE):
    """A layer as DeepSpeed's engine knows it. It asks of every such layer that experts of it are trained: one whose
    experts are fixed is an ordinary module to it.
    """

    use_residual = enable_expert_tensor_parallelism = False  # what DeepSpeed means by them


def _network(core: nn.Module) -> Network:
    fc1, fc2 = core.fc1, core.fc2
    return Network(fc1.weight, fc1.bias, fc2.weight, fc2.bias)  # type: ignore[union-attr,arg-type]


class _Residual(nn.Module):
    """Δ of the experts of this process, one stacked parameter for each tensor of a network.

    In its state dict every expert stands alone, under the names that DeepSpeed gives its experts.
    """

    def __init__(self, config: ResidualMoEConfig, core: Network, start: int) -> None:
        super().__init__()
        local = config.num_experts // config.ep_size
        # Drawn for all experts, so that an expert's weights do not depend on where it lives.
        self.kind = KINDS[config.residual]
        with torch.no_grad():
            every = self.kind.initial(config, core)
        for name, x in every._asdict().items():
            self.register_parameter(name, nn.Parameter(x[start : start + local].clone()))
        self.group_name, self.trained = f"ep_size_{config.ep_size}", config.train_residual
        self._mark()

    def _mark(self) -> None:
        """DeepSpeed's marks of expert parameters."""
        for parameter in self.parameters() if self.trained else ():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.group_name  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # copies of a parameter lose its attributes

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        moved = super()._apply(*args, **kwargs)
        self._mark()  # so do those that leave the meta device
        return moved

    def residuals(self) -> Residuals:
        return self.kind(*(getattr(self, name) for name in self.kind._fields))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, parameter in self._parameters.items():
            stacked = parameter if keep_vars else parameter.detach()  # type: ignore[union-attr]
            for e, x in enumerate(stacked):  # type: ignore[arg-type]
                destination[f"{prefix}{_EXPERT_KEY}{e}.{name}"] = x

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        known, assign = set(), local_metadata.get("assign_to_params_buffers", False)
        for name, parameter in list(self.named_parameters()):
            keys = [f"{prefix}{_EXPERT_KEY}{e}.{name}" for e in range(len(parameter))]
            known.update(keys)
            found = {key: state_dict[key] for key in keys if key in state_dict}
            missing_keys += [key for key in keys if key not in found]
            wrong = [key for key, x in found.items() if x.shape != parameter.shape[1:]]
            error_msgs += [
                f"{key}: {tuple(found[key].shape)} in the file, {tuple(parameter.shape[1:])} here" for key in wrong
            ]
            if parameter.is_meta and not assign:
                error_msgs.append(f"{prefix}{name} is on the meta device: use assign=True, or to_empty() first")
            elif not wrong and assign and len(found) == len(keys):
                stacked = torch.stack([found[key].detach() for key in keys])
                self.register_parameter(name, nn.Parameter(stacked, requires_grad=parameter.requires_grad))
            elif not wrong:
                for e, key in enumerate(keys):
                    if key in found:
                        parameter.detach()[e].copy_(found[key])
        self._mark()
        unexpected_keys += [key for key in state_dict if strict and key.startswith(prefix) and key not in known]


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_core(core: nn.Module, config: ResidualMoEConfig) -> None:
    """Refuses what the layer would compute wrongly, and prepares the activation.

    Raises:
        UserError: see `ResidualMoE`.
    """
    if not isinstance(config, ResidualMoEConfig):
        raise UserError(f"the config is {config!r}; build it by ResidualMoEConfig(...) or ResidualMoEConfig.from_dict")
    kinds = {"fc1": nn.Linear, "act": nn.Module, "fc2": nn.Linear}
    if lacking := [name for name, kind in kinds.items() if not isinstance(getattr(core, name, None), kind)]:
        raise UserError(
            f"the core is a {type(core).__name__} without {lacking[0]}; it has linear layers fc1 and fc2 and an "
            "activation act, as timm's Mlp"
        )
    fc1, fc2, act = core.fc1, core.fc2, core.act
    if (fc1.in_features, fc1.out_features) != (fc2.out_features, fc2.in_features):  # type: ignore[union-attr]
        raise UserError(f"the core maps {fc1} and {fc2}; fc2 must lead back from fc1's outputs to its inputs")
    for name, parameter in core.named_parameters():
        if parameter.dtype not in _DTYPES or parameter.layout != torch.strided:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise UserError(f"the core's {name} is {parameter.dtype}, {parameter.layout}; it is dense, of {allowed}")
    if any(True for _ in act.parameters()) or isinstance(act, nn.RReLU):  # type: ignore[union-attr]
        raise UserError(
            f"the core's activation is {act}; use one without parameters and chance: its backward pass is the layer's"
        )
    for module in act.modules():  # type: ignore[union-attr]
        if getattr(module, "inplace", False):
            module.inplace = False  # backward needs what it was given


def _check_processes(ep_size: int) -> None:
    if not dist.is_initialized():
        raise UserError(f"ep_size {ep_size} needs torch.distributed: start with a launcher, or use ep_size=1")
    if dist.get_world_size() % ep_size:
        raise UserError(f"ep_size {ep_size} does not divide the {dist.get_world_size()} processes; change either")


@contextmanager
def local_experts(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds all experts and the layers communicate nothing: for evaluation without gradient.

    Processes may then run different numbers of batches. Entering is collective over the expert groups.
    """
    layers = [layer for layer in moe_layers(model).values() if layer.ep_size > 1]
    for layer in layers:
        layer._every_expert = layer.every_expert()
    try:
        yield
    finally:
        for layer in layers:
            layer._every_expert = None


def moe_layers(model: nn.Module) -> dict[str, ResidualMoE]:
    """The layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ResidualMoE)}


def roles(model: nn.Module) -> dict[str, Role]:
    """What each parameter is, by its name; what optimizer groups and counts are made from."""
    found: dict[str, Role] = dict.fromkeys((name for name, _ in model.named_parameters()), "other")
    parts: dict[str, Role] = {"core": "core", "gate": "gate", "deepspeed_moe": "residual"}
    for layer_name, layer in moe_layers(model).items():
        for name, _ in layer.named_parameters():
            found[f"{layer_name}.{name}" if layer_name else name] = parts[name.partition(".")[0]]
    return found


def holds_experts(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is a mixture's, so that it fits an upcycled model only."""
    return any(_EXPERT_KEY in key for key in state)


def global_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole model on the CPU, experts under their global ids; the same on every process, which all must call."""
    state = {key: x.cpu() for key, x in model.state_dict().items() if _EXPERT_KEY not in key}
    for layer_name, layer in moe_layers(model).items():
        for name, stacked in layer.every_expert()._asdict().items():
            for e, x in enumerate(stacked.detach().cpu()):
                state[f"{_experts_prefix(layer_name)}{e}.{name}"] = x.clone()
    return state


def load_global_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `global_state_dict` gave, at any ep_size: each process takes its own experts. Strict.

    Raises:
        RuntimeError: keys or shapes differ, experts included (as `torch.nn.Module.load_state_dict`).
    """
    local = {key: x for key, x in state.items() if _EXPERT_KEY not in key}
    known = set()
    for layer_name, layer in moe_layers(model).items():
        prefix, start = _experts_prefix(layer_name), layer._expert_rank() * layer.num_local_experts
        for e, name in product(range(layer.num_experts), layer.residuals()._fields):
            known.add(f"{prefix}{e}.{name}")
            if start <= e < start + layer.num_local_experts and f"{prefix}{e}.{name}" in state:
                local[f"{prefix}{e - start}.{name}"] = state[f"{prefix}{e}.{name}"]
    if wrong := known.symmetric_difference(key for key in state if _EXPERT_KEY in key):
        raise RuntimeError(
            f"the file and the model have other experts: {len(known - wrong)} tensors match, {len(wrong - known)} are "
            f"only in the file and {len(wrong & known)} only in the model, such as {min(wrong)}"
        )
    model.load_state_dict(local)


def _experts_prefix(layer_name: str) -> str:
    return f"{layer_name}.deepspeed_moe.experts.{_EXPERT_KEY}".removeprefix(".")
