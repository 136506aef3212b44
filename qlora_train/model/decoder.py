"""A transformers causal language model split into parts, so that the caller runs its layers one by one.

    prologue   token ids -> embedded tokens x_0, and for every layer its keyword arguments
    layers     x_i+1 = layer_i(x_i, **arguments_i)
    epilogue   final norm, head -> logits

All three run the library's own code. The prologue is the library's decoder forward with each layer replaced
by a recorder of its arguments that returns its input, so embedding scales, rotary tables, and sliding or full
attention per layer are computed as the family does. It is given the embedding rows of its T tokens in place
of the whole matrix, which may therefore be stored anywhere. The epilogue is the library's causal-LM forward,
with the decoder replaced by a module that returns given hidden states, and the head by a product with given
rows: logit scales and caps are the family's own and act on each logit separately, so logits can be computed
for a tile of the vocabulary. A new family of this structure needs no code; the start-up probe (probe.py)
decides whether it is supported.

Why not hooks or `torch.utils.checkpoint`: with one graph through the whole model autograd decides when a
weight is needed. Here the caller decides, as streaming, layer-major accumulation and per-layer recomputation
require.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from qlora_train.adapter.pissa import Factors
from qlora_train.device.compute import ComputeDevice
from qlora_train.errors import UnsupportedModelError
from qlora_train.model.adapted_head import AdaptedHead
from qlora_train.model.by_document import run_mixers_by_document
from qlora_train.model.expert_lora import ExpertStack, expert_stacks
from qlora_train.model.frozen_experts import FrozenExperts
from qlora_train.model.fused import fuse_mlps, fuse_norms
from qlora_train.model.kernel_choice import KernelChoice
from qlora_train.model.linear import DropoutContext, FrozenLinear, LinearLora
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.shared_input import SharedLinear, fuse_qkv
from qlora_train.model.tiled_mlp import TiledMlp
from qlora_train.model.token_rows import TokenRows
from qlora_train.model.vocab_matrix import TokenIds, VocabMatrix, tiles, whole
from qlora_train.model.weight_store import WeightStore

LayerArguments = dict[str, Any]
Kind = TypeVar("Kind", bound=nn.Module)


class FrozenDecoder:
    """The parts of a causal language model whose decoder layers hold `FrozenLinear`s.

    layers: the decoder layers. linears: every FrozenLinear in them by module path, in layer order. stacks:
    the matrices of experts, by parameter path. weights: where those find their quantized weights. embedding,
    head: [V, D], the same object where tied; matrix_paths: their module paths, the embedding's alone where
    tied. dtype, device: those of the computation. skippable: names within a layer of linears and experts
    whose output goes straight into the residual sum, as the probe found. fingerprint: a hash of the quantized
    base's content. principal_factors: what PiSSA took out of linears; empty without it. kernels: the fastest
    there are until others are chosen. The given model is taken over and cannot be called as a whole
    afterwards; its embedding and head weights are dropped.
    """

    tiled_mlp: type[TiledMlp] = TiledMlp
    """The class that wraps the layers' MLPs for `tile_mlps`."""

    def __init__(
        self,
        model: PreTrainedModel,
        weights: WeightStore,
        embedding: VocabMatrix,
        head: VocabMatrix,
        dtype: torch.dtype,
        device: ComputeDevice,
    ) -> None:
        # eval: the library's dropouts never run; LoRA dropout is a pure function of the token
        model.eval().requires_grad_(False)
        self.config = model.config
        self.weights, self.embedding = weights, embedding
        self.head: VocabMatrix = head
        self.dtype, self.device = dtype, device
        self.linears = {m.name: m for m in model.modules() if isinstance(m, FrozenLinear)}
        self.stacks = expert_stacks(model)
        self._decoder = model.get_decoder()
        self.layers = list(self._decoder.layers)
        self.experts = [_modules_of(layer, FrozenExperts) for layer in self.layers]
        self._mixers = [run_mixers_by_document(layer) for layer in self.layers]
        self.norm: nn.Module = getattr(self._decoder, final_norm_name(self._decoder))
        self.skippable: tuple[str, ...] = ()
        self.fingerprint = ""
        self.principal_factors: Factors = {}
        self.run_with(KernelChoice.on(device, dtype))
        self.at_close: list[Callable[[], object]] = []
        self._tiled_mlps: dict[int, TiledMlp] = {}
        self._calls: list[LayerArguments] = []
        self._decoder.layers = nn.ModuleList([_Recorder(layer, self._calls) for layer in self.layers])
        setattr(self._decoder, final_norm_name(self._decoder), nn.Identity())
        self._no_rows = nn.Parameter(
            torch.empty(0, model.config.hidden_size, dtype=dtype, device=device.torch), requires_grad=False
        )
        self._embedding: Any = model.get_input_embeddings()
        self._embedding.weight = self._no_rows
        self._embedding.padding_idx = None  # type: ignore[assignment]  # only affects the gradient of a trainable embedding
        self.matrix_paths = matrix_paths(model)
        self._head_product = _HeadProduct(model.get_output_embeddings().bias)
        model.set_output_embeddings(self._head_product)
        self._causal_lm = model
        setattr(model, model.base_model_prefix, _HandBack())

    def run_with(self, kernels: KernelChoice) -> None:
        """Use these kernels from now on; call it before `fuse`."""
        self.kernels = kernels
        self.weights.copies_dequantized = kernels.is_reference
        for linear in self.linears.values():
            linear.use_autograd = kernels.is_reference
        for experts in chain.from_iterable(self.experts):
            experts.use_autograd = kernels.is_reference

    def close(self) -> None:
        """Release the threads and files of streamed weights; no layer can be run afterwards."""
        while self.at_close:
            self.at_close.pop(0)()

    @torch.no_grad()
    def embed(
        self, ids: TokenIds, position_ids: Tensor, **attention_arguments: Any
    ) -> tuple[Tensor, list[LayerArguments]]:
        """ids [B * T], position_ids [B, T] -> x_0 [B, T, D] and each layer's keyword arguments."""
        rows = nn.Parameter(self.embedding.gather(ids), requires_grad=False)
        return self._prologue(rows, position_ids, **attention_arguments)

    def _prologue(
        self, rows: nn.Parameter, position_ids: Tensor, **attention_arguments: Any
    ) -> tuple[Tensor, list[LayerArguments]]:
        """x_0 and each layer's arguments from the embedding rows [B * T, D] of the tokens."""
        self._embedding.weight = rows
        row_of_token = torch.arange(len(rows), device=self.device.torch).view(position_ids.shape)
        try:
            output = self._decoder(
                input_ids=row_of_token,
                position_ids=position_ids,
                use_cache=False,
                attention_kernels=self.kernels.attention,
                **attention_arguments,
            )
            arguments = list(self._calls)
        finally:  # where memory ran out, the next try needs it
            self._embedding.weight = self._no_rows
            self._calls.clear()
        return output.last_hidden_state, arguments

    def embed_packed(self, tokens: PackedTokens) -> tuple[Tensor, list[LayerArguments]]:
        """`embed` for a packed row: x_0 [1, T, D]."""
        return self.embed(tokens.ids, tokens.position_ids, documents=tokens.documents)

    def add_embedding_gradient(self, tokens: PackedTokens, gradient: Tensor) -> None:
        """From dL/dx_0 [1, T, D] (`gradient`) to the gradient of trained rows of the embedding."""
        assert isinstance(self.embedding, TokenRows)
        rows = nn.Parameter(self.embedding.gather(tokens.ids))
        with torch.enable_grad():
            x, _ = self._prologue(rows, tokens.position_ids, documents=tokens.documents)
            (of_rows,) = torch.autograd.grad(x, rows, gradient)
        self.embedding.add_gradient(tokens.ids, of_rows)

    def run_layer(self, index: int, x: Tensor, arguments: LayerArguments) -> Tensor:
        """x [B, T, D] -> [B, T, D] through decoder layer `index`."""
        documents = arguments.get("documents")
        for experts in self.experts[index]:
            experts.counts = {} if documents is None else documents.expert_counts
        for mixer in self._mixers[index]:
            mixer.documents = documents
        return self.layers[index](x, **arguments)

    def layers_in_turn(self) -> Iterator[int]:
        """One forward pass: yields the index of each layer in turn while its weights are on the device. The
        schedule continues with the head's tiles and the layers of another pass."""
        order = range(len(self.layers))
        self.weights.set_schedule([*order, *self.head.items, *order])
        for index in order:
            with self.weights.layer_on_device(index):
                yield index

    def tile_logits(self, hidden: Tensor, start: int, rows: Tensor) -> Tensor:
        """Logits of normed hidden states [..., n, D] for the head's rows from `start` on: [..., n,
        len(rows)], with the family's own scale and cap."""
        return self._epilogue(hidden, _Product(rows, slice(start, start + len(rows)), per_token=False))

    def label_logits(self, hidden: Tensor, labels: TokenIds, rows: Tensor) -> Tensor:
        """The logit of its label for each of n normed hidden states [n, D]: [n]. rows [n, D]: the head rows
        of the labels."""
        return self._epilogue(hidden[None], _Product(rows, labels.device, per_token=True))[0, :, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Normed hidden states [B, T, D] -> logits [B, T, V], computed tile by tile."""
        return torch.cat([self.tile_logits(hidden, start, rows) for start, rows in tiles(self.head)], dim=-1)

    def whole_head(self) -> Tensor:
        """The whole head [V, D] on the device, for reference runs: `tile_logits(hidden, 0, whole_head)`
        is one product, as in the library."""
        return whole(self.head)

    def fuse(self, *, norms: bool, mlps: bool, qkv: bool) -> None:
        """Replace the layers' norms, MLPs or q, k and v projections by fused operations (fused.py,
        shared_input.py), where the probe allows it; call it before `tile_mlps`."""
        assert not self._tiled_mlps
        if norms:
            fuse_norms(self.layers, self.kernels.liger)
        if mlps:
            fuse_mlps(self.layers, self.kernels.liger)
        if qkv:
            fuse_qkv(self.layers)

    def adapt_head(self, lora: tuple[Tensor, ...], scaling: float, made_for: Tensor | None = None) -> None:
        """Replace the head W by W + scaling B A.

        lora: (A [R, D], B [V, R]). made_for: the head that they were trained on, None if unknown. Raises
        `BaseModelError` if shapes do not fit or `made_for` is another head."""
        self.head = AdaptedHead.of(self.head, lora, scaling, self.device.torch, made_for)

    @property
    def trains_tokens(self) -> bool:
        """Whether rows of embedding and head are trained."""
        return isinstance(self.embedding, TokenRows) and self.embedding.gradient is not None

    def set_token_rows(
        self, ids: Sequence[int], rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        """Put `rows` [n, D] in the place of the tokens' own, in embedding and head; see `TokenRows`. Both are
        by module path. Raises `UnsupportedModelError` where the head is quantized or has a bias."""
        if self._head_product.bias is not None:
            raise UnsupportedModelError(
                f"model.add_tokens: the head of {self.config.model_type} has a bias, which new tokens have "
                "none in; leave add_tokens out"
            )
        ends = []
        for path, stored in zip(self.matrix_paths, (self.embedding, self.head), strict=False):
            gradient = None if gradients is None else gradients[path]
            ends.append(TokenRows(stored, ids, rows[path], gradient))
        self.embedding, self.head = ends[0], ends[-1]

    def release_shared(self) -> None:
        """After an exception in a layer: release outputs that were computed for linears not called yet."""
        for layer in self.layers:
            for module in layer.modules():
                if isinstance(module, SharedLinear):
                    module.together.forget()

    def tile_mlps(self, tile_tokens: int | None, context: DropoutContext) -> None:
        """Let every layer's MLP process `tile_tokens` tokens at a time (None: all). context: the keys of LoRA
        dropout."""
        if tile_tokens is None and not self._tiled_mlps:
            return
        if not self._tiled_mlps:
            for index, layer in enumerate(self.layers):
                if self.experts[index] or not hasattr(layer, "mlp"):
                    continue  # experts compute their rows in tiles anyway
                last = next((end for end in self._ends(index) if isinstance(end, FrozenLinear)), None)
                layer.mlp = self._tiled_mlps[index] = self.tiled_mlp(layer.mlp, context, last)
        for mlp in self._tiled_mlps.values():
            mlp.tile_tokens = tile_tokens

    @contextmanager
    def running_again(self, index: int) -> Iterator[None]:
        """Inside, layer `index` runs a second time, for its gradients only.

        What it adds to the residual sum last is not computed: its output is wrong, its gradients are right
        (not for families where that is not so, nor in reference mode). How many rows every expert has is
        known from the first time."""
        ends = [] if self.kernels.is_reference else self._ends(index)
        tiled = self._tiled_mlps.get(index)
        if ends and tiled is not None and tiled.tile_tokens is not None:
            ends = [tiled]
        for end in ends:
            end.skip_output = True
        for experts in self.experts[index]:
            experts.keeps_counts = True
        try:
            yield
        finally:
            for end in ends:
                end.skip_output = False
            for experts in self.experts[index]:
                experts.keeps_counts = False

    def _ends(self, index: int) -> list[FrozenLinear | FrozenExperts | TiledMlp]:
        """The modules of a layer whose value a second run may leave out."""
        return [
            module
            for module in self.layers[index].modules()
            if isinstance(module, FrozenLinear | FrozenExperts)
            and any(module.name.endswith(f".{name}") for name in self.skippable)
        ]

    @property
    def adaptable(self) -> dict[str, FrozenLinear | ExpertStack]:
        """All that may have LoRA parameters, by path."""
        return self.linears | self.stacks

    def lora_of(self, index: int) -> list[LinearLora]:
        """The LoRA parameters of decoder layer `index`."""
        return _modules_of(self.layers[index], LinearLora)

    def linears_of(self, index: int) -> list[FrozenLinear]:
        """The FrozenLinears of decoder layer `index`."""
        return _modules_of(self.layers[index], FrozenLinear)

    def _epilogue(self, hidden: Tensor, product: _Product) -> Tensor:
        self._head_product.product = product
        try:
            return self._causal_lm(inputs_embeds=hidden, use_cache=False).logits
        finally:
            self._head_product.product = None


def matrix_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """The module paths of embedding and head; where they are tied, of the embedding."""
    matrices = [model.get_input_embeddings(), model.get_output_embeddings()]
    paths = {module: path for path, module in model.named_modules()}
    return tuple(paths[matrix] for matrix in matrices[: 1 if model.config.tie_word_embeddings else 2])


def final_norm_name(decoder: nn.Module) -> str:
    """The attribute that holds the norm behind the last layer; families name it differently. Raises
    `UnsupportedModelError` where there is not exactly one."""
    names = [name for name, child in decoder.named_children() if type(child).__name__.endswith("Norm")]
    if len(names) != 1:
        raise UnsupportedModelError(f"{type(decoder).__name__} has {len(names)} final norms, not one")
    return names[0]


def _modules_of(layer: nn.Module, kind: type[Kind]) -> list[Kind]:
    return [module for module in layer.modules() if isinstance(module, kind)]


class _Product:
    """The operand of the head: rows [n, D], the token ids of these rows (to index the bias), and per_token:
    whether row t is multiplied with token t only."""

    def __init__(self, rows: Tensor, ids: slice | Tensor, per_token: bool) -> None:
        self.rows, self.ids, self.per_token = rows, ids, per_token


class _HeadProduct(nn.Module):
    """Replaces the head: multiplies hidden states by the rows of `product`."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.register_parameter("bias", bias)
        self.product: _Product | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        product = self.product
        assert product is not None
        bias = self.bias[product.ids] if isinstance(self.bias, Tensor) else None
        if not product.per_token:
            return F.linear(hidden, product.rows, bias)
        logits = (hidden[..., None, :] @ product.rows[:, :, None])[..., 0]  # sums in fp32, as F.linear does
        return logits if bias is None else logits + bias[:, None]


class _Recorder(nn.Module):
    """Replaces a decoder layer in the prologue: records its arguments and returns the hidden states.

    Attributes that a family reads from its layers (such as `attention_type`) are the layer's own.
    """

    def __init__(self, layer: nn.Module, calls: list[LayerArguments]) -> None:
        super().__init__()
        object.__setattr__(self, "_layer", layer)  # bypasses nn.Module: no submodule of ours
        object.__setattr__(self, "_calls", calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *others: Any, **arguments: Any) -> Tensor:
        if any(value is not None for value in others):
            raise UnsupportedModelError("its layers are handed something besides the hidden states")
        self._calls.append(arguments)
        return hidden_states


@dataclass
class _DecoderOutput(MoeModelOutputWithPast):
    """All that a causal language model of some family reads off its decoder's output."""

    shared_kv_states: None = None


class _HandBack(nn.Module):
    """Replaces the decoder in the epilogue: its output is the given hidden states."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=inputs_embeds)
