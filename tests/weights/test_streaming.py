"""Wherever weights, head, embedding, inputs and saved tensors wait, a step computes the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load_tiny, packed_row, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.model.decoder import FrozenDecoder
from qlora_train.quant.formats import Quantization
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy, ExecutionPlan, Placement
from qlora_train.weights.streaming import StreamedWeights

KEEP, RECOMPUTE, OFFLOAD = ActivationPolicy.KEEP, ActivationPolicy.RECOMPUTE, ActivationPolicy.OFFLOAD
DEVICE, RAM, DISK = Placement.DEVICE, Placement.RAM, Placement.DISK
NUM_LAYERS = 5
BATCHES = [packed_row([14, 1, 18], seed=k, first_row=k) for k in range(8)]
PLACES: dict[str, dict[str, Any]] = {
    "ram": {"weights": (RAM,) * 5, "num_slots": 2},
    "disk": {"weights": (DISK,) * 5, "num_slots": 3},
    "some": {"weights": (DEVICE, RAM, DEVICE, DISK, DISK), "num_slots": 2},
    "all": {"weights": (DISK,) * 5, "num_slots": 2, "head": DISK, "embedding": DISK, "inputs": RAM},
    "ram, head too": {"weights": (RAM,) * 5, "num_slots": 2, "head": RAM, "embedding": RAM},
    "only the head": {"head": DISK, "num_slots": 2},
    "only the embedding": {"embedding": RAM},
}
POLICIES = {
    "keep": (KEEP,) * 5,
    "recompute": (RECOMPUTE,) * 5,
    "offload": (OFFLOAD,) * 5,
    "mixed": (RECOMPUTE, OFFLOAD, KEEP, OFFLOAD, RECOMPUTE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(autouse=True)
def no_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))


def step(
    folder: Path, plan: ExecutionPlan, *, reference: bool = False, dropout: float = 0.1, **options: Any
) -> tuple[Tensor, Tensor, FrozenDecoder]:
    """(loss sum, flat gradient, decoder) of one optimizer step."""
    decoder, lora = load_tiny(folder, dropout=dropout, plan=plan, **options)
    walk = LayerWalk(decoder, lora, plan, reference=reference)
    num_supervised = sum(len(batch.supervised) for batch in BATCHES)
    loss = walk.accumulate(BATCHES, seed=3, step=2, num_supervised=num_supervised)
    assert lora.gradient.count_nonzero() > 0.9 * lora.gradient.numel()
    return loss, lora.gradient, decoder


def ring_of(decoder: FrozenDecoder) -> Any:
    assert isinstance(decoder.weights, StreamedWeights)
    return decoder.weights.ring


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[bool, tuple[Tensor, Tensor]]:
    plan = resident_plan(*POLICIES["keep"])
    return {reference: step(folder, plan, reference=reference)[:2] for reference in (False, True)}


@pytest.mark.parametrize("reference", [False, True], ids=["auto", "reference"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("places", PLACES)
def test_the_same_bits_from_anywhere(
    folder: Path,
    expected: dict[bool, tuple[Tensor, Tensor]],
    places: str,
    policy: str,
    reference: bool,
) -> None:
    plan = resident_plan(*POLICIES[policy], **PLACES[places])
    loss, gradient, _ = step(folder, plan, reference=reference)
    assert torch.equal(loss, expected[reference][0])
    assert torch.equal(gradient, expected[reference][1])


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "gemma", "gemma2", "olmo2", "gemma3_text"])
def test_families_stream_as_they_do_resident(tmp_path: Path, family: str, hold: bool) -> None:
    changes = {"head_dim": 16} if family.startswith("gemma") else {}
    base = write_checkpoint(tmp_path / "base", family, num_hidden_layers=3, **changes)
    policy = (RECOMPUTE, OFFLOAD, RECOMPUTE)
    loss, gradient, _ = step(base, resident_plan(KEEP, KEEP, KEEP))
    streamed = resident_plan(
        *policy, weights=(DISK,) * 3, head=RAM, embedding=RAM, num_slots=2, hold_dequantized=hold
    )
    streamed_loss, streamed_gradient, _ = step(base, streamed)
    assert torch.equal(loss, streamed_loss) and torch.equal(gradient, streamed_gradient)


@pytest.mark.parametrize(
    "quantization", [Quantization("fp4"), Quantization("int8"), Quantization("none")], ids=lambda p: p.format
)
def test_every_quantization_streams(folder: Path, quantization: Quantization) -> None:
    loss, gradient, _ = step(folder, resident_plan(*POLICIES["keep"]), quantization=quantization)
    plan = resident_plan(*POLICIES["mixed"], **PLACES["all"])
    streamed_loss, streamed_gradient, _ = step(folder, plan, quantization=quantization)
    assert torch.equal(loss, streamed_loss) and torch.equal(gradient, streamed_gradient)


@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_groups_change_nothing_but_the_order_of_sums(folder: Path, num_groups: int) -> None:
    one = step(folder, resident_plan(*POLICIES["keep"]))[1]
    plan = resident_plan(*POLICIES["mixed"], **PLACES["disk"], num_groups=num_groups)
    _, gradient, decoder = step(folder, plan)
    assert (gradient - one).norm() <= 1e-6 * one.norm()
    again = step(folder, resident_plan(*POLICIES["recompute"], num_groups=num_groups))[1]
    assert torch.equal(gradient, again)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5])
@pytest.mark.parametrize("num_groups", [1, 2, 8])
def test_a_step_fetches_no_more_than_it_must(folder: Path, num_groups: int, num_slots: int) -> None:
    plan = resident_plan(
        *POLICIES["recompute"], weights=(DISK,) * 5, num_slots=num_slots, num_groups=num_groups
    )
    decoder = step(folder, plan)[2]
    ring = ring_of(decoder)
    ring.close()
    # Still there at each turn: num_slots layers. The first forward pass finds nothing; what the next step
    # begins with is there already when this one ends.
    turns = 2 * num_groups - 1
    assert ring.num_reads <= num_groups * 2 * NUM_LAYERS - turns * num_slots
    assert decoder.weights.reader.num_bytes_read == ring.num_reads * decoder.weights.reader.largest_bytes


def test_resident_layers_are_not_fetched(folder: Path) -> None:
    decoder = step(folder, resident_plan(*POLICIES["keep"], **PLACES["some"]))[2]
    assert ring_of(decoder).num_reads <= 2 * 3 - 2
    assert set(decoder.weights.reader.items) == {1, 3, 4}


def test_a_weight_outside_its_visit_is_not_there(folder: Path) -> None:
    decoder = step(folder, resident_plan(*POLICIES["keep"], **PLACES["ram"]))[2]
    with pytest.raises(KeyError):
        decoder.weights.dequantize("model.layers.0.mlp.up_proj", torch.float32)


def test_held_weights_are_dequantized_once_per_visit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_train.quant.weight import QuantizedWeight

    counts: list[int] = []
    dequantize = QuantizedWeight.dequantize_into
    monkeypatch.setattr(
        QuantizedWeight, "dequantize_into", lambda self, *to: counts.append(1) or dequantize(self, *to)
    )
    step(folder, resident_plan(*POLICIES["recompute"], hold_dequantized=True))
    held = len(counts)
    counts.clear()
    step(folder, resident_plan(*POLICIES["recompute"]))
    assert held == 2 * 7 * NUM_LAYERS  # once forward, once backward
    # Forward, again in backward without the last one's value, and backward; the first layer's inputs need no
    # gradient, so q, k and v are not asked for one there.
    assert len(counts) == len(BATCHES) * ((7 + 6 + 7) * NUM_LAYERS - 3)


@pytest.fixture
def tiled_plan() -> Iterator[ExecutionPlan]:
    yield resident_plan(*POLICIES["mixed"], **PLACES["all"], mlp_tile_tokens=10)


@pytest.mark.parametrize("reference", [False, True], ids=["auto", "reference"])
def test_mlp_tiles_change_nothing_but_the_order_of_sums(
    folder: Path, expected: dict[bool, tuple[Tensor, Tensor]], tiled_plan: ExecutionPlan, reference: bool
) -> None:
    loss, gradient, _ = step(folder, tiled_plan, reference=reference)
    torch.testing.assert_close(loss, expected[reference][0], rtol=1e-6, atol=0)
    assert (gradient - expected[reference][1]).norm() <= 1e-6 * gradient.norm()
    resident = resident_plan(*POLICIES["keep"], mlp_tile_tokens=10)
    assert torch.equal(step(folder, resident, reference=reference)[1], gradient)
