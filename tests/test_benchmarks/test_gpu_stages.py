"""The GPU suite's stages: what they ask fits by the plan, and all of them, tiny, on the simulated GPU."""

from __future__ import annotations

import importlib
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import speed_suite
from benchmarks.gpu_suite import learns, peer, points, smoke, training
from benchmarks.gpu_suite.stages import DRY, REAL, Stage, files_of_tests, stages_of
from benchmarks.gpu_suite.timing import Way
from simulated_gpu.fixture import SimulatedGpu
from tiny_runs import PROJECT
from transformers import AutoConfig

from qlora_train.device.description import planned_gpu
from qlora_train.plan.host_budget import HostBudget
from qlora_train.plan.model_shape import shape_of
from qlora_train.plan.plan import Choices, Plan
from qlora_train.plan.plan_cache import RATES_FILE
from qlora_train.plan.planner import make_plan
from qlora_train.plan.time_model import stated_rates
from qlora_train.plan.workload import workload_of
from qlora_train.recipe import Recipe
from qlora_train.weights.cache_key import cache_root
from qlora_train.weights.execution_plan import Placement

GIB = 2**30
STAGES = {stage.name: stage for stage in stages_of(REAL, files_of_tests())}
TINY = {stage.name: stage for stage in stages_of(DRY, ())}
H100 = planned_gpu("H100", (9, 0))


def plans_of(stage: Stage) -> list[Plan]:
    """Of its runs, on a machine with 100 GiB of RAM and an H100."""
    plans = []
    for changes in stage.arguments["runs"].values():
        sections = {**stage.arguments["recipe"], **changes}
        data = {"train": "x", **sections["data"]}
        recipe = Recipe.from_dict({"model": {"base": "x"}, **sections, "data": data})
        workload = workload_of(
            recipe, shape_of(AutoConfig.for_model(**stage.arguments["model"]["config"])), H100
        )
        choices = Choices(recipe.memory.weights, recipe.memory.activations)
        budget = recipe.memory.vram_bytes or 75 * GIB
        host = HostBudget(100 * GIB, 60 * GIB)
        plans.append(make_plan(workload, budget, stated_rates(H100), host, choices))
    return plans


def test_the_most_telling_come_first_and_every_stage_fits_into_a_call() -> None:
    names = list(STAGES)
    assert names[:2] == ["smoke", "tests/gpu/test_attention.py"]
    order = [
        "smoke",
        "memory-8b-4gib",
        "memory-8b-exact",
        "speed-8b",
        "peer-peft",
        "peer-unsloth",
        "points",
        "memory-70b-8gib",
        "learns",
        "speed-8b-streamed-512",
        "peer-soup",
        "memory-30b-experts",
    ]
    assert [name for name in names if name in order] == order
    for name, peer_of_it in (("speed-8b", "peer-peft"), ("speed-8b-streamed-512", "peer-soup")):
        assert names.index(peer_of_it) == names.index(name) + 1  # a later call may get another card
    assert "tests/plan/test_plan_matches_meter.py" in names  # the comparison of plan and meter
    assert all(stage.least_seconds <= stage.timeout_seconds < 570 for stage in STAGES.values())
    assert list(TINY) == [name for name in names if not name.startswith("tests/")]


@pytest.mark.parametrize(("name", "gib"), [("memory-8b-4gib", 4), ("memory-70b-8gib", 8)])
def test_what_is_asked_for_fits_and_streams_from_ram(name: str, gib: int) -> None:
    (plan,) = plans_of(STAGES[name])
    assert plan.fits and plan.budget_bytes == gib * GIB
    assert plan.workload.num_tokens * plan.workload.num_micro_batches == 2048
    assert Placement.RAM in plan.execution.weights and Placement.DISK not in plan.execution.weights


def test_experts_are_compared_resident_and_within_4_gib() -> None:
    resident, streamed = plans_of(STAGES["memory-30b-experts"])
    assert resident.fits and not resident.execution.streams
    assert streamed.fits and streamed.budget_bytes == 4 * GIB and Placement.RAM in streamed.execution.weights
    assert all(
        plan.workload.num_tokens * plan.workload.num_micro_batches == 4096 for plan in (resident, streamed)
    )


def test_streamed_and_resident_are_one_group_of_8192_tokens_with_the_same_sums() -> None:
    for name in ("memory-8b-streamed", "memory-8b-exact"):
        plans = plans_of(STAGES[name])
        first, last = plans[0].execution, plans[-1].execution
        assert not first.streams and set(last.weights) == {Placement.RAM}
        for plan in plans:
            assert plan.fits and plan.workload.num_tokens == 8192 and plan.execution.num_groups == 1
            for cut in ("loss_tokens", "head_tile_rows", "mlp_tile_tokens"):
                assert getattr(plan.execution, cut) == getattr(first, cut)


