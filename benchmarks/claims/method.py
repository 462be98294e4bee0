"""The method study: which residual experts beat dense finetuning, and which control explains it if none does.

Its runs are done in the order in which they are worth most (`_order`), over as many sittings as it takes: first the
candidates for the default beside dense finetuning on five seeds, each at several rates; then the other task, the upper
bound and more seeds; then what a gain could be owed to otherwise, and single choices. All at 1200 steps, where
docs/claims.md found that arms can be told apart at all.

Candidates, by prototypes on seeds 0 to 2 (so seeds 3 to 7 are the first that did not choose them):

- `full_calibrated`: residuals of the core's shape in all blocks, cores frozen, top-1, gates from clusters. At a dense
  network's FLOPs. `full_random`: its gates start at random.
- `soft`: residuals of rank 8, all eight weighed by the gate inside one network, cores trained, their learning rate × 4,
  every other block of the last two stages. With a hundredth of the parameters.
- `soft_frozen`: the same beside frozen cores, which is what a small adapter of a shared core needs.

Controls, and what each would explain:

- `dense_lr_half`, `…_double`, `…_fourfold`: the schedule is not dense's best. The first 45 runs on a GPU showed that it
  is not: twice the rate gives dense finetuning two points of mIoU. So every arm has two rates now, of all its learning
  rates at once (`FAMILIES`), and is judged at its best, chosen on the very seeds that it is compared on. What has been
  run at one rate only has dense's best: twice the usual one in segmentation, the usual one in detection.
- `one_full`, `one_low_rank_lr_1`, `…_2`, `…_4`: the gain is the residual's (parameters, optimizer), not routing's. One
  expert has as much of it as the candidate's eight have for a token: the core's shape, or rank 64; the latter at its
  own best of three rates, since that of an eighth need not suit the whole.
- `full_fixed_gate`, `soft_fixed_gate`: any cut of the tokens does, whether learnt or not. The gates stay as they were
  drawn, without noise; soft ones are drawn wide enough to prefer someone.
- `frozen_all`, `frozen_alternate`: freezing cores is what helps, or residuals beside frozen cores do nothing. No
  residuals, in the blocks of each candidate.
- `dense_longer`: the FLOPs are. As many more steps as the soft candidate has more FLOPs a step in the miniature.
- `upper_bound_all`, `upper_bound_alternate`: full MoE training in the same blocks as its rival.
- `dense_core_longer`: for the RMoE-I arms, whose stage of upstream training makes cores longer trained.
- `former_default`: what `ResidualMoEConfig` was before the study, rank 8 for one expert a token, cores frozen.

Single choices differ from their candidate in what their names say; three seeds each, at twice the usual rate, like the
ideas of others (`ideas.py`). None of their learning rates was chosen by trial. The factor of 4 for low rank was, on
other arms than these, among 1, 4 and 10; dense has four rates.

Every mixture says all that it is made of: a change of the defaults of `ResidualMoEConfig` must change no arm.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.claims import arms
from benchmarks.claims.arms import Arm, Size, Upstream
from benchmarks.claims.ledger import Cell, fingerprint

STEPS = 1200
SEEDS, MORE_SEEDS, FEW_SEEDS = (0, 1, 2, 3, 4), (5, 6, 7), (0, 1, 2)
UNSEEN = (3, 4, 5, 6, 7)  # by the prototypes
TASKS = ("segmentation", "detection")
CANDIDATES = ("full_calibrated", "full_random", "soft", "soft_frozen")
HEADLINE = ("dense", "full_calibrated", "soft")
RATES = {"half": 0.5, "double": 2.0, "fourfold": 4.0}  # of all learning rates of an arm, × the usual ones


def at(name: str, rate: str = "double") -> str:
    """Returns what an arm is called at another one of `RATES`, by default the one that is dense's best."""
    return f"{name}_lr_{rate}"


