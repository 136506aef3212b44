"""The stages of the GPU suite, the most telling first. Each makes its own inputs, so any can be taken alone.

    smoke                  a minute: does everything run, and does it compute what the CPU computes
    tests/...              the tests marked `gpu`, a stage per file: one that hangs loses only its own
    memory-8b-4gib         2,048 tokens a step within 4 GiB, streamed from RAM
    memory-8b-streamed     8,192 tokens in one group: resident, then streamed
    memory-8b-exact        the same, deterministic: twice resident and once streamed, the same bytes
    speed-8b               4,096 packed tokens, with a profiler trace and the allocator's history
    peer-peft, -unsloth    peft + bitsandbytes and unsloth on the same tokens: at once, on the same card
    points                 operation by operation, beside what could be done instead: what to change next
    memory-70b-8gib        2,048 tokens a step within 8 GiB
    learns                 a model pre-trained here, then adapted in NF4 and in 16 bits: the losses
    speed-8b-streamed-512  one row of 512 tokens within 3.3 GB
    peer-soup              soup-cli on it
    memory-30b-experts     4,096 tokens of a mixture of 128 experts: resident, then streamed within 4 GiB
    peer-trl               trl on the tokens of speed-8b
    memory-8b-4gib-disk    as memory-8b-4gib, from a file

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import speed_suite
from benchmarks.speed_suite import LLAMA_8B, STEPS
from qlora_train.plan.known_models import KNOWN

REPOSITORY = Path(__file__).parents[3]
PIECES = "benchmarks.gpu_suite"
STREAMED_512 = "8b-streamed-512"
PACKED_4096 = "8b-4096"


@dataclass(frozen=True)
class Stage:
    """module: the piece (process.py), given `arguments` and where to work and write. timeout_seconds: the
    most that it may take. least_seconds: with less left of the call it is not begun. case: whose rows are
    beside each other in the table; is_reference: ratios are against its (first) row. requires, commands:
    packages and programs without which it is skipped with a word. knows_simulated: a dry run does it on the
    simulated GPU, which peers and tests marked `gpu` know nothing of."""

    name: str
    module: str
    arguments: Mapping[str, Any]
    timeout_seconds: float
    least_seconds: float = 45.0
    case: str = ""
    is_reference: bool = False
    requires: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    knows_simulated: bool = False


def config_of(name: str) -> dict[str, Any]:
    """A config.json for a known model."""
    sizes = KNOWN[name]
    architecture = {"llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[sizes["model_type"]]
    return (
        {"head_dim": sizes["hidden_size"] // sizes["num_attention_heads"]}
        | sizes
        | {
            "architectures": [architecture],
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
    )


TINY = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 401,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
}


@dataclass(frozen=True)
class Size:
    """How large everything is. model_sizes: replace those of a config.json. divisor: of every number of
    tokens. num_timed: steps. smoke, points, learns: arguments of those stages."""

    model_sizes: Mapping[str, Any] = field(default_factory=dict)
    divisor: int = 1
    num_timed: int = 6
    smoke: Mapping[str, Any] = field(default_factory=dict)
    points: Mapping[str, Any] = field(default_factory=dict)
    learns: Mapping[str, Any] = field(default_factory=dict)

    def model(self, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": name, "config": {**config, **self.model_sizes}}


REAL = Size(
    smoke={
        "num_steps": 24,
        "kill_at": 6,
        "num_train_rows": None,
        "num_eval_rows": 64,
        "overrides": ["training.save_every=4"],
    },
    points={"matrix_size": 8192, "flush_bytes": 2**28, "most_runs": 30},
    learns={
        "sizes": {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 9,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
        "pretraining": {"num_rows": 256, "learning_rate": 2e-3, "max_seconds": 120.0, "max_steps": 3000},
        "num_train_rows": 40_000,
        "num_eval_rows": 2000,
        "training": {"max_steps": 300, "batch_size": 16, "learning_rate": 1e-3},
        "tolerance": 0.01,
        "least_fall": 0.2,
    },
)
DRY = Size(
    TINY,
    divisor=16,
    num_timed=2,
    smoke={
        "num_steps": 6,
        "kill_at": 3,
        "num_train_rows": 64,
        "num_eval_rows": 4,
        "overrides": [
            "training.save_every=2",
            "training.batch_size=2",
            "data.sequence_length=64",
        ],
    },
    points={"matrix_size": 64, "flush_bytes": 2**10, "most_runs": 1},
    learns={
        "sizes": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        "pretraining": {"num_rows": 2, "learning_rate": 4e-3, "max_seconds": 5.0, "max_steps": 3},
        "num_train_rows": 100,
        "num_eval_rows": 8,
        "training": {"max_steps": 2, "batch_size": 1, "learning_rate": 1e-3},
        "tolerance": 0.2,
        "least_fall": 0.0,
    },
)
_ONE = {"micro_batch_size": 1, "gradient_accumulation_steps": 1}


def stages_of(size: Size, tests: tuple[str, ...]) -> tuple[Stage, ...]:
    """All stages in their order. tests: files, relative to the repository."""
    return (
        Stage("smoke", f"{PIECES}.smoke", dict(size.smoke), timeout_seconds=300, knows_simulated=True),
        *(_tests(file) for file in tests),
        *_memory_8b(size),
        _speed_8b(size),
        _packed_peer("peer-peft", speed_suite.PEFT_FAST, size, is_reference=True),
        _packed_peer("peer-unsloth", speed_suite.UNSLOTH, size),
        _points(size),
        _memory_70b(size),
        Stage("learns", f"{PIECES}.learns", dict(size.learns), 300, least_seconds=200, knows_simulated=True),
        *_streamed_512(size),
        _memory_30b_experts(size),
        _packed_peer("peer-trl", speed_suite.TRL, size),
        _budget("memory-8b-4gib-disk", size, {"vram": "4GiB", "weights": "disk"}),
    )


def files_of_tests(repository: Path = REPOSITORY) -> tuple[str, ...]:
    """Those that mention the mark, tests/gpu first."""
    files = [
        str(file.relative_to(repository))
        for file in sorted((repository / "tests").rglob("test_*.py"))
        if "mark.gpu" in file.read_text(encoding="utf-8")
    ]
    return tuple(sorted(files, key=lambda name: (not name.startswith("tests/gpu/"), name)))


def _tests(file: str) -> Stage:
    arguments = {"file": str(REPOSITORY / file), "marks": "gpu"}
    return Stage(file, f"{PIECES}.test_file", arguments, timeout_seconds=240, requires=("pytest",))


def _training(
    name: str,
    size: Size,
    model: tuple[str, Mapping[str, Any]],
    recipe: Mapping[str, Mapping[str, Any]],
    *,
    runs: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    row_tokens: int = 2048,
    num_timed: int | None = None,
    timeout_seconds: float = 180,
    least_seconds: float = 45,
    case: str = "",
    **options: Any,
) -> Stage:
    """recipe: sections. runs: by name, sections that replace those of `recipe`. row_tokens: of every
    document. options: see training.py."""
    arguments = {
        "model": size.model(*model),
        "recipe": {**recipe, "data": {"sequence_length": recipe["data"]["sequence_length"] // size.divisor}},
        "runs": {key: dict(changes) for key, changes in (runs or {"qlora-train": {}}).items()},
        "row_tokens": row_tokens // size.divisor,
        "num_timed": min(num_timed or size.num_timed, size.num_timed),
        **options,
    }
    return Stage(
        name, f"{PIECES}.training", arguments, timeout_seconds, least_seconds, case, knows_simulated=True
    )


_8B = ("random-8b", config_of("llama-3.1-8b"))
_30B_EXPERTS = ("random-30b-experts", config_of("qwen3-30b-a3b"))
_70B = ("random-70b", config_of("llama-3.1-70b"))
_ROW = {"sequence_length": 2048}


def _budget(name: str, size: Size, memory: Mapping[str, Any]) -> Stage:
    return _training(name, size, _8B, {"data": _ROW, "training": _ONE, "memory": memory})


def _memory_8b(size: Size) -> Iterator[Stage]:
    yield _budget("memory-8b-4gib", size, {"vram": "4GiB"})
    long: dict[str, dict[str, Any]] = {
        "data": _ROW,
        "training": {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "optimizer": "adamw_8bit"},
        "memory": {"activations": "recompute", "weights": "resident"},
    }
    streamed = {"memory": {"activations": "recompute", "weights": "ram"}}
    yield _training("memory-8b-streamed", size, _8B, long, runs={"resident": {}, "streamed": streamed})
    yield _training(
        "memory-8b-exact",
        size,
        _8B,
        {**long, "training": {**long["training"], "deterministic": True}},
        runs={"resident": {}, "resident again": {}, "streamed": streamed},
        num_timed=2,
        same_bytes=True,
    )


def _memory_30b_experts(size: Size) -> Stage:
    """Of 128 experts 8 take each token, so that a layer's copy has little arithmetic to hide behind."""
    return _training(
        "memory-30b-experts",
        size,
        _30B_EXPERTS,
        {
            "data": {"sequence_length": 4096},
            "training": {**_ONE, "optimizer": "adamw_8bit"},
            "memory": {"activations": "recompute", "weights": "resident"},
        },
        runs={
            "resident": {},
            "streamed": {"memory": {"activations": "recompute", "weights": "ram", "vram": "4GiB"}},
        },
        timeout_seconds=240,
        least_seconds=90,
        remove_base=True,
    )


