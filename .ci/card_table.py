"""Plan popular bases on common cards: qlora_train/plan/card_table.json, a recipe for each base, and the table
in README.md.

python .ci/card_table.py        (make table; some minutes, no GPU, no network)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_train.device.cards import CARDS
from qlora_train.device.description import DeviceDescription, planned_gpu
from qlora_train.init.new_recipe import (
    by_size,
    command_lines,
    comments_for,
    first_values,
    recipe_of,
    recipe_text,
)
from qlora_train.plan.base_config import KNOWN, known_name
from qlora_train.plan.card_table import FILE, ROW_TOKENS, rounded_seconds
from qlora_train.plan.from_recipe import plan_recipe
from qlora_train.plan.host_budget import HostBudget, usable_ram
from qlora_train.plan.model_shape import known_shape
from qlora_train.plan.words import duration, parameter_count
from qlora_train.recipe import Recipe

GIB = 2**30
RAM_GIB, DISK_GIB = 32, 500
OF_CARDS = ("RTX 4050", "RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090", "RTX A6000")
BASES = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "Qwen/Qwen3-0.6B",
    "google/gemma-3-1b-it",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "meta-llama/Llama-3.2-1B-Instruct",
    "Qwen/Qwen3-1.7B",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "HuggingFaceTB/SmolLM3-3B",
    "meta-llama/Llama-3.2-3B-Instruct",
    "google/gemma-3-4b-it",
    "Qwen/Qwen3-4B",
    "mistralai/Mistral-7B-Instruct-v0.3",
    "meta-llama/Llama-3.1-8B-Instruct",
    "Qwen/Qwen3-8B",
    "google/gemma-3-12b-it",
    "mistralai/Mistral-Nemo-Instruct-2407",
    "microsoft/phi-4",
    "Qwen/Qwen3-14B",
    "openai/gpt-oss-20b",
    "mistralai/Mistral-Small-24B-Instruct-2501",
    "google/gemma-4-26B-A4B-it",
    "google/gemma-3-27b-it",
    "Qwen/Qwen3-30B-A3B",
    "google/gemma-4-31B-it",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.3-70B-Instruct",
)
ROW = {
    "messages": [
        {"role": "user", "content": "My parcel is late. What can I do?"},
        {"role": "assistant", "content": "I am sorry! Tell me its number, and I look where it is."},
    ]
}
"""Of the data: every base of the table has a chat template of its own."""
NO_THOUGHTS = "for answers without thoughts: chat_template_kwargs: {enable_thinking: false}"
ABOUT_TEMPLATES = {
    "qwen3": NO_THOUGHTS,
    "qwen3_moe": NO_THOUGHTS,
    "smollm3": NO_THOUGHTS,
    "gpt_oss": "the system message says how much is thought: chat_template_kwargs: {reasoning_effort: low}",
}
"""By family, a setting that its chat template reads."""
ABOUT_EXPERTS = (
    "the experts' weights are not among them; training these too takes more memory and time:\n"
    "target_parameters: [experts.gate_up_proj, experts.down_proj]"
)
ABOUT_MXFP4 = "of all but the experts, which stay in MXFP4, as they are published"
REPOSITORY = Path(__file__).parent.parent
README, RECIPES = REPOSITORY / "README.md", REPOSITORY / "recipes"
BEGIN, END = "<!-- planned by make table -->\n", "<!-- end of the table -->\n"


def main() -> None:
    write_files({base: planned_base(base) for base in BASES})


def write_files(table: Mapping[str, Mapping[str, Any]]) -> None:
    """The kept table, the table of README.md, and the recipes."""
    lines = ",\n".join(f"  {json.dumps(base)}: {json.dumps(planned)}" for base, planned in table.items())
    FILE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + markdown(table) + END + rest.partition(END)[2], encoding="utf-8")
    for base, planned in table.items():
        (RECIPES / f"{known_name(base)}.yaml").write_text(recipe_file(base, planned), encoding="utf-8")


def planned_base(base: str) -> dict[str, Any]:
    """The line of the table about a base: its size, and what its recipe takes on each card."""
    shape = known_shape(base)
    assert shape is not None, f"{base} is not in known_models.py"
    recipe = recipe_of(values_of(base, shape.num_parameters))
    cards = {card: planned_cell(recipe, card) for card in OF_CARDS}
    return {"num_parameters": shape.num_parameters, "cards": cards}


def planned_cell(recipe: Recipe, card: str) -> dict[str, float] | None:
    """What a run on a card takes; None where it does not fit."""
    shape = known_shape(recipe.model.base)
    host = HostBudget(usable_ram(RAM_GIB * GIB), DISK_GIB * GIB)
    plan = plan_recipe(recipe, _gpu(card), CARDS[card].memory_gib * GIB, shape=shape, host_budget=host)
    if not plan.fits:
        return None
    return {
        "vram_gib": round(plan.peak_vram_bytes / GIB, 1),
        "ram_gib": round(plan.peak_ram_bytes / GIB, 1),
        "seconds": rounded_seconds(plan.seconds_per_million_tokens * 1000 * ROW_TOKENS / 1e6),
    }


def _gpu(card: str) -> DeviceDescription:
    """A card with everything installed, under Linux, whatever this machine is."""
    return replace(
        planned_gpu(card, None),
        varlen="grouped heads",
        has_triton=True,
        has_liger=True,
        cublas_workspace=None,
        has_expandable_segments=True,
    )


def values_of(base: str, num_parameters: int) -> dict[str, str]:
    """The recipe of a base, as `init` would write it."""
    return first_values(base, "my.jsonl", known_name(base)) | by_size(num_parameters)


def recipe_file(base: str, planned: Mapping[str, Any]) -> str:
    """The recipe of a base as text, with what was planned. planned: the base's line of the table."""
    name = known_name(base)
    head = [
        f"{base} on chats of yours: a base of {parameter_count(planned['num_parameters'])} parameters",
        "",
        f"planned, not measured: VRAM + RAM in GiB, time for 1,000 rows of {ROW_TOKENS} tokens",
        *(_card_line(card, cell) for card, cell in planned["cards"].items()),
        f'each by: qlora-train plan {name} --card "{OF_CARDS[0]}" --ram {RAM_GIB}GiB',
        "",
        "next, with your rows in my.jsonl:",
        f"  qlora-train recipes copy {name}",
        *command_lines(f"{name}.yaml"),
    ]
    return recipe_text(head, values_of(base, planned["num_parameters"]), _comments(base))


