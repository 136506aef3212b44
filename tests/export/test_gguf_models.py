"""What llama.cpp computes from a GGUF file, against transformers on the merged model."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf_runs import MODELS, TOKEN_IDS, log_probabilities, write_run
from llama_cpp_server import LlamaCpp
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qlora_train.adapter.adapter_files import load_adapter, save_adapter
from qlora_train.export import QUANTS, export
from qlora_train.export.gguf import export_gguf
from qlora_train.export.gguf.write import GgufReader


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_merged_model(tmp_path: Path, name: str) -> None:
    family, changes = MODELS[name]
    run = write_run(tmp_path, family, **changes)
    folder = export(run, to="gguf", quant="f32", receipt=None)
    llama_cpp = LlamaCpp(folder / "model-f32.gguf")
    expected = log_probabilities(export(run, dtype="float32", receipt=None))
    found = llama_cpp.log_probabilities(TOKEN_IDS, len(expected))
    atol = 1e-2 if "gemma" in name else 2e-4  # llama.cpp looks GELU up in a table in half precision
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "name,quant",
    [*product(["llama", "qwen2"], QUANTS), *product(["qwen3_moe, every expert"], ["bf16", "q8_0", "q4_0"])],
)
def test_every_quantization(tmp_path: Path, name: str, quant: str) -> None:
    """llama.cpp and transformers, which reads GGUF files itself, see the same model; so does the receipt."""
    family, changes = MODELS[name]
    folder = export(write_run(tmp_path, family, **changes), to="gguf", quant=quant)
    options = {"gguf_file": f"model-{quant}.gguf", "dtype": torch.float32}
    config = AutoConfig.from_pretrained(
        tmp_path / "base"
    )  # it does not read the size of experts from the file
    expected = log_probabilities(folder, config=config, **options)
    found = LlamaCpp(folder / f"model-{quant}.gguf").log_probabilities(TOKEN_IDS, len(expected))
    rounding = {"f32": 2e-4, "f16": 5e-3, "bf16": 3e-2}.get(quant, 8e-2)  # of activations, in llama.cpp
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding)
    (figures,) = json.loads((folder / "receipt.json").read_text())["figures"]
    assert figures["model"] == f"merged onto original weights, {quant} (written)"
    bounds = {"f32": 1e-6, "f16": 1e-5, "bf16": 1e-4, "q8_0": 1e-3, "q5_1": 0.02, "q5_0": 0.02}
    assert figures["kl"] < bounds.get(quant, 0.05)


@pytest.mark.parametrize(
    "name,quant,atol,kl",
    [
        ("gpt_oss, every expert", "q4_0", 8e-2, 0.02),
        ("gemma4, every expert", "f16", 2e-2, 1e-4),
        ("gemma4, every expert", "q4_0", 0.25, 0.2),
    ],
)
def test_quantized_experts_that_transformers_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, quant: str, atol: float, kl: float
) -> None:
    """llama.cpp sees the tensors that the receipt sees."""
    family, changes = MODELS[name]
    run = write_run(tmp_path, family, **changes)
    soften_attention(tmp_path / "base")
    readers: list[GgufReader] = []

    class KeptReader(GgufReader):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            readers.append(self)

    monkeypatch.setattr(export_gguf, "GgufReader", KeptReader)
    folder = export(run, to="gguf", quant=quant)
    seen = {tensor: readers[0].read(tensor) for tensor in readers[0].names()}
    save_file(seen, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    expected = log_probabilities(tmp_path / "base")
    found = LlamaCpp(folder / f"model-{quant}.gguf").log_probabilities(TOKEN_IDS, len(expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    (figures,) = json.loads((folder / "receipt.json").read_text())["figures"]
    assert figures["kl"] < kl


def soften_attention(base: Path) -> None:
    """Gemma-4 does not scale it: with random weights any rounding would choose other tokens."""
    tensors = load_file(base / "model.safetensors")
    softer = {name: tensor * (0.2 if "q_norm" in name else 1) for name, tensor in tensors.items()}
    save_file(softer, base / "model.safetensors", {"format": "pt"})


def test_experts_in_one_tensor_are_written_as_training_saw_them(tmp_path: Path) -> None:
    """As transformers holds them, gate and up together; quantized in training, and written dequantized."""
    family, changes = MODELS["qwen3_moe"]
    run = write_run(tmp_path, family, quantization="nf4", save_original_format=False, **changes)
    folder = export(run, to="gguf", quant="f32", base="dequantized")
    expected = log_probabilities(export(run, base="dequantized", dtype="float32", receipt=None))
    found = LlamaCpp(folder / "model-f32.gguf").log_probabilities(TOKEN_IDS, len(expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    written, other = json.loads((folder / "receipt.json").read_text())["figures"]
    assert written["kl"] < 1e-6 < 1e-3 < other["kl"]


def test_the_language_model_of_several_parts_is_written(tmp_path: Path) -> None:
    """As Gemma-4 is published; llama.cpp has images in a file of their own."""
    family, changes = MODELS["gemma4 with experts"]
    run = write_run(tmp_path, family, **changes)
    expected = log_probabilities(export(run, dtype="float32", receipt=None))
    base = tmp_path / "base"
    config, tensors = json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")
    whole = {"model_type": "gemma4", "text_config": config, "tie_word_embeddings": False}
    whole["architectures"] = ["Gemma4ForConditionalGeneration"]
    (base / "config.json").write_text(json.dumps(whole))
    renamed = {re.sub(r"^model\.", "model.language_model.", name): t for name, t in tensors.items()}
    renamed["model.vision_tower.patch_embedder.input_proj.weight"] = torch.zeros(8, 8)
    save_file(renamed, base / "model.safetensors", {"format": "pt"})
    folder = export(run, to="gguf", quant="f32")
    found = LlamaCpp(folder / "model-f32.gguf").log_probabilities(TOKEN_IDS, len(expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
    (figures,) = json.loads((folder / "receipt.json").read_text())["figures"]
    assert figures["kl"] < 1e-6


def test_a_trained_head_is_no_longer_the_embedding(tmp_path: Path) -> None:
    run = write_run(tmp_path, tie_word_embeddings=True)
    config, tensors = load_adapter(run / "adapter")
    num_rows = len(load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"])
    head = {"lm_head": (torch.full((4, 64), 0.1), torch.arange(num_rows * 4).view(-1, 4) / num_rows)}
    save_adapter(run / "adapter", config, dict(tensors) | head)
    folder = export(run, to="gguf", quant="f32")
    expected = log_probabilities(export(run, dtype="float32", receipt=None))
    found = LlamaCpp(folder / "model-f32.gguf").log_probabilities(TOKEN_IDS, len(expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    (figures,) = json.loads((folder / "receipt.json").read_text())["figures"]
    assert figures["kl"] < 1e-6


def test_the_receipt_shows_the_base_that_is_closer(tmp_path: Path) -> None:
    """What training saw were quantized weights: a fine format keeps them, a coarse one keeps neither base."""
    run = write_run(tmp_path, quantization="nf4", hidden_size=64, intermediate_size=128)
    said: list[str] = []
    advice = "--base dequantized would be closer to the trained model, unless it is to be loaded in 4 bits"
    for quant, base in (("q8_0", None), ("f32", "dequantized"), ("q4_0", None)):
        said.clear()
        folder = export(
            run, to="gguf", quant=quant, base=base, out=tmp_path / f"{quant} {base}", log=said.append
        )
        receipt = json.loads((folder / "receipt.json").read_text())
        written, *others = receipt["figures"]
        other = "dequantized" if base is None else "original"
        names = [f"merged onto {other} weights, before {quant} (not written)"] if quant != "q4_0" else []
        assert [one["model"] for one in others] == names
        is_advised = (quant, base) == ("q8_0", None)
        assert (receipt["remark"] == advice) == (advice in said) == is_advised
        if is_advised:
            assert others[0]["kl"] < 1e-6 < 1e-3 < written["kl"]
        elif others:
            assert written["kl"] < 1e-6 < others[0]["kl"] and receipt["remark"] is None


def test_bounds_of_yarn_that_llama_cpp_rounds_are_said(tmp_path: Path) -> None:
    """As gpt-oss has them; it is close all the same."""
    run = write_run(tmp_path, "gpt_oss")
    said: list[str] = []
    folder = export(run, to="gguf", quant="f32", receipt=None, log=said.append)
    assert any(line.startswith("rotary embedding: llama.cpp rounds") for line in said)
    expected = log_probabilities(export(run, dtype="float32", receipt=None))
    found = LlamaCpp(folder / "model-f32.gguf").log_probabilities(TOKEN_IDS, len(expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "trained,kept", [("_proj", set()), ("o_proj", {"gate", "up", "down"}), ("down_proj", {"gate", "up"})]
)
def test_experts_in_mxfp4_keep_their_codes(tmp_path: Path, trained: str, kept: set[str]) -> None:
    """Where the adapter does not train them. Every expert is used, as rounding changes which are chosen."""
    family, changes = MODELS["gpt_oss, every expert"]
    run = write_run(tmp_path, family, in_mxfp4=True, trained=trained, **changes)
    folder = export(run, to="gguf", quant="f32")
    stored = {tensor.name: tensor for tensor in GGUFReader(folder / "model-f32.gguf").tensors}
    base = load_file(tmp_path / "base" / "model.safetensors")
    codes, scales = (base[f"model.layers.1.mlp.experts.gate_up_proj_{name}"] for name in ("blocks", "scales"))
    for i, name in enumerate(("gate", "up", "down")):
        tensor = stored[f"blk.1.ffn_{name}_exps.weight"]
        assert (tensor.tensor_type == GGMLQuantizationType.MXFP4) == (name in kept)
        if name == "down" or name not in kept:
            continue
        blocks = torch.from_numpy(tensor.data.copy()).view(*scales[:, i::2].shape, 17)
        assert torch.equal(blocks[..., 0], scales[:, i::2])
        of_file = torch.cat((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), -1)
        assert torch.equal(of_file[..., ::2] | of_file[..., 1::2] << 4, codes[:, i::2])
    expected = log_probabilities(export(run, dtype="float32", receipt=None))
    found = LlamaCpp(folder / "model-f32.gguf").log_probabilities(TOKEN_IDS, len(expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=8e-2 if kept else 2e-4)
    (figures,) = json.loads((folder / "receipt.json").read_text())["figures"]
    assert figures["kl"] < 1e-6
