"""The peer everyone knows: peft on a base quantized by bitsandbytes, a plain loop with gradient
checkpointing.

Two ways to write it. As peft's guide has it: `prepare_model_for_kbit_training` (fp32 norms, embedding and
head), then `get_peft_model`. And the fastest we found (LOG.md): nothing in fp32 but the factors, 16-bit
autocast around the forward pass. Gradients are clipped, the optimizer is bitsandbytes'.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model, prepare_model_for_kbit_training

from benchmarks.pieces.figures import compute_device, compute_dtype, now
from benchmarks.pieces.loop import train_plainly
from benchmarks.pieces.peer import load_quantized, lora_config
from benchmarks.process import answer


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: as for `train_plainly`, rank, and as_documented: which of the two ways."""
    started, as_documented = now(), arguments["as_documented"]
    model: Any = load_quantized(arguments["inputs"]["base"])
    checkpointing = {"use_reentrant": False}
    if as_documented:
        model = prepare_model_for_kbit_training(model, True, checkpointing)
    else:
        model.gradient_checkpointing_enable(checkpointing)
    model = get_peft_model(model, lora_config(arguments["rank"]))
    autocasts = compute_dtype().itemsize == 2 and not as_documented
    autocast = torch.autocast(compute_device().torch.type, compute_dtype(), enabled=autocasts)
    return train_plainly(model, arguments, started=started, autocast=autocast)


if __name__ == "__main__":
    answer(measure)
