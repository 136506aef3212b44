"""From timed steps to figures, the same way for every contender.

    tokens/s     real tokens (padding is not work) of the timed steps / their seconds; of steps that are
                 all the same work the median counts, so that one disturbed step does not
    useful FLOPs 4 per token and parameter of the base's linears: 2 forward, 2 back (a frozen weight has no
                 gradient); of the head only at supervised positions. Recomputing is not useful work.
    compute      for everybody in what `compute_dtype: auto` takes: bfloat16 where the hardware multiplies it,
                 else float16 on a GPU and float32 on a CPU (but soup-cli, which chooses for itself)
    ceiling      a large matrix product in the compute dtype, timed in the same process right after the steps
    peak         before the ceiling is measured

The clock starts when the process does: what a user waits for until the first step includes every import.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.process import peaks
from qlora_train.device.compute import ComputeDevice
from qlora_train.device.compute_dtype import dtype_name, resolve_dtype
from qlora_train.kernels.on_device import find_device

READ_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Step:
    """One optimizer step. num_tokens: without padding. num_supervised: None where nobody counted."""

    seconds: float
    num_tokens: int
    num_supervised: int
    loss: float


def compute_device() -> ComputeDevice:
    """Everybody's."""
    return find_device()


def compute_dtype() -> torch.dtype:
    """Of everybody's computation."""
    return resolve_dtype("auto", compute_device().description)


def now() -> float:
    """A clock to time with, in seconds, after everything queued on the device is done."""
    compute_device().wait()
    return time.perf_counter()


def age_seconds() -> float:
    """Since this process was started."""
    return time.time() - psutil.Process().create_time()


def training_figures(
    steps: Sequence[Step],
    base: Path,
    *,
    num_warm_up: int,
    load_seconds: float,
    first_step_seconds: float,
) -> dict[str, Any]:
    """What is reported of a training run. load_seconds: until the first step could begin, imports not
    counted. first_step_seconds: from the start of the process to the end of the first step."""
    found: dict[str, Any] = dict(peaks())
    timed = steps[num_warm_up:]
    total_seconds = _undisturbed_seconds(timed)
    in_layers, in_head = linear_parameters(base)
    useful_flops = sum(4 * (in_layers * step.num_tokens + in_head * step.num_supervised) for step in timed)
    ceiling = matmul_flops_per_second()
    return found | {
        "tokens_per_second": sum(step.num_tokens for step in timed) / total_seconds,
        "step_seconds": total_seconds / len(timed),
        "step_seconds_each": [step.seconds for step in steps],
        "first_step_seconds": first_step_seconds,
        "load_seconds": load_seconds,
        "num_timed_steps": len(timed),
        "num_timed_tokens": sum(step.num_tokens for step in timed),
        "num_timed_supervised_tokens": sum(step.num_supervised for step in timed),
        "first_loss": _finite(steps[0].loss),
        "last_loss": _finite(steps[-1].loss),
        "useful_gflops_per_second": useful_flops / total_seconds / 1e9,
        "matmul_ceiling_gflops_per_second": ceiling / 1e9,
        "share_of_matmul_ceiling": useful_flops / total_seconds / ceiling,
        "compute_dtype": dtype_name(compute_dtype()),
        "num_threads": torch.get_num_threads(),
    }


def _undisturbed_seconds(timed: Sequence[Step]) -> float:
    """Of all timed steps together."""
    seconds = [step.seconds for step in timed]
    if len({step.num_tokens for step in timed}) == 1:
        return len(timed) * statistics.median(seconds)
    return sum(seconds)


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}: what is measured here does not train")
    return loss


def linear_parameters(base: Path) -> tuple[int, int]:
    """Parameters of the decoder layers' linears, and of the head, of a llama-shaped config.json."""
    config = json.loads((base / "config.json").read_text())
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_size = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * head_size * (heads + kv_heads)
    per_layer = attention + 3 * hidden * intermediate
    return config["num_hidden_layers"] * per_layer, config["vocab_size"] * hidden


def matmul_flops_per_second() -> float:
    """What a large product reaches now: not what an earlier process remembered."""
    from qlora_train.plan.measured_rates import rates_of

    with tempfile.TemporaryDirectory() as empty:
        return rates_of(compute_device(), compute_dtype(), Path(empty)).flops


def warm_page_cache(folder: Path) -> None:
    """Read weights through once, so that whoever is timed first does not pay for a cold disk."""
    buffer = bytearray(READ_BYTES)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                continue
