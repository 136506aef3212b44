"""FP8 checkpoints: the numbers are code times scale in float32, whatever the scales are for, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_bases import KINDS, block_of, to_fp8, write_fp8_copy
from safetensors.torch import save_file
from tiny_models import NF4, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.errors import BaseModelError
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.weights.fp8_checkpoint import Fp8Reader
from qlora_train.weights.load import load_base

NAME = "model.layers.0.mlp.up_proj.weight"
NORM = {"model.norm.weight": torch.ones(4)}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 72}


def write(folder: Path, tensors: dict[str, Tensor], **stored: Any) -> Path:
    """A folder with these tensors; stored: what config.json says of FP8."""
    save_file({name: t.contiguous() for name, t in (tensors | NORM).items()}, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8"} | stored}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def matrix(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, shape) for kind in KINDS for shape in ((300, 200), (256, 128))]
    + [(kind, (3, 130, 150)) for kind in KINDS if kind not in ("tensor", "flat-rows")],
    ids=str,
)
def test_nf4_is_that_of_the_float32_product(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    codes, scales, product = to_fp8(matrix(*shape), kind)
    ending = "_scale" if "row" in kind else "_scale_inv"
    write(tmp_path, {NAME: codes, NAME + ending: scales}, weight_block_size=block_of(kind))
    with Fp8Reader(tmp_path) as reader:
        assert set(reader.names()) == {NAME, *NORM}
        info = reader.info(NAME)
        assert (info.dtype, info.shape, info.num_bytes) == (torch.float32, shape, 4 * product.numel())
        assert torch.equal(reader.read(NAME), product)
        assert torch.equal(reader.read("model.norm.weight"), torch.ones(4))
        blocks = (rows.flatten(0, -2) for _, _, rows in reader.row_blocks(NAME, 7000))  # 7 rows or 1 expert
        ours = quantize(blocks, (product[..., 0].numel(), shape[-1]), NF4)
    theirs = quantize([product.flatten(0, -2)], ours.shape, NF4)
    assert all(torch.equal(ours.tensors[key], theirs.tensors[key]) for key in theirs.tensors)


def test_blocks_are_128_by_128_where_config_json_does_not_say(tmp_path: Path) -> None:
    codes, scales, product = to_fp8(matrix(300, 200), "blocks", dtype=torch.float8_e5m2)
    write(tmp_path, {NAME: codes, NAME + "_scale_inv": scales})
    with Fp8Reader(tmp_path) as reader:
        assert torch.equal(reader.read(NAME), product)


def test_scales_of_the_input_are_left_out(tmp_path: Path) -> None:
    codes, scales, _ = to_fp8(matrix(24, 16), "tensor")
    module = NAME.removesuffix("weight")
    inputs = {module + ending: torch.ones(()) for ending in ("input_scale", "activation_scale")}
    write(tmp_path, {NAME: codes, NAME + "_scale": scales} | inputs, activation_scheme="static")
    with Fp8Reader(tmp_path) as reader:
        assert set(reader.names()) == {NAME, *NORM}


CODES, SCALES, _ = to_fp8(matrix(300, 200), "blocks")
INV = NAME + "_scale_inv"


@pytest.mark.parametrize(
    ("tensors", "stored", "message"),
    [
        ({NAME: CODES}, {}, rf"{NAME} is in FP8, and its scales .* are missing"),
        ({NAME: CODES.float(), INV: SCALES}, {}, rf"1 scales too many .*{INV}"),
        ({NAME: CODES.float(), NAME + "_scale": SCALES}, {}, rf"1 scales too many .*{NAME}_scale\b"),
        ({INV: SCALES}, {}, "1 scales too many"),
        ({"model.layers.0.mlp.experts.up_proj_scale_inv": SCALES}, {}, "1 scales too many"),
        ({NAME: CODES, INV: SCALES, NAME + "_scale": torch.ones(1)}, {}, "1 scales too many"),
        ({NAME: CODES, INV: SCALES[:2]}, {}, r"\[2, 2\].*\[300, 200\].*128 x 128"),
        ({NAME: CODES, INV: SCALES}, {"weight_block_size": [64, 64]}, "block of 64 x 64"),
        ({NAME: CODES, INV: SCALES}, {"weight_block_size": None}, r"one for each row \("),
        ({NAME: CODES, INV: SCALES.long()}, {}, r"torch\.int64 \[3, 2\]"),
        ({NAME: CODES[0], INV: SCALES[0, :1]}, {}, r"is \[200\]"),
        ({NAME: CODES, INV: SCALES}, {"weight_block_size": [0, 128]}, "not two whole numbers"),
        ({NAME: CODES, INV: SCALES}, {"weight_block_size": 128}, "not two whole numbers"),
    ],
    ids=range(13),
)
def test_scales_that_do_not_belong_to_their_weights_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], stored: dict[str, Any], message: str
) -> None:
    write(tmp_path, tensors, **stored)
    with pytest.raises(BaseModelError, match=message):
        Fp8Reader(tmp_path)


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    base = write_fp8_copy(write_checkpoint(tmp_path / "plain"), tmp_path / "base", "tensor")
    file = base / "model.safetensors"
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    place = json.loads(raw[8:start])["model.layers.1.mlp.up_proj.weight_scale_inv"]["data_offsets"]
    raw[start + place[0] : start + place[1]] = b"\x00\x00\xc0\x7f"  # NaN
    file.write_bytes(raw)
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.up_proj\.weight: holds values that are not"):
        load_base(base, NF4, torch.float32, CPU)


@pytest.mark.parametrize("quantization", [NF4, Quantization("int8"), Quantization("none")], ids=str)
@pytest.mark.parametrize("family,changes", [("llama", {}), ("qwen3_moe", EXPERTS)], ids=["llama", "experts"])
def test_a_base_is_the_one_of_its_products(
    tmp_path: Path, family: str, changes: dict[str, Any], quantization: Quantization
) -> None:
    plain = write_checkpoint(tmp_path / "plain", family, **changes)
    kept = "layers.1.self_attn.o_proj"  # as modules_to_not_convert would say
    base = write_fp8_copy(plain, tmp_path / "base", block=[48, 40], kept=kept)
    folders = (base, tmp_path / "base-16")
    ours, theirs = (load_base(folder, quantization, torch.float16, CPU) for folder in folders)
    assert ours.fingerprint == theirs.fingerprint


def test_products_are_those_of_transformers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}
    plain = write_checkpoint(tmp_path / "plain", **sizes)
    base = write_fp8_copy(plain, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu").state_dict()
    assert not any("scale" in name for name in theirs)
    with Fp8Reader(base) as reader:
        for name in reader.names():
            assert torch.equal(reader.read(name), theirs[name]), name


def test_blocks_of_rows_share_a_buffer_within_the_bound(tmp_path: Path) -> None:
    codes, scales, _ = to_fp8(matrix(300, 200), "blocks")
    write(tmp_path, {NAME: codes, NAME + "_scale_inv": scales})
    with Fp8Reader(tmp_path) as reader:
        blocks = [(start, stop, rows.data_ptr()) for start, stop, rows in reader.row_blocks(NAME, 20000)]
    assert [block[:2] for block in blocks] == [(i, i + 20) for i in range(0, 300, 20)]  # 200 x (1 + 4) bytes
    assert len({block[2] for block in blocks}) == 1


MEASURE = """
import sys, torch
from pathlib import Path
from qlora_train.device.process_peak import process_peak_bytes
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.weights.fp8_checkpoint import Fp8Reader
quantize([torch.ones(64, 64)], (64, 64), Quantization("nf4"))  # what is imported and made once
with Fp8Reader(Path(sys.argv[1])) as reader:
    before = process_peak_bytes()
    blocks = (rows for _, _, rows in reader.row_blocks(sys.argv[2], 16 * 2**20))
    quantize(blocks, reader.info(sys.argv[2]).shape, Quantization("nf4"))
    print((process_peak_bytes() - before) / 2**20)
"""


def test_memory_is_that_of_a_block_of_rows(tmp_path: Path) -> None:
    """64 MiB of codes, which are 256 MiB of numbers and 36 MiB of NF4: the rest is a block and scratch."""
    codes = torch.zeros(8192, 8192, dtype=torch.uint8).view(torch.float8_e4m3fn)
    write(tmp_path, {NAME: codes, NAME + "_scale_inv": torch.ones(64, 64)})
    root = str(Path(sys.modules["qlora_train"].__file__ or "").parents[1])
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path), NAME]
    result = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=root)
    assert float(result.stdout) < 36 + 16 + 32