DENSE = ("dense", *(at("dense", rate) for rate in RATES))
ONE_LOW_RANK = ("one_low_rank_lr_1", "one_low_rank_lr_2", "one_low_rank_lr_4")
FASTER = tuple(map(at, ("dense", "soft", "soft_frozen")))

_LR, _PARAMWISE = "optim_wrapper.optimizer.lr", "optim_wrapper.paramwise_cfg."
_DENSE_LR = 1e-3  # of the demo's configs, which are the study's
_RESIDUAL_LR: dict[str, Any] = {f"{_PARAMWISE}residual_lr_mult": 4.0}
_FIXED_GATE: dict[str, Any] = {f"{_PARAMWISE}gate_lr_mult": 0.0}
_CALIBRATED: dict[str, Any] = {"calibrate": {"batches": 16, "confidence": 0.7}}
_LAST_HALF = tuple(f"stages.2.blocks.{number}.mlp" for number in range(4))  # 4 of 7

_GATE: dict[str, Any] = {"noise": 1.0, "gate_std": 0.02, "losses": {"importance": 0.005}}
FULL: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 1,
    "residual": "full",
    "combine": "straight_through",
    "blocks": "all",
    "train_core": False,
    **_GATE,
}
SOFT: dict[str, Any] = {
    "num_experts": 8,
    "top_k": "all",
    "residual": "low_rank",
    "rank": 8,
    "combine": "residual",
    "blocks": "alternate_last_two_stages",
    "train_core": True,
    **_GATE,
}
SOFT_FROZEN = SOFT | {"train_core": False}
UPPER: dict[str, Any] = {
    "num_experts": 8,
    "top_k": 1,
    "residual": "experts",
    "expert_init": "random",
    "combine": "softmax",
    "capacity_factor": 1.25,
    "blocks": "alternate_last_two_stages",
    "noise": 1.0,
    "gate_std": 0.02,
    "losses": {"importance": 0.005, "load": 0.005},
    "ep_size": 1,
}
_NONE: dict[str, Any] = {"num_experts": 8, "top_k": 1, "residual": "low_rank", "rank": 1, "combine": "residual"}
_NONE |= {"train_core": False, "train_residual": False, **_GATE}
_ONE: dict[str, Any] = SOFT | {"num_experts": 1, "top_k": 1, "rank": 64}
_WIDE: dict[str, Any] = {"noise": 0.0, "gate_std": 0.1}
_TOP_1: dict[str, Any] = SOFT | {"top_k": 1, "combine": "straight_through"}

STAGES = {
    "core": Upstream(),
    "core_longer": Upstream(None, "core", 0.2),
    "moe_all": Upstream(UPPER | {"blocks": "all"}),
    "moe_alternate": Upstream(UPPER),
    "intermediate_full": Upstream(FULL, "core", 0.2, _CALIBRATED),
    "intermediate_soft": Upstream(SOFT, "core", 0.2, _RESIDUAL_LR),
}


def faster(arm: Arm, rate: str = "double") -> Arm:
    """Returns the arm at another one of `RATES`."""
    return replace(arm, options={**arm.options, _LR: RATES[rate] * _DENSE_LR})


