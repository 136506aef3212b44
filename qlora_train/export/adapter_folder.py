"""`export --to adapter`: a run's adapter in PEFT's format as a folder to hand on, with a model card.

It holds no path of this machine: the base is named as on the hub, or by its folder's name, and
trained_on.json stays in the run. Weights are the run's, byte for byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qlora_train.adapter.adapter_config import CONFIG_FILE, read_json_config
from qlora_train.adapter.adapter_files import WEIGHTS_FILE, adapter_shapes
from qlora_train.export.companions import LICENSES, copy_companions, write_tokenizer
from qlora_train.export.model_card import CARD_FILE, model_card, published_base
from qlora_train.export.vllm_rules import max_lora_rank, serve_command
from qlora_train.files.atomic_folder import atomic_folder
from qlora_train.model.base_folder import read_plain_config, stored_quantization
from qlora_train.recipe import Recipe


@dataclass(frozen=True)
class AdapterFolder:
    """A run's adapter to be exported. tokenizer: of the run. has_new_tokens: it has tokens that the base's
    has not. stop_ids: tokens that end an answer and are not in the base's generation_config.json."""

    recipe: Recipe
    base_folder: Path
    adapter: Path
    tokenizer: PreTrainedTokenizerBase
    has_new_tokens: bool
    stop_ids: Sequence[int]

    def write(self, out: Path, for_vllm: bool, log: Callable[[str], None]) -> None:
        """Write the folder `out`, which appears when it is complete. for_vllm: raise `ExportError` for what
        vLLM would refuse or compute otherwise, and say how vLLM serves the folder."""
        config, shapes = adapter_shapes(self.adapter)
        architectures = read_plain_config(self.base_folder).get("architectures") or []
        max_rank = max_lora_rank(config, shapes, architectures) if for_vllm else None
        base = published_base(self.recipe.model.base, self.base_folder)
        with atomic_folder(out) as partial:
            shutil.copyfile(self.adapter / WEIGHTS_FILE, partial / WEIGHTS_FILE)
            values = read_json_config(self.adapter) | {"base_model_name_or_path": base}
            (partial / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")
            if self.has_new_tokens:
                write_tokenizer(self.tokenizer, partial)
            if self.recipe.model.chat_template is not None:
                template = str(self.tokenizer.chat_template)
                (partial / "chat_template.jinja").write_text(template, "utf-8")
            usage = "\n".join(f"- {line}" for line in self._usage(base, out.name, ".", max_rank))
            card = model_card(self.recipe, self.base_folder, "adapter", usage)
            (partial / CARD_FILE).write_text(card, "utf-8")
            copy_companions(self.base_folder, partial, log, LICENSES)
        here = base if base == self.recipe.model.base else str(self.base_folder)
        for line in self._usage(here, out.resolve().name, str(out), max_rank):
            log(line)

    def _usage(self, base: str, name: str, folder: str, max_rank: int | None) -> Iterator[str]:
        """Lines about how to run the adapter in `folder`. max_rank: for vLLM; None: without vLLM."""
        yield f"peft: PeftModel.from_pretrained(base_model, {folder!r}), where base_model is {base}"
        if max_rank is None:
            return
        model = self.recipe.model
        has_template = model.chat_template is not None
        kwargs = self.recipe.data.chat_template_kwargs or {}
        command = serve_command(base, model.revision, name, folder, max_rank, has_template, kwargs)
        yield f"vLLM (not run: no vLLM here): {command}"
        yield f'requests name "model": "{name}"; more adapters at once need --max-loras'
        if self.stop_ids:
            yield f'requests need "stop_token_ids": {list(self.stop_ids)}: only the chat template has them'
        stored = read_plain_config(self.base_folder).get("quantization_config") or {}
        if model.quantization != "none" and not stored_quantization(stored).is_quantized:
            yield (
                f"vLLM computes with the original weights, and training did with {model.quantization}: what "
                "that changes, the receipt of `export --to merged` measures"
            )
