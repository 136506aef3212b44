"""Does the base stay inside fp16's range? Asked before a run begins, and of a step that went bad.

Families trained in bf16 (Gemma 3) let activations grow past 65,504, where fp16 has only infinity. Loss
scaling does not help: it scales gradients, not activations. So a run in fp16 first takes its first
micro-batch through the layers, and is refused by the layer's name if a value is lost, not after hours.
"""

from __future__ import annotations

import torch

from qlora_train.errors import UnsupportedModelError
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.packed_tokens import PackedTokens

NEAR_SHARE = 0.25  # of the range: said, as training moves activations


@torch.no_grad()
def first_overflow(decoder: FrozenDecoder, tokens: PackedTokens) -> tuple[int | None, float]:
    """(first layer whose output is not finite, None where all are; largest absolute value before it)."""
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
    """A line to say where activations come near the end of fp16's range; None: they do not, or it is not
    fp16. Raises `UnsupportedModelError` where they leave it."""
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
