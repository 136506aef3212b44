"""Merged folders against plain transformers and peft, their memory, and every way an export can fail."""

from __future__ import annotations

import json
import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import CHAT_TEMPLATE, byte_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.adapter_files import save_adapter
from qlora_train.device.compute import THE_CPU
from qlora_train.errors import BaseModelError, ExportError, RunFolderError
from qlora_train.export import export
from qlora_train.export.merge import merge
from qlora_train.export.quantized_layers import QuantizedLayers, cached_layers
from qlora_train.model.base_folder import check_base
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.quant.weight import QuantizedWeight
from qlora_train.weights.load import load_base

TOKENS = torch.arange(24).reshape(2, 12) % 40
LINEARS = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"} | {
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
}


def write_base(
    folder: Path, tied: bool = False, shard_size: str = "5GB", has_biases: bool = False
) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=tied,
        attention_bias=has_biases,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, max_shard_size=shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text(f"content of {name}")
    return model


def write_adapter(
    folder: Path,
    model: LlamaForCausalLM,
    targets: set[str] = LINEARS,
    scale: float = 0.1,
    **variant: bool,
) -> None:
    generator = torch.Generator().manual_seed(2)
    lora = {
        name: (
            torch.randn(4, module.in_features, generator=generator) * scale,
            torch.randn(module.out_features, 4, generator=generator) * scale,
            *([torch.rand(module.out_features, generator=generator) + 0.5] if variant else []),
        )
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(targets))
    }
    endings = sorted({name.rsplit(".", 1)[1] for name in lora})
    config = AdapterConfig("base", 4, 8, target_modules=endings, **variant)
    save_adapter(folder, config, lora)


@torch.no_grad()
def base_plus_adapter(
    model: LlamaForCausalLM, adapter: Path, quantization: Quantization | None
) -> torch.Tensor:
    """fp32 logits of peft on the base, its layers' linears first quantized and dequantized by
    bitsandbytes."""
    if quantization is not None:
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(dequantized(module.weight.detach(), quantization))
    return peft.PeftModel.from_pretrained(model, adapter).eval()(TOKENS).logits


def dequantized(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    if quantization.format == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        return bnb.int8_vectorwise_dequant(codes, scales)
    return bnb.dequantize_4bit(
        *bnb.quantize_4bit(weight, None, None, 64, quantization.double_quant, quantization.format)
    )


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("tied,shard_size", [(False, "5GB"), (True, "100KB")])
@pytest.mark.parametrize(
    "quantization", [None, Quantization("nf4", True), Quantization("fp4"), Quantization("int8")]
)
def test_merged_folder_is_base_plus_adapter(
    tmp_path: Path, tied: bool, shard_size: str, quantization, use_dora: bool
) -> None:
    model = write_base(tmp_path / "base", tied, shard_size)
    write_adapter(
        tmp_path / "adapter",
        model,
        {"q_proj", "down_proj"},
        scale=0.3,
        **({"use_dora": True} if use_dora else {}),
    )
    merge(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "out",
        quantization=quantization,
        dtype=torch.float32,
        max_shard_bytes=5 * 10**9 if shard_size == "5GB" else 10**5,
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert merged.dtype == torch.float32
    with torch.no_grad():
        logits = merged(TOKENS).logits
    assert (logits - model(TOKENS).logits).abs().max() > 0.1  # the adapter does something
    torch.testing.assert_close(
        logits, base_plus_adapter(model, tmp_path / "adapter", quantization), rtol=1e-4, atol=1e-4
    )
    weights = {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert ("lm_head.weight" in weights) is not tied
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) is (shard_size != "5GB")


@pytest.mark.parametrize("quantization", [None, Quantization("nf4", True)])
def test_biases_are_added_to_the_bases(tmp_path: Path, quantization: Quantization | None) -> None:
    folders = [tmp_path / name for name in ("base", "adapter", "out")]
    model = write_base(folders[0], has_biases=True)
    write_adapter(folders[1], model, {"q_proj", "o_proj"}, lora_bias=True)
    merge(*folders, quantization=quantization, dtype=torch.float32)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folders[2]).eval()(TOKENS).logits
    expected = base_plus_adapter(model, folders[1], quantization)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    write_adapter(folders[1], write_base(folders[0]), {"down_proj"}, lora_bias=True)
    with pytest.raises(ExportError, match=r"trains a bias \(lora_bias\), and .* has no .*down_proj.bias"):
        merge(folders[0], folders[1], tmp_path / "none", quantization=None, dtype=torch.float32)


def test_fp16_is_the_fp32_sum_cast_once(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    for dtype in (torch.float32, torch.float16):
        merge(
            tmp_path / "base",
            tmp_path / "adapter",
            tmp_path / str(dtype),
            quantization=Quantization("nf4"),
            dtype=dtype,
        )
    full, half = (
        load_file(tmp_path / str(dtype) / "model.safetensors") for dtype in (torch.float32, torch.float16)
    )
    assert full.keys() == half.keys()
    assert all(torch.equal(full[name].half(), half[name]) for name in full)


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"quantization_config": {"x": 1}}))
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quantization=None, dtype=torch.float16)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert names == copied | {"config.json", "model.safetensors"}
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    merged = json.loads((tmp_path / "out" / "config.json").read_text())
    mark = {"merged_onto": "original"}
    assert merged == config | {"dtype": "float16", "torch_dtype": "float16", "qlora_train": mark}


