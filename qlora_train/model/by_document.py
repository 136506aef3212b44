"""Token mixers with a memory (gated delta nets, short convolutions, state spaces), run on documents apart.

Attention is told where documents end; a recurrent mixer is not: over a packed row its state and the taps of
its convolution would carry one document into the next, silently. So documents are gathered into right-padded
batches (kernels/document_gather.py), the library's mixer runs on each batch as it is, and the outputs are put
back in the order of the row. All of it is causal, so padding behind a document changes nothing before it, and
what a document gets does not depend on its neighbours.

To generate, each prompt has a cache of the library's own, in which the mixer keeps its state between tokens:
prompts of different lengths run one by one, as each would alone.

Which modules: those that own a convolution over time (`nn.Conv1d`), whatever a family calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qlora_train.errors import UnsupportedModelError
from qlora_train.kernels.document_gather import gather_documents, scatter_documents
from qlora_train.model.attention import DocumentLayout
from qlora_train.model.linear import FrozenLinear

CACHES = ("cache_params", "past_key_values")
_INERT_ARGUMENTS = {
    *("documents", "kv_lengths", "attention_kernels", "position_ids", "position_embeddings"),
    *("use_cache", *CACHES),
}
"""What decoders hand to every mixer; documents say all that matters to one with a memory."""


class ByDocument(nn.Module):
    """A library's mixer over packed rows. documents: the layout of the micro-batch that passes now; None:
    each row is the next token of a prompt, whose state is in the cache."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.documents: DocumentLayout | None = None

    def __getattr__(self, name: str) -> Any:
        """Attributes that a family reads off its mixer are the mixer's own."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("mixer"), name)

    def forward(self, hidden_states: Tensor, **others: Any) -> Any:
        """hidden_states [1, T, D] -> [1, T, D], in a tuple where the mixer returns one; next tokens [B, 1, D]
        -> [B, 1, D]. Raises `UnsupportedModelError` for arguments that it does not know."""
        unknown = {name for name, value in others.items() if value is not None} - _INERT_ARGUMENTS
        if unknown:
            mixer, listed = type(self.mixer).__name__, ", ".join(sorted(unknown))
            raise UnsupportedModelError(f"{mixer} is handed {listed}, which packing cannot honour")
        documents = self.documents
        if cached := {name: others[name] for name in CACHES if others.get(name) is not None}:
            return self._with_states(hidden_states, cached)
        assert documents is not None, "the tokens of a row belong to documents"
        rows = gather_documents(hidden_states.transpose(0, 1), documents.buckets, documents.inverse)
        outputs = [
            self._run(batch[:, :, 0], index) for batch, index in zip(rows, documents.buckets, strict=True)
        ]
        values = [out[0] if isinstance(out, tuple) else out for out in outputs]
        joined = scatter_documents([v[:, :, None] for v in values], documents.buckets, documents.inverse)
        return _as_returned(outputs[0], joined.transpose(0, 1))

    def _with_states(self, hidden_states: Tensor, cached: Mapping[str, Any]) -> Any:
        """The mixer on the tokens of each prompt, with the state in its cache (`states`, one per prompt)."""
        ((name, cache),) = cached.items()
        documents = self.documents
        if documents is None:
            parts = hidden_states.split(1)
        else:
            ends = documents.boundaries
            parts = hidden_states.split([b - a for a, b in pairwise(ends)], dim=1)
        states = zip(parts, cache.states, strict=True)
        outputs = [self.mixer(hidden_states=part, **{name: state}) for part, state in states]
        values = [out[0] if isinstance(out, tuple) else out for out in outputs]
        return _as_returned(outputs[0], torch.cat(values, dim=0 if documents is None else 1))

    def _run(self, batch: Tensor, index: Tensor) -> Any:
        """The mixer on a batch [N, L, D], whose tokens [N, L] dropout knows by what they are in the row."""
        linears = (m for m in self.mixer.modules() if isinstance(m, FrozenLinear))
        context = next((linear.lora.context for linear in linears if linear.lora is not None), None)
        if context is None or context.tokens is None:
            return self.mixer(hidden_states=batch)
        before = context.tokens
        context.tokens = before.of(index.flatten())
        try:
            return self.mixer(hidden_states=batch)
        finally:
            context.tokens = before


def _as_returned(output: Any, y: Tensor) -> Any:
    """y in a tuple where the mixer's own output is one."""
    return (y, *[None] * (len(output) - 1)) if isinstance(output, tuple) else y


def run_mixers_by_document(layer: nn.Module) -> list[ByDocument]:
    """Put every recurrent mixer of a decoder layer into a `ByDocument`; returns those."""
    found = []
    for name, module in list(layer.named_modules()):
        if name and any(isinstance(child, nn.Conv1d) for child in module.children()):
            parent, _, attribute = name.rpartition(".")
            found.append(ByDocument(module))
            setattr(layer.get_submodule(parent), attribute, found[-1])
    return found
