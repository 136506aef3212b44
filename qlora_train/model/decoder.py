"""A transformers causal language model, taken apart so that a loop of ours can walk its layers.

    prologue   token ids -> embedded tokens x_0, and for every layer the arguments it would be called with
    layers     x_i+1 = layer_i(x_i, **arguments_i)
    epilogue   final norm, head -> logits

None of the three is rewritten here. The prologue is the library's own decoder forward with each layer
replaced by a recorder that notes its arguments and returns its input, so embedding scales, one or two rotary
tables, and sliding or full attention per layer come out as the family computes them. The epilogue is the
library's own causal-LM forward around a stand-in that hands back given hidden states, so logit scales and
caps are the family's too. A new family that fits this shape needs no code; the start-up probe (probe.py)
decides whether it fits.

Why not hooks or `torch.utils.checkpoint`: with one graph through the whole model autograd decides when a
weight is needed. Here the caller does, which is what streaming, layer-major accumulation and per-layer
recomputation rest on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from qlora_train.model.linear import FrozenLinear
from qlora_train.model.packed_tokens import PackedTokens

LayerArguments = dict[str, Any]


class FrozenDecoder:
    """The parts of a model whose linears are `FrozenLinear`s.

    layers: the decoder layers. linears: every FrozenLinear in them by module path, in layer order. dtype,
    device: of the computation. The given model is taken over and cannot be called as a whole afterwards.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> None:
        model.eval().requires_grad_(
            False
        )  # the library's own dropouts never run: ours is a pure function of the token
        self.config = model.config
        self.dtype, self.device = dtype, device
        self.linears = {n: m for n, m in model.named_modules() if isinstance(m, FrozenLinear)}
        self._decoder = model.get_decoder()
        self.layers = list(self._decoder.layers)
        self.norm: nn.Module = self._decoder.norm
        self._calls: list[LayerArguments] = []
        self._decoder.layers = nn.ModuleList([_Recorder(layer, self._calls) for layer in self.layers])
        self._decoder.norm = nn.Identity()
        self._causal_lm = model
        setattr(model, model.base_model_prefix, _HandBack())

    @property
    def embedding(self) -> nn.Embedding:
        return self._decoder.embed_tokens

    @torch.no_grad()
    def embed(
        self, token_ids: Tensor, position_ids: Tensor, **attention_arguments: Any
    ) -> tuple[Tensor, list[LayerArguments]]:
        """token_ids, position_ids [B, T] -> x_0 [B, T, D] and each layer's keyword arguments."""
        self._calls.clear()
        output = self._decoder(
            input_ids=token_ids, position_ids=position_ids, use_cache=False, **attention_arguments
        )
        arguments = list(self._calls)
        self._calls.clear()
        return output.last_hidden_state, arguments

    def embed_packed(self, tokens: PackedTokens) -> tuple[Tensor, list[LayerArguments]]:
        """`embed` for a packed row: x_0 [1, T, D]."""
        return self.embed(tokens.token_ids, tokens.position_ids, documents=tokens.documents)

    def run_layer(self, index: int, x: Tensor, arguments: LayerArguments) -> Tensor:
        """x [B, T, D] -> [B, T, D] through decoder layer `index`."""
        return self.layers[index](x, **arguments)

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [B, T, D] -> logits [B, T, V], with the family's own scale and cap."""
        return self._causal_lm(inputs_embeds=hidden, use_cache=False).logits

    def linears_of(self, index: int) -> list[FrozenLinear]:
        """The FrozenLinears of decoder layer `index`."""
        return [m for m in self.layers[index].modules() if isinstance(m, FrozenLinear)]


class _Recorder(nn.Module):
    """Stands where a decoder layer stood: notes the arguments and passes the hidden states on.

    Attributes a family reads off its layers (such as `attention_type`) are the layer's own.
    """

    def __init__(self, layer: nn.Module, calls: list[LayerArguments]) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # past nn.Module: the layer is not our submodule
        object.__setattr__(self, "_calls", calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self._calls.append(arguments)
        return hidden_states


class _HandBack(nn.Module):
    """Stands where the decoder stood: its "output" is the hidden states it is given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)
