"""The lines that `train` prints before the first step: what is about to be trained, and how."""

from __future__ import annotations

from qlora_train.adapter.lora_targets import coverage
from qlora_train.data.statistics import length_line, lengths_of, steps_advice
from qlora_train.plan.report import residency_lines
from qlora_train.plan.words import duration, gib, positions_line
from qlora_train.train.setup import Prepared
from qlora_train.walk.optimizer import paging_lines


def introduction(prepared: Prepared, num_steps: int, first: int, *, resume: bool) -> list[str]:
    """The run in a few lines. first: the step that it goes on after; 0: it begins."""
    recipe, decoder, plan = prepared.recipe, prepared.model.decoder, prepared.model.plan
    lines = []
    if resume and not first:
        lines.append(f"{recipe.training.output_dir} holds no checkpoint: training starts at the beginning")
    lines.append(
        f"base {recipe.model.base} ({decoder.config.model_type}, {len(decoder.layers)} layers, "
        f"{recipe.model.quantization}), "
        f"{recipe.model.compute_dtype} on {decoder.device.torch}"
    )
    lines += [*_adapter_lines(prepared), *_data_lines(prepared)]
    lines += residency_lines(prepared.model.execution)
    lines += paging_lines(recipe.training.optimizer, decoder.device.description)
    lines.append(
        f"planned: {gib(plan.step_vram_bytes)} of tensors on the device at the peak of a step, "
        f"{duration(plan.step_seconds)} a step, "
        f"{duration(planned_seconds(prepared, num_steps))} for all steps and evaluations"
    )
    going_on = f", going on after step {first}" if first else ""
    lines.append(f"{num_steps} optimizer steps of {_bins_of_a_step(prepared)}{going_on}")
    return lines + steps_advice(prepared.train_data, recipe.training)


def _adapter_lines(prepared: Prepared) -> list[str]:
    decoder, lora, adapter = prepared.model.decoder, prepared.model.lora, prepared.model.adapter
    num_tokens = len(adapter.config.token_ids)
    parts = [coverage(lora.ranks, decoder.linears, decoder.stacks)]
    if num_tokens:
        parts.append(f"rows of {num_tokens} tokens")
    lines = ["; ".join([*parts, f"{lora.masters.numel():,} trainable parameters"])]
    if adapter.kept:
        lines.append(
            f"the LoRA parameters on {', '.join(adapter.kept)} are applied and kept as they are, not trained"
        )
    return lines + _peft_lines(prepared)


def _data_lines(prepared: Prepared) -> list[str]:
    train, evaluation = prepared.train_data, prepared.eval_data
    lines = [*train.report.lines(), length_line(lengths_of(train))]
    if evaluation is not None:
        lines += [f"evaluation: {line}" for line in evaluation.report.lines()]
    most = prepared.model.decoder.config.max_position_embeddings
    return lines + positions_line(prepared.recipe.data.sequence_length, most)


def _peft_lines(prepared: Prepared) -> list[str]:
    """What PEFT makes of an adapter with projections beside a mixture of experts (shared experts, dense
    layers): it takes their names for the experts', and leaves them out without a word (seen with 0.21)."""
    names = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
    decoder, trained = prepared.model.decoder, prepared.model.lora.names
    beside = [path for path in trained if path in decoder.linears and path.rpartition(".")[2] in names]
    if not beside or not any(decoder.experts):
        return []
    return [
        f"peft may take {beside[0]} and others of its name for experts and leave them out: use this adapter "
        "through `export --to merged`, or train attention alone (lora.target_modules)"
    ]


def planned_seconds(prepared: Prepared, num_steps: int) -> float:
    """Predicted seconds of all steps and evaluations."""
    plan, every, data = prepared.model.plan, prepared.recipe.training.eval_every, prepared.eval_data
    if data is None:
        return num_steps * plan.step_seconds
    num_evaluations = 2 + ((num_steps - 1) // every if every else 0)
    tokens = num_evaluations * data.num_bins * data.sequence_length
    return num_steps * plan.step_seconds + tokens / 1e6 * plan.evaluation_seconds_per_million_tokens


def _bins_of_a_step(prepared: Prepared) -> str:
    """The bins of a step, and their split into processes and micro-batches, as text."""
    split, number = prepared.model.plan.workload.split, prepared.accelerator.num_processes
    parts = [
        f"{number} process" + ("es" if number > 1 else ""),
        f"{split.num_micro_batches} x {split.micro_batch_size} in each",
    ]
    num_bins = prepared.recipe.training.bins_per_step()
    return f"{num_bins} bin{'s' if num_bins > 1 else ''} ({', '.join(parts)})"
