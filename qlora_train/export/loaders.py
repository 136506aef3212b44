"""Loads the written folder with other libraries, as its users will, and runs it for the receipt.

`transformers` loads it in the dtype it was written in; `bnb-4bit` has bitsandbytes quantize it to NF4 with
double quantization. The whole model is in memory here, so these are measured only on request. The input of
the head is recorded, so that logits are compared tile by tile as everywhere (receipt.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from qlora_train.device.compute import ComputeDevice
from qlora_train.errors import ExportError
from qlora_train.export import LOADERS
from qlora_train.export.walked_model import HeldOut, WalkedModel
from qlora_train.model.decoder import FrozenDecoder


@torch.no_grad()
def load_and_run(
    loader: str, folder: Path, documents: HeldOut, decoder: FrozenDecoder, device: ComputeDevice
) -> WalkedModel:
    """Load the folder and run it on the documents. decoder: of the same model family, which computes logits
    from hidden states. Raises `ExportError` where it does not load or run."""
    options: dict[str, Any] = {"dtype": "auto"}
    if loader == "bnb-4bit":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if device.is_accelerator else torch.float32,
        )
    elif not device.is_accelerator:
        options["dtype"] = torch.float32  # weights are the same; 16-bit products are slow on a CPU
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": str(device.torch)}, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ExportError(f"{LOADERS[loader]}: the written folder does not load ({error}).") from error
    try:
        hidden, head = _run(model, documents, device)
    except (RuntimeError, ValueError, AssertionError) as error:  # of the loader's own kernels
        raise ExportError(
            f"{LOADERS[loader]}: the written folder loads, but does not run ({error})."
        ) from error
    return WalkedModel(decoder, hidden, lambda: _rows(head))


def _run(model: PreTrainedModel, documents: HeldOut, device: ComputeDevice) -> tuple[Tensor, nn.Module]:
    """(inputs of the head at the documents' places [S, D] in fp32, the head)."""
    head = model.get_output_embeddings()
    taken: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, given: taken.append(given[0]))
    hidden = []
    for ids, places in zip(documents.token_ids, documents.places, strict=True):
        model(input_ids=torch.from_numpy(ids)[None].to(device.torch), use_cache=False)
        hidden.append(taken.pop()[0, torch.from_numpy(places).to(device.torch)])
    handle.remove()
    return torch.cat(hidden).float(), head


def _rows(head: nn.Module) -> Iterator[Tensor]:
    """The head's weight [V, D] in fp32."""
    weight = head.weight
    assert isinstance(weight, Tensor) and weight.is_floating_point()  # both loaders leave the head in 16 bits
    yield weight.float()
