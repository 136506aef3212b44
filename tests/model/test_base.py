"""Loading: what is read, what is refused, and how much memory it takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import write_checkpoint
from torch import Tensor

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.errors import BaseModelError, UnsupportedModelError
from qlora_train.model.base import read_config
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.quant.formats import Quantization
from qlora_train.weights.load import load_base

NF4 = Quantization("nf4", double_quant=True)
UP = "model.layers.1.mlp.up_proj"


def load(folder: Path, quantization: Quantization = NF4, dtype: torch.dtype = torch.float32) -> FrozenDecoder:
    return load_base(folder, quantization, dtype, CPU)


def rewrite(folder: Path, change) -> dict[str, Tensor]:
    """Apply `change` to the checkpoint's tensors in place."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(dict(tensors)) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def without(name: str):
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def replaced(name: str, value: Tensor):
    return lambda tensors: tensors | {name: value}


def test_every_weight_arrives(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "qwen2")
    tensors = load_file(folder / "model.safetensors")
    decoder = load(folder, Quantization("none"), torch.bfloat16)
    assert len(decoder.linears) == 21
    for name, linear in decoder.linears.items():
        weight = linear.source.dequantize(name, torch.bfloat16)
        assert torch.equal(weight, tensors[f"{name}.weight"].bfloat16()), name
        bias = tensors.get(f"{name}.bias")
        assert (linear.bias is None) == (bias is None)
        assert bias is None or torch.equal(linear.bias, bias.bfloat16())
    assert torch.equal(decoder.embedding.weight, tensors["model.embed_tokens.weight"].bfloat16())
    assert torch.equal(decoder.norm.weight, tensors["model.norm.weight"].bfloat16())
    assert torch.equal(decoder.head.weight, tensors["lm_head.weight"].bfloat16())


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    for name in (f"{UP}.weight", "model.norm.weight", "lm_head.weight"):
        kept = rewrite(folder, lambda tensors: None)
        rewrite(folder, without(name))
        with pytest.raises(BaseModelError, match=f"the checkpoint has no tensor {name}"):
            load(folder)
        rewrite(folder, lambda _, kept=kept: kept)


def test_a_weight_without_a_place_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rewrite(folder, replaced(f"{UP}.bias", torch.zeros(112)))
    with pytest.raises(
        BaseModelError, match=rf"1 weights that config\.json has no place for \(such as {UP}\.bias\)"
    ):
        load(folder)


