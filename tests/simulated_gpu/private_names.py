"""Every private name of torch that the simulated GPU is built on, in one place.

None of them is promised to stay. If one is gone, importing this module says which, and for which release of
torch: that is the place to mend, rather than a strange failure in the middle of a test.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.backend_registration
import torch.utils.dlpack

NAMES = {
    "set_up_backend": "torch.utils.backend_registration._setup_privateuseone_for_python_backend",
    "Hooks": "torch._C._acc.PrivateUse1Hooks",
    "storage_at": "torch._C._construct_storage_from_data_pointer",
    "make_storage": "torch.UntypedStorage.__new__",
    "DispatchKey": "torch._C.DispatchKey",
    "has_kernel": "torch._C._dispatch_has_kernel_for_dispatch_key",
    "operator_names": "torch._C._dispatch_get_all_op_names",
    "all_schemas": "torch._C._jit_get_all_schemas",
    "device_index": "torch._utils._get_device_index",
    "no_modes": "torch.utils._python_dispatch._disable_current_modes",
    "call_with_key": "torch.ops.aten.as_strided.default._op_dk",
    "fused_choice": "torch._fused_sdp_choice",
    "cpu_flash": "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default",
    "cpu_flash_backward": "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    "attention_math": "torch.ops.aten._scaled_dot_product_attention_math.default",
    "flash_forward": "torch.ops.aten._flash_attention_forward.default",
    "flash_backward": "torch.ops.aten._flash_attention_backward.default",
}
"""Our name: torch's."""

OPERATORS = (
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::_copy_from",
    "aten::_copy_from_and_resize",
    "aten::_local_scalar_dense",
    "aten::resize_",
    "aten::as_strided",
    "aten::view",
    "aten::_reshape_alias",
    "aten::unfold",
    "aten::set_",
    "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset",
    "aten::scaled_dot_product_attention",
)
"""Operators that get a kernel of their own here, as the dispatcher calls them."""


def _look_up(path: str) -> Any:
    found: Any = torch
    for name in path.split(".")[1:]:
        found = getattr(found, name)
    return found


def find(names: dict[str, str], operators: tuple[str, ...]) -> dict[str, Any]:
    """The objects that `names` stand for. Raises an ImportError that lists what this torch lacks."""
    found, missing = {}, []
    for ours, path in names.items():
        try:
            found[ours] = _look_up(path)
        except (AttributeError, RuntimeError):
            missing.append(path)
    if "operator_names" in found:
        known = set(found["operator_names"]())
        missing += [name for name in operators if name not in known]
    if missing:
        raise ImportError(
            f"the simulated GPU (tests/simulated_gpu) cannot work with torch {torch.__version__}, which has "
            f"no {', no '.join(missing)}; adapt private_names.py there, and what uses these names"
        )
    return found


_found = find(NAMES, OPERATORS)
set_up_backend = _found["set_up_backend"]
Hooks: Any = _found["Hooks"]
storage_at = _found["storage_at"]
make_storage = _found["make_storage"]
DispatchKey = _found["DispatchKey"]
has_kernel = _found["has_kernel"]
operator_names = _found["operator_names"]
device_index = _found["device_index"]
no_modes = _found["no_modes"]
fused_choice = _found["fused_choice"]
cpu_flash = _found["cpu_flash"]
cpu_flash_backward = _found["cpu_flash_backward"]
attention_math = _found["attention_math"]
flash_forward = _found["flash_forward"]
flash_backward = _found["flash_backward"]


def operators_of(namespace: str) -> list[Any]:
    """Every overload of a library's operators."""
    names = sorted({s.name for s in _found["all_schemas"]() if s.name.startswith(f"{namespace}::")})
    packets = [getattr(getattr(torch.ops, namespace), name.split("::")[1]) for name in names]
    return [getattr(packet, overload) for packet in packets for overload in packet.overloads()]


def operator(name: str) -> Any:
    """An overload by the dispatcher's name: "aten::add.out"."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


def schema(op: Any) -> Any:
    """An overload's declaration: arguments, returns, what is written."""
    return op._schema


def packet_of(op: Any) -> Any:
    """All overloads of an operator as one function, which picks by the arguments' types."""
    return op.overloadpacket


def call_cpu_kernel(op: Any, *arguments: Any, **keywords: Any) -> Any:
    """An overload's CPU kernel, whatever device the tensors are on: right for kernels of sizes and strides
    alone, which touch no element."""
    return op._op_dk(DispatchKey.CPU, *arguments, **keywords)
