"""What to try: every line is a plan that fits, made with the keys that it names, and only when asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qlora_train.device.description import CPU, DeviceDescription, planned_gpu
from qlora_train.plan import from_recipe
from qlora_train.plan.from_recipe import plan_recipe
from qlora_train.plan.host_budget import HostBudget
from qlora_train.plan.plan import Plan
from qlora_train.plan.words import duration, gib
from qlora_train.recipe import Recipe

GIB = 2**30
GPU = planned_gpu("RTX 4090", None)
AMPLE = HostBudget(512 * GIB, 2048 * GIB)


def values_of(**sections: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"model": {"base": "meta-llama/Llama-3.1-8B"}, "data": {"train": "x"}}
    for name, changes in sections.items():
        values[name] = values.get(name, {}) | changes
    return values


def planned(
    values: dict[str, Any], gibs: float, host: HostBudget = AMPLE, target: DeviceDescription = GPU
) -> Plan:
    return plan_recipe(
        Recipe.from_dict(values | {"memory": values.get("memory", {}) | {"vram": f"{gibs}GiB"}}),
        target,
        0,
        host_budget=host,
    )


def changed(values: dict[str, Any], words: str) -> dict[str, Any]:
    """Values with `section.key=value ...` put in, as on the command line."""
    values = {section: dict(keys) for section, keys in values.items()}
    for word in words.split():
        path, _, value = word.partition("=")
        section, _, key = path.partition(".")
        number = int(value) if value.isdigit() else {"true": True}.get(value, value)
        values.setdefault(section, {})[key] = number
    return values


ONE_BY_ONE = {"micro_batch_size": 1, "gradient_accumulation_steps": 16}
CASES = [
    (values_of(), 24, AMPLE),
    (values_of(), 8, HostBudget(20 * GIB, 2048 * GIB)),
    (values_of(data={"sequence_length": 32768}, training={"batch_size": 1}), 2, AMPLE),
    (values_of(training={"micro_batch_size": 16, "gradient_accumulation_steps": 1}), 3, AMPLE),
    (values_of(memory={"weights": "ram"}, training=ONE_BY_ONE), 8, HostBudget(4 * GIB, 100 * GIB)),
    (values_of(lora={"rank": 512}, training=ONE_BY_ONE | {"optimizer": "adamw"}), 5, AMPLE),
]


@pytest.mark.parametrize(("values", "gibs", "host"), CASES, ids=range(len(CASES)))
def test_each_line_is_a_plan_that_fits(values: dict[str, Any], gibs: float, host: HostBudget) -> None:
    plan = planned(values, gibs, host)
    assert plan.advice and len(plan.advice) <= 3
    for line in plan.advice:
        words, _, told = line.partition(": ")
        other = planned(changed(values, words), gibs, host)
        assert other.fits, words
        assert told.startswith(
            f"{gib(other.peak_vram_bytes)} on the device, {gib(other.peak_ram_bytes)} of RAM, "
            f"{duration(other.step_seconds)} a step"
        )
        if plan.fits:
            peaks = [(p.peak_vram_bytes, p.peak_ram_bytes) for p in (other, plan)]
            assert any(less < more for less, more in zip(*peaks, strict=True))


def test_what_does_not_fit_on_the_disk_is_no_advice() -> None:
    """Streaming from disk would need the quantized base there."""
    values = values_of(training=ONE_BY_ONE)
    plan = planned(values, 24)
    assert any("memory.weights=disk" in line for line in plan.advice)
    full = replace(AMPLE, disk_bytes=sum(plan.disk.values()) - 1)
    refused = planned(values, 24, full)
    assert [problem.split(":")[0] for problem in refused.problems] == ["disk"]
    assert not any("memory.weights" in line for line in refused.advice)


def test_it_is_made_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = from_recipe.make_plan

    def counted(*arguments: Any) -> Plan:
        made.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(from_recipe, "make_plan", counted)
    values = values_of(training=ONE_BY_ONE)
    plan = planned(values, 12)
    before = len(made)
    plan.to_dict()
    assert len(made) == before
    assert plan.advice is plan.advice and before < len(made) <= before + 3


def test_on_a_cpu_there_is_no_other_ram_to_go_to() -> None:
    plan = planned(values_of(model={"compute_dtype": "bfloat16"}, training=ONE_BY_ONE), 24, target=CPU)
    assert plan.fits and not any("weights=ram" in line for line in plan.advice)
