"""Generation within a budget: the same tokens from anywhere, few fetches, refusals before loading."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import quantize_with_head, write_checkpoint
from tiny_runs import byte_tokenizer

from qlora_train.cli import main
from qlora_train.device.compute import THE_CPU
from qlora_train.device.memory_tracker import MemoryTracker
from qlora_train.errors import UserError
from qlora_train.generate import model_folder
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.model_folder import LoadedModel, find_model
from qlora_train.generate.sampling import Sampling
from qlora_train.model.quantized_matrix import QuantizedMatrix
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.quant.formats import Quantization
from qlora_train.weights.cache_key import cache_root
from qlora_train.weights.execution_plan import Placement
from qlora_train.weights.streaming import StreamedWeights

NUM_LAYERS, NUM_NEW = 8, 6
PROMPTS = [[5, 9, 7, 30], [8], [11] * 19]
SIZE = GenerateSize(tuple(len(prompt) for prompt in PROMPTS), NUM_NEW)


@pytest.fixture(autouse=True)
def a_cpu_and_no_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bare")
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": NUM_LAYERS}
    write_checkpoint(folder, vocab_size=len(tokenizer), **sizes)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def room(bare: Path) -> tuple[int, int]:
    """(bytes that the resident model is planned with, bytes of a layer)."""
    plan = find_model(bare).load(SIZE).plan
    return plan.peak_bytes, plan.workload.layer_buffer_bytes


def tokens_of(model: LoadedModel) -> list[list[int]]:
    return generate_tokens(model.decoder, PROMPTS, Sampling(NUM_NEW), frozenset())


def test_a_bare_model_with_memory_to_spare_is_resident_and_leaves_no_cache(bare: Path) -> None:
    model = find_model(bare).load(SIZE)
    assert model.plan.execution.is_resident and not isinstance(model.decoder.weights, StreamedWeights)
    assert not list(cache_root().glob("*-none-*"))


def test_the_same_tokens_however_much_streams_and_few_fetches(bare: Path, room: tuple[int, int]) -> None:
    expected = tokens_of(find_model(bare).load(SIZE))
    resident_bytes, layer_buffer_bytes = room
    streamed = set()
    for budget in (resident_bytes - 2 * layer_buffer_bytes, resident_bytes - 5 * layer_buffer_bytes):
        model = find_model(bare).load(SIZE, vram_bytes=budget)
        execution = model.plan.execution
        assert model.plan.peak_bytes <= budget
        assert tokens_of(model) == expected
        assert isinstance(model.decoder.weights, StreamedWeights)
        num_streamed = execution.weights.count(Placement.DISK)
        num_tiles = len(model.decoder.head.items)
        num_reads = model.decoder.weights.ring.num_reads
        assert 0 < num_reads <= NUM_NEW * (num_streamed + num_tiles) + execution.num_slots
        streamed.add(num_streamed)
        model.decoder.close()
    assert len(streamed) == 2 and max(streamed) <= NUM_LAYERS


def test_the_budget_is_kept(bare: Path, room: tuple[int, int]) -> None:
    """The plan counts 128 MiB for blocks of rows while loading; a model this small needs less."""
    budget = room[0] - 5 * room[1]
    with MemoryTracker(THE_CPU) as meter:
        model = find_model(bare).load(SIZE, vram_bytes=budget)
        meter.reset_peak()
        tokens_of(model)
    model.decoder.close()
    planned = sum(model.plan.phases["generate"].values())
    assert meter.peak_bytes == pytest.approx(planned, rel=0.01) and planned < budget


@pytest.mark.parametrize(
    "quantization", [Quantization("fp4", double_quant=True), Quantization("int8")], ids=str
)
def test_a_head_that_is_quantized(bare: Path, tmp_path: Path, quantization: Quantization) -> None:
    """Generated with as it is stored, and in the plan."""
    folder = quantize_with_head(bare, tmp_path / "quantized", quantization)
    byte_tokenizer().save_pretrained(folder)
    answers = []
    for pieces_fewer in (0, 5):
        source = find_model(folder)
        assert source.quantization == quantization
        resident = source.load(SIZE).plan
        budget = resident.peak_bytes - pieces_fewer * resident.workload.layer_buffer_bytes
        with MemoryTracker(THE_CPU) as meter:
            model = source.load(SIZE, vram_bytes=budget)
            answers.append(tokens_of(model))
            meter.reset_peak()
            tokens_of(model)  # the buffer for tiles is there from the first one on
        assert isinstance(model.decoder.head, QuantizedMatrix)
        assert (len(model.decoder.head.items) > 0) == (pieces_fewer > 0)
        assert meter.peak_bytes == pytest.approx(sum(model.plan.phases["generate"].values()), rel=0.01)
        model.decoder.close()
    assert answers[0] == answers[1]


def test_a_long_prompt_passes_in_mlp_tiles(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the plan says so, the layers do."""
    source, size = find_model(bare), GenerateSize((64,), 2)
    whole = source.load(size)
    plan_generation_here = model_folder.plan_generation_here

    def in_tiles(*args, **options):  # type: ignore[no-untyped-def]
        plan = plan_generation_here(*args, **options)
        return replace(plan, execution=replace(plan.execution, mlp_tile_tokens=16))

    monkeypatch.setattr(model_folder, "plan_generation_here", in_tiles)
    tiled = source.load(size)
    assert [layer.mlp.tile_tokens for layer in tiled.decoder.layers] == [16] * NUM_LAYERS
    prompt = [[7, 8, 9, 10] * 16]
    answers = [generate_tokens(m.decoder, prompt, Sampling(2), frozenset()) for m in (whole, tiled)]
    assert answers[0] == answers[1]


def test_nothing_is_loaded_where_nothing_fits(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "load_base", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"at least .* are needed for 3 prompts .*, the budget is 0\.00 GiB"):
        find_model(bare).load(SIZE, vram_bytes=2**20)


def test_the_command_obeys_vram(
    bare: Path, room: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(bare), "--prompt", "ab", "--prompt", "c", "--max-new-tokens", "4"]
    assert main(command) == 0
    resident = capsys.readouterr()
    assert resident.err == ""
    mebibytes = (room[0] - 3 * room[1]) / 2**20
    assert main([*command, "--vram", f"{mebibytes:.2f}MiB"]) == 0
    streamed = capsys.readouterr()
    assert streamed.out == resident.out
    assert "disk; embedding disk, head disk" in streamed.err.splitlines()[0]
    assert main([*command, "--vram", "1MiB"]) == 2
    refused = capsys.readouterr()
    assert refused.out == "" and "this does not fit, however it is arranged" in refused.err
    with pytest.raises(SystemExit) as stop:
        main([*command, "--vram", "12"])
    assert stop.value.code == 2 and "'12' is no size such as 8GiB" in capsys.readouterr().err


def test_an_empty_prompt_is_refused_before_loading(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tokenizer that puts nothing before a text: one that does would begin with BOS."""
    monkeypatch.setattr(model_folder, "load_base", lambda *args, **options: pytest.fail("loaded"))
    folder = tmp_path / "bare"
    shutil.copytree(bare, folder)
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps(settings | {"post_processor": None}), encoding="utf-8")
    assert main(["generate", str(folder), "--prompt", "", "--raw"]) == 2
