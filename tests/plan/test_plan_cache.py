"""Plans made before: taken again while they hold, at once and without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_config
from tiny_runs import PROJECT, child_environment

from qlora_train.cli import main
from qlora_train.plan import plan_cache
from qlora_train.plan.plan_cache import MOST_PLANS, RATES_FILE, cached_plan
from qlora_train.plan.request import PlanRequest, request_of
from qlora_train.recipe import Recipe
from qlora_train.weights.cache_key import cache_root

GIB = 2**30


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))


class Maker:
    """Makes plans that can be told apart."""

    def __init__(self, *, fits: bool = True) -> None:
        self.num_made, self._fits = 0, fits

    def __call__(self, request: PlanRequest) -> dict[str, Any]:
        self.num_made += 1
        needed = {"peak_vram_bytes": 8 * GIB, "peak_ram_bytes": 4 * GIB, "disk_bytes": 2 * GIB}
        return needed | {"fits": self._fits, "number": self.num_made}


def request(card: str = "RTX 4090", ram: int = 64, **training: Any) -> PlanRequest:
    values = {"model": {"base": "meta-llama/Llama-3.1-8B"}, "data": {"train": "x"}, "training": training}
    return request_of(Recipe.from_dict(values), card, ram * GIB, 100 * GIB)


def test_the_same_question_is_answered_once() -> None:
    make = Maker()
    first = cached_plan(request(), make)
    elsewhere = request(output_dir="runs/another")
    assert cached_plan(request(), make) == cached_plan(elsewhere, make) == first and make.num_made == 1


def test_another_question_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    asked = request()
    questions = [
        asked,
        request("RTX 3090"),
        request(batch_size=8),
        replace(asked, target=replace(asked.target, cublas_workspace=":16:8")),
        replace(asked, host=replace(asked.host, has_quantized_base=True)),
    ]
    for number, question in enumerate(questions, 1):
        assert cached_plan(question, make)["number"] == number
    monkeypatch.setattr(plan_cache.metadata, "version", lambda name: f"{name} 99")
    assert cached_plan(asked, make)["number"] == len(questions) + 1


@pytest.mark.parametrize(
    ("ram_bytes", "is_taken"),
    [(58 * GIB, True), (60 * GIB, True), (62 * GIB, False), (50 * GIB, False), (3 * GIB, False)],
)
def test_what_is_free_may_drift_a_little(ram_bytes: int, is_taken: bool) -> None:
    make = Maker()
    asked = request()
    cached_plan(replace(asked, host=replace(asked.host, ram_bytes=58 * GIB)), make)
    plan = cached_plan(replace(asked, host=replace(asked.host, ram_bytes=ram_bytes)), make)
    assert (plan["number"] == 1) == is_taken


def test_less_than_is_needed_is_not_enough() -> None:
    make = Maker()
    asked = request()
    cached_plan(replace(asked, host=replace(asked.host, disk_bytes=2 * GIB)), make)
    assert cached_plan(replace(asked, host=replace(asked.host, disk_bytes=2 * GIB - 1)), make)["number"] == 2


def test_rates_that_were_measured_since_count_on_this_machine_alone() -> None:
    make = Maker()
    here = replace(request(), is_here=True)
    for question in (here, request()):
        cached_plan(question, make)
    (cache_root() / RATES_FILE).write_text("{}")
    assert cached_plan(request(), make)["number"] == 2
    assert cached_plan(here, make)["number"] == 3


def test_a_changed_config_is_another_question(tmp_path: Path) -> None:
    base = tmp_path / "base"
    values = {"model": {"base": str(base)}, "data": {"train": "x"}}
    make = Maker()
    for layers in (2, 3):
        tiny_config("llama", num_hidden_layers=layers).save_pretrained(base)
        cached_plan(request_of(Recipe.from_dict(values), "RTX 4090"), make)
    assert make.num_made == 2


def test_a_refusal_and_a_damaged_file_are_made_again() -> None:
    refused = Maker(fits=False)
    for _ in range(2):
        cached_plan(request(), refused)
    assert refused.num_made == 2
    make = Maker()
    cached_plan(request(), make)
    (file,) = (cache_root() / "plans").glob("*.json")
    file.write_text(file.read_text().replace('"number": 1', '"number": 7'))
    assert cached_plan(request(), make)["number"] == 2


def test_the_folder_does_not_grow() -> None:
    make = Maker()
    for number in range(MOST_PLANS + 5):
        cached_plan(request(max_steps=number + 1), make)
    assert len(list((cache_root() / "plans").iterdir())) == MOST_PLANS


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    make = Maker()
    assert cached_plan(request(), make)["number"] == 1 and cached_plan(request(), make)["number"] == 2


PLAN_AGAIN = """
import sys
from qlora_train.cli import main
assert main(sys.argv[1:]) == 0
print("torch" in sys.modules, file=sys.stderr)
"""


def test_a_plan_made_before_is_printed_without_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made in this process, taken again in one of its own."""
    monkeypatch.chdir(PROJECT)
    words = ["plan", "quickstart", "model.base=meta-llama/Llama-3.2-1B", "training.micro_batch_size=4"]
    words += ["--card", "RTX 4090", "--ram", "64GiB", "--disk", "99GiB"]
    assert main(words) == 0
    made = capsys.readouterr().out
    command = [sys.executable, "-c", PLAN_AGAIN, *words]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=True)
    assert done.stdout == made and done.stderr.splitlines()[-1] == "False"
