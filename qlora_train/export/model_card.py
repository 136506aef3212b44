"""Writes a short model card (README.md) for an export: its base, how it was trained, on what, its licence.

No path of this machine is in it: a base or data in a folder are named by the folder's or file's name. The
front matter is what the hub reads: `base_model` (only of a base on the hub) with `base_model_relation`,
`library_name`, `pipeline_tag`.
"""

from __future__ import annotations

import re
from pathlib import Path

from qlora_train.recipe import Recipe

CARD_FILE = "README.md"
BASE_CARD_FILE = "BASE_README.md"
"""The base's own card, in a folder of merged weights."""
_LIBRARIES = {"merged": ["library_name: transformers"], "adapter": ["library_name: peft"], "gguf": []}
_LICENSE = re.compile(r"^license(?:_name|_link)?:.*$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)


def model_card(recipe: Recipe, base_folder: Path, to: str, usage: str, merged_onto: str | None = None) -> str:
    """The text of a card. to: "merged", "gguf" or "adapter". usage: how to run it, in Markdown. merged_onto:
    "original" or "dequantized"; None: an adapter."""
    model, lora, training = recipe.model, recipe.lora, recipe.training
    base = published_base(model.base, base_folder)
    number, unit = (training.max_steps, "step") if training.max_steps else (training.epochs or 1, "epoch")
    length = f"{number:g} {unit}" + ("" if number == 1 else "s")
    licence = _license_lines(base_folder)
    relation = "adapter" if to == "adapter" else "finetune"
    on_hub = [f"base_model: {base}", f"base_model_relation: {relation}"]
    front = [
        *(on_hub if _is_snapshot(model.base, base_folder) else []),
        *_LIBRARIES[to],
        "pipeline_tag: text-generation",
        *licence,
        "tags: [qlora]",
    ]
    merged = f" and merged onto its {merged_onto} weights" if merged_onto else ", as an adapter"
    return "\n".join(
        [
            "---", *front, "---", "",
            f"# {base}, fine-tuned", "",
            f"LoRA of rank {lora.rank} (alpha {lora.alpha:g}), trained with qlora-train on the base in "
            f"{model.quantization}{merged}.", "",
            f"- data: {', '.join(_published_data(source.path) for source in recipe.data.train)}",
            f"- training: {length}, learning rate {training.learning_rate:g}, sequences of "
            f"{recipe.data.sequence_length} tokens, seed {training.seed}",
            f"- licence of the base: {'; '.join(licence) if licence else 'not stated in its card'}",
            "", usage, "",
        ]
    )  # fmt: skip


def published_base(base: str, base_folder: Path) -> str:
    """The base's name for others: its id on the hub, else the name of its folder."""
    return base if _is_snapshot(base, base_folder) else base_folder.name


def _is_snapshot(base: str, base_folder: Path) -> bool:
    """Whether the base's folder is in the hub's cache (models--org--name/snapshots/commit)."""
    return base_folder.parent.parent.name == f"models--{base.replace('/', '--')}"


def _published_data(path: str) -> str:
    """Of a file or folder the name alone; the same of a hub id, which a folder that is gone looks like."""
    return Path(path).name


def _license_lines(base_folder: Path) -> list[str]:
    """What the base's own card says about its licence."""
    card = base_folder / CARD_FILE
    front = _FRONT_MATTER.match(card.read_text("utf-8", errors="replace")) if card.is_file() else None
    return _LICENSE.findall(front[1]) if front else []