def _speed_8b(size: Size) -> Stage:
    return _training(
        "speed-8b",
        size,
        _8B,
        {"data": {"sequence_length": 4096}, "training": {**_ONE, "optimizer": STEPS["optimizer"]}},
        row_tokens=speed_suite.ROW_TOKENS,
        case=PACKED_4096,
        trace="speed-8b",
    )


def _memory_70b(size: Size) -> Stage:
    memory = {"vram": "8GiB"}
    return _training(
        "memory-70b-8gib",
        size,
        _70B,
        {"data": _ROW, "training": {**_ONE, "optimizer": "adamw_8bit"}, "memory": memory},
        num_timed=2,
        timeout_seconds=420,
        least_seconds=200,
        remove_base=True,
    )


def _points(size: Size) -> Stage:
    """Steps of the two small models are one row of 512 tokens: fewer, and the host is what they wait for."""
    small: dict[str, dict[str, Any]] = {
        "data": {"sequence_length": speed_suite.ROW_TOKENS},
        "training": {**_ONE, "optimizer": STEPS["optimizer"]},
        "memory": {"activations": "keep", "weights": "resident"},
    }
    steps = [
        _training(
            name,
            size,
            (name, config_of(known)),
            small,
            row_tokens=speed_suite.ROW_TOKENS,
            trace=name,
            remove_base=True,
        ).arguments
        for name, known in (("random-1b", "llama-3.2-1b"), ("random-360m", "smollm2-360m"))
    ]
    arguments = {
        "model": size.model(*_8B),
        "num_tokens": 4096 // size.divisor,
        "steps": steps,
        **size.points,
    }
    return Stage("points", f"{PIECES}.points", arguments, 240, least_seconds=120, knows_simulated=True)


