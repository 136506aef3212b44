"""Check that the base model's activations stay within fp16's range: before a run, and after a bad step.

Families trained in bf16 (Gemma 3) let activations grow past 65,504, where fp16 has only infinity. Loss
scaling does not help: it scales gradients, not activations. So a run in fp16 first takes its first
micro-batch through the layers, and ends at once, naming the layer, if a value overflows.
"""

from __future__ import annotations

import torch

from qlora_train.errors import UnsupportedModelError
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.packed_tokens import PackedTokens

NEAR_SHARE = 0.25  # of the range: logged, because training changes activations


@torch.no_grad()
def first_overflow(decoder: FrozenDecoder, tokens: PackedTokens) -> tuple[int | None, float]:
    """(index of the first layer whose output is not finite, or None; largest absolute value before it)."""
    x, arguments = decoder.embed_packed(tokens)
    largest = 0.0
    for i in decoder.layers_in_turn():
        x = decoder.run_layer(i, x, arguments[i])
        value = float(x.abs().amax())
        if not value < float("inf"):  # NaN too
            return i, largest
        largest = max(largest, value)
    return None, largest


def require_range(decoder: FrozenDecoder, tokens: PackedTokens) -> str | None:
    """A log line if activations come near the end of fp16's range; None if they do not, or the compute dtype
    is not fp16. Raises `UnsupportedModelError` if they leave the range."""
    if decoder.dtype != torch.float16:
        return None
    end = torch.finfo(torch.float16).max
    layer, largest = first_overflow(decoder, tokens)
    if layer is not None:
        raise UnsupportedModelError(
            f"model.compute_dtype float16: the output of decoder layer {layer} leaves its range (beyond "
            f"{end:,.0f}) before anything is trained: {decoder.config.model_type} was made for bfloat16. Use "
            "model.compute_dtype bfloat16, or float32 where the hardware has no bfloat16."
        )
    if largest < NEAR_SHARE * end:
        return None
    return (
        f"activations reach {largest:,.0f}, and float16 ends at {end:,.0f}: steps may overflow and be "
        "skipped; model.compute_dtype float32 would not"
    )
