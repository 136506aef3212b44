"""What peers built on transformers share: the base quantized by bitsandbytes, peft's configuration of the
same factors, rows as the tokenizer of the base gives them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

from benchmarks.pieces.figures import compute_device, compute_dtype


def load_quantized(base: str) -> PreTrainedModel:
    """NF4 with double quantization, everything else in `compute_dtype()`, SDPA attention."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(),
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=quantization,
        dtype=compute_dtype(),
        attn_implementation="sdpa",
        device_map={"": compute_device().torch},
    )
    model.config.use_cache = False
    return model


def lora_config(rank: int) -> LoraConfig:
    """Factors on all linears of the decoder layers."""
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def read_texts(base: str, rows: Path, sequence_length: int) -> list[Tensor]:
    """Rows of kind "texts" as token ids with the end token, int64 [sequence_length] each."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    end: Any = tokenizer.eos_token_id
    token_ids = [torch.tensor([*tokenizer(text)["input_ids"], end]) for text in texts]
    assert all(len(ids) == sequence_length for ids in token_ids), "rows are as long as the sequence"
    return token_ids
