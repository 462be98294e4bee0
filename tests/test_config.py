from __future__ import annotations

import dataclasses

import pytest

from rmoe.config import GateLosses, ResidualMoEConfig, UserError


def test_from_plain_data() -> None:
    values = {"num_experts": 4, "losses": {"z": 1e-3}, "blocks": ["a.1.mlp"], "capacity_factor": 1.25, "noise": 0}
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
        ({"residual": "lowrank"}, "did you mean 'low_rank'"),
        ({"blocks": "alternating"}, "did you mean 'alternate'"),
        ({"num_experts": "8"}, "a value of type int"),
        ({"num_experts": True}, "a value of type int"),
        ({"num_experts": 8.0}, "a value of type int"),
        ({"train_core": 1}, "a value of type bool"),
        ({"capacity_factor": "much"}, "a value of type float . None"),
        ({"num_experts": 0}, "at least 1"),
        ({"top_k": 9}, "more than the 8 experts"),
        ({"ep_size": 3}, r"ep_size 3 does not divide the 8 experts; use one of \[1, 2, 4, 8\]"),
        ({"capacity_factor": 0.0}, "positive"),
        ({"noise": -1.0}, "negative"),
        ({"noise": 0.0, "losses": {"load": 0.1}}, "needs noise"),
        ({"residual": "experts", "combine": "residual"}, "no core"),
        ({"residual": "experts", "train_core": True}, "no core"),
        ({"top_k": 2, "exchange": "tokens"}, "exchange='weights'"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResidualMoEConfig.from_dict(values)


def test_the_cheap_choices() -> None:
    low_rank, full = ResidualMoEConfig(), ResidualMoEConfig(residual="full")
    assert low_rank.mixes_weights
    assert not low_rank.sends_tokens
    assert not full.mixes_weights
    assert full.sends_tokens
    assert not ResidualMoEConfig(residual="full", combine="residual", top_k=2).sends_tokens


def test_fixed_experts_are_on_every_process() -> None:
    assert ResidualMoEConfig(train_residual=False, ep_size=2).ep_size == 1
