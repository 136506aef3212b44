"""Adapter folders: PEFT reads ours, we read PEFT's, and anything beyond plain LoRA is refused."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_train.adapter.adapter_config import CONFIG_FILE, AdapterConfig, name_targets
from qlora_train.adapter.adapter_files import WEIGHTS_FILE, load_adapter, save_adapter
from qlora_train.errors import BaseModelError

CONFIG = AdapterConfig("some/base", rank=3, alpha=6, dropout=0.05, target_modules=["q_proj", "down_proj"])


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
    )
    return LlamaForCausalLM(config)


def some_factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 24)}
    return {
        f"model.layers.{layer}.{name}": (
            torch.randn(3, in_features, generator=generator),
            torch.randn(out_features, 3, generator=generator),
        )
        for layer in range(2)
        for name, (out_features, in_features) in sizes.items()
    }


def test_peft_loads_what_we_write(tmp_path: Path) -> None:
    lora = some_factors()
    save_adapter(tmp_path / "adapter", CONFIG, lora)
    model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
    state = peft.get_peft_model_state_dict(model)
    assert len(state) == 2 * len(lora)
    for path, (a, b) in lora.items():
        assert torch.equal(state[f"base_model.model.{path}.lora_A.weight"], a)
        assert torch.equal(state[f"base_model.model.{path}.lora_B.weight"], b)
        assert model.get_submodule(f"base_model.model.{path}").scaling["default"] == CONFIG.scaling == 2.0


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], r".*\.(q|up)_proj"])
def test_we_load_what_peft_writes(tmp_path: Path, targets: list[str] | str) -> None:
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=9,
        target_modules=targets,
        use_rslora=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(tiny_llama(), lora)
    model.save_pretrained(tmp_path)
    config, lora = load_adapter(tmp_path)
    assert (config.rank, config.alpha, config.use_rslora, config.scaling) == (4, 9, True, 4.5)
    assert config.target_modules == ["q_proj", "up_proj"]
    assert len(lora) == 4
    for path, (a, b) in lora.items():
        module = model.get_submodule(f"base_model.model.{path}")
        assert torch.equal(a, module.lora_A["default"].weight)
        assert torch.equal(b, module.lora_B["default"].weight)


@pytest.mark.parametrize(
    ("endings", "expected"),
    [
        (("q_proj", "down_proj"), (["down_proj", "q_proj"], None)),
        (("1.self_attn.q_proj", "up_proj"), (["model.layers.1.self_attn.q_proj", "up_proj"], None)),
        (("layers.0.mlp.up_proj",), (["up_proj"], [0])),
    ],
)
def test_the_config_names_no_module_that_was_not_trained(
    tmp_path: Path, endings: tuple[str, ...], expected: tuple[list[str], list[int] | None]
) -> None:
    model = tiny_llama()
    linears = [
        name for name, m in model.model.named_modules(prefix="model") if isinstance(m, torch.nn.Linear)
    ]
    trained = [name for name in linears if name.endswith(endings)]
    names, layers = name_targets(trained, linears)
    assert (names, layers) == expected
    config = peft.LoraConfig(r=2, target_modules=names, layers_to_transform=layers, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    tuned = {name for name, m in wrapped.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert tuned == set(trained)


def test_round_trip_is_exact_and_bytes_are_deterministic(tmp_path: Path) -> None:
    lora = some_factors()
    save_adapter(tmp_path / "one", CONFIG, lora)
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "stale.txt").write_text("replaced wholly")
    save_adapter(tmp_path / "two", CONFIG, dict(reversed(lora.items())))
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    config, loaded = load_adapter(tmp_path / "one")
    assert config == AdapterConfig("some/base", 3, 6, dropout=0.05, target_modules=["down_proj", "q_proj"])
    assert all(torch.equal(loaded[path][i], lora[path][i]) for path in lora for i in (0, 1))
    assert {tensor.dtype for pair in loaded.values() for tensor in pair} == {torch.float32}


def test_a_failing_write_leaves_the_old_adapter(tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", CONFIG, some_factors())
    before = (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes()
    unwritable = AdapterConfig("base", 3, 6, target_modules=[object()])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        save_adapter(tmp_path / "adapter", unwritable, some_factors())
    assert (tmp_path / "adapter" / WEIGHTS_FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"use_dora": True}, "use_dora: true, and .* holds no lora_magnitude_vector of"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "have rank 3, its config says 8"),
        ({"fan_in_fan_out": True}, "Conv1D"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"r": 5}, "have rank 3, its config says 5"),
    ],
)
def test_features_beyond_plain_lora_are_refused_by_name(tmp_path: Path, changes: dict, message: str) -> None:
    save_adapter(tmp_path, CONFIG, some_factors())
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | changes))
    with pytest.raises(BaseModelError, match=message):
        load_adapter(tmp_path)


def test_damaged_adapter_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no adapter here"):
        load_adapter(tmp_path)
    save_adapter(tmp_path / "a", CONFIG, some_factors())
    tensors = load_file(tmp_path / "a" / WEIGHTS_FILE)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.ones(2)}, tmp_path / "a" / WEIGHTS_FILE)
    with pytest.raises(BaseModelError, match=r"lm_head\.weight"):
        load_adapter(tmp_path / "a")
    tensors.pop("base_model.model.model.layers.1.mlp.down_proj.lora_B.weight")
    save_file(tensors, tmp_path / "a" / WEIGHTS_FILE)
    with pytest.raises(BaseModelError, match=r"only one of A and B of model\.layers\.1\.mlp\.down_proj"):
        load_adapter(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS_FILE).rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(BaseModelError, match="pickle"):
        load_adapter(tmp_path / "a")
