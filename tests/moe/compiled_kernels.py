"""Compiles every kernel for an Ampere and a Hopper GPU, which takes Triton and its assembler and no GPU."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from rmoe.moe import folded_triton, gate_kernel, passes_triton

CARDS = (80, 90)  # compute capabilities
HALF, WHOLE = "*bf16", "*i64"
# Operands that are not float32, numbers that are known before, and operands that are absent, by kernel.
Case = tuple[Any, dict[str, str], dict[str, Any], tuple[str, ...]]
_GATE = {"BLOCK_E": 16, "BLOCK_T": 64, "BLOCK_C": 64}
_CHOICE = {"CHOOSES": True, "NORMALISES": True}
_FACTORS = {f"{name}_ptr": HALF for name in ("v1", "u1", "v2", "u2")} | {"expert_ptr": WHOLE}
_PLACES = {"place_P": "*i32", "expert_P": WHOLE, "end_G": "*i32"}
_TILE = {"ROWS": 8, "WIDE": 512}
CASES: list[Case] = [
    (gate_kernel._forward, {"x_ptr": HALF, "expert_ptr": WHOLE}, _GATE | _CHOICE, ()),
    (gate_kernel._forward, {"expert_ptr": WHOLE}, _GATE | {"CHOOSES": False, "NORMALISES": False}, ("noise_ptr",)),
    (gate_kernel._backward, {"expert_ptr": WHOLE, "grad_x_ptr": HALF}, _GATE | _CHOICE, ()),
    (gate_kernel._backward, {"expert_ptr": WHOLE}, _GATE | _CHOICE, ("grad_z_ptr", "grad_x_ptr")),
    (gate_kernel._weight_gradient, {"x_ptr": HALF}, _GATE, ()),
    (gate_kernel._squared_variation, {}, {"BLOCK_E": 8}, ()),
    (folded_triton._join, {"out1_ptr": HALF, "out2_ptr": HALF}, {"BLOCK_R": 16, "BLOCK_C": 128}, ("bias1_ptr",)),
    (
        folded_triton._weigh,
        {"u_ptr": HALF, "out_ptr": HALF, "expert_ptr": WHOLE},
        {"ONE": 1 / 16, "BLOCK_R": 32, "BLOCK_T": 64},
        (),
    ),
    (folded_triton._gate_gradient, _FACTORS, {"BLOCK_T": 64, "BLOCK_R": 8}, ()),
    (passes_triton._count, {"expert_P": WHOLE, "count_GB": "*i32"}, {"G": 8, "BLOCK": 1024}, ()),
    (
        passes_triton._place,
        _PLACES | {"count_GB": "*i32", "until_GB": "*i32"},
        {"G": 8, "BLOCK": 1024},
        (),
    ),
    (passes_triton._to_experts, _PLACES | {"x_NJ": HALF}, _TILE | {"C": 384, "J": 392}, ()),
    (passes_triton._from_experts, _PLACES | {"y_NC": HALF}, _TILE | {"C": 384, "WEIGHED": True}, ()),
    (passes_triton._from_experts_backward, _PLACES | {"y_NC": HALF, "grad_NC": HALF}, _TILE | {"C": 384}, ()),
    (
        passes_triton._weights_of,
        {"w_GOJ": HALF, "b_GO": HALF},
        _TILE | {"I": 384, "J": 392, "CORE": True, "CORE_BIAS": True},
        (),
    ),
    (
        passes_triton._gradients_of,
        _PLACES | {"grad_GOJ": HALF, "grad_bias_GO": HALF},
        _TILE | {"I": 384, "J": 392, "WEIGHT": True, "BIAS": True, "CORE": True, "CORE_BIAS": True},
        (),
    ),
]
_POINTERS = ("_ptr", "_P", "_GB", "_G", "_TC", "_NJ", "_NC", "_GC", "_EOI", "_EO", "_GOJ", "_GO", "_OI", "_O")


def compiled(case: Case, card: int) -> int:
    """Returns the bytes of a kernel's code for a card."""
    kernel, types, known, absent = case
    constants = known | dict.fromkeys(absent)

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith(_POINTERS) and not name.startswith("bias_stride"):
            return types.get(name, "*fp32")
        return "fp32" if name in ("factor", "weight") else "i32"

    signature = {name: kind(name) for name in kernel.arg_names}
    by_place = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=by_place)
    return len(compile(source, target=GPUTarget("cuda", card, 32)).asm["cubin"])


if __name__ == "__main__":
    assert all(compiled(case, card) > 1000 for case in CASES for card in CARDS)
    print("compiled", len(CASES))
