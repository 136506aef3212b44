"""An adapter seen from inside: how large each module's update is, in how many directions, and in which.

For W + s B A with B [out, R] and A [R, in], B = Q_b R_b and A^T = Q_a R_a (QR) give the singular values of
the update as those of the small matrix s R_b R_a^T [R, R]; nothing of the size of W is made. The effective
rank is exp(H) of the singular values' distribution p_i = sigma_i / sum sigma (Roy and Vetterli 2007).

Amplification asks whether training strengthened what the base does anyway (Hu et al. 2021, arXiv:2106.09685,
section 7.3): ||dW||_F / ||U^T W V||_F with U, V the singular directions of the update. 1 means that the
update is as large as what W has in these directions; large values, that W had little there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlora_train.adapter.adapter_files import load_adapter
from qlora_train.files.shards import ShardReader


@dataclass(frozen=True)
class ModuleFacts:
    """The update of one module. singular_values: of s B A, descending. amplification: None where the base's
    weight was not read."""

    path: str
    singular_values: tuple[float, ...]
    amplification: float | None = None

    @property
    def norm(self) -> float:
        """The Frobenius norm."""
        return math.hypot(*self.singular_values)

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the singular values; 0 for an update of zero."""
        values = np.array(self.singular_values)
        shares = values[values > 0] / values.sum() if values.any() else values[:0]
        return float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0

    @property
    def layer(self) -> int | None:
        """The number of the layer in the path, as in `model.layers.7.mlp.up_proj`."""
        numbers = [int(part) for part in self.path.split(".") if part.isdecimal()]
        return numbers[0] if numbers else None

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


def adapter_facts(folder: Path, base_folder: Path | None = None) -> list[ModuleFacts]:
    """The facts of every module of an adapter folder, in the model's order. base_folder: whose weights are
    read for the amplification, those that it stores in 16 or 32 bits under the module's own name; None: none.
    Raises `BaseModelError` for a folder that holds no adapter."""
    if base_folder is None:
        return sorted(_facts(folder, None), key=_in_order)
    with ShardReader(base_folder) as reader:
        return sorted(_facts(folder, reader), key=_in_order)


def _facts(folder: Path, base: ShardReader | None) -> Iterator[ModuleFacts]:
    config, lora = load_adapter(folder)
    names = set(base.names()) if base is not None else set()
    adapted = {path: tensors for path, tensors in lora.items() if len(tensors) > 1}  # not tokens' rows
    for path, (a, b, *_) in adapted.items():
        q_b, r_b = np.linalg.qr(b.numpy().astype(np.float64))
        q_a, r_a = np.linalg.qr(a.numpy().T.astype(np.float64))
        left, values, right = np.linalg.svd(config.scaling_of(path) * r_b @ r_a.T)
        amplification = None
        if base is not None and f"{path}.weight" in names:
            weight = base.read(f"{path}.weight").double().numpy()
            seen = np.linalg.norm((q_b @ left).T @ weight @ (q_a @ right.T))
            amplification = float(np.linalg.norm(values) / seen) if seen else math.inf
        yield ModuleFacts(path, tuple(values.tolist()), amplification)


def _in_order(facts: ModuleFacts) -> list[tuple[int, str]]:
    """Paths with their numbers as numbers: layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in facts.path.split(".")]
