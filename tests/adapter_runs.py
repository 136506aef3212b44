"""Runs that were never trained: a tiny base, a recipe whose data lie in a folder `secret`, and an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_runs import recipe_values, write_base, write_recipe, write_rows
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.adapter_files import save_adapter

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
PLAIN = AdapterConfig("base", 4, 8, target_modules=["q_proj", "v_proj"])


def write_run(
    folder: Path,
    config: AdapterConfig = PLAIN,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **model: Any,
) -> Path:
    """A run with an adapter on Q and V of a tiny base. tokenizer: of the base, if not the byte tokenizer."""
    vocabulary = {} if tokenizer is None else {"vocab_size": len(tokenizer)}
    base = write_base(folder / "base", **vocabulary)
    if tokenizer is not None:
        tokenizer.save_pretrained(base)
    run = folder / "run"
    rows = write_rows(folder / "secret" / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    run.mkdir()
    write_recipe(run / "recipe.yaml", recipe_values(base, rows, run, model=model))
    generator = torch.Generator().manual_seed(0)
    linears = dict(AutoModelForCausalLM.from_pretrained(base).named_modules())
    lora = {}
    for path in (Q, V):
        rank, linear = config.rank_of(path), linears[path]
        lora[path] = (
            torch.randn(rank, linear.in_features, generator=generator) * 0.1,
            torch.randn(linear.out_features, rank, generator=generator) * 0.1,
            *([torch.rand(linear.out_features)] if config.use_dora or config.lora_bias else []),
        )
    save_adapter(run / "adapter", replace(config, base_model=str(base)), lora)
    return run
