"""`qlora-train eval`: loss, perplexity and the answers of a run or a model on held-out rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_train.data.building import build_dataset
from qlora_train.data.dataset import PackedDataset
from qlora_train.data.tokenizer import read_stop_ids
from qlora_train.errors import UserError
from qlora_train.files.atomic_file import replace_text
from qlora_train.generate.evaluation import Question, Scores, evaluate, questions_of, text_metrics
from qlora_train.generate.model_folder import ModelSource, find_model, refuse_base_alone
from qlora_train.generate.score_table import score_table
from qlora_train.generate.task_evaluation import TaskEvaluation, evaluate_tasks
from qlora_train.plan.planned_walk import GenerateSize
from qlora_train.recipe import DataSection
from qlora_train.terminal_text import show, tell
from qlora_train.weights.cache_key import cache_root


@dataclass(frozen=True)
class Evaluation:
    """What was found on rows. rows_name: where they are from. scores: by the model's name. tokenizer: of the
    model."""

    rows_name: str
    questions: list[Question]
    scores: dict[str, Scores]
    tokenizer: PreTrainedTokenizerBase

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """The scores as plain values."""
        return {
            name: {
                "loss": of.loss,
                "perplexity": of.perplexity,
                "num_tokens": of.num_tokens,
                **of.metrics,
                "num_answers": len(of.answers),
            }
            for name, of in self.scores.items()
        }

    def table(self) -> str:
        """The scores as text, a column for each model."""
        first = next(iter(self.scores.values()))
        rows = {"loss": [f"{of.loss:.4f}" for of in self.scores.values()]}
        rows["perplexity"] = [f"{of.perplexity:.2f}" for of in self.scores.values()]
        for metric in first.metrics:
            rows[metric] = [f"{of.metrics[metric]:.1f} %" for of in self.scores.values()]
        title = f"{first.num_tokens:,} supervised tokens, {len(first.answers)} answers ({self.rows_name})"
        return score_table(title, list(self.scores), rows)

    def answers(self) -> str:
        """Prompts, references and answers, a JSON object a line."""
        lines = []
        for i, question in enumerate(self.questions):
            row = {"prompt": self.tokenizer.decode(question.prompt), "reference": question.reference}
            given = {name: of.answers[i] for name, of in self.scores.items()}
            lines.append(json.dumps(row | given, ensure_ascii=False) + "\n")
        return "".join(lines)


def evaluate_command(
    target: Path | str, tasks: list[str], *, out: Path | None, as_json: bool, **options: Any
) -> None:
    """Print the scores of a run or a model, on tasks of lm-eval if there are any. out: a file for prompts,
    references and answers. options: see `evaluate_model`, for tasks `evaluate_tasks`."""
    options["log"] = partial(tell, stream=sys.stderr)
    found: Evaluation | TaskEvaluation
    found = evaluate_tasks(target, tasks, **options) if tasks else evaluate_model(target, **options)
    if out is not None:
        replace_text(out, found.answers())
    show(json.dumps(found.figures) + "\n" if as_json else found.table())


def evaluate_model(
    target: Path | str,
    *,
    data: str | None = None,
    num_answers: int = 100,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    with_base: bool = False,
    checkpoint: str | None = None,
    vram_bytes: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Evaluate a run or a model. data: rows, in the run's format; None: those that the run holds out.
    num_answers: rows to answer, the first ones. batch_size: that are answered together. with_base: the base
    too. Other arguments as of `generate_command`."""
    source = find_model(target, checkpoint=checkpoint, log=log)
    refuse_base_alone(source, with_base)
    if num_answers:
        text_metrics(["a"], ["a"])  # the libraries are missed now, not after the answers
    rows, name = _rows(source, data)
    questions = questions_of(rows, source.stop_ids(), source.tokenizer)[:num_answers]
    lengths = sorted((len(question.prompt) for question in questions), reverse=True)[:batch_size]
    size = GenerateSize(tuple(lengths) or (1,), max_new_tokens, rows.sequence_length, rows.num_bins)
    model = source.load(size, vram_bytes=vram_bytes, log=log)
    run = partial(evaluate, model, rows, questions, max_new_tokens=max_new_tokens, batch_size=batch_size)
    try:
        scores = {"trained" if source.adapter else "model": run()}
        if with_base:
            source.attach(model.decoder, None)
            scores["base"] = run()
    finally:
        model.decoder.close()
    return Evaluation(name, questions, scores, source.tokenizer)


def _rows(source: ModelSource, data: str | None) -> tuple[PackedDataset, str]:
    """(rows to evaluate on, where they are from, as text)."""
    if data is None and (source.data is None or source.data.eval is None):
        raise UserError(
            "nothing is held out to evaluate on (data.eval in the recipe): give --data FILE with rows that "
            "the model was not trained on"
        )
    if data is None:
        section = source.data
        assert section is not None
    else:
        common = {} if source.data is None else source.data.model_dump(exclude_unset=True)
        section = DataSection.model_validate(common | {"train": data, "eval": None})
    seed = 0 if source.recipe is None else source.recipe.training.seed
    stop_ids = read_stop_ids(str(source.folder))
    train, held_out = build_dataset(
        section, source.tokenizer, seed=seed, stop_ids=stop_ids, cache=cache_root()
    )
    return (train, data) if data is not None else (held_out or train, "held out by data.eval")
