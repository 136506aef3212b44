"""The start-up probe: does our walk compute what this family's own model computes? Measured, not looked up in
a list.

From the real config a tiny one is made (2 layers of different kinds if there are any, widths of 64, every
scale field, rope type, bias flag and layer type kept) with random weights. The library's own model with its
own eager attention runs two documents one after the other; our parts run them packed into one row, from
weights W and factors A, B with the library given W + s B A. Compared, in fp32:

    logits of every token, the loss, and per module  dA = s B^T dW  and  dB = s dW A^T,  dW by plain autograd.

That proves at once: prologue, layers, head; packed documents do not see each other; gradients. It costs a
fraction of a second and 64-wide matrices. What fails is refused by name. Seen to fail, rightly: stablelm
(drops the keyword that carries document boundaries), gpt_oss (attention sinks, fused experts).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qlora_train.errors import UnsupportedModelError
from qlora_train.model.base import ResidentWeights, empty_model, swap_linears, tie_head
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.factors import FactorBuffers
from qlora_train.model.loss import chunked_loss
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.quantize import Packing, pack

TOLERANCE = 2e-4  # relative, fp32, against the largest value
DOCUMENT_LENGTHS = (13, 9)
VOCABULARY_SIZE = 64
WINDOW = 5  # shorter than the documents, so that a sliding window is at work


def probe(config: PretrainedConfig) -> None:
    """Raise `UnsupportedModelError`, naming the family, unless walk and model agree on a tiny model of this
    config."""
    try:
        differences = _differences(tiny_config(config))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{config.model_type} is not supported: {error}") from error
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        raise UnsupportedModelError(
            f"{config.model_type} is not supported: its layers cannot be walked one by one ({error})"
        ) from error
    wrong = {what: d for what, d in differences.items() if not d <= TOLERANCE}  # `not <=` catches NaN too
    if wrong:
        listed = ", ".join(f"{what} by {d:.1e}" for what, d in list(wrong.items())[:3])
        raise UnsupportedModelError(
            f"{config.model_type} is not supported: walked layer by layer over packed documents it "
            "differs from "
            f"transformers' own model ({listed}, relative)"
        )


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """A 2-layer, 64-wide config of the same family with the same scales, layer kinds and head grouping."""
    fields: dict[str, Any] = config.to_dict()
    num_layers = config.num_hidden_layers
    per_layer = [k for k, v in fields.items() if isinstance(v, list) and len(v) == num_layers]
    first, second = _two_layers([tuple(fields[k][i] for k in per_layer) for i in range(num_layers)])
    fields.update({k: [fields[k][first], fields[k][second]] for k in per_layer})
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    fields.update(
        num_hidden_layers=2,
        hidden_size=64,
        intermediate_size=96,
        vocab_size=VOCABULARY_SIZE,
        num_attention_heads=4,
        num_key_value_heads=4 if kv_heads == heads else (1 if kv_heads == 1 else 2),
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    if "head_dim" in fields:
        fields["head_dim"] = 16
    if fields.get("sliding_window") is not None:
        fields["sliding_window"] = WINDOW
    for name in ("attention_dropout", "embd_pdrop", "resid_pdrop", "hidden_dropout"):
        if name in fields:
            fields[name] = 0.0
    rope = fields.get("rope_parameters") or {}
    for name in ("short_factor", "long_factor"):
        if name in rope:
            rope[name] = rope[name][: int(16 * rope.get("partial_rotary_factor", 1.0)) // 2]
    return type(config).from_dict(fields)


def _two_layers(kinds: list[tuple[Any, ...]]) -> tuple[int, int]:
    """Two layers of different kinds where there are any."""
    other = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), len(kinds) - 1)
    return 0, other


def _differences(config: PretrainedConfig) -> dict[str, float]:
    """Relative difference of logits, loss and gradients; see the module docstring."""
    generator = torch.Generator().manual_seed(0)
    config.dtype = torch.float32
    reference: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for parameter in reference.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if parameter.dim() == 1 else 0.1 * noise
    tie_head(reference)

    decoder, factors = _walked_copy(reference)
    for a, b in factors.views(factors.masters).values():
        a.copy_(0.1 * torch.randn(a.shape, generator=generator))
        b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    pairs = factors.views(factors.masters)
    for name, (a, b) in pairs.items():
        reference.get_parameter(f"{name}.weight").data += factors.scaling * b @ a

    tokens = torch.randint(0, VOCABULARY_SIZE, (sum(DOCUMENT_LENGTHS),), generator=generator)
    packed = _packed(tokens)
    expected_logits, expected_loss = _run_alone(reference, tokens)
    x, arguments = decoder.embed_packed(packed)
    for index in range(len(decoder.layers)):
        x = decoder.run_layer(index, x, arguments[index])
    loss, gradient = chunked_loss(decoder, x, packed, gradient_scale=1.0)
    logits = decoder.logits(decoder.norm(x.detach()))[0]
    x.backward(gradient)

    result = {"logits": _relative(logits, expected_logits), "loss": _relative(loss, expected_loss)}
    for name, (gradient_a, gradient_b) in factors.views(factors.gradient).items():
        weight_gradient = reference.get_parameter(f"{name}.weight").grad
        assert weight_gradient is not None
        a, b = pairs[name]
        result[f"{name} A gradient"] = _relative(gradient_a, factors.scaling * b.t() @ weight_gradient)
        result[f"{name} B gradient"] = _relative(gradient_b, factors.scaling * weight_gradient @ a.t())
    return result


def _walked_copy(reference: PreTrainedModel) -> tuple[FrozenDecoder, FactorBuffers]:
    """The same weights, taken apart, with factors on every linear."""
    model = empty_model(reference.config, torch.float32)
    source = ResidentWeights()
    swap_linears(model, source)
    weights = {name: p.detach().clone() for name, p in reference.named_parameters()}
    for name, _ in list(model.named_parameters()):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(weights[name], requires_grad=False))
    tie_head(model)
    decoder = FrozenDecoder(model, torch.float32, torch.device("cpu"))
    for name in decoder.linears:
        weight = weights[f"{name}.weight"]
        source.packed[name] = pack(
            [weight], (weight.shape[0], weight.shape[1]), Packing("none"), dtype=torch.float32
        )
    options: dict[str, Any] = {"rank": 4, "scaling": 0.5, "dropout": 0.0, "seed": 0}
    return decoder, FactorBuffers(decoder.linears, dtype=torch.float32, device="cpu", **options)


def _labels(tokens: Tensor) -> Tensor:
    """Next-token labels within each document."""
    labels = torch.full_like(tokens, -100)
    start = 0
    for length in DOCUMENT_LENGTHS:
        labels[start : start + length - 1] = tokens[start + 1 : start + length]
        start += length
    return labels


def _packed(tokens: Tensor) -> PackedTokens:
    """Both documents in one row."""
    labels = _labels(tokens)

    class Row:
        token_ids = tokens.numpy()
        position_ids = np.concatenate([np.arange(n) for n in DOCUMENT_LENGTHS])
        cu_seqlens = np.cumsum((0, *DOCUMENT_LENGTHS))
        supervised_positions = np.flatnonzero(labels.numpy() >= 0)
        row_ids = np.zeros(len(tokens))
        token_offsets = np.arange(len(tokens))

    row = Row()
    row.labels = labels.numpy()  # type: ignore[attr-defined]
    return PackedTokens.from_host(row, "cpu")  # type: ignore[arg-type]


def _run_alone(reference: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Each document alone through the library's model: (logits [T, V], loss sum), gradients left in the
    weights."""
    logits = torch.cat(
        [
            reference(input_ids=part[None], use_cache=False).logits[0]
            for part in tokens.split(DOCUMENT_LENGTHS)
        ]
    )
    loss = F.cross_entropy(logits, _labels(tokens), reduction="sum")
    loss.backward()
    return logits.detach(), loss.detach()


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value.detach() - expected).abs().max() / expected.abs().max())


def refuse_length_dependent_rope(config: PretrainedConfig, sequence_length: int) -> None:
    """Refuse rotary tables that change with the longest document in a row, where sequence_length would make
    them change.

    "longrope" (long-context Phi-3) and "dynamic" choose the table of a whole row by its largest position:
    past the original maximum a short document would be rotated otherwise packed than alone.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if rope_type in ("longrope", "dynamic") and sequence_length > original:
        raise UnsupportedModelError(
            f"{config.model_type} with rope type {rope_type}: beyond {original} tokens the rotary "
            "table depends on the longest "
            "document of a row, so packed documents would not equal the documents alone. Set "
            f"data.sequence_length to {original} or less."
        )