CONTROLS = {
    "dense": Arm("core", None),
    **{at("dense", rate): faster(Arm("core", None), rate) for rate in RATES},
    "dense_longer": Arm("core", None, longer=1.083),
    "dense_core_longer": Arm("core_longer", None),
    "one_full": Arm("core", FULL | {"num_experts": 1}),
    "one_low_rank_lr_1": Arm("core", _ONE),
    "one_low_rank_lr_2": Arm("core", _ONE, {f"{_PARAMWISE}residual_lr_mult": 2.0}),
    "one_low_rank_lr_4": Arm("core", _ONE, _RESIDUAL_LR),
    "full_fixed_gate": Arm("core", FULL | {"noise": 0.0}, _FIXED_GATE),
    "soft_fixed_gate": Arm("core", SOFT | _WIDE, _RESIDUAL_LR | _FIXED_GATE),
    "frozen_all": Arm("core", _NONE | {"blocks": "all"}),
    "frozen_alternate": Arm("core", _NONE | {"blocks": "alternate_last_two_stages"}),
    "upper_bound_all": Arm("moe_all", UPPER | {"blocks": "all"}),
    "upper_bound_alternate": Arm("moe_alternate", UPPER),
}
_CANDIDATES = {
    "full_calibrated": Arm("core", FULL, _CALIBRATED),
    "full_random": Arm("core", FULL),
    "soft": Arm("core", SOFT, _RESIDUAL_LR),
    "soft_frozen": Arm("core", SOFT_FROZEN, _RESIDUAL_LR),
}
CHOICES = {
    "full_trained_core": Arm("core", FULL | {"train_core": True}, _CALIBRATED),
    "full_alternate": Arm("core", FULL | {"blocks": "alternate_last_two_stages"}, _CALIBRATED),
    "full_last_half": Arm("core", FULL | {"blocks": _LAST_HALF}, _CALIBRATED),
    "full_4_experts": Arm("core", FULL | {"num_experts": 4}, _CALIBRATED),
    "full_16_experts": Arm("core", FULL | {"num_experts": 16}, _CALIBRATED),
    "full_image_gate": Arm("core", FULL | {"gate_input": "image"}, _CALIBRATED),
    "full_intermediate": Arm("intermediate_full", FULL),
    "soft_rank_4": Arm("core", SOFT | {"rank": 4}, _RESIDUAL_LR),
    "soft_rank_16": Arm("core", SOFT | {"rank": 16}, _RESIDUAL_LR),
    "soft_all_blocks": Arm("core", SOFT | {"blocks": "all"}, _RESIDUAL_LR),
    "soft_last_half": Arm("core", SOFT | {"blocks": _LAST_HALF}, _RESIDUAL_LR),
    "soft_4_experts": Arm("core", SOFT | {"num_experts": 4}, _RESIDUAL_LR),
    "soft_16_experts": Arm("core", SOFT | {"num_experts": 16}, _RESIDUAL_LR),
    "soft_lr_1": Arm("core", SOFT),
    "soft_calibrated": Arm("core", SOFT, _RESIDUAL_LR | _CALIBRATED),
    "soft_image_gate": Arm("core", SOFT | {"gate_input": "image"}, _RESIDUAL_LR),
    "soft_intermediate": Arm("intermediate_soft", SOFT, _RESIDUAL_LR),
    "soft_frozen_all_blocks": Arm("core", SOFT_FROZEN | {"blocks": "all"}, _RESIDUAL_LR),
    "soft_frozen_rank_4": Arm("core", SOFT_FROZEN | {"rank": 4}, _RESIDUAL_LR),
    "soft_frozen_rank_16": Arm("core", SOFT_FROZEN | {"rank": 16}, _RESIDUAL_LR),
    "top_1": Arm("core", _TOP_1, _RESIDUAL_LR | _CALIBRATED),
    "former_default": Arm("core", SOFT_FROZEN | {"top_k": 1}),
}


_GIVEN: dict[str, Arm] = CONTROLS | _CANDIDATES | CHOICES
_RATED = [name for name in _GIVEN if name not in DENSE]
ARMS: dict[str, Arm] = _GIVEN | {at(name): faster(_GIVEN[name]) for name in _RATED}

# An arm at several learning rates, by its name: the best of them stands for it.
FAMILIES: dict[str, tuple[str, ...]] = {
    "dense": DENSE,
    "one_low_rank": (*ONE_LOW_RANK, *map(at, ONE_LOW_RANK)),
    **{name: (name, at(name)) for name in _RATED if name not in ONE_LOW_RANK},
}

