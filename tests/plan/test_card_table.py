"""The table of bases and cards, and the recipe of each base: their figures are what the planner says now."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from tiny_runs import write_base

from qlora_train import cli, load_recipe
from qlora_train.plan import request as request_module
from qlora_train.plan.base_config import known_name
from qlora_train.plan.card_table import kept_table, planned_lines, planned_recipes
from qlora_train.plan.model_shape import known_shape
from qlora_train.plan.request import FoundCard, free_here
from qlora_train.recipe.files import bundled_recipes

REPOSITORY = Path(__file__).parent.parent.parent
GIB = 2**30
MAKER = runpy.run_path(str(REPOSITORY / ".ci" / "card_table.py"))
TABLE = kept_table()
FILES = {base: REPOSITORY / "recipes" / f"{known_name(base)}.yaml" for base in TABLE}


@pytest.mark.parametrize(
    ("base", "card"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "RTX 4050"),
        ("meta-llama/Llama-3.2-1B-Instruct", "RTX 4060"),
        ("google/gemma-3-1b-it", "RTX 4070"),
        ("meta-llama/Llama-3.1-8B-Instruct", "RTX 4090"),
    ],
)
def test_the_file_of_a_recipe_planned_anew_takes_what_the_table_says(base: str, card: str) -> None:
    recipe = load_recipe(FILES[base])
    assert MAKER["planned_cell"](recipe, card) == TABLE[base]["cards"][card], "run: make table"
    shape = known_shape(base)
    assert shape is not None and shape.num_parameters == TABLE[base]["num_parameters"], "run: make table"


def test_the_readme_shows_the_table_of_the_package() -> None:
    assert tuple(TABLE) == MAKER["BASES"]
    assert {tuple(planned["cards"]) for planned in TABLE.values()} == {MAKER["OF_CARDS"]}
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    begin, end = MAKER["BEGIN"], MAKER["END"]
    assert text.partition(begin)[2].partition(end)[0] == MAKER["markdown"](TABLE), "run: make table"


@pytest.mark.parametrize("base", TABLE)
def test_the_recipe_of_a_base_is_what_the_table_makes_of_it(base: str) -> None:
    text = FILES[base].read_text(encoding="utf-8")
    assert text == MAKER["recipe_file"](base, TABLE[base]), "run: make table"
    recipe = load_recipe(FILES[base])
    assert recipe.model.base == base and recipe.training.output_dir == f"runs/{known_name(base)}"
    large = TABLE[base]["num_parameters"] >= 30e9
    assert recipe.training.learning_rate == (1e-4 if large else 2e-4)


def test_no_recipe_of_a_base_is_left_over() -> None:
    bases = {name: load_recipe(file).model.base for name, file in bundled_recipes().items()}
    of_hub = {name for name, base in bases.items() if not Path(base).is_dir()}
    assert of_hub == planned_recipes() and len(of_hub) == len(TABLE)


def test_the_rows_that_recipes_show_are_read_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    files_of_row: dict[str, list[Path]] = {}
    for file in FILES.values():
        (row,) = re.findall(r"^ *# (\{.*\})$", file.read_text(encoding="utf-8"), re.MULTILINE)
        files_of_row.setdefault(row, []).append(file)
    for row, files in files_of_row.items():
        Path("my.jsonl").write_text(f"{row}\n", encoding="utf-8")
        changes = ["model.base=base", "data.format=messages", "data.eval=null"]
        assert cli.main(["preview", str(files[0]), *changes]) == 0, capsys.readouterr().err
        assert f"[[{json.loads(row)['messages'][-1]['content']}" in capsys.readouterr().out


def test_the_settings_that_recipes_speak_of_may_be_made() -> None:
    spoken_of = {
        ("lora", "target_parameters"): {"qwen3-30b-a3b", "gpt-oss-20b", "gemma-4-26b-a4b"},
        ("data", "chat_template_kwargs"): {
            name for name in planned_recipes() if name.startswith(("qwen3", "smollm3", "gpt-oss"))
        },
    }
    for (section, key), names in spoken_of.items():
        found = {
            known_name(base): settings[0]
            for base, file in FILES.items()
            if (settings := re.findall(rf"# .*{key}: (.*)", file.read_text(encoding="utf-8")))
        }
        assert set(found) == names
        for name, value in found.items():
            assert getattr(getattr(load_recipe(name, [f"{section}.{key}={value}"]), section), key)
            if key == "target_parameters":
                shape = known_shape(load_recipe(name).model.base)
                assert shape is not None
                ends = value.strip("[]").split(", ")
                assert all(any(path.endswith(f".{end}") for path in shape.expert_shapes) for end in ends)


def test_a_larger_card_takes_what_a_smaller_one_takes_and_is_not_slower() -> None:
    for base, planned in TABLE.items():
        cells = planned["cards"].values()
        fits = [cell is not None for cell in cells]
        assert fits == sorted(fits) and fits[-1], base
        seconds = [cell["seconds"] for cell in cells if cell][:-1]  # an RTX 4090 is the fastest
        assert seconds == sorted(seconds, reverse=True), base


def test_what_fits_a_machine_is_marked_and_has_its_figures() -> None:
    lines = planned_lines(23 * GIB, 14 * GIB)
    (marked,) = (line for line in lines if "llama-3.1-8b" in line)
    cell = TABLE["meta-llama/Llama-3.1-8B-Instruct"]["cards"]["RTX 4090"]
    assert marked.startswith("* ") and marked.endswith("  meta-llama/Llama-3.1-8B-Instruct")
    assert f" {cell['vram_gib']:.1f} {cell['ram_gib']:.1f} " in marked
    assert "* fits this machine, planned for an RTX 4090 (24 GB):" in lines[: lines.index(marked)]
    (unmarked,) = (line for line in lines if "gemma-3-27b" in line)
    assert "  planned for an RTX 4050 (6 GB):" in lines[lines.index(marked) : lines.index(unmarked)]
    assert unmarked.startswith("  ")
    for nothing in (planned_lines(0, 28 * GIB), planned_lines(23 * GIB, GIB // 4)):
        assert not any(line.startswith("*") for line in nothing)
        assert "  planned for an RTX 4050 (6 GB):" in nothing


def test_the_list_of_recipes_fits_a_terminal_and_names_each_recipe_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(request_module, "find_card", lambda: FoundCard("NVIDIA L4", 20 * GIB, (8, 9)))
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) < 50
    firsts = [words[0] for line in lines if (words := line.removeprefix("* ").split())]
    assert all(firsts.count(name) == 1 for name in bundled_recipes())


def test_what_is_free_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "find_card", lambda: FoundCard("NVIDIA L4", 20 * GIB, (8, 9)))
    assert free_here()[0] == 20 * GIB
    monkeypatch.setattr(request_module, "find_card", lambda: None)
    vram_bytes, ram_bytes = free_here()
    assert vram_bytes == 0 and ram_bytes > 0
