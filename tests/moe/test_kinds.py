"""Kinds of residual that are kept otherwise than the arithmetic takes them: what they hold, and that it is computed."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_forms import NETWORKS, images, network
from test_grouped import as_on_hopper
from test_layer import first_of_two
from test_mix import value_and_gradients
from timm.layers import Mlp
from torch import Tensor, nn

from rmoe.config import Calibration, ResidualMoEConfig
from rmoe.engine.cost import count_parameters, counted_flops
from rmoe.errors import UserError
from rmoe.moe.experts import Full, LowRank, Network, Residuals, reference
from rmoe.moe.kinds import FIXED, Segments, Sparse
from rmoe.moe.layer import ResidualMoE
from rmoe.moe.merged import average_network, exact_network
from rmoe.moe.mix import mix
from rmoe.moe.records import collect
from rmoe.moe.state import global_state_dict, load_global_state_dict

assert first_of_two  # a fixture
WIDTH, HIDDEN, EXPERTS = 8, 12, 4
KINDS: dict[str, dict[str, Any]] = {"segments": {"rank": 2}, "sparse": {"density": 0.3}}
every_kind = pytest.mark.parametrize("kind", KINDS)


def layer(kind: str, seed: int = 0, spread: float = 0.0, **config: Any) -> ResidualMoE:
    """A layer of four experts; `spread` moves what trains of its residuals away from zero."""
    torch.manual_seed(seed)
    chosen = {
        "num_experts": EXPERTS,
        "top_k": 1,
        "residual": kind,
        "train_core": False,
        **KINDS.get(kind, {}),
        **config,
    }
    moe = ResidualMoE(Mlp(WIDTH, HIDDEN), ResidualMoEConfig(**chosen))
    with torch.no_grad():
        for parameter in moe.deepspeed_moe.parameters():
            parameter.add_(spread * parameter.requires_grad * torch.randn_like(parameter))
    return moe


def tokens(count: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def random_core(width: int, hidden: int, g: torch.Generator) -> Network:
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    return Network(*(torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes))


def kept(kind: str, core: Network, g: torch.Generator, **config: Any) -> Segments | Sparse:
    """What experts keep, with random numbers in what trains."""
    chosen = {"num_experts": 2, "top_k": 1, "rank": 1, "density": 0.4, **config}
    made: Any = {"segments": Segments, "sparse": Sparse}[kind]
    start = made.initial(ResidualMoEConfig(residual=kind, **chosen), core)  # type: ignore[arg-type]
    trained = 4 if kind == "segments" else 2
    return made(*(torch.randn(x.shape, generator=g, dtype=x.dtype) for x in start[:trained]), *start[trained:])


def delta(one: Segments | Sparse, e: int, scale: float) -> Network:
    """The definition of Δ_e, in other words than the class's."""
    if isinstance(one, Segments):
        a1, b1, a2, b2, *starts = (x[e] for x in one)
        (from_a1, from_b1, from_a2, from_b2) = starts
        w1 = (b1 + from_b1).T @ (a1 + from_a1) - from_b1.T @ from_a1
        return Network(scale * w1, None, scale * ((b2 + from_b2).T @ (a2 + from_a2) - from_b2.T @ from_a2), None)
    found = []
    for values_ES, places_S, shape in zip(one[:2], one[2:4], one.shapes, strict=True):
        matrix = torch.zeros(shape, dtype=values_ES.dtype)
        for value, place in zip(values_ES[e], places_S.tolist(), strict=True):
            matrix[place // shape[1], place % shape[1]] = value
        found.append(matrix)
    return Network(found[0], None, found[1], None)


# ---- what they hold --------------------------------------------------------------------------------------------------


def test_a_sparse_delta_by_hand() -> None:
    shapes = (torch.Size([2, 3]), torch.Size([3, 2]))
    one = Sparse(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0], [6.0]]), *places([0, 4], [3]), shapes)
    found = one.scaled(1.0)
    assert found.w1_EHC.tolist() == [[[1, 0, 0], [0, 2, 0]], [[3, 0, 0], [0, 4, 0]]]
    assert found.w2_ECH[1].tolist() == [[0, 0], [0, 6], [0, 0]]
    assert not found.b1_EH.any()
    assert not found.b2_EC.any()


