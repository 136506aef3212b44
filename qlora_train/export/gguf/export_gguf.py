"""`export --to gguf`: one GGUF file, a Modelfile for Ollama, a model card, a receipt.

Everything that can be refused by name is refused in the constructor, before data and weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGML_QUANT_VERSION, MODEL_ARCH, GGUFWriter
from torch import float32

from qlora_train.adapter.adapter_files import load_adapter
from qlora_train.boundary import require_free_disk
from qlora_train.data.added_tokens import AddedTokens
from qlora_train.data.chat.chat_format import ChatFormat
from qlora_train.data.formats import PromptTemplate
from qlora_train.data.prompts import is_chat
from qlora_train.errors import DataError, ExportError
from qlora_train.export.companions import LICENSES, copy_companions
from qlora_train.export.gguf.architecture import Architecture
from qlora_train.export.gguf.ollama import TurnTexts, create_command, go_prompt, modelfile
from qlora_train.export.gguf.tensors import file_type, list_tensors
from qlora_train.export.gguf.tokenizer import GgufTokenizer
from qlora_train.export.gguf.write import GgufReader, compare_with_merged, write_gguf
from qlora_train.export.measure import Measure, Source
from qlora_train.export.merge import MergedWeights
from qlora_train.export.model_card import CARD_FILE, model_card
from qlora_train.export.quantized_layers import QuantizedLayers
from qlora_train.files.atomic_folder import atomic_folder
from qlora_train.model.base import MetaModel, read_config
from qlora_train.recipe import Recipe
from qlora_train.weights.base_checkpoint import BaseCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GgufExport:
    """An export of a run to GGUF. tokenizer: with the tokens `added`, whose trained rows are written too.
    stop_ids: tokens that end an answer. quant: "f16", "q8_0", ... log: called with lines of text. Raises
    `ExportError` for a model or tokenizer that llama.cpp does not have."""

    def __init__(
        self,
        recipe: Recipe,
        base_folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        added: AddedTokens,
        stop_ids: Sequence[int],
        quant: str,
        log: Callable[[str], None],
    ) -> None:
        self._recipe, self._base_folder, self._quant, self._log = recipe, base_folder, quant, log
        self._tokenizer = tokenizer
        config = read_config(base_folder)
        self._architecture = Architecture(base_folder, config)
        num_rows = added.vocabulary_size(config.vocab_size)
        is_gemma4 = self._architecture.family.name == MODEL_ARCH.GEMMA4
        self._vocabulary = GgufTokenizer(tokenizer, num_rows, stop_ids, base_folder, is_gemma4)

    def write(
        self, out: Path, source: Source, cached: QuantizedLayers | None, measure: Measure | None
    ) -> None:
        """Write the folder `out`, which appears when it is complete. cached: training's quantized layers;
        measure: for the receipt; None: without one."""
        architecture, log = self._architecture, self._log
        meta_model = MetaModel(architecture.config, float32, source.lora)
        with BaseCheckpoint(self._base_folder, meta_model) as checkpoint:
            weights = MergedWeights(checkpoint, source.quantization, cached, load_adapter(source.adapter))
            tensors = list_tensors(weights, architecture, self._quant)
            num_bytes = sum(tensor.num_bytes for tensor in tensors)
            require_free_disk(out, num_bytes, "the GGUF file", ExportError, "give an --out on another disk")
            with atomic_folder(out) as partial:
                file = partial / f"model-{self._quant}.gguf"
                write_gguf(file, self._writer(), tensors, weights, architecture.rope_factors())
                reader = GgufReader(self._base_folder, file, tensors, weights.shapes)
                for line in compare_with_merged(reader, tensors, weights):
                    log(line)
                if measure is not None:
                    models = measure.gguf_models(reader, self._quant, num_bytes)
                    measure.receipt(models, "--quant bf16").write(partial, log)
                usage = [*self._describe_usage(partial, file.name)]
                card = model_card(
                    self._recipe,
                    self._base_folder,
                    "gguf",
                    "\n".join(f"- {line}" for line in usage),
                    source.merged_onto,
                )
                (partial / CARD_FILE).write_text(card, "utf-8")
                copy_companions(self._base_folder, partial, log, LICENSES)
        for line in usage:
            log(line)

    def _writer(self) -> GGUFWriter:
        """A writer with all metadata."""
        writer = GGUFWriter(None, self._architecture.name)
        writer.add_type("model")
        writer.add_name(Path(self._recipe.model.base).name)
        writer.add_file_type(file_type(self._quant))
        writer.add_quantization_version(GGML_QUANT_VERSION)
        self._architecture.write_metadata(writer)
        self._vocabulary.write(writer, self._log)
        return writer

    def _describe_usage(self, partial: Path, file: str) -> Iterator[str]:
        """Write the Modelfile; yields lines about how to run the model."""
        data = self._recipe.data
        chats = self._is_chat()
        template = self._go_template(chats)
        command = create_command(Path(self._recipe.training.output_dir))
        text = modelfile(command, file, template, self._vocabulary.stop_texts)
        (partial / "Modelfile").write_text(text, "utf-8")
        yield from self._architecture.remarks
        if chats:
            options = ""
            if data.chat_template_kwargs:
                options = f" --chat-template-kwargs '{json.dumps(dict(data.chat_template_kwargs))}'"
            yield f"llama.cpp: llama-cli -m {file} --jinja{options}   (the chat template is in the file)"
        else:
            yield f"llama.cpp: llama-completion -m {file} -no-cnv -p PROMPT   (trained without chats)"
        yield f"Ollama: {command}   " + (
            "(the Modelfile writes prompts as in training)"
            if template is not None
            else "(it cannot run the chat template in the file, which does more than put texts around "
            "messages: it takes the most similar of its own, else the bare prompt: ollama show --template)"
        )
        if self._quant in ("f32", "f16", "bf16"):
            smaller = file.replace(self._quant, "Q4_K_M")
            yield f"smaller, in a format of llama.cpp's own: llama-quantize {file} {smaller} Q4_K_M"

    def _is_chat(self) -> bool:
        try:
            return is_chat(self._recipe.data, self._tokenizer)
        except (DataError, OSError):  # the data are gone, and the recipe does not tell their format
            return bool(self._tokenizer.chat_template)

    def _go_template(self, chats: bool) -> str | None:
        data, tokenizer = self._recipe.data, self._tokenizer
        if not chats:
            prompt = data.prompt_template
            return "{{ .Prompt }}" if prompt is None else go_prompt(PromptTemplate(prompt))
        writer = ChatFormat(tokenizer, (), options=data.chat_template_kwargs).writer(with_tools=False)
        bos = tokenizer.bos_token if self._vocabulary.adds_bos else ""
        found = TurnTexts.read_off(
            lambda chat: writer.render(chat, prompt=True).removeprefix(bos), self._vocabulary.stop_texts
        )
        return found.in_go() if found is not None else None
