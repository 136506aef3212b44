"""The walk by graphs is the eager walk, bit for bit, whatever the documents: on a tape (tests/graph_tape.py)
that reads and writes the addresses of the capture, as a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_tape import DenseAttention, TapeRecorder
from tiny_models import NF4, packed_row, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.errors import TrainingFailure
from qlora_train.memory.execution import Activation, ExecutionPlan
from qlora_train.memory.load import load_base
from qlora_train.model.decoder import LayerArguments
from qlora_train.model.factors import FactorBuffers, select_targets
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.train import walk_graphs
from qlora_train.train.walk import LayerWalk
from qlora_train.train.walk_graphs import MAX_CAPTURED, WalkGraphs

KEEP, RECOMPUTE = Activation.KEEP, Activation.RECOMPUTE
MIXED = (RECOMPUTE, KEEP, RECOMPUTE)
NUM_TOKENS = 48
SHORT = [[12, 5, 16, 15], [7, 9, 16, 16], [16, 3, 13, 16], [8] * 6, [16, 16, 16], [1, 14, 16, 2, 15]]
LONG = [[30, 18], [20, 28], [25, 3, 20], [17, 31]]
MANY = [[3] * 16, [4] * 12, [6, 3] + [3] * 13]


def step_of(lengths: list[list[int]], seed: int) -> list[PackedTokens]:
    return [packed_row(row, seed=seed + 100 * k, first_row=k) for k, row in enumerate(lengths)]


STEPS = [
    step_of(lengths, seed)
    for seed, lengths in enumerate(
        [SHORT[0:4], LONG, SHORT[2:6], [*MANY, LONG[0]], LONG[::-1], SHORT[3:6], SHORT[0:3]]
    )
]
"""Documents and their number differ; K = 4, at the end 3."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def exact() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Rig:
    """A walk with attention that takes documents of any lengths in one call, and, with a recorder, graphs."""

    def __init__(
        self,
        folder: Path,
        plan: ExecutionPlan,
        recorder: TapeRecorder | None = None,
        *,
        must: bool = False,
        dtype: torch.dtype = torch.float32,
        targets: str | list[str] = "all-linear",
        kind: Callable[..., LayerWalk] = LayerWalk,
    ) -> None:
        decoder = load_base(folder, NF4, dtype, torch.device("cpu"), plan=plan)
        decoder.tail_name, decoder.varlen = "mlp.down_proj", DenseAttention()
        decoder.fuse(norms=True, mlps=True, qkv=True)
        self.factors = FactorBuffers(
            select_targets(decoder.linears, targets),
            rank=4,
            scaling=2.0,
            dropout=0.0,
            seed=0,
            dtype=dtype,
            device="cpu",
        )
        generator = torch.Generator().manual_seed(1)
        self.factors.masters.copy_(0.1 * torch.randn(self.factors.masters.shape, generator=generator))
        self.factors.refresh_working()
        self.walk = kind(decoder, self.factors, plan, reference=False)
        self.said: list[str] = []
        self.recorder = recorder
        if recorder is not None:
            self.walk.graphs = WalkGraphs(recorder, self.factors.gradient, must=must, say=self.said.append)

    @property
    def graphs(self) -> WalkGraphs:
        assert self.walk.graphs is not None
        return self.walk.graphs

    def step(self, number: int, batches: list[PackedTokens] | None = None, **options: Any) -> Tensor:
        """Loss and gradient; then the factors move, as in training."""
        batches = STEPS[number] if batches is None else batches
        num_supervised = sum(len(batch.supervised) for batch in batches)
        self.factors.gradient.zero_()
        loss = self.walk.accumulate(batches, seed=0, step=number, num_supervised=num_supervised, **options)
        found = torch.cat([loss[None], self.factors.gradient])
        self.factors.masters.mul_(0.97)
        self.factors.refresh_working()
        return found

    def steps(self) -> list[Tensor]:
        return [self.step(number) for number in range(len(STEPS))]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for number, (ours, eager) in enumerate(zip(found, expected, strict=True)):
        assert torch.isfinite(eager).all() and eager.count_nonzero() > len(eager) // 2
        assert torch.equal(ours, eager), f"step {number}"


