"""Answers the prompts of `training.samples` while a run goes on: before, during and after training.

Answers are greedy, one prompt at a time, within the bytes of the phase "generate" that every plan has: so
samples change neither the plan nor, as nothing is drawn and no gradient is kept, a bit of the training.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qlora_train.data.prompts import encode_messages, encode_prompt, stop_token_ids
from qlora_train.data.tokenizer import read_stop_ids
from qlora_train.errors import DataError, UnsupportedModelError
from qlora_train.generate.decoding import generate_tokens
from qlora_train.generate.sampling import Sampling
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.rope_lengths import batches_by_table
from qlora_train.plan.planned_walk import generate_size_in_training
from qlora_train.recipe import DataSection, Samples


class SampleAnswers:
    """The prompts of a run, encoded as training writes prompts, and their answers."""

    def __init__(
        self,
        samples: Samples,
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        base_folder: str,
    ) -> None:
        """data: with its format resolved. config: of the base. Raises `DataError` for a prompt that cannot be
        written in that format or is too long, `UnsupportedModelError` for one that the model cannot
        continue that far (model/rope_lengths.py)."""
        self._samples, self._tokenizer = samples, tokenizer
        self._stop_ids = frozenset(stop_token_ids(tokenizer, read_stop_ids(base_folder), data))
        self._encoded = []
        (most,) = generate_size_in_training(data.sequence_length).prompts
        for number, prompt in enumerate(samples.prompts):
            where = f"training.samples.prompts[{number}]"
            try:
                encode = encode_prompt if isinstance(prompt, str) else encode_messages
                tokens = encode(prompt, data, tokenizer)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            if len(tokens) > most:
                raise DataError(
                    f"{where}: has {len(tokens)} tokens; the memory plan has room for {most}. Shorten it."
                )
            self._encoded.append(tokens)
        try:
            batches_by_table(config, list(map(len, self._encoded)), samples.max_new_tokens)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"training.samples: {error}") from error

    def rows(self, decoder: FrozenDecoder, step: int) -> list[dict[str, Any]]:
        """A row of samples.jsonl for each prompt, answered by the model after this step."""
        sampling = Sampling(self._samples.max_new_tokens)
        rows = []
        for prompt, tokens in zip(self._samples.prompts, self._encoded, strict=True):
            (answer,) = generate_tokens(decoder, [tokens], sampling, self._stop_ids)
            text = str(self._tokenizer.decode(answer, skip_special_tokens=True))
            rows.append({"step": step, "prompt": prompt, "answer": text})
        return rows
