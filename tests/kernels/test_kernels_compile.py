"""Every Triton kernel becomes machine code for every GPU generation we run on, without a GPU here.

What the machine code looks like is looked at too, where speed or bits depend on it.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from qlora_train.kernels.triton_probe import add_one
from qlora_train.quant.dequantize_4bit import LAUNCH_OPTIONS, dequantize_4bit_kernel

CAPABILITIES = [75, 80, 86, 89, 90, 120]
ROWS = {"W_row_stride": 1, "RSTD_row_stride": 1, "elementwise_affine": True, "BLOCK_SIZE": 4096}


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def compiled(kernel, capability: int, types: dict[str, str], constants: dict, **options) -> CompiledKernel:
    """types: argument -> Triton's name of its type; pointers and integers count as multiples of 16, as a
    launch with usual shapes finds them."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types if types[name] != "fp32"},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def dequantize(capability: int, out: str, nested: bool = True, wide: bool = False) -> CompiledKernel:
    scales = ("code", "nested_code", "nested_absmax", "nested_offset")
    types = {"data": "*u8", "absmax": "*u8" if nested else "*fp32"} | dict.fromkeys(scales, "*fp32")
    types |= {"out": out} | dict.fromkeys(("start", "stop", "num_bytes"), "i64" if wide else "i32")
    constants = {"BLOCK_SIZE": 64, "NESTED": nested, "WIDE": wide}
    return compiled(dequantize_4bit_kernel, capability, types, constants, **LAUNCH_OPTIONS)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_probe_compiles(capability) -> None:
    assert len(compiled(add_one, capability, {"pointer": "*i32"}, {}).asm["cubin"]) > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("out", ["*bf16", "*fp16", "*fp32"])
def test_dequantize_4bit_compiles(capability, out) -> None:
    asm = dequantize(capability, out).asm
    assert len(asm["cubin"]) > 0
    # absmax = code * scale + offset, each operation rounded: as bitsandbytes does it
    assert "fma" not in asm["ptx"]
    assert asm["ptx"].count("add.rn.f32") == 1
    if capability >= 80 and out == "*bf16":  # below, rounding to bfloat16 takes integer operations
        assert asm["ptx"].count("cvt.rn.bf16x2.f32") == 4
    # one word read, 8 numbers written at once; 16 bits without an exchange between threads
    assert "st.global.v4" in asm["ptx"] and "st.global.b16" not in asm["ptx"]
    assert ("shared" in asm["ptx"]) == (out == "*fp32")


@pytest.mark.parametrize(("nested", "wide"), [(False, False), (False, True), (True, True)])
def test_other_layouts_compile(nested, wide) -> None:
    asm = dequantize(80, "*bf16", nested, wide).asm
    assert len(asm["cubin"]) > 0 and "st.global.v4" in asm["ptx"]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("element", "dtype"), [("*bf16", tl.bfloat16), ("*fp16", tl.float16), ("*fp32", tl.float32)]
)
def test_ligers_norm_compiles(capability, element, dtype) -> None:
    norms = pytest.importorskip(
        "liger_kernel.ops.rms_norm", reason="liger-kernel is not installed (extra gpu)"
    )
    shared = {"RSTD_ptr": "*fp32", "n_cols": "i32", "offset": "fp32"}
    forward = compiled(
        norms._rms_norm_forward_kernel,
        capability,
        dict.fromkeys(("Y_ptr", "X_ptr", "W_ptr"), element)
        | dict.fromkeys(("Y_row_stride", "X_row_stride"), "i32")
        | {**shared, "eps": "fp32"},
        {**ROWS, "casting_mode": 0},
        num_warps=8,
    )
    backward = compiled(
        norms._rms_norm_backward_kernel,
        capability,
        dict.fromkeys(("dY_ptr", "dX_ptr", "X_ptr", "W_ptr"), element)
        | dict.fromkeys(
            ("dY_row_stride", "dX_row_stride", "X_row_stride", "n_rows", "rows_per_program"), "i32"
        )
        | shared,
        {
            **ROWS,
            "casting_mode": 0,
            "X_dtype": dtype,
            "dW_ptr": None,
            "dW_row_stride": 0,
            "COMPUTE_DW": False,
        },
        num_warps=8,
    )
    assert_no_atomics(forward, backward)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("element", ["*bf16", "*fp16", "*fp32"])
def test_ligers_silu_multiply_compiles(capability, element) -> None:
    swiglu = pytest.importorskip(
        "liger_kernel.ops.swiglu", reason="liger-kernel is not installed (extra gpu)"
    )
    others = {"stride": "i32", "gate_multiplier": "fp32"}
    width = {"n_cols": 14336, "BLOCK_SIZE": 16384}
    forward, backward = (
        compiled(kernel, capability, dict.fromkeys(names, element) | others, width, num_warps=16)
        for kernel, names in (
            (swiglu._swiglu_forward_kernel, ("a_ptr", "b_ptr", "c_ptr")),
            (swiglu._swiglu_backward_kernel, ("dc_ptr", "a_ptr", "b_ptr")),
        )
    )
    assert_no_atomics(forward, backward)


def assert_no_atomics(*kernels: CompiledKernel) -> None:
    """Sums are in a fixed order: the same bits in every run."""
    for kernel in kernels:
        assert len(kernel.asm["cubin"]) > 0
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])
