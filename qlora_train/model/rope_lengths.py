"""Rotary tables that change with the longest sequence, and who may share a batch then.

"longrope" (long-context Phi-3) has two tables, for sequences up to the original maximum and beyond; "dynamic"
makes another for every length beyond. The library chooses one for a whole batch by its largest position, so a
short sequence beside a long one is rotated otherwise than alone, and one that grows past the original maximum
has keys of both tables in its cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from qlora_train.errors import UnsupportedModelError


def original_length(config: PretrainedConfig) -> tuple[str, int | None]:
    """(rope type, tokens up to which the table is one and the same; None: always)."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = str(rope.get("rope_type", "default"))
    if rope_type not in ("longrope", "dynamic"):
        return rope_type, None
    return rope_type, int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def refuse_length_dependent_rope(config: PretrainedConfig, sequence_length: int) -> None:
    """Refuse to train where sequence_length would make the table change: packed documents would not equal the
    documents alone."""
    rope_type, original = original_length(config)
    if original is not None and sequence_length > original:
        raise UnsupportedModelError(
            f"{config.model_type} with rope type {rope_type}: beyond {original} tokens the rotary table "
            "depends on the longest document of a row, so packed documents would not equal the documents "
            f"alone. Set data.sequence_length to {original} or less."
        )


def batches_by_table(
    config: PretrainedConfig, prompt_lengths: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """Prompts that may run together, by their numbers: each is then answered exactly as alone.

    Raises `UnsupportedModelError` for a prompt whose answer could change tables."""
    rope_type, original = original_length(config)
    everybody = list(range(len(prompt_lengths)))
    if original is None:
        return [everybody]
    short = [b for b in everybody if prompt_lengths[b] + max_new_tokens <= original]
    long = [b for b in everybody if prompt_lengths[b] > original and rope_type == "longrope"]
    if crossing := sorted(set(everybody) - set(short) - set(long)):
        length = prompt_lengths[crossing[0]]
        way_out = (
            f"Ask for {original - length} new tokens or less" if length < original else "Shorten the prompt"
        )
        raise UnsupportedModelError(
            f"{config.model_type} with rope type {rope_type}: a prompt of {length} tokens and "
            f"{max_new_tokens} new ones pass {original}, where the rotary table changes and "
            f"cached keys would no longer fit. {way_out} (--max-new-tokens)."
        )
    return [batch for batch in (short, long) if batch]
