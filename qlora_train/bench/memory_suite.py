"""The memory cases: what fits under which budget, how near the plan is, and what streaming costs.

    python -m qlora_train.bench.gpu_suite --only memory        all of them, resumable; see gpu_suite.py

Shapes of Llama 3.1 with random packed weights (random_base.py): nothing is downloaded. Budgets are enforced
with the allocator's limit (pieces/memory.py), so a case that held them has shown that a card of that size is
enough for its tensors.

    memory-8b-4gib         2,048 tokens a step; what does not fit streams from RAM
    memory-8b-4gib-disk    the same from a file
    memory-70b-base        the 40 GB that the next one needs, written once
    memory-70b-8gib        2,048 tokens a step
    memory-streamed        8,192 tokens in one group: resident and streamed steps in turns, in one process
    memory-deterministic   everything resident and kept: `training.deterministic: true` beside `false`

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_train.bench.case import Case, Contender
from qlora_train.bench.table import Column, Row, gib, rate, seconds, share
from qlora_train.memory.plan.model_shape import KNOWN, ModelShape

PIECE = "qlora_train.bench.pieces.memory"
SUITE = "memory"
OURS = "qlora-train"
NUM_STEPS = 8


def config_of(shape: ModelShape) -> dict[str, Any]:
    """A config.json for the shape of a model of the llama family."""
    assert shape.model_type == "llama", shape.model_type
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.is_tied,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "bos_token_id": None,
        "eos_token_id": None,
    }


Sections = Mapping[str, Mapping[str, Any]]
"""Of a recipe."""


def memory_case(
    name: str,
    about: str,
    base: str,
    config: Mapping[str, Any],
    recipe: Sections,
    *,
    work: str = "budget",
    contenders: Mapping[str, Sections] | None = None,
    target: str = "",
    timeout_seconds: float = 240.0,
    needs_cuda: bool = True,
    num_steps: int = NUM_STEPS,
) -> Case:
    """A case of this suite. base: a name for the packed base of `config`, which cases share. contenders: by
    name, sections that replace those of `recipe`; the first is the reference."""
    sides = contenders or {OURS: {}}
    return Case(
        name=name,
        about=about,
        contenders=tuple(
            Contender(side, PIECE, {"recipe": {**recipe, **changes}}) for side, changes in sides.items()
        ),
        reference=next(iter(sides)),
        settings={"work": work, "base": base, "config": dict(config), "num_steps": num_steps},
        target=target,
        needs_cuda=needs_cuda,
        timeout_seconds=timeout_seconds,
        suite=SUITE,
    )


_8B, _70B = config_of(KNOWN["llama-3.1-8b"]), config_of(KNOWN["llama-3.1-70b"])
_ROW = {"sequence_length": 2048}
_ONE = {"micro_batch_size": 1, "gradient_accumulation_steps": 1}
_FOUR = {"micro_batch_size": 1, "gradient_accumulation_steps": 4, "optimizer": "adamw_8bit"}
_WITHIN_5 = "held, peak within 5 % of the plan"

CASES: tuple[Case, ...] = (
    memory_case(
        "memory-8b-4gib",
        "Llama 3.1 8B, 2,048 tokens a step, a budget of 4 GiB",
        "random-8b",
        _8B,
        {"data": _ROW, "training": _ONE, "memory": {"vram": "4GiB"}},
        target=_WITHIN_5,
    ),
    memory_case(
        "memory-8b-4gib-disk",
        "the same, streamed from a file",
        "random-8b",
        _8B,
        {"data": _ROW, "training": _ONE, "memory": {"vram": "4GiB", "weights": "disk"}},
        target=_WITHIN_5,
    ),
    memory_case(
        "memory-70b-base",
        "Llama 3.1 70B: its random packed base, 40 GB, written once",
        "random-70b",
        _70B,
        {},
        work="base",
        timeout_seconds=500.0,
    ),
    memory_case(
        "memory-70b-8gib",
        "Llama 3.1 70B, 2,048 tokens a step, a budget of 8 GiB",
        "random-70b",
        _70B,
        {"data": _ROW, "training": {**_ONE, "optimizer": "adamw_8bit"}, "memory": {"vram": "8GiB"}},
        target=_WITHIN_5,
        timeout_seconds=420.0,
        num_steps=3,
    ),
    memory_case(
        "memory-streamed",
        "Llama 3.1 8B, 8,192 tokens a group: streamed from RAM beside resident, in turns",
        "random-8b",
        _8B,
        {
            "data": _ROW,
            "training": _FOUR,
            "memory": {"weights": "resident", "activations": "recompute"},
        },
        work="streamed",
        target="streamed at >= 0.90x of resident",
    ),
    memory_case(
        "memory-deterministic",
        "Llama 3.1 8B, everything resident and kept, 2,048 tokens a step: the cost of determinism",
        "random-8b",
        _8B,
        {"data": _ROW, "training": _ONE},
        contenders={
            "deterministic: false": {"training": {**_ONE, "deterministic": False}},
            "deterministic: true": {"training": {**_ONE, "deterministic": True}},
        },
        target="the cost, stated; the same bytes in every run with true",
        timeout_seconds=150.0,
    ),
)
NUM_RUNS = {"memory-deterministic": 2}
"""Of each contender; one where nothing is said."""


def _times(value: float) -> str:
    return f"{value:.2f}x"


COLUMNS = (
    Column("planned_step_bytes", "planned", gib),
    Column("device_peak_bytes", "allocated", gib),
    Column("peak_over_planned", "of the plan", share),
    Column("device_reserved_peak_bytes", "reserved", gib),
    Column("step_seconds", "a step", seconds),
    Column("tokens_per_second", "tokens/s", rate),
    Column("read_bytes_per_step", "read a step", gib),
    Column("streamed_over_resident", "of resident", _times),
    Column("load_seconds", "load", seconds),
    Column("base_seconds", "made in", seconds),
)


def remarks(row: Row) -> str:
    """What the figures of a row say in words: whether the budget held, pinning, equality."""
    words = [row.word] if row.word else []
    for figures in row.runs:
        if figures.get("held") is not None:
            words.append("held" if figures["held"] else "NOT HELD: " + "; ".join(figures["changes"]))
        if figures.get("pinned") is False:
            words.append("not pinned")
        if "gradient_difference" in figures:
            words.append(f"gradients differ by {figures['gradient_difference']:.1e}")
    hashes = {figures["masters_hash"] for figures in row.runs if "masters_hash" in figures}
    if len(row.runs) > 1 and hashes:
        words.append("the same bytes in every run" if len(hashes) == 1 else "bytes differ between runs")
    return "; ".join(dict.fromkeys(words))
