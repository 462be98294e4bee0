"""A dense feed-forward network turned into a residual mixture of experts, on `deepspeed.moe`.

One forward pass, in the order in which it runs: `Gate` weighs the experts of each token, or chooses among them; `mix`
(mix.py) applies the core plus their residuals (experts.py); where experts are spread over processes, weights or tokens
travel first (exchange.py). What the gate decided is collected by `collect` (records.py), and by nothing else.

To DeepSpeed, a layer whose trained residuals are spread over processes is one of its own (deepspeed_layer.py); all
others are ordinary modules. The gate, the arithmetic and the exchange are not DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rmoe.config import ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe.exchange import exchange_tokens, expert_group, gather_experts, make_expert_groups
from rmoe.moe.experts import WEIGHTS, Network, Residuals, described, is_weight
from rmoe.moe.forms import Form, check_parts, form_of
from rmoe.moe.gate import Routing
from rmoe.moe.mix import compute_dtype
from rmoe.moe.records import record
from rmoe.moe.routers import ROUTERS
from rmoe.moe.stacked import StackedExperts


class ResidualMoE(nn.Module):
    """Computes y = FFN(x; θ0 + Σ g_e(x) Δ_e) in place of y = FFN(x; θ0); see `rmoe.config.ResidualMoEConfig`.

    Right after construction it computes what `core` computed, for every routing (but not with combine="softmax", nor
    with experts drawn anew). With residual="experts" only what `core` has between its linear layers stays.

    Args:
        core: a network of one of the forms in `rmoe.moe.forms`: with linear layers `fc1` and `fc2` and an activation
            `act`, as timm's `Mlp`, perhaps gated, with a norm inside, or of 1×1 convolutions; it becomes θ0.
        config: with ep_size > 1, torch.distributed must be initialised.

    Raises:
        UserError: a core that the layer cannot compute (see `rmoe.moe.forms.check_parts`), or ep_size does not divide
            the number of processes.
    """

    # DeepSpeed's ZeRO 3 makes the parameters of the whole layer whole before its forward, which uses those of modules
    # inside whose own forward nobody calls.
    _z3_leaf = True

    def __init__(self, core: nn.Module, config: ResidualMoEConfig) -> None:
        super().__init__()
        form = _checked_form(core, config)
        self.config, self.form = config, form
        self.num_experts, self.ep_size = config.num_experts, config.ep_size
        self.num_local_experts = config.num_experts // config.ep_size
        self.expert_group_name = f"ep_size_{config.ep_size}"
        if config.ep_size > 1:
            _check_processes(config.ep_size)
            make_expert_groups(config.ep_size)

        self.core = core if config.kind.has_core else form.rest(core)
        network = form.network(core)
        self.gate = ROUTERS[config.router](network.w1_HC.shape[1], config).to(network.w1_HC.device)
        self.deepspeed_moe = nn.Module()  # DeepSpeed's checkpoints find the experts by these two names
        self.deepspeed_moe.experts = StackedExperts(config, network, self.expert_rank() * self.num_local_experts)
        self.every_expert_here: Residuals | None = None
        trains = config.trains_core if config.kind.has_core else config.train_residual
        if not (trains and config.kind.has_core and config.train_core == "auto"):  # which leaves frozen what is
            self.core.requires_grad_(trains)
        if not config.train_residual:
            self.deepspeed_moe.requires_grad_(False)
        if config.ep_size > 1:
            from rmoe.moe.deepspeed_layer import SpreadResidualMoE

            self.__class__ = SpreadResidualMoE
        self.train(core.training)

    def forward(self, x: Tensor) -> Tensor:
        """Returns y of x [..., C], or of [B, C, ...] where the core has convolutions, in the shape of x.

        In training, every process of the expert group must call it.

        Raises:
            UserError: fewer tokens than experts in a training batch of a single process; with gate_input="image", x is
                [T, C].
        """
        tokens = self.form.tokens(x)
        self._check_tokens(math.prod(tokens.shape[:-1]))  # not numel, which an exporter takes for a constant
        routing = self.gate(tokens)
        record(self, routing)
        if self.config.recompute and torch.is_grad_enabled():
            return checkpoint(self._experts, x, routing, use_reentrant=False)
        return self._experts(x, routing)

    def _experts(self, x: Tensor, routing: Routing) -> Tensor:
        if self.ep_size == 1:
            return self._mix(x, routing.expert_TK, routing.gate_TK, self.residuals())
        if self.every_expert_here is not None:
            return self._mix(x, routing.expert_TK, routing.gate_TK, self.every_expert_here)
        if self.config.sends_tokens:
            return self._send_tokens(x.reshape(-1, x.shape[-1]), routing).reshape(x.shape)
        return self._mix(x, routing.expert_TK, routing.gate_TK, *self._gather(compute_dtype(x)))

    def _send_tokens(self, x_TC: Tensor, routing: Routing) -> Tensor:
        """Sends tokens to their experts; a choice that the capacity dropped stays and gets the core."""
        mixes, residuals = self.config.mixes_weights, self.residuals()
        expert_N, gate_N1 = routing.expert_TK.flatten(), routing.gate_TK.to(x_TC.dtype).reshape(-1, 1)
        k = routing.expert_TK.shape[1]
        x_NC = x_TC.repeat_interleave(k, 0) if k > 1 else x_TC

        def experts(rows: Tensor, local_M: Tensor) -> Tensor:
            x_MC, gate_M1 = (rows[:, :-1], rows[:, -1:]) if mixes else (rows, rows.new_ones(len(rows), 1))
            return self._mix(x_MC, local_M[:, None], gate_M1, residuals)

        def send(rows: Tensor, expert_M: Tensor) -> Tensor:
            return exchange_tokens(rows, expert_M, self.num_experts, expert_group(self.ep_size), experts)

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
        x: Tensor,
        expert_TK: Tensor,
        gate_TK: Tensor,
        residuals: Residuals,
        ready: Callable[[], object] | None = None,
    ) -> Tensor:
        return self.form.mix(
            self.core,
            x,
            expert_TK,
            gate_TK,
            residuals,
            has_core=self.config.kind.has_core,
            mixes_weights=self.config.mixes_weights,
            ready=ready,
            drops=self.training and self.config.capacity_factor is not None,
        )

    def theta(self) -> Network | None:
        """Returns the core's θ0; None where the experts are networks of their own."""
        return self.form.network(self.core) if self.config.kind.has_core else None

    def residuals(self) -> Residuals:
        """Returns Δ of the experts of this process, stacked."""
        return self.deepspeed_moe.experts.residuals()  # type: ignore[union-attr,operator]

    def _gather(self, dtype: torch.dtype | None = None) -> tuple[Residuals, Callable[[], object]]:
        local = self.residuals()
        tensors, ready = gather_experts(local, expert_group(self.ep_size), dtype or local[0].dtype)
        return type(local)(*tensors), ready

    @torch.no_grad()
    def every_expert(self) -> Residuals:
        """Returns Δ of all experts; collective over the expert group."""
        if self.ep_size == 1:
            return self.residuals()
        residuals, ready = self._gather()
        ready()
        return residuals

    @torch.no_grad()
    def every_parameter(self) -> dict[str, Tensor]:
        """Returns by name the parameters of all experts as they are saved, stacked; collective as `every_expert`."""
        own: dict[str, Tensor] = self.deepspeed_moe.experts.own()  # type: ignore[union-attr,operator]
        if self.ep_size == 1:
            return own
        local = tuple(own.values())
        tensors, ready = gather_experts(local, expert_group(self.ep_size), local[0].dtype)
        ready()
        return dict(zip(own, tensors, strict=True))

    def expert_rank(self) -> int:
        """Returns the place of this process in its expert group."""
        return 0 if self.ep_size == 1 else dist.get_rank(expert_group(self.ep_size))

    def _check_tokens(self, tokens: int) -> None:
        # Of several processes one alone may have few: only all of them together know.
        if self.training and tokens < self.num_experts and not (dist.is_initialized() and dist.get_world_size() > 1):
            raise UserError(
                f"a layer got {tokens} tokens for its {self.num_experts} experts; train with larger images or "
                "batches, with fewer experts, or leave this block dense"
            )


