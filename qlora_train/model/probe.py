"""Start-up probe: tests on a tiny model that the walk over the layers computes what the family's model does.

From the real config a tiny one is made (a layer of each kind, at least 2, widths of 64; scale
fields, rope type, bias flags and layer types are kept) with random weights. The library's model with its
eager attention runs two documents one after the other; `FrozenDecoder` runs them packed into one row, with
weights W and LoRA parameters A, B, while the library has W + s B A. Compared in fp32:

    logits of every token, the loss, and per module  dA = s B^T dW  and  dB = s dW A^T,  dW by plain autograd.

This tests prologue, layers and the tiled head, the isolation of packed documents, and all gradients. Two more
tests decide what is allowed: whether recomputation may skip the output of a layer's last linear, i.e. whether
it goes straight into the residual sum (llama) or first through a norm whose gradient needs it (gemma2,
olmo2); and whether fused norms, MLPs and q, k, v projections (fused.py, shared_input.py) give the same
outputs and gradients. The probe takes a fraction of a second. A family that fails is refused by name. Known
to fail: stablelm (drops the keyword with the document boundaries), llama4 (experts of its own).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from qlora_train.boundary import reason_of
from qlora_train.device.compute import THE_CPU
from qlora_train.errors import UnsupportedModelError
from qlora_train.micro_batch import IGNORED_LABEL, MicroBatch
from qlora_train.model.base import MetaModel, tie_head
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.frozen_experts import FrozenExperts
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.loss import TiledLoss
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.vocab_matrix import ResidentMatrix
from qlora_train.model.weight_store import ResidentWeights
from qlora_train.quant.formats import UNQUANTIZED
from qlora_train.quant.quantize import quantize

TOLERANCE = 2e-4  # relative, fp32, against the largest value
DOCUMENT_LENGTHS, LONG_DOCUMENT = (13, 9), 70
"""Two short documents; behind them a long one where mixers have a memory, longer than their chunks."""
VOCABULARY_SIZE = 64
LORA_SCALING = 0.5
TILE_ROWS, BLOCK_TOKENS = 24, 8  # several tiles and blocks, the last ones smaller
MOST_KINDS = 8
WINDOW = 5  # shorter than the documents, so that a sliding window has an effect


_Walked = tuple[FrozenDecoder, LoraParameters]


@dataclass(frozen=True)
class ProbeResult:
    """skippable: names within a layer of the linears and experts whose value recomputation may skip.
    has_experts: whether any were seen. fuses_norms, fuses_mlps, fuses_qkv: whether the layers may run with
    those of fused.py and shared_input.py."""

    skippable: tuple[str, ...]
    has_experts: bool
    fuses_norms: bool
    fuses_mlps: bool
    fuses_qkv: bool


def probe(config: PretrainedConfig) -> ProbeResult:
    """Test this family on a tiny model of this config and return what it allows.

    Raises `UnsupportedModelError`, naming the family, unless the walk reproduces the library's model.
    """
    try:
        differences, result = _try_out(tiny_config(config))
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{config.model_type} is not supported: {error}") from error
    except AssertionError:  # our own mistake
        raise
    except Exception as error:  # a family's own code may raise any type
        raise UnsupportedModelError(
            f"{config.model_type} is not supported: its layers cannot be walked one by one "
            f"({reason_of(error)})"
        ) from error
    wrong = {what: d for what, d in differences.items() if not d <= TOLERANCE}  # `not <=` catches NaN too
    if wrong:
        listed = ", ".join(f"{what} by {d:.1e}" for what, d in list(wrong.items())[:3])
        raise UnsupportedModelError(
            f"{config.model_type} is not supported: walked layer by layer over packed documents it "
            "differs from "
            f"transformers' own model ({listed}, relative)"
        )
    return result


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the same family: a few layers of width 64, the same scales, layer kinds and head groups."""
    fields: dict[str, Any] = config.to_dict()
    num_layers = config.num_hidden_layers
    per_layer = [k for k, v in fields.items() if isinstance(v, list) and len(v) == num_layers]
    chosen = _layers_of_every_kind([tuple(fields[k][i] for k in per_layer) for i in range(num_layers)])
    fields.update({k: [fields[k][i] for i in chosen] for k in per_layer})
    heads = config.num_attention_heads
    kv_heads = fields.get("num_key_value_heads") or heads
    fields.update(
        num_hidden_layers=len(chosen),
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
        fields["head_dim"] = fields.get("qk_rope_head_dim") or 16  # multi-head latent attention
    fields.update(_tiny_experts(fields))
    fields.pop("quantization_config", None)  # of weights that are not there
    if fields.get("sliding_window") is not None:
        fields["sliding_window"] = WINDOW
    for name in ("attention_dropout", "embd_pdrop", "resid_pdrop", "hidden_dropout"):
        if name in fields:
            fields[name] = 0.0
    if own := fields.pop("per_layer_config", None):  # of some layers, by number: wider heads, fewer for keys
        tiny = {"head_dim": 32, "num_key_value_heads": 1}
        changed = {int(number): {name: tiny[name] for name in values} for number, values in own.items()}
        fields["per_layer_config"] = {new: changed[old] for new, old in enumerate(chosen) if old in changed}
    rope = fields.get("rope_parameters") or {}
    for name in ("short_factor", "long_factor"):
        if name in rope:
            rope[name] = rope[name][: int(16 * rope.get("partial_rotary_factor", 1.0)) // 2]
    return type(config).from_dict(fields)


def _tiny_experts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of experts, by the names that families give them, and which of two layers has them."""
    most = {
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
        **dict.fromkeys(
            ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "n_group"), 2
        ),
        **dict.fromkeys(("topk_group", "first_k_dense_replace", "moe_layer_start_index"), 1),
        **dict.fromkeys(("decoder_sparse_step", "moe_layer_interval", "moe_layer_freq"), 2),
        **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    }
    sizes = {name: min(fields[name], size) for name, size in most.items() if type(fields.get(name)) is int}
    if fields.get("mlp_only_layers"):
        sizes["mlp_only_layers"] = [0]
    if type(fields.get("moe_layer_end_index")) is int:
        sizes["moe_layer_end_index"] = 1
    return sizes


def _layers_of_every_kind(kinds: list[tuple[Any, ...]]) -> list[int]:
    """Indices of two layers or more: the first of each kind."""
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    if len(first) > MOST_KINDS:
        raise UnsupportedModelError(f"its layers are of {len(first)} kinds, more than can be tried out")
    return first if len(first) > 1 else [0, len(kinds) - 1]


def _try_out(config: PretrainedConfig) -> tuple[dict[str, float], ProbeResult]:
    """Relative differences of logits, loss and gradients by name, and the `ProbeResult`."""
    generator = torch.Generator().manual_seed(0)
    config.dtype = torch.float32
    reference: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for parameter in reference.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * noise if parameter.dim() == 1 else 0.1 * noise
    tie_head(reference)

    decoder, lora = _walked_copy(reference)
    fused_norms, fused_mlps, fused_qkv = (_walked_copy(reference) for _ in range(3))
    fused_norms[0].fuse(norms=True, mlps=False, qkv=False)
    fused_mlps[0].fuse(norms=False, mlps=True, qkv=False)
    fused_qkv[0].fuse(norms=False, mlps=False, qkv=True)
    pairs = lora.views(lora.masters)
    for name, (a, b) in pairs.items():
        reference.get_parameter(f"{name}.weight").data += LORA_SCALING * b @ a

    has_memory = any(isinstance(module, nn.Conv1d) for module in reference.modules())
    lengths = (*DOCUMENT_LENGTHS, LONG_DOCUMENT) if has_memory else DOCUMENT_LENGTHS
    tokens = torch.randint(0, VOCABULARY_SIZE, (sum(lengths),), generator=generator)
    packed = _packed(tokens, lengths)
    expected_logits, expected_loss = _run_alone(reference, tokens, lengths)
    x, arguments = decoder.embed_packed(packed)
    for index in decoder.layers_in_turn():
        x = decoder.run_layer(index, x, arguments[index])
    logits = decoder.logits(decoder.norm(x.detach()))[0]
    loss, (gradient,) = TiledLoss(decoder, block_tokens=BLOCK_TOKENS)(
        [x.detach()], [packed], gradient_scale=1.0
    )
    x.backward(gradient)

    result = {"logits": _relative(logits, expected_logits), "loss": _relative(loss, expected_loss)}
    for name, (gradient_a, gradient_b) in lora.views(lora.gradient).items():
        weight_gradient = reference.get_parameter(f"{name}.weight").grad
        assert weight_gradient is not None
        a, b = pairs[name]
        result[f"{name} A gradient"] = _relative(gradient_a, LORA_SCALING * b.t() @ weight_gradient)
        result[f"{name} B gradient"] = _relative(gradient_b, LORA_SCALING * weight_gradient @ a.t())
    return result, ProbeResult(
        skippable=_find_skippable(decoder, lora, packed),
        has_experts=any(decoder.experts),
        fuses_norms=_same_layers((decoder, lora), fused_norms, packed),
        fuses_mlps=_same_layers((decoder, lora), fused_mlps, packed),
        fuses_qkv=_same_layers((decoder, lora), fused_qkv, packed),
    )


def _same_layers(plain: _Walked, fused: _Walked, packed: PackedTokens) -> bool:
    """Whether every layer of the two decoders gives the same output and gradients, within `TOLERANCE`."""
    for index in range(len(plain[0].layers)):
        expected, actual = (_layer_results(*walked, packed, index) for walked in (plain, fused))
        if not all(_relative(f, e) <= TOLERANCE for f, e in zip(actual, expected, strict=True)):
            return False
    return True


def _find_skippable(decoder: FrozenDecoder, lora: LoraParameters, packed: PackedTokens) -> tuple[str, ...]:
    """The linear that a layer runs last, and its experts: those of them that may be left out, each alone and
    all together, in every layer without changing a gradient."""
    names: dict[str, None] = {}
    for index in range(len(decoder.layers)):
        ends: list[FrozenLinear | FrozenExperts] = [_last_linear(decoder, packed, index)]
        for module in ends + decoder.experts[index]:
            names[module.name.split(f".{index}.", 1)[1]] = None
    skippable = tuple(name for name in names if _may_skip(decoder, lora, packed, (name,)))
    return skippable if _may_skip(decoder, lora, packed, skippable) else ()


def _may_skip(
    decoder: FrozenDecoder, lora: LoraParameters, packed: PackedTokens, names: tuple[str, ...]
) -> bool:
    for index in range(len(decoder.layers)):
        _, *whole = _layer_results(decoder, lora, packed, index)
        decoder.skippable = names
        with decoder.running_again(index):
            _, *skipped = _layer_results(decoder, lora, packed, index)
        decoder.skippable = ()
        if not all(torch.equal(ours, theirs) for ours, theirs in zip(whole, skipped, strict=True)):
            return False
    return True


def _last_linear(decoder: FrozenDecoder, packed: PackedTokens, index: int) -> FrozenLinear:
    called: list[FrozenLinear] = []
    handles = [
        linear.register_forward_hook(lambda module, *_: called.append(module))
        for linear in decoder.linears_of(index)
    ]
    x, arguments = decoder.embed_packed(packed)
    decoder.run_layer(index, x, arguments[index])
    for handle in handles:
        handle.remove()
    return called[-1]


def _layer_results(
    decoder: FrozenDecoder, lora: LoraParameters, packed: PackedTokens, index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's output, and for a random gradient of it the gradients of its input and LoRA parameters."""
    generator = torch.Generator().manual_seed(1)
    x, arguments = decoder.embed_packed(packed)
    leaf = (x + 0.1 * torch.randn(x.shape, generator=generator)).requires_grad_()
    lora.gradient.zero_()
    y = decoder.run_layer(index, leaf, arguments[index])
    y.backward(torch.randn(y.shape, generator=generator))
    assert leaf.grad is not None
    return y, leaf.grad, lora.gradient.clone()


def _walked_copy(reference: PreTrainedModel) -> _Walked:
    """A `FrozenDecoder` with the weights of `reference`, and random LoRA parameters on every linear."""
    meta_model = MetaModel(reference.config, torch.float32)
    parameters = {name: p.detach().clone() for name, p in reference.named_parameters()}
    parameters |= {name: reference.get_buffer(name).clone() for name in meta_model.stored_buffers}
    source = ResidentWeights(meta_model.layouts(UNQUANTIZED), THE_CPU.description.dequantize_kernel)
    for i, path in enumerate(meta_model.layer_paths):
        for name, shape in meta_model.layer_shapes(i).items():
            weight = parameters[meta_model.parameter_name(i, name)].view(shape)
            source.quantized[f"{path}.{name}"] = quantize([weight], shape, UNQUANTIZED, dtype=torch.float32)
    embedding = ResidentMatrix(parameters[meta_model.embedding_name], TILE_ROWS)
    head = embedding if meta_model.is_tied else ResidentMatrix(parameters[meta_model.head_name], TILE_ROWS)
    decoder = meta_model.materialize(source, parameters, embedding, head, THE_CPU)
    options: dict[str, Any] = {"rank": 4, "scaling": LORA_SCALING, "dropout": 0.0, "seed": 0}
    lora = LoraParameters(decoder.linears, dtype=torch.float32, device="cpu", **options)
    lora.masters.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    return decoder, lora


def _labels(tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Next-token labels within each document."""
    labels = torch.full_like(tokens, IGNORED_LABEL)
    start = 0
    for length in lengths:
        labels[start : start + length - 1] = tokens[start + 1 : start + length]
        start += length
    return labels


def _packed(tokens: Tensor, lengths: tuple[int, ...]) -> PackedTokens:
    """Both documents packed into one row."""
    row = MicroBatch(
        token_ids=tokens.numpy(),
        position_ids=np.concatenate([np.arange(n) for n in lengths]),
        labels=_labels(tokens, lengths).numpy(),
        cu_seqlens=np.cumsum((0, *lengths)),
        row_ids=np.zeros(len(tokens)),
        token_offsets=np.arange(len(tokens)),
    )
    return PackedTokens.from_host(row, "cpu")


def _run_alone(reference: PreTrainedModel, tokens: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Run each document alone through the library's model: (logits [T, V], loss sum). The gradients are in
    the weights' `.grad`."""
    logits = torch.cat(
        [reference(input_ids=part[None], use_cache=False).logits[0] for part in tokens.split(lengths)]
    )
    loss = F.cross_entropy(logits, _labels(tokens, lengths), reduction="sum")
    loss.backward()
    return logits.detach(), loss.detach()


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value.detach() - expected.detach()).abs().max() / expected.detach().abs().max())
