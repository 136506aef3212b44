"""The walk by graphs is the eager walk, bit for bit, whatever the documents: on a tape (tests/graph_tape.py)
that reads and writes the addresses of the capture, as a CUDA graph does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_tape import TapeRecorder, dense_attention
from tiny_models import NF4, packed_row, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.memory.execution import Activation, ExecutionPlan
from qlora_train.memory.load import load_base
from qlora_train.model.factors import FactorBuffers, select_targets
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.train.walk import LayerWalk
from qlora_train.train.walk_graphs import WalkGraphs

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
        [SHORT[0:4], LONG, SHORT[2:6], [*MANY, LONG[0]], SHORT[1:5], LONG[::-1], SHORT[3:6], SHORT[0:3]]
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
        targets: str | list[str] = "all-linear",
        kind: Callable[..., LayerWalk] = LayerWalk,
    ) -> None:
        decoder = load_base(folder, NF4, torch.bfloat16, torch.device("cpu"), plan=plan)
        decoder.tail_name, decoder.varlen = "mlp.down_proj", dense_attention()
        decoder.fuse(norms=True, mlps=True)
        self.factors = FactorBuffers(
            select_targets(decoder.linears, targets),
            rank=4,
            scaling=2.0,
            dropout=0.0,
            seed=0,
            dtype=torch.bfloat16,
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


PLANS: dict[str, dict[str, Any]] = {
    "one group": {},
    "two groups": {"num_groups": 2},
    "held": {"num_groups": 2, "hold_unpacked": True},
    "tiles": {"mlp_tile_tokens": 20},
}


@pytest.mark.parametrize(
    "activations", [MIXED, (KEEP,) * 3, (RECOMPUTE,) * 3], ids=["mixed", "keep", "recompute"]
)
@pytest.mark.parametrize("name", PLANS)
def test_the_bits_of_the_eager_walk(
    folder: Path, name: str, activations: tuple[Activation, ...], exact: None
) -> None:
    plan = resident_plan(*activations, **PLANS[name])
    expected = Rig(folder, plan).steps()
    rig = Rig(folder, plan, TapeRecorder(), must=True)
    assert_same(rig.steps(), expected)
    assert rig.recorder is not None
    num_groups = plan.num_groups * len(STEPS)
    num_shapes = rig.recorder.num_captures // 2
    assert 3 <= num_shapes < num_groups and rig.recorder.num_replays == 2 * num_groups


def test_layers_below_the_first_factors_are_part_of_it(folder: Path, exact: None) -> None:
    plan, targets = resident_plan(*MIXED), ["layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]
    expected = Rig(folder, plan, targets=targets).steps()
    assert_same(Rig(folder, plan, TapeRecorder(), must=True, targets=targets).steps(), expected)
