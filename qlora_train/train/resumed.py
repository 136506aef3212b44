"""Checks of a resumed run: its data and base are unchanged, and its length may only grow."""

from __future__ import annotations

import math

from qlora_train.errors import RunFolderError
from qlora_train.recipe import Recipe
from qlora_train.train.checkpoint import TrainState, list_checkpoints
from qlora_train.train.run_folder import RunFolder
from qlora_train.train.schedule import learning_rate
from qlora_train.train.setup import Prepared


def refuse_shorter(folder: RunFolder, num_steps: int) -> None:
    """Raise `RunFolderError` where the run has trained more than `num_steps` steps already. Going back to an
    older checkpoint would be possible, but was not asked for."""
    steps = list_checkpoints(folder.checkpoints)
    if steps and steps[-1] > num_steps:
        raise RunFolderError(
            f"{folder.path}: has trained {steps[-1]} steps already, the recipe asks for {num_steps}. A run "
            "can be made longer, not shorter than it is."
        )


def require_same_inputs(folder: RunFolder, state: TrainState, prepared: Prepared) -> None:
    """Raise `RunFolderError` where the data or the base differ from those the run began with."""
    if state.data_fingerprint != prepared.train_data.fingerprint():
        raise RunFolderError(
            f"{folder.path}: the training data are not those the run began with "
            "(their tokens differ). Put data, tokenizer and chat template back, or start a new run."
        )
    if state.base_fingerprint != prepared.model.decoder.fingerprint:
        raise RunFolderError(
            f"{folder.path}: the base model's quantized weights are not those the run began "
            "with: the checkpoint's files differ, or another version of qlora_train quantized them. "
            "Put them back, or start a new run."
        )


def lengthened_line(begun: Recipe, prepared: Prepared, num_steps: int, next_step: int) -> str | None:
    """A line about the learning rate of a run whose number of steps has changed; None: it has not.

    begun: the recipe of the run so far. num_steps: the new number."""
    training = prepared.recipe.training
    bins_before = begun.training.num_bins(prepared.train_data.num_bins)
    before = math.ceil(bins_before / training.bins_per_step())
    if before == num_steps or next_step > num_steps:
        return None
    rate = learning_rate(
        next_step, num_steps, training.learning_rate, training.warmup_ratio, training.lr_schedule
    )
    line = (
        f"{num_steps} steps instead of {before}: the {training.lr_schedule} schedule now spans "
        f"all {num_steps} and goes on at step {next_step} with a learning rate of {rate:.3g}"
    )
    gap = before * training.bins_per_step() - bins_before
    if gap and next_step > before:
        line += f"; step {before} was not full, so {gap} bins of the epoch that begins now are left out"
    return line
