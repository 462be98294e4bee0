"""Models in fewer bits: what is rounded, what is not, and how far off it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from small_runs import MOE, NETS, classifier, logits, segmentor
from torch import nn

import rmoe
from rmoe.errors import UserError
from rmoe.inference.precision import Int8Linear, check_precision, lowered, share_in_int8


def test_one_product_by_hand() -> None:
    linear = nn.Linear(2, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.27, -0.634]]))  # 127 and -63.4 hundredths
        linear.bias.fill_(1.0)
    lower = Int8Linear(linear)
    torch.testing.assert_close(lower.weight, torch.tensor([[1.27, -0.63]]))
    assert lower(torch.tensor([[1.0, 0.0]])).item() == pytest.approx(2.27, abs=0.02)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_any_size(bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 30, bias=bias), torch.randn(2, 5, 40)
    lower = copy.deepcopy(Int8Linear(linear))
    assert lower.weight.shape == (30, 40)
    assert (lower(x) - linear(x)).norm() < 0.02 * linear(x).norm()
    with torch.no_grad():
        linear.weight[3] = 0  # a row that has no scale
    assert Int8Linear(linear)(x).isfinite().all()


@pytest.mark.parametrize("lacks", [True, False])
@pytest.mark.parametrize("asked", [{"dtype": "bfloat16"}, {"precision": "bfloat16"}, {"precision": "int8"}], ids=str)
def test_a_cpu_without_bfloat16_is_named_once(tmp_path: Path, capsys: Any, asked: dict[str, str], lacks: bool) -> None:
    run = classifier(tmp_path / "run", "vit")
    with mock.patch.object(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", return_value=not lacks):
        rmoe.load(run, device="cpu", **asked)
    told = capsys.readouterr().out.count("rmoe: this CPU has no instructions for bfloat16")
    assert told == ("bfloat16" in asked.values() and lacks)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("moe", [None, MOE, {**MOE, "residual": "full"}], ids=str)
def test_8_bits_are_near_32(tmp_path: Path, net: str, moe: Any) -> None:
    path = classifier(tmp_path / "run", net, moe)
    whole, lower = (rmoe.load(path, device="cpu", precision=x) for x in (None, "int8"))
    assert (whole.precision, lower.precision) == (None, "int8")
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    expected, found = logits(whole, images), logits(lower, images)
    assert 0 < (found - expected).norm() < 0.2 * expected.norm()
    for name, module in lower.model.named_modules():
        if type(module) is nn.Linear:
            assert ".core." in name
    assert (0.3 if moe is None and net == "vit" else 0.05) < share_in_int8(lower.model) < 1
    assert share_in_int8(whole.model) == 0


@pytest.mark.parametrize("moe", [None, MOE, {**MOE, "residual": "full"}], ids=str)
def test_bfloat16_weights_are_what_autocast_rounds_to(tmp_path: Path, moe: Any) -> None:
    path = segmentor(tmp_path / "run", "swin", moe)
    weights, passing = (
        rmoe.load(path, device="cpu", precision="bfloat16"),
        rmoe.load(path, dtype="bfloat16", device="cpu"),
    )
    assert weights.dtype == torch.bfloat16
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(logits(weights, images), logits(passing, images), atol=0.02, rtol=0.02)
    dtypes = {name: x.dtype for name, x in weights.model.named_parameters()}
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if ".gate." in name or "norm" in name)
    half = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert any(name.endswith("attn.qkv.weight") for name in half)
    assert moe is None or any("deepspeed_moe" in name for name in half)


def test_weights_that_a_model_reads_itself_are_those_that_it_computes_with() -> None:
    """A Swin V2's attention reads the weight of its linear layer."""
    from timm import create_model

    torch.manual_seed(0)
    small = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "num_classes": 3}
    net = create_model("swinv2_tiny_window8_256", **small).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
        assert (lowered(net, "int8")(x) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision is 'int4'; .*known: bfloat16, int8|did you mean 'int8'"),
        ({"precision": 8}, "precision is '8'"),
        ({"precision": "int8", "dtype": "bfloat16"}, "precision 'int8' and dtype 'bfloat16': give one of both"),
        ({"device": "meta"}, "the device 'meta' cannot be used: it holds no numbers; give cpu, cuda or cuda:N"),
    ],
)
def test_a_precision_that_is_none(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rmoe.load(classifier(tmp_path / "run", "vit"), **{"device": "cpu", **options})


def test_8_bits_are_for_cpus() -> None:
    with pytest.raises(UserError, match="is for CPUs, and the device is cuda"):
        check_precision("int8", torch.device("cuda"), torch.float32)


def test_predictions_have_the_kinds_that_they_have_in_float32(tmp_path: Path) -> None:
    path = classifier(tmp_path / "run", "vit")
    for precision in ("int8", "bfloat16"):
        (answer,) = rmoe.load(path, device="cpu", precision=precision).predict(np.zeros((32, 32, 3), np.uint8))
        assert answer.probabilities.dtype == np.float32  # type: ignore[union-attr]
        assert answer.probabilities.sum() == pytest.approx(1, abs=1e-5)  # type: ignore[union-attr]
