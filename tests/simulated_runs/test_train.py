"""Whole training runs on a simulated GPU (tests/simulated_gpu), through the front door.

Each run is the CPU's, bit for bit, when the CPU is told to take the kernels that a GPU takes: so whatever is
copied, offloaded, streamed or recomputed on the way changes nothing. The simulator fails a test for accesses
without an order, and counts what makes the host wait.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from simulated_gpu.fixture import SimulatedGpu
from tiny_models import random_model, tiny_config
from tiny_runs import (
    adapter_bytes,
    byte_tokenizer,
    losses_of,
    metrics_of,
    recipe_values,
    reversal_rows,
    write_base,
    write_rows,
)

from qlora_train.device.compute import THE_CPU, ComputeDevice
from qlora_train.files.sealed_json import seal, unseal
from qlora_train.kernels.on_device import find_device
from qlora_train.recipe import Recipe
from qlora_train.train import run as run_module
from qlora_train.train import train

pytestmark = pytest.mark.filterwarnings("ignore:Triton does not run")
NUM_STEPS, NUM_LAYERS = 3, 4
MEMORY: dict[str, dict[str, Any]] = {
    "resident": {"weights": "resident", "activations": "keep"},
    "ram": {"weights": "ram", "activations": "keep"},
    "disk": {"weights": "disk", "activations": "keep"},
    "recompute": {"weights": "resident", "activations": "recompute"},
    "offload": {"weights": "resident", "activations": "offload"},
    "ram, offload": {"weights": "ram", "activations": "offload"},
    "disk, recompute": {"weights": "disk", "activations": "recompute"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", reversal_rows(120))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def recipe(base: Path, train_file: Path, out: Path, **sections: dict[str, Any]) -> Recipe:
    values = recipe_values(base, train_file, out, training={"max_steps": NUM_STEPS})
    values["data"]["eval"] = 0.1
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return Recipe.from_dict(values)


@pytest.fixture(scope="module")
def cpu_run(base: Path, train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes the run folder of a recipe on the CPU, with a GPU's kernels; each recipe once."""
    folder, made = tmp_path_factory.mktemp("cpu"), dict[str, Path]()

    def run(capability: tuple[int, int] = (8, 9), **sections: dict[str, Any]) -> Path:
        """capability: of the GPU whose kernels are taken."""
        cpu = ComputeDevice(replace(THE_CPU.description, capability=capability, blocks_documents=False))
        key = json.dumps([capability, sections], sort_keys=True)
        if key not in made:
            made[key] = folder / str(len(made))
            AcceleratorState._reset_state(reset_partial_state=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("ACCELERATE_USE_CPU", "true")
                patch.delenv("ACCELERATE_TORCH_DEVICE", raising=False)
                patch.setattr(run_module, "find_device", lambda where: cpu)
                train(recipe(base, train_file, made[key], **sections))
            AcceleratorState._reset_state(reset_partial_state=True)
        return made[key]

    return run


@pytest.fixture
def by_document(monkeypatch: pytest.MonkeyPatch, simulated_gpu: SimulatedGpu) -> SimulatedGpu:
    """The simulated GPU without attention over documents of any length, whose sums a CPU has in another
    order."""
    simulated_gpu.settings.num_multiprocessors = 2  # products that measure rates stay small

    def find(where: torch.device | None = None) -> ComputeDevice:
        return ComputeDevice(replace(find_device(where).description, varlen="none"))

    monkeypatch.setattr(run_module, "find_device", find)
    return simulated_gpu


def assert_same_run(ours: Path, theirs: Path) -> None:
    assert adapter_bytes(ours) == adapter_bytes(theirs)
    assert metrics_of(ours) == metrics_of(theirs)


def host_reads_while_training(gpu: SimulatedGpu) -> dict[str, int]:
    """file -> how often, of the files that a step passes."""
    found: dict[str, int] = {}
    for (_, place), number in gpu.host_reads.values.items():
        file = place.rpartition(":")[0].removeprefix("qlora_train/")
        found[file] = found.get(file, 0) + number
    at_start_and_end = {
        "adapter/adapter_files.py",
        "model/fused.py",
        "quant/quantize.py",
        "train/checkpoint.py",
    }
    at_start_and_end |= {"weights/quantized_cache.py", "kernels/varlen_attention.py"}
    return {file: number for file, number in found.items() if file not in at_start_and_end}


@pytest.mark.parametrize("name", MEMORY)
def test_wherever_things_wait(
    base: Path, train_file: Path, tmp_path: Path, cpu_run: Any, by_document: SimulatedGpu, name: str
) -> None:
    train(recipe(base, train_file, tmp_path / "run", memory=MEMORY[name]))
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["execution"]
    assert set(plan["weights"]) == {MEMORY[name]["weights"]}
    assert set(plan["activations"]) == {MEMORY[name]["activations"]}
    assert_same_run(tmp_path / "run", cpu_run())
    assert host_reads_while_training(by_document) == {"walk/step.py": NUM_STEPS, "train/loop.py": 2}


def test_samples_change_nothing(
    base: Path, train_file: Path, tmp_path: Path, cpu_run: Any, by_document: SimulatedGpu
) -> None:
    """Answers between steps, by the layers that stream through the same ring."""
    samples = {"prompts": ["abcdef:", "fade:"], "every": 1, "max_new_tokens": 4}
    training = {"max_steps": NUM_STEPS, "samples": samples}
    values = recipe_values(base, train_file, tmp_path / "run", training=training, data={"eval": 0.1})
    train(Recipe.from_dict(values | {"memory": MEMORY["ram, offload"]}))
    assert_same_run(tmp_path / "run", cpu_run())
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("experts", [None, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]])
def test_experts(
    base: Path,
    train_file: Path,
    tmp_path: Path,
    cpu_run: Any,
    by_document: SimulatedGpu,
    experts: list[str] | None,
) -> None:
    """The CPU's bits, and one read of the experts' row counts for each layer and micro-batch."""
    config = tiny_config("qwen3_moe", vocab_size=259)
    random_model(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    model = {"base": str(tmp_path / "base")}
    asked = {"model": model, "data": {"eval": None}, "lora": {"target_parameters": experts}}
    train(recipe(base, train_file, tmp_path / "run", memory=MEMORY["disk, recompute"], **asked))
    assert_same_run(tmp_path / "run", cpu_run(**asked))
    reads = host_reads_while_training(by_document)
    assert reads["model/frozen_experts.py"] == config.num_hidden_layers * 2 * NUM_STEPS


def test_layers_with_a_memory(
    base: Path, train_file: Path, tmp_path: Path, cpu_run: Any, by_document: SimulatedGpu
) -> None:
    """The CPU's bits, with short convolutions. (qwen3_5 and the Granite hybrid pass as well, in minutes:
    their mixers are thousands of small operations here.)"""
    random_model(tiny_config("lfm2", vocab_size=259)).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    asked = {"model": {"base": str(tmp_path / "base")}, "data": {"eval": None}}
    train(recipe(base, train_file, tmp_path / "run", memory=MEMORY["disk, recompute"], **asked))
    assert_same_run(tmp_path / "run", cpu_run(**asked))


@pytest.mark.parametrize("places", ["resident", "disk, recompute"])
def test_rows_of_added_tokens(
    base: Path, train_file: Path, tmp_path: Path, cpu_run: Any, by_document: SimulatedGpu, places: str
) -> None:
    """The CPU's bits, and nothing more that the host waits for."""
    asked = {"model": {"add_tokens": ["ab", "c"]}, "data": {"eval": 0.1}}
    train(recipe(base, train_file, tmp_path / "run", memory=MEMORY[places], **asked))
    assert_same_run(tmp_path / "run", cpu_run(**asked))
    assert host_reads_while_training(by_document) == {"walk/step.py": NUM_STEPS, "train/loop.py": 2}


def test_dropout_micro_batches_and_bits(
    base: Path, train_file: Path, tmp_path: Path, cpu_run: Any, by_document: SimulatedGpu
) -> None:
    training = {"gradient_accumulation_steps": 3, "optimizer": "adamw", "max_steps": 2}
    asked = {"lora": {"dropout": 0.1}, "training": training, "data": {"eval": None}}
    memory = {"weights": "ram", "activations": "offload"}
    train(recipe(base, train_file, tmp_path / "run", **asked, memory=memory))
    assert_same_run(tmp_path / "run", cpu_run(**asked))


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_other_formats(
    base: Path, train_file: Path, tmp_path: Path, cpu_run: Any, by_document: SimulatedGpu, quantization: str
) -> None:
    asked = {"model": {"quantization": quantization}}
    train(recipe(base, train_file, tmp_path / "run", **asked, memory=MEMORY["ram"]))
    assert_same_run(tmp_path / "run", cpu_run(**asked))


def test_a_run_that_is_cut_off_goes_on_to_the_same_bytes(
    base: Path, train_file: Path, tmp_path: Path, cpu_run: Any, by_document: SimulatedGpu
) -> None:
    run = tmp_path / "run"
    asked = recipe(base, train_file, run, training={"save_every": 1, "keep_checkpoints": 9})
    train(asked)
    for left in (run / "checkpoints" / f"step-{NUM_STEPS}", run / "adapter"):
        shutil.rmtree(left)
    train(asked, resume=True)
    assert adapter_bytes(run) == adapter_bytes(cpu_run())
    assert losses_of(run) == losses_of(cpu_run())


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_out_of_memory_in_the_middle_is_a_tighter_plan_and_the_same_bytes(
    base: Path,
    train_file: Path,
    tmp_path: Path,
    cpu_run: Any,
    by_document: SimulatedGpu,
    capsys: pytest.CaptureFixture[str],
    share: float,
) -> None:
    no_evaluation = {"data": {"eval": None}}
    train(recipe(base, train_file, tmp_path / "first", **no_evaluation))  # quantizes the base, measures rates
    before = by_document.num_allocations
    train(recipe(base, train_file, tmp_path / "whole", **no_evaluation))
    by_document.fail_allocation(int(share * (by_document.num_allocations - before)))
    train(recipe(base, train_file, tmp_path / "run", **no_evaluation))
    assert "out of memory; tried again with less" in capsys.readouterr().out
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(cpu_run(**no_evaluation))
    changes = json.loads((tmp_path / "run" / "plan.json").read_text())["changes"]
    assert len(changes) == 1 and "recompute" in changes[0]["execution"]["activations"]


@pytest.mark.parametrize("refusal", [{}, {"beyond_bytes": 33_000_000 + 2**20}], ids=str)
def test_pinning_that_is_refused_costs_time_not_bits(
    base: Path,
    train_file: Path,
    tmp_path: Path,
    cpu_run: Any,
    by_document: SimulatedGpu,
    capsys: pytest.CaptureFixture[str],
    refusal: dict[str, Any],
) -> None:
    """All of it, or some, beyond the 32 MiB that loading pins and a part of what the run does, whose plan
    goes by rates that are measured."""
    by_document.refuse_pinning(**refusal)
    memory = {"weights": "ram", "activations": "offload"}
    train(recipe(base, train_file, tmp_path / "run", memory=memory))
    assert capsys.readouterr().out.count("refused to pin memory") == 1
    assert_same_run(tmp_path / "run", cpu_run())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits(
    base: Path, train_file: Path, tmp_path: Path, cpu_run: Any, by_document: SimulatedGpu, dtype: str
) -> None:
    asked = {"model": {"compute_dtype": dtype}}
    train(recipe(base, train_file, tmp_path / "run", **asked, memory=MEMORY["ram, offload"]))
    assert_same_run(tmp_path / "run", cpu_run(**asked))


def test_attention_over_documents_of_any_length(
    base: Path, train_file: Path, tmp_path: Path, simulated_gpu: SimulatedGpu
) -> None:
    """Through torch's own function, down to the operators of flash attention."""
    asked = {"model": {"compute_dtype": "bfloat16"}}
    for name in ("resident", "ram, offload"):
        train(recipe(base, train_file, tmp_path / name, **asked, memory=MEMORY[name]))
    assert simulated_gpu.num_calls["aten::_flash_attention_backward"] >= 2 * NUM_STEPS * NUM_LAYERS
    assert_same_run(tmp_path / "resident", tmp_path / "ram, offload")
    assert host_reads_while_training(simulated_gpu) == {"walk/step.py": 2 * NUM_STEPS, "train/loop.py": 4}


def test_a_card_before_flash_and_bfloat16(
    base: Path, train_file: Path, tmp_path: Path, cpu_run: Any, simulated_gpu: SimulatedGpu
) -> None:
    """A T4: float16 by itself, documents one length class at a time, no flash anywhere; and it says so."""
    simulated_gpu.settings.capability = (7, 5)
    asked = {"model": {"compute_dtype": "auto"}}
    train(recipe(base, train_file, tmp_path / "run", **asked, memory=MEMORY["ram"]))
    assert not any("flash_attention" in name for name in simulated_gpu.num_calls if "for_cpu" not in name)
    assert "compute_dtype: float16" in (tmp_path / "run" / "recipe.yaml").read_text()
    target = json.loads((tmp_path / "run" / "plan.json").read_text())["target"]
    assert target["capability"] == [7, 5] and target["varlen"] == "none" and not target["has_bfloat16"]
    assert_same_run(tmp_path / "run", cpu_run((7, 5), model={"compute_dtype": "float16"}))


MIXES: dict[str, dict[str, Any]] = {
    "some of everything": {
        "weights": ["resident", "ram", "disk", "resident"],
        "activations": ["recompute", "offload", "keep", "offload"],
        "embedding": "ram",
        "head": "disk",
        "inputs": "ram",
        "num_slots": 2,
    },
    "in groups": {
        "weights": ["ram", "ram", "resident", "disk"],
        "activations": ["offload", "recompute", "offload", "recompute"],
        "inputs": "ram",
        "num_groups": 2,
        "num_slots": 3,
    },
}


@pytest.mark.parametrize("name", MIXES)
def test_any_mixture_of_places_and_policies(
    base: Path, train_file: Path, tmp_path: Path, cpu_run: Any, by_document: SimulatedGpu, name: str
) -> None:
    """A resume follows the plan of its run, here one that no planner would make for so small a model."""
    run = tmp_path / "run"
    asked = recipe(base, train_file, run, training={"save_every": 1, "keep_checkpoints": 9})
    train(asked)
    plan = unseal(run / "plan.json")
    plan["execution"] |= MIXES[name]
    (run / "plan.json").write_text(seal(plan))
    for left in (*(run / "checkpoints").glob("step-*"), run / "adapter"):
        shutil.rmtree(left)
    train(asked, resume=True)
    assert json.loads((run / "plan.json").read_text())["execution"] == plan["execution"]
    assert adapter_bytes(run) == adapter_bytes(cpu_run())
    assert losses_of(run) == losses_of(cpu_run())
