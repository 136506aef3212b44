"""The plain training loop that peers without a loop of their own are run in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from benchmarks.pieces.figures import Step, age_seconds, compute_device, now, training_figures
from benchmarks.pieces.peer import read_texts

OPTIMIZERS = {
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    "adamw_8bit": bnb.optim.AdamW8bit,
    "adamw": torch.optim.AdamW,
}
MAX_GRAD_NORM = 1.0
LEARNING_RATE = 2e-4


def train_plainly(
    model: nn.Module,
    arguments: dict[str, Any],
    *,
    started: float,
    autocast: AbstractContextManager[Any],
) -> dict[str, Any]:
    """Forward, backward, clip, step. Rows are all equally long, so a batch has no padding.

    arguments: inputs, row_tokens, rows_per_micro_batch, accumulation, optimizer, num_warm_up, num_timed.
    started: when loading began (`figures.now`). autocast: around the forward pass."""
    base, num_tokens = Path(arguments["inputs"]["base"]), arguments["row_tokens"]
    rows = iter(read_texts(str(base), Path(arguments["inputs"]["rows"]), num_tokens))
    lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = OPTIMIZERS[arguments["optimizer"]](lora, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    load_seconds = now() - started
    if compute_device().is_accelerator:
        compute_device().reset_peaks()
    accumulation, num_rows = arguments["accumulation"], arguments["rows_per_micro_batch"]
    num_step_rows = accumulation * num_rows
    steps: list[Step] = []
    first_step_seconds = 0.0
    for _ in range(arguments["num_warm_up"] + arguments["num_timed"]):
        step_started, loss_sum = now(), torch.zeros((), device=compute_device().torch)
        for _ in range(accumulation):
            batch = torch.stack(list(islice(rows, num_rows))).to(compute_device().torch)
            with autocast:
                loss = model(input_ids=batch, labels=batch).loss / accumulation
            loss.backward()
            loss_sum += loss.detach()
        torch.nn.utils.clip_grad_norm_(lora, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        seconds, loss_value = now() - step_started, float(loss_sum)
        supervised = num_step_rows * (num_tokens - 1)
        steps.append(Step(seconds, num_step_rows * num_tokens, supervised, loss_value))
        first_step_seconds = first_step_seconds or age_seconds()
    return training_figures(
        steps,
        base,
        num_warm_up=arguments["num_warm_up"],
        load_seconds=load_seconds,
        first_step_seconds=first_step_seconds,
    )
