"""Ideas of other papers for how experts are routed, shaped and started, each one or two changed keys of a candidate.

Each is compared with dense finetuning at its best rate and with the arm that it changes, under the protocol of the
method study, whose runs it shares: segmentation, three seeds, more for what does well. It is trained at the rate that
the method study found best for the candidate it goes back to (`run_as`); nothing else is tuned for any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.claims import method
from benchmarks.claims.arms import Arm
from benchmarks.claims.ledger import Cell
from benchmarks.claims.method import ARMS, FEW_SEEDS, FULL, SEEDS, SOFT, USUAL, Study, at, faster

_CALIBRATED, _LR_4 = ARMS["full_calibrated"].options, ARMS["soft"].options
_OFF = {"importance": 0.0}


class Idea(NamedTuple):
    """Is an arm that tries an idea.

    Attributes:
        words: the idea, with its equation.
        source: the paper that has it.
        of: the arm that it changes, or a control of the method study that is the idea.
        arm: None where the method study has it under the same name.
    """

    words: str
    source: str
    of: str
    arm: Arm | None = None


def _full(options: Mapping[str, Any] | None = None, **keys: Any) -> Arm:
    return Arm("core", FULL | keys, _CALIBRATED if options is None else options)


def _soft(options: Mapping[str, Any] | None = None, **keys: Any) -> Arm:
    return Arm("core", SOFT | keys, _LR_4 if options is None else options)


IDEAS: dict[str, Idea] = {
    "full_calibrated": Idea(
        "gates tell the clusters of their inputs: logits s · (z · c_e − ‖c_e‖²/2 + b_e), from k-means",
        "Cluster-aware Upcycling, 2604.13508",
        "full_random",
    ),
    "full_random": Idea("gates start at random: logits w_e · x + b_e, w_e ~ N(0, 0.02²)", "V-MoE, 2106.05974", "dense"),
    "full_fixed_gate": Idea("gates stay as they were drawn", "COMET, 2410.08003", "full_calibrated"),
    "cosine": Idea(
        "logits s · cos(w_e, x) + b_e, s learnt", "X-MoE, 2204.09179", "full_random", _full({}, router="cosine")
    ),
    "mlp": Idea("logits w_e · relu(V x) + b_e", "ModuleFormer, 2306.04640", "full_random", _full({}, router="mlp")),
    "bias_balanced": Idea(
        "the choice is by p + b, b_e += 0.001 · sign(mean load − load of e); no loss",
        "loss-free balancing, 2408.15664",
        "full_calibrated",
        _full(balance_rate=0.001, losses=_OFF),
    ),
    "top_2_of_4": Idea(
        "two of four experts, Σ g_e FFN(x; θ0 + Δ_e), losses balance 0.1 and z 0.01, no noise",
        "CuMo, 2405.05949",
        "full_random",
        _full({}, num_experts=4, top_k=2, noise=0.0, losses={"importance": 0.0, "balance": 0.1, "z": 0.01}),
    ),
    "expert_drop": Idea(
        "each expert is left out of a batch with chance 0.4",
        "MoE Jetpack, 2406.04801",
        "full_calibrated",
        _full(expert_drop=0.4),
    ),
    "falling_temperature": Idea(
        "logits / τ, τ from 2 to 1 over the first half",
        "MoE Jetpack, 2406.04801",
        "full_calibrated",
        _full({**_CALIBRATED, "custom_hooks": [{"type": "rmoe.TemperatureHook", "begin": 2.0, "until": 0.5}]}),
    ),
    "averaged_experts": Idea(
        "Δ_e ← Δ_e + 0.1 · (mean Δ − Δ_e) after each step",
        "Experts Weights Averaging, 2308.06093",
        "full_calibrated",
        _full({**_CALIBRATED, "custom_hooks": [{"type": "rmoe.AverageExpertsHook", "rate": 0.1}]}),
    ),
    "full_image_gate": Idea(
        "one decision for an image, from the mean of its tokens, gates from clusters of images",
        "MoCE, 2402.05382",
        "full_calibrated",
    ),
    "sparse": Idea(
        "Δ_e is 0 but on a random 2 % of the core's weights, one support for all experts",
        "DeRS-SM, 2503.01359",
        "full_calibrated",
        _full(residual="sparse", density=0.02),
    ),
    "full_trained_core": Idea("the core is trained, too: W_s + Δ_e", "DeRS, 2503.01359", "full_calibrated"),
    "soft": Idea(
        "all experts in one network, θ0 + Σ p_e(x) B_eᵀA_e", "Residual MoE, 2204.09636, with soft weights", "dense"
    ),
    "soft_image_gate": Idea("the same, p_e(x̄) of an image's mean", "ParaX, 2602.06862; Octavius, 2311.02684", "soft"),
    "soft_calibrated": Idea("the same, gates from clusters", "Cluster-aware Upcycling, 2604.13508", "soft"),
    "subspaces": Idea(
        "the same, rows of A_e the principal directions of cluster e",
        "EVA, 2410.07170",
        "soft_calibrated",
        _soft({**_LR_4, "calibrate": {"batches": 16, "confidence": 0.7, "subspaces": True}}),
    ),
    "shared_a": Idea("Δ_e = B_eᵀA", "HydraLoRA, 2404.19245", "soft", _soft(shared_a=True)),
    "scaled": Idea(
        "Δ_e = α/√R · B_eᵀA_e, α = 2√R, learning rate × 2",
        "rsLoRA, 2312.03732",
        "soft",
        _soft({"optim_wrapper.paramwise_cfg.residual_lr_mult": 2.0}, alpha=2.0 * 8**0.5),
    ),
    "segments": Idea(
        "Δ_e = (B_e + b_e)ᵀ(A_e + a_e) − B_eᵀA_e, B_eᵀA_e of the e-th segment of W = UΣVᵀ, a and b from 0",
        "GOAT, 2502.16894, the start taken off each expert",
        "soft",
        _soft(residual="segments"),
    ),
    "expert_choice": Idea(
        "θ0 + Σ p_e(x) B_eᵀA_e over the experts that take x: each takes ⌈2n/8⌉ of an image's n tokens, by p_e",
        "expert choice, 2202.09368, within an image",
        "soft",
        _soft(router="expert_choice", top_k=2),
    ),
    "soft_cosine": Idea("p from cosines", "X-MoE, 2204.09179", "soft", _soft(router="cosine")),
    "top_1": Idea("one expert, Δ_e at its whole weight, gates from clusters", "DeRS-LM, 2503.01359", "soft"),
    "upper_bound_all": Idea("experts without a core, trained upstream, too", "V-MoE, 2106.05974", "dense"),
}

# Those that three seeds put nearest to dense finetuning, or above it, and the method study has not got: five seeds.
BEST = ("scaled", "top_2_of_4", "segments")


def run_as(name: str) -> str:
    """Returns the arm of the study that an idea, or an arm that one changes, is run as.

    That is at the usual rates for what goes back to residuals of the core's shape, which lose two points at twice of
    them; and at twice of them for all else, as for dense finetuning.
    """
    root = name
    while root in IDEAS and IDEAS[root].of != "dense":
        root = IDEAS[root].of
    return name if root == "full_random" else at(name)


def ideas() -> Study:
    """Returns the study of the ideas; what the method study has runs of is not run again."""
    arms = {}
    for name, idea in IDEAS.items():
        arm, run = idea.arm or ARMS[name], run_as(name)
        arms[run] = arm if run == name else faster(arm)
    cells = [Cell(name, "segmentation", seed, *USUAL) for seed in FEW_SEEDS for name in (at("dense"), *arms)]
    rivals = {run_as(name): run_as(idea.of) for name, idea in IDEAS.items()}
    best = [*map(run_as, BEST)]
    further = dict.fromkeys([at("dense"), *(rivals[name] for name in best), *best])
    cells += [Cell(name, "segmentation", seed, *USUAL) for seed in SEEDS[len(FEW_SEEDS) :] for name in further]
    return replace(method.method(), arms=ARMS | arms, cells=tuple(cells), rivals=rivals, reference=at("dense"))


def quick_ideas() -> Study:
    """Returns a study of seconds, which shows that everything runs."""
    few = method.quick_method()
    cells = [cell._replace(name=name) for cell in few.cells[:1] for name in ("dense", "cosine")]
    return replace(few, arms=ideas().arms, cells=tuple(cells), rivals={})
