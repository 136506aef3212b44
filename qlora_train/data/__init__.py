"""Rows -> messages -> tokens with a supervised mask -> packed bins, read in a resumable order.

The story in files: `sources` finds and opens files and hub ids as `tables` of rows; `formats` says what a
row's columns mean; `chat` tells what an assistant must say behind which prompt; `control_text` keeps quoted
special tokens text; `encoding` keeps prompt and answer apart; `chat_tokens` and `tokenization` make
documents; `packing` fills bins with them; `dataset` hands out micro-batches; `report` counts what happened;
`preview` shows it. Numpy only, no torch.
"""

from __future__ import annotations

from qlora_train.data.dataset import MicroBatch, PackedDataset, build_dataset
from qlora_train.data.preview import preview
from qlora_train.data.prompts import encode_prompt
from qlora_train.data.report import DatasetReport
from qlora_train.data.tokenization import Document
from qlora_train.data.tokenizer import load_tokenizer

__all__ = [
    "DatasetReport",
    "Document",
    "MicroBatch",
    "PackedDataset",
    "build_dataset",
    "encode_prompt",
    "load_tokenizer",
    "preview",
]
