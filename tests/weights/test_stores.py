"""Where streamed bytes wait: files, buffers, rows and tiles; what is left when a pass breaks off."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import NF4, resident_plan, write_checkpoint
from torch import Tensor

from qlora_train.device.compute import THE_CPU as CPU
from qlora_train.errors import QloraTrainError, UserError
from qlora_train.model.layer_buffer import LayerBufferLayout
from qlora_train.model.vocab_matrix import ResidentMatrix, TokenIds, tile_starts, tiles, whole
from qlora_train.quant.formats import Quantization
from qlora_train.weights import quantized_cache
from qlora_train.weights.execution_plan import ActivationPolicy, Placement
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.load import load_base
from qlora_train.weights.ring import Ring
from qlora_train.weights.stores import FilePart, HostRows, ItemReader, tile_items
from qlora_train.weights.streaming import StreamedMatrix, StreamedWeights
from qlora_train.weights.uploads import Uploads

FILE_BYTES = 10_007
BYTES = torch.randint(0, 256, (FILE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
BEFORE = 13  # bytes before a matrix in its file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "bytes.bin"
    path.write_bytes(BYTES.numpy().tobytes())
    return path


def new_reader() -> ItemReader:
    return ItemReader(CPU, HostMemory(CPU))


def new_uploads() -> Uploads:
    return Uploads(CPU, HostMemory(CPU))


@pytest.mark.parametrize(
    ("offset", "size"), [(0, FILE_BYTES), (0, 1), (1, 1), (63, 65), (4097, 5003), (FILE_BYTES - 1, 1)]
)
def test_a_part_of_a_file(file: Path, offset: int, size: int) -> None:
    reader = new_reader()
    reader.items[3] = FilePart(file, offset, size)
    slot = torch.full((FILE_BYTES + 5,), 0xFF, dtype=torch.uint8)
    for turn in (1, 2):  # the file stays open
        reader.read(3, slot)
        assert torch.equal(slot[:size], BYTES[offset : offset + size])
        assert bool((slot[size:] == 0xFF).all())
        assert reader.num_bytes_read == turn * size
    reader.close()


def test_items_of_ram_and_of_several_files(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.bin"
    other.write_bytes(bytes(range(7)))
    reader = new_reader()
    assert reader.largest_bytes == 0
    reader.items |= {0: BYTES[5:105], 1: FilePart(file, 7, 33), 2: FilePart(other, 2, 4)}
    assert reader.largest_bytes == 100
    slot = torch.zeros(100, dtype=torch.uint8)
    for item, expected in ((2, [2, 3, 4, 5]), (1, BYTES[7:40].tolist()), (0, BYTES[5:105].tolist())):
        reader.read(item, slot)
        assert slot[: len(expected)].tolist() == expected
    assert reader.num_bytes_read == 4 + 33 + 100
    reader.close()


@pytest.mark.parametrize("offset", [1, FILE_BYTES - 3, FILE_BYTES, FILE_BYTES + 10])
def test_a_file_that_became_shorter(file: Path, offset: int) -> None:
    reader = new_reader()
    reader.items[0] = FilePart(file, offset, FILE_BYTES)
    with pytest.raises(QloraTrainError, match=r"bytes\.bin: became shorter") as caught:
        reader.read(0, torch.zeros(FILE_BYTES, dtype=torch.uint8))
    assert not isinstance(caught.value, UserError)
    assert reader.num_bytes_read == 0


def test_a_file_that_is_cut_while_it_is_open(file: Path) -> None:
    reader = new_reader()
    reader.items[0] = FilePart(file, 0, FILE_BYTES)
    slot = torch.zeros(FILE_BYTES, dtype=torch.uint8)
    reader.read(0, slot)
    with file.open("r+b") as cut:
        cut.truncate(FILE_BYTES // 2)
    with pytest.raises(QloraTrainError, match="became shorter"):
        reader.read(0, slot)
    reader.close()


def matrix_in(place: str, matrix: Tensor, folder: Path) -> Tensor | FilePart:
    """The bytes of a matrix in RAM, or somewhere inside a file."""
    flat = matrix.reshape(-1).view(torch.uint8)
    if place == "ram":
        return flat
    path = folder / "matrix.bin"
    path.write_bytes(bytes(BEFORE) + flat.numpy().tobytes() + b"behind")
    return FilePart(path, BEFORE, len(flat))


MATRICES = [
    ((1, 1), torch.float32),
    ((23, 7), torch.bfloat16),
    ((40, 5), torch.float16),
    ((9, 3), torch.float32),
]
IDS = [[0], [0, 0, 0], [8, 3, 3, 0, 8, 5, 3], list(range(9)), list(range(8, -1, -1)), []]


def random_matrix(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("place", ["ram", "file"])
@pytest.mark.parametrize(("shape", "dtype"), MATRICES, ids=str)
@pytest.mark.parametrize("ids", IDS, ids=str)
def test_rows_are_gathered_as_by_indexing(
    tmp_path: Path, place: str, shape: tuple[int, int], dtype: torch.dtype, ids: list[int]
) -> None:
    matrix = random_matrix(shape, dtype)
    row_bytes = shape[1] * dtype.itemsize
    rows = HostRows(matrix_in(place, matrix, tmp_path), row_bytes)
    wanted = np.array(ids, dtype=np.int64) % shape[0]
    for _ in range(2):
        found = gathered(rows, wanted)
        assert torch.equal(found, matrix.view(torch.uint8)[torch.from_numpy(wanted)])


def gathered(rows: HostRows, ids: np.ndarray) -> Tensor:
    found = torch.full((len(ids), rows.row_bytes), 0xFF, dtype=torch.uint8)
    rows.gather(ids, found)
    return found


def test_rows_of_a_file_that_became_shorter(tmp_path: Path) -> None:
    part = matrix_in("file", random_matrix((9, 3), torch.float32), tmp_path)
    assert isinstance(part, FilePart)
    rows = HostRows(part, 12)
    with part.path.open("r+b") as cut:
        cut.truncate(BEFORE + 5 * 12 + 3)
    assert gathered(rows, np.array([4, 0])).shape == (2, 12)
    with pytest.raises(QloraTrainError, match="became shorter"):
        gathered(rows, np.array([0, 5]))


@pytest.mark.parametrize("place", ["ram", "file"])
@pytest.mark.parametrize("tile_rows", [1, 4, 22, 23, 24, 1000])
def test_tiles_cover_the_matrix_once(tmp_path: Path, place: str, tile_rows: int) -> None:
    matrix = random_matrix((23, 7), torch.bfloat16)
    items = tile_items(matrix_in(place, matrix, tmp_path), 14, tile_rows, first_item=6)
    assert list(items) == list(range(6, 6 - (-23 // tile_rows)))
    reader = new_reader()
    reader.items |= items
    assert reader.largest_bytes == min(tile_rows, 23) * 14
    found = []
    for item in items:
        before = reader.num_bytes_read
        slot = torch.full((reader.largest_bytes,), 0xFF, dtype=torch.uint8)
        reader.read(item, slot)
        found.append(slot[: reader.num_bytes_read - before])
    assert {len(part) for part in found[:-1]} <= {tile_rows * 14}
    assert torch.equal(torch.cat(found), matrix.view(torch.uint8).reshape(-1))
    reader.close()


@pytest.mark.parametrize("place", ["ram", "file"])
@pytest.mark.parametrize("tile_rows", [1, 5, 23, 64])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_streamed_matrix_is_the_resident_one(
    tmp_path: Path, place: str, tile_rows: int, num_slots: int
) -> None:
    matrix = random_matrix((23, 7), torch.bfloat16)
    source = matrix_in(place, matrix, tmp_path)
    reader = new_reader()
    reader.items |= tile_items(source, 14, tile_rows, first_item=2)
    ring = Ring(reader, num_slots, reader.largest_bytes, CPU, poison=True)
    streamed = StreamedMatrix(
        (23, 7),
        torch.bfloat16,
        new_uploads(),
        HostRows(source, 14),
        ring,
        sorted(reader.items),
        tile_rows,
    )
    resident = ResidentMatrix(matrix, tile_rows)
    assert tile_starts(streamed) == tile_starts(resident)
    assert len(streamed.items) == len(tile_starts(streamed)) and resident.items == ()
    ring.set_schedule(streamed.items * 2)
    for (start, rows), (expected_start, expected) in zip(tiles(streamed), tiles(resident), strict=True):
        assert start == expected_start and torch.equal(rows, expected)
    assert torch.equal(whole(streamed), matrix)
    ids = TokenIds.of(np.array([22, 0, 22, 7]), "cpu")
    assert torch.equal(streamed.gather(ids), resident.gather(ids))
    ring.close()
    reader.close()


def test_a_tile_whose_use_fails_gives_its_slot_back() -> None:
    matrix = random_matrix((23, 7), torch.float32)
    source = matrix.view(torch.uint8).reshape(-1)
    reader = new_reader()
    reader.items |= tile_items(source, 28, 10, first_item=0)
    ring = Ring(reader, 2, reader.largest_bytes, CPU, poison=True)
    rows = HostRows(source, 28)
    streamed = StreamedMatrix((23, 7), torch.float32, new_uploads(), rows, ring, range(3), 10)
    ring.set_schedule(streamed.items)
    with pytest.raises(MemoryError), streamed.tile(0):
        raise MemoryError
    ring.set_schedule(streamed.items)
    assert torch.equal(whole(streamed), matrix)
    ring.close()


class OutOfMemory(RuntimeError):
    pass


class FaultyItems(ItemReader):
    """The items of RAM; reads of `broken` fail."""

    broken: int | None = None

    def read(self, item: int, slot: Tensor) -> None:
        if item == self.broken:
            raise OSError
        super().read(item, slot)


@pytest.fixture
def streamed() -> Iterator[StreamedWeights]:
    """Five layers of one dequantized weight each, whose numbers are the layer's index."""
    layout = LayerBufferLayout.of({"proj": (3, 5)}, Quantization("none"), torch.float32)
    reader = FaultyItems(CPU, HostMemory(CPU))
    for layer in range(5):
        reader.items[layer] = torch.empty(layout.num_bytes, dtype=torch.uint8)
        layout.weights(reader.items[layer])["proj"].tensors["data"].fill_(layer)
    ring = Ring(reader, 2, reader.largest_bytes, CPU, poison=True)
    weights = StreamedWeights([f"layers.{i}" for i in range(5)], [layout] * 5, ring, reader, "parts")
    yield weights
    weights.close()


