"""The plan against the allocator of the simulated GPU, in whole runs with documents that fill their bins.

Attention goes document by document: scratch inside a kernel, which flash attention over all documents has,
does not exist there. fp32 is over the plan's bounds by the same reason (+5 to +13 %): the products' and the
attention's kernels of a CPU take none of what is counted for a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from tiny_runs import recipe_values, write_base, write_rows

from qlora_train.device.compute import ComputeDevice
from qlora_train.kernels.on_device import find_device
from qlora_train.recipe import Recipe
from qlora_train.train import run as run_module
from qlora_train.train import train

pytestmark = pytest.mark.filterwarnings("ignore:Triton does not run")
UNDER, OVER = 0.01, 0.03
LENGTH = 256
MEMORY: dict[str, dict[str, Any]] = {
    "keep": {"weights": "resident", "activations": "keep"},
    "recompute": {"weights": "resident", "activations": "recompute"},
    "offload": {"weights": "resident", "activations": "offload"},
    "ram, offload": {"weights": "ram", "activations": "offload"},
    "disk, recompute": {"weights": "disk", "activations": "recompute"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return write_base(tmp_path_factory.mktemp("base"), **sizes, **heads)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one bin each: its tokens, the end of the text among them."""
    rows = [{"text": chr(97 + i) * (LENGTH - 1)} for i in range(16)]
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


@pytest.fixture(autouse=True)
def by_document(monkeypatch: pytest.MonkeyPatch, simulated_gpu: SimulatedGpu) -> SimulatedGpu:
    simulated_gpu.settings.num_multiprocessors = 2

    def find(where: torch.device | None = None) -> ComputeDevice:
        return ComputeDevice(replace(find_device(where).description, varlen="none"))

    monkeypatch.setattr(run_module, "find_device", find)
    return simulated_gpu


def run(base: Path, train_file: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """plan.json of two steps."""
    values = recipe_values(base, train_file, out, training={"max_steps": 2})
    values["data"] |= {"sequence_length": LENGTH, "supervise": "all"}
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    train(Recipe.from_dict(values))
    plan: dict[str, Any] = json.loads((out / "plan.json").read_text())
    return plan


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MEMORY)
def test_bytes_of_a_step(base: Path, train_file: Path, tmp_path: Path, name: str, dtype: str) -> None:
    asked = {"model": {"compute_dtype": dtype}, "memory": MEMORY[name]}
    plan = run(base, train_file, tmp_path / "run", **asked)
    deviation = plan["step_vram_bytes"] / plan["measured_step_vram_bytes"] - 1
    print(f"{name} {dtype} {deviation:+.2%}")
    assert -UNDER < deviation < OVER, f"{deviation:+.1%}"
