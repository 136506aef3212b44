"""The speed cases as small as they go: every piece runs, in this process (in ones of their own:
test_gpu_stages.py), and contenders get the same work."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from benchmarks import speed_suite
from benchmarks.case import Case
from benchmarks.pieces import inputs
from benchmarks.pieces.figures import Step, linear_parameters, training_figures
from benchmarks.pieces.ours import recipe_values
from benchmarks.pieces.soup import figures_of, soup_config
from benchmarks.runner import Bench
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_train.recipe import Recipe

CASES = {case.name: case for case in speed_suite.CASES}
MACHINE = {"gpu": None}
TINY = {
    "name": "tiny",
    "config": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 128,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(autouse=True)
def no_state_stays() -> Iterator[None]:
    """The trainers of others set accelerate up for this process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny(name: str, **changes: Any) -> Case:
    """A case on a tiny base with few steps; rows of 32 tokens."""
    case = CASES[name]
    rows = dict(case.inputs.get("rows") or {})
    if rows:
        small = {"num_tokens": 32} if rows["kind"] == "texts" else {"mean_tokens": 20, "max_tokens": 64}
        rows |= {"name": f"tiny-{rows['name']}", **small}
    steps = {"num_warm_up": 2, "num_timed": 2, "row_tokens": 32, **changes}
    settings = {**case.settings, **steps} if "rank" in case.settings else case.settings
    inputs = {**case.inputs, "base": TINY} | ({"rows": rows} if rows else {})
    return replace(case, settings=settings, inputs=inputs, timeout_seconds=120)


def measure(case: Case, folder: Path) -> dict[str, dict[str, Any]]:
    """The figures of each contender, all in this process."""
    paths = inputs.measure({"folder": str(folder), **case.inputs})["paths"]
    figures = {}
    for contender in case.contenders:
        piece = importlib.import_module(contender.module)
        figures[contender.name] = piece.measure({**case.settings, "inputs": paths, **contender.arguments})
    return figures


def test_a_training_case_gives_everybody_the_same_work(folder: Path) -> None:
    case = tiny("cpu-200m-recompute", sequence_length=32)
    ours, peft, fast = measure(case, folder).values()
    in_layers, in_head = linear_parameters_of_tiny()
    for figures in (ours, peft, fast):
        assert figures["num_timed_steps"] == 2
        assert figures["num_timed_tokens"] == 2 * 2 * 32
        assert figures["num_timed_supervised_tokens"] == 2 * 2 * 31
        assert figures["first_loss"] == pytest.approx(ours["first_loss"], rel=0.02)
        assert 0 < figures["load_seconds"] < figures["first_step_seconds"]
        assert figures["process_peak_bytes"] > 2**28
        assert 0 < figures["share_of_matmul_ceiling"] < 1
        flops = 4 * (in_layers * 128 + in_head * 124)
        seconds = figures["num_timed_tokens"] / figures["tokens_per_second"]
        assert figures["useful_gflops_per_second"] == pytest.approx(flops / seconds / 1e9)
    assert ours["activations"] == {"recompute": 2}


def test_chat_rows_count_real_tokens_and_the_same_targets(folder: Path) -> None:
    pytest.importorskip("trl")
    case = tiny("cpu-chat-rows", sequence_length=64, num_warm_up=2, num_timed=7)
    ours, trl = measure(case, folder).values()
    whole = inputs.word_tokenizer(300)
    file = next((folder / "rows").glob("tiny-prompts*"))
    lengths = [len(whole(r["prompt"] + r["completion"])["input_ids"]) + 1 for r in read_rows(file)]
    assert len(lengths) == 72 and max(lengths) <= 64
    # trl takes all rows once in 9 steps of 8; the first two are warm-up
    assert 0.5 * sum(lengths) < trl["num_timed_tokens"] < sum(lengths)
    for figures in (ours, trl):
        supervised_share = figures["num_timed_supervised_tokens"] / figures["num_timed_tokens"]
        assert 0.45 < supervised_share < 0.6
        assert figures["first_loss"] == pytest.approx(5.7, abs=0.4)  # ln 300


def test_load_and_merge_cases_run(folder: Path) -> None:
    loaded = measure(tiny("cpu-load-1.1b"), folder).values()
    assert all(figures["load_seconds"] > 0 for figures in loaded)
    merged = measure(tiny("cpu-merge-1.1b"), folder).values()
    sizes = [figures["merged_bytes"] for figures in merged]
    assert max(sizes) - min(sizes) < 2000  # the same tensors, other headers
    assert all(figures["merge_to_disk_seconds"] >= figures["merge_seconds"] for figures in merged)


