"""The DeepSpeed JSON: what is refused, and what "auto" becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rmoe.engine.ds_json import read_json, resolve, zero_stage
from rmoe.engine.precision import precision
from rmoe.errors import UserError

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
BATCH = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")


def resolved(processes: int = 2, autocasts: bool = False, **content: Any) -> dict[str, Any]:
    return resolve(content, batch_size=4, accumulation=1, max_norm=0.5, processes=processes, autocasts=autocasts)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped(path: Path) -> None:
    content = read_json(path)
    whole = resolve(content, batch_size=4, accumulation=1, max_norm=0.5, processes=2)
    assert [whole[key] for key in BATCH] == [4, 1, 8]
    assert resolve(content, batch_size=4, accumulation=3, max_norm=0.5, processes=2)[BATCH[1]] == 3
    assert whole["gradient_clipping"] == 0.5
    assert zero_stage(content) == int(path.stem[4])
    assert precision(whole) == {"bf16": "bfloat16", "fp16": "float16"}.get(path.stem.partition("_")[2], "float32")


def test_there_is_one_for_each_stage_and_precision() -> None:
    assert [path.stem for path in SHIPPED] == [
        *("zero0", "zero0_fp32", "zero1", "zero2", "zero2_bf16", "zero2_fp16", "zero2_fp32")
    ]


def test_the_precision_that_suits_the_machine() -> None:
    """No trace of autocast is left on a CPU, where a run must not change by a bit."""
    content = {"torch_autocast": {"enabled": "auto", "dtype": "bfloat16"}}
    assert "torch_autocast" not in resolved(**content)
    assert resolved(**content, autocasts=True)["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    for autocasts in (True, False):
        off = resolved(torch_autocast={"enabled": False}, autocasts=autocasts)["torch_autocast"]
        assert off == {"enabled": False}


@pytest.mark.parametrize("enabled", [True, "auto"])
@pytest.mark.parametrize(
    ("given", "dtype"),
    [({}, "bfloat16")] + [({"dtype": key}, value) for key, value in (("bf16", "bfloat16"), ("fp16", "float16"))],
)
def test_autocast_always_names_its_dtype(enabled: Any, given: dict[str, str], dtype: str) -> None:
    """By torch's name: without one torch.autocast takes float16 on a GPU, and no scale of the loss would be kept."""
    config = resolved(torch_autocast={"enabled": enabled, **given}, autocasts=True)
    assert config["torch_autocast"] == {"enabled": True, "dtype": dtype}
    assert precision(config) == dtype


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, [4, 1, 8]),
        ({"train_micro_batch_size_per_gpu": 3}, [3, 1, 6]),
        ({"gradient_accumulation_steps": 5}, [4, 5, 40]),
        ({"train_batch_size": 24}, [4, 3, 24]),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 2}, [6, 2, 24]),
        ({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 6}, [6, 2, 24]),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 1}, [1, 1, 2]),
    ],
)
def test_batch_sizes(content: dict[str, Any], expected: list[int]) -> None:
    assert [resolved(**content)[key] for key in BATCH] == expected


def test_clipping_is_always_named() -> None:
    assert resolved()["gradient_clipping"] == 0.5
    assert resolved(gradient_clipping=2)["gradient_clipping"] == 2.0
    assert resolve({}, batch_size=1, accumulation=1, max_norm=0.0, processes=1)["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 9}, "train_batch_size 9 is not"),
        ({"train_batch_size": 2, "gradient_accumulation_steps": 2}, "train_batch_size 2 is not"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu is 0"),
        ({"zero_optimization": {"stag": 2}}, "stag"),
    ],
)
def test_what_does_not_fit(content: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolved(**content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"zero_optimisation": {"stage": 2}}', "no key 'zero_optimisation'; did you mean 'zero_optimization'"),
        ('{"optimizer": {"type": "Adam"}}', "optim_wrapper"),
        ('{"bf16": {"enabled": true}}', 'torch_autocast.*"bfloat16"'),
        ('{"torch_autocast": {"enabledd": true}}', "no key 'torch_autocast.enabledd'; did you mean 'enabled'"),
        ('{"gradient_clipping": -3}', "gradient_clipping is -3; it is the largest norm"),
        ('{"gradient_predivide_factor": "x"}', "gradient_predivide_factor is 'x'; it takes a number"),
        ('{"gradient_allreduce_op": 1}', "gradient_allreduce_op is 1; it takes a string"),
        ('{"steps_per_print": "x"}', "steps_per_print is 'x'; it takes a whole number"),
        ('{"expert_parallel": {"enabled": true}}', "section 'expert_parallel'.*moe.ep_size.*leave it out"),
        ('{"tensor_parallel": {"autotp_size": 2}}', "section 'tensor_parallel'.*ZeRO stage 3"),
        ('{"data_efficiency": {"enabled": true}}', "section 'data_efficiency'.*train_dataloader"),
        ("{", "not JSON"),
        ("[]", "JSON object"),
    ],
)
def test_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_json(tmp_path / "x.json")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no DeepSpeed JSON file"):
        read_json(tmp_path / "absent.json")


def test_sections_that_are_off_are_let_pass(tmp_path: Path) -> None:
    content = {"fp16": {"enabled": False}, "data_efficiency": {"enabled": False}}
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert read_json(tmp_path / "x.json")
