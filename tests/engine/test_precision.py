"""What "auto" means by machine, and TF32, asked of a torch that claims to have a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from rmoe.engine import precision

OFF = {"torch_autocast": {"enabled": False}}
HALF = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)


def test_a_cpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for config in ({}, OFF, HALF):
        precision.set_float32_products(config)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert not precision.autocasts()
    assert [precision.precision(config) for config in ({}, OFF, HALF)] == ["float32", "float32", "bfloat16"]


def test_a_gpu_computes_in_bfloat16_if_it_has_it(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert precision.autocasts()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not precision.autocasts()


@pytest.mark.parametrize(
    ("config", "told", "tf32"), [({}, "tf32", True), (HALF, "bfloat16", True), (OFF, "float32", False)]
)
def test_a_gpu_takes_tf32_unless_told_not_to(gpu: None, config: dict[str, object], told: str, tf32: bool) -> None:
    for before in ("highest", "high"):
        torch.set_float32_matmul_precision(before)
        precision.set_float32_products(config)
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 is tf32
    assert precision.precision(config) == told
