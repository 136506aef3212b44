"""Text generation with a base or a run, by the same walk over the layers as in training.

Heavy libraries are imported when a function is called, as importing them takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_train.device.system import require_unix

__all__ = ["evaluate", "generate"]


def generate(
    target: Path | str,
    prompts: Sequence[str | Sequence[Mapping[str, str]]],
    *,
    system: str | None = None,
    raw: bool = False,
    batch_size: int = 16,
    checkpoint: str | None = None,
    vram_bytes: int | None = None,
    max_new_tokens: int = 128,
    **sampling: Any,
) -> list[str]:
    """The answers of a run or a model to prompts, each a text or a conversation of {"role", "content"}.

    batch_size: prompts that run together; what each is answered does not depend on it. sampling: temperature,
    top_p, top_k, min_p, repetition_penalty, seed, see `generate.sampling.Sampling`. Others as of
    `qlora-train generate`. Raises a `UserError` where the target is no model or nothing fits."""
    require_unix("generate")
    from qlora_train.generate.command import answer_prompts
    from qlora_train.generate.sampling import Sampling

    return answer_prompts(
        target,
        prompts,
        Sampling(max_new_tokens, **sampling),
        system=system,
        raw=raw,
        batch_size=batch_size,
        checkpoint=checkpoint,
        vram_bytes=vram_bytes,
    )


def evaluate(target: Path | str, *, tasks: Sequence[str] = (), **options: Any) -> dict[str, dict[str, Any]]:
    """Scores of a run or a model by name ("trained", "base", "model"), on tasks of lm-eval if there are any:
    see `generate.evaluate_command.evaluate_model`, for tasks `generate.task_evaluation.evaluate_tasks`, which
    have the options."""
    require_unix("eval")
    if tasks:
        from qlora_train.generate.task_evaluation import evaluate_tasks

        return evaluate_tasks(target, tasks, **options).figures
    from qlora_train.generate.evaluate_command import evaluate_model

    return evaluate_model(target, **options).figures
