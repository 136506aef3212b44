"""What is asked of NVIDIA's driver, with stand-ins for its library and its tool."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_train.device import description, driver, settings

MIB = 2**20
ABLE = {102: 1, 103: 1}
"""Attributes of a card whose memory can be mapped."""
SUCCESS, INVALID_DEVICE, NOT_INITIALIZED = 0, 101, 3


class Library:
    """libcuda's functions, by its header: results through pointers, a CUresult, nothing before cuInit."""

    def __init__(self, cards: list[dict[int, int]], *, active: frozenset[int] = frozenset()) -> None:
        """cards: each one's attributes. active: cards on which this process has a context."""
        self.cards, self.active, self.is_initialized = cards, active, False

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        self.is_initialized = True
        return SUCCESS if self.cards else 100  # CUDA_ERROR_NO_DEVICE

    def cuDriverGetVersion(self, version: object) -> int:
        return self._answer(version, 12080)

    def cuDeviceGetCount(self, count: object) -> int:
        return self._answer(count, len(self.cards))

    def cuDeviceGet(self, device: object, ordinal: int) -> int:
        return self._answer(device, 10 + ordinal) if ordinal < len(self.cards) else INVALID_DEVICE

    def cuDeviceGetAttribute(self, value: object, attribute: int, device: ctypes.c_int) -> int:
        if not 10 <= device.value < 10 + len(self.cards):
            return INVALID_DEVICE
        return self._answer(value, self.cards[device.value - 10].get(attribute, 0))

    def cuDeviceGetUuid(self, uuid: object, device: ctypes.c_int) -> int:
        array = uuid._obj  # type: ignore[attr-defined]
        array[:] = [0] * 15 + [device.value]
        return SUCCESS if self.is_initialized else NOT_INITIALIZED

    def cuDevicePrimaryCtxGetState(self, device: ctypes.c_int, flags: object, is_active: object) -> int:
        self._answer(flags, 0)
        return self._answer(is_active, int(device.value - 10 in self.active))

    def _answer(self, pointer: object, value: int) -> int:
        if not self.is_initialized:
            return NOT_INITIALIZED
        pointer._obj.value = value  # type: ignore[attr-defined]
        return SUCCESS


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Puts a library in libcuda's place; None: there is none."""

    def put(library: Library | None) -> None:
        def open_library(name: str) -> Library:
            if library is None:
                raise OSError(f"{name}: cannot open shared object file")
            return library

        monkeypatch.setattr(ctypes, "CDLL", open_library)
        driver._driver.cache_clear()

    yield put
    driver._driver.cache_clear()


@pytest.mark.parametrize("library", [None, Library([])], ids=["no driver", "no card"])
def test_without_a_card_nothing_is_known(load, library: Library | None) -> None:
    load(library)
    assert (
        driver.num_cards() == 0
        and driver.first_uuid() is None
        and not driver.has_context()
        and driver.cuda_version() is None
    )
    assert driver.attribute(0, driver.CONCURRENT_MANAGED_ACCESS) is None
    assert not settings.segments_expand()


def test_attributes_are_those_of_the_card(load) -> None:
    load(Library([{89: 1, 102: 1, 103: 1}, {102: 0}]))
    assert driver.cuda_version() == (12, 8)
    assert driver.num_cards() == 2
    assert driver.first_uuid() == "00000000-0000-0000-0000-00000000000a"
    assert [driver.attribute(i, driver.CONCURRENT_MANAGED_ACCESS) for i in range(3)] == [1, 0, None]
    assert [driver.attribute(i, driver.VIRTUAL_MEMORY_MANAGEMENT) for i in range(3)] == [1, 0, None]
    assert [driver.attribute(i, driver.MEMORY_BY_FILE_DESCRIPTOR) for i in range(3)] == [1, 0, None]


@pytest.mark.parametrize("active", [frozenset(), {0}, {1}])
def test_a_context_on_any_card(load, active: frozenset[int]) -> None:
    load(Library([{}, {}], active=frozenset(active)))
    assert driver.has_context() == bool(active)


@pytest.mark.parametrize(
    ("answer", "code", "expected"),
    [
        ("GPU-aa-1, 1034\nGPU-bb-2, 3", 0, {"aa-1": 1034 * MIB, "bb-2": 3 * MIB}),
        ("GPU-aa-1, [N/A]\nGPU-bb-2, 3", 0, {"bb-2": 3 * MIB}),
        ("GPU-aa-1, 1034", 9, {}),
        ("No devices were found", 0, {}),
        ("", 0, {}),
    ],
)
def test_bytes_in_use(
    answer: str, code: int, expected: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tool(tmp_path, f"echo '{answer}'; exit {code}", monkeypatch)
    assert driver.memory_in_use() == expected


def test_a_tool_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_SMI_SECONDS", 0.1)
    put_tool(tmp_path, "exec sleep 30", monkeypatch)
    assert driver.memory_in_use() == {}


def put_tool(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


@pytest.mark.parametrize(
    ("system", "variables", "may"),
    [
        ("linux", {}, True),
        ("win32", {}, False),
        ("linux", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, False),
        ("linux", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128,expandable_segments:True"}, True),
        ("linux", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False),
        (
            "linux",
            {
                "PYTORCH_ALLOC_CONF": "expandable_segments:False",
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            },
            False,
        ),
    ],
)
def test_segments_expand_where_system_environment_and_every_card_allow_it(
    load, monkeypatch: pytest.MonkeyPatch, system: str, variables: dict[str, str], may: bool
) -> None:
    for name in description.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    load(Library([ABLE, ABLE]))
    driver.num_cards()  # loaded under this system's name
    monkeypatch.setattr(description.sys, "platform", system)
    assert settings.segments_expand() == may
    assert description.planned_gpu(None, None).has_expandable_segments == may
    monkeypatch.setattr(description.sys, "platform", "linux")
    for unable in ({}, {102: 1}, {103: 1}):
        load(Library([ABLE, unable]))
        assert not settings.segments_expand()


@pytest.mark.parametrize(("said", "may"), [(None, False), ("expandable_segments:True", True)])
def test_under_wsl_segments_expand_only_where_the_user_asks(
    load, monkeypatch: pytest.MonkeyPatch, said: str | None, may: bool
) -> None:
    for name in description.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if said is not None:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", said)
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    load(Library([ABLE]))
    assert settings.segments_expand() == may
    assert description.planned_gpu(None, None).has_expandable_segments == may


@pytest.mark.parametrize("configured", [None, "expandable_segments:False", "expandable_segments:True"])
def test_the_allocator_is_told_once_nobody_else_has(
    load, monkeypatch: pytest.MonkeyPatch, configured: str | None
) -> None:
    told: list[str] = []
    monkeypatch.setattr(settings, "_set_allocator", told.append)
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    if configured is not None:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", configured)
    load(Library([ABLE]))
    settings.apply_settings()
    assert told == ([] if configured else ["expandable_segments:True"])