def places(*lists: list[int]) -> list[Tensor]:
    return [torch.tensor(one, dtype=torch.int32) for one in lists]


def test_the_support_is_a_share_of_the_weights_and_every_processs() -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found.append(Sparse.initial(ResidualMoEConfig(residual="sparse", density=0.25), random_core(8, 12, G())))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one, other) for one, other in zip(found[0][:4], found[1][:4], strict=True))
    for places_S in found[0][2:4]:
        assert len(places_S) == 24
        assert len(set(places_S.tolist())) == 24
        assert 0 <= min(places_S) < max(places_S) < 96
    assert not torch.equal(found[0].places1_S, found[0].places2_S)
    thin = Sparse.initial(ResidualMoEConfig(residual="sparse", density=1e-6), random_core(2, 3, G()))
    assert len(thin.places1_S) == 1


def test_segments_are_the_cores_singular_values_in_turn() -> None:
    core = random_core(6, 9, G())
    every = Segments.initial(ResidualMoEConfig(num_experts=3, rank=2, residual="segments"), core)
    for weight, a_ERI, b_ERO in ((core.w1_HC, *every[4:6]), (core.w2_CH, *every[6:8])):
        products = torch.einsum("ero,eri->eoi", b_ERO, a_ERI)
        torch.testing.assert_close(products.sum(0), weight)  # rank x experts is all that there is
        norms = products.flatten(1).norm(dim=1)
        values = torch.linalg.svdvals(weight)
        torch.testing.assert_close(norms, values.view(3, 2).norm(dim=1))
        torch.testing.assert_close(a_ERI.norm(dim=2), b_ERO.norm(dim=2))
        assert (a_ERI.gather(2, a_ERI.abs().argmax(2, keepdim=True)) > 0).all()
    few = Segments.initial(ResidualMoEConfig(num_experts=3, rank=1, residual="segments"), core)
    torch.testing.assert_close(few.start_a1_ERC, every.start_a1_ERC[:, :1])  # the first of each segment
    alpha = Segments.initial(ResidualMoEConfig(num_experts=3, rank=2, residual="segments", alpha=4.0), core)
    torch.testing.assert_close(alpha.start_a1_ERC * (4 / 2**0.5) ** 0.5, every.start_a1_ERC)
    assert not any(x.any() for x in every[:4])


def G(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30)
@given(kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 10**6), scaled=st.booleans())
def test_delta_is_its_definition(kind: str, seed: int, scaled: bool) -> None:
    scale = 3.0 if scaled and kind == "segments" else 1.0
    one = kept(kind, random_core(3, 4, G(seed)), G(seed + 1))
    found = one.scaled(scale)
    for e in (0, 1):
        expected = delta(one, e, scale)
        torch.testing.assert_close(found.delta(e).w1_HC, expected.w1_HC)
        torch.testing.assert_close(found.delta(e).w2_CH, expected.w2_CH)


# ---- what is computed ------------------------------------------------------------------------------------------------


class OfDeltas:
    """Residuals that know nothing but their Δ."""

    def __init__(self, one: Segments | Sparse) -> None:
        self.one, self.num_experts = one, len(one[0])

    def delta(self, e: int) -> Network:
        return delta(self.one, e, 1.0)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(list(KINDS)),
    mixes=st.booleans(),
    tokens=st.integers(0, 6),
    k=st.integers(1, 2),
    width=st.integers(2, 4),
    seed=st.integers(0, 10**6),
)
def test_equals_reference_in_value_and_gradient(
    kind: str, mixes: bool, tokens: int, k: int, width: int, seed: int
) -> None:
    g = G(seed)
    core = random_core(width, width + 1, g)
    one = kept(kind, core, g)
    x, gate = (torch.randn(tokens, n, generator=g, dtype=torch.float64) for n in (width, k))
    expert_TK = torch.randint(0, 3, (tokens, k), generator=g)
    trained = [w for w in one[:-1] if isinstance(w, Tensor) and w.is_floating_point()]
    inputs = [t.requires_grad_() for t in (x, gate, *core, *trained)]  # type: ignore[union-attr]
    given_to = (x, expert_TK, gate, core)
    found = value_and_gradients(lambda: mix(*given_to, one.scaled(1.0), torch.tanh, mixes), inputs)
    expected = value_and_gradients(lambda: reference(*given_to, OfDeltas(one), torch.tanh, mixes), inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)