def zigzag_passes(weights: StreamedWeights, stop_at: int | None = None) -> None:
    """Forward and back; in the second visit of `stop_at`, no memory is left."""
    weights.set_schedule((*range(5), *reversed(range(5))))
    for turn, layer in enumerate((*range(5), *reversed(range(5)))):
        with weights.layer_on_device(layer):
            weight = weights.dequantize(f"layers.{layer}.proj", torch.float32)
            if layer == stop_at and turn >= 5:
                raise OutOfMemory
            assert torch.equal(weight, torch.full((3, 5), float(layer)))
        assert not weights.quantized


@pytest.mark.parametrize("stop_at", range(5))
def test_a_pass_that_breaks_off_inside_a_visit(streamed: StreamedWeights, stop_at: int) -> None:
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            zigzag_passes(streamed, stop_at)
        assert not streamed.quantized
        with pytest.raises(KeyError):
            streamed.dequantize(f"layers.{stop_at}.proj", torch.float32)
        zigzag_passes(streamed)


@pytest.mark.parametrize("broken", range(5))
def test_a_pass_that_breaks_off_on_entering_a_visit(streamed: StreamedWeights, broken: int) -> None:
    reader = streamed.reader
    assert isinstance(reader, FaultyItems)
    reader.broken = broken
    with pytest.raises(OSError):
        zigzag_passes(streamed)
    assert not streamed.quantized
    reader.broken = None
    zigzag_passes(streamed)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("original"), num_hidden_layers=2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