def _checked_form(core: nn.Module, config: ResidualMoEConfig) -> Form:
    """Returns what a core is made of; refuses what the layer would compute wrongly, and prepares the activation.

    Raises:
        UserError: see `ResidualMoE`.
    """
    if not isinstance(config, ResidualMoEConfig):
        raise UserError(f"the config is {config!r}; build it by ResidualMoEConfig(...) or ResidualMoEConfig.from_dict")
    form = form_of(core)
    if form is None:
        raise UserError(f"the core is a {type(core).__name__} {_lack(core)}")
    for name, parameter in core.named_parameters():
        if not is_weight(parameter):
            raise UserError(f"the core's {name} is {described(parameter)}; {WEIGHTS}: convert it first")
    check_parts("core", core, form)
    act: Any = getattr(core, form.act)
    if isinstance(act, nn.RReLU):
        raise UserError(f"the core's activation is {act}; use one without chance: every expert computes the same one")
    if config.ep_size > 1 and config.sends_tokens and not form.plain:
        raise UserError(
            f"ep_size is {config.ep_size} and tokens travel to their experts, but a {type(core).__name__} computes "
            "more between its linear layers than an activation: use exchange='weights', or ep_size=1"
        )
    keep_input(act)
    return form


def _lack(core: nn.Module) -> str:
    """Says what a module lacks to be a feed-forward network."""
    wanted = (
        "it has linear layers fc1 (or fc1_g and fc1_x) and fc2 and an activation act, as timm's Mlp and SwiGLU, or "
        "up_proj (and gate_proj), down_proj and act_fn, as in transformers"
    )
    kinds: dict[str, Any] = {"fc1": (nn.Linear, nn.Conv2d), "act": nn.Module, "fc2": (nn.Linear, nn.Conv2d)}
    if lacking := [name for name, kind in kinds.items() if not isinstance(getattr(core, name, None), kind)]:
        return f"without {lacking[0]}; {wanted}"
    return (
        f"of {core.fc1} and {core.fc2}; fc2 must lead back from fc1's outputs, or half of them, to its inputs, and "
        "there must be one activation"
    )


def keep_input(act: nn.Module) -> None:
    """Makes an activation that overwrites its input, as `inplace=True` says, leave it: the backward pass needs it."""
    for module in act.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]


def _check_processes(ep_size: int) -> None:
    if not dist.is_initialized():
        raise UserError(f"ep_size {ep_size} needs torch.distributed: start with a launcher, or use ep_size=1")
    if dist.get_world_size() % ep_size:
        raise UserError(f"ep_size {ep_size} does not divide the {dist.get_world_size()} processes; change either")
