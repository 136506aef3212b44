"""Plan popular bases on common cards: qlora_train/plan/card_table.json, and the table in README.md.

python .ci/card_table.py        (make table; some minutes, no GPU, no network)
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_train.device.cards import CARDS
from qlora_train.device.description import DeviceDescription, planned_gpu
from qlora_train.plan.card_table import FILE, ROW_TOKENS, rounded_seconds
from qlora_train.plan.from_recipe import plan_recipe
from qlora_train.plan.host_budget import HostBudget, usable_ram
from qlora_train.plan.model_shape import known_shape
from qlora_train.plan.words import duration
from qlora_train.recipe import Recipe

GIB = 2**30
RAM_GIB, DISK_GIB, SEQUENCE_LENGTH, RANK, BATCH_SIZE = 32, 500, 2048, 16, 16
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
    "google/gemma-3-27b-it",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-32B",
    "meta-llama/Llama-3.3-70B-Instruct",
)
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- planned by make table -->\n", "<!-- end of the table -->\n"


def main() -> None:
    bases = {base: {card: planned_cell(base, card) for card in OF_CARDS} for base in BASES}
    lines = ",\n".join(f"  {json.dumps(base)}: {json.dumps(cells)}" for base, cells in bases.items())
    FILE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    table = markdown(bases)
    README.write_text(before + BEGIN + table + END + rest.partition(END)[2], encoding="utf-8")


def planned_cell(base: str, card: str) -> dict[str, float] | None:
    """What a run on a card takes; None where it does not fit."""
    recipe = Recipe.from_dict(
        {
            "model": {"base": base},
            "lora": {"rank": RANK},
            "data": {"train": "any", "sequence_length": SEQUENCE_LENGTH},
            "training": {"batch_size": BATCH_SIZE},
        }
    )
    host = HostBudget(usable_ram(RAM_GIB * GIB), DISK_GIB * GIB)
    plan = plan_recipe(
        recipe, _gpu(card), CARDS[card].memory_gib * GIB, shape=known_shape(base), host_budget=host
    )
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


def markdown(bases: dict[str, dict[str, Any]]) -> str:
    """The table of README.md."""
    heads = [f"{CARDS[card].memory_gib} GB ({card})" for card in OF_CARDS]
    rows = [
        [base.rpartition("/")[2], *(_in_words(cell) for cell in cells.values())]
        for base, cells in bases.items()
    ]
    ruled = [["base", *heads], ["---"] * (1 + len(heads)), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


def _in_words(cell: dict[str, float] | None) -> str:
    if cell is None:
        return "no"
    return f"{cell['vram_gib']:.1f} + {cell['ram_gib']:.1f}, {duration(cell['seconds'])}"


if __name__ == "__main__":
    main()