def test_gpu_cases_are_skipped_with_a_word_without_a_gpu(folder: Path) -> None:
    on_gpu = [case for case in speed_suite.CASES if case.needs_cuda]
    assert len(on_gpu) == 5
    for case in on_gpu:
        rows = Bench(folder, folder / "records", MACHINE, print).run(case, 1)
        assert {row.word for row in rows} == {"skipped: no CUDA device"}


def test_a_disturbed_step_counts_only_where_steps_differ(tmp_path: Path) -> None:
    inputs.write_base(tmp_path, TINY["config"])

    def tokens_per_second(*num_tokens: int) -> float:
        steps = [Step(s, n, n, 5.0) for s, n in zip((9.0, 2.0, 2.0, 12.0), num_tokens, strict=True)]
        return training_figures(
            steps, tmp_path, num_warm_up=1, load_seconds=1.0, first_step_seconds=2.0
        )["tokens_per_second"]  # fmt: skip

    assert tokens_per_second(50, 50, 50, 50) == 25.0
    assert tokens_per_second(50, 50, 50, 60) == 10.0


def test_a_random_base_is_a_checkpoint_like_any_other(tmp_path: Path) -> None:
    inputs.write_base(tmp_path, TINY["config"])
    model, problems = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not problems["missing_keys"] and not problems["unexpected_keys"]
    assert type(model).__name__ == "LlamaForCausalLM"
    weight = model.model.layers[1].mlp.up_proj.weight.float()
    assert abs(weight.std().item() - inputs.WEIGHT_SPREAD) < 0.002
    assert not weight.equal(model.model.layers[0].mlp.up_proj.weight.float())
    assert (model.model.norm.weight == 1).all()
    again = tmp_path / "again"
    again.mkdir()
    inputs.write_base(again, TINY["config"])
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as one, safe_open(again / file.name, "pt") as other:
            assert all(one.get_tensor(name).equal(other.get_tensor(name)) for name in one.keys())  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("w2 w299 w17")["input_ids"] == [2, 299, 17]
    assert tokenizer("w2<eos>")["input_ids"] == [2, tokenizer.eos_token_id] == [2, 1]


def test_linear_parameters_are_those_of_the_model(tmp_path: Path) -> None:
    inputs.write_base(tmp_path, TINY["config"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    linears = {n: p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight")}
    assert linear_parameters(tmp_path) == (sum(linears.values()), model.lm_head.weight.numel())
    assert linear_parameters_of_tiny() == linear_parameters(tmp_path)


def linear_parameters_of_tiny() -> tuple[int, int]:
    return 2 * (2 * 64 * 16 * (4 + 2) + 3 * 64 * 112), 300 * 64


def read_rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("case", [c for c in speed_suite.CASES if "rank" in c.settings], ids=lambda c: c.name)
def test_every_training_case_is_a_valid_recipe(case: Case, tmp_path: Path) -> None:
    settings = {**case.settings, "inputs": {"base": "base", "rows": "rows.jsonl"}}
    recipe = Recipe.from_dict(recipe_values({**settings, **case.contenders[0].arguments}, tmp_path / "run"))
    assert recipe.training.max_steps == settings["num_warm_up"] + settings["num_timed"]
    assert recipe.lora.rank == 16
    assert recipe.training.optimizer == "paged_adamw_8bit"
    num_rows = case.inputs["rows"]["num_rows"]
    if case.inputs["rows"]["kind"] == "texts":  # every row is used once
        step_tokens = recipe.training.micro_batch_size * recipe.data.sequence_length
        assert recipe.training.max_steps * step_tokens == num_rows * speed_suite.ROW_TOKENS
        per_batch = case.settings.get("rows_per_micro_batch", 1)
        assert per_batch * speed_suite.ROW_TOKENS == step_tokens


def test_soup_is_told_what_the_case_says_and_its_report_is_understood() -> None:
    case = CASES["gpu-8b-streamed-512"]
    config = soup_config({**case.settings, "inputs": {"base": "/b", "rows": "/r.jsonl"}})
    assert config["training"]["stream_layers"] and config["training"]["quantization"] == "4bit"
    assert config["training"]["lora"]["r"] == 16 and config["data"]["max_length"] == 512
    report = {
        "timing": {"total_seconds": 10.0, "warmup_steps_discarded": 2, "median_seconds": 2.0},
        "steps_measured": 7,
        "tokens": {"useful": 2555, "total": 2560},
        "throughput": {"useful_tokens_per_second": 255.5, "total_tokens_per_second": 256.0},
        "memory": {"max_memory_allocated_bytes": 1, "max_memory_reserved_bytes": 2},
    }
    figures = figures_of(report)
    assert (figures["tokens_per_second"], figures["step_seconds"]) == (256.0, 2.0)
    assert (figures["device_peak_bytes"], figures["num_timed_steps"]) == (1, 5)