STREAMED = resident_plan(
    ActivationPolicy.RECOMPUTE,
    ActivationPolicy.RECOMPUTE,
    weights=(Placement.DISK,) * 2,
    head=Placement.DISK,
    num_slots=2,
)
DEVICE = resident_plan(ActivationPolicy.KEEP, ActivationPolicy.KEEP)


def test_a_resident_model_is_the_same_with_and_without_a_cache(
    original: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = load_base(original, NF4, torch.float32, CPU)
    load_base(original, NF4, torch.float32, CPU, cache=root)
    monkeypatch.setattr(quantized_cache, "_write", None)  # nothing is quantized again
    again = load_base(original, NF4, torch.float32, CPU, cache=root)
    assert fresh.weights.quantized.keys() == again.weights.quantized.keys()
    for name, weight in fresh.weights.quantized.items():
        for key, tensor in weight.tensors.items():
            assert torch.equal(tensor, again.weights.quantized[name].tensors[key]), (name, key)
    assert torch.equal(fresh.embedding.weight, again.embedding.weight)
    assert torch.equal(fresh.head.weight, again.head.weight)
    assert torch.equal(fresh.norm.weight, again.norm.weight)


def ring_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("qlora_train-ring")]


def open_files_below(root: Path) -> list[str]:
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(link))
        except FileNotFoundError:  # the one that listed the folder
            continue
    return [target for target in links if target.startswith(str(root))]


def test_without_a_cache_nothing_stays_behind(
    original: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(root))
    gc.collect()  # the rings of other tests
    threads_before = len(ring_threads())
    load_base(original, NF4, torch.float32, CPU, plan=DEVICE)
    assert not root.exists()  # what does not stream touches no disk
    decoder = load_base(original, NF4, torch.float32, CPU, plan=STREAMED)
    (folder,) = root.iterdir()
    assert folder.name.startswith("temporary.partial-")
    for layer in decoder.layers_in_turn():
        assert decoder.weights.quantized.keys() >= {f"model.layers.{layer}.mlp.up_proj"}
    assert open_files_below(root)
    del decoder
    gc.collect()
    assert list(root.iterdir()) == []
    assert open_files_below(root) == []  # an open file would keep its room on the disk
    for thread in ring_threads()[threads_before:]:
        thread.join(30)
    assert len(ring_threads()) == threads_before


def test_without_a_cache_a_failed_load_leaves_nothing_either(
    original: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_TRAIN_CACHE", str(root))
    full = shutil.disk_usage(original)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match="the disk has"):
        load_base(original, NF4, torch.float32, CPU, plan=STREAMED)
    gc.collect()
    assert list(root.iterdir()) == []
