"""The other commands on the simulated GPU, and two ranks with a device each: the CPU's answers and bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from simulated_gpu.fixture import SimulatedGpu
from tiny_runs import (
    PROJECT,
    adapter_bytes,
    child_environment,
    losses_of,
    recipe_values,
    reversal_rows,
    write_base,
    write_recipe,
    write_rows,
)

from qlora_train.cli import main
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.model_folder import find_model
from qlora_train.generate.sampling import Sampling
from qlora_train.generate.scoring import Continuation, score
from qlora_train.kernels.on_device import find_device
from qlora_train.model.vocab_matrix import ResidentMatrix
from qlora_train.plan.planned_walk import GenerateSize

pytestmark = pytest.mark.filterwarnings("ignore:Triton does not run")
PROMPTS = ["abc:", "fedcba:", "a:"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", reversal_rows(60))


@pytest.fixture(scope="module")
def run_folder(base: Path, train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the CPU, by the command."""
    folder = tmp_path_factory.mktemp("run")
    file = write_recipe(
        folder / "recipe.json",
        recipe_values(base, train_file, folder / "run", training={"max_steps": 2, "learning_rate": 0.05}),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        assert main(["train", str(file)]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder / "run"


Found = tuple[list[list[int]], list[tuple[float, bool]]]


def found_of(run: Path, memory: str) -> Found:
    """(the tokens of answers, scores of continuations)."""
    source = find_model(run)
    assert source.recipe is not None
    changed = source.recipe.model_copy(
        update={"memory": source.recipe.memory.model_copy(update={"weights": memory})}
    )
    encoded = [source.encode(prompt) for prompt in PROMPTS]
    size = GenerateSize(tuple(map(len, encoded)), 8, evaluated_tokens=48)
    model = replace(source, recipe=changed).load(size)
    try:
        answers = generate_tokens(model.decoder, encoded, Sampling(8), frozenset())
        asked = [
            Continuation(tokens[:n], 2) for tokens in [*encoded, encoded[1] * 6] for n in (3, len(tokens))
        ]
        return answers, score(model.decoder, asked, 48)
    finally:
        model.decoder.close()


@pytest.fixture(scope="module")
def found(run_folder: Path) -> Found:
    """The CPU's."""
    return found_of(run_folder, "resident")


@pytest.mark.parametrize("memory", ["resident", "ram", "disk"])
def test_answers_and_scores_are_those_on_a_cpu(
    run_folder: Path, found: Found, simulated_gpu: SimulatedGpu, memory: str
) -> None:
    answers, scores = found_of(run_folder, memory)
    assert answers == found[0]
    for on_gpu, on_cpu in zip(scores, found[1], strict=True):
        assert on_gpu == pytest.approx(on_cpu, rel=1e-6)
    assert simulated_gpu.num_operators > 1000


def test_the_command_generates_on_the_gpu(
    run_folder: Path, simulated_gpu: SimulatedGpu, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    assert main(["generate", str(run_folder), *asked, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.count("> ") == len(PROMPTS)
    assert simulated_gpu.peak_bytes() > 0


def test_the_command_exports_beside_a_gpu(
    run_folder: Path, simulated_gpu: SimulatedGpu, tmp_path: Path
) -> None:
    assert main(["export", str(run_folder), "--to", "merged", "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_device_without_an_index_is_the_current_one(simulated_gpu: SimulatedGpu) -> None:
    simulated_gpu.num_devices = 2
    torch.get_device_module("sim").set_device(1)
    try:
        assert find_device(torch.device("sim")).torch == torch.device("sim", 1)
        assert find_device().torch == torch.device("sim", 1)
        assert find_device(torch.device("sim", 0)).torch == torch.device("sim", 0)
    finally:
        torch.get_device_module("sim").set_device(0)


def test_another_gpu_than_the_one_that_is_meant_shows(
    run_folder: Path, simulated_gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is on the second GPU cannot be mixed with the first's."""
    simulated_gpu.num_devices = 2
    decoder = find_model(run_folder).load(GenerateSize((3,), 2)).decoder
    assert isinstance(decoder.embedding, ResidentMatrix)
    decoder.embedding.weight = decoder.embedding.weight.to("sim:1")
    with pytest.raises(RuntimeError, match="on the same device"):
        generate_tokens(decoder, [[5, 6, 7]], Sampling(2), frozenset())


def in_two_ranks(arguments: Sequence[str]) -> None:
    """The command in a launch of two, with a simulated GPU each."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, "-W", "ignore", *launch, "-m", "simulated_gpu", "qlora_train", *arguments]
    environment = child_environment(GLOO_SOCKET_IFNAME="lo")
    environment["PYTHONPATH"] += os.pathsep + str(PROJECT / "tests")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_with_a_device_each_are_one_with_twice_the_batches(
    base: Path, train_file: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The one alone in this process, when the two have ended."""
    training: dict[str, Any] = {"max_steps": 2, "optimizer": "adamw"}
    for ranks in (2, 1):
        asked = training | {"gradient_accumulation_steps": 2 // ranks}
        out, memory = tmp_path / str(ranks), {"weights": "ram", "activations": "offload"}
        file = tmp_path / f"{ranks}.json"
        write_recipe(file, recipe_values(base, train_file, out, training=asked) | {"memory": memory})
    in_two_ranks(["train", str(tmp_path / "2.json")])
    request.getfixturevalue("simulated_gpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(["train", str(tmp_path / "1.json")]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses_of(tmp_path / "2") == losses_of(tmp_path / "1")  # a sum of two, in either order
    assert adapter_bytes(tmp_path / "2") == adapter_bytes(tmp_path / "1")
    plan = json.loads((tmp_path / "2" / "plan.json").read_text())
    assert plan["target"]["index"] == 0
