"""The same four rows as 4 x 1, 2 x 2 and 1 x 4 (micro-batch size x accumulation): same loss and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_data import packed
from tiny_models import VOCABULARY_SIZE, load_tiny, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.data.dataset import PackedDataset
from qlora_train.data.documents import Document
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy

SPLITS: dict[str, list[tuple[int | None, ...]]] = {
    "4x1": [(4, 5, 6, 7)],
    "2x2": [(4, 5), (6, 7)],
    "1x4": [(4,), (5,), (6,), (7,)],
}
PADDED = {"3x2": [(4, 5, 6), (7, None, None)]}  # the last group of an epoch: empty bins weigh nothing
LENGTHS = [40, 18, 62, 12, 22, 50, 34, 60, 64, 16, 44, 10, 28]


def dataset() -> PackedDataset:
    """Documents whose share of supervised tokens differs widely: a mean per micro-batch would be wrong."""
    rng = np.random.default_rng(0)
    documents = []
    for number, length in enumerate(LENGTHS):
        supervised = np.zeros(length, dtype=bool)
        supervised[1 + (number * 7) % (length - 1) :] = True
        documents.append(Document(rng.integers(3, VOCABULARY_SIZE, length).astype(np.int32), supervised))
    return packed(documents, length=64, packing=True, seed=1, shuffle=True)


def gradients_of(
    decoder: FrozenDecoder,
    lora: LoraParameters,
    groups: list[tuple[int | None, ...]],
    reference: bool,
    seed: int = 0,
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    data = dataset()
    batches = [PackedTokens.from_host(data.micro_batch(group), "cpu") for group in groups]
    num_supervised = sum(data.num_supervised(group) for group in groups)
    lora.gradient.zero_()
    walk = LayerWalk(decoder, lora, resident_plan(*[ActivationPolicy.RECOMPUTE] * 3), reference=reference)
    loss_sum = walk.accumulate(batches, seed=seed, step=3, num_supervised=num_supervised)
    return loss_sum, lora.views(lora.gradient.clone())


def largest_difference(
    ours: dict[str, tuple[Tensor, Tensor]], theirs: dict[str, tuple[Tensor, Tensor]]
) -> float:
    return max(
        float((a - b).norm() / b.norm())
        for name in theirs
        for a, b in zip(ours[name], theirs[name], strict=True)
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("reference", [False, True])
def test_any_split_gives_the_same_loss_and_gradients(
    tmp_path: Path, dtype: torch.dtype, tolerance: float, dropout: float, reference: bool
) -> None:
    folder, token_ids = write_checkpoint(tmp_path), (5, 60, VOCABULARY_SIZE)
    decoder, lora = load_tiny(folder, dtype=dtype, dropout=dropout, token_ids=token_ids)
    results = {
        name: gradients_of(decoder, lora, groups, reference) for name, groups in (SPLITS | PADDED).items()
    }
    loss, expected = results.pop("1x4")
    assert loss > 0 and all(part.norm() > 0 for pair in expected.values() for part in pair)
    for name, (other_loss, gradients) in results.items():
        torch.testing.assert_close(other_loss, loss, rtol=tolerance, atol=0)
        assert largest_difference(gradients, expected) <= tolerance, name


def test_dropout_is_at_work_and_depends_on_the_seed(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    groups = SPLITS["2x2"]
    _, plain = gradients_of(*load_tiny(folder), groups, reference=False)
    decoder, lora = load_tiny(folder, dropout=0.1)
    _, dropped = gradients_of(decoder, lora, groups, reference=False)
    _, other_seed = gradients_of(decoder, lora, groups, reference=False, seed=1)
    _, again = gradients_of(decoder, lora, groups, reference=False)
    assert largest_difference(dropped, plain) > 0.05
    assert largest_difference(dropped, other_seed) > 0.05
    assert largest_difference(dropped, again) == 0.0
