"""trl's SFTTrainer at its defaults (8 rows a batch, padded; checkpointing; loss on completions), on a
base quantized by bitsandbytes. Set is only what the case fixes for all: rank, optimizer, number of steps.

A step lasts from the end of the one before: the trainer collates the next batch before it says that a step
begins.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks.pieces.figures import (
    Step,
    age_seconds,
    compute_device,
    compute_dtype,
    now,
    training_figures,
)
from benchmarks.pieces.peer import load_quantized, lora_config
from benchmarks.process import answer


class _Clock(TrainerCallback):
    """Seconds and tokens of every step. `seen` is told about each batch."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.first_step_seconds = 0.0
        self.started = 0.0
        self.begun = 0.0
        self._num_tokens = self._num_supervised = 0

    def seen(self, inputs: dict[str, torch.Tensor]) -> None:
        self._num_tokens += int(inputs["attention_mask"].sum())
        self._num_supervised += int((inputs["labels"][:, 1:] >= 0).sum())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.steps and not self.begun:
            self.begun = self.started = now()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        ended = now()
        step = Step(ended - self.started, self._num_tokens, self._num_supervised, float(logs["loss"]))
        self.steps.append(step)
        self.started, self._num_tokens, self._num_supervised = ended, 0, 0
        self.first_step_seconds = self.first_step_seconds or age_seconds()


class _Trainer(SFTTrainer):
    """Says which batch each step gets."""

    clock: _Clock

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.clock.seen(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


def _widen_factors(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: inputs, rank, optimizer, num_warm_up, num_timed, and trl: changes of SFTConfig."""
    started = now()
    base = arguments["inputs"]["base"]
    rows = Dataset.from_json(arguments["inputs"]["rows"])
    with tempfile.TemporaryDirectory(prefix="qlora-bench-trl-") as folder:
        config = SFTConfig(
            output_dir=folder,
            max_steps=arguments["num_warm_up"] + arguments["num_timed"],
            optim=arguments["optimizer"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=compute_dtype() is torch.bfloat16,  # its default, but where that is not multiplied
            use_cpu=not compute_device().is_accelerator,
            **arguments.get("trl", {}),
        )
        trainer = _Trainer(
            model=load_quantized(base),
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=lora_config(arguments["rank"]),
        )
        # With a 4-bit base trl makes the factors bfloat16, whatever bf16 says.
        if compute_dtype() is torch.float32:
            _widen_factors(trainer.model)
        trainer.clock = clock = _Clock()
        trainer.add_callback(clock)
        if compute_device().is_accelerator:
            compute_device().reset_peaks()
        trainer.train()
    return training_figures(
        clock.steps,
        Path(base),
        num_warm_up=arguments["num_warm_up"],
        load_seconds=clock.begun - started,
        first_step_seconds=clock.first_step_seconds,
    )


if __name__ == "__main__":
    answer(measure)
