"""CUDA graphs on hardware: the bits of the eager walk, whatever the documents; their memory comes and goes; a
tighter plan and a capture that goes wrong end them; and whole runs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import NF4, packed_row, resident_plan, write_checkpoint
from tiny_runs import adapter_bytes, metrics_of, recipe_values, reversal_rows, write_base, write_rows
from torch import Tensor

from qlora_train.infer.evaluate import loss_sum
from qlora_train.memory.execution import Activation, ExecutionPlan
from qlora_train.memory.load import load_base
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.factors import FactorBuffers
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.recipe import Recipe
from qlora_train.train.recorder import CudaRecorder, Replay
from qlora_train.train.run import train
from qlora_train.train.walk import LayerWalk
from qlora_train.train.walk_graphs import WalkGraphs

pytestmark = pytest.mark.gpu
KEEP, RECOMPUTE = Activation.KEEP, Activation.RECOMPUTE
NUM_LAYERS, NUM_TOKENS = 6, 768
MIXED = (RECOMPUTE, KEEP, RECOMPUTE, KEEP, RECOMPUTE, KEEP)
ROWS = [
    [[300, 200, 268], [500, 268], [256, 256, 256], [700, 68]],
    [[768], [384, 384], [600, 100, 68], [1, 767]],
    [[64] * 12, [32] * 24, [48] * 16, [128] * 6],
    [[290, 210, 268], [260, 508], [400, 368], [256, 512]],
    [[16] * 48, [60] * 12 + [48], [30] * 25 + [18], [96] * 8],
    [[310, 458], [700, 68], [257, 256, 255]],
]
"""Documents of six steps, long and short in turn; the last step has three micro-batches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": NUM_LAYERS}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    return write_checkpoint(tmp_path_factory.mktemp("base"), vocab_size=5000, **sizes, **heads)


@pytest.fixture(autouse=True)
def flash(gpu: torch.device) -> None:
    if torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("needs flash attention")


class Rig:
    """A walk on the GPU, with graphs that must work, or without."""

    def __init__(self, gpu: torch.device, folder: Path, plan: ExecutionPlan, *, graphs: bool) -> None:
        self.gpu = gpu
        self.decoder: FrozenDecoder = load_base(folder, NF4, torch.bfloat16, gpu, plan=plan)
        self.decoder.tail_name = "mlp.down_proj"
        self.decoder.fuse(norms=True, mlps=True, qkv=True)
        self.factors = FactorBuffers(
            self.decoder.linears,
            rank=8,
            scaling=2.0,
            dropout=0.0,
            seed=0,
            dtype=torch.bfloat16,
            device=gpu,
        )
        draw = torch.Generator().manual_seed(1)
        self.factors.masters.copy_(0.1 * torch.randn(self.factors.masters.shape, generator=draw))
        self.factors.refresh_working()
        self.walk = LayerWalk(self.decoder, self.factors, plan, reference=False)
        self.said: list[str] = []
        if graphs:
            recorder, gradient = CudaRecorder(gpu), self.factors.gradient
            self.walk.graphs = WalkGraphs(recorder, gradient, must=True, say=self.said.append)

    def batches(self, step: int) -> list[PackedTokens]:
        rows = ROWS[step % len(ROWS)]
        packed = [packed_row(row, seed=10 * step + k, first_row=k) for k, row in enumerate(rows)]
        return [tokens.moved(lambda t: t.to(self.gpu)) for tokens in packed]

    def step(self, step: int) -> Tensor:
        """Loss and gradient on the host; then the factors move."""
        batches = self.batches(step)
        self.factors.gradient.zero_()
        num_supervised = sum(len(batch.supervised) for batch in batches)
        loss = self.walk.accumulate(batches, seed=3, step=step, num_supervised=num_supervised)
        found = torch.cat([loss[None], self.factors.gradient]).cpu()
        self.factors.masters.mul_(0.97)
        self.factors.refresh_working()
        return found


