"""MXFP4 experts: their numbers are those of transformers, kept beside linears in any format, or refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mxfp4_bases import STORED, random_mxfp4, write_mxfp4_base
from safetensors.torch import load_file, save_file
from tiny_models import NF4, autograd_gradients, flat, library_model, load_tiny, packed_row, resident_plan
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.errors import BaseModelError
from qlora_train.model.base import MetaModel, read_config
from qlora_train.quant.formats import MXFP4, Quantization
from qlora_train.quant.weight import QuantizedWeight, quantized_layout
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy, Placement
from qlora_train.weights.load import load_base
from qlora_train.weights.mxfp4_checkpoint import Mxfp4Reader

NAME = "model.layers.0.mlp.experts.down_proj"


def write(folder: Path, blocks: Tensor, scales: Tensor, stored: dict[str, object] | None = None) -> Path:
    tensors = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales, f"{NAME}_bias": torch.ones(3)}
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": STORED if stored is None else stored}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_kept(folder: Path, shape: tuple[int, int]) -> QuantizedWeight:
    layout = quantized_layout(MXFP4, shape, torch.float32)
    tensors = {key: torch.empty(size, dtype=kind) for key, (kind, size) in layout.items()}
    with Mxfp4Reader(folder) as reader:
        reader.read_kept(NAME, tensors)
    return QuantizedWeight(MXFP4, shape, tensors)


def bits(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.int32 if numbers.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_are_those_of_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    blocks, scales = random_mxfp4(5, 70, 96)
    scales[0] = torch.arange(210).view(70, 3) + 10  # all exponents that leave bfloat16 some digits
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # [E, in, out]
    weight = read_kept(write(tmp_path, blocks, scales), (5 * 70, 96))
    rows = expected.transpose(1, 2).reshape(350, 96)
    assert torch.equal(bits(weight.dequantize(dtype)), bits(rows))
    assert torch.equal(bits(weight.dequantize_rows(101, 203, dtype)), bits(rows[101:203]))
    out = torch.empty(140, 96, dtype=dtype)
    for kernel in ("parts", "library"):
        assert torch.equal(bits(weight.dequantize_into(out.zero_(), kernel, 70)), bits(rows[70:210]))
    with Mxfp4Reader(tmp_path) as reader:
        assert set(reader.names()) == {NAME, f"{NAME}_bias"} and NAME in reader
        info = reader.info(NAME)
        assert (info.dtype, info.shape, info.num_bytes) == (torch.bfloat16, (5, 96, 70), 2 * 5 * 96 * 70)
        assert torch.equal(reader.read(NAME), expected.bfloat16())
        places = [(start, stop, rows.shape) for start, stop, rows in reader.row_blocks(NAME)]
    assert places == [(i, i + 1, (1, 96, 70)) for i in range(5)]


def test_one_launch_gives_the_same_numbers(
    tmp_path: Path, interpreted: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        sys.modules, "qlora_train.quant.dequantize_4bit", interpreted("qlora_train.quant.dequantize_4bit")
    )
    weight = read_kept(write(tmp_path, *random_mxfp4(3, 40, 96)), (120, 96))
    out = torch.empty(40, 96)
    weight.dequantize_into(out, "triton", 33)
    assert torch.equal(bits(out), bits(weight.dequantize_rows(33, 73, torch.float32)))


BLOCKS, SCALES_OF = random_mxfp4(2, 40, 64)


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (BLOCKS.float(), SCALES_OF, r"torch\.float32"),
        (BLOCKS, SCALES_OF[:, :20].clone(), r"\[2, 40, 2, 16\].*\[2, 20, 2\]"),
        (BLOCKS[..., :8].clone(), SCALES_OF, r"\[2, 40, 2, 8\]"),
    ],
    ids=["dtype", "scales", "blocks"],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, blocks: Tensor, scales: Tensor, message: str
) -> None:
    with pytest.raises(BaseModelError, match=message):
        Mxfp4Reader(write(tmp_path, blocks, scales))


def test_config_and_tensors_must_agree(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"is in MXFP4, of which config\.json says nothing"):
        Mxfp4Reader(write(tmp_path, BLOCKS, SCALES_OF, stored={}))
    save_file({f"{NAME}_blocks": BLOCKS}, tmp_path / "model.safetensors")
    with pytest.raises(BaseModelError, match=rf"{NAME}_blocks has no {NAME}_scales"):
        Mxfp4Reader(tmp_path)
    base = write_mxfp4_base(tmp_path / "base")
    (tmp_path / "base-16" / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(BaseModelError, match=r"gate_up_proj is not in MXFP4, as config\.json has it"):
        load_base(tmp_path / "base-16", NF4, torch.float32, CPU)


def test_a_scale_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    scales = SCALES_OF.clone()
    scales[1, 3, 1] = 255
    with pytest.raises(BaseModelError, match=f"{NAME} holds values that are not finite"):
        read_kept(write(tmp_path, BLOCKS, scales), (80, 64))


@pytest.mark.parametrize("quantization", [NF4, Quantization("none")], ids=str)
def test_a_base_walks_as_transformers_model_does(tmp_path: Path, quantization: Quantization) -> None:
    base = write_mxfp4_base(tmp_path / "base")
    decoder, lora = load_tiny(base, quantization)
    kept = [name for name, weight in decoder.weights.quantized.items() if weight.quantization == MXFP4]
    assert len(kept) == 6 and all(".experts." in name for name in kept)
    tokens = packed_row([30])
    model = library_model(tmp_path / "base-16", decoder, lora, torch.float32, attention="eager")
    expected_loss, expected = autograd_gradients(model, lora, tokens, len(tokens.supervised))
    plan = resident_plan(ActivationPolicy.RECOMPUTE, ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE)
    for reference in (False, True):
        lora.gradient.zero_()
        walk = LayerWalk(decoder, lora, plan, reference=reference)
        loss = walk.accumulate([tokens], seed=0, step=1, num_supervised=len(tokens.supervised))
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        ours, theirs = flat(lora.views(lora.gradient)), flat(expected)
        assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_streamed_layers_hold_both_formats(tmp_path: Path) -> None:
    base = write_mxfp4_base(tmp_path / "base")
    tokens = packed_row([30])
    layouts = MetaModel(read_config(base), torch.float32).layouts(NF4)
    assert {layout.kept for layout in layouts} == {MXFP4}
    resident, _ = load_tiny(base)
    places = (Placement.RAM, Placement.DISK, Placement.RAM)
    plan = resident_plan(*[ActivationPolicy.RECOMPUTE] * 3, weights=places, num_slots=2)
    streamed, _ = load_tiny(base, plan=plan)
    assert streamed.fingerprint == resident.fingerprint
    logits = []
    for decoder in (resident, streamed):
        x, arguments = decoder.embed_packed(tokens)
        with torch.no_grad():
            for index in decoder.layers_in_turn():
                x = decoder.run_layer(index, x, arguments[index])
            logits.append(decoder.logits(decoder.norm(x)))
        decoder.close()
    assert torch.equal(*logits)


def test_bytes_of_a_layer(tmp_path: Path) -> None:
    """gpt_oss-20b: 17 bytes for 32 numbers."""
    base = write_mxfp4_base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    stored = sum(t.numel() for n, t in tensors.items() if ".layers.0." in n and t.dtype == torch.uint8)
    layout = MetaModel(read_config(base), torch.float32).layouts(NF4)[0]
    experts = [entry for entry in layout.entries if ".experts." in entry.weight]
    assert sum(entry.num_bytes for entry in experts if entry.tensor in ("data", "absmax")) == stored
