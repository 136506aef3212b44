"""Rows of tokens in an embedding or head: where they begin, where they stand, and in which buffer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import load_tiny, write_checkpoint

from qlora_train.errors import BaseModelError
from qlora_train.model.token_rows import TokenRows, blocks_with_rows, initial_rows
from qlora_train.model.vocab_matrix import ResidentMatrix, TokenIds, whole
from qlora_train.quant.formats import Quantization

STORED = ResidentMatrix(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), tile_rows=4)


@pytest.mark.parametrize("ids", [(1,), (0, 3, 4), (5, 6), (2, 6, 7, 8, 9), (6, 7)])
def test_rows_stand_in_the_place_of_the_matrix_s_own(ids: tuple[int, ...]) -> None:
    """Gathered, by tiles (whole, partly or not at all behind the matrix), and by blocks of any size."""
    rows = torch.arange(4.0 * len(ids)).view(-1, 4)
    matrix = TokenRows(STORED, ids, rows)
    expected = torch.cat([STORED.weight, torch.zeros(max(0, ids[-1] - 5), 4)])
    expected[list(ids)] = rows
    assert matrix.num_rows == len(expected)
    assert torch.equal(whole(matrix), expected)
    every = np.arange(len(expected))[::-1].copy()
    assert torch.equal(matrix.gather(TokenIds.of(every, "cpu")), expected.flip(0))
    for size in (1, 2, 6):
        blocks = blocks_with_rows(iter(STORED.weight.split(size)), ids, rows)
        assert torch.equal(torch.cat(list(blocks)), expected)
    assert torch.equal(STORED.weight, torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))


def test_rows_begin_as_the_mean_of_the_tokens_that_the_text_was() -> None:
    found = initial_rows(STORED, [(2,), (0, 5, 5)], torch.device("cpu"))
    weight = STORED.weight
    torch.testing.assert_close(found, torch.stack([weight[2], (weight[0] + 2 * weight[5]) / 3]))


@pytest.mark.parametrize("ids", [(7,), (1, 7, 8)])
def test_a_tokenizer_with_more_tokens_than_rows_is_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(BaseModelError, match=r"embedding has 6 rows, fewer than the tokenizer has"):
        TokenRows(STORED, ids, torch.zeros(len(ids), 4))


@pytest.mark.parametrize("use_dora", [False, True])
def test_every_number_of_the_flat_buffers_is_one_view_s(tmp_path: Path, use_dora: bool) -> None:
    folder = write_checkpoint(tmp_path)
    _, lora = load_tiny(folder, Quantization("none"), use_dora=use_dora, token_ids=(3, 96))
    numbers = torch.arange(float(lora.masters.numel()))
    views = lora.views(numbers)
    found = torch.cat([part.flatten() for parts in views.values() for part in parts])
    assert torch.equal(found.sort().values, numbers)
    rows = torch.cat([part.flatten() for part in lora.token_rows(numbers).values()])
    assert rows.max() < lora.first_b <= min(parts[1].min() for parts in views.values() if len(parts) > 1)
