"""The dropout mask: a pure function of the token, with the statistics of independent coin flips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora_train.kernels.dropout import DropoutKeys, dropout, keep_mask

NUM_ROWS, LENGTH, NUM_FEATURES = 8, 64, 256


def keys(seed: int = 0, step: int = 1, rows: range = range(NUM_ROWS)) -> DropoutKeys:
    row_ids = torch.tensor(list(rows)).repeat_interleave(LENGTH)
    return DropoutKeys(seed, step, row_ids, torch.arange(LENGTH).repeat(len(rows)))


def mask(probability: float = 0.5, module: int = 0, **identity) -> Tensor:
    return keep_mask(keys(**identity), module, NUM_FEATURES, probability)


def test_the_mask_does_not_depend_on_the_split() -> None:
    whole = mask()
    parts = [mask(rows=range(3)), mask(rows=range(3, 4)), mask(rows=range(4, 8))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(mask(), whole)  # nor on how often it was asked for


def test_the_mask_does_not_depend_on_the_order() -> None:
    order = torch.randperm(NUM_ROWS * LENGTH, generator=torch.Generator().manual_seed(0))
    shuffled = DropoutKeys(0, 1, keys().rows[order], keys().offsets[order])
    assert torch.equal(keep_mask(shuffled, 0, NUM_FEATURES, 0.5), mask()[order])


def test_the_mask_ignores_the_global_random_state() -> None:
    torch.manual_seed(1)
    first = mask()
    torch.manual_seed(2)
    assert torch.equal(mask(), first)


@pytest.mark.parametrize("probability", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_the_keep_rate(probability: float) -> None:
    kept = mask(probability).double()
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.mean() - (1 - probability)) <= 4 * deviation
    for dim, size in ((0, len(kept)), (1, NUM_FEATURES)):  # no token and no feature is favoured
        spread = (probability * (1 - probability) / size) ** 0.5
        assert (kept.mean(dim) - (1 - probability)).abs().max() <= 5.5 * spread


VARIATIONS = {
    "seed": {"seed": 1},
    "huge seed": {"seed": 2**63 + 5},
    "step": {"step": 2},
    "module": {"module": 1},
    "rows": {"rows": range(NUM_ROWS, 2 * NUM_ROWS)},
    "an empty bin": {"rows": range(-1, NUM_ROWS - 1)},
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_other_identities_give_independent_masks(variation: str) -> None:
    agree = (mask() == mask(**VARIATIONS[variation])).double()
    assert abs(agree.mean() - 0.5) <= 4 * 0.5 / agree.numel() ** 0.5


def test_tokens_and_features_are_independent_of_their_neighbours() -> None:
    kept = mask().double() * 2 - 1
    for shift in (1, 2, LENGTH):
        assert abs((kept[shift:] * kept[:-shift]).mean()) <= 4 / kept[shift:].numel() ** 0.5
        assert abs((kept[:, shift:] * kept[:, :-shift]).mean()) <= 4 / kept[:, shift:].numel() ** 0.5
    # mask = f(token ^ feature): the XOR of a 2 x 2 block of bits must be a coin flip too
    block = kept[1:, 1:] * kept[:-1, 1:] * kept[1:, :-1] * kept[:-1, :-1]
    assert abs(block.mean()) <= 4 / block.numel() ** 0.5


def test_a_higher_probability_drops_a_superset() -> None:
    assert not (mask(0.4) & ~mask(0.1)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropout_scales_what_it_keeps(dtype: torch.dtype) -> None:
    x = torch.randn(1, NUM_ROWS * LENGTH, NUM_FEATURES, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = mask(0.25, module=3)
    y = dropout(x, keys(), 3, 0.25)
    assert y.dtype == dtype and y.shape == x.shape
    assert y[0][~kept].count_nonzero() == 0
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(y[0][kept], (x[0][kept].float() / 0.75).to(dtype), rtol=tolerance, atol=0)


def test_the_gradient_passes_through_the_same_mask() -> None:
    x = torch.randn(NUM_ROWS * LENGTH, NUM_FEATURES, requires_grad=True)
    dropout(x, keys(), 0, 0.25).sum().backward()
    torch.testing.assert_close(x.grad, mask(0.25).float() / 0.75)


def test_the_expectation_is_the_input() -> None:
    total = torch.zeros(NUM_ROWS * LENGTH, NUM_FEATURES)
    for step in range(200):
        total += dropout(torch.ones_like(total), keys(step=step), 0, 0.1)
    assert (total / 200 - 1).abs().mean() <= 1.2 * (0.1 / 0.9 / 200) ** 0.5
