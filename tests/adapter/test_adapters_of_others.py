"""Adapters that other tools wrote: every name they give a module, patterns, a head, and who decides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import packed_row, random_model, tiny_config
from transformers import PreTrainedModel

from qlora_train.adapter.adapter_config import CONFIG_FILE, HEAD, AdapterConfig, match_modules, name_targets
from qlora_train.adapter.adapter_files import (
    WEIGHTS_FILE,
    head_copy,
    load_adapter,
    load_fitting,
    save_adapter,
)
from qlora_train.adapter.continued_adapter import as_continued
from qlora_train.device.compute import THE_CPU
from qlora_train.errors import BaseModelError
from qlora_train.model.base import adaptable_names
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.quant.formats import Quantization
from qlora_train.recipe import LoraSection
from qlora_train.walk.evaluate import loss_sum
from qlora_train.weights.load import load_base

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_model(tiny_config("llama-tied")).save_pretrained(folder)
    return folder


def with_peft(base: Path, folder: Path, **options: Any) -> PreTrainedModel:
    """A random adapter by peft in `folder`, and the model with it."""
    torch.manual_seed(1)
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "init_lora_weights": False} | options
    config = peft.LoraConfig(task_type="CAUSAL_LM", **chosen)
    model = random_model(tiny_config("llama-tied"))
    model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return adapted.eval()


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)


def attach(decoder: FrozenDecoder, folder: Path) -> None:
    config, pairs = load_fitting(folder, [*decoder.linears, HEAD])
    if HEAD in pairs:
        decoder.adapt_head(pairs.pop(HEAD), config.scaling_of(HEAD), head_copy(folder))
    LoraParameters.of_adapter(decoder.linears, config, pairs, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}},
        {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"v_proj": 8}, "use_rslora": True},
        {"layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"use_dora": True, "use_rslora": True},
        {"lora_bias": True, "use_rslora": True},
    ],
    ids=["plain", "ranks", "alphas", "layers", "head", "DoRA", "biases"],
)
def test_the_loss_is_pefts(base: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapted = with_peft(base, tmp_path / "a", **options)
    decoder = load_base(base, Quantization("none"), torch.float32, THE_CPU)
    decoder.fuse(norms=False, mlps=True, qkv=True)
    attach(decoder, tmp_path / "a")
    tokens = packed_row([17], unsupervised=1)
    with torch.no_grad():
        logits = adapted(input_ids=tokens.token_ids).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, tokens.labels, reduction="sum")
    torch.testing.assert_close(loss_sum(decoder, [tokens]), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
        lambda name: name.replace("model.model.layers", "model.language_model.model.layers"),
        lambda name: name.replace("model.model.layers", "model.layers"),
        lambda name: name.replace("base_model.model.", ""),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
)
def test_every_name_of_a_module(base: Path, tmp_path: Path, change: Callable[[str], str]) -> None:
    with_peft(base, tmp_path / "a")
    names = adaptable_names(tiny_config("llama-tied"))[0]
    _, expected = load_fitting(tmp_path / "a", names)
    rename(tmp_path / "a", change)
    _, found = load_fitting(tmp_path / "a", names)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n][i], expected[n][i]) for n in expected for i in (0, 1))


def test_every_name_of_a_magnitude(base: Path, tmp_path: Path) -> None:
    with_peft(base, tmp_path / "a", use_dora=True)
    for ending in ("", ".default", ".default.weight"):
        rename(tmp_path / "a", lambda name, e=ending: re.sub(r"(magnitude_vector).*", rf"\1{e}", name))  # type: ignore[misc]
        _, found = load_fitting(tmp_path / "a", adaptable_names(tiny_config("llama-tied"))[0])
        assert all(m.shape == b.shape[:1] and m.count_nonzero() for _, b, m in found.values())


def test_dora_of_a_head_or_of_other_rows_is_refused(base: Path, tmp_path: Path) -> None:
    with_peft(base, tmp_path / "a", use_dora=True, target_modules=["q_proj", "lm_head"])
    with pytest.raises(BaseModelError, match=r"uses use_dora on lm_head"):
        load_adapter(tmp_path / "a")
    with_peft(base, tmp_path / "b", use_dora=True, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "b" / WEIGHTS_FILE)
    short = {name: t[:5].clone() if "magnitude" in name else t for name, t in tensors.items()}
    save_file(short, tmp_path / "b" / WEIGHTS_FILE)
    with pytest.raises(BaseModelError, match=r"has the shape \[5\]; it must be \[64\]"):
        load_adapter(tmp_path / "b")
    config = json.loads((tmp_path / "b" / CONFIG_FILE).read_text())
    (tmp_path / "b" / CONFIG_FILE).write_text(json.dumps(config | {"use_dora": False}))
    save_file(tensors, tmp_path / "b" / WEIGHTS_FILE)
    with pytest.raises(BaseModelError, match="use_dora: false, and .* holds a lora_magnitude_vector"):
        load_adapter(tmp_path / "b")


def test_the_bias_of_a_head_or_of_other_rows_is_refused(base: Path, tmp_path: Path) -> None:
    with_peft(base, tmp_path / "a", lora_bias=True, target_modules=["q_proj", "lm_head"])
    with pytest.raises(BaseModelError, match=r"uses lora_bias on lm_head"):
        load_adapter(tmp_path / "a")
    with_peft(base, tmp_path / "b", lora_bias=True, target_modules=["q_proj"])
    tensors = load_file(tmp_path / "b" / WEIGHTS_FILE)
    for changed, message in {
        lambda t: t[:5].clone(): r"the lora_B.bias of .* has the shape \[5\]; it must be \[64\]",
        lambda t: None: "lora_bias: true, and .* holds no lora_B.bias of",
    }.items():
        kept = {name: changed(t) if name.endswith("bias") else t for name, t in tensors.items()}
        save_file({name: t for name, t in kept.items() if t is not None}, tmp_path / "b" / WEIGHTS_FILE)
        with pytest.raises(BaseModelError, match=message):
            load_adapter(tmp_path / "b")


def test_another_tower_is_not_the_text_model(base: Path, tmp_path: Path) -> None:
    with_peft(base, tmp_path / "a")
    rename(tmp_path / "a", lambda name: name.replace("model.model.", "model.model.vision_tower."))
    with pytest.raises(BaseModelError, match=r"vision_tower\.model\.layers\.0.*this base does not have"):
        load_fitting(tmp_path / "a", adaptable_names(tiny_config("llama-tied"))[0])
    assert match_modules(["vision_tower.layers.0.q"], ["model.layers.0.q"]) == {}


def test_an_adapters_own_head_must_be_the_bases(base: Path, tmp_path: Path) -> None:
    with_peft(base, tmp_path / "a", target_modules=["lm_head"])
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    (name,) = (name for name in tensors if "base_layer" in name)
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "a" / WEIGHTS_FILE)
    decoder = load_base(base, Quantization("none"), torch.float32, THE_CPU)
    with pytest.raises(BaseModelError, match="an lm_head of its own"):
        attach(decoder, tmp_path / "a")


def test_written_again_it_says_the_same(base: Path, tmp_path: Path) -> None:
    """Ranks, alphas and layers, as peft reads them."""
    with_peft(
        base, tmp_path / "a", layers_to_transform=[1], rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 5}
    )
    config, lora = load_adapter(tmp_path / "a")
    names, layers = name_targets(lora, adaptable_names(tiny_config("llama-tied"))[0])
    assert (names, layers) == (sorted(ALL), [1])
    written = AdapterConfig(
        "b",
        4,
        8,
        target_modules=names,
        layers=layers,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
    )
    save_adapter(tmp_path / "b", written, lora)
    model = peft.PeftModel.from_pretrained(random_model(tiny_config("llama-tied")), tmp_path / "b")
    state = peft.get_peft_model_state_dict(model)
    assert state.keys() == load_file(tmp_path / "a" / WEIGHTS_FILE).keys()
    module = model.get_submodule("base_model.model.model.layers.1.self_attn.k_proj")
    assert module.scaling["default"] == 5 / 4
    assert model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").r["default"] == 2


def test_the_adapter_decides_what_the_recipe_leaves_out(base: Path, tmp_path: Path) -> None:
    with_peft(base, tmp_path / "a", r=2, lora_alpha=5, target_modules=r".*layers\.[01]\..*(q|v)_proj")
    linears = adaptable_names(tiny_config("llama-tied"))[0]
    for written in ({}, {"rank": 2}, {"target_modules": "all-linear"}):
        lora = as_continued(LoraSection(init_from=str(tmp_path / "a"), **written), linears)  # type: ignore[arg-type]
        assert (lora.rank, lora.alpha) == (2, 5)
        assert (lora.target_modules, lora.layers_to_transform) == (("q_proj", "v_proj"), (0, 1))
    assert as_continued(lora, linears) == lora  # a resume reads it resolved
    with pytest.raises(BaseModelError, match=r"another rank than.*lora\.rank 2, lora\.alpha 5"):
        as_continued(LoraSection(init_from=str(tmp_path / "a"), rank=16), linears)
    with pytest.raises(BaseModelError, match=r"modules of lora\.init_from in 2 modules"):
        as_continued(LoraSection(init_from=str(tmp_path / "a"), target_modules=("q_proj", "v_proj")), linears)


def test_a_pattern_that_is_none_is_named(base: Path, tmp_path: Path) -> None:
    with_peft(base, tmp_path / "a")
    raw = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    for pattern in ({"q_proj": "two"}, {"(": 2}, [1]):
        (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(raw | {"rank_pattern": pattern}))
        with pytest.raises(
            BaseModelError, match=re.escape("rank_pattern and alpha_pattern map module names")
        ):
            load_adapter(tmp_path / "a")
