from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from rmoe.config import GateLosses, ResidualMoEConfig
from rmoe.errors import UserError


def test_from_plain_data() -> None:
    values = {"num_experts": 4, "losses": {"z": 1e-3}, "blocks": ["a.1.mlp"], "noise": 0}
    values |= {"top_k": 1, "capacity_factor": 1.25}
    config = ResidualMoEConfig.from_dict(values)
    assert config.losses == GateLosses(z=1e-3)
    assert config.blocks == ("a.1.mlp",)
    assert config == ResidualMoEConfig.from_dict(dataclasses.asdict(config))


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ResidualMoEConfig().top_k = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_expert": 4}, "no key 'num_expert'; did you mean 'num_experts'"),
        ({"losses": {"zz": 1.0}}, "GateLosses has no key 'zz'; did you mean 'z'"),
        ({"losses": {"z": -1.0}}, "0 .off. or positive"),
        ({"num_experts": 0}, "it is 1 to 65536"),
        ({"top_k": 9}, "more than the 8 experts"),
        ({"ep_size": 2, "shared_a": True}, "ep_size is 2, but experts with a shared_a stay together: use ep_size=1"),
        ({"ep_size": 3}, r"ep_size 3 does not divide the 8 experts; use one of \[1, 2, 4, 8\]"),
        ({"capacity_factor": 0.0}, "positive"),
        ({"noise": -1.0}, "negative"),
        ({"noise": 0.0, "losses": {"load": 0.1}}, "needs noise"),
        ({"residual": "experts", "combine": "residual"}, "no core"),
        ({"residual": "experts", "train_core": True}, "no core"),
        ({"top_k": 2, "exchange": "tokens"}, "exchange='weights'"),
        ({"exchange": "tokens"}, "or top_k=1"),
        ({"capacity_factor": 1.25}, "as with top_k='auto': set it to None, or top_k to 1"),
        ({"top_k": "al"}, "top_k is 'al'; did you mean 'all'"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResidualMoEConfig.from_dict(values)


def test_the_cheap_choices() -> None:
    low_rank, full = ResidualMoEConfig(), ResidualMoEConfig(residual="full")
    assert (low_rank.trains_core, full.trains_core) == (True, False)
    assert not ResidualMoEConfig(train_core=False).trains_core
    assert ResidualMoEConfig(residual="full", train_core=True).trains_core
    assert low_rank.mixes_weights
    assert not low_rank.sends_tokens
    assert not full.mixes_weights
    assert full.sends_tokens
    assert not ResidualMoEConfig(residual="full", combine="residual", top_k=2).sends_tokens


@pytest.mark.parametrize(
    ("values", "used"),
    [
        ({}, 8),
        ({"num_experts": 4, "residual": "segments"}, 4),
        ({"router": "cosine", "gate_input": "image", "train_core": True, "ep_size": 2}, 8),
        ({"combine": "straight_through"}, 1),
        ({"combine": "softmax"}, 1),
        ({"router": "expert_choice"}, 1),
        ({"router": "task", "tasks": 8}, 1),
        ({"residual": "full"}, 1),
        ({"residual": "full", "combine": "residual"}, 1),
        ({"residual": "sparse"}, 1),
        ({"residual": "experts"}, 1),
        ({"top_k": 1}, 1),
        ({"residual": "full", "top_k": "all"}, 8),
    ],
)
def test_every_expert_is_used_where_that_takes_one_network(values: dict[str, Any], used: int) -> None:
    config = ResidualMoEConfig.from_dict(values)
    assert config.experts_per_token == used
    assert config.chooses == (used < config.num_experts)


def test_fixed_experts_are_on_every_process() -> None:
    assert ResidualMoEConfig(train_residual=False, ep_size=2).ep_size == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts": "8"}, "num_experts is '8'; it takes a whole number"),
        ({"num_experts": 8.0}, "num_experts is 8.0; it takes a whole number"),
        ({"num_experts": True}, "num_experts is True; it takes a whole number"),
        ({"num_experts": 10**12, "ep_size": 7}, "it is 1 to 65536"),
        ({"top_k": None}, "top_k is None"),
        ({"residual": "low-rank"}, "residual is 'low-rank'; did you mean 'low_rank'"),
        ({"residual": ["full"]}, "residual is .*it takes one of 'low_rank', 'segments', 'sparse', 'full'"),
        ({"combine": "straight-through"}, "did you mean 'straight_through'"),
        ({"expert_init": "copy"}, "expert_init is 'copy'.*known: core, random"),
        ({"exchange": "token"}, "did you mean 'tokens'"),
        ({"blocks": "everything"}, "blocks is 'everything'.*known: all, alternate"),
        ({"blocks": ()}, "blocks is empty"),
        ({"blocks": ("layers.0", 3)}, "a tuple, each item being a string"),
        ({"noise": float("inf")}, "noise is inf; it takes a finite number"),
        ({"noise": float("nan")}, "noise is nan; it takes a finite number"),
        ({"noise": 10**400}, "noise is 1000*; it takes a finite number"),
        ({"capacity_factor": 1e308}, r"capacity_factor is 1e\+308; it is at most 1e\+06"),
        ({"temperature": 1e-40}, "temperature is 1e-40; it is at least 1e-06"),
        ({"gate_std": "0.1"}, "gate_std is '0.1'; it takes a finite number"),
        ({"capacity_factor": float("nan")}, "a finite number or None"),
        ({"capacity_factor": "much"}, "a finite number or None"),
        ({"blocks": "alternating"}, "did you mean 'alternate'"),
        ({"train_core": 1}, "train_core is 1; it takes True or False"),
        ({"losses": {"importanc": 1.0}}, "did you mean 'importance'"),
        ({"losses": {"importance": float("nan")}}, "importance is nan"),
        ({"losses": 0.1}, "losses is 0.1; it takes a GateLosses"),
    ],
)
def test_python_and_data_are_checked_alike(values: dict[str, Any], message: str) -> None:
    for build in (lambda: ResidualMoEConfig(**values), lambda: ResidualMoEConfig.from_dict(values)):
        with pytest.raises(UserError, match=message):
            build()


def test_plain_data_becomes_what_the_fields_hold() -> None:
    config = ResidualMoEConfig(losses={"z": 1}, blocks=["a", "b"])  # type: ignore[arg-type]
    assert config == ResidualMoEConfig(losses=GateLosses(z=1), blocks=("a", "b"))
    assert config == ResidualMoEConfig.from_dict({"losses": {"z": 1}, "blocks": ["a", "b"]})


@pytest.mark.parametrize("values", [None, 8, "num_experts=8", [("num_experts", 8)]])
def test_a_config_from_no_mapping(values: Any) -> None:
    with pytest.raises(UserError, match="takes a mapping"):
        ResidualMoEConfig.from_dict(values)
