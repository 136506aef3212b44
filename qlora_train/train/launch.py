"""Joins the processes of a launch, and refuses launches whose processes would not train together.

torchrun, `accelerate launch` and mpirun give the number of processes in the environment. If this process is
not joined with that many, each would silently train alone, into the same folder, or with a smaller batch than
asked for. Known cases: `accelerate launch --cpu --num_processes 2` starts one process only; mpirun on GPUs
starts processes that accelerate does not join. (accelerate joins torchrun's processes on a machine without an
accelerator only with `cpu=True`, which is passed.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from accelerate import Accelerator

from qlora_train.device.compute import find_accelerator
from qlora_train.errors import QloraTrainError, UserError

NUMBERS_OF_PROCESSES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables with the number of processes: of torchrun, Open MPI, MPICH and Intel MPI, MVAPICH. The first that
is set counts."""
_HOW = "start them with: torchrun --nproc-per-node N -m qlora_train train RECIPE"


def join_launch(trackers: list[str], project_dir: Path) -> Accelerator:
    """The `Accelerator` for device, processes and trackers: it prepares no model, casts and scales nothing.
    Raises `UserError` where the launch asked for another number of processes or accelerate refuses the
    machine, `QloraTrainError` where processes cannot be joined."""
    _refuse_lone_launch(os.environ)
    try:
        accelerator = Accelerator(
            cpu=find_accelerator() is None,
            mixed_precision="no",
            log_with=trackers or None,
            project_dir=str(project_dir),
        )
    except NotImplementedError as error:  # several cards of the RTX 40 series with an old driver
        raise UserError(f"accelerate refuses this machine: {error}") from error
    except (RuntimeError, ValueError) as error:
        if _asked_for(os.environ) is None:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise QloraTrainError(f"the processes of this launch cannot be joined: {reason}") from error
    _refuse_other_number(os.environ, accelerator.num_processes)
    return accelerator


def _asked_for(environment: Mapping[str, str]) -> str | None:
    """The variable with the number of processes that were started; None: there is none."""
    return next((name for name in NUMBERS_OF_PROCESSES if environment.get(name)), None)


def _refuse_other_number(environment: Mapping[str, str], num_processes: int) -> None:
    """Raise `UserError` where another number of processes was started than has joined."""
    name = _asked_for(environment)
    if name is not None and environment[name] != str(num_processes):
        raise UserError(
            f"{name}={environment[name]}, but the number of processes that train together is "
            f"{num_processes}: each would be a run of its own in the same folder. To train together, {_HOW}; "
            f"for runs of their own, unset {name} and give each its own training.output_dir"
        )


def _refuse_lone_launch(environment: Mapping[str, str]) -> None:
    """Raise `UserError` where `accelerate launch` was asked for several processes and started one: it sets
    MASTER_ADDR all the same."""
    is_accelerates = "ACCELERATE_DYNAMO_BACKEND" in environment and "MASTER_ADDR" in environment
    if is_accelerates and _asked_for(environment) is None:
        raise UserError(
            "accelerate launch was asked for several processes and started this one alone, as it does with "
            f"--cpu or without --multi_gpu: the batch would be smaller than meant. To train together, {_HOW}"
        )
