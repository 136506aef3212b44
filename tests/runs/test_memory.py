"""Whole runs by every plan: the same adapter, what plan.json says, what is refused before loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_models import answers_of, loaded_run
from tiny_runs import adapter_bytes, metrics_of, recipe_values, reversal_rows, write_base, write_rows
from torch import Tensor

from qlora_train.cli import main
from qlora_train.data.building import build_dataset
from qlora_train.data.tokenizer import load_tokenizer
from qlora_train.errors import OutOfMemory, UserError
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.recipe import Recipe, load_recipe
from qlora_train.train import train
from qlora_train.walk.step import StepRunner
from qlora_train.weights.cache_key import cache_root
from qlora_train.weights.quantized_cache import LAYERS_FILE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", reversal_rows(200))


def recipe(
    base: Path, train_file: Path, out: Path, memory: dict[str, Any] | None = None, **training: Any
) -> Recipe:
    values = recipe_values(base, train_file, out, training={"max_steps": 6} | training)
    values["lora"]["dropout"] = 0.1
    return Recipe.from_dict(values | {"memory": memory or {}})


MEMORY: dict[str, dict[str, Any]] = {
    "ram, recompute": {"weights": "ram", "activations": "recompute"},
    "disk, keep": {"weights": "disk", "activations": "keep"},
    "disk, offload": {"weights": "disk", "activations": "offload"},
    "resident, recompute": {"weights": "resident", "activations": "recompute"},
}


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_adapters_have_the_same_bytes(base: Path, train_file: Path, tmp_path: Path, kernels: str) -> None:
    """From the second step on both factors have gradients, and optimizer state."""
    train(recipe(base, train_file, tmp_path / "auto", kernels=kernels))
    plan = json.loads((tmp_path / "auto" / "plan.json").read_text())
    assert set(plan["weights"]) == {"resident"} and set(plan["activations"]) == {"keep"}
    for name, memory in MEMORY.items():
        out = tmp_path / name
        train(recipe(base, train_file, out, memory, kernels=kernels))
        other = json.loads((out / "plan.json").read_text())["execution"]
        assert other["num_groups"] == plan["execution"]["num_groups"]
        assert {memory["weights"]} == set(other["weights"])
        assert {memory["activations"]} == set(other["activations"])
        assert adapter_bytes(out) == adapter_bytes(tmp_path / "auto"), name


def test_plan_json_says_what_was_planned_and_measured(base: Path, train_file: Path, tmp_path: Path) -> None:
    asked = recipe(base, train_file, tmp_path / "run", max_steps=3, micro_batch_size=4)
    train(asked)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["fits"] and plan["changes"] == []
    assert plan["peak_vram_bytes"] >= plan["step_vram_bytes"] > 0 and plan["peak_ram_bytes"] > 0
    assert plan["step_seconds"] > 0 and len(plan["rows"]) > 10
    assert abs(plan["measured_step_vram_bytes"] / plan["step_vram_bytes"] - 1) < 0.15  # tiny: odds and ends
    assert [row["plan"] for row in metrics_of(tmp_path / "run")] == [0, 0, 0]
    data, _ = build_dataset(asked.data, load_tokenizer(str(base)), seed=asked.training.seed)
    resolved = load_recipe(tmp_path / "run").training
    size, starts = 4, range(0, resolved.num_bins(data.num_bins), 4)
    assert (plan["micro_batch_size"], resolved.batch_size) == (4, 8)
    numbers = [len(data.micro_batch(range(i, i + size)).cu_seqlens) - 1 for i in starts]
    assert max(numbers) > size, "else the plan knows without the data"
    assert plan["most_documents"] == max(numbers)


def test_a_budget_below_the_floor_is_refused_with_the_floor(
    base: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"at least .* are needed, the budget is .*\n.*the floor is made of"):
        train(recipe(base, train_file, out, {"vram": "1MiB"}))
    assert not out.exists()


def test_too_little_ram_for_the_source_is_refused_before_loading(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    import psutil

    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20, total=2**34, percent=99.0)
    )
    with pytest.raises(UserError, match="RAM"):
        train(recipe(base, train_file, tmp_path / "run", {"weights": "ram"}))
    assert not (tmp_path / "run").exists()


def test_a_damaged_cache_is_made_again_and_says_so(
    base: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(base, train_file, tmp_path / "first", {"weights": "disk"}, max_steps=2))
    for file in cache_root().glob(f"*/{LAYERS_FILE}"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    capsys.readouterr()
    train(recipe(base, train_file, tmp_path / "second", {"weights": "disk"}, max_steps=2))
    assert capsys.readouterr().out.count("the quantized cache is damaged") == 1
    assert adapter_bytes(tmp_path / "first") == adapter_bytes(tmp_path / "second")


def test_no_cache_leaves_nothing(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    values = recipe_values(base, train_file, tmp_path / "run", training={"max_steps": 2})
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(values | {"memory": {"weights": "disk"}}))
    assert main(["train", str(file), "--no-cache"]) == 0
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    train(recipe(base, train_file, tmp_path / "cached", {"weights": "disk"}, max_steps=2))
    assert any(path.is_dir() for path in (tmp_path / "cache").iterdir())


class Shortage:
    """A layer runs out of memory in this step until micro-batches pass in more than one group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.active = False
        run_layer, run = FrozenDecoder.run_layer, StepRunner.run
        shortage = self

        def run_step(self: StepRunner, step: int, *args: Any) -> Any:
            shortage.active = step == 3 and self.walk.execution.num_groups == 1
            shortage.walk = self.walk
            return run(self, step, *args)

        def run_short(self: FrozenDecoder, index: int, x: Tensor, arguments: Any) -> Tensor:
            if shortage.active and index == 2:
                if shortage.walk.execution.num_groups == 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                shortage.active = False
            return run_layer(self, index, x, arguments)

        monkeypatch.setattr(StepRunner, "run", run_step)
        monkeypatch.setattr(FrozenDecoder, "run_layer", run_short)


