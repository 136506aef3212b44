"""LoRA on experts, to and from PEFT: what is saved, loaded, merged and refused.

The ranks are no number of experts, so an order of the two that is not PEFT's would not pass."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from mxfp4_bases import write_mxfp4_base
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import load_tiny, packed_row, random_model, tiny_config, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_train.adapter.adapter_config import CONFIG_FILE, AdapterConfig, name_parameters, within_layer
from qlora_train.adapter.adapter_files import WEIGHTS_FILE, load_adapter, load_fitting, save_adapter
from qlora_train.errors import BaseModelError, ExportError
from qlora_train.export.merge import merge
from qlora_train.model.base import adaptable_names, read_config
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.quant.formats import Quantization

RANK = 4
NO = Quantization("none")
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "nemotron_h", "gemma4_text+experts"]
PREFIX = "base_model.model."


def library_model(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


def peft_adapter(base: Path, folder: Path, only: str = "") -> PeftModel:
    """An adapter that PEFT writes: experts whose path ends with `only`, and q; random numbers."""
    names = sorted({within_layer(path) for path in adaptable_names(read_config(base))[1]})
    config = LoraConfig(
        r=RANK, lora_alpha=6, init_lora_weights=False, target_modules=["q_proj"],
        target_parameters=[name for name in names if name.endswith(only)],
        rank_pattern={"experts.down_proj": 5}, alpha_pattern={"experts.down_proj": 3},
    )  # fmt: skip
    torch.manual_seed(5)
    wrapped = get_peft_model(library_model(base), config).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    wrapped.save_pretrained(folder)
    return wrapped


@torch.no_grad()
def our_logits(decoder: FrozenDecoder, token_ids: Tensor) -> Tensor:
    tokens = packed_row([token_ids.shape[1]])
    assert torch.equal(tokens.token_ids, token_ids)
    x, arguments = decoder.embed_packed(tokens)
    for index in decoder.layers_in_turn():
        x = decoder.run_layer(index, x, arguments[index])
    return decoder.logits(decoder.norm(x))


@pytest.mark.parametrize("only", ["", ".gate_up_proj", "down_proj"], ids=["both", "first", "down"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_pefts_is_loaded_saved_and_merged_as_peft_does(
    tmp_path: Path, family: str, only: str
) -> None:
    """Nemotron's experts have no gates, and its tensors other names on disk."""
    base = write_checkpoint(tmp_path / "base", family)
    if family == "nemotron_h":
        only = only.replace(".gate_up_proj", ".up_proj")
    wrapped = peft_adapter(base, tmp_path / "theirs", only)
    ids = packed_row([23]).token_ids
    decoder, _ = load_tiny(base, NO)
    for linear in decoder.linears.values():
        linear.lora = None
    config, pairs = load_fitting(tmp_path / "theirs", decoder.adaptable)
    lora = LoraParameters.of_adapter(decoder.adaptable, config, pairs, dtype=torch.float32, device="cpu")
    assert decoder.stacks.keys() & pairs.keys()
    with torch.no_grad():
        theirs = wrapped(ids).logits
        assert not torch.allclose(library_model(base)(ids).logits, theirs, atol=1e-2)
    torch.testing.assert_close(our_logits(decoder, ids), theirs, rtol=1e-4, atol=1e-4)

    trained = decoder.stacks.keys() & pairs.keys()
    alphas = {path: config.alpha_of(path) for path in pairs}
    ours = AdapterConfig(
        "base", RANK, 6, target_modules=["q_proj"], rank_pattern=lora.ranks, alpha_pattern=alphas,
        target_parameters=name_parameters(trained, decoder.stacks),
    )  # fmt: skip
    save_adapter(tmp_path / "ours", ours, lora.views(lora.masters))
    saved, expected = (load_file(tmp_path / name / WEIGHTS_FILE) for name in ("ours", "theirs"))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)
    with torch.no_grad():
        again = PeftModel.from_pretrained(library_model(base), tmp_path / "ours").eval()(ids).logits
    assert torch.equal(again, theirs)

    merge(base, tmp_path / "ours", tmp_path / "merged", quantization=None, dtype=torch.float32)
    found, wanted = library_model(tmp_path / "merged"), wrapped.merge_and_unload()
    assert (
        load_file(tmp_path / "merged" / "model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(found.get_parameter(name).data, parameter.data, rtol=1e-5, atol=1e-6)


def test_experts_in_one_tensor_are_merged_too(tmp_path: Path) -> None:
    random_model(tiny_config("qwen3_moe")).save_pretrained(tmp_path / "base", save_original_format=False)
    wrapped = peft_adapter(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quantization=None, dtype=torch.float32)
    found, wanted = library_model(tmp_path / "out"), wrapped.merge_and_unload()
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(found.get_parameter(name).data, parameter.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_merged_onto_dequantized_weights_is_the_trained_model(tmp_path: Path, family: str) -> None:
    base, nf4 = write_checkpoint(tmp_path / "base", family), Quantization("nf4")
    peft_adapter(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", quantization=nf4, dtype=torch.float32)
    check_merged(base, tmp_path, nf4)


@pytest.mark.parametrize("onto", [None, Quantization("nf4")], ids=str)
def test_experts_in_mxfp4_are_merged_as_the_trained_model(tmp_path: Path, onto: Quantization | None) -> None:
    """They are held [out, in] in training, and [in, out] in the merged model."""
    base = write_mxfp4_base(tmp_path / "base")
    peft_adapter(tmp_path / "base-16", tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "out", quantization=onto, dtype=torch.float32)
    check_merged(base, tmp_path, onto or NO)


def check_merged(base: Path, folder: Path, quantization: Quantization) -> None:
    decoder, _ = load_tiny(base, quantization)
    for linear in decoder.linears.values():
        linear.lora = None
    config, pairs = load_fitting(folder / "adapter", decoder.adaptable)
    LoraParameters.of_adapter(decoder.adaptable, config, pairs, dtype=torch.float32, device="cpu")
    ids = packed_row([23]).token_ids
    merged = library_model(folder / "out")
    with torch.no_grad():
        torch.testing.assert_close(our_logits(decoder, ids), merged(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_older_orientation_is_refused_by_its_shape(tmp_path: Path, family: str) -> None:
    """PEFT 0.18: A [E R, out] and B [in, R E]."""
    base, adapter = write_checkpoint(tmp_path / "base", family), tmp_path / "adapter"
    peft_adapter(base, adapter)
    tensors = load_file(adapter / WEIGHTS_FILE)
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name], tensors[other] = tensors[other].t().contiguous(), tensors[name].t().contiguous()
    save_file(tensors, adapter / WEIGHTS_FILE)
    decoder, _ = load_tiny(base, NO)
    config, pairs = load_fitting(adapter, decoder.adaptable)
    message = r"A and B for model\.layers\.\d\.mlp\.experts\.\w+ are .*, the orientation"
    with pytest.raises(BaseModelError, match=message):
        LoraParameters.of_adapter(decoder.adaptable, config, pairs, dtype=torch.float32, device="cpu")
    with pytest.raises(BaseModelError, match=message):
        merge(base, adapter, tmp_path / "out", quantization=None, dtype=torch.float32)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "other", "qwen3_moe", num_experts=12)
    base = write_checkpoint(tmp_path / "base", "qwen3_moe")
    peft_adapter(tmp_path / "other", tmp_path / "adapter")
    with pytest.raises(ExportError, match="has 10 experts of .* numbers. Is this the base"):
        merge(base, tmp_path / "adapter", tmp_path / "out", quantization=None, dtype=torch.float32)
    decoder, _ = load_tiny(base, NO)
    config, pairs = load_fitting(tmp_path / "adapter", decoder.adaptable)
    with pytest.raises(BaseModelError, match=re.escape("A is (48, 64), this run needs (40, 64)")):
        LoraParameters.of_adapter(decoder.adaptable, config, pairs, dtype=torch.float32, device="cpu")


def test_tensors_that_fit_no_parameter_are_refused(tmp_path: Path) -> None:
    base, adapter = write_checkpoint(tmp_path / "base", "qwen3_moe"), tmp_path / "adapter"
    peft_adapter(base, adapter)
    config, whole = json.loads((adapter / CONFIG_FILE).read_text()), load_file(adapter / WEIGHTS_FILE)
    save_file({n: t for n, t in whole.items() if "experts.base_layer" not in n}, adapter / WEIGHTS_FILE)
    with pytest.raises(
        BaseModelError, match=r"target_parameters names model.layers.\d.mlp.experts.gate_up_p"
    ):
        load_adapter(adapter)
    save_file(whole, adapter / WEIGHTS_FILE)
    (adapter / CONFIG_FILE).write_text(json.dumps(config | {"rank_pattern": {"experts.down_proj": 7}}))
    with pytest.raises(BaseModelError, match=r"has 50 rows, which is no multiple of the rank 7"):
        load_adapter(adapter)
