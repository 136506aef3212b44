"""A checkpoint whose head bitsandbytes has quantized: in every place, in the cache, and where it is
damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import load_tiny, packed_row, quantize_with_head, resident_plan, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.errors import BaseModelError
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.sampling import Sampling
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.quantized_matrix import QuantizedMatrix
from qlora_train.model.vocab_matrix import ResidentMatrix
from qlora_train.plan.model_shape import find_shape
from qlora_train.quant.formats import Quantization
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement
from qlora_train.weights.load import load_base
from qlora_train.weights.quantized_cache import HEAD_FILE, MANIFEST

V, D = 97, 128
QUANTIZATIONS = [
    Quantization("nf4", True),
    Quantization("nf4"),
    Quantization("fp4", True),
    Quantization("fp4"),
    Quantization("int8"),
]
over_quantizations = pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=str)
DEVICE = resident_plan(*[ActivationPolicy.RECOMPUTE] * 3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Quantization, Path]:
    root = tmp_path_factory.mktemp("heads")
    plain = write_checkpoint(root / "plain", vocab_size=V, hidden_size=D)
    return {
        quantization: quantize_with_head(plain, root / str(quantization), quantization)
        for quantization in QUANTIZATIONS
    }


def dequantized_head(folder: Path) -> Tensor:
    """[V, D] as transformers and bitsandbytes dequantize it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    return model.dequantize().lm_head.weight.detach().float()


def whole_head(decoder: FrozenDecoder) -> Tensor:
    decoder.weights.set_schedule(decoder.head.items)
    return decoder.whole_head()


def placed(head: Placement) -> ExecutionPlan:
    return replace(DEVICE, head=head, num_slots=0 if head is Placement.DEVICE else 2)


@over_quantizations
def test_it_stays_quantized_and_is_what_bitsandbytes_dequantizes(
    checkpoints: dict[Quantization, Path], quantization: Quantization
) -> None:
    decoder, _ = load_tiny(checkpoints[quantization], quantization)
    assert isinstance(decoder.head, QuantizedMatrix) and isinstance(decoder.embedding, ResidentMatrix)
    assert torch.equal(decoder.whole_head(), dequantized_head(checkpoints[quantization]))
    stored = decoder.head._stored
    assert isinstance(stored, ResidentMatrix)
    row_bytes = D + 4 if quantization.format == "int8" else D // 2 + D // 64 * 4
    assert stored.weight.nbytes == V * row_bytes


@over_quantizations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_gradients_and_tokens_are_the_same_wherever_it_waits(
    checkpoints: dict[Quantization, Path], quantization: Quantization, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = checkpoints[quantization]
    tokens = [packed_row([19, 30, 14]), packed_row([40, 23], seed=5, first_row=1)]
    results = []
    for plan in (DEVICE, *map(placed, Placement)):
        decoder, lora = load_tiny(folder, quantization, dtype, plan=plan)
        assert isinstance(decoder.head, QuantizedMatrix)
        walk = LayerWalk(decoder, lora, plan, reference=False)
        loss = walk.accumulate(tokens, seed=0, step=1, num_supervised=100)
        answers = generate_tokens(decoder, [[5, 9, 7], [8]], Sampling(5), frozenset())
        results.append((loss, lora.gradient.clone(), whole_head(decoder), answers))
        decoder.close()
    assert results[0][0] > 0 and results[0][1].abs().max() > 0
    for loss, gradient, head, answers in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
        assert torch.equal(head, results[0][2]) and answers == results[0][3]


@over_quantizations
def test_the_cache_holds_quantized_rows(
    checkpoints: dict[Quantization, Path], quantization: Quantization, tmp_path: Path
) -> None:
    folder = checkpoints[quantization]
    uncached = load_base(folder, quantization, torch.bfloat16, CPU)
    for _ in range(2):  # made, then opened
        cached = load_base(folder, quantization, torch.bfloat16, CPU, cache=tmp_path)
        assert torch.equal(cached.whole_head(), uncached.whole_head())
        assert cached.fingerprint == uncached.fingerprint
    (made,) = tmp_path.iterdir()
    row_bytes = D + 4 if quantization.format == "int8" else D // 2 + D // 64 * 4
    assert (made / HEAD_FILE).stat().st_size == V * row_bytes
    manifest = json.loads((made / MANIFEST).read_text())
    assert manifest["head_quantization"]["format"] == quantization.format
    manifest["head_quantization"]["format"] = "none"
    (made / MANIFEST).write_text(json.dumps(manifest))
    said: list[str] = []
    load_base(folder, quantization, torch.bfloat16, CPU, cache=tmp_path, log=said.append)
    assert "damaged" in said[0] and "its hash differs" in said[0]


@over_quantizations
def test_the_plan_reads_it_from_the_config(
    checkpoints: dict[Quantization, Path], quantization: Quantization
) -> None:
    assert find_shape(str(checkpoints[quantization])).head_quantization.format == quantization.format


@pytest.mark.parametrize("quantization", [Quantization("nf4", True), Quantization("int8")], ids=str)
def test_rows_that_are_not_whole_blocks(tmp_path: Path, quantization: Quantization) -> None:
    """4 bits: dequantized at load. int8 has a scale per row."""
    plain = write_checkpoint(tmp_path / "plain", vocab_size=V, hidden_size=72)
    folder = quantize_with_head(plain, tmp_path / "quantized", quantization)
    for plan in (DEVICE, placed(Placement.DISK)):
        decoder, _ = load_tiny(folder, quantization, plan=plan)
        assert isinstance(decoder.head, QuantizedMatrix) == (quantization.format == "int8")
        assert torch.equal(whole_head(decoder), dequantized_head(folder))
        decoder.close()
    assert find_shape(str(folder)).head_quantization.format == (
        "int8" if quantization.format == "int8" else "none"
    )


def rewrite(folder: Path, **changed: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | changed, folder / "model.safetensors", metadata={"format": "pt"})


def test_damage_is_named(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", vocab_size=V, hidden_size=D)
    folder, quantization = (
        quantize_with_head(plain, tmp_path / "quantized", Quantization("int8")),
        Quantization("int8"),
    )
    tensors = load_file(folder / "model.safetensors")
    for name, damaged, words in (
        ("lm_head.weight", tensors["lm_head.weight"][:90].clone(), r"row_absmax is .* \[97\] where"),
        ("lm_head.SCB", tensors["lm_head.SCB"].fill_(float("inf")), "lm_head.weight holds values that"),
        (
            "model.embed_tokens.weight",
            torch.ones(V, D, dtype=torch.int8),
            "only linear layers can be quantized",
        ),
    ):
        rewrite(folder, **{name: damaged})
        with pytest.raises(BaseModelError, match=words):
            load_base(folder, quantization, torch.float32, CPU)
        rewrite(
            folder, **{name: load_file(plain / "model.safetensors")[name]} if "embed" in name else tensors
        )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": V + 1}))
    with pytest.raises(BaseModelError, match=r"\[97, 128\] in the checkpoint, config.json needs \[98, 128\]"):
        load_base(folder, quantization, torch.float32, CPU)
