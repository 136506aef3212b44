"""A checkpoint whose head bitsandbytes has packed: in every place, in the cache, and where it is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import load_tiny, pack_with_head, packed_row, resident_plan, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.errors import BaseModelError
from qlora_train.infer.decoding import Sampling, generate_tokens
from qlora_train.memory.execution import Activation, ExecutionPlan, Place
from qlora_train.memory.load import load_base
from qlora_train.memory.packed_cache import HEAD, MANIFEST
from qlora_train.memory.plan.model_shape import find_shape
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.packed_matrix import PackedMatrix
from qlora_train.model.quantize import Packing
from qlora_train.model.token_matrix import ResidentMatrix
from qlora_train.train.walk import LayerWalk

V, D = 97, 128
PACKINGS = [Packing("nf4", True), Packing("nf4"), Packing("fp4", True), Packing("fp4"), Packing("int8")]
over_packings = pytest.mark.parametrize("packing", PACKINGS, ids=str)
RESIDENT = resident_plan(*[Activation.RECOMPUTE] * 3)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[Packing, Path]:
    root = tmp_path_factory.mktemp("heads")
    plain = write_checkpoint(root / "plain", vocab_size=V, hidden_size=D)
    return {packing: pack_with_head(plain, root / str(packing), packing) for packing in PACKINGS}


def dequantized_head(folder: Path) -> Tensor:
    """[V, D] as transformers and bitsandbytes unpack it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    return model.dequantize().lm_head.weight.detach().float()


def whole_head(decoder: FrozenDecoder) -> Tensor:
    decoder.weights.expect(decoder.head.items)
    return decoder.whole_head()


def placed(head: Place) -> ExecutionPlan:
    return replace(RESIDENT, head=head, num_slots=0 if head is Place.RESIDENT else 2)


@over_packings
def test_it_stays_packed_and_is_what_bitsandbytes_unpacks(
    checkpoints: dict[Packing, Path], packing: Packing
) -> None:
    decoder, _ = load_tiny(checkpoints[packing], packing)
    assert isinstance(decoder.head, PackedMatrix) and isinstance(decoder.embedding, ResidentMatrix)
    assert torch.equal(decoder.whole_head(), dequantized_head(checkpoints[packing]))
    stored = decoder.head._stored
    assert isinstance(stored, ResidentMatrix)
    row_bytes = D + 4 if packing.format == "int8" else D // 2 + D // 64 * 4
    assert stored.weight.nbytes == V * row_bytes


@over_packings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_gradients_and_tokens_are_the_same_wherever_it_waits(
    checkpoints: dict[Packing, Path], packing: Packing, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = checkpoints[packing]
    tokens = [packed_row([19, 30, 14]), packed_row([40, 23], seed=5, first_row=1)]
    results = []
    for plan in (RESIDENT, *map(placed, Place)):
        decoder, factors = load_tiny(folder, packing, dtype, plan=plan)
        assert isinstance(decoder.head, PackedMatrix)
        walk = LayerWalk(decoder, factors, plan, reference=False)
        loss = walk.accumulate(tokens, seed=0, step=1, num_supervised=100)
        answers = generate_tokens(decoder, [[5, 9, 7], [8]], Sampling(5), frozenset())
        results.append((loss, factors.gradient.clone(), whole_head(decoder), answers))
        decoder.close()
    assert results[0][0] > 0 and results[0][1].abs().max() > 0
    for loss, gradient, head, answers in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
        assert torch.equal(head, results[0][2]) and answers == results[0][3]


@over_packings
def test_the_cache_holds_packed_rows(
    checkpoints: dict[Packing, Path], packing: Packing, tmp_path: Path
) -> None:
    folder = checkpoints[packing]
    uncached = load_base(folder, packing, torch.bfloat16, CPU)
    for _ in range(2):  # made, then opened
        cached = load_base(folder, packing, torch.bfloat16, CPU, cache=tmp_path)
        assert torch.equal(cached.whole_head(), uncached.whole_head())
        assert cached.fingerprint == uncached.fingerprint
    (made,) = tmp_path.iterdir()
    row_bytes = D + 4 if packing.format == "int8" else D // 2 + D // 64 * 4
    assert (made / HEAD).stat().st_size == V * row_bytes
    manifest = json.loads((made / MANIFEST).read_text())
    assert manifest["head_packing"]["format"] == packing.format
    manifest["head_packing"]["format"] = "none"
    (made / MANIFEST).write_text(json.dumps(manifest))
    said: list[str] = []
    load_base(folder, packing, torch.bfloat16, CPU, cache=tmp_path, say=said.append)
    assert "damaged" in said[0] and "its hash differs" in said[0]


@over_packings
def test_the_plan_reads_it_from_the_config(checkpoints: dict[Packing, Path], packing: Packing) -> None:
    assert find_shape(str(checkpoints[packing])).head_format == packing.format


@pytest.mark.parametrize("packing", [Packing("nf4", True), Packing("int8")], ids=str)
def test_rows_that_are_not_whole_blocks(tmp_path: Path, packing: Packing) -> None:
    """4 bits: unpacked at load. int8 has a scale per row."""
    plain = write_checkpoint(tmp_path / "plain", vocab_size=V, hidden_size=72)
    folder = pack_with_head(plain, tmp_path / "packed", packing)
    for plan in (RESIDENT, placed(Place.DISK)):
        decoder, _ = load_tiny(folder, packing, plan=plan)
        assert isinstance(decoder.head, PackedMatrix) == (packing.format == "int8")
        assert torch.equal(whole_head(decoder), dequantized_head(folder))
        decoder.close()
    assert find_shape(str(folder)).head_format == ("int8" if packing.format == "int8" else "none")


def rewrite(folder: Path, **changed: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | changed, folder / "model.safetensors", metadata={"format": "pt"})


def test_damage_is_named(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", vocab_size=V, hidden_size=D)
    folder, packing = pack_with_head(plain, tmp_path / "packed", Packing("int8")), Packing("int8")
    tensors = load_file(folder / "model.safetensors")
    for name, damaged, words in (
        ("lm_head.weight", tensors["lm_head.weight"][:90].clone(), r"row_absmax is .* \[97\] where"),
        ("lm_head.SCB", tensors["lm_head.SCB"].fill_(float("inf")), "lm_head.weight holds values that"),
        ("model.embed_tokens.weight", torch.ones(V, D, dtype=torch.int8), "only linear layers can be packed"),
    ):
        rewrite(folder, **{name: damaged})
        with pytest.raises(BaseModelError, match=words):
            load_base(folder, packing, torch.float32, CPU)
        rewrite(
            folder, **{name: load_file(plain / "model.safetensors")[name]} if "embed" in name else tensors
        )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": V + 1}))
    with pytest.raises(BaseModelError, match=r"\[97, 128\] in the checkpoint, config.json needs \[98, 128\]"):
        load_base(folder, packing, torch.float32, CPU)
