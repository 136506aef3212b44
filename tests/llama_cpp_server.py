"""llama.cpp, as its users meet it: a server in this process that loads a GGUF file, asked over HTTP."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xllamacpp
from torch import Tensor


class LlamaCpp:
    """One loaded file. Keys and values are in fp32, so that what differs is the file."""

    def __init__(self, file: Path, context: int = 256) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = context
        params.n_gpu_layers = 0
        params.warmup = params.fit_params = False
        params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def ask(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())

    def token_ids(self, text: str) -> list[int]:
        """As llama.cpp tokenises a prompt: BOS where the file says so, special tokens by their texts."""
        return list(self.ask("tokenize", content=text, add_special=True, parse_special=True)["tokens"])

    def prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """The text that the chat template in the file makes of messages."""
        return str(self.ask("apply-template", messages=messages)["prompt"])

    def log_probabilities(self, token_ids: Sequence[int], num_tokens: int) -> Tensor:
        """Of the token after these, over the whole vocabulary [num_tokens].

        The server tells them only with a token that it shows (no end, no part of a character), so a letter
        is made the sampled one, which does not change them."""
        reply = self.ask(
            "completion",
            prompt=list(token_ids),
            n_predict=1,
            n_probs=num_tokens,
            temperature=0,
            cache_prompt=False,
            logit_bias=[[self.token_ids("a")[-1], 1000]],
        )
        found = torch.full((num_tokens,), -np.inf)
        for entry in reply["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def answer(self, token_ids: Sequence[int], num_tokens: int) -> str:
        """The greedy answer to a prompt."""
        return str(
            self.ask("completion", prompt=list(token_ids), n_predict=num_tokens, temperature=0)["content"]
        )
