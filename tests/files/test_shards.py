"""Reading safetensors files: values, row blocks, and every way a checkpoint folder can be wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_train.errors import BaseModelError
from qlora_train.files import shards
from qlora_train.files.shards import INDEX_FILE, SINGLE_FILE, ShardReader, tensor_bytes, write_header

TENSORS = {
    "a": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "b": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "c": torch.tensor(3.5, dtype=torch.float16),
    "d": torch.tensor([True, False, True]),
    "e": torch.empty(0, 4),
    "f": torch.arange(6, dtype=torch.int8).reshape(2, 3),
}


def write_sharded(folder: Path) -> None:
    save_file({name: TENSORS[name] for name in "ac"}, folder / "one.safetensors")
    save_file({name: TENSORS[name] for name in "bdef"}, folder / "two.safetensors")
    weight_map = {name: "one.safetensors" if name in "ac" else "two.safetensors" for name in TENSORS}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_reads_what_safetensors_wrote(tmp_path: Path, is_sharded: bool, monkeypatch) -> None:
    monkeypatch.setattr(shards, "MAX_READ_BYTES", 7)  # several reads per tensor
    write_sharded(tmp_path) if is_sharded else save_file(TENSORS, tmp_path / SINGLE_FILE)
    with ShardReader(tmp_path) as reader:
        assert sorted(reader.names()) == sorted(TENSORS)
        assert "a" in reader and "z" not in reader
        for name, tensor in TENSORS.items():
            info = reader.info(name)
            assert (info.dtype, info.shape, info.num_bytes) == (
                tensor.dtype,
                tuple(tensor.shape),
                tensor.nbytes,
            )
            assert reader.read(name).dtype == tensor.dtype
            assert torch.equal(reader.read(name), tensor)
        with pytest.raises(BaseModelError, match="no tensor named z"):
            reader.read("z")


def test_row_blocks_cover_a_tensor_in_one_buffer(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_FILE)
    with ShardReader(tmp_path) as reader:
        blocks = [(start, stop, rows.clone()) for start, stop, rows in reader.row_blocks("a", max_bytes=45)]
        assert [(start, stop) for start, stop, _ in blocks] == [(0, 2), (2, 4), (4, 6), (6, 7)]
        assert torch.equal(torch.cat([rows for *_, rows in blocks]), TENSORS["a"])
        assert [stop for _, stop, _ in reader.row_blocks("a", max_bytes=1)] == [1, 2, 3, 4, 5, 6, 7]
        assert len({rows.data_ptr() for _, _, rows in reader.row_blocks("a", max_bytes=45)}) == 1
        assert list(reader.row_blocks("e")) == []
        assert [rows.tolist() for *_, rows in reader.row_blocks("d")] == [[True, False, True]]


def test_written_headers_are_read_by_safetensors(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    with open(path, "wb") as file:
        write_header(file, {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}, {"format": "pt"})
        for tensor in TENSORS.values():
            file.write(tensor_bytes(tensor))
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def write_raw(folder: Path, header: object, num_data_bytes: int) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / SINGLE_FILE).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(num_data_bytes))


def entry(dtype: str = "F32", shape: tuple[int, ...] = (2, 2), offsets: tuple[int, int] = (0, 16)) -> dict:
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    "header,num_data_bytes,message",
    [
        (entry(), 15, "truncated"),
        (entry(dtype="F6_E2M3"), 16, "F6_E2M3"),
        (entry(shape=(3, 2)), 16, "needs 24 bytes"),
        (entry(offsets=(-8, 8)), 16, "damaged"),
        ({"w": {"dtype": "F32"}}, 16, "damaged"),
        ([1, 2], 16, "damaged"),
        (b"{not json", 16, "damaged"),
    ],
)
def test_a_bad_header_is_refused_on_opening(
    tmp_path: Path, header, num_data_bytes: int, message: str
) -> None:
    write_raw(tmp_path, header, num_data_bytes)
    with pytest.raises(BaseModelError, match=message) as caught:
        ShardReader(tmp_path)
    assert str(tmp_path / SINGLE_FILE) in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(BaseModelError, match="not a safetensors file"):
        ShardReader(tmp_path)


def test_a_header_cut_short_is_a_truncated_file(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(struct.pack("<Q", 500) + b"{")
    with pytest.raises(BaseModelError, match="truncated"):
        ShardReader(tmp_path)


def test_a_folder_without_usable_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="no such folder"):
        ShardReader(tmp_path / "nowhere")
    with pytest.raises(BaseModelError, match="no weights"):
        ShardReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BaseModelError, match=r"pickle.*pytorch_model.bin.*save_pretrained"):
        ShardReader(tmp_path)


def test_the_files_decide_not_the_index(tmp_path: Path) -> None:
    """An entry that no shard holds is missed only by who asks for it; what the index leaves out is found."""
    write_sharded(tmp_path)
    with ShardReader(tmp_path) as reader:
        names = reader.names()
    index = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    left_out = names[0]
    changed = {name: shard for name, shard in index.items() if name != left_out} | {"z": "two.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": changed}))
    with ShardReader(tmp_path) as reader:
        assert sorted(reader.names()) == sorted(names)
        with pytest.raises(BaseModelError, match="no tensor named z"):
            reader.read("z")


def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    for changes, message in [
        ({"z": "three.safetensors"}, "three.safetensors, which is missing"),
        ({"z": "../two.safetensors"}, "not a file name"),
    ]:
        changed = {"weight_map": index["weight_map"] | changes}
        (tmp_path / INDEX_FILE).write_text(json.dumps(changed))
        with pytest.raises(BaseModelError, match=message):
            ShardReader(tmp_path)
    for content in ({}, {"weight_map": dict.fromkeys(index["weight_map"])}, {"weight_map": {"z": 5}}):
        (tmp_path / INDEX_FILE).write_text(json.dumps(content))
        with pytest.raises(BaseModelError, match="weight_map"):
            ShardReader(tmp_path)