@pytest.mark.parametrize(
    "generation,listed",
    [({"eos_token_id": [5], "top_k": 3}, [5, 2, 7]), ({"eos_token_id": 7}, [7, 2]), (None, [2, 7])],
)
def test_tokens_that_end_an_answer_are_added_to_the_list(tmp_path: Path, generation, listed) -> None:
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    file = tmp_path / "base" / "generation_config.json"
    if generation is None:  # then config.json says it: 2
        file.unlink()
    else:
        file.write_text(json.dumps(generation))
    merge(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "out",
        quantization=None,
        dtype=torch.float16,
        end_ids=(2, 7),
    )
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == (generation or {}) | {"eos_token_id": listed}


def assert_refused(
    tmp_path: Path, message: str | None, error: type[BaseException] = ExportError, **options
) -> None:
    options = {"quantization": None, "dtype": torch.float16} | options
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(error, match=message):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_overflow_names_the_tensor_and_the_way_out(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"), {"down_proj"}, scale=500.0)
    assert_refused(tmp_path, r"layers\.0\.mlp\.down_proj\.weight.*--dtype bfloat16")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quantization=None, dtype=torch.bfloat16)


def test_disk_space_is_checked_first(tmp_path: Path, monkeypatch) -> None:
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    assert_refused(tmp_path, r"needs 0\.07 GB.*0\.00 GB free")


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))

    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupt)
    assert_refused(tmp_path, None, KeyboardInterrupt)


