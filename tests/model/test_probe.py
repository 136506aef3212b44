"""The start-up probe: what it builds, and that it notices a walk that computes something else."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_config as config_of
from transformers import PretrainedConfig

from qlora_train.errors import UnsupportedModelError
from qlora_train.model import probe as probe_module
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.linear import LinearLora
from qlora_train.model.probe import WINDOW, probe, tiny_config
from qlora_train.model.rope_lengths import refuse_length_dependent_rope


def test_the_tiny_config_keeps_what_decides() -> None:
    granite = tiny_config(
        config_of("granite", num_attention_heads=16, num_key_value_heads=4, hidden_size=256)
    )
    assert (granite.num_hidden_layers, granite.hidden_size) == (2, 64)
    assert (granite.num_attention_heads, granite.num_key_value_heads) == (4, 2)
    scales = granite.embedding_multiplier, granite.attention_multiplier, granite.residual_multiplier
    assert (*scales, granite.logits_scaling) == (3.0, 0.2, 0.4, 2.5)
    assert tiny_config(config_of("llama3-rope")).rope_parameters["rope_type"] == "llama3"
    assert tiny_config(config_of("llama-tied")).tie_word_embeddings is True
    mistral = tiny_config(config_of("mistral"))
    assert type(mistral) is type(config_of("mistral")) and mistral.sliding_window == WINDOW


@pytest.mark.parametrize(("heads", "kv_heads", "expected"), [(8, 8, 4), (8, 2, 2), (8, 1, 1)])
def test_the_tiny_config_keeps_the_kind_of_head_grouping(heads: int, kv_heads: int, expected: int) -> None:
    config = config_of("llama", num_attention_heads=heads, num_key_value_heads=kv_heads)
    assert tiny_config(config).num_key_value_heads == expected


def test_the_tiny_config_has_two_layers_of_different_kinds() -> None:
    config = config_of(
        "qwen2", num_hidden_layers=8, use_sliding_window=True, sliding_window=8, max_window_layers=6
    )
    assert config.layer_types == ["full_attention"] * 6 + ["sliding_attention"] * 2
    assert tiny_config(config).layer_types == ["full_attention", "sliding_attention"]
    rope_free = config_of("smollm3", num_hidden_layers=5, no_rope_layers=[1, 1, 1, 0, 1])
    assert tiny_config(rope_free).no_rope_layers == [1, 0]


def test_the_config_itself_is_left_alone() -> None:
    config = config_of("mistral")
    before = config.to_dict()
    probe(config)
    assert config.to_dict() == before
    assert tiny_config(config).num_hidden_layers == 2


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "starcoder2", "glm4"])
def test_families_beyond_the_tested_list_are_measured_too(family: str) -> None:
    found = probe(config_of(family, head_dim=16) if family != "starcoder2" else config_of(family))
    # Where a norm follows the MLP, its gradient needs the MLP's value.
    assert found.skippable == (("mlp.c_proj",) if family == "starcoder2" else ())


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma", "granite", "cohere"])
def test_the_tail_is_found_where_it_goes_straight_into_the_residual_sum(family: str) -> None:
    assert probe(config_of(family)).skippable == ("mlp.down_proj",)


def test_the_global_random_state_is_not_needed() -> None:
    torch.manual_seed(0)
    first = probe_module._try_out(tiny_config(config_of("llama")))[0]
    torch.manual_seed(99)
    assert probe_module._try_out(tiny_config(config_of("llama")))[0] == first
    assert max(first.values()) < 1e-5
    assert len(first) == 2 + 2 * 14  # logits, loss, A and B of 7 linears in 2 layers


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    tile_logits = FrozenDecoder.tile_logits
    monkeypatch.setattr(FrozenDecoder, "tile_logits", lambda *args: 1.01 * tile_logits(*args))


def wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: LinearLora, gradient_a: torch.Tensor, gradient_b: torch.Tensor) -> None:
        self.gradient_a.add_(gradient_a)
        self.gradient_b.add_(1.001 * gradient_b)

    monkeypatch.setattr(LinearLora, "add_gradients", add)


def nan_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: LinearLora, gradient_a: torch.Tensor, gradient_b: torch.Tensor) -> None:
        self.gradient_a.fill_(float("nan"))

    monkeypatch.setattr(LinearLora, "add_gradients", add)


@pytest.mark.parametrize(
    ("fault", "words"),
    [(wrong_scale, "logits by"), (wrong_gradient, "B gradient by"), (nan_gradient, "A gradient by nan")],
)
def test_a_difference_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, fault, words: str) -> None:
    fault(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=f"llama is not supported.*{words}"):
        probe(config_of("llama"))


def test_a_family_that_cannot_be_taken_apart_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="gpt2 is not supported"):
        probe(config_of("gpt2", n_layer=3, n_embd=64, n_head=4))


def rope(rope_type: str, **fields: object) -> PretrainedConfig:
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0, **fields}
    return config_of("llama", rope_parameters=parameters, max_position_embeddings=64)


def test_dynamic_rope_is_refused_past_the_original_length() -> None:
    refuse_length_dependent_rope(rope("dynamic", original_max_position_embeddings=32), 32)
    with pytest.raises(UnsupportedModelError, match=r"llama with rope type dynamic: beyond 32 tokens"):
        refuse_length_dependent_rope(rope("dynamic", original_max_position_embeddings=32), 33)
    refuse_length_dependent_rope(rope("linear"), 10_000)


@pytest.mark.parametrize(
    ("family", "setting"), [("olmo", {"clip_qkv": 0.05}), ("cohere", {"use_qk_norm": True})]
)
def test_published_settings_pass(family: str, setting: dict[str, object]) -> None:
    """OLMo-1.7-7B clamps q, k and v in place; Command R+ has norms with a row per head."""
    found = probe(config_of(family, **setting))
    assert found.fuses_qkv and found.fuses_mlps
