"""PiSSA: LoRA begins with the principal part of each weight, and what is left of the weight is frozen.

    W = U S V^T      A = sqrt(S_r / s) V_r^T      B = U_r sqrt(S_r / s)      frozen: R = W - s B A, quantized

(Meng et al. 2024, arXiv:2404.02948). R has no large singular values, so it loses less by quantization than W.
Neither s B A nor R depend on s: kept beside a quantized R are the factors of s = 1.

Other tools have W. For them, training has changed W by s (B A - B0 A0), where A0 and B0 are what it began
with: one LoRA of twice the rank, which is what the adapters of a run are written as.

    [B, -B0] [A; A0],   r' = 2 r,   alpha' = 2 alpha  (after rsLoRA: 2 sqrt(r) alpha, without it)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.adapter_files import LoraPairs
from qlora_train.adapter.lora_targets import choose_targets
from qlora_train.errors import BaseModelError
from qlora_train.recipe import LoraSection

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Linear -> A [rank, in] and B [out, rank] of its principal part, with s = 1."""


def is_pissa(lora: LoraSection | None) -> bool:
    return lora is not None and lora.init_lora_weights is not True


def principal_ranks(lora: LoraSection | None, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Linear -> rank of the part that is trained instead of frozen; empty without PiSSA.

    shapes: [out, in] of all linears in decoder layers. Raises `BaseModelError` for a linear that has fewer
    singular values."""
    if lora is None or not is_pissa(lora):
        return {}
    ranks = {path: target.rank for path, target in choose_targets(lora, shapes).items()}
    if small := [path for path, rank in ranks.items() if rank > min(shapes[path])]:
        path = small[0]
        raise BaseModelError(
            f"lora.init_lora_weights: {path} is {list(shapes[path])}, so it has {min(shapes[path])} singular "
            f"values, fewer than its LoRA rank {ranks[path]}. Exclude it (lora.exclude_modules), or give it "
            "a smaller rank (lora.rank_pattern)."
        )
    return ranks


def num_iterations(lora: LoraSection) -> int | None:
    """The number of iterations of the decomposition; None: it is exact."""
    _, _, number = str(lora.init_lora_weights).partition("_niter_")
    return int(number) if number else None


def initial_values(config: AdapterConfig, factors: Factors) -> LoraPairs:
    """A0 and B0: the factors with the scaling of each linear."""
    return {path: _divided(pair, config.scaling_of(path)) for path, pair in factors.items()}


def as_adapter(factors: Factors) -> tuple[AdapterConfig, LoraPairs]:
    """An adapter that gives back the weights that the factors were taken out of."""
    ranks = {path: len(a) for path, (a, _) in factors.items()}
    return AdapterConfig("", rank=1, alpha=1, rank_pattern=ranks, alpha_pattern=ranks), dict(factors)


def as_plain_lora(
    config: AdapterConfig, trained: LoraPairs, factors: Factors
) -> tuple[AdapterConfig, LoraPairs]:
    """The LoRA of the original weights that does what training did; its tensors are on the CPU."""
    both: LoraPairs = {}
    for path, (a, b) in trained.items():
        a_0, b_0 = _divided(factors[path], config.scaling_of(path))
        both[path] = (torch.cat([a.cpu(), a_0]), torch.cat([b.cpu(), -b_0], dim=1))
    ranks = {path: config.rank_of(path) for path in trained}
    plain = replace(
        config,
        use_rslora=False,
        rank=2 * config.rank,
        alpha=_plain_alpha(config, config.alpha, config.rank),
        rank_pattern={path: 2 * rank for path, rank in ranks.items()},
        alpha_pattern={path: _plain_alpha(config, config.alpha_of(path), ranks[path]) for path in trained},
    )
    return plain, both


def as_trained(
    lora: LoraSection | None, adapter: tuple[AdapterConfig, LoraPairs]
) -> tuple[AdapterConfig, LoraPairs]:
    """The adapter of a run for the base that it was trained on: after PiSSA, what `as_plain_lora` was given.
    lora: the section of the run's recipe."""
    if not is_pissa(lora):
        return adapter
    config, both = adapter
    trained: LoraPairs = {}
    for path, (a, b) in both.items():
        rank = len(a) // 2
        trained[path] = (a[:rank], b[:, :rank].contiguous())
    halved = replace(
        config,
        rank=config.rank // 2,
        alpha=config.alpha / 2,
        rank_pattern={path: rank // 2 for path, rank in config.rank_pattern.items()},
        alpha_pattern={path: alpha / 2 for path, alpha in config.alpha_pattern.items()},
    )
    return halved, trained


def _divided(pair: tuple[Tensor, Tensor], scaling: float) -> tuple[Tensor, Tensor]:
    a, b = pair
    return a / math.sqrt(scaling), b / math.sqrt(scaling)


def _plain_alpha(config: AdapterConfig, alpha: float, rank: int) -> float:
    return 2 * alpha * (math.sqrt(rank) if config.use_rslora else 1)
