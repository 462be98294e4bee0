"""Gates from clusters: loads, confidence, the function, and the same for every order and number of processes."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath, Mlp, SwiGLU
from torch import Tensor, nn

import rmoe
from rmoe.config import Calibration, ResidualMoEConfig
from rmoe.errors import UserError
from rmoe.moe import calibrate as module
from rmoe.moe.calibrate import calibrate, principal_directions
from rmoe.moe.layer import ResidualMoE

WIDTH, EXPERTS = 6, 4


def model(**config: object) -> nn.Module:
    """A mixture behind layers that evaluation changes; in training mode."""
    torch.manual_seed(0)
    values = {"num_experts": EXPERTS, "top_k": 1, "rank": 2, **config}
    mixture = ResidualMoE(Mlp(WIDTH, 2 * WIDTH), ResidualMoEConfig.from_dict(values))
    return nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), DropPath(0.5), mixture).train()


def bare(**config: object) -> ResidualMoE:
    return model(**config)[-1]


def clouds(count: int = 400, seed: int = 1, unevenly: bool = False) -> Tensor:
    """Tokens of four clouds, [T, C]; unevenly: one has half of them."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(EXPERTS, WIDTH, generator=torch.Generator().manual_seed(0))
    which = torch.randint(6 if unevenly else EXPERTS, (count,), generator=generator) % EXPERTS
    return centres[which] + torch.randn(count, WIDTH, generator=generator)


def weights(moe: ResidualMoE) -> Tensor:
    return torch.cat([moe.gate.weight, moe.gate.bias[:, None]], 1).detach()


def load_and_confidence(moe: ResidualMoE, x: Tensor) -> tuple[Tensor, float]:
    probability = moe.gate.eval()(x).probability_TE
    return probability.argmax(1).bincount(minlength=EXPERTS) / len(probability), probability.amax(1).mean().item()


@pytest.mark.parametrize("config", [{}, {"top_k": "all"}, {"residual": "full"}, {"residual": "experts"}, {"top_k": 2}])
def test_loads_are_even_the_confidence_is_the_one_asked_for_and_the_function_stays(config: dict[str, object]) -> None:
    dense, mixture = model(**config), model(**config)
    x = clouds(unevenly=True)
    (found,) = calibrate(mixture, [x], Calibration(confidence=0.8, tokens_per_expert=100)).values()
    load, confidence = load_and_confidence(mixture[-1], mixture[0].eval()(x))
    assert (load * EXPERTS - 1).abs().max() <= 0.03
    assert confidence == pytest.approx(0.8, abs=1e-3)
    assert found.inputs == 400
    assert (found.largest_share, found.confidence) == pytest.approx((load.max().item(), confidence))
    y, expected = mixture.eval()(x), dense.eval()(x)
    torch.testing.assert_close(y, expected)
    if not config:
        assert torch.equal(y, expected)


def test_separate_clouds_are_told_apart() -> None:
    moe = bare()
    generator = torch.Generator().manual_seed(0)
    corners = 20 * torch.eye(WIDTH)[:EXPERTS]
    x = corners[:, None] + torch.randn(EXPERTS, 50, WIDTH, generator=generator)
    calibrate(moe, [x], Calibration(confidence=0.99))
    chosen = moe.gate.eval()(x).expert_TK.view(EXPERTS, 50)
    assert (chosen == chosen[:, :1]).all()
    assert chosen[:, 0].sort().values.tolist() == [0, 1, 2, 3]


