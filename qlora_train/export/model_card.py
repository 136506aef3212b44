"""Writes a short model card (README.md) for an export: its base, how it was trained, on what, its licence.

No path of this machine is in it: a base or data in a folder are named by the folder's or file's name.
"""

from __future__ import annotations

import re
from pathlib import Path

from qlora_train.recipe import Recipe

CARD_FILE = "README.md"
_LICENSE = re.compile(r"^license(?:_name|_link)?:.*$", re.MULTILINE)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)


def model_card(recipe: Recipe, base_folder: Path, merged_onto: str, usage: str) -> str:
    """The text of a card. merged_onto: "original" or "dequantized". usage: how to run it, in Markdown."""
    model, lora, training = recipe.model, recipe.lora, recipe.training
    base = _published_name(model.base)
    number, unit = (training.max_steps, "step") if training.max_steps else (training.epochs or 1, "epoch")
    length = f"{number:g} {unit}" + ("" if number == 1 else "s")
    licence = _license_lines(base_folder)
    front = [f"base_model: {base}", *licence, "tags: [qlora]"]
    return "\n".join(
        [
            "---", *front, "---", "",
            f"# {base}, fine-tuned", "",
            f"LoRA of rank {lora.rank} (alpha {lora.alpha:g}), trained with qlora-train on the base in "
            f"{model.quantization} and merged onto its {merged_onto} weights.", "",
            f"- data: {', '.join(_published_name(source.path) for source in recipe.data.train)}",
            f"- training: {length}, learning rate {training.learning_rate:g}, sequences of "
            f"{recipe.data.sequence_length} tokens, seed {training.seed}",
            f"- licence of the base: {'; '.join(licence) if licence else 'not stated in its card'}",
            "", usage, "",
        ]
    )  # fmt: skip


def _published_name(path: str) -> str:
    """A hub id as it is; of a file or folder here the name alone."""
    return Path(path).name if Path(path).exists() or Path(path).is_absolute() else path


def _license_lines(base_folder: Path) -> list[str]:
    """What the base's own card says about its licence."""
    card = base_folder / CARD_FILE
    front = _FRONT_MATTER.match(card.read_text("utf-8", errors="replace")) if card.is_file() else None
    return _LICENSE.findall(front[1]) if front else []
