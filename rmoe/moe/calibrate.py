"""Gates from clusters: before the first step, the inputs of every mixture are clustered; its gate tells the clusters.

What a gate reads of some batches of the dense network is sampled evenly, standardised (z) and clustered by k-means into
E clusters, while a bias of each is moved until all hold equally many. The gate's logits become

    s · (z · c_e - |c_e|² / 2 + b_e),

of centre c_e and bias b_e, folded into the router's weight and bias; the strength s is such that the largest
probability has a given mean. Nothing else changes: a model that has just been upcycled computes the dense function for
every gate. Experts from clusters of a dense network's inputs are also Cluster-aware Upcycling's (arXiv 2604.13508).

The sample is drawn by places in the global batch, and every process clusters the same sample: gates do not depend on
the number of processes, nor on where experts live.

Shape suffixes: N sampled inputs (of tokens or images), C model width, E experts.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rmoe.config import Calibration
from rmoe.errors import UserError
from rmoe.moe.experts import LowRank, Residuals
from rmoe.moe.gate import Gate, gate_inputs
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.state import local_experts, moe_layers
from rmoe.moe.tasks import task

_ROUNDS = 10  # of k-means
_MOVES = (20, 150)  # of the biases, in each round and at last
_EVEN = 0.01  # how far from equal the loads may be, relatively, when they are left alone
_SEEDING = 64  # inputs for each expert among which k-means++ chooses
_NOTHING = torch.iinfo(torch.int64).max


class Calibrated(NamedTuple):
    """Says what became of a gate, on the sample.

    Attributes:
        inputs: number of the inputs that were clustered.
        largest_share: share of them that the busiest expert gets, 1/E … 1.
        entropy: of their spread over the experts, relative to an even one, 0 … 1.
        confidence: mean of the largest probability.
    """

    inputs: int
    largest_share: float
    entropy: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.inputs} inputs, {self.largest_share:.3f} / {self.entropy:.3f} / {self.confidence:.3f}"


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    config: Calibration | None = None,
    *,
    run: Callable[[Any], object] | None = None,
    seed: int = 0,
) -> dict[str, Calibrated]:
    """Sets the gates of a model that has just been upcycled from clusters of what they read.

    The model runs in evaluation mode, without drop path and dropout, and its batch norms' statistics stay. Afterwards
    it is in the mode that it was in. All processes call it, each with its own batches, in which row j of process r of P
    stands at place P · j + r of the global batch, as samplers deal samples out.

    Args:
        model: with `ResidualMoE` layers whose residuals have no effect yet.
        batches: the first `config.batches` of them are taken.
        config: how; None is `Calibration()`.
        run: runs the model, or as much of it as has mixtures, on a batch; None is `model(batch)`.
        seed: of the sample and the clusters, together with the layer's name; the same on every process.

    Returns:
        What became of each gate, by the layer's name; the same on every process.

    Raises:
        UserError: no layer to calibrate or no batch; experts that differ already; a layer that did not run, got inputs
            that are not finite, or fewer different inputs than it has experts.
    """
    config, layers = Calibration() if config is None else config, moe_layers(model)
    if not isinstance(config, Calibration):
        raise UserError(f"calibrate got {config!r} as its config; give an rmoe.Calibration(...), or none")
    if not layers:
        raise UserError("the model has no mixture whose gate could be calibrated; upcycle it first")
    for layer in layers.values():
        config.check(layer.config)
        if config.subspaces and not layer.form.plain:
            raise UserError(
                f"calibrate's subspaces are for networks fc2(act(fc1(x))), not {layer.form}: leave them out"
            )
    samples = {name: _Sample(layer.gate, config, _seed(seed, name)) for name, layer in layers.items()}
    with local_experts(model), _in_evaluation(model):
        for name, layer in layers.items():
            _check_untrained(name, layer.every_expert_here or layer.residuals(), layer.config.kind.has_core)
        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.enter_context(layer.gate.register_forward_pre_hook(samples[name].add))
            for batch in itertools.islice(batches, config.batches):
                (run or model)(batch)
    inputs = {name: samples.pop(name).gathered(name) for name in layers}
    # Either all gates are set or none.
    routers = {
        name: _router(name, layer.gate, inputs[name], config, _seed(seed, name)) for name, layer in layers.items()
    }
    found = {}
    for name, layer in layers.items():
        x_NC = inputs.pop(name)
        with task(0):  # all tasks begin alike
            found[name] = _set_gate(layer.gate, *routers[name], x_NC)
            if config.subspaces:
                _set_subspaces(layer, x_NC)
    return found


def _seed(seed: int, name: str) -> int:
    return (seed & 0xFFFFFFFF) << 30 | zlib.crc32(name.encode()) >> 2


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _check_untrained(name: str, residuals: Residuals, has_core: bool) -> None:
    """Checks that every expert computes the same network, which is then the dense one."""
    first = residuals.delta(0)
    for e in range(residuals[-1].shape[0]):
        for own, same in zip(residuals.delta(e), first, strict=True):
            if own is not None and same is not None and (own.any() if has_core else not torch.equal(own, same)):
                raise UserError(
                    f"the experts of {name} differ already, and its gate with them: calibration is for a model that "
                    "has just been upcycled; leave calibrate out"
                )


class _Sample:
    """Collects an even sample of what a gate reads, as the gate's pre-hook."""

    def __init__(self, gate: Gate, config: Calibration, seed: int) -> None:
        self._gate, self._seed, self._calls = gate, seed, 0
        size, device = config.tokens_per_expert * gate.config.num_experts, gate.weight.device
        self._key_N = torch.full((size,), _NOTHING, device=device)
        self._x_NC = torch.zeros(size, gate.width, device=device)
        self._finite = torch.ones((), device=device)

    def add(self, gate: nn.Module, args: tuple[Tensor]) -> None:
        """Takes in one forward pass: of all inputs so far, those of the smallest keys stay, and keys are random."""
        x_NC = gate_inputs(args[0], self._gate.config, torch.float32)
        self._finite *= x_NC.isfinite().all()
        key_N = self._keys(args[0].shape[0], len(x_NC)).to(x_NC.device)
        size = len(self._key_N)
        smallest_N = torch.cat([self._key_N, key_N]).argsort()[:size]
        comes_N = smallest_N[smallest_N >= size] - size
        leaves_N = torch.ones_like(self._key_N, dtype=torch.bool).index_fill_(0, smallest_N[smallest_N < size], False)
        self._key_N[leaves_N], self._x_NC[leaves_N] = key_N[comes_N], x_NC[comes_N]
        self._calls += 1

    def _keys(self, rows: int, inputs: int) -> Tensor:
        """Returns a random number for each input, which follows from its place in the run's sequence of batches."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        row_N1 = (torch.arange(rows) * world + rank)[:, None]
        within_1N = torch.arange(inputs // max(rows, 1))
        base = _mixed(torch.tensor(self._seed + self._calls))
        return (_mixed(_mixed(base ^ row_N1) ^ within_1N).flatten()) >> 1 & (_NOTHING - 1)

    def gathered(self, name: str) -> Tensor:
        """Returns the sample of all processes, the same on each, [N, C].

        Raises:
            UserError: the layer did not run, or an input was not finite.
        """
        there_N = self._key_N < _NOTHING
        key_N, x_NC, finite = self._key_N[there_N], self._x_NC[there_N], self._finite
        if dist.is_initialized() and dist.get_world_size() > 1:
            every = key_N.new_empty(dist.get_world_size() * len(self._key_N))
            dist.all_gather_into_tensor(every, self._key_N)
            kept_N = every[every < _NOTHING].sort().values[: len(self._key_N)]
            own_N = torch.isin(key_N, kept_N)
            # Each process puts its inputs where they belong; the others' are zeros there.
            every_NC = x_NC.new_zeros(len(kept_N), x_NC.shape[1])
            every_NC[torch.searchsorted(kept_N, key_N[own_N])] = x_NC[own_N]
            x_NC = every_NC
            dist.all_reduce(x_NC)
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        if not len(x_NC):
            raise UserError(f"{name} did not run on any batch: give batches to calibrate on, and a run that reaches it")
        if not finite:
            raise UserError(f"{name} got inputs that are not finite: look for it in the core's weights and in the data")
        return x_NC


def _mixed(x: Tensor) -> Tensor:
    """Returns int64 that look random (SplitMix64, Steele et al. 2014), modulo 2^64."""
    x = x - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x


def _router(name: str, gate: Gate, x_NC: Tensor, config: Calibration, seed: int) -> tuple[Tensor, Tensor]:
    """Clusters a sample and returns the router's weight [E, C] and bias [E] that tell the clusters.

    Raises:
        UserError: fewer different inputs than experts.
    """
    experts = gate.config.num_experts
    if len(x_NC) < experts:
        what = "tokens" if gate.config.gate_input == "token" else "images"
        raise UserError(
            f"{name} got {len(x_NC)} {what} for its {experts} experts while calibrating: give more or larger batches"
        )
    mean_C, inverse_C = _scales(x_NC)
    z_NC = (x_NC - mean_C) * inverse_C
    generator = torch.Generator().manual_seed(seed)
    # In an order of their own, so that the clusters are those of a set.
    z_NC = z_NC[(z_NC @ torch.randn(z_NC.shape[1], generator=generator).to(z_NC)).argsort()]
    centre_EC, bias_E = _balanced_clusters(name, z_NC, experts, generator)
    offset_E = bias_E - centre_EC.square().sum(1) / 2
    strength = _strength(centre_EC @ z_NC.T + offset_E[:, None], config.confidence) * gate.config.temperature
    # Logits are told apart by their differences alone: around 0 they cost the least of the z loss.
    weight_EC = strength * centre_EC.double() * inverse_C
    bias_E = strength * offset_E.double() - weight_EC @ mean_C.double()
    return weight_EC - weight_EC.mean(0), bias_E - bias_E.mean()


def _set_gate(gate: Gate, weight_EC: Tensor, bias_E: Tensor, x_NC: Tensor) -> Calibrated:
    """Sets a gate, the same on every process: the first one's in any case."""
    gate.weight.copy_(weight_EC)
    gate.bias.copy_(bias_E)
    for more in (gate.choice_bias, gate.task_bias):
        if more is not None:
            more.zero_()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(gate.weight.data, 0)
        dist.broadcast(gate.bias.data, 0)
    return _judged(gate, x_NC)


