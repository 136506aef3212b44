"""The memory of a merge, and of a merge into a GGUF file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.adapter_files import save_adapter

MEASURE = """
import sys
from pathlib import Path
import torch
from qlora_train.device.process_peak import process_peak_bytes
from gguf import GGUFWriter
from qlora_train.adapter.adapter_files import load_adapter
from qlora_train.export.gguf.architecture import Architecture
from qlora_train.export.gguf.tensors import list_tensors
from qlora_train.export.gguf.write import GgufReader, compare_with_merged, write_gguf
from qlora_train.export.merge import MergedWeights, merge
from qlora_train.weights.base_checkpoint import BaseCheckpoint
from qlora_train.model.base import MetaModel, read_config
from qlora_train.quant.formats import Quantization
base, adapter, out = map(Path, sys.argv[1:4])
MetaModel(read_config(base), torch.float16)  # imports the family's module
before = process_peak_bytes()
quantization = Quantization("nf4", True) if sys.argv[4] == "quantized" else None
if sys.argv[4] == "gguf":
    config = read_config(base)
    with BaseCheckpoint(base, MetaModel(config, torch.float32)) as checkpoint:
        weights = MergedWeights(checkpoint, None, None, load_adapter(adapter))
        tensors = list_tensors(weights, Architecture(base, config), "q8_0")
        write_gguf(out, GGUFWriter(None, "llama"), tensors, weights, None)
        compare_with_merged(GgufReader(base, out, tensors, weights.shapes), tensors, weights)
else:
    merge(base, adapter, out, quantization=quantization, dtype=torch.float16)
print((process_peak_bytes() - before) / 2**20)
"""


@pytest.mark.parametrize(
    "mode,bound_mib",
    [("original", 16 * 5 + 40), ("quantized", 16 * 5 + 40 + 64 + 32), ("gguf", 16 * 5 + 40 + 3 * 16)],
)
def test_memory_does_not_grow_with_the_model(tmp_path: Path, mode: str, bound_mib: int) -> None:
    """200 MB of weights, 64 MB in one: the bound is rows in fp16, fp32 and cast, plus scratch and a quantized
    weight, or for GGUF a q projection in fp32 before, while and after its rows change places."""
    config = LlamaConfig(
        vocab_size=16384,
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        dtype="float16",
    )
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "base")
    lora = {f"model.layers.{i}.mlp.up_proj": (torch.ones(4, 2048), torch.ones(4096, 4)) for i in range(2)}
    save_adapter(tmp_path / "adapter", AdapterConfig("base", 4, 4), lora)
    arguments = [str(tmp_path / name) for name in ("base", "adapter", "out")] + [mode]
    root = str(Path(sys.modules["qlora_train"].__file__ or "").parents[1])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True, cwd=root
    )
    assert float(result.stdout) < bound_mib
