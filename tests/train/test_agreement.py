"""What the ranks of a launch must agree on before they train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import recipe_values, reversal_rows, write_base, write_rows

from qlora_train.errors import UserError
from qlora_train.recipe import Recipe
from qlora_train.train import run
from qlora_train.train.agreement import require_agreement
from qlora_train.weights.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Told(Ranks):
    """Ranks of which the others tell this."""

    others: tuple[Any, ...] = ()

    def gather(self, value: Any) -> list[Any]:
        return [value, *self.others]


def test_who_differs_in_what_is_named() -> None:
    facts = {"data.seed": 1, "the training data": "a", "the checkpoint's step": 3}
    require_agreement(ALONE, lambda: pytest.fail("nobody else is there"))
    require_agreement(Told(number=3, others=(dict(facts), dict(facts))), lambda: facts)
    others = (facts | {"data.seed": 2}, facts, facts | {"the training data": "b", "the checkpoint's step": 0})
    with pytest.raises(UserError) as caught:
        require_agreement(Told(number=4, others=others), lambda: facts)
    assert "process 1: data.seed; process 3: the training data, the checkpoint's step. Give" in str(
        caught.value
    )


def facts_of_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, base: Path, train_file: Path, **sections: Any
) -> dict[str, Any]:
    """What this run would tell the others."""
    found: list[dict[str, Any]] = []

    def told(ranks: Ranks, facts_here: Callable[[], dict[str, Any]]) -> None:
        found.append(facts_here())
        raise InterruptedError

    monkeypatch.setattr(run, "require_agreement", told)
    with pytest.raises(InterruptedError):
        run.run_training(
            Recipe.from_dict(recipe_values(base, train_file, folder / "run", **sections)),
            lambda row: None,
            resume=False,
            use_cache=True,
        )
    return found[0]


def test_what_decides_a_run_is_told_and_places_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = [write_base(tmp_path / name / "base", seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    files = [write_rows(tmp_path / name / "rows.jsonl", reversal_rows(8)) for name in "ab"]

    def differing(base: Path, rows: Path, **sections: Any) -> set[str]:
        other = facts_of_run(tmp_path / "other", monkeypatch, base, rows, **sections)
        return {name for name in first if other[name] != first[name]}

    first = facts_of_run(tmp_path / "one", monkeypatch, bases[0], files[0])
    assert differing(bases[1], files[1]) == set()
    assert differing(bases[2], files[0]) == {"the base model's quantized weights"}
    changed = differing(bases[0], files[0], training={"seed": 7})
    assert {"training.seed", "the LoRA parameters"} <= changed
