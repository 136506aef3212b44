"""`qlora-train eval --tasks`: the tasks of EleutherAI's lm-evaluation-harness (lm-eval) on a run or a model.

Tasks, few-shot examples and metrics are lm-eval's, the model is ours (generate/harness_model.py): quantized,
streamed and adapted as in training. A task is YAML, in which `!function` names Python that lm-eval runs: a
folder of tasks is a program.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_train.boundary import parsing
from qlora_train.errors import DataError, UserError
from qlora_train.generate.model_folder import find_model, refuse_base_alone
from qlora_train.generate.score_table import score_table

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict

_NOT_METRICS = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True)
class TaskEvaluation:
    """What lm-eval found. results: by the model's name, as `lm_eval.evaluate` returns them."""

    results: dict[str, dict[str, Any]]

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """By the model's name and the task's: every metric, its standard error, and the number of samples."""
        return {name: _figures(found) for name, found in self.results.items()}

    def table(self) -> str:
        """The metrics as text, a column for each model."""
        figures = self.figures
        first = next(iter(figures.values()))
        rows = {
            f"{task} {metric}": [_cell(of[task], metric) for of in figures.values()]
            for task, values in first.items()
            for metric in values
            if metric != "num_samples" and not _is_error(metric)
        }
        of_tasks = next(iter(self.results.values()))["samples"].values()  # once for each filter
        number = sum(len({sample["doc_id"] for sample in samples}) for samples in of_tasks)
        return score_table(f"{number:,} samples (lm-eval)", list(figures), rows)

    def answers(self) -> str:
        """lm-eval's record of every sample and filter, a JSON object a line."""
        from lm_eval.utils import handle_non_serializable as plain

        return "".join(
            json.dumps({"model": name, "task": task} | sample, ensure_ascii=False, default=plain) + "\n"
            for name, found in self.results.items()
            for task, samples in found["samples"].items()
            for sample in samples
        )


def evaluate_tasks(
    target: Path | str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    tasks_folder: Path | None = None,
    apply_chat_template: bool = False,
    batch_size: int = 16,
    with_base: bool = False,
    checkpoint: str | None = None,
    vram_bytes: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> TaskEvaluation:
    """Evaluate a run or a model on tasks of lm-eval, named as there. limit: samples of each task, the first
    ones. num_fewshot: examples before each; None: the task's number. tasks_folder: with YAML tasks of your
    own, and the Python they name, which is run. apply_chat_template: write prompts as conversations. Others
    as of `evaluate_model`. Seeds Python's and numpy's random numbers, as lm-eval does."""
    try:
        import lm_eval
    except ImportError as error:
        raise UserError(
            f"tasks are lm-eval's, and {error.name} is not installed: pip install 'qlora-train[lm-eval]'"
        ) from error
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    from qlora_train.generate.harness_model import HarnessModel

    source = find_model(target, checkpoint=checkpoint, log=log)
    refuse_base_alone(source, with_base)
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    loaded = _load(tasks, tasks_folder)
    model = HarnessModel(
        source,
        lambda: chain.from_iterable(task.instances for task in loaded["tasks"].values()),
        batch_size=batch_size,
        vram_bytes=vram_bytes,
        log=log,
    )

    for name, task in loaded["tasks"].items():
        _set_fewshot(name, task, num_fewshot, log)

    def run() -> dict[str, Any]:
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        chat = {"apply_chat_template": apply_chat_template, "fewshot_as_multiturn": True}
        return dict(lm_eval.evaluate(lm=model, task_dict=loaded, limit=limit, **chat))

    try:
        results = {"trained" if source.adapter else "model": run()}
        if model.num_cut:
            log(
                f"{model.num_cut:,} prompts, with their answers, are longer than the model's "
                f"{model.max_length:,} positions and lost their beginning"
            )
        if with_base:
            source.attach(model.loaded.decoder, None)
            results["base"] = run()
    finally:
        model.close()
    return TaskEvaluation(results)


def _load(names: Sequence[str], folder: Path | None) -> TaskDict:
    """The tasks with their data. Raises `UserError` for a name that there is not, and for tasks that this
    program does not run, `DataError` where their data cannot be had."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise UserError(f"--tasks-folder: there is no folder {folder}")
    with parsing("lm-eval's tasks", DataError, "Mend the task's YAML."):
        manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f": did you mean {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists them"
            raise UserError(f"--tasks: lm-eval has no task {name!r}{hint}")
    remedy = "Its data (dataset_path) must be on this machine or reachable, and its YAML in order."
    with parsing(f"--tasks {','.join(names)}", DataError, remedy):
        loaded = manager.load(list(names))
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"{name} runs programs that the model writes, which this program never does")
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"{name} shows images or sounds, and models here read text alone")
    return loaded


def _set_fewshot(name: str, task: Task, number: int | None, log: Callable[[str], None]) -> None:
    """Set a task's number of examples as lm-eval does, which leaves a zero in the task alone."""
    own = task.get_config("num_fewshot")
    if own == 0 and number:
        log(f"{name} is a task without examples (num_fewshot: 0), so --num-fewshot does not change it")
    elif number is not None or own is None:
        task.set_config(key="num_fewshot", value=number or 0)


def _figures(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        task: {"num_samples": values.get("sample_len")}
        | {_metric_name(key): _plain(value) for key, value in values.items() if key not in _NOT_METRICS}
        for task, values in (found["results"] | found.get("groups", {})).items()
    }


def _metric_name(key: str) -> str:
    """lm-eval's "metric,filter" without a filter that is none."""
    return key.removesuffix(",none")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _is_error(metric: str) -> bool:
    return metric.partition(",")[0].endswith("_stderr")


def _cell(values: dict[str, Any], metric: str) -> str:
    name, comma, filter_name = metric.partition(",")
    error, value = values.get(f"{name}_stderr{comma}{filter_name}"), values[metric]
    shown = f"{value:.4f}" if isinstance(value, float) else str(value)
    return f"{shown} ± {error:.4f}" if isinstance(error, float) else shown
