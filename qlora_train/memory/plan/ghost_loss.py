"""The end of the walk with ghost tensors: model/loss.py and the embedding, statement by statement.

See ghost.py for why. Tiles and blocks are all of one size but the last, so one tile and one block of each
micro-batch stand for all.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora_train.memory.plan import ghost_ops as op
from qlora_train.memory.plan.families import Norm
from qlora_train.memory.plan.ghost import Ghost, Ledger, backward
from qlora_train.memory.plan.ghost_attention import INT64
from qlora_train.memory.plan.ghost_norm import library_norm
from qlora_train.memory.plan.ghost_ops import FLOAT32
from qlora_train.memory.plan.packed_sizes import PackingSizes

LOSS_BLOCK = "loss block"


@dataclass(frozen=True)
class LossSettings:
    """num_tokens: T. num_supervised: S of one micro-batch. hidden, vocabulary: D, V. loss_tokens,
    tile_rows: of the execution plan. norm: the final one, as the library writes it. num_logit_steps: see
    `ModelShape`. head_packing: of the head's rows. rows_from_file: its label rows are read from a file into
    host memory that the meter sees. copies_head: reference mode has to put the whole head together."""

    num_tokens: int
    num_supervised: int
    hidden: int
    vocabulary: int
    itemsize: int
    loss_tokens: int
    tile_rows: int
    norm: Norm
    num_logit_steps: int
    head_packing: PackingSizes
    on_accelerator: bool
    rows_from_file: bool = False
    copies_head: bool = False


@dataclass
class _Running:
    leaf: Ghost
    hidden: Ghost
    sums: Ghost
    label_gradients: Ghost | None = None
    weighted: Ghost | None = None


def tiled_loss(ledger: Ledger, xs: list[Ghost], settings: LossSettings, *, gradients: bool) -> list[Ghost]:
    """`TiledLoss`: takes the outputs of the last layer from the list, returns dL/dx of each."""
    with ledger.cause(LOSS_BLOCK):
        states = [_begin(ledger, xs.pop(0), settings, gradients) for _ in range(len(xs))]
        ledger.scratch(tile_scratch_bytes(settings))
        for state in states:
            _add_tile(ledger, state, settings)
        return [_finish(ledger, states.pop(0), settings) for _ in range(len(states))] if gradients else []


def tile_scratch_bytes(settings: LossSettings) -> int:
    """What unpacking one tile of the head into its buffer needs besides."""
    num_rows, width, packing = (
        min(settings.tile_rows, settings.vocabulary),
        settings.hidden,
        settings.head_packing,
    )
    if packing.format == "none":
        return 0
    return num_rows * packing.row_bytes(width) + packing.scratch_bytes(
        (num_rows, width), on_accelerator=settings.on_accelerator
    )


def _begin(ledger: Ledger, x: Ghost, settings: LossSettings, gradients: bool) -> _Running:
    num_rows, width, itemsize = settings.num_supervised, settings.hidden, settings.itemsize
    leaf = ledger.tensor((num_rows, width), itemsize)
    if gradients:
        leaf = leaf.leaf()
    hidden = library_norm(leaf, settings.norm)
    if settings.rows_from_file:
        ledger.scratch(2 * num_rows * settings.head_packing.row_bytes(width))
    label_rows = ledger.tensor((num_rows, width), itemsize)
    ledger.scratch(settings.head_packing.rows_scratch_bytes(num_rows, width))
    sums = ledger.tensor((num_rows, 3), FLOAT32)
    state = _Running(leaf, hidden, sums)
    if gradients:
        state.label_gradients = ledger.tensor((num_rows, width), itemsize)
        state.weighted = ledger.tensor((num_rows, width), FLOAT32)
    del label_rows, x
    return state


def _add_tile(ledger: Ledger, state: _Running, settings: LossSettings) -> None:
    num_rows, itemsize = min(settings.loss_tokens, settings.num_supervised), settings.itemsize
    num_columns = min(settings.tile_rows, settings.vocabulary)
    logits = ledger.tensor((num_rows, num_columns), itemsize)
    if settings.num_logit_steps:  # the step before is alive while the next is taken
        ledger.scratch(logits.num_bytes)
    is_capped = settings.num_logit_steps == 3
    saved = logits.like() if is_capped and state.weighted is not None else None
    small = ledger.tensor((num_rows, 2), FLOAT32)
    weights = ledger.tensor((num_rows, num_columns), FLOAT32)
    if state.weighted is not None:
        cast = op.to(weights, itemsize)
        if settings.num_logit_steps:
            ledger.scratch((2 if is_capped else 1) * logits.num_bytes)
        gradient = ledger.tensor((num_rows, settings.hidden), itemsize)
        del cast, gradient
    del logits, saved, small, weights


def _finish(ledger: Ledger, state: _Running, settings: LossSettings) -> Ghost:
    leaf = state.leaf
    assert leaf.node is not None and state.weighted is not None
    gradient = op.to(state.weighted, settings.itemsize)
    backward(state.hidden, gradient)
    del gradient
    with ledger.cause(GRADIENTS):
        return ledger.tensor((1, settings.num_tokens, settings.hidden), settings.itemsize)


GRADIENTS = "gradients between layers"


def reference_loss(ledger: Ledger, xs: list[Ghost], settings: LossSettings) -> list[Ghost]:
    """`model/loss.reference_loss` of every micro-batch: all T positions' logits at once."""
    with ledger.cause(LOSS_BLOCK):
        head = ledger.tensor((settings.vocabulary * settings.copies_head, settings.hidden), settings.itemsize)
        ledger.scratch(tile_scratch_bytes(settings))
        gradients = [_reference(x, settings) for x in xs]
        del head
        return gradients


def _reference(x: Ghost, settings: LossSettings) -> Ghost:
    num_tokens, itemsize, ledger = settings.num_tokens, settings.itemsize, x.ledger
    leaf = x.leaf()
    hidden = library_norm(leaf, settings.norm)
    logits = ledger.tensor((num_tokens, settings.vocabulary), itemsize)
    scores = op.to(logits, FLOAT32)
    log_softmax = ledger.tensor(logits.shape, FLOAT32)
    selected = ledger.tensor(logits.shape, FLOAT32)
    gradient = ledger.tensor(logits.shape, FLOAT32)
    del selected, log_softmax
    cast = op.to(gradient, itemsize)
    del gradient
    hidden_gradient = ledger.tensor(hidden.shape, itemsize)
    del cast
    backward(hidden, hidden_gradient)
    del scores, logits
    assert leaf.node is not None and leaf.node.gradient is not None
    return leaf.node.gradient


def embedded(
    ledger: Ledger, num_tokens: int, hidden: int, head_dim: int, itemsize: int, rows_from_file: bool
) -> tuple[Ghost, Ghost]:
    """`FrozenDecoder.embed_packed`: (x_0, what stays of the layers' arguments: cos and sin)."""
    if rows_from_file:
        ledger.scratch(2 * num_tokens * hidden * itemsize)
    rows = ledger.tensor((num_tokens, hidden), itemsize)
    order = ledger.tensor((num_tokens,), INT64)
    x = ledger.tensor((1, num_tokens, hidden), itemsize)
    with ledger.cause(ROTARY):
        frequencies = ledger.tensor((num_tokens, head_dim), FLOAT32)
        ledger.scratch(3 * num_tokens * head_dim * FLOAT32)
        arguments = ledger.tensor((2, num_tokens, head_dim), itemsize)
    del rows, order, frequencies
    return x, arguments


ROTARY = "rotary tables"
