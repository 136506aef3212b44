"""unsloth in the same plain loop as peft: its kernels, its gradient checkpointing, the same factors."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.process import answer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: as for `train_plainly`, and rank."""
    from unsloth import FastLanguageModel  # patches transformers: before anything imports that

    from benchmarks.pieces.figures import compute_device, compute_dtype, now
    from benchmarks.pieces.loop import train_plainly

    started = now()
    model, _ = FastLanguageModel.from_pretrained(
        model_name=arguments["inputs"]["base"],
        max_seq_length=arguments["row_tokens"],
        dtype=compute_dtype(),
        load_in_4bit=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=arguments["rank"],
        lora_alpha=2 * arguments["rank"],
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth",
    )
    autocast = torch.autocast(compute_device().torch.type, compute_dtype())
    return train_plainly(model, arguments, started=started, autocast=autocast)


if __name__ == "__main__":
    answer(measure)