PLANS = {
    "mixed": resident_plan(*MIXED, loss_tokens=200, head_tile_rows=1024),
    "two groups, held": resident_plan(*MIXED, num_groups=2, hold_unpacked=True),
    "kept": resident_plan(*[KEEP] * NUM_LAYERS),
    "recomputed, tiles": resident_plan(*[RECOMPUTE] * NUM_LAYERS, mlp_tile_tokens=300),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_bits_of_the_eager_walk(gpu: torch.device, folder: Path, name: str, deterministic: None) -> None:
    eager, graphed = (Rig(gpu, folder, PLANS[name], graphs=graphs) for graphs in (False, True))
    for step in range(2 * len(ROWS)):
        expected = eager.step(step)
        assert torch.isfinite(expected).all() and expected.count_nonzero() > 10**4
        assert torch.equal(graphed.step(step), expected), step
    assert graphed.walk.graphs is not None and graphed.walk.graphs._captured and not graphed.said


def test_without_determinism_the_same_up_to_the_order_of_sums(gpu: torch.device, folder: Path) -> None:
    eager, graphed = (Rig(gpu, folder, PLANS["mixed"], graphs=graphs) for graphs in (False, True))
    for step in range(2 * len(ROWS)):
        expected, found = eager.step(step), graphed.step(step)
        assert (found - expected).norm() <= 1e-2 * expected.norm(), step
    assert not graphed.said


def test_memory_goes_back_before_an_evaluation(gpu: torch.device, folder: Path, deterministic: None) -> None:
    eager, graphed = (Rig(gpu, folder, PLANS["kept"], graphs=graphs) for graphs in (False, True))

    def evaluated(rig: Rig) -> Tensor:
        rig.walk.release_graphs()
        return loss_sum(rig.decoder, rig.batches(1), group_size=4).cpu()

    for rig in (eager, graphed):  # workspaces, kernels
        rig.step(0)
        rig.walk.release_graphs()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(gpu)
    for step in range(4):
        assert torch.equal(graphed.step(step), eager.step(step))
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved(gpu) > before + 2**22  # the pool
        assert torch.equal(evaluated(graphed), evaluated(eager))
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved(gpu) <= before + 2**22
    assert not graphed.said


def test_a_tighter_plan_ends_them(gpu: torch.device, folder: Path, deterministic: None) -> None:
    tighter = resident_plan(*[RECOMPUTE] * NUM_LAYERS, num_groups=2)
    eager, graphed = (Rig(gpu, folder, PLANS["kept"], graphs=graphs) for graphs in (False, True))
    for step in range(2):
        assert torch.equal(graphed.step(step), eager.step(step))
    for rig in (eager, graphed):
        rig.walk.follow(tighter)
    for step in range(2, 4):
        assert torch.equal(graphed.step(step), eager.step(step))
    assert graphed.said == ["CUDA graphs are no longer used: another plan is followed"]


class Sabotaged(CudaRecorder):
    """Does something else too in a capture."""

    def __init__(self, gpu: torch.device, sabotage: Callable[[], object]) -> None:
        super().__init__(gpu)
        self._sabotage = sabotage

    def capture(self, work: Callable[[], None]) -> Replay:
        def both() -> None:
            work()
            self._sabotage()

        return super().capture(both)


@pytest.mark.parametrize("kind", ["more memory than there is", "a value on the host"])
def test_a_capture_that_goes_wrong_leaves_the_eager_walk(
    gpu: torch.device, folder: Path, deterministic: None, kind: str
) -> None:
    """For real: in the allocator, and by what CUDA does not allow in a capture."""
    value = torch.ones(1, device=gpu)
    sabotage, reason = {
        "more memory than there is": (
            lambda: torch.empty(2**46, dtype=torch.uint8, device=gpu),
            "out of memory with them",
        ),
        "a value on the host": (value.item, "the walk cannot be captured"),
    }[kind]
    eager, graphed = (Rig(gpu, folder, PLANS["mixed"], graphs=graphs) for graphs in (False, True))
    recorder = Sabotaged(gpu, sabotage)
    graphed.walk.graphs = WalkGraphs(recorder, graphed.factors.gradient, must=False, say=graphed.said.append)
    for step in range(4):
        assert torch.equal(graphed.step(step), eager.step(step)), step
    (line,) = graphed.said
    assert reason in line


def test_a_wait_is_noted_without_a_capture(gpu: torch.device) -> None:
    recorder, waits, value = CudaRecorder(gpu), list[str](), torch.ones(1, device=gpu)
    with recorder.watching(waits):
        value.add_(1.0)
    assert waits == []
    with recorder.watching(waits):
        value.item()
    assert len(waits) == 1 and torch.cuda.get_sync_debug_mode() == 0


def recipe(base: Path, rows: Path, out: Path, graphs: bool | str, **sections: Any) -> Recipe:
    training = {
        "cuda_graphs": graphs,
        "deterministic": True,
        "max_steps": 12,
        "eval_every": 5,
        "save_every": 6,
        "micro_batch_size": 4,
    }
    values = recipe_values(base, rows, out, training=training, data={"eval": 0.2, "sequence_length": 256})
    values["model"]["compute_dtype"] = "bfloat16"
    return Recipe.from_dict(values | sections)


@pytest.fixture(scope="module")
def run_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("run")
    base = write_base(folder / "base", num_hidden_layers=4)
    return base, write_rows(folder / "rows.jsonl", reversal_rows(2000))


def test_a_run_has_the_same_bytes_with_graphs(
    gpu: torch.device,
    run_files: tuple[Path, Path],
    tmp_path: Path,
    deterministic: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, graphs in (("eager", False), ("graphs", True), ("auto", "auto")):
        train(recipe(*run_files, tmp_path / name, graphs))
        said = capsys.readouterr().out
        assert ("the layers are replayed" in said) == (graphs is not False)
        assert "no longer used" not in said
    for name in ("graphs", "auto"):
        assert metrics_of(tmp_path / name) == metrics_of(tmp_path / "eager")
        assert adapter_bytes(tmp_path / name) == adapter_bytes(tmp_path / "eager")
