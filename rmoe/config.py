"""The configuration of a residual mixture of experts: frozen, strict, one object passed on whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from rmoe.errors import UserError
from rmoe.fields import check_fields, from_dict

Residual = Literal["low_rank", "segments", "sparse", "full", "experts"]
ExpertInit = Literal["core", "random"]
Combine = Literal["auto", "residual", "straight_through", "softmax"]
Exchange = Literal["auto", "tokens", "weights"]
GateInput = Literal["token", "image"]
Router = Literal["linear", "cosine", "mlp", "expert_choice", "task"]
Blocks = Literal["alternate_last_two_stages", "alternate", "last_two", "all"]


class Kind(NamedTuple):
    """Says what the configuration has to know of a kind of residual; the class of the same key in `rmoe.moe.kinds`
    has its parameters and its start.

    Attributes:
        has_core: whether the kind is added to a core; without one the experts are networks of their own.
        combine: what "auto" means, for experts that start as the core does.
        exchange: likewise.
        has_rank: whether it is a product of two factors of `rank`, which `alpha` scales; then top_k="auto" is `all`
            where such residuals meet inside the network, and train_core="auto" trains the core.
        lr_mult: of its learning rate, unless a config says another: factors that begin at a product of zero are trained
            at four times the rate of what has the core's shape (docs/design.md).
    """

    has_core: bool
    combine: Combine
    exchange: Exchange
    has_rank: bool = False
    lr_mult: float = 1.0


KINDS: dict[Residual, Kind] = {
    "low_rank": Kind(True, "residual", "weights", has_rank=True, lr_mult=4.0),
    "segments": Kind(True, "residual", "weights", has_rank=True, lr_mult=4.0),
    "sparse": Kind(True, "straight_through", "tokens"),
    "full": Kind(True, "straight_through", "tokens"),
    "experts": Kind(False, "straight_through", "tokens"),
}
_MOST = 65536  # of anything that is counted; what is larger is a mistake, and would take all memory
_LEAST, _LARGEST = 1e-6, 1e6  # of what is measured, likewise: beyond them float32 overflows


@dataclasses.dataclass(frozen=True)
class GateLosses:
    """Weighs the auxiliary losses of a gate; a loss of weight 0 is not computed. They are summed over layers.

    Attributes:
        importance: squared coefficient of variation of the summed gate probabilities (V-MoE, arXiv 2106.05974, eq. 8).
        load: the same of the smoothed number of tokens; it is defined by the gate's noise and needs some (V-MoE, A.1).
        balance: experts × Σ mean probability × share of first choices (GShard, arXiv 2006.16668, algorithm 1; Switch).
            CuMo (arXiv 2405.05949) finetunes upcycled experts with it, at 0.1, and with `z`, at 0.01.
        z: mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5).
        task_information: the negative mutual information of task and expert, of a mixture with `tasks`: experts become
            some tasks' own (Mod-Squad, arXiv 2212.08066, section 3); see `rmoe.moe.tasks.task_information`.
    """

    importance: float = 0.005
    load: float = 0.0
    balance: float = 0.0
    z: float = 0.0
    task_information: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, weight in dataclasses.asdict(self).items():
            if weight < 0:
                raise UserError(f"GateLosses.{name} is {weight}; a loss weight is 0 (off) or positive")


@dataclasses.dataclass(frozen=True)
class ResidualMoEConfig:
    """Says how dense feed-forward networks become residual mixtures of experts.

    The paper's abstract fixes the method (core + residual); the number of experts, their placement, the gate and its
    losses are choices of this project.

    Attributes:
        num_experts: experts of each layer, E.
        top_k: experts that each token uses, K; `all` weighs every expert by its probability (soft mixing). `auto` is
            `all` for `low_rank` and `segments` with combine `residual`, which then take one network and one product of
            E · `rank` columns, unless the router is `expert_choice` or `task`; else it is 1.
        residual: `low_rank` (Δ_e = B_eᵀA_e of `rank`, weights only), `full` (Δ_e of the core's shape, biases too) or
            `experts` (no core: each expert is a network of its own, as in full MoE training, the upper bound). Weights
            only, too: `segments`, low rank from segments of the core's singular vectors (GOAT, arXiv 2502.16894), and
            `sparse`, of the core's shape on a random support (DeRS-SM, arXiv 2503.01359).
        rank: R of `low_rank` and `segments`.
        density: share of the core's weights that is the support of `sparse`.
        alpha: strength of low rank: Δ_e = α/√R · B_eᵀA_e (rsLoRA, arXiv 2312.03732); None: Δ_e = B_eᵀA_e.
        shared_a: `low_rank` residuals of a layer share one A and have a B each (HydraLoRA, arXiv 2404.19245).
        expert_init: how `experts` start: as copies of the dense network (`core`, sparse upcycling, arXiv 2212.05055) or
            each drawn anew (`random`, full MoE pretraining).
        combine: where the gate value enters. `residual`: θ(x) = θ0 + Σ g_e Δ_e with g the softmax probability;
            `straight_through`: y = Σ g_e FFN(x; θ0 + Δ_e) with Σ g_e = 1 forward and the gradient of the probability
            backward; `softmax`: y = Σ p_e FFN(x; θ0 + Δ_e), as V-MoE (does not preserve the dense function); `auto`:
            the cheapest that preserves the function, `residual` for `low_rank` and `segments`, `straight_through` for
            `full`, `sparse` and `experts` copied from the core; `softmax` for those drawn anew, which have none to
            preserve.
        capacity_factor: an expert takes at most ⌈factor · tokens · K / E⌉ tokens of the global training batch (or so
            many images, with gate_input="image"), the highest gate values first; None (the default) never drops.
            Evaluation never drops.
        noise: standard deviation of the gate's training noise, in units of 1/E (V-MoE uses 1); there is none where a
            token uses every expert.
        losses: weights of the gate's auxiliary losses.
        router: how the gate decides: by `linear` logits, s · cos(w_e, x) + b_e with s learnt (`cosine`; X-MoE, arXiv
            2204.09179) or w_e · relu(V x) + b_e (`mlp`; ModuleFormer, arXiv 2306.04640); each expert takes its best
            tokens of each image, K experts per token on average (`expert_choice`, arXiv 2202.09368); or task t uses
            expert t alone, and nothing is learnt (`task`).
        tasks: how many tasks share the mixture. With several a gate has a learnt bias for each of them besides that for
            all, and a model runs inside of `rmoe.task`, as `rmoe.MultiTask` does.
        expert_drop: chance with which each expert is left out of a layer's choice, anew for each training batch (MoE
            Jetpack, arXiv 2406.04801, drops 0.4 of them); at least `top_k` stay.
        temperature: the gate's logits are divided by it; below 1 decides harder, above 1 more softly.
        gate_input: what the gate reads: each `token`, or the mean over the tokens of its `image`, which then shares one
            decision (as ParaX and ViMoE do).
        balance_rate: how far, after each step, a bias is moved that is added to the probabilities where experts are
            chosen, and nowhere else: up for those with fewer tokens than the mean, down for the others (loss-free
            balancing, arXiv 2408.15664, which uses 0.001); 0 is off. It suits gates that are unsure: beside
            probabilities near 0 and 1 the biases grow until they decide alone (`bias_balanced` in docs/arms.md).
        gate_std: standard deviation of the router's initial weights; `rmoe verify` takes 1, for gates that are decided
            from the start.
        blocks: which feed-forward networks become MoE: every second one of each stage (`alternate`), the same of the
            last two stages alone (`alternate_last_two_stages`), the `last_two` of the model, or `all`; or a tuple of
            their names as they stand in the model, such as "layers.3.blocks.1.mlp". A model without stages counts as
            one.
        train_core: train θ0 as well, or freeze it, as several tasks need that share one core; `auto` trains it beside
            residuals of low rank, which gain from it (docs/claims.md), if it was not frozen before, and freezes it
            beside others.
        train_residual: train Δ (or the `experts`); False fixes them, as Swin-MoE does while finetuning for detection.
        recompute: run the experts again for backward instead of keeping their activations; the gate decides once.
        ep_size: processes over which the experts of a layer are spread; divides E and the number of processes. Fixed
            experts have neither gradients nor optimizer states to share out: every process has all, and this becomes 1.
        exchange: with ep_size > 1, send `tokens` to their experts or the experts' `weights` to the tokens; `auto`
            sends weights for `low_rank` and `segments`, and for any kind where several experts of a token are added up
            inside one network (combine `residual`); otherwise tokens.
    """

    num_experts: int = 8
    top_k: int | Literal["auto", "all"] = "auto"
    residual: Residual = "low_rank"
    rank: int = 8
    density: float = 0.02
    alpha: float | None = None
    shared_a: bool = False
    expert_init: ExpertInit = "core"
    combine: Combine = "auto"
    capacity_factor: float | None = None
    noise: float = 1.0
    losses: GateLosses = GateLosses()
    router: Router = "linear"
    tasks: int = 1
    expert_drop: float = 0.0
    temperature: float = 1.0
    gate_input: GateInput = "token"
    balance_rate: float = 0.0
    gate_std: float = 0.02
    blocks: Blocks | tuple[str, ...] = "alternate_last_two_stages"
    train_core: bool | Literal["auto"] = "auto"
    train_residual: bool = True
    recompute: bool = False
    ep_size: int = 1
    exchange: Exchange = "auto"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ResidualMoEConfig:
        """Builds a configuration from plain data, see `rmoe.fields.from_dict`."""
        return from_dict(cls, values)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("num_experts", "top_k", "rank", "tasks", "ep_size"):
            if isinstance(number := getattr(self, name), int) and not 1 <= number <= _MOST:
                raise UserError(f"ResidualMoEConfig.{name} is {number}; it is 1 to {_MOST}")
        for name, number in vars(self).items():
            if isinstance(number, (int, float)) and number > _LARGEST:
                raise UserError(f"ResidualMoEConfig.{name} is {number:g}; it is at most {_LARGEST:g}")
        if self.blocks == ():
            raise UserError("ResidualMoEConfig.blocks is empty; name a block, or use blocks='all'")
        if self.experts_per_token > self.num_experts:
            raise UserError(f"top_k is {self.top_k}, more than the {self.num_experts} experts; lower top_k")
        if self.num_experts % self.ep_size:
            raise UserError(
                f"ep_size {self.ep_size} does not divide the {self.num_experts} experts; "
                f"use one of {[n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]}"
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise UserError(f"capacity_factor is {self.capacity_factor}; it is positive, or None to drop no token")
        if self.noise < 0 or self.gate_std < 0:
            raise UserError(f"noise is {self.noise} and gate_std {self.gate_std}; neither may be negative")
        if self.temperature < _LEAST:
            raise UserError(
                f"temperature is {self.temperature}; it is at least {_LEAST:g}, and 1 leaves the logits as they are"
            )
        if not 0 <= self.expert_drop < 1:
            raise UserError(f"expert_drop is {self.expert_drop}; it is a chance, from 0 (off) to less than 1")
        if self.expert_drop and not self.chooses:
            raise UserError(
                f"expert_drop leaves experts out of a choice, and top_k={self.top_k!r} leaves none: set it to 0, or "
                "top_k to 1"
            )
        if self.expert_drop and self.losses.load:
            raise UserError(
                "losses.load is defined for all experts, and expert_drop leaves some out: set one of them to 0"
            )
        if self.alpha is not None and self.alpha <= 0:
            raise UserError(f"alpha is {self.alpha}; it is positive, or None for Δ = BᵀA")
        if not 0 < self.density <= 1:
            raise UserError(
                f"density is {self.density}; it is a share of the core's weights, more than 0 and at most 1"
            )
        if self.alpha is not None and not self.kind.has_rank:
            raise UserError(f"alpha belongs to residuals of low rank, not to residual='{self.residual}'; leave it out")
        if self.shared_a and self.residual != "low_rank":
            raise UserError(f"shared_a belongs to residual='low_rank', not '{self.residual}'; leave it out")
        if self.router == "expert_choice":
            self._check_expert_choice()
        if self.balance_rate < 0:
            raise UserError(f"balance_rate is {self.balance_rate}; it is 0 (off) or positive, such as 0.001")
        if self.balance_rate and not self.chooses:
            raise UserError(
                f"balance_rate has no effect where each token uses every expert, as with top_k={self.top_k!r}: set it "
                "to 0, or top_k to 1"
            )
        if self.capacity_factor is not None and not self.chooses:
            raise UserError(
                "capacity_factor is for tokens that use some of the experts, not all, as with "
                f"top_k={self.top_k!r}: set it to None, or top_k to 1"
            )
        self._check_tasks()
        if self.losses.load and not (self.noise and self.chooses):
            raise UserError(
                f"losses.load needs noise and a choice, and there are noise={self.noise:g} and top_k={self.top_k!r} of "
                f"{self.num_experts} experts: set noise to 1 and top_k to 1, or losses.load to 0"
            )
        if self.losses.load and self.balance_rate:
            raise UserError(
                "losses.load and balance_rate both even out the choices, each by itself: set one of them to 0"
            )
        if not self.kind.has_core and self.combine == "residual":
            raise UserError(f"residual='{self.residual}' has no core to add residuals to: use combine='softmax'")
        if not self.kind.has_core and self.trains_core:
            raise UserError(f"residual='{self.residual}' has no core to train: leave train_core out")
        if not self.train_residual:
            object.__setattr__(self, "ep_size", 1)
        if self.shared_a and self.ep_size > 1:
            raise UserError(
                f"ep_size is {self.ep_size}, but experts with a shared_a stay together: use ep_size=1, or no shared_a"
            )
        if self.exchange == "tokens" and self.mixes_weights and self.experts_per_token > 1:
            raise UserError(
                "exchange='tokens' cannot add the residuals of several experts inside one network: use "
                "exchange='weights', combine='straight_through' or top_k=1"
            )

    def _check_expert_choice(self) -> None:
        """Checks that nothing else decides how many tokens an expert has, and that residuals meet in one network."""
        others = {"capacity_factor": None, "expert_drop": 0.0, "balance_rate": 0.0, "gate_input": "token"}
        said = [name for name, off in others.items() if getattr(self, name) != off]
        said += ["losses.load"] if self.losses.load else []
        if said:
            raise UserError(
                f"router='expert_choice' gives every expert as many tokens of each image, and {said[0]} has no meaning "
                "there: leave it out"
            )
        if not self.chooses:
            raise UserError(
                f"router='expert_choice' is for tokens that use some of the experts, and top_k is {self.top_k} of "
                f"{self.num_experts}: set top_k lower, or router='linear'"
            )
        if not self.mixes_weights or self.exchange == "tokens":
            raise UserError(
                f"router='expert_choice' adds up the residuals of any number of experts inside one network, and "
                f"combine is '{self.combined}', exchange '{self.exchange}': use combine='residual' and "
                "exchange='weights'"
            )

    def _check_tasks(self) -> None:
        if self.losses.task_information and self.tasks == 1:
            raise UserError("losses.task_information is for a mixture of several tasks: set it to 0, or give tasks")
        if self.router != "task":
            return
        if self.tasks == 1 or (self.num_experts, self.experts_per_token) != (self.tasks, 1):
            raise UserError(
                f"router='task' gives each task one expert, but tasks is {self.tasks}, num_experts {self.num_experts} "
                f"and top_k {self.top_k}: set num_experts to tasks, at least 2, and top_k to 1"
            )
        if self.losses == GateLosses():
            object.__setattr__(self, "losses", GateLosses(importance=0.0))
        learns = any(dataclasses.asdict(self.losses).values())
        if learns or self.balance_rate or self.expert_drop or self.capacity_factor is not None:
            raise UserError(
                "router='task' learns and balances nothing: leave losses, balance_rate, expert_drop, capacity out"
            )

    @property
    def kind(self) -> Kind:
        """Returns what is to be known of the kind of `residual`."""
        return KINDS[self.residual]

    @property
    def scale(self) -> float:
        """Returns what Δ is multiplied by, see `alpha`."""
        return 1.0 if self.alpha is None else self.alpha / self.rank**0.5

    @property
    def experts_per_token(self) -> int:
        """Returns K as a number: `top_k`, with "auto" resolved, or every expert."""
        if isinstance(self.top_k, int):
            return self.top_k
        meet = self.mixes_weights and self.kind.has_rank and self.router not in ("expert_choice", "task")
        return self.num_experts if self.top_k == "all" or meet else 1

    @property
    def trains_core(self) -> bool:
        """Says whether θ0 trains: `train_core`, with "auto" resolved."""
        return self.kind.has_rank if self.train_core == "auto" else self.train_core

    def resolved(self) -> ResidualMoEConfig:
        """Returns the same mixture with nothing left to "auto", nor said otherwise than by its shortest word."""
        return dataclasses.replace(
            self,
            top_k=self.experts_per_token if self.chooses else "all",
            combine=self.combined,
            train_core=self.trains_core,
            exchange="tokens" if self.sends_tokens else "weights",
        )

    @property
    def chooses(self) -> bool:
        """Says whether a token uses some of the experts, rather than all."""
        return self.experts_per_token < self.num_experts

    @property
    def used(self) -> str:
        """Returns in words which experts a token uses."""
        return f"top {self.experts_per_token}" if self.chooses else "all of them"

    @property
    def combined(self) -> Combine:
        """Returns how gate values enter: `combine`, with "auto" resolved."""
        if self.combine != "auto":
            return self.combine
        drawn_anew = not self.kind.has_core and self.expert_init == "random"
        return "softmax" if drawn_anew else self.kind.combine

    @property
    def mixes_weights(self) -> bool:
        """Says whether gate values multiply residuals inside one network; else they weigh several outputs."""
        return self.combined == "residual"

    @property
    def normalises(self) -> bool:
        """Says whether a token's gate values sum to 1, with the gradient of the probabilities."""
        return self.combined == "straight_through"

    @property
    def preserves(self) -> bool:
        """Says whether the model computes, right after it has been upcycled, what the dense one does."""
        return (self.mixes_weights or self.normalises) and (self.kind.has_core or self.expert_init == "core")

    @property
    def sends_tokens(self) -> bool:
        """Says whether tokens travel to their experts, where these are spread over processes (`exchange`)."""
        if self.exchange != "auto":
            return self.exchange == "tokens"
        several = self.experts_per_token > 1 or self.router == "expert_choice"
        return self.kind.exchange == "tokens" and not (self.mixes_weights and several)


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Says how gates are set from clusters of what they read, before the first step; see `rmoe.moe.calibrate`.

    Attributes:
        batches: training batches of each process that the dense network is run on.
        confidence: mean over the tokens of a gate's largest probability, more than 1/E and less than 1.
        tokens_per_expert: how many of the gate's inputs are clustered, for each expert; with more clusters are more
            exact, and take longer to find.
        subspaces: rows of A_e of `low_rank` residuals become the principal directions of what the core's layers read in
            expert e's cluster, as EVA (arXiv 2410.07170) takes them from all inputs; else they stay random.
    """

    batches: int = 16
    confidence: float = 0.7
    tokens_per_expert: int = 256
    subspaces: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Builds a calibration from plain data, see `rmoe.fields.from_dict`."""
        return from_dict(cls, values)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("batches", "tokens_per_expert"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise UserError(f"Calibration.{name} is {getattr(self, name)}; it is 1 to {_MOST}")
        if not 0 < self.confidence < 1:
            raise UserError(f"Calibration.confidence is {self.confidence}; it is between 0 and 1, such as 0.7")

    def check(self, moe: ResidualMoEConfig) -> None:
        """Checks that the gates of `moe` can be calibrated so.

        Raises:
            UserError: the mixture does not begin as the dense network, or even gates are more confident.
        """
        if not moe.preserves:
            raise UserError(
                f"calibrate needs a mixture that begins as the dense network, and residual='{moe.residual}' with "
                f"combine='{moe.combined}' and expert_init='{moe.expert_init}' does not: leave calibrate out"
            )
        if moe.num_experts > 1 and self.confidence <= 1 / moe.num_experts:
            raise UserError(
                f"Calibration.confidence is {self.confidence}, and {moe.num_experts} experts weighed evenly have "
                f"{1 / moe.num_experts:.3g} each: give more, such as 0.7"
            )
        if moe.router != "linear":
            raise UserError(f"calibrate sets linear gates, and router is '{moe.router}': use 'linear', or no calibrate")
        if self.subspaces and (moe.residual != "low_rank" or moe.gate_input != "token"):
            raise UserError(
                f"calibrate's subspaces are for residual='low_rank' with gate_input='token', not '{moe.residual}' with "
                f"'{moe.gate_input}': leave subspaces out"
            )
