"""The commands about recipes: `qlora-train recipes`, `recipes show`, `recipes copy` and `init`."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_train.cli.generate import AddCommand
from qlora_train.cli.types import size
from qlora_train.errors import UserError
from qlora_train.recipe.files import bundled_recipes
from qlora_train.recipe.yaml_file import nearest


def add_init(command: AddCommand) -> None:
    """Add `init`."""
    init = command("init", "write a commented recipe that fits a card", run=_init)
    init.add_argument("--base", metavar="MODEL", help="a hub id or a folder (asked for at a terminal)")
    init.add_argument("--data", metavar="DATA", help="a file, a folder or a hub id (asked for, too)")
    init.add_argument(
        "--goal", choices=("chat", "instruct", "completion"), help="default: what the data are for"
    )
    init.add_argument("--card", metavar="NAME", help='for another card than this machine\'s, "RTX 4090"')
    init.add_argument("--ram", type=size, metavar="SIZE", help="of another machine, such as 64GiB")
    init.add_argument("--out", type=Path, metavar="FILE", help="default: named after the data")
    init.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="keys of the recipe")


def add_recipes(command: AddCommand) -> None:
    """Add `recipes`, `recipes show` and `recipes copy`."""
    recipes = command("recipes", "list, show or copy the bundled recipes", run=_list)
    actions = recipes.add_subparsers(metavar="show | copy")
    show = actions.add_parser("show", help="print a recipe")
    show.add_argument("name", metavar="NAME")
    show.set_defaults(run=_show)
    copy = actions.add_parser("copy", help="copy a recipe, with its data where they come with it")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=Path("."))
    copy.set_defaults(run=_copy)


def _init(args: argparse.Namespace) -> None:
    base = args.base or _asked("--base", "base model (a hub id or a folder)", _planned_lines)
    data = args.data or _asked("--data", "data (a file, a folder or a hub id)")
    from qlora_train.init.new_recipe import init_command

    init_command(
        base,
        data,
        goal=args.goal,
        card=args.card,
        ram_bytes=args.ram,
        out=args.out,
        overrides=args.overrides,
    )


def _asked(flag: str, what: str, choices: Callable[[], Sequence[str]] = tuple) -> str:
    """The answer of a person at the terminal. choices: lines to show before. Raises `UserError` without."""
    answer = ""
    if sys.stdin.isatty():
        print(*choices(), sep="\n")
        with contextlib.suppress(EOFError):
            answer = input(f"{what}: ").strip()
    if not answer:
        raise UserError(f"{flag} is missing: {what}")
    return answer


def _list(args: argparse.Namespace) -> None:
    from qlora_train.plan.card_table import planned_recipes

    recipes = bundled_recipes()
    others = sorted(set(recipes) - planned_recipes())
    width = max(map(len, others), default=0)
    for name in others:
        first_line = recipes[name].read_text(encoding="utf-8").partition("\n")[0]
        print(f"  {name:<{width}}  {first_line.lstrip('# ')}")
    print("", *_planned_lines(), "", sep="\n")
    print("next: qlora-train recipes copy NAME, or qlora-train init for another base")


def _planned_lines() -> list[str]:
    """The recipes of the table's bases, with those marked that fit this machine."""
    from qlora_train.plan.card_table import planned_lines
    from qlora_train.plan.request import free_here

    return planned_lines(*free_here())


def _show(args: argparse.Namespace) -> None:
    print(_bundled(args.name).read_text(encoding="utf-8"), end="")


def _copy(args: argparse.Namespace) -> None:
    file = _bundled(args.name)
    source = file.parent if file.name == "recipe.yaml" else file
    target = args.folder / source.name
    if target.exists():
        raise UserError(
            f"{target} is already there; name another folder: qlora-train recipes copy {args.name} DIR"
        )
    try:
        args.folder.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{args.folder}: a file is in the way ({error}); name another folder") from error
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copyfile(source, target)
    print(target)


def _bundled(name: str) -> Path:
    recipes = bundled_recipes()
    if name not in recipes:
        hint = nearest(name, recipes)
        raise UserError(f"{name}: no such bundled recipe; see qlora-train recipes{hint}")
    return recipes[name]