def test_rotary_tables_in_old_checkpoints_are_no_surplus(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rewrite(folder, replaced("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(8)))
    load(folder)


@pytest.mark.parametrize("name", [f"{UP}.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_wrong_shape_is_named(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path)
    shape = list(load_file(folder / "model.safetensors")[name].shape)
    wrong = [shape[0] + 1, *shape[1:]]
    rewrite(folder, replaced(name, torch.ones(wrong)))
    with pytest.raises(BaseModelError) as caught:
        load(folder)
    assert f"{name} is {wrong} in the checkpoint, config.json needs {shape}" in str(caught.value)


def test_names_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    expected = load(folder)
    rewrite(folder, lambda tensors: {n.removeprefix("model."): t for n, t in tensors.items()})
    decoder = load(folder)
    for name, linear in decoder.linears.items():
        theirs = expected.linears[name].source.dequantize(name, torch.float32)
        assert torch.equal(linear.source.dequantize(name, torch.float32), theirs)
    assert torch.equal(decoder.norm.weight, expected.norm.weight)


def test_a_tied_head_may_be_in_the_file_or_not(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llama-tied")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    for _ in range(2):
        decoder = load(folder)
        assert decoder.head is decoder.embedding
        rewrite(
            folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        )


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"model_type": "no_such_family"}', "{}"])
def test_an_unreadable_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseModelError, match=r"config\.json: (transformers )?cannot (be read|read it)"):
        read_config(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseModelError):
        load(folder)


def test_a_family_that_is_no_causal_decoder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 16, "num_layers": 1}))
    with pytest.raises(UnsupportedModelError, match="t5"):
        load(tmp_path)


def quantize_with_bitsandbytes(folder: Path, quantization: Quantization) -> None:
    """Replace every linear of the layers by what bitsandbytes saves for it."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            weight = tensors.pop(name)
            if quantization.format == "int8":
                codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
                tensors |= {name: codes, name.replace("weight", "SCB"): scales}
                continue
            data, state = bnb.quantize_4bit(
                weight,
                blocksize=quantization.block_size,
                quant_type=quantization.format,
                compress_statistics=quantization.double_quant,
            )
            tensors[name] = data
            tensors |= {f"{name}.{k}": v.contiguous() for k, v in state.as_dict(packed=True).items()}
        return tensors

    rewrite(folder, change)


@pytest.mark.parametrize(
    "quantization",
    [NF4, Quantization("fp4"), Quantization("nf4", False, 128), Quantization("int8")],
    ids=lambda p: p.format,
)
def test_quantized_checkpoints_load_as_they_are(tmp_path: Path, quantization: Quantization) -> None:
    folder = write_checkpoint(tmp_path, "llama", intermediate_size=128)
    expected = None if quantization.block_size != 64 else load(folder, quantization)
    quantize_with_bitsandbytes(folder, quantization)
    decoder = load(folder, quantization)
    for name, linear in decoder.linears.items():
        weight = linear.source.quantized[name]
        assert weight.quantization == quantization
        if expected is not None:
            for key, tensor in expected.linears[name].source.quantized[name].tensors.items():
                assert torch.equal(weight.tensors[key], tensor), f"{name} {key}"


@pytest.mark.parametrize(
    ("found", "asked", "words"),
    [
        (
            NF4,
            Quantization("nf4"),
            "quantized as nf4 with double quantization, block size 64, the recipe asks for nf4, block",
        ),
        (
            Quantization("fp4"),
            NF4,
            "quantized as fp4, block size 64, the recipe asks for nf4 with double quantization",
        ),
        (Quantization("int8"), Quantization("none"), "quantized as int8, the recipe asks for none"),
    ],
)
def test_a_quantized_checkpoint_must_be_quantized_as_the_recipe_says(
    tmp_path: Path, found: Quantization, asked: Quantization, words: str
) -> None:
    folder = write_checkpoint(tmp_path, "llama", intermediate_size=128)
    quantize_with_bitsandbytes(folder, found)
    with pytest.raises(BaseModelError, match=words):
        load(folder, asked)


def test_a_quantized_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llama", intermediate_size=128)
    quantize_with_bitsandbytes(folder, NF4)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 192}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BaseModelError, match=r"is \[128, 64\] in the checkpoint, config.json needs \[192, 64\]"
    ):
        load(folder, NF4)


# Prints the growth of the peak of resident memory while loading, and the bytes that stay.
MEASURE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from qlora_train.device.compute import THE_CPU
from qlora_train.weights.load import load_base
from qlora_train.quant.formats import Quantization

def high_water_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = high_water_bytes()
decoder = load_base(Path(sys.argv[1]), Quantization("nf4", double_quant=True), torch.bfloat16, THE_CPU)
grown = high_water_bytes() - before
source = next(iter(decoder.linears.values())).source
plain = {p.data_ptr(): p.nbytes for p in [decoder.embedding.weight, decoder.head.weight]}
print(grown, source.num_bytes + sum(plain.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_while_loading(tmp_path: Path) -> None:
    """106M parameters, 423 MB in fp32: at most the quantized size + 256 MB on top of the imports."""
    folder = write_checkpoint(tmp_path, num_hidden_layers=1, vocab_size=96)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 2, "head_dim": 128}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    block = torch.empty(7168, 2048).normal_(0, 0.02, generator=generator)
    tensors = {
        "model.embed_tokens.weight": block[:96],
        "lm_head.weight": block[96:192],
        "model.norm.weight": block[0],
    }
    sizes = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name, (rows, columns) in sizes.items():
            tensors[f"{prefix}.self_attn.{name}.weight"] = block[:rows, :columns]
        tensors[f"{prefix}.mlp.gate_proj.weight"] = tensors[f"{prefix}.mlp.up_proj.weight"] = block
        tensors[f"{prefix}.mlp.down_proj.weight"] = block.view(2048, 7168)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = block[1]
    num_parameters = sum(t.numel() for t in tensors.values())
    save_file(
        {n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    del tensors, block

    command = [sys.executable, "-c", MEASURE, str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    grown_bytes, stays_bytes = (int(word) for word in output.split()[-2:])
    assert num_parameters > 100e6
    assert 0.5 * num_parameters < stays_bytes < 0.54 * num_parameters
    assert grown_bytes <= stays_bytes + 256 * 2**20
