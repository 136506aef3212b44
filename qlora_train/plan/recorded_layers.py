"""Layers of a planned model: each is run once for each kind of call, and its memory is replayed afterwards.

A walk over a model of 80 layers calls the same few kinds of layers hundreds of times. A layer runs, on the
meta device under a meter, only for the first call of its kind: with a graph or without, with a gradient for
its input or not, with its last product skipped or not, its MLP in tiles or whole, its weights dequantized
already or not. With DoRA the first run also computes row norms. A replay then allocates and frees the same
bytes:

    forward     the output, the tensors saved for backward (one for all that may be offloaded, one for the
                rest), and briefly the rest of the run's peak
    backward    the gradient of the input, and briefly the rest of the run's peak

Saved tensors are handed to autograd, so the walk's own hooks offload them, and the order of everything is the
walk's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_train.device.memory_tracker import StorageReference
from qlora_train.model.decoder import FrozenDecoder, LayerArguments
from qlora_train.model.linear import DropoutContext
from qlora_train.model.tiled_mlp import TiledMlp
from qlora_train.model.weight_store import ResidentWeights
from qlora_train.plan.planned_meter import PlannedMeter

KEPT = "kept activations"
_BYTES = torch.float8_e4m3fn
"""A one-byte floating-point dtype: offloading skips integer tensors."""


@dataclass(frozen=True)
class Call:
    """What decides the bytes of a layer's call. kind: see `kinds_of`. boundaries: of the documents. needs_dx:
    the input needs a gradient. runs_again: recomputed for backward in the same visit, its last product
    skipped. holds: weights stay dequantized during a visit. drops: dropout is on."""

    kind: int
    boundaries: tuple[int, ...]
    with_graph: bool = False
    needs_dx: bool = False
    runs_again: bool = False
    holds: bool = False
    drops: bool = False
    mlp_tile_tokens: int | None = None


@dataclass(frozen=True)
class Record:
    """Bytes of a layer's run besides its output. saved, fixed_saved: stored for backward, those that may be
    offloaded and those that stay on the device. saves_output: the output is stored too. forward, backward:
    temporary bytes, (in the first run of a visit, in later ones, which find held weights dequantized);
    backward includes the input's gradient."""

    saved: int = 0
    fixed_saved: int = 0
    saves_output: bool = False
    forward: tuple[int, int] = (0, 0)
    backward: tuple[int, int] = (0, 0)

    @property
    def graph_bytes(self) -> int:
        """Bytes of the layer's graph, besides input and output."""
        return self.saved + self.fixed_saved


class PlannedWeights(ResidentWeights):
    """A weight store of meta tensors. num_runs: how often the visited layer has run in this visit."""

    num_runs = 0

    @contextmanager
    def layer_on_device(self, layer: int) -> Iterator[None]:
        self.num_runs = 0
        with self.holding():
            yield

    def make_buffer(self, dtype: torch.dtype) -> None:
        """Make the buffer that weights are dequantized into, before it is first used."""
        some = next(iter(self.quantized.values()))
        if not self.copies_dequantized:
            self._make_room(
                self._largest_layer if self.hold_dequantized else self._largest_weight, some, dtype
            )
            for matrix in self._chunk_sizes:
                self._chunk_buffer(matrix, torch.device("meta"), dtype)


class PlannedTiles(TiledMlp):
    """An MLP that runs two tiles and the remainder: its peak does not depend on the number of tiles."""

    def tiles(self, num_tokens: int) -> list[slice]:
        every = super().tiles(num_tokens)
        return [*every[:2], *every[2:][-1:]]


class RecordedDecoder(FrozenDecoder):
    """A `FrozenDecoder` on the meta device whose layers are replayed. meter: counts allocated bytes; must be
    set before a layer is run."""

    tiled_mlp = PlannedTiles
    weights: PlannedWeights
    meter: PlannedMeter
    runs_again = False
    _tile_tokens: int | None = None
    _dropout: DropoutContext | None = None

    def prepare(self) -> None:
        """Find the kinds of layers; call it once LoRA parameters are attached and operations fused."""
        self.kinds = kinds_of(self)
        self.records: dict[Call, Record] = {}
        self._anchor = nn.Parameter(torch.empty(0, device="meta"))  # a graph needs something that trains

    @contextmanager
    def running_again(self, index: int) -> Iterator[None]:
        self.runs_again = True
        try:
            with super().running_again(index):
                yield
        finally:
            self.runs_again = False

    def tile_mlps(self, tile_tokens: int | None, context: DropoutContext) -> None:
        super().tile_mlps(tile_tokens, context)
        self._tile_tokens, self._dropout = tile_tokens, context

    def run_layer(self, index: int, x: Tensor, arguments: LayerArguments) -> Tensor:
        record = self.record(index, x, arguments)
        is_later = self.weights.num_runs > 0
        self.weights.num_runs += 1
        if torch.is_grad_enabled():
            y: Tensor = _Playback.apply(x, self._anchor, record, self, is_later)
            return y
        y = torch.empty_like(x)
        self.meter.note_peak(record.forward[is_later])
        return y

    def record(self, index: int, x: Tensor, arguments: LayerArguments) -> Record:
        """The bytes of a call with these arguments, with a graph if gradients are enabled."""
        with_graph = torch.is_grad_enabled()
        call = Call(
            self.kinds[index],
            arguments["documents"].boundaries,
            with_graph,
            with_graph and x.requires_grad,
            with_graph and self.runs_again,
            self.weights.hold_dequantized,
            self._dropout is not None and self._dropout.tokens is not None,
            self._tile_tokens,
        )
        if call not in self.records:
            with self.meter.paused():
                self.records[call] = self._measured(call, index, x, arguments)
        return self.records[call]

    def _measured(self, call: Call, index: int, x: Tensor, arguments: LayerArguments) -> Record:
        """Run the layer in visits of its own; twice in a visit if weights stay dequantized, or with DoRA."""
        self.weights.make_buffer(self.dtype)
        lora = self.lora_of(index)
        magnitudes = [module.magnitude for module in lora if module.magnitude is not None]
        for magnitude in magnitudes:  # row norms are computed in the first run of a step
            magnitude.is_measured, magnitude.is_stale = False, not call.runs_again
        runs: list[_Run] = []
        with self.weights.holding():
            for _ in range(2 if call.holds or magnitudes else 1):
                runs.append(_Run(self.meter.another(), partial(super().run_layer, index), x, arguments))
                if call.runs_again:  # a layer that is run again is taken back in the same visit
                    runs[-1].run_backward()
        with self.weights.holding():
            for run in runs:
                if call.with_graph and not call.runs_again:
                    run.run_backward()
        for module in lora:
            module.zero_grad()  # of what autograd left there in reference mode
        return replace(
            runs[0].record,
            forward=(runs[0].forward, runs[-1].forward),
            backward=(runs[0].backward, runs[-1].backward),
        )