def test_peers_get_the_tokens_that_we_get() -> None:
    ours = STAGES["speed-8b"].arguments
    settings = STAGES["peer-peft"].arguments["settings"]
    assert (
        settings["rows_per_micro_batch"] * settings["row_tokens"] == ours["recipe"]["data"]["sequence_length"]
    )
    assert ours["row_tokens"] == settings["row_tokens"] == speed_suite.ROW_TOKENS
    model = STAGES["peer-peft"].arguments["inputs"]["base"]["config"]
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size")
    assert all(model[key] == ours["model"]["config"][key] for key in same)
    soup, streamed = STAGES["peer-soup"].arguments["settings"], STAGES["speed-8b-streamed-512"].arguments
    assert soup["row_tokens"] == streamed["recipe"]["data"]["sequence_length"] == 512


class Dry:
    """Takes stages in this process, on the simulated GPU."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self._places = {"work": str(folder), "out": str(self.out)}

    def measure(self, name: str, **changes: Any) -> dict[str, Any]:
        stage = TINY[name]
        launcher = [sys.executable, "-m", "simulated_gpu"]
        arguments = {**stage.arguments, **self._places, "launcher": launcher, **changes}
        figures: dict[str, Any] = importlib.import_module(stage.module).measure(arguments)
        return figures


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated_gpu: SimulatedGpu) -> Dry:
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}:{PROJECT / 'tests'}")
    (tmp_path / "quantized").mkdir()
    shutil.copy(cache_root() / RATES_FILE, tmp_path / "quantized")  # stated ones of the CPU, see conftest.py
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "quantized"))
    simulated_gpu.settings.num_multiprocessors = 1  # so that the products whose speed is measured are small
    return Dry(tmp_path)


def test_the_smoke_stage(dry: Dry) -> None:
    figures = dry.measure("smoke")
    assert figures["problems"] == []
    runs = figures["runs"]
    checks = ["train", "resume", "float32", "losses", "losses, float32", "generate", "export"]
    assert list(runs) == checks
    assert runs["train"]["device"] == runs["float32"]["device"] == "sim"
    assert 3 <= runs["resume"]["killed_after_steps"] < 6
    assert runs["resume"]["last_loss"] == runs["train"]["last_loss"]
    assert 0 <= runs["losses, float32"]["loss_difference"] < 1e-3
    assert [remark.partition(":")[0] for remark in figures["remarks"]] == ["float32", "merged"]


def test_a_check_that_fails_hides_no_other(tmp_path: Path) -> None:
    checks = smoke.Smoke({**TINY["smoke"].arguments, "work": str(tmp_path)})
    checks.check("export", lambda: checks.export(tmp_path / "no-run"))
    checks.check("else", lambda: {"x": 1})
    (problem,) = checks.problems
    assert problem.startswith("export: ") and "no-run" in problem
    assert checks.runs["else"]["x"] == 1


@pytest.mark.parametrize(
    "name", ["memory-8b-4gib", "memory-70b-8gib", "speed-8b-streamed-512", "memory-8b-4gib-disk"]
)
def test_a_budget_is_planned_metered_and_held(dry: Dry, name: str) -> None:
    figures = dry.measure(name)
    (run,) = figures["runs"].values()
    assert figures["problems"] == [] and run["changes"] == []
    for held in ("device_peak_bytes", "device_reserved_peak_bytes", "requested_peak_bytes", "num_ooms"):
        assert run[held] >= 0
    assert run["requested_peak_bytes"] <= run["device_peak_bytes"] <= run["device_reserved_peak_bytes"]
    assert run["num_timed_steps"] == 2 and run["tokens_per_second"] > 0
    assert abs(run["first_loss"] - 6.5) < 0.7  # ln 401 + 1/2
    assert ("copied_gb_per_second" in run) == (
        TINY[name].arguments["recipe"]["memory"].get("weights") is not None
    )


def test_streamed_resident_and_again_end_with_the_same_bytes(dry: Dry) -> None:
    figures = dry.measure("memory-8b-exact")
    assert figures["problems"] == []
    assert "the same bytes: resident, resident again, streamed" in figures["remarks"]
    assert set(figures["runs"]["streamed"]["weights"]) == {"ram"}


def test_experts_stream_within_their_budget(dry: Dry) -> None:
    figures = dry.measure("memory-30b-experts")
    resident, streamed = figures["runs"]["resident"], figures["runs"]["streamed"]
    assert figures["problems"] == [] and set(streamed["weights"]) == {"ram"}
    assert streamed["last_loss"] == pytest.approx(resident["last_loss"], rel=1e-3)
    assert abs(resident["first_loss"] - 6.5) < 0.7


def test_the_speed_stage_leaves_a_trace_and_a_table(dry: Dry) -> None:
    figures = dry.measure("speed-8b")
    (run,) = figures["runs"].values()
    assert figures["problems"] == [] and run["num_timed_steps"] == 2
    assert [file.name for file in dry.out.iterdir()] == ["speed-8b.trace.json.gz"]
    assert run["profile"]["step_milliseconds"] > 0 and 0 < run["profile"]["busy_share"] <= 1
    assert "sim has no history of its allocator" in figures["remarks"]
    busy_milliseconds = run["profile"]["busy_share"] * run["profile"]["step_milliseconds"]
    expected = 1 - busy_milliseconds / 1e3 / run["step_seconds"]
    assert run["host_bound_share"] == pytest.approx(expected)


def test_every_point_is_timed_beside_what_could_be_done_instead(dry: Dry) -> None:
    steps = TINY["points"].arguments["steps"]
    figures = dry.measure("points", steps=steps[:1])
    assert figures["problems"] == []
    assert "host_bound_share" in figures["runs"]["random-1b"] and not dry.out.exists()
    found = figures["points"]
    subjects = {point.partition(" ")[0] for point in found}
    assert subjects == {
        "product", "a", "nf4", "int8", "dropout", "loss", "linear", "q,", "residual", "rotary", "1", "4",
        "optimizer,",
    }  # fmt: skip
    assert all(len(ways) > 1 for ways in found.values())
    for figures_of_way in (way for ways in found.values() for way in ways.values()):
        assert figures_of_way["num_kernels"] > 0 and figures_of_way["milliseconds"] > 0
    deterministic = found["loss [256, 96] x 401 words"]["ours, deterministic"]
    assert deterministic["tflops_per_second"] > 0 and not torch.are_deterministic_algorithms_enabled()


def test_a_point_that_fails_hides_no_other(dry: Dry, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: points.Bench) -> Iterator[Way]:
        yield Way("sum", "ours", lambda: bench.random(3) + bench.random(4))
        yield Way("sum", "rightly", lambda: bench.random(3) + bench.random(3))
        raise OSError("no such kernel")

    monkeypatch.setattr(points, "POINTS", (broken, points.of_dropout))
    figures = dry.measure("points", steps=[])
    first, second = figures["problems"]
    assert first.startswith("sum, ours: ") and second.startswith("broken: ") and "no such kernel" in second
    assert [*figures["points"]] == ["sum", "dropout [256, 96]", "dropout [256, 200]"]
    assert [*figures["points"]["sum"]] == ["rightly"]


def test_a_model_is_pretrained_and_adapted_in_both_formats(dry: Dry) -> None:
    figures = dry.measure("learns")
    nf4, plain = figures["runs"]["NF4"], figures["runs"]["16 bits"]
    assert figures["problems"] == [] and "pre-trained in 3 steps" in figures["remarks"][0]
    assert nf4["base_eval_loss"] != plain["base_eval_loss"] == pytest.approx(math.log(262), rel=0.02)
    assert all(run["eval_loss"] < run["base_eval_loss"] for run in (nf4, plain))
    assert nf4["device_peak_bytes"] > 0 and nf4["tokens_per_second"] > 0


def test_losses_that_differ_or_do_not_fall_are_problems() -> None:
    def compared(nf4: float, plain: float) -> list[str]:
        runs = {
            learns.NF4: {"base_eval_loss": 2.1, "eval_loss": nf4},
            learns.IN_16_BITS: {"base_eval_loss": 2.0, "eval_loss": plain},
        }
        return learns.compare(runs, 0.01, 0.2)[0]

    assert compared(1.009, 1.0) == []
    (differs,) = compared(1.02, 1.0)
    assert "2.0000 -> 1.0000, in NF4 2.1000 -> 1.0200: +2.00%, +2.00% of what was learned" in differs
    (unlearned,) = compared(1.7, 1.7)
    assert unlearned.endswith("too little was learned to compare")


def test_what_a_budget_did_not_hold_is_said() -> None:
    recipe = Recipe.from_dict({"model": {"base": "x"}, "data": {"train": "x"}, "memory": {"vram": "4GiB"}})
    figures = {
        "changes": ["two groups"],
        "measured_step_device_bytes": 110,
        "planned_step_device_bytes": 100,
        "device_reserved_peak_bytes": 4 * GIB,
        "context_bytes": GIB // 2,
    }
    device: Any = type("Device", (), {"is_accelerator": True})()
    assert training.problems_of(recipe, figures, device) == [
        "ran out of memory: two groups",
        "a step took +10.0% of what was planned",
        "held 4.50 GiB with the context, 4.00 GiB were given",
    ]


def test_a_peer_has_its_inputs_made_and_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    figures = peer.measure({**TINY["peer-peft"].arguments, "work": str(tmp_path)})
    run = figures["runs"][speed_suite.PEFT_FAST]
    assert figures["problems"] == [] and run["num_timed_steps"] == 2
    assert run["num_timed_tokens"] == 2 * 8 * 64 and abs(run["first_loss"] - 6.0) < 0.3  # ln 401
    assert run["first_step_seconds"] > run["load_seconds"] > 0


def test_a_peer_that_fails_says_why(tmp_path: Path, make_piece: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = make_piece("broken_peer", "raise RuntimeError('no kernel')")
    monkeypatch.setattr(peer, "INPUTS", make_piece("inputs", "return {'paths': {}}"))
    with pytest.raises(RuntimeError, match="(?s)trl SFTTrainer failed: .*no kernel"):
        peer.measure({**TINY["peer-trl"].arguments, "work": str(tmp_path), "module": broken})
