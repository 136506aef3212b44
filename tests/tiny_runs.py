"""Whole tiny runs for tests: a base with a byte-level tokenizer and chat template, data, recipes, processes.

The base's weights are drawn by parameter name, so they are the same under every version of transformers.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_models import random_model, tiny_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qlora_train.device.step_clock import Cause

PROJECT = Path(__file__).parent.parent
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] + ':' + m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


@cache
def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """<pad>, <bos>, <eos>, then one token per byte: 259 in all. Texts begin with <bos>."""
    words = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = chat_template
    return fast


def tiny_base_model(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A 2-layer Llama with 259 tokens."""
    sizes = {"vocab_size": 259, "num_hidden_layers": 2} | changes
    model = random_model(tiny_config("llama", **sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            around, spread = (1.0, 0.2) if "norm" in name else (0.0, 0.08)
            parameter.copy_(around + spread * torch.randn(parameter.shape, generator=generator))
    return model


def write_base(
    folder: Path, *, chat_template: str | None = CHAT_TEMPLATE, seed: int = 0, **changes: Any
) -> Path:
    """A base folder as `model.base` takes it: config, fp32 weights, tokenizer."""
    tiny_base_model(seed, **changes).save_pretrained(folder)
    byte_tokenizer(chat_template).save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """One JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def reversal_rows(num_rows: int, seed: int = 0, letters: str = "abcdef") -> list[dict[str, str]]:
    """Write a word backwards: rows of 4 to 9 letters."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(letters, k=rng.randint(4, 9))) for _ in range(num_rows)]
    return [{"prompt": f"{word}:", "completion": word[::-1]} for word in words]


def recipe_values(base: Path, train: Path, output_dir: Path, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as nested values, fp32 and 4 rows a step; `sections` (model, lora, ...) change it."""
    values: dict[str, dict[str, Any]] = {
        "model": {"base": str(base), "compute_dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(train), "sequence_length": 32},
        "training": {
            "output_dir": str(output_dir),
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
        },
    }
    for name, changes in sections.items():
        values[name] |= changes
    return values


def write_recipe(file: Path, values: Mapping[str, Any]) -> Path:
    """JSON is YAML."""
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return file


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what a clock or a process's memory decides."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = {"tokens_per_second", "peak_bytes", *(cause.key for cause in Cause)}
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def losses_of(run_dir: Path) -> list[float]:
    """The loss of every step, in order."""
    return [row["loss"] for row in metrics_of(run_dir) if "loss" in row]


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def adapter_tensors(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def child_environment(**changes: str) -> dict[str, str]:
    """For a child process: the project importable, and as many threads as here, on which sums may depend."""
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        **changes,
    }