def test_a_resume_makes_the_same_changes_at_the_same_step(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Straight: step 3 runs out of memory, tightened plans follow. Stopped after step 4 with a checkpoint of
    step 2: the resume must take step 3 by the tighter plan at once."""
    with monkeypatch.context() as patch:
        Shortage(patch)
        train(recipe(base, train_file, tmp_path / "straight", max_steps=6))
    plan = json.loads((tmp_path / "straight" / "plan.json").read_text())
    assert plan["changes"] and all(change["from_step"] == 3 for change in plan["changes"])
    assert plan["changes"][-1]["execution"]["num_groups"] == 2
    numbers = [row["plan"] for row in metrics_of(tmp_path / "straight")]
    assert numbers == [0, 0] + [len(plan["changes"])] * 4

    stopped = recipe(base, train_file, tmp_path / "stopped", max_steps=6, save_every=2)
    with monkeypatch.context() as patch:
        Shortage(patch)
        from qlora_train.train.loop import TrainLoop

        one_step = TrainLoop._one_step

        def die(self: TrainLoop, step: int) -> Any:
            if step == 4:
                raise KeyboardInterrupt
            return one_step(self, step)

        patch.setattr(TrainLoop, "_one_step", die)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    train(stopped, resume=True)  # nothing runs out of memory now
    assert adapter_bytes(tmp_path / "stopped") == adapter_bytes(tmp_path / "straight")
    assert metrics_of(tmp_path / "stopped") == metrics_of(tmp_path / "straight")


def test_generate_streams_within_the_runs_plan(
    base: Path, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All prompts in one batch; per token every layer is fetched at most once."""
    from qlora_train.generate.sampling import Sampling
    from qlora_train.weights.streaming import StreamedWeights

    prompts, num_tokens = ["abc:", "fedcba:"], 6
    resident, streamed = recipe(base, train_file, tmp_path / "a"), None
    train(resident)
    streamed = recipe(base, train_file, tmp_path / "a", {"weights": "disk"})
    answers = []
    for wanted in (resident, streamed):
        model = loaded_run(tmp_path / "a", wanted)
        answers.append(answers_of(model, prompts, Sampling(num_tokens)))
    assert answers[0] == answers[1]
    assert isinstance(model.decoder.weights, StreamedWeights)
    ring, num_layers, num_tiles = model.decoder.weights.ring, 4, len(model.decoder.head.items)
    assert 0 < ring.num_reads <= num_tokens * (num_layers + num_tiles) + 2
    model.decoder.close()


def test_when_memory_runs_out_for_good_the_state_is_saved(
    base: Path, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StepRunner.run

    def run_step(self: StepRunner, step: int, *args: Any) -> Any:
        if step == 3:
            raise OutOfMemory("no memory in step 3")
        return original(self, step, *args)

    monkeypatch.setattr(StepRunner, "run", run_step)
    with pytest.raises(OutOfMemory, match="no memory in step 3.*The state after step 2 is saved"):
        train(recipe(base, train_file, tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    ending = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert ending["step"] == 2 and ending["checkpoint_seconds"] > 0
