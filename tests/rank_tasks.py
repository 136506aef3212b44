"""Several ranks on one machine for tests: processes of their own that meet through a file, and what they do.

`in_ranks(task, ...)` runs `task(ranks, ...)` in each and returns what each returned, in order. They begin
with everything imported (warm_processes), so that a launch takes no longer than half a second.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from tiny_runs import recipe_values
from warm_processes import warm_context

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.device.description import CPU, planned_gpu
from qlora_train.errors import QloraTrainError, UserError
from qlora_train.plan import machine_plan
from qlora_train.plan.placement import placed
from qlora_train.plan.time_model import Rates
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import Recipe
from qlora_train.weights.execution_plan import ActivationPolicy, Placement, everything_resident
from qlora_train.weights.load import load_base
from qlora_train.weights.ranks import Ranks, find_ranks

UNQUANTIZED = Quantization("none", False)
TIMEOUT_SECONDS = 600


def in_ranks(task: Callable[..., Any], meeting_place: Path, *arguments: Any, number: int = 2) -> list[Any]:
    """meeting_place: a file that is not there yet. What a task raises is raised here."""
    with warm_context() as context, ProcessPoolExecutor(number, context) as pool:
        running = [pool.submit(_join, task, meeting_place, i, number, arguments) for i in range(number)]
        return [future.result(TIMEOUT_SECONDS) for future in running]


def _join(task: Callable[..., Any], meeting_place: Path, index: int, number: int, arguments: Any) -> Any:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting_place}", rank=index, world_size=number
    )
    result = task(find_ranks(torch.device("cpu")), *arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return result


def agree(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What the ranks say to each other, and in which order leaders and others go."""
    order = folder / "order"
    with ranks.leaders_first(), order.open("a") as file:
        file.write(f"{ranks.index}\n")
    return {
        "ranks": (ranks.index, ranks.number, ranks.here, ranks.shares_memory, ranks.leads),
        "gathered": ranks.gather({"rank": ranks.index, "text": "x" * 10 * ranks.index}),
        "leader": ranks.of_leader(f"of rank {ranks.index}"),
    }


def end_early(ranks: Ranks) -> str:
    """Rank 1 goes; what does rank 0, which waits for it, hear?"""
    if ranks.index == 1:
        torch.distributed.destroy_process_group()
        return ""
    try:
        ranks.wait()
    except QloraTrainError as error:
        return str(error)
    return "nothing"


def load_in_ram(ranks: Ranks, base: Path, cache: Path | None, *, shares: bool) -> dict[str, Any]:
    """Load with everything in RAM; bytes of this process by kind, and what the weights are."""
    if not shares:
        ranks = Ranks(ranks.index, ranks.number, ranks.here, group=ranks.group)
    num_layers = 4
    plan = placed(
        everything_resident(num_layers, activation=ActivationPolicy.RECOMPUTE),
        num_layers,
        place=Placement.RAM,
        is_tied=False,
    )
    said: list[str] = []
    ranks.wait()
    before = _proportional_bytes()
    decoder = load_base(
        base, UNQUANTIZED, torch.float32, THE_CPU, plan=plan, cache=cache, ranks=ranks, log=said.append
    )
    sums = []
    decoder.weights.set_schedule(range(num_layers))
    for layer in range(num_layers):
        with decoder.weights.layer_on_device(layer):
            quantized = decoder.weights.quantized.values()
            sums += [float(t.double().abs().sum()) for weight in quantized for t in weight.tensors.values()]
    ranks.wait()  # a page counts for each by the number of those that have touched it
    after = _proportional_bytes()
    ranks.wait()
    fingerprint = decoder.fingerprint
    decoder.close()
    return {
        "grown": {kind: after[kind] - before[kind] for kind in after},
        "sums": sums,
        "fingerprint": fingerprint,
        "said": said,
    }


def plan(ranks: Ranks, base: Path, ram_bytes: list[int], copy_rates: list[float]) -> dict[str, Any]:
    """The plan of a run where each rank sees other free RAM and measures another rate."""
    psutil.virtual_memory = lambda: SimpleNamespace(available=ram_bytes[ranks.index])  # a process of our own
    rates = Rates(
        flops=1e11,
        attention=1e11,
        long_attention=1e11,
        elementwise=1e10,
        expert_product_seconds=1e-4,
        memory=1e10,
        copy=copy_rates[ranks.index],
        disk=1e9,
        source="for tests",
    )
    machine_plan.rates_of = lambda device, dtype, cache, num_ranks: rates
    recipe = Recipe.from_dict(recipe_values(base, base / "rows.jsonl", base / "run"))
    made = machine_plan.plan_here(recipe, base, torch.float32, THE_CPU, lambda size: size, ranks)
    return made.to_dict()


def describe(ranks: Ranks, devices: list[str]) -> dict[str, Any]:
    """What all devices can do, where they are those named."""
    own = devices[ranks.index]
    described = CPU if own == "cpu" else replace(planned_gpu(own, None), index=ranks.index)
    try:
        return asdict(machine_plan.device_of_all(ComputeDevice(described), ranks))
    except UserError as error:
        return {"refused": str(error)}


def _proportional_bytes() -> dict[str, int]:
    """Of this process, pages that several map divided among them (PSS).

    What malloc keeps of freed memory goes back first: it would hold some of what comes next, unseen.
    """
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    pairs = (line.split(":") for line in lines)
    return {k: int(v.split()[0]) * 1024 for k, v in pairs if k in ("Pss_Anon", "Pss_Shmem")}