def test_nothing_but_the_gate_changes() -> None:
    mixture = model()
    mixture[1].eval()
    before, modes = copy.deepcopy(mixture.state_dict()), [m.training for m in mixture.modules()]
    random = torch.get_rng_state()
    calibrate(mixture, [clouds()])
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in mixture.modules()] == modes
    changed = {name for name, x in mixture.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == {"3.gate.weight", "3.gate.bias"}
    assert not mixture[-1].gate._forward_pre_hooks


def test_the_seed_decides() -> None:
    found = []
    for seed in (0, 0, 1):
        moe = bare()
        calibrate(moe, [clouds()], seed=seed)
        found.append(weights(moe))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


@settings(max_examples=6)
@given(st.integers(0, 2**31))
def test_the_order_of_tokens_does_not_matter(seed: int) -> None:
    x = clouds()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    one, other = bare(), bare()
    calibrate(one, [x])
    calibrate(other, [x[order]])
    torch.testing.assert_close(weights(other), weights(one), rtol=1e-3, atol=1e-3)


@settings(max_examples=6)
@given(st.floats(0.01, 100), st.floats(-10, 10))
def test_scale_and_shift_of_the_inputs_do_not_matter(scale: float, shift: float) -> None:
    x, one, other = clouds(), bare(), bare()
    calibrate(one, [x])
    calibrate(other, [scale * x + shift])
    torch.testing.assert_close(
        other.gate.eval()(scale * x + shift).probability_TE, one.gate.eval()(x).probability_TE, rtol=0, atol=0.02
    )


def test_a_feature_that_is_constant_counts_for_nothing() -> None:
    x, moe = clouds(), bare()
    x[:, 2] = 1e4
    calibrate(moe, [x])
    assert not moe.gate.weight[:, 2].any()
    load, confidence = load_and_confidence(moe, x)
    assert (load * EXPERTS - 1).abs().max() <= 0.05
    assert confidence == pytest.approx(0.7, abs=1e-2)


def test_duplicated_tokens() -> None:
    x, moe = clouds(100), bare()
    calibrate(moe, [torch.cat([x] * 5)])
    load, confidence = load_and_confidence(moe, x)
    assert (load * EXPERTS - 1).abs().max() <= 0.1
    assert confidence == pytest.approx(0.7, abs=0.02)
    half = torch.cat([x, x[:1].expand(100, -1)])  # one token has half of all, which no cluster can share
    calibrate(moe, [half])
    assert weights(moe).isfinite().all()


def test_temperature_is_taken_into_account() -> None:
    x, plain, warm = clouds(), bare(), bare(temperature=4.0)
    for moe in (plain, warm):
        calibrate(moe, [x])
    torch.testing.assert_close(warm.gate.eval()(x).probability_TE, plain.gate.eval()(x).probability_TE)


def test_gates_of_images_cluster_images() -> None:
    moe, images = bare(gate_input="image"), clouds(200)[:, None] + torch.randn(200, 5, WIDTH) / 10
    (found,) = calibrate(moe, images.split(20)).values()
    assert found.inputs == 200
    load, confidence = load_and_confidence(moe, images)
    assert (load * EXPERTS - 1).abs().max() <= 0.05
    assert confidence == pytest.approx(0.7, abs=1e-3)


def test_a_bias_of_the_choice_begins_anew() -> None:
    moe = bare(balance_rate=0.1)
    moe.gate.choice_bias += 1.0
    calibrate(moe, [clouds()])
    assert not moe.gate.choice_bias.any()


def test_one_expert_needs_no_clusters() -> None:
    moe = bare(num_experts=1)
    calibrate(moe, [clouds()])
    assert not weights(moe).any()


def test_the_sample_is_even_and_bounded() -> None:
    moe, config = bare(), Calibration(tokens_per_expert=25)
    sample = module._Sample(moe.gate, config, 3)
    batches = [clouds(300, seed).view(30, 10, WIDTH) for seed in range(5)]
    for batch in batches:
        sample.add(moe.gate, (batch,))
    x_NC = sample.gathered("gate")
    assert x_NC.shape == (100, WIDTH)
    everything = torch.cat([batch.view(-1, WIDTH) for batch in batches])
    places = (x_NC[:, None] == everything).all(-1).nonzero()[:, 1]
    assert len(places.unique()) == 100
    assert ((places // 300).bincount(minlength=5) - 20).abs().max() < 15  # of five batches alike
    assert ((places % 10).bincount(minlength=10) - 10).abs().max() < 12  # and of ten places in an image


def test_no_more_batches_than_asked_for_are_taken() -> None:
    taken = []
    calibrate(model(), (taken.append(i) or clouds(seed=i) for i in range(9)), Calibration(batches=3))
    assert taken == [0, 1, 2]


def test_it_is_lazily_exported() -> None:
    assert rmoe.calibrate is calibrate
    assert rmoe.Calibration is Calibration


def nan(x: Tensor) -> Tensor:
    x[7, 3] = float("nan")
    return x


@pytest.mark.parametrize(
    ("config", "batches", "message"),
    [
        ({}, [clouds(3)], "3 got 3 tokens for its 4 experts"),
        ({"gate_input": "image"}, [clouds(30).view(3, 10, WIDTH)], "3 images for its 4 experts"),
        ({}, [torch.ones(50, WIDTH)], "only 1 different inputs for its 4 experts"),
        ({}, [torch.eye(3, WIDTH).repeat(20, 1)], "only 3 different inputs"),
        ({}, [nan(clouds())], "^3 got inputs that are not finite"),
        ({}, [clouds(), clouds() * float("inf")], "^3 got inputs that are not finite"),
        ({}, [], "3 did not run on any batch"),
        ({"residual": "experts", "expert_init": "random"}, [clouds()], "begins as the dense network.*leave"),
        ({"combine": "softmax"}, [clouds()], "begins as the dense network"),
        ({"num_experts": 2}, [clouds()], "0.4, and 2 experts weighed evenly have 0.5"),
    ],
)
def test_what_cannot_be_calibrated(config: dict[str, object], batches: list[Tensor], message: str) -> None:
    mixture = nn.Sequential(*(nn.Identity() for _ in range(3)), bare(**config))
    with pytest.raises(UserError, match=message):
        calibrate(mixture, batches, Calibration(confidence=0.4))
    assert mixture.training


def test_either_all_gates_are_set_or_none() -> None:
    mixture = nn.Sequential(bare(), nn.Threshold(1e9, 0.0), bare())  # the second one reads nothing but zeros
    before = copy.deepcopy(mixture.state_dict())
    with pytest.raises(UserError, match="^2 got only 1 different"):
        calibrate(mixture, [clouds()])
    torch.testing.assert_close(mixture.state_dict(), before, rtol=0, atol=0)


def test_inputs_that_are_rare_are_found() -> None:
    x = torch.cat([torch.zeros(1000, WIDTH), torch.eye(WIDTH)])
    assert calibrate(bare(), [x], Calibration(tokens_per_expert=1000))[""].inputs == len(x)


def test_a_config_that_is_none() -> None:
    with pytest.raises(UserError, match=r"calibrate got {'batches': 1} as its config; give an rmoe.Calibration"):
        calibrate(bare(), [clouds()], {"batches": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("residual", ["low_rank", "full", "experts"])
def test_trained_residuals_are_refused(residual: str) -> None:
    moe = bare(residual=residual)
    with torch.no_grad():
        moe.residuals()[-1][2].add_(1e-3)
    with pytest.raises(UserError, match="differ already"):
        calibrate(moe, [clouds()])


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UserError, match="no mixture"):
        calibrate(Mlp(WIDTH, WIDTH), [clouds()])


@pytest.mark.parametrize("config", [{}, {"alpha": 2.0}, {"shared_a": True}, {"top_k": "all"}])
def test_subspaces_are_those_of_each_cluster_and_the_function_stays(config: dict[str, object]) -> None:
    dense, mixture = model(**config), model(**config)
    x = clouds(600)
    calibrate(mixture, [x], Calibration(tokens_per_expert=150, subspaces=True))
    moe, read = mixture[-1], mixture[0].eval()(x)
    assert torch.equal(mixture.eval()(x), dense.eval()(x))
    cluster = moe.gate.eval().logits(read).argmax(0)
    for e, rows in enumerate([read] if "shared_a" in config else [read[cluster == e] for e in range(EXPERTS)]):
        hidden = moe.core.act(moe.core.fc1(rows))
        for a, inputs in ((moe.residuals().a1_ERC[e], rows), (moe.residuals().a2_ERH[e], hidden)):
            torch.testing.assert_close(a @ a.T, torch.eye(2))
            kept = (inputs @ a.T).square().sum()
            torch.testing.assert_close(kept, torch.linalg.svdvals(inputs)[:2].square().sum())


@pytest.mark.parametrize(("shape", "found"), [((0, 5), 0), ((1, 5), 1), ((9, 3), 3), ((3, 9), 3)])
def test_there_are_no_more_principal_directions_than_the_inputs_span(shape: tuple[int, int], found: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    directions = principal_directions(x, 4)
    assert directions.shape == (found, shape[1])
    torch.testing.assert_close(directions @ directions.T, torch.eye(found, dtype=torch.float64))
    assert principal_directions(torch.zeros(4, 5), 2).shape == (0, 5)


@pytest.mark.parametrize("config", [{"residual": "full"}, {"gate_input": "image"}])
def test_subspaces_of_what_has_none_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(UserError, match="subspaces are for residual='low_rank' with gate_input='token'"):
        calibrate(bare(**config), [clouds()], Calibration(subspaces=True))


def test_subspaces_of_a_gated_network_are_refused() -> None:
    moe = ResidualMoE(SwiGLU(WIDTH, 2 * WIDTH), ResidualMoEConfig(num_experts=EXPERTS, rank=2))
    with pytest.raises(UserError, match=r"subspaces are for networks fc2\(act\(fc1\(x\)\)\), not fc2"):
        calibrate(moe, [clouds()], Calibration(subspaces=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batches": 0}, "1 to"),
        ({"batches": True}, "a whole number"),
        ({"batches": 10**9}, "1 to"),
        ({"confidence": 1.0}, "between 0 and 1"),
        ({"confidence": float("nan")}, "a finite number"),
        ({"confidence": "high"}, "a finite number"),
        ({"tokens_per_expert": -1}, "1 to"),
        ({"subspaces": 1}, "True or False"),
        ({"batchs": 3}, "did you mean 'batches'"),
        ([], "takes a mapping"),
    ],
)
def test_a_section_that_is_wrong(values: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Calibration.from_dict(values)  # type: ignore[arg-type]