class _Run:
    """One run of a layer under a meter. forward: peak bytes besides those that are left afterwards. backward:
    peak bytes besides those before it."""

    def __init__(
        self,
        meter: PlannedMeter,
        run: Callable[[Tensor, LayerArguments], Tensor],
        x: Tensor,
        arguments: LayerArguments,
    ) -> None:
        self._meter = meter
        self._saved: dict[int, StorageReference] = {}
        self._gradient = torch.empty_like(x)
        leaf = x.detach().requires_grad_(x.requires_grad)
        with meter, saved_tensors_hooks(self._note, _as_it_is):
            self._y = run(leaf, arguments)
        self.forward, self.backward = meter.peak_bytes - meter.live_bytes, 0
        saved = [known for known in self._saved.values() if meter.is_alive(known)]
        output = meter.find(self._y.untyped_storage())
        saved_bytes = sum(known.num_bytes for known in saved if known is not output)
        self.record = Record(
            saved=saved_bytes,
            fixed_saved=meter.live_bytes - self._y.nbytes - saved_bytes,
            saves_output=output in saved,
        )

    def run_backward(self) -> None:
        """Run backward under the meter."""
        live_bytes = self._meter.live_bytes
        self._meter.reset_peak()
        with self._meter, saved_tensors_hooks(_as_it_is, _as_it_is):  # not those of a graph that is offloaded
            self._y.backward(self._gradient)
        self.backward = self._meter.peak_bytes - live_bytes

    def _note(self, tensor: Tensor) -> Tensor:
        known = self._meter.find(tensor.untyped_storage())
        if known is not None and tensor.is_floating_point():
            self._saved[id(known)] = known
        return tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Playback(torch.autograd.Function):
    """Replays a record: allocates and frees what the recorded run did."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, record: Record, decoder: RecordedDecoder, is_later: bool
    ) -> Tensor:
        y = torch.empty_like(x)
        with decoder.meter.counting(KEPT):
            saved = x.new_empty(record.saved, dtype=_BYTES)
            ctx.stays = x.new_empty(record.fixed_saved, dtype=torch.uint8)
        ctx.save_for_backward(saved, *([y] if record.saves_output else []))
        ctx.record, ctx.decoder = record, decoder
        ctx.is_later = is_later if decoder.runs_again else None
        decoder.meter.note_peak(record.forward[is_later])
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved, record, weights = ctx.saved_tensors, ctx.record, ctx.decoder.weights
        is_later = ctx.is_later
        if is_later is None:  # kept: another visit
            is_later = weights.num_runs > 0
            weights.num_runs += 1
        grad_input = torch.empty_like(gradient) if ctx.needs_input_grad[0] else None
        ctx.decoder.meter.note_peak(
            record.backward[is_later] - (0 if grad_input is None else grad_input.nbytes)
        )
        del saved
        return grad_input, None, None, None, None


def kinds_of(decoder: FrozenDecoder) -> list[int]:
    """The kind of every layer, as a number: layers of one kind have the same modules, shapes and settings."""
    numbers: dict[str, int] = {}
    return [
        numbers.setdefault(_signature(layer, index), len(numbers))
        for index, layer in enumerate(decoder.layers)
    ]


def _signature(layer: nn.Module, index: int) -> str:
    """Text that is equal for layers of one kind."""
    parts: list[Any] = [str(layer).replace(f".{index}.", ".i.")]
    for name, module in layer.named_modules():
        parts += [
            (name, key, value)
            for key, value in vars(module).items()
            if isinstance(value, int | str | None) and key not in _INERT and not key.startswith("_")
        ]
        parts += [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
    return str(parts)


_INERT = {"layer_idx", "training", "module_id", "name"}
"""Attributes that differ between layers of one kind."""
