"""Rotary tables that depend on the longest sequence in a batch, and which sequences may share a batch then.

"longrope" (long-context Phi-3) has two tables, for sequences up to the original maximum and beyond; "dynamic"
has another table for every length beyond it. The library chooses one table for a whole batch by its largest
position, so a short sequence would be rotated differently beside a long one than alone, and a sequence that
grows past the original maximum would have keys of both tables in its cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PretrainedConfig

from qlora_train.errors import UnsupportedModelError


def original_length(config: PretrainedConfig) -> tuple[str, int | None]:
    """(rope type, number of tokens up to which the table is constant; None: for any length)."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = str(rope.get("rope_type", "default"))
    if rope_type not in ("longrope", "dynamic"):
        return rope_type, None
    return rope_type, int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)


def refuse_length_dependent_rope(config: PretrainedConfig, sequence_length: int) -> None:
    """Raise `UnsupportedModelError` if the table changes within `sequence_length` tokens: results for packed
    documents would differ from those for each document alone."""
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
    """Batches of prompt indices that use one table each, so every prompt is answered exactly as alone.

    Raises `UnsupportedModelError` for a prompt whose answer could reach another table."""
    rope_type, original = original_length(config)
    all_prompts = list(range(len(prompt_lengths)))
    if original is None:
        return [all_prompts]
    short = [b for b in all_prompts if prompt_lengths[b] + max_new_tokens <= original]
    long = [b for b in all_prompts if prompt_lengths[b] > original and rope_type == "longrope"]
    if crossing := sorted(set(all_prompts) - set(short) - set(long)):
        length = prompt_lengths[crossing[0]]
        remedy = (
            f"Ask for {original - length} new tokens or less" if length < original else "Shorten the prompt"
        )
        raise UnsupportedModelError(
            f"{config.model_type} with rope type {rope_type}: a prompt of {length} tokens and "
            f"{max_new_tokens} new ones pass {original}, where the rotary table changes and "
            f"cached keys would no longer fit. {remedy} (--max-new-tokens)."
        )
    return [batch for batch in (short, long) if batch]
