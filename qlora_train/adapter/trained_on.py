"""Records what an adapter was trained on in `trained_on.json` beside it, and checks it.

    base, revision, folder  the base as the recipe names it, and its folder relative to the run
    fingerprint             of the checkpoint's content: names, shapes, dtypes, sampled bytes of all tensors
    quantization, ...       how the base was quantized
    tokenizer, template     hashes of both
    step, num_steps         the optimizer step of the adapter, and the steps of the run

LoRA parameters fit any base of the same shapes, but on another one they give fluent nonsense, so a base with
another fingerprint is refused. The fingerprint does not depend on the folder's place or its shards: a base
that moved is the same.

It samples four windows of 1 KiB of each tensor, as a start must not read 16 GB. Two trainings of a model
differ in every tensor; changes of single numbers are not detected.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_train.boundary import read_json
from qlora_train.errors import BaseModelError
from qlora_train.files.hub import resolve_base
from qlora_train.files.shards import ShardReader
from qlora_train.recipe import ModelSection

FILE_NAME = "trained_on.json"
WINDOWS, WINDOW_BYTES = 4, 1024


@dataclass(frozen=True)
class TrainedOn:
    """The base, tokenizer and template of an adapter. See the module docstring."""

    base: str
    revision: str | None
    folder: str
    fingerprint: str
    quantization: str
    double_quant: bool
    compute_dtype: str
    tokenizer: str
    template: str

    @staticmethod
    def of(model: ModelSection, folder: Path, run: Path, tokenizer: PreTrainedTokenizerBase) -> TrainedOn:
        """The record of a run. model: its resolved section. folder: the base's. run: the run's folder."""
        return TrainedOn(
            model.base,
            model.revision,
            os.path.relpath(folder.absolute(), run.absolute()),
            checkpoint_fingerprint(folder),
            model.quantization,
            model.double_quant,
            model.compute_dtype,
            *tokenizer_hashes(tokenizer),
        )

    def to_json(self, step: int, num_steps: int) -> str:
        """The text of the file."""
        return json.dumps(asdict(self) | {"step": step, "num_steps": num_steps}, indent=1) + "\n"

    def check_base(self, folder: Path, adapter: Path) -> None:
        """Raise `BaseModelError` unless the folder holds the base that the adapter was trained on."""
        if checkpoint_fingerprint(folder) != self.fingerprint:
            raise BaseModelError(
                f"{folder}: is not the base that {adapter} was trained on ({self.base}): its weights differ. "
                "Put the base back, or train on this one."
            )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, adapter: Path) -> None:
        """Raise `BaseModelError` unless tokenizer and chat template are those of training."""
        found = tokenizer_hashes(tokenizer)
        for what, ours, theirs in zip(
            ("tokenizer", "chat template"), found, (self.tokenizer, self.template), strict=True
        ):
            if ours != theirs:
                raise BaseModelError(
                    f"{adapter}: was trained with another {what} than the base's folder holds now. Put the "
                    f"{what} back: prompts written otherwise than in training are answered badly."
                )


def read_trained_on(adapter: Path) -> TrainedOn | None:
    """The record of an adapter folder; None: another tool wrote it. Raises `BaseModelError` where it cannot
    be read."""
    content = _read(adapter)
    if content is None:
        return None
    try:
        return TrainedOn(**{key: content[key] for key in TrainedOn.__dataclass_fields__})
    except KeyError as error:
        raise BaseModelError(
            f"{adapter / FILE_NAME}: lacks {error}. Remove the file, or restore it."
        ) from error


def progress_of(adapter: Path) -> tuple[int, int] | None:
    """(step of an adapter, steps of the whole run); None: unknown."""
    content = _read(adapter) or {}
    step, num_steps = content.get("step"), content.get("num_steps")
    return (step, num_steps) if isinstance(step, int) and isinstance(num_steps, int) else None


def _read(adapter: Path) -> dict[str, Any] | None:
    file = adapter / FILE_NAME
    if not file.is_file():
        return None
    return read_json(file, BaseModelError, "Remove the file, or restore it.")


def checkpoint_fingerprint(folder: Path) -> str:
    """A hash of a checkpoint's content, as in the module docstring. Reads 4 KiB per tensor."""
    digest = hashlib.sha256()
    with ShardReader(folder) as reader:
        for name in sorted(reader.names()):
            info = reader.info(name)
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            for k in range(WINDOWS):
                start = (info.num_bytes - WINDOW_BYTES) * k // (WINDOWS - 1)
                digest.update(reader.read_bytes(name, max(0, start), WINDOW_BYTES))
    return digest.hexdigest()[:32]


def tokenizer_hashes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Hashes of (the tokenizer, its chat template)."""
    pieces = tokenizer.backend_tokenizer.to_str()
    return _hash(pieces), _hash(str(tokenizer.chat_template))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def find_base(model: ModelSection, run: Path) -> tuple[Path, str | None]:
    """The folder of a run's base and its commit, by `resolve_base`; if that finds nothing, the folder at the
    recorded place relative to the run, with the same fingerprint.

    model: the section of the run's recipe. run: the run's folder. Raises `BaseModelError` if there is no such
    base.
    """
    try:
        return resolve_base(model.base, model.revision)
    except BaseModelError as error:
        known = [t for t in map(read_trained_on, _adapters_of(run)) if t is not None]
        for trained_on in known:
            folder = (run / trained_on.folder).resolve()
            if (folder / "config.json").is_file():
                trained_on.check_base(folder, run)
                return folder, trained_on.revision
        if not known:
            raise
        raise BaseModelError(
            f"{error}. If the base has moved, write its new place into {run / 'recipe.yaml'} (model.base): "
            "it is recognised by its weights."
        ) from error


def _adapters_of(run: Path) -> list[Path]:
    return [run / "adapter", *(run / "checkpoints").glob("step-*/adapter")]