@every_kind
@pytest.mark.parametrize("mixes", [True, False])
def test_a_hopper_gpus_path_computes_the_same(kind: str, mixes: bool) -> None:
    """Biases of a sparse Δ are no parameters: no gradient of theirs is wanted there."""
    core = random_core(8, 16, G())
    one = kept(kind, core, G(1), rank=4)
    count = 4 if kind == "segments" else 2
    x, gate = (torch.randn(20, n, generator=G(2), dtype=torch.float64) for n in (8, 1))
    expert_TK = torch.randint(0, 3, (20, 1), generator=G(3))
    inputs = [t.requires_grad_() for t in (x, gate, *one[:count])]  # type: ignore[union-attr]
    expected = value_and_gradients(lambda: mix(x, expert_TK, gate, core, one.scaled(1.0), torch.tanh, mixes), inputs)
    with as_on_hopper() as product:
        found = value_and_gradients(lambda: mix(x, expert_TK, gate, core, one.scaled(1.0), torch.tanh, mixes), inputs)
    assert product.called
    torch.testing.assert_close(found, expected)


@every_kind
@pytest.mark.parametrize("mixes", [True, False])
def test_gradcheck(kind: str, mixes: bool) -> None:
    core = random_core(2, 3, G())
    one = kept(kind, core, G(1))
    count = 4 if kind == "segments" else 2
    x, gate = (torch.randn(4, n, generator=G(2), dtype=torch.float64) for n in (2, 1))
    expert_TK = torch.tensor([[0], [1], [2], [1]])

    def function(x: Tensor, gate: Tensor, *trained: Tensor) -> Tensor:
        made: Any = type(one)(*trained, *one[count:])
        return mix(x, expert_TK, gate, core, made.scaled(1.0), torch.tanh, mixes)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in (x, gate, *one[:count])])  # type: ignore[union-attr]


@every_kind
@pytest.mark.parametrize("name", NETWORKS)
def test_it_begins_as_the_network(name: str, kind: str) -> None:
    x = images(name)
    for combine, k, training in product(("residual", "straight_through"), (1, "all"), (True, False)):
        chosen: Any = {"residual": kind, "rank": 1, "density": 0.3, "combine": combine, "top_k": k, "gate_std": 3.0}
        moe = ResidualMoE(network(name), ResidualMoEConfig(num_experts=3, **chosen)).train(training)
        torch.testing.assert_close(moe(x), moe.core(x), rtol=1e-5, atol=1e-5)
        if combine == "residual" and kind == "segments" and name != "plain":  # as test_forms.py
            assert torch.equal(moe(x), moe.core(x))


@pytest.mark.parametrize("k", [1, 2, "all"])
@pytest.mark.parametrize("training", [True, False])
def test_segments_begin_as_the_network_bit_for_bit(k: Any, training: bool) -> None:
    moe = layer("segments", top_k=k, gate_std=3.0).train(training)
    assert torch.equal(moe(tokens()), moe.core(tokens()))
    for e in range(EXPERTS):
        assert not moe.residuals().delta(e).w1_HC.any()