@pytest.mark.parametrize(
    "plan",
    [
        resident_plan(*MIXED),
        resident_plan(*MIXED, num_groups=2, hold_unpacked=True),
        resident_plan(*[KEEP] * 3, num_groups=2),
        resident_plan(*[RECOMPUTE] * 3, mlp_tile_tokens=20),
    ],
    ids=["mixed", "two groups, held", "kept", "recomputed, tiles"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # working copies of their own in bfloat16
def test_the_bits_of_the_eager_walk(
    folder: Path, plan: ExecutionPlan, dtype: torch.dtype, exact: None
) -> None:
    expected = Rig(folder, plan, dtype=dtype).steps()
    recorder = TapeRecorder()
    assert_same(Rig(folder, plan, recorder, must=True, dtype=dtype).steps(), expected)
    assert recorder.num_captures >= 2 * 3 and recorder.num_replays == 2 * plan.num_groups * len(STEPS)


def test_layers_below_the_first_factors_are_part_of_it(folder: Path, exact: None) -> None:
    plan, targets = resident_plan(*MIXED), ["layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]
    expected = Rig(folder, plan, targets=targets).steps()
    assert_same(Rig(folder, plan, TapeRecorder(), must=True, targets=targets).steps(), expected)


def assert_given_up(rig: Rig, expected: list[Tensor], reason: str) -> None:
    """It says why, once, and what it computes is right from the first step on."""
    assert_same(rig.steps(), expected)
    assert rig.said == [f"CUDA graphs are no longer used: {reason}"]
    assert not rig.graphs.are_used


PLAN = resident_plan(*MIXED)


@pytest.fixture(scope="module")
def eager(folder: Path) -> list[Tensor]:
    return Rig(folder, PLAN).steps()


FORGOTTEN = {"cos": 0, "sin": 1, "boundaries of documents": 3}
"""Places among the tensors of a layer's arguments; at 2 are the positions, which no layer reads."""


@pytest.mark.parametrize("name", FORGOTTEN)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_copy_that_is_forgotten_is_found_out(
    folder: Path,
    eager: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    name: str,
    deterministic: bool,
) -> None:
    if deterministic:
        request.getfixturevalue("exact")

    def fill(self: walk_graphs._Inputs, arguments: list[LayerArguments]) -> None:
        for i, (copy, tensor) in enumerate(zip(self.copies, walk_graphs._leaves(arguments)[0], strict=True)):
            if i != FORGOTTEN[name]:
                copy.copy_(tensor)

    monkeypatch.setattr(walk_graphs._Inputs, "fill", fill)
    rig = Rig(folder, PLAN, TapeRecorder())
    assert_same(rig.steps(), eager)
    (line,) = rig.said
    assert "differ by" in line and not rig.graphs.are_used
    with pytest.raises(TrainingFailure, match=r"cuda_graphs: true, but .* differ by .* Write auto or false"):
        Rig(folder, PLAN, TapeRecorder(), must=True).step(0)


def test_half_a_replay_is_found_out(folder: Path, eager: list[Tensor]) -> None:
    recorder = TapeRecorder()
    recorder.capture = lambda work: lambda: None  # type: ignore[method-assign]
    rig = Rig(folder, PLAN, recorder)
    assert_same(rig.steps(), eager)
    assert len(rig.said) == 1 and "differ by" in rig.said[0]


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_what_cannot_be_captured_is_walked_eagerly(folder: Path, eager: list[Tensor], number: int) -> None:
    def refuse(n: int) -> None:
        if n == number:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    reason = "the walk cannot be captured (operation not permitted when stream is capturing)"
    assert_given_up(Rig(folder, PLAN, TapeRecorder(refuse)), eager, reason)
    with pytest.raises(TrainingFailure, match="not permitted when stream is capturing"):
        Rig(folder, PLAN, TapeRecorder(refuse), must=True).steps()


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("must", [False, True])
def test_out_of_memory_in_a_capture(folder: Path, eager: list[Tensor], number: int, must: bool) -> None:
    """Also where ending the capture raises once more."""

    def run_out(n: int) -> None:
        if n == number:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
            finally:
                raise RuntimeError("capture ended badly")

    recorder = TapeRecorder(run_out)
    assert_given_up(
        Rig(folder, PLAN, recorder, must=must), eager, "out of memory with them (capture ended badly)"
    )
    assert recorder.num_releases == (number + 1) // 2 and not recorder.tapes


def test_out_of_memory_beside_the_graphs(folder: Path, eager: list[Tensor]) -> None:
    """The head's third call is that of a replay."""

    class RunsOut(LayerWalk):
        num_calls = 0

        def _losses(self, *args: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super()._losses(*args)

    recorder = TapeRecorder()
    rig = Rig(folder, PLAN, recorder, kind=RunsOut)
    assert_given_up(rig, eager, "out of memory with them (CUDA out of memory)")
    assert recorder.num_captures == 4 and not recorder.tapes


def test_a_layer_that_waits_is_not_captured(folder: Path, eager: list[Tensor]) -> None:
    recorder = TapeRecorder()
    recorder.waits = ["called a synchronizing CUDA operation"]
    reason = "a layer waits for the device (called a synchronizing CUDA operation)"
    assert_given_up(Rig(folder, PLAN, recorder), eager, reason)
    assert recorder.num_captures == 0


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda step: step, "layers are called with other numbers in every step"),
        (lambda step: {1, 2}, "layers are called with a set"),
    ],
)
def test_arguments_that_would_be_burnt_in(
    folder: Path, eager: list[Tensor], value: Callable[[int], Any], reason: str
) -> None:
    class Passes(LayerWalk):
        num_calls = 0

        def embed(self, tokens: PackedTokens) -> tuple[Tensor, list[LayerArguments]]:
            self.num_calls += 1
            x, arguments = super().embed(tokens)
            return x, [given | {"use_cache": value(self.num_calls)} for given in arguments]

    rig = Rig(folder, PLAN, TapeRecorder(), kind=Passes)
    assert_given_up(rig, eager, f"the walk cannot be captured ({reason})")


def test_another_plan_ends_them(folder: Path) -> None:
    other = resident_plan(*[RECOMPUTE] * 3, num_groups=2)
    recorder = TapeRecorder()
    rigs = [Rig(folder, PLAN), Rig(folder, PLAN, recorder, must=True)]
    results = []
    for rig in rigs:
        found = [rig.step(0), rig.step(2)]
        rig.walk.follow(other)
        results.append([*found, rig.step(2), rig.step(3)])
    assert_same(results[1], results[0])
    assert rigs[1].said == ["CUDA graphs are no longer used: another plan is followed"]
    assert recorder.num_captures == 2 and not recorder.tapes


def test_released_graphs_are_captured_again(folder: Path, eager: list[Tensor]) -> None:
    """Without walking both ways again."""
    recorder = TapeRecorder()
    rig = Rig(folder, PLAN, recorder, must=True)
    rig.walk.release_graphs()
    assert recorder.num_releases == 0  # there was nothing
    found = []
    for number in range(len(STEPS)):
        found.append(rig.step(number))
        if number in (0, 2):
            rig.walk.release_graphs()
            assert not recorder.tapes
    assert_same(found, eager)
    assert recorder.num_replays == 2 * len(STEPS) and recorder.num_captures > 2 * len(rig.graphs._proven)


def test_a_step_that_proves_nothing_is_not_captured(folder: Path) -> None:
    """Overflowed, or without anything supervised."""
    recorder = TapeRecorder()
    rig = Rig(folder, PLAN, recorder, must=True)
    assert not torch.isfinite(rig.step(0, loss_scale=float("inf"))).all()
    nothing = [packed_row([12, 36], unsupervised=48) for _ in range(4)]
    rig.factors.gradient.zero_()
    rig.walk.accumulate(nothing, seed=0, step=0, num_supervised=1)
    assert recorder.num_captures == 0
    rig.step(0)
    assert recorder.num_captures == 2


def test_no_more_than_a_few_shapes_at_a_time(folder: Path) -> None:
    """Rows of equal documents: their lengths are shapes."""
    recorder, rigs = TapeRecorder(), [Rig(folder, PLAN)]
    rigs.append(Rig(folder, PLAN, recorder, must=True))
    lengths = (48, 24, 16, 4, 2) * 2
    steps = [[packed_row([n] * (NUM_TOKENS // n), seed=n, unsupervised=0)] for n in lengths]
    results = []
    for rig in rigs:
        results.append([rig.step(i, step) for i, step in enumerate(steps)])
        assert len(recorder.tapes) <= 2 * MAX_CAPTURED
    assert_same(results[1], results[0])
    # the first time each alone, as it is walked eagerly too; then three beside the last one, and two more
    assert recorder.num_captures == 2 * (5 + 3 + 2) and len(recorder.tapes) == 2 * 2


def test_an_eager_walk_finds_the_memory_of_the_graphs(folder: Path, eager: list[Tensor]) -> None:
    recorder = TapeRecorder()

    class Watched(LayerWalk):
        num_walks = 0

        def walk_group(self, *args: Any) -> Tensor:
            assert not recorder.tapes
            Watched.num_walks += 1
            return super().walk_group(*args)

    assert_same(Rig(folder, PLAN, recorder, must=True, kind=Watched).steps(), eager)
    assert 3 <= Watched.num_walks < len(STEPS)
