"""`qlora-train init`: writes a commented recipe for a base and data, after planning it for a card.

What is written is what `plan`, `preview` and `train` accept: the data are opened, small ones read, and the
longest sequence is taken that they need and whose plan fits. Comments name where a value comes from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from qlora_train.data.building import open_data
from qlora_train.data.formats import CHAT_FORMATS
from qlora_train.errors import UserError
from qlora_train.init.small_data import SmallData, read_small
from qlora_train.plan.base_config import find_base_folder, find_config
from qlora_train.plan.command import values_of
from qlora_train.plan.report import summary_lines
from qlora_train.plan.request import PlanRequest, request_of
from qlora_train.plan.words import refusal
from qlora_train.recipe import Recipe
from qlora_train.recipe_paths import require_paths

SEQUENCE_LENGTHS = (2048, 1024, 512, 256)
LARGE_MODEL = 30e9
SOURCES = (
    "sources of the comments:",
    "  QLoRA: Dettmers et al. 2023, arXiv:2305.14314",
    "  LoRA Without Regret: Schulman et al. 2025, thinkingmachines.ai/blog/lora",
    "  LoRA Learns Less and Forgets Less: Biderman et al. 2024, arXiv:2405.09673",
    "  rsLoRA: Kalajdzievski 2023, arXiv:2312.03732",
)

Values = dict[str, str]
"""`section.key` -> value as YAML text, in the order of the file."""


@dataclass(frozen=True)
class Goal:
    """What a run is for. formats: of its data. reason: for the rank, with its source."""

    formats: frozenset[str]
    rank: int
    reason: str


_FEW = "with LoRA on all linears it makes no difference to the result (QLoRA, appendix A)"
_MANY = "new knowledge takes more rank than new manners (LoRA Learns Less and Forgets Less)"
_MICRO_BATCHES = {"training.micro_batch_size", "training.gradient_accumulation_steps"}
_LENGTH_OF_STEPS = {"training.batch_size", "training.max_steps", *_MICRO_BATCHES}
GOALS = {
    "chat": Goal(frozenset({"messages", "sharegpt"}), 16, _FEW),
    "instruct": Goal(frozenset({"alpaca", "prompt_completion"}), 16, _FEW),
    "completion": Goal(frozenset({"text"}), 64, _MANY),
}
"""Conversations; instructions with one answer each; plain text."""


def init_command(
    base: str,
    data: str,
    *,
    goal: str | None,
    card: str | None,
    ram_bytes: int | None,
    out: Path | None,
    overrides: Sequence[str],
) -> None:
    """Write the recipe and print what was planned. goal: None: by the data. card, ram_bytes: see
    `request_of`. out: None: named after the data. overrides: `section.key=value`.

    Raises `UserError` for what does not agree or does not fit, and for a file that is already there."""
    file = out or Path(f"{_name_of(data)}.yaml")
    if file.exists():
        raise UserError(f"{file} is already there; name another file with --out")
    changes = dict(map(_change, overrides))
    values, goal = _before_planning(base, data, _name_of(file.name), changes, goal)
    small = read_small(recipe_of(values))
    if small is not None and "data.eval" not in changes:
        values["data.eval"] = "null" if small.eval_share is None else str(small.eval_share)
    request, plan = _longest_that_fits(values, changes, small, card, ram_bytes)
    values |= _of_data(request.recipe)
    values |= by_size(plan["num_parameters"]) | changes
    training = request.recipe.training
    num_steps = (
        training.max_steps if small is None else training.num_steps(small.bins_per_epoch(request.recipe))
    )
    verdict = [
        f"planned, not measured, for {request.assumed or request.device_text}:",
        *summary_lines(plan, num_steps),
    ]
    commands = ["next:", *command_lines(file)]
    with open(file, "x", encoding="utf-8") as written:
        head = [f"{base} on {data}, for {goal}", "", *verdict, "", *commands]
        written.write(recipe_text(head, values, comments_for(goal)))
    print("\n".join([str(file), *verdict, *commands]))


def _name_of(path: str) -> str:
    """A name for a recipe or a run, after a path."""
    return re.sub(r"[^\w-]+", "-", Path(path).name.partition(".")[0]) or "recipe"


def _before_planning(
    base: str, data: str, name: str, changes: Values, said_goal: str | None
) -> tuple[Values, str]:
    """(the recipe with the longest sequences, its goal). name: of the run. Raises `UserError` for what is
    wrong or not there."""
    values = first_values(base, data, name) | changes
    if "training.max_steps" in changes:
        del values["training.epochs"]
    if changes.keys() >= _MICRO_BATCHES and "training.batch_size" not in changes:
        del values["training.batch_size"]
    recipe = recipe_of(values)
    require_paths(recipe)
    formats = _formats(recipe)
    goal = _goal(formats, said_goal)
    rank = GOALS[goal].rank
    values |= {"lora.rank": str(rank), "lora.alpha": str(2 * rank)}
    if (formats or GOALS[goal].formats) & CHAT_FORMATS and _lacks_chat_template(recipe.model.base):
        values["model.chat_template"] = "plain"
    return values | changes, goal


def _longest_that_fits(
    values: Values, changes: Values, small: SmallData | None, card: str | None, ram_bytes: int | None
) -> tuple[PlanRequest, Mapping[str, Any]]:
    """The request with the longest sequences whose plan fits, but no longer than small data need, and the
    plan; a length in `changes` is the only one. Raises `UserError` where none fits."""
    recipe = recipe_of(values)
    is_given = "data.sequence_length" in changes
    of_batch = small if changes.keys().isdisjoint(_LENGTH_OF_STEPS) else None
    for length in [recipe.data.sequence_length] if is_given else _lengths(recipe, small):
        recipe = recipe_of(values | {"data.sequence_length": str(length)})
        if of_batch is not None:
            batch_size = str(of_batch.needed_batch_size(recipe))
            recipe = recipe_of(values | _of_data(recipe) | {"training.batch_size": batch_size})
        request = request_of(recipe, card, ram_bytes)
        plan = values_of(request)
        if plan["fits"]:
            return request, plan
    raise refusal(plan["problems"], plan["floor"], plan["advice"])


def _of_data(recipe: Recipe) -> Values:
    """The values that are chosen for the data."""
    values = {"data.sequence_length": str(recipe.data.sequence_length)}
    if recipe.training.batch_size is not None:
        values["training.batch_size"] = str(recipe.training.batch_size)
    return values


def _change(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or "." not in name:
        raise UserError(f"{text}: is not section.key=value, such as data.sequence_length=1024")
    return name, value


def first_values(base: str, data: str, name: str) -> Values:
    """The recipe before goal and plan are known. name: of the run."""
    return {
        "model.base": _scalar(base),
        "model.quantization": "nf4",
        "lora.rank": "16",
        "lora.alpha": "32",
        "lora.target_modules": "all-linear",
        "data.train": _scalar(data),
        "data.eval": "0.02",
        "data.sequence_length": str(SEQUENCE_LENGTHS[0]),
        "training.output_dir": _scalar(f"runs/{name}"),
        "training.epochs": "1",
        "training.batch_size": "16",
        "training.learning_rate": "2.0e-4",
    }


def by_size(num_parameters: int) -> Values:
    """What the size of the base changes."""
    return {"training.learning_rate": "1.0e-4"} if num_parameters >= LARGE_MODEL else {}


def command_lines(file: str | Path) -> list[str]:
    """The commands that take a recipe further, in their order."""
    return [f"  qlora-train {command} {file}" for command in ("preview", "plan", "train")]


def comments_for(goal: str) -> dict[str, str]:
    """Lines above keys, with the source of what is claimed."""
    return {
        "model.chat_template": "the base has none of its own: chatml, plain, instruction or a Jinja file",
        "model.quantization": "fine-tuned, as good as 16 bits (QLoRA, section 4)",
        "lora.rank": GOALS[goal].reason,
        "lora.alpha": "beyond rank 64, use_rslora: true keeps updates from shrinking (rsLoRA)",
        "lora.target_modules": "all of them are needed to match full fine-tuning (QLoRA, figure 2);\n"
        "MLPs matter most, attention alone falls behind (LoRA Without Regret)",
        "data.eval": "a share of the rows, held out by content",
        "data.sequence_length": "tokens of a bin, which rows are packed into; longer ones are cut\n"
        "(data.too_long: cut, drop or split)",
        "training.epochs": "fewer where the evaluation's loss rises again",
        "training.batch_size": "bins of a step; large batches cost LoRA more than full fine-tuning\n"
        "(LoRA Without Regret)",
        "training.learning_rate": "2e-4 up to 13B parameters, 1e-4 from 33B on (QLoRA, appendix B);\n"
        "about 10 times that of full fine-tuning, at any rank (LoRA Without Regret)",
    }


def recipe_text(head: Sequence[str], values: Values, comments: Mapping[str, str]) -> str:
    """A recipe file. head: lines that say what it is. comments: lines above keys."""
    said = "".join(f"# {line}".rstrip() + "\n" for line in (*head, "", *SOURCES))
    return f"{said}\n{_yaml(values, comments)}"


def _yaml(values: Values, comments: Mapping[str, str]) -> str:
    lines = []
    for section, names in groupby(sorted(values, key=_section_order), lambda name: name.partition(".")[0]):
        lines.append(f"{section}:")
        for name in names:
            lines += [f"  # {line}" for line in comments.get(name, "").splitlines()]
            lines.append(f"  {name.partition('.')[2]}: {values[name]}")
    return "\n".join(lines) + "\n"


def _section_order(name: str) -> int:
    sections = [*Recipe.model_fields]
    section = name.partition(".")[0]
    return sections.index(section) if section in sections else len(sections)


def recipe_of(values: Values) -> Recipe:
    """Raises `RecipeError` for keys and values that are wrong."""
    content: Any = YAML(typ="safe", pure=True).load(_yaml(values, {}))
    return Recipe.from_dict(content)


def _scalar(text: str) -> str:
    """Text as a YAML scalar."""
    is_plain = re.fullmatch(r"[A-Za-z./][\w./-]*", text) and text not in ("true", "false", "null", ".")
    return text if is_plain else json.dumps(text)


def _lengths(recipe: Recipe, small: SmallData | None) -> list[int]:
    """Sequence lengths to try, the longest first."""
    positions = int(find_config(recipe.model.base).get("max_position_embeddings") or SEQUENCE_LENGTHS[0])
    longest = min(SEQUENCE_LENGTHS[0], positions)
    if small is not None:
        longest = min(longest, small.needed_length)
    return [longest, *(length for length in SEQUENCE_LENGTHS if length < longest)]


def _goal(formats: frozenset[str], said: str | None) -> str:
    """The goal that is said, or else that of the data. formats: of the data; empty: unknown. Raises
    `UserError` where these differ."""
    if not formats:
        return said or "instruct"
    found = next((name for name, goal in GOALS.items() if formats <= goal.formats), "instruct")
    if said not in (None, found):
        raise UserError(f"--goal {said}: the data are {' and '.join(sorted(formats))}; say --goal {found}")
    return found


def _formats(recipe: Recipe) -> frozenset[str]:
    """The formats of the data; none if they are on the hub, from which nothing is downloaded here. Raises
    `DataError` for data of no format."""
    is_here = all(Path(source.path).exists() for source in recipe.data.train)
    return open_data(recipe.data).formats if is_here else frozenset()


def _lacks_chat_template(base: str) -> bool:
    """Whether a base that is on this machine has no chat template of its own."""
    folder = find_base_folder(base)
    if folder is None or (folder / "chat_template.jinja").is_file():
        return False
    config = folder / "tokenizer_config.json"
    return not config.is_file() or "chat_template" not in json.loads(config.read_bytes())