# Which candidate a control or a choice is compared with, besides dense.
RIVALS = {
    "full_random": "full_calibrated",
    "one_full": "full_calibrated",
    "full_fixed_gate": "full_calibrated",
    "frozen_all": "full_calibrated",
    "upper_bound_all": "full_calibrated",
    **dict.fromkeys(ONE_LOW_RANK, "soft"),
    "soft_fixed_gate": "soft",
    "frozen_alternate": "soft_frozen",
    "former_default": "soft_frozen",
    "upper_bound_alternate": "soft",
    "dense_longer": "soft",
    "soft_frozen": "soft",
    **{name: "full_calibrated" for name in CHOICES if name.startswith("full_")},
    **{name: "soft" for name in CHOICES if name.startswith(("soft_", "top_"))},
    **{name: "soft_frozen" for name in CHOICES if name.startswith("soft_frozen_")},
}
RIVALS |= dict.fromkeys(map(at, _RATED), at("dense"))

_OF_FULL = ("dense", "one_full", "full_fixed_gate", "frozen_all", "upper_bound_all")
_OF_SOFT = (
    "dense",
    "one_low_rank",
    "soft_fixed_gate",
    "frozen_alternate",
    "upper_bound_alternate",
    "upper_bound_all",
    "dense_longer",
)
# What a candidate's gain could be owed to otherwise.
CONTROLS_OF = {
    "full_calibrated": _OF_FULL,
    "full_random": _OF_FULL,
    "soft": _OF_SOFT,
    "soft_frozen": _OF_SOFT,
}

# Each at the learning rate that is its best under usual conditions.
REGIME_ARMS = ("dense_lr_double", "soft_lr_double", "full_random")
# The usual conditions of `regime`, and others that differ in one of them: steps, styles of the data, width.
USUAL: tuple[int, str, float] = (STEPS, arms.FULL.scenes["styles"], 1.0)
REGIMES = (
    (STEPS, "plain,night,tinted,outline", 1.0),
    (400, USUAL[1], 1.0),
    (STEPS, "plain", 1.0),
    (STEPS, USUAL[1], 0.5),
    (3600, USUAL[1], 1.0),
    (STEPS, USUAL[1], 2.0),
)


@dataclass(frozen=True)
class Study:
    """Says what is run, in which order, and on what.

    Attributes:
        size: of the usual runs.
        arms, stages: by name.
        cells: the downstream runs, those that are worth most first.
        rivals: which arm another one is compared with, besides the reference.
        reference: the dense arm that all are compared with.
    """

    size: Size
    arms: Mapping[str, Arm]
    stages: Mapping[str, Upstream]
    cells: Sequence[Cell]
    rivals: Mapping[str, str] = field(default_factory=lambda: RIVALS)
    reference: str = "dense"

    def size_of(self, cell: Cell) -> Size:
        """Returns how much is trained on what under a cell's conditions."""
        label = "" if cell.styles in ("", self.size.scenes["styles"]) else f"_{cell.styles.replace(',', '_')}"
        size = replace(self.size, width=cell.width, label=label)
        if cell.where in TASKS:
            scenes = {**size.scenes, "styles": cell.styles}
            size = replace(size, steps=dict.fromkeys(TASKS, cell.steps), scenes=scenes)
        return size

    def fingerprint(self, cell: Cell) -> str:
        """Returns the hash of what the study says of a cell."""
        one = self.arms[cell.name] if cell.where in TASKS else self.stages[cell.name]
        return fingerprint(self.size_of(cell), self.stages, cell.where, one)

    def compared_with(self, cell: Cell) -> list[Cell]:
        """Returns the cells that a cell's differences are taken to.

        Further seeds at dense's best rate decide no rate, so they need no dense run at the usual one.
        """
        usual = [] if cell.seed in MORE_SEEDS and cell.name in FASTER else [self.reference]
        others = [*usual, self.rivals[cell.name]] if cell.name in self.rivals else usual
        return [cell._replace(name=name) for name in others if name != cell.name and name in self.arms]

    def only(self, pattern: str) -> Study:
        """Returns the study without the cells whose 'task/arm/seed/steps/styles/width' has no match for a regex."""
        kept = [
            cell
            for cell in self.cells
            if re.search(pattern, f"{cell.where}/{cell.name}/{cell.seed}/{cell.steps}/{cell.styles}/{cell.width:g}")
        ]
        return replace(self, cells=kept)