def _card_line(card: str, cell: Mapping[str, float] | None) -> str:
    memory = f"{CARDS[card].memory_gib} GB ({card})"
    return f"  {memory:<18} {'does not fit' if cell is None else _in_words(cell)}"


def _comments(base: str) -> dict[str, str]:
    """Those that `init` writes, and what is to be known of this base and its data."""
    config, comments = KNOWN[known_name(base)], comments_for("chat")
    about_template = ABOUT_TEMPLATES.get(config["model_type"])
    about_rows = ["chats, one row a line:", json.dumps(ROW), *([about_template] if about_template else [])]
    comments["data.train"] = "\n".join(about_rows)
    if "quantization_config" in config:
        comments["model.quantization"] += f";\n{ABOUT_MXFP4}"
    if {"num_experts", "num_local_experts"} & set(config):
        comments["lora.target_modules"] += f"\n{ABOUT_EXPERTS}"
    return comments


def markdown(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of README.md."""
    heads = [f"{CARDS[card].memory_gib} GB ({card})" for card in OF_CARDS]
    rows = [
        [
            base.rpartition("/")[2],
            *("no" if cell is None else _in_words(cell) for cell in planned["cards"].values()),
        ]
        for base, planned in table.items()
    ]
    ruled = [["base", *heads], ["---"] * (1 + len(heads)), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


def _in_words(cell: Mapping[str, float]) -> str:
    return f"{cell['vram_gib']:.1f} + {cell['ram_gib']:.1f}, {duration(cell['seconds'])}"


if __name__ == "__main__":
    main()