@every_kind
def test_what_trains_and_what_is_fixed(kind: str) -> None:
    moe = layer(kind, spread=0.1)
    before = {key: x.clone() for key, x in moe.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in moe.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        with collect() as records:
            loss = (moe(tokens(40, step)) - 1).square().sum()
        optimizer.zero_grad()
        (loss + records.loss()).backward()
        optimizer.step()
    for name, x in moe.state_dict().items():
        fixed = name.startswith("core.") or name.rpartition(".")[2] in FIXED or "places" in name
        assert torch.equal(x, before[name]) == fixed, name


@every_kind
def test_both_factors_and_the_gate_learn_from_the_first_step(kind: str) -> None:
    moe = layer(kind, top_k="all" if kind == "segments" else 1)
    moe(tokens(40)).square().sum().backward()
    for name, parameter in moe.deepspeed_moe.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name  # type: ignore[union-attr]
    moe = layer(kind, spread=0.3)
    moe(tokens(40)).square().sum().backward()
    assert moe.gate.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_what_segments_learn_survives_bfloat16() -> None:
    """A change of a thousandth of what was there is rounded away beside it."""
    moe = layer("segments", spread=1e-4)
    low: Any = moe.residuals()
    a, b, _, _, start_a, start_b, *_ = moe.deepspeed_moe.parameters()
    rounded = LowRank(*(w.bfloat16().float() for w in low))
    both_a, both_b, start_a, start_b = (w.bfloat16().float() for w in (start_a + a, start_b + b, start_a, start_b))
    for e in range(EXPERTS):
        exact = low.delta(e).w1_HC
        assert (rounded.delta(e).w1_HC - exact).norm() < 0.01 * exact.norm()
        beside = both_b[e].T @ both_a[e] - start_b[e].T @ start_a[e]
        assert (beside - exact).norm() > 0.5 * exact.norm()


# ---- state, places and ledgers ---------------------------------------------------------------------------------------


@every_kind
def test_the_state_goes_round(kind: str) -> None:
    moe = layer(kind, spread=0.5).eval()
    state = moe.state_dict()
    each = [key for key in state if "deepspeed_experts" in key]
    assert len(each) == EXPERTS * (8 if kind == "segments" else 2)
    assert sum("places" in key for key in state) == 2 * (kind == "sparse")
    model = nn.ModuleDict({"mlp": moe})
    whole = global_state_dict(model)
    assert set(whole) == set(model.state_dict())
    again = nn.ModuleDict({"mlp": layer(kind, seed=5)}).eval()
    load_global_state_dict(again, whole)
    assert torch.equal(again["mlp"](tokens()), moe(tokens()))
    with pytest.raises(RuntimeError, match="in the file"):
        layer(kind, rank=1, density=0.2).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*(places1_S|start_a1)"):
        layer(kind).load_state_dict({k: x for k, x in state.items() if "places1_S" not in k and "start_a1" not in k})


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@every_kind
def test_a_layer_made_on_meta_takes_a_state(kind: str) -> None:
    made = layer(kind, spread=0.5).eval()
    for assign in (True, False):
        with torch.device("meta"):
            moe = layer(kind).eval()
        moe = moe if assign else moe.to_empty(device="cpu")
        moe.load_state_dict(made.state_dict(), assign=assign)
        assert {n for n, p in moe.named_parameters() if p.requires_grad} == {
            n for n, p in made.named_parameters() if p.requires_grad
        }
        assert torch.equal(moe(tokens()), made(tokens()))


@every_kind
def test_experts_do_not_depend_on_where_they_live(kind: str, first_of_two: None) -> None:
    whole, half = layer(kind), layer(kind, ep_size=2)
    for name, parameter in half.deepspeed_moe.experts.own().items():  # type: ignore[union-attr,operator]
        assert torch.equal(parameter, whole.deepspeed_moe.experts.get_parameter(name)[:2]), name  # type: ignore[union-attr]
        assert parameter.allreduce is False
        assert parameter.is_contiguous()  # DeepSpeed sends its bytes
    for name, places_S in whole.deepspeed_moe.experts.named_buffers():  # type: ignore[union-attr]
        assert torch.equal(places_S, half.deepspeed_moe.experts.get_buffer(name))  # type: ignore[union-attr]


@pytest.mark.parametrize("change", [[-1, 5], [5, 5], [5, 10**6]])
def test_a_damaged_support_is_refused(change: list[int]) -> None:
    state = layer("sparse").state_dict()
    places_S = state["deepspeed_moe.experts.places2_S"].clone()
    places_S[[0, -1]] = torch.tensor(change, dtype=torch.int32)
    with pytest.raises(UserError, match="support of sparse residuals is damaged.*0 to 95; copy"):
        layer("sparse").load_state_dict(state | {"deepspeed_moe.experts.places2_S": places_S})


@every_kind
def test_parameters_by_hand(kind: str) -> None:
    moe = layer(kind)
    found = count_parameters(moe)
    core = 2 * WIDTH * HIDDEN + WIDTH + HIDDEN
    gate = EXPERTS * (WIDTH + 1)
    if kind == "segments":
        trained = fixed = EXPERTS * 2 * 2 * (WIDTH + HIDDEN)
    else:
        trained, fixed = EXPERTS * 2 * round(0.3 * WIDTH * HIDDEN), 0
    assert found.total == core + gate + trained + fixed
    assert found.trainable == gate + trained
    assert found.active == core + gate + (trained + fixed) // EXPERTS


def flops(kind: str, **config: Any) -> int:
    moe, counted = layer(kind, **config), list[int]()
    with counted_flops(counted):
        moe(tokens(24)).sum().backward()
    return counted[0]


def test_flops_are_those_of_the_form() -> None:
    assert flops("sparse") == flops("full")
    assert flops("segments", rank=2) == flops("low_rank", rank=4)


@every_kind
@pytest.mark.parametrize("combine", ["residual", "straight_through"])
def test_one_expert_is_merged_into_its_core(kind: str, combine: str) -> None:
    moe = layer(kind, spread=0.5, num_experts=1, combine=combine).eval()
    merged, x = exact_network(moe), tokens()
    torch.testing.assert_close(merged(x, moe.core.act), moe(x))  # type: ignore[union-attr,arg-type]
    several = layer(kind, spread=0.5)
    mean: Any = average_network(several)
    deltas = [several.residuals().delta(e).w1_HC for e in range(EXPERTS)]
    torch.testing.assert_close(mean.w1_HC, several.core.fc1.weight + sum(deltas) / EXPERTS)  # type: ignore[union-attr,operator]


@every_kind
def test_the_gate_of_an_upcycled_mixture_is_calibrated(kind: str) -> None:
    import rmoe

    model = nn.ModuleDict({"mlp": layer(kind)})
    found = rmoe.calibrate(model, [tokens(200)], Calibration(batches=1), run=lambda x: model["mlp"](x))
    assert found["mlp"].confidence == pytest.approx(0.7, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "combine"), [*product(KINDS, ("residual", "straight_through"))])
