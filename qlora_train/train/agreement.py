"""Before the first step, the ranks of a run compare what they train: its recipe, data, base and start.

Each machine reads its own files, and gradients are summed without a look at what they are from: a stale copy
of the data on one machine would train on it in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import xxhash

from qlora_train.errors import UserError
from qlora_train.files.shards import tensor_bytes
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.train.run_folder import unmoved
from qlora_train.train.setup import Prepared
from qlora_train.weights.ranks import Ranks

_OF_A_MACHINE = {"base", "revision", "output_dir", "vram"}
"""Keys of the recipe that may differ between machines."""


def require_agreement(ranks: Ranks, facts_here: Callable[[], Mapping[str, Any]]) -> None:
    """Wait for all ranks; raise `UserError` on each if a fact differs on any. facts_here: returns JSON values
    by what they are called in the message; not called for a single rank."""
    if ranks.number == 1:
        return
    facts = facts_here()
    told = ranks.gather(facts)
    differing = {
        rank: names
        for rank, other in enumerate(told)
        if (names := [n for n in facts if other[n] != told[0][n]])
    }
    if differing:
        found = "; ".join(f"process {rank}: {', '.join(names)}" for rank, names in differing.items())
        raise UserError(
            "the processes of this launch would not train the same. What differs from process 0, by process: "
            f"{found}. Give every machine the same recipe and the same files, or a folder that they share."
        )


def facts_of(prepared: Prepared, step: int) -> dict[str, Any]:
    """What ranks compare. step: the last one that was trained; 0: none."""
    model, held_out = prepared.model, prepared.eval_data
    sections = prepared.recipe.model_dump(mode="json")
    return {
        **{
            f"{section}.{key}": unmoved(value)
            for section, values in sections.items()
            for key, value in values.items()
            if key not in _OF_A_MACHINE
        },
        "the training data": prepared.train_data.fingerprint(),
        "the evaluation data": None if held_out is None else held_out.fingerprint(),
        "the base model's quantized weights": model.decoder.fingerprint,
        "the checkpoint's step": step,
        "the LoRA parameters": _lora_hash(model.lora),
    }


def _lora_hash(lora: LoraParameters) -> str:
    """Hash of A, B and rows of tokens; DoRA's magnitudes are measured on each rank's device, and may round
    apart."""
    hashed = xxhash.xxh3_128()
    for tensors in lora.views(lora.masters.cpu()).values():
        for tensor in tensors[:2]:
            hashed.update(tensor_bytes(tensor))
    return hashed.hexdigest()
