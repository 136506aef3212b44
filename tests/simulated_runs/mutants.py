"""Waits of the product, each taken out in turn: what the simulated GPU must find.

A mutant is a method whose source has one line replaced. It is compiled in its module, so that nothing is
written to disk and the tests stay in one process.
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import pytest

from qlora_train.walk import host_offload
from qlora_train.walk.layer_walk import LayerWalk
from qlora_train.weights import ring, stores, uploads
from qlora_train.weights.host_memory import HostMemory


@dataclass(frozen=True)
class Mutant:
    """owner.method with `line` replaced by `instead`. needs: what comes to need the wait: a run with this
    `memory` section of its recipe, or a scene of test_mutants.py by name."""

    what: str
    owner: type
    method: str
    line: str
    needs: dict[str, Any] | str
    instead: str = "pass"

    def apply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = inspect.getattr_static(self.owner, self.method)
        source = textwrap.dedent(inspect.getsource(original))
        assert source.count(self.line) == 1, f"{self.what}: the line is no longer there"
        scope = dict(inspect.getmodule(self.owner).__dict__)
        exec(compile(source.replace(self.line, self.instead), self.what, "exec"), scope)
        monkeypatch.setattr(self.owner, self.method, scope[self.method])


RAM = {"weights": "ram", "activations": "keep"}
OFFLOAD = {"weights": "resident", "activations": "offload"}
DISK = {"weights": "disk", "activations": "keep"}
DEVICE = {"weights": "resident", "activations": "keep"}
MUTANTS = [
    Mutant(
        "a slot is used without waiting for its copy",
        ring.Ring,
        "acquire",
        "self._device.current_stream().wait_event(copied)",
        RAM,
    ),
    Mutant(
        "a slot is filled without waiting for its last use",
        ring.Ring,
        "_on_side_stream",
        "self._stream.wait_event(used)",
        RAM,
    ),
    Mutant(
        "the first fill does not wait for who had the memory before",
        ring.Ring,
        "__init__",
        "self._stream.wait_stream(device.current_stream())",
        "a new ring",
    ),
    Mutant(
        "the ring's copies are not over when its slots go",
        ring.Ring,
        "close",
        "self._stream.synchronize()",
        "a ring that is closed",
    ),
    Mutant(
        "memory is freed before it is copied out",
        host_offload.HostOffloader,
        "finish_copies",
        "self.device.current_stream().wait_event(self._leaving[0])",
        OFFLOAD,
    ),
    Mutant(
        "what leaves is copied before it is computed",
        host_offload.HostOffloader,
        "offload_all",
        "self.stream.wait_stream(self.device.current_stream())",
        OFFLOAD,
    ),
    Mutant(
        "what returns is copied before its memory is free",
        host_offload.OffloadedTensor,
        "fetch",
        "stream.wait_stream(device.current_stream())",
        OFFLOAD,
    ),
    Mutant(
        "what returns is used before it is there",
        host_offload.OffloadedTensor,
        "take",
        "self._offloader.device.current_stream().wait_event(self._is_back)",
        OFFLOAD,
    ),
    Mutant(
        "a piece of a file is overwritten while it is copied",
        stores._Staging,
        "copy",
        "copied.synchronize()",
        DISK,
    ),
    Mutant(
        "pieces of files go while they are copied",
        stores._Staging,
        "finish",
        "copied.synchronize()",
        DEVICE,
    ),
    Mutant(
        "a batch's buffer is filled again while it is copied",
        uploads.Uploads,
        "_is_free",
        "copied.query()",
        RAM,
        instead="True",
    ),
    Mutant(
        "a spare buffer goes while it is copied",
        HostMemory,
        "borrow",
        "self._device.wait()",
        "buffers of other sizes",
    ),
    Mutant(
        "a walk that ran out of memory is freed while it is copied",
        LayerWalk,
        "abort",
        "self._activations.offloader.synchronize()",
        "out of memory while activations leave",
    ),
]