def method() -> Study:
    """Returns the study of the arms."""
    size = replace(arms.FULL, steps=dict.fromkeys(TASKS, STEPS))
    return Study(size, ARMS, STAGES, tuple(dict.fromkeys(_order())))


def regime() -> Study:
    """Returns the study of the conditions: steps, variety of the data, width of the backbone, one at a time.

    Each arm keeps the learning rate that is its best under the usual conditions; the best of others may be another. Two
    arms come first under all conditions, what tells most for its time before the rest; then the third.
    """
    cells = [
        Cell(name, "segmentation", seed, *condition)
        for names in (REGIME_ARMS[:2], REGIME_ARMS[2:])
        for condition in (USUAL, *REGIMES)
        for seed in FEW_SEEDS
        for name in names
    ]
    return replace(method(), arms={name: ARMS[name] for name in REGIME_ARMS}, cells=tuple(cells))


def quick_method() -> Study:
    """Returns a study of seconds, which shows that everything runs."""
    names = ("dense", "full_calibrated")
    return _quick([Cell(name, "segmentation", seed, 2, "plain,night", 1.0) for seed in (0, 1) for name in names])


def quick_regime() -> Study:
    """Returns the same of the conditions."""
    conditions = ((2, "plain,night", 1.0), (3, "plain", 0.5))
    return _quick([Cell(name, "segmentation", 0, *one) for one in conditions for name in ("dense", "full_calibrated")])


def _quick(cells: Sequence[Cell]) -> Study:
    size = replace(arms.QUICK, scenes={**arms.QUICK.scenes, "styles": "plain,night"}, steps=dict.fromkeys(TASKS, 2))
    return Study(size, ARMS, STAGES, cells)


def _order() -> Iterator[Cell]:
    def cells(names: Sequence[str], seeds: Sequence[int], task: str = "segmentation") -> Iterator[Cell]:
        for seed in seeds:
            for name in names:
                yield Cell(name, task, seed, *USUAL)

    yield from cells(HEADLINE, SEEDS)
    yield from cells(("dense_lr_half", *FASTER, "full_random"), SEEDS)
    yield from cells(("dense_lr_fourfold",), SEEDS[-1:])  # three points worse
    yield from cells(("dense_lr_half", "dense_lr_double", at("soft_frozen")), SEEDS[:1], "detection")  # worse, too
    yield from cells(("dense", "soft_frozen", "soft"), SEEDS, "detection")
    yield from cells(("dense", "soft"), MORE_SEEDS, "detection")
    yield from cells(("one_low_rank_lr_1", "soft_fixed_gate"), UNSEEN, "detection")
    yield from cells(("one_low_rank_lr_4", "dense_longer", "full_calibrated", "upper_bound_all"), UNSEEN, "detection")
    yield from cells((at("upper_bound_all"), at("frozen_alternate"), at("former_default")), FEW_SEEDS)
    yield from cells(("dense", "soft", *FASTER), MORE_SEEDS)
    yield from cells((at("full_random"), at("full_calibrated")), FEW_SEEDS)
    yield from cells(("one_full", "full_fixed_gate"), FEW_SEEDS)
    yield from cells((at("full_random"),), SEEDS[-1:])  # begun before dense's best rate was known
    yield from cells(("one_low_rank_lr_2", "soft_fixed_gate"), SEEDS[:1])
    yield from cells((at("one_full"), at("full_fixed_gate"), at("soft_fixed_gate")), FEW_SEEDS)
    yield from cells((at("one_low_rank_lr_1"), at("one_low_rank_lr_4"), at("dense_longer")), FEW_SEEDS)
    yield from cells(("dense_lr_half", "dense_lr_double"), FEW_SEEDS, "detection")
    yield from cells(("soft_frozen",), MORE_SEEDS, "detection")
    yield from cells(tuple(map(at, _RATED)), FEW_SEEDS)
