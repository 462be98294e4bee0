"""Settings of hooks, optimizers, schedules and samplers that nobody should have written: each is named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.optim import CosineAnnealingLR, LinearLR, PolyLR
from timm.layers import Mlp
from torch import nn

from rmoe.engine.checkpoint import run_state
from rmoe.engine.clipping import check_precision
from rmoe.engine.ds_json import resolve
from rmoe.engine.hooks import CheckpointHook, EMAHook
from rmoe.engine.optim import DeepSpeedOptimWrapper, ParamGroups, checked_settings, param_groups
from rmoe.engine.randomness import EpochSampler, InfiniteSampler
from rmoe.engine.strategy import Runner
from rmoe.errors import UserError

NAN = float("nan")
SETTINGS = {"lr": 0.1, "initial_lr": 0.1, "weight_decay": 0.05, "betas": [0.9, 0.999], "fused": None}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_decay", 0.1),
        ("weight_decay", "0.05"),
        ("initial_lr", 0.2),
        ("betas", [0.9, 0.99]),
        ("betas", None),
        ("lr", "0.1"),
        ("lr", True),
        ("lr", None),
    ],
)
def test_a_run_goes_on_with_its_own_settings(key: str, value: Any) -> None:
    group = {**SETTINGS, "betas": (0.9, 0.999)}
    assert checked_settings(group, {**SETTINGS, "lr": 0.01, "fused": True})
    with pytest.raises(UserError, match=key):
        checked_settings(group, {**SETTINGS, key: value})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ([], "had 1 schedules in param_scheduler, this one has 0"),
        ([dict(power=2.0)], "a schedule with power 1.0, this PolyLR has 2.0"),
        ([dict(end=20)], "end 10, this PolyLR has 20"),
        ([dict(kind=LinearLR, start_factor=0.1)], "this LinearLR has"),
        ([dict(kind=CosineAnnealingLR, T_max=3)], "this CosineAnnealingLR has"),
        ([dict(last_step="3")], "last_step"),
        ([dict(last_step=None)], "last_step"),
    ],
)
def test_a_run_goes_on_with_its_own_schedule(other: list[dict[str, Any]], said: str) -> None:
    def schedule(kind: Any = PolyLR, **options: Any) -> Any:
        wrapper = DeepSpeedOptimWrapper(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
        own = {"power": 1.0, "eta_min": 0.0} if kind is PolyLR else {}
        return wrapper, kind(wrapper, **{"begin": 0, "end": 10, "by_epoch": False} | own | options)

    state = {"meta": {}, "message_hub": {"runtime_info": {}, "log_scalars": {}}}
    wrapper, saved = schedule()
    about, history = run_state.gather_state(state, wrapper, [saved])
    for options in other:
        if "last_step" in options:
            about["schedulers"][0] |= options
            options.clear()
    wrapper = schedule()[0]
    with pytest.raises(UserError, match=said):
        run_state.restore_state(about, history, wrapper, [schedule(**options)[1] for options in other])


@pytest.mark.parametrize("momentum", ["1e-4", True, 1, 0, None, NAN, float("inf"), -0.1, [0.1], {"a": 1}])
def test_averages(momentum: Any) -> None:
    with pytest.raises(UserError, match="rmoe.EMAHook: momentum is"):
        EMAHook(momentum=momentum)


NO_NUMBERS = [NAN, float("inf"), -1.0, "2", True, [1.0], {"a": 1}]
MULTIPLIERS = ["residual_lr_mult", "residual_decay_mult", "gate_lr_mult", "head_lr_mult", "bias_lr_mult"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in MULTIPLIERS[1:2] for value in [*NO_NUMBERS, None]),
        *((key, NAN) for key in [*MULTIPLIERS, "norm_decay_mult", "bias_decay_mult"]),
        *((key, value) for key in ("residual_lr_mult", "norm_decay_mult") for value in NO_NUMBERS),
        *(("exempt", value) for value in ("yes", 1, None)),
        *(("custom_keys", value) for value in ("norm", ["norm"], 3, {"norm": 0.0}, {3: {}}, {"norm": ["lr_mult"]})),
        *(("custom_keys", {"norm": {"lr_mult": value}}) for value in [*NO_NUMBERS, None]),
        ("custom_keys", {"norm": {3: 1.0}}),
    ],
)
def test_multipliers(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        ParamGroups({"optimizer": {"type": "SGD", "lr": 0.1}}, {key: value})(Mlp(2, 2))


@pytest.mark.parametrize(
    ("wrapper", "said"),
    [
        ({}, "optim_wrapper.optimizer is None"),
        ({"optimizer": "AdamW"}, "optim_wrapper.optimizer is 'AdamW'"),
        ({"optimizer": ["AdamW"]}, "optim_wrapper.optimizer is"),
        *(({"optimizer": {"type": "AdamW", "lr": value}}, "lr is") for value in [*NO_NUMBERS, None]),
        *(({"optimizer": {"type": "AdamW", "lr": 0.1, "weight_decay": value}}, "weight_decay") for value in NO_NUMBERS),
        ({"optimizer": {"type": "AdamW", "lr": 0.1, "betas": (2.0, 0.9)}}, "beta"),
        ({"optimizer": {"type": "AdamW", "lr": 0.1, "betas": ("0.9", 0.9)}}, "betas is '0.9'"),
        ({"optimizer": {"type": "AdamW", "lr": 0.1, "betas": (NAN, 0.9)}}, "betas is nan"),
        ({"optimizer": {"type": "AdamW", "lr": 0.1, "betas": 0.9}}, "cannot be built"),
        ({"optimizer": {"type": "AdamW", "lr": 0.1, "eps": NAN}}, "eps is nan"),
        ({"optimizer": {"type": "AdamW", "lr": 0.1, "epsilon": 1.0}}, "epsilon"),
        ({"optimizer": {"type": "SGD", "lr": 0.1, "momentum": NAN}}, "momentum is nan"),
        ({"optimizer": {"type": "SGD", "lr": 0.1, "momentum": True}}, "momentum is True"),
        ({"optimizer": {"type": "SGD", "lr": 0.1, "nesterov": True}}, "Nesterov"),
    ],
)
def test_optimizers(wrapper: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ParamGroups(wrapper)(Mlp(2, 2))


@pytest.mark.parametrize("options", ["lr", ["lr"], 3])
def test_options_of_other_types(options: Any) -> None:
    with pytest.raises(UserError, match="optim_wrapper.paramwise_cfg is"):
        ParamGroups({"optimizer": {"type": "SGD", "lr": 0.1}}, options)


def test_param_groups_by_hand() -> None:
    for lr in NO_NUMBERS:
        with pytest.raises(UserError, match="lr is"):
            param_groups(Mlp(2, 2), lr)


@pytest.mark.parametrize("sampler", [InfiniteSampler, EpochSampler])
def test_no_samples(sampler: Any) -> None:
    with pytest.raises(UserError, match="a list, has no samples"):
        sampler([])


@pytest.mark.parametrize("dtype", ["float16", "fp16"])
def test_float16_without_a_norm(dtype: str) -> None:
    zero = {"stage": 2, "compute_grad_norm": False}
    content = {"torch_autocast": {"enabled": True, "dtype": dtype}, "zero_optimization": zero}
    config = resolve(content, batch_size=1, accumulation=1, max_norm=0.0, processes=1)
    with pytest.raises(UserError, match="compute_grad_norm"):
        check_precision(config)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"out_dir": "elsewhere"}, "out_dir is 'elsewhere'"),
        ({"published_keys": ["state_dict"]}, "published_keys"),
        ({"filename_tmpl": "last.pth"}, "filename_tmpl is 'last.pth'"),
        ({"filename_tmpl": "/tmp/{}.pth"}, "filename_tmpl"),
        ({}, r"iter_4 is a file"),
    ],
)
def test_savers(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "iter_4").touch()
    runner = Runner.__new__(Runner)
    runner._hooks, runner._work_dir = [CheckpointHook(by_epoch=False, **options)], str(tmp_path)
    with pytest.raises(UserError, match=said):
        runner._check_savers()


@pytest.mark.parametrize(
    ("noted", "found"),
    [
        ("/work/of/another/best_iter_3.pth", "here/best_iter_3.pth"),
        ("/home", None),
        ("..", None),
        ("/", None),
        (3, None),
    ],
)
def test_only_the_runs_own_best_checkpoint_is_removed(noted: Any, found: str | None) -> None:
    info = {"best_ckpt": noted, "best_ckpt_mIoU": noted, "best_score": 0.5}
    run_state.relocate(info, Path("here"))
    assert info.get("best_ckpt") == info.get("best_ckpt_mIoU") == found
    assert info["best_score"] == 0.5
