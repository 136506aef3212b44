"""The house: imports go one way, from lower to higher floors only, and no file grows past its budget."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "qlora_train"
MAX_LINES = 400
FLOORS = {
    "errors": 0,
    "boundary": 1,
    "interrupts": 1,
    "terminal_text": 1,
    "units": 0,
    "rows_file": 2,
    "recipe": 1,
    "device": 1,
    "files": 1,
    "micro_batch": 1,
    "kernels": 2,
    "data": 3,
    "quant": 3,
    "adapter": 3,
    "model": 4,
    "recipe_paths": 4,
    "weights": 6,
    "walk": 7,
    "plan": 8,
    "doctor": 8,
    "init": 9,
    "train": 9,
    "generate": 9,
    "export": 10,
    "report": 8,
    "cli": 12,
    "__init__": 13,
    "__main__": 13,
}
STRANGERS = ({"data", "model"}, {"data", "quant"}, {"recipe", "device"})
"""Pairs on one floor that do not know each other at all."""
LIGHT = (
    "errors",
    "boundary",
    "interrupts",
    "recipe",
    "recipe_paths",
    "terminal_text",
    "units",
    "cli",
    "__init__",
    "__main__",
)
LIGHT_MAY_IMPORT = {"pydantic", "ruamel"}

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted(f for top in ("qlora_train", "recipes", "tests") for f in (REPOSITORY / top).rglob("*.py"))


def unit_of(file: Path) -> str:
    """The folder or file of the first level that a module belongs to."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def imported_names(tree: ast.AST) -> list[str]:
    """Every dotted name an import statement reaches, wherever in the file it stands."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written absolutely"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def imported_units(file: Path) -> set[str]:
    """The units of this package that a module imports; `__version__` belongs to nobody."""
    inside = [name.split(".")[1:] for name in imported_names(parse(file)) if name.startswith("qlora_train.")]
    units = {parts[0] for parts in inside if parts[0] != "__version__"}
    return {unit if unit in FLOORS else "__init__" for unit in units}


def name_of(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def test_every_unit_has_a_floor() -> None:
    assert {unit_of(file) for file in MODULES} <= set(FLOORS)


def test_no_module_imports_a_higher_floor() -> None:
    for file in MODULES:
        floor = FLOORS[unit_of(file)]
        too_high = {unit for unit in imported_units(file) if FLOORS[unit] > floor}
        assert not too_high, f"{name_of(file)} (floor {floor}) imports {sorted(too_high)}"


def test_units_on_one_floor_have_no_cycle() -> None:
    graph: dict[str, set[str]] = {unit: set() for unit in FLOORS}
    for file in MODULES:
        graph[unit_of(file)] |= imported_units(file) - {unit_of(file)}
    TopologicalSorter(graph).prepare()  # raises CycleError
    for pair in STRANGERS:
        assert not any(graph[unit] & pair for unit in pair), f"{sorted(pair)} import each other"


def test_light_modules_import_no_heavy_library_at_the_top() -> None:
    for file in (file for file in MODULES if unit_of(file) in LIGHT):
        tree = parse(file)
        at_the_top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
        roots = {name.split(".")[0] for name in imported_names(at_the_top)}
        third_party = {root for root in roots - {"qlora_train"} if root not in _standard_library()}
        assert third_party <= LIGHT_MAY_IMPORT, f"{name_of(file)} imports {sorted(third_party)}"


def _standard_library() -> frozenset[str]:
    import sys

    return frozenset(sys.stdlib_module_names)


def test_files_are_short() -> None:
    num_lines = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in SOURCES}
    assert not {name: number for name, number in num_lines.items() if number > MAX_LINES}


def test_every_module_says_what_it_is() -> None:
    assert not [name_of(file) for file in MODULES if not ast.get_docstring(parse(file))]


TEXT_METHODS = {"open", "read_text", "write_text", "reconfigure"}


def calls_without_encoding(tree: ast.AST) -> list[int]:
    """Lines that read or write text in whatever encoding the locale has."""
    lines = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        is_binary = name == "open" and any("b" in text and set(text) <= set("rwab+x") for text in texts)
        in_os = name == "open" and ast.unparse(node.func) == "os.open"
        says = any(k.arg in ("encoding", "errors", "buffering") for k in node.keywords) or "utf-8" in texts
        if name in TEXT_METHODS and not (is_binary or in_os or says):
            lines.append(node.lineno)
    return lines


def test_text_is_utf_8_whatever_the_locale() -> None:
    lines = {name_of(file): calls_without_encoding(parse(file)) for file in MODULES}
    assert not {name: found for name, found in lines.items() if found}


def test_the_reader_of_encodings_sees_them() -> None:
    wrong = "p.open('a')\np.read_text()\np.write_text(t)\nopen(p)\n"
    right = "p.open('rb')\np.read_text('utf-8')\np.write_text(t, encoding='utf-8')\nos.open(p, 0)\n"
    assert calls_without_encoding(ast.parse(wrong + right)) == [1, 2, 3, 4]


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import torch.nn as nn\nfrom qlora_train import __version__, train\n"
        "def f():\n    from qlora_train.files.shards import read\n    import qlora_train.cli\n"
    )
    assert "torch.nn" in imported_names(parse(file))
    assert imported_units(file) == {"train", "files", "cli"}