def test_an_output_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert_refused(tmp_path, "not an empty folder")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_an_output_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base"))
    (tmp_path / "file").write_text("keep")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(ExportError, match=r"file is a file.*--out"):
            merge(tmp_path / "base", tmp_path / "adapter", out, quantization=None, dtype=torch.float16)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    model = write_base(tmp_path / "base")
    adapter = {"model.layers.7.mlp.up_proj": (torch.ones(4, 64), torch.ones(128, 4))}
    save_adapter(tmp_path / "adapter", AdapterConfig("base", 4, 8), adapter)
    assert_refused(tmp_path, r"trains model\.layers\.7\.mlp\.up_proj")
    adapter = {"model.layers.1.mlp.up_proj": (torch.ones(4, 32), torch.ones(128, 4))}
    save_adapter(tmp_path / "adapter", AdapterConfig("base", 4, 8), adapter)
    assert_refused(tmp_path, r"\[128, 32\].*\[128, 64\]")
    write_adapter(tmp_path / "adapter", model)
    (tmp_path / "base" / "config.json").unlink()
    assert_refused(tmp_path, r"config\.json", BaseModelError)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_base_quantized_by_bitsandbytes(tmp_path: Path, form: str) -> None:
    model = write_base(tmp_path / "base")
    write_adapter(tmp_path / "adapter", model, {"q_proj", "down_proj"})
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    for name in [name for name in tensors if "layers" in name and tensors[name].ndim == 2]:
        if form == "int8":
            tensors[name], tensors[name.replace("weight", "SCB")], _ = bnb.int8_vectorwise_quant(
                tensors[name].half()
            )
        else:
            tensors[name], state = bnb.quantize_4bit(
                tensors[name], compress_statistics=True, quant_type="nf4"
            )
            tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    merge(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "whole",
        quantization=Quantization(form, form == "nf4"),
        dtype=torch.float16,
    )
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    assert_refused(tmp_path, "--base dequantized")
    merge(
        tmp_path / "base",
        tmp_path / "adapter",
        tmp_path / "out",
        quantization=Quantization(form, form == "nf4"),
        dtype=torch.float16,
    )
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_export_of_a_run(tmp_path: Path) -> None:
    model = write_base(tmp_path / "base")
    run = tmp_path / "run"
    with pytest.raises(RunFolderError, match=r"recipe\.yaml"):
        export(run)
    run.mkdir()
    recipe = (
        f"model: {{base: {tmp_path / 'base'}, quantization: fp4, double_quant: false}}\ndata: {{train:"
        " rows.jsonl}\n"
    )
    (run / "recipe.yaml").write_text(recipe)
    byte_tokenizer(CHAT_TEMPLATE.replace("eos_token", "'<pad>'")).save_pretrained(tmp_path / "base")
    with pytest.raises(RunFolderError, match="adapter"):
        export(run)
    write_adapter(run / "adapter", model)
    said: list[str] = []
    assert export(run, base="dequantized", dtype="bfloat16", log=said.append) == run / "merged"
    (line,) = said
    assert line.startswith("no receipt: the data of the run cannot be read (") and "rows.jsonl" in line
    marked = json.loads((run / "merged" / "config.json").read_text())["qlora_train"]
    assert marked == {"merged_onto": "dequantized", "quantization": "fp4"}
    card = (run / "merged" / "README.md").read_text()  # the base has none
    assert "in fp4 and merged onto its dequantized weights" in card and str(tmp_path) not in card
    merge(
        tmp_path / "base",
        run / "adapter",
        tmp_path / "out",
        quantization=Quantization("fp4"),
        dtype=torch.bfloat16,
    )
    found, expected = (load_file(path / "model.safetensors") for path in (run / "merged", tmp_path / "out"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((run / "merged" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    said.clear()
    original = load_file(export(run, out=tmp_path / "original", log=said.append) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert said[1] == "written in float32, the base's own (float16 is tried with a receipt only)"
    assert original[name].dtype == torch.float32 and not torch.equal(original[name].bfloat16(), found[name])
    with pytest.raises(BaseModelError, match="Quantizing them again would round most of the adapter away"):
        check_base(run / "merged", "nf4")
    for folder, quantization in ((run / "merged", "none"), (tmp_path / "original", "nf4")):
        check_base(folder, quantization)
    with pytest.raises(ExportError, match="to is 'merged'"):
        export(run, to="onnx")
    with pytest.raises(ExportError, match="float8"):
        export(run, dtype="float8")


@pytest.mark.parametrize(
    "quantization",
    [Quantization("nf4", True), Quantization("fp4"), Quantization("int8")],
    ids=lambda p: p.format,
)
def test_what_training_quantized_is_not_quantized_again(
    tmp_path: Path, monkeypatch, quantization: Quantization
) -> None:
    """The cache's bytes are merged into, and only if they are whole."""
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(tmp_path / "cache"))
    base, quantized_again = tmp_path / "base", []
    model = write_base(base, shard_size="60kB")
    write_adapter(tmp_path / "adapter", model)

    def merged(name: str, cached: QuantizedLayers | None) -> bytes:
        folder, dtype = tmp_path / name, torch.float16
        merge(base, tmp_path / "adapter", folder, quantization=quantization, cached=cached, dtype=dtype)
        return b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))

    def noting_quantize(*arguments: Any, **options: Any) -> QuantizedWeight:
        quantized_again.append(options["name"])
        return quantize(*arguments, **options)

    monkeypatch.setattr(sys.modules[merge.__module__], "quantize", noting_quantize)
    assert cached_layers(base, quantization, torch.float32) is None
    expected = merged("again", None)
    assert len(quantized_again) == 2 * len(LINEARS)

    load_base(base, quantization, torch.float32, THE_CPU, cache=tmp_path / "cache").close()
    quantized_again.clear()
    assert cached_layers(base, quantization, torch.bfloat16) is None
    cached = cached_layers(base, quantization, torch.float32)
    assert cached is not None
    with cached:
        assert merged("cached", cached) == expected
    assert not quantized_again

    (layers,) = (tmp_path / "cache").rglob("layers.bin")
    damaged = bytearray(layers.read_bytes())
    damaged[5] ^= 1
    layers.write_bytes(damaged)
    assert cached_layers(base, quantization, torch.float32) is None
