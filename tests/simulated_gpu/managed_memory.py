"""Managed memory, which host and device both address: bitsandbytes' paged optimizers keep their states there.

Under Windows and WSL the driver has no concurrent managed access: from any launch until the host has waited
for all of the device's work, the host's touch of any managed memory ends the program. There it is a
segmentation fault; so it is here. The pages are protected while work is pending, and the handler of the fault
notes down who touched them, opens them and lets the program go on. Only reads and writes of the process
itself are seen: one by the kernel (`write(2)` of such a page) fails with EFAULT instead.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from simulated_gpu import places
from simulated_gpu.simulation import running

_NOTHING = 0
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_SA_SIGINFO = 4
_ADDRESS_IN_SIGINFO = 16
"""Offset of si_addr in Linux' siginfo_t, on all 64-bit machines."""
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _SigAction(ctypes.Structure):
    """glibc's struct sigaction."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class ManagedMemory:
    """Blocks of one simulation. They are never freed, as bitsandbytes frees none."""

    def __init__(self) -> None:
        self.num_prefetches = 0
        self._blocks: list[tuple[int, int]] = []
        """(address, bytes in whole pages)."""
        self._is_closed = False
        self._handler = _HANDLER(_on_fault)
        self._outer: _SigAction | None = None

    def allocate(self, num_bytes: int) -> int:
        """Address of fresh pages."""
        self.open()
        pages = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _ALL_PAGES.append(pages)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self._blocks.append((address, -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE))
        return address

    def holds(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self._blocks)

    def follow_device(self) -> None:
        """After every launch and every wait: where the host may not touch managed memory while the device
        works, it cannot."""
        if not self._blocks:
            return
        simulation = running()
        if simulation.settings.concurrent_managed_access or simulation.hazards.device_is_idle:
            self.open()
        else:
            self._close()

    @contextmanager
    def used_by_device(self) -> Iterator[None]:
        """While a kernel runs, which may touch them."""
        was_closed = self._is_closed
        self.open()
        try:
            yield
        finally:
            if was_closed:
                self._close()

    def open(self) -> None:
        """The host may touch them: the device is idle."""
        if self._is_closed:
            self._is_closed = False
            self._protect(_READ_WRITE)

    def end(self) -> None:
        self.open()
        if self._outer is not None:
            _libc.sigaction(signal.SIGSEGV, ctypes.byref(self._outer), None)
            self._outer = None

    def give_up_signal(self) -> None:
        """The fault was somebody else's: whoever handled it before does so again."""
        assert self._outer is not None
        _libc.sigaction(signal.SIGSEGV, ctypes.byref(self._outer), None)

    def _close(self) -> None:
        if not self._is_closed:
            if self._outer is None:
                self._listen()
            self._is_closed = True
            self._protect(_NOTHING)

    def _listen(self) -> None:
        if sys.platform != "linux":
            raise NotImplementedError("managed memory is guarded on Linux alone")
        action, self._outer = _SigAction(), _SigAction()
        action.handler = ctypes.cast(self._handler, ctypes.c_void_p)
        action.flags = _SA_SIGINFO
        _libc.sigaction(signal.SIGSEGV, ctypes.byref(action), ctypes.byref(self._outer))

    def _protect(self, protection: int) -> None:
        for address, size in self._blocks:
            if _libc.mprotect(address, size, protection) != 0:
                raise OSError(ctypes.get_errno(), "mprotect of managed memory")


_ALL_PAGES: list[mmap.mmap] = []


def _on_fault(number: int, information: int, context: int) -> None:
    """In the thread that touched the page, which goes on where it was."""
    address = ctypes.c_uint64.from_address(information + _ADDRESS_IN_SIGINFO).value
    simulation = running()
    if not simulation.managed.holds(address):
        simulation.managed.give_up_signal()
        return
    simulation.managed.open()
    simulation.hazards.report(
        "the host touched managed memory while the device was working, which ends the program where there is "
        f"no concurrent managed access ({places.words(places.caller())})"
    )
