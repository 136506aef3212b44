"""Every wait of ring, offloading, staging and uploads is needed, and the simulated GPU sees that it is."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_gpu.fixture import SimulatedGpu
from tiny_models import NF4, packed_row, write_checkpoint
from tiny_runs import adapter_bytes, recipe_values, reversal_rows, write_base, write_rows
from torch import Tensor

from qlora_train.kernels.on_device import find_device
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.recipe import Recipe
from qlora_train.train import train
from qlora_train.walk.host_offload import HostOffloader
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights.execution_plan import ActivationPolicy, everything_resident
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.load import load_base
from qlora_train.weights.ring import Ring
from simulated_runs.mutants import MUTANTS, Mutant

pytestmark = pytest.mark.filterwarnings("ignore:Triton does not run")


SLOT_BYTES = 8192


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", reversal_rows(60))


def run(base: Path, train_file: Path, out: Path, memory: dict[str, Any]) -> bytes:
    values = recipe_values(base, train_file, out, training={"max_steps": 2}) | {"memory": memory}
    train(Recipe.from_dict(values))
    return adapter_bytes(out)


@pytest.fixture(scope="module")
def unharmed() -> dict[str, bytes]:
    return {}


class Numbers:
    """A ring's reader: item i is filled with i, from pinned memory."""

    def __init__(self, host: HostMemory) -> None:
        self._items = [host.empty(SLOT_BYTES).fill_(i) for i in range(4)]

    def read(self, item: int, slot: Tensor) -> None:
        slot.copy_(self._items[item], non_blocking=True)


def new_ring() -> Ring:
    """In memory that the compute stream has written just before."""
    device = find_device()
    before = [torch.full((SLOT_BYTES,), 7, dtype=torch.uint8, device=device.torch) for _ in range(2)]
    del before
    ring = Ring(Numbers(HostMemory(device)), 2, SLOT_BYTES, device)
    ring.set_schedule(range(4))
    return ring


def a_new_ring() -> None:
    ring = new_ring()
    assert ring.acquire(0)[1].amax() == 0
    ring.release(0)
    ring.close()


def a_ring_that_is_closed() -> None:
    ring = new_ring()
    ring.acquire(0)
    ring.release(0)
    ring.close()
    del ring


def buffers_of_other_sizes() -> None:
    device = find_device()
    host = HostMemory(device)
    offload = HostOffloader(device, host)
    for num_elements in (1000, 5000, 20_000):
        back = offload.offload(torch.ones(num_elements, device=device.torch)).take()
        assert back.numel() == num_elements
    offload.synchronize()


def out_of_memory_while_activations_leave() -> None:
    """In the third layer's forward pass, the second's activations are on their way."""
    folder = write_checkpoint(Path(tempfile.mkdtemp()), num_hidden_layers=3)
    device = find_device()
    plan = everything_resident(3, activation=ActivationPolicy.OFFLOAD)
    decoder = load_base(folder, NF4, torch.float32, device, plan=plan)
    lora = LoraParameters(
        decoder.linears,
        rank=4,
        scaling=1.0,
        dropout=0.0,
        seed=0,
        dtype=torch.float32,
        device=device.torch,
    )
    walk = LayerWalk(decoder, lora, plan, reference=False)
    tokens = packed_row([20, 12]).moved(lambda tensor: tensor.to(device.torch))
    layers, run_layer = [], decoder.run_layer

    def fails_in_the_third(index: int, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        layers.append(index)
        if layers == [0, 1, 2]:
            raise torch.OutOfMemoryError
        return run_layer(index, x, arguments)

    decoder.run_layer = fails_in_the_third  # type: ignore[method-assign]
    try:
        walk.accumulate([tokens], seed=0, step=1, num_supervised=20)
    except torch.OutOfMemoryError:
        walk.abort()
    assert layers == [0, 1, 2]


SCENES: dict[str, Callable[[], None]] = {
    "a new ring": a_new_ring,
    "a ring that is closed": a_ring_that_is_closed,
    "buffers of other sizes": buffers_of_other_sizes,
    "out of memory while activations leave": out_of_memory_while_activations_leave,
}


@pytest.mark.parametrize("name", SCENES)
def test_scenes_are_right_as_they_are(simulated_gpu: SimulatedGpu, name: str) -> None:
    SCENES[name]()
    gc.collect()
    assert not simulated_gpu.hazards


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_wait_that_is_missing_is_found(
    base: Path,
    train_file: Path,
    tmp_path: Path,
    simulated_gpu: SimulatedGpu,
    monkeypatch: pytest.MonkeyPatch,
    mutant: Mutant,
    unharmed: dict[str, bytes],
) -> None:
    simulated_gpu.settings.num_multiprocessors = 2
    if isinstance(mutant.needs, str):
        mutant.apply(monkeypatch)
        SCENES[mutant.needs]()
        gc.collect()
        simulated_gpu.finish()
        assert simulated_gpu.take_hazards()
        return
    if not unharmed:
        unharmed["adapter"] = run(base, train_file, tmp_path / "right", {})
        assert not simulated_gpu.hazards
    mutant.apply(monkeypatch)
    found = run(base, train_file, tmp_path / "run", mutant.needs)
    gc.collect()
    simulated_gpu.finish()
    assert simulated_gpu.take_hazards() or found != unharmed["adapter"]