def test_a_layer_can_be_exported_with_any_number_of_images(kind: str, combine: str) -> None:
    moe, x = layer(kind, spread=0.5, combine=combine).eval(), torch.randn(2, 5, WIDTH)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(moe, (x,), dynamic_shapes=({0: batch},)).module()
    for images_BTC in (x, torch.randn(7, 5, WIDTH), torch.randn(1, 5, WIDTH)):
        torch.testing.assert_close(program(images_BTC), moe(images_BTC))


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"residual": "sparce"}, "did you mean 'sparse'"),
        ({"density": 0.0}, "density is 0.0; it is a share"),
        ({"density": 1.5}, "at most 1"),
        ({"density": float("nan")}, "a finite number"),
        ({"density": True}, "takes a"),
        ({"residual": "sparse", "alpha": 2.0}, "alpha belongs to residuals of low rank, not to residual='sparse'"),
        ({"residual": "segments", "shared_a": True}, "shared_a belongs to residual='low_rank', not 'segments'"),
    ],
)
def test_what_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResidualMoEConfig(**config)


@pytest.mark.parametrize(("rank", "experts"), [(3, 3), (1, 9)])
def test_more_segments_than_singular_values(rank: int, experts: int) -> None:
    with pytest.raises(UserError, match=f"{rank} x {experts}, and a matrix of the core has 8: lower rank or num_exp"):
        layer("segments", rank=rank, num_experts=experts)


def test_forms_are_those_of_the_arithmetic() -> None:
    made: dict[str, Residuals] = {kind: layer(kind).residuals() for kind in KINDS}
    assert isinstance(made["segments"], LowRank)
    assert isinstance(made["sparse"], Full)
