"""Every family against transformers' own model with its own eager attention, each document run alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    FAMILIES,
    OTHER_FAMILIES,
    library_model,
    load_tiny,
    packed_row,
    random_model,
    resident_plan,
    tiny_config,
    write_checkpoint,
)
from torch import Tensor
from transformers import PreTrainedModel

from qlora_train.errors import UnsupportedModelError
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.probe import probe
from qlora_train.model.rope_lengths import refuse_length_dependent_rope
from qlora_train.quant.formats import Quantization
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy

# Windows are 8 tokens: 3x the window is 24. llama3's original maximum is 16: most documents are longer.
LENGTHS = [25, 3, 40, 1, 16, 33]
TOLERANCE = 1e-5


def walked_logits(decoder: FrozenDecoder, tokens: PackedTokens) -> Tensor:
    x, arguments = decoder.embed_packed(tokens)
    with torch.no_grad():
        for index in range(len(decoder.layers)):
            x = decoder.run_layer(index, x, arguments[index])
        return decoder.logits(decoder.norm(x))[0]


def each_document_alone(model: PreTrainedModel, tokens: PackedTokens) -> Tensor:
    documents = tokens.token_ids[0].split(LENGTHS)
    return torch.cat([model(input_ids=document[None], use_cache=False).logits[0] for document in documents])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_packed_logits_and_gradients_are_the_library_models_on_documents_alone(
    tmp_path: Path, family: str
) -> None:
    folder = write_checkpoint(tmp_path, family)
    decoder, lora = load_tiny(folder, Quantization("none"))
    tokens = packed_row(LENGTHS)
    model = library_model(folder, decoder, lora, torch.float32, attention="eager")

    expected = each_document_alone(model, tokens)
    logits = walked_logits(decoder, tokens)
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()

    num_supervised = len(tokens.supervised)
    loss_sum = F.cross_entropy(expected, tokens.labels, ignore_index=-100, reduction="sum")
    (loss_sum / num_supervised).backward()
    policy = ((ActivationPolicy.RECOMPUTE, ActivationPolicy.KEEP) * 2)[: len(decoder.layers)]
    tolerance = TOLERANCE if family in FAMILIES else 2e-4
    for reference in (False, True):
        lora.gradient.zero_()
        walk = LayerWalk(decoder, lora, resident_plan(*policy), reference=reference)
        walked_loss = walk.accumulate([tokens], seed=0, step=1, num_supervised=num_supervised)
        torch.testing.assert_close(walked_loss, loss_sum.detach(), rtol=TOLERANCE, atol=0)
        for name, (a, b) in lora.views(lora.gradient).items():
            linear = model.get_submodule(name)
            assert relative(a, linear.a.grad) <= tolerance, f"{name} A, reference={reference}"
            assert relative(b, linear.b.grad) <= tolerance, f"{name} B, reference={reference}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_accepts(family: str) -> None:
    probe(tiny_config(family))


def test_the_tests_own_yardstick_can_tell_documents_apart(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llama")
    decoder, lora = load_tiny(folder, Quantization("none"))
    model = library_model(folder, decoder, lora, torch.float32, attention="eager")
    tokens = packed_row(LENGTHS)
    alone = each_document_alone(model, tokens)
    together = model(input_ids=tokens.token_ids, use_cache=False).logits[0]
    first = LENGTHS[0]
    assert (together[:first] - alone[:first]).abs().max() < 1e-4
    assert (together[first:] - alone[first:]).abs().max() > 0.1


def test_llama3_rope_scaling_is_at_work(tmp_path: Path) -> None:
    """The factor of 8 must change the logits, or the parity above proves nothing about it."""
    folder = write_checkpoint(tmp_path / "scaled", "llama3-rope")
    plain = write_checkpoint(tmp_path / "plain", "llama")  # same seed, same shapes: the same weights
    tokens = packed_row(LENGTHS)
    scaled_logits = walked_logits(load_tiny(folder, Quantization("none"))[0], tokens)
    plain_logits = walked_logits(load_tiny(plain, Quantization("none"))[0], tokens)
    assert (scaled_logits - plain_logits).abs().max() > 0.1


def test_norm_weights_and_biases_are_random() -> None:
    model = random_model(tiny_config("qwen2"))
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.05, name


REFUSED = {
    "stablelm": {},
    "llama4_text": {},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1},  # E2B, E4B
    "gemma3n_text": {},
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_the_probe_refuses_by_name(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"^{model_type} is not supported"):
        probe(tiny_config(model_type, **REFUSED[model_type]))


def longrope_config(original: int):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": original,
    }
    return tiny_config(
        "phi3",
        rope_parameters=rope,
        original_max_position_embeddings=original,
        max_position_embeddings=4 * original,
    )


def test_longrope_is_refused_beyond_its_original_length_only() -> None:
    config = longrope_config(64)
    refuse_length_dependent_rope(config, 64)
    with pytest.raises(
        UnsupportedModelError, match=r"phi3 with rope type longrope.*data\.sequence_length to 64"
    ):
        refuse_length_dependent_rope(config, 65)


def test_other_rope_types_may_go_beyond_their_original_length() -> None:
    refuse_length_dependent_rope(tiny_config("llama3-rope"), 4096)
    refuse_length_dependent_rope(tiny_config("llama"), 4096)


def test_longrope_within_its_original_length_equals_the_library(tmp_path: Path) -> None:
    random_model(longrope_config(64)).save_pretrained(tmp_path)
    decoder, lora = load_tiny(tmp_path, Quantization("none"))
    model = library_model(tmp_path, decoder, lora, torch.float32, attention="eager")
    tokens = packed_row(LENGTHS)
    expected = each_document_alone(model, tokens).detach()
    assert (walked_logits(decoder, tokens) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    probe(longrope_config(64))