def _scales(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and 1/deviation of each feature; 0 for one that is constant but for rounding."""
    deviation_C, mean_C = torch.std_mean(x_NC, 0, correction=0)
    rounding_C = 8 * torch.finfo(x_NC.dtype).eps * mean_C.abs()
    return mean_C, torch.where(deviation_C > rounding_C, 1 / deviation_C, 0.0)


def _balanced_clusters(name: str, z_NC: Tensor, experts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns centres [E, C] and biases [E]: k-means whose biases, z · c - |c|²/2 + b, even out the clusters' sizes.

    Raises:
        UserError: there are fewer different inputs than experts.
    """
    centre_EC = _first_centres(z_NC[:: max(1, len(z_NC) // (_SEEDING * experts))], experts, generator)
    if len(centre_EC) < experts:  # what is rare may have been left out
        centre_EC = _first_centres(z_NC, experts, generator)
    if len(centre_EC) < experts:
        raise UserError(
            f"{name} got only {len(centre_EC)} different inputs for its {experts} experts while calibrating: give more "
            "batches, or fewer experts"
        )
    bias_E1 = z_NC.new_zeros(experts, 1)
    for moves in (*[_MOVES[0]] * _ROUNDS, _MOVES[1]):
        score_EN = centre_EC @ z_NC.T - centre_EC.square().sum(1, keepdim=True) / 2
        bias_E1 = _evened(score_EN, bias_E1, moves)
        if moves == _MOVES[0]:
            cluster_N = (score_EN + bias_E1).argmax(0)
            count_E1 = cluster_N.bincount(minlength=experts)[:, None]
            sum_EC = torch.zeros_like(centre_EC).index_add_(0, cluster_N, z_NC)
            centre_EC = torch.where(count_E1 > 0, sum_EC / count_E1, centre_EC)
    return centre_EC, bias_E1[:, 0]


def _first_centres(z_NC: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """Chooses inputs far from one another (k-means++, Arthur and Vassilvitskii 2007): as many as there are experts,
    fewer where there are fewer different ones.
    """
    square_N = z_NC.square().sum(1)
    distance_N = torch.ones_like(square_N)
    chosen: list[int] = []
    for _ in range(experts):
        cumulated_N = distance_N.double().cumsum(0)
        if not cumulated_N[-1] > 0:
            break
        drawn = torch.rand((), generator=generator, dtype=torch.float64).to(cumulated_N) * cumulated_N[-1]
        chosen.append(int(torch.searchsorted(cumulated_N, drawn, right=True).clamp(max=len(z_NC) - 1)))
        both_N = square_N + square_N[chosen[-1]]
        new_N = both_N - 2 * (z_NC @ z_NC[chosen[-1]])
        # What rounding leaves of the distance between equal inputs is no distance.
        new_N = torch.where(new_N > 1e-5 * both_N, new_N, 0.0)
        distance_N = new_N if len(chosen) == 1 else torch.minimum(distance_N, new_N)
    return z_NC[chosen]


def _evened(score_EN: Tensor, bias_E1: Tensor, moves: int) -> Tensor:
    """Returns the biases, from `bias_E1` on, under which the experts' loads are the most equal.

    Each has a step of its own, which grows while the load is on one side of the mean and is halved where it changes
    sides (Rprop, Riedmiller and Braun 1993).
    """
    experts, inputs = score_EN.shape
    step_E1 = (score_EN.std() / 4).expand(experts, 1)
    side_E1, best_E1, best = torch.zeros_like(bias_E1), bias_E1, math.inf
    for _ in range(moves):
        load_E1 = (score_EN + bias_E1).argmax(0).bincount(minlength=experts)[:, None]
        excess_E1 = load_E1 * (experts / inputs) - 1
        if (worst := excess_E1.abs().max().item()) < best:
            best, best_E1 = worst, bias_E1
            if worst <= _EVEN:
                break
        now_E1 = excess_E1.sign()
        turn_E1 = now_E1 * side_E1
        step_E1 = step_E1 * torch.where(turn_E1 < 0, 0.5, torch.where(turn_E1 > 0, 1.2, 1.0))
        bias_E1, side_E1 = bias_E1 - now_E1 * step_E1, now_E1
    return best_E1 - best_E1.mean()


def _strength(logits_EN: Tensor, confidence: float) -> float:
    """Returns the factor of the logits under which the largest probability has the mean `confidence`, by bisection."""
    if len(logits_EN) == 1:
        return 1.0
    below_EN = logits_EN - logits_EN.amax(0)
    spread = below_EN.square().mean().sqrt().item()
    low, high = -20.0, 20.0  # of the factor's logarithm, for logits of a spread of 1
    for _ in range(40):
        middle = (low + high) / 2
        mean = (1 / (below_EN * (math.exp(middle) / spread)).exp().sum(0)).mean().item()
        low, high = (middle, high) if mean < confidence else (low, middle)
    return math.exp((low + high) / 2) / spread


def _set_subspaces(layer: ResidualMoE, x_NC: Tensor) -> None:
    """Sets A_e of low-rank residuals to the principal directions of what the core's two layers read in each cluster."""
    residuals = layer.residuals()
    assert isinstance(residuals, LowRank)
    core = layer.core
    cluster_N = layer.gate.logits(x_NC).argmax(0)
    first = layer.expert_rank() * layer.num_local_experts
    for e in range(len(residuals.a1_ERC)):
        rows_NC = x_NC if layer.config.shared_a else x_NC[cluster_N == first + e]
        rows_NC = rows_NC.to(residuals.a1_ERC.dtype)
        for a_RC, read in (
            (residuals.a1_ERC[e], rows_NC),
            (residuals.a2_ERH[e], layer.form.inside(core, layer.form.first(core, rows_NC))),
        ):
            direction_RC = principal_directions(read, len(a_RC))
            a_RC[: len(direction_RC)] = direction_RC.to(a_RC)
    if dist.is_initialized() and dist.get_world_size() > 1 and layer.ep_size == 1:
        for a in (residuals.a1_ERC, residuals.a2_ERH):
            dist.broadcast(a, 0)


def principal_directions(x_NC: Tensor, rank: int) -> Tensor:
    """Returns orthonormal directions [R, C] in which inputs are the largest: right singular vectors, not centred.

    Their signs are such that the largest number of each is positive. They are fewer than `rank` where the inputs span
    less.
    """
    x_NC = x_NC.double()
    wide = len(x_NC) < x_NC.shape[1]
    square, vector = torch.linalg.eigh(x_NC @ x_NC.T if wide else x_NC.T @ x_NC)  # ascending
    vector = vector[:, square > 1e-10 * square[-1:]][:, -rank:].flip(1)
    direction_RC = nn.functional.normalize(vector.T @ x_NC if wide else vector.T)
    largest_R1 = direction_RC.gather(1, direction_RC.abs().argmax(1, keepdim=True))
    return direction_RC * largest_R1.sign()


def _judged(gate: Gate, x_NC: Tensor) -> Calibrated:
    """Returns how the gate, as it now stands, spreads a sample."""
    experts = gate.config.num_experts
    probability_EN = gate.logits(x_NC).softmax(0)
    share_E = probability_EN.argmax(0).bincount(minlength=experts) / len(x_NC)
    entropy = torch.special.entr(share_E).sum() / math.log(experts) if experts > 1 else torch.ones(())
    return Calibrated(len(x_NC), share_E.max().item(), entropy.item(), probability_EN.amax(0).mean().item())