def _packed_peer(name: str, contender_name: str, size: Size, *, is_reference: bool = False) -> Stage:
    contenders = (*speed_suite.GPU_8B.contenders, *speed_suite.CHAT_ROWS.contenders)
    contender = next(c for c in contenders if c.name == contender_name)
    return _peer(name, size, contender, speed_suite.GPU_8B, PACKED_4096, is_reference=is_reference)


def _streamed_512(size: Size) -> Iterator[Stage]:
    yield _training(
        "speed-8b-streamed-512",
        size,
        _8B,
        {
            "data": {"sequence_length": speed_suite.ROW_TOKENS},
            "training": {**_ONE, "optimizer": STEPS["optimizer"]},
            "memory": {"vram": "3.3GB", "weights": "ram"},
        },
        row_tokens=speed_suite.ROW_TOKENS,
        case=STREAMED_512,
    )
    soup = next(c for c in speed_suite.STREAMED.contenders if c.name == speed_suite.SOUP)
    yield _peer("peer-soup", size, soup, speed_suite.STREAMED, STREAMED_512, is_reference=True)


def _peer(
    name: str,
    size: Size,
    contender: speed_suite.Contender,
    case: speed_suite.Case,
    shown_with: str,
    *,
    is_reference: bool,
) -> Stage:
    row_tokens = max(64, case.settings["row_tokens"] // size.divisor)  # soup-cli takes no fewer
    settings = {**case.settings, "row_tokens": row_tokens, **contender.arguments}
    if size.divisor > 1:
        settings |= {"num_timed": size.num_timed}
    rows = {**case.inputs["rows"], "name": f"texts-of-{row_tokens}", "num_tokens": row_tokens}
    arguments = {
        "name": contender.name,
        "module": contender.module,
        "settings": settings,
        "inputs": {"base": size.model("llama-8b-16-bit", LLAMA_8B["config"]), "rows": rows},
        "remove_inputs": name != "peer-peft",  # the next one takes the same
    }
    return Stage(
        name,
        f"{PIECES}.peer",
        arguments,
        timeout_seconds=300,
        least_seconds=90,
        case=shown_with,
        is_reference=is_reference,
        requires=contender.requires,
        commands=contender.commands,
    )
