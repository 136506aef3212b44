"""What vLLM does with a LoRA adapter that it is handed, as its source says, and the command that serves one.

vLLM is not run here. Read in github.com/vllm-project/vllm at these commits, the files under vllm/:

    01230b40  config/lora.py        --max-lora-rank takes `MAX_RANKS` (default 16)
    e745baff  lora/peft_helper.py   reads r, lora_alpha, use_rslora; refuses use_dora, modules_to_save and r
                                    above --max-lora-rank; drops other keys, rank_pattern and alpha_pattern
                                    among them: all modules have one scaling
    01235a49  lora/layers/base_linear.py    copies A and B into buffers of --max-lora-rank: ranks may differ
    001e63a8  lora/utils.py         of tensors knows lora_A, lora_B, lora_embedding_A and _B; a bias of B only
                                    behind bias_enabled, which config/lora.py has no longer
    0306474e  lora/lora_model.py    refuses DoRA's magnitudes, and modules whose last name is no linear's (or,
                                    in classes that list them, that of embedding or head)
    01533aa8  lora/model_manager.py leaves out in silence what is not there under its whole path; stacked A
                                    and B of experts fit some classes only, elsewhere gate and up are taken
                                    for interleaved rows
    0046f770  ../docs/models/supported_models.md    architectures without LoRA
    00522333  entrypoints/openai/cli_args.py        --default-chat-template-kwargs, which requests override

Trained rows of tokens are refused: issue 36501 (open), pull request 55796 (open).
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.errors import ExportError
from qlora_train.recipe.module_patterns import last_name

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LINEARS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
}
"""Linears that vLLM's classes have under the path of transformers' (alone, or as a part of a fused one)."""
WITHOUT_LORA = {
    *("Gemma4UnifiedForConditionalGeneration", "IQuestCoderForCausalLM"),
    *("Jais2ForCausalLM", "OlmoeForCausalLM"),
}


def max_lora_rank(config: AdapterConfig, paths: Iterable[str], architectures: Iterable[str]) -> int:
    """The `--max-lora-rank` for an adapter with LoRA parameters at `paths`. architectures: of the base's
    config. Raises `ExportError` for an adapter that vLLM refuses or would compute otherwise than trained."""
    paths = sorted(paths)
    problems = list(_problems(config, paths, architectures))
    if problems:
        raise ExportError(
            "--for vllm: vLLM does not serve this adapter as it was trained:\n"
            + "\n".join(f"- {problem}" for problem in problems)
            + "\nExport with --to merged: vLLM serves that folder like any model, without --enable-lora. "
            "(Read in vLLM's source; not run.)"
        )
    highest = max(config.rank, *map(config.rank_of, paths))  # it compares r, whatever rank_pattern says
    return next(rank for rank in MAX_RANKS if rank >= highest)


def _problems(config: AdapterConfig, paths: list[str], architectures: Iterable[str]) -> Iterator[str]:
    if without := sorted(WITHOUT_LORA.intersection(architectures)):
        yield f"it has no LoRA for {without[0]}"
    if config.use_dora:
        yield "it refuses DoRA (lora.use_dora)"
    if config.lora_bias:
        yield "it does not load biases of B (lora.lora_bias)"
    if config.token_ids:
        yield f"it refuses trained rows of tokens ({len(config.token_ids)} tokens: model.add_tokens)"
    if config.target_parameters:
        yield (
            "it takes LoRA parameters of experts in other layouts, by model class (lora.target_parameters: "
            f"{config.target_parameters[0]})"
        )
    experts = set(config.experts_of(paths))
    if other := [path for path in paths if path not in experts and last_name(path) not in LINEARS]:
        yield (
            f"its classes do not all have {last_name(other[0])} under that name, and what they do not have "
            f"is refused or left out in silence ({other[0]} and {len(other) - 1} more)"
        )
    if config.rank > MAX_RANKS[-1]:
        yield f"its highest rank is {MAX_RANKS[-1]}, and r is {config.rank} (lora.rank)"
    elif higher := [path for path in paths if config.rank_of(path) > MAX_RANKS[-1]]:
        rank = config.rank_of(higher[0])
        yield f"its highest rank is {MAX_RANKS[-1]}, and {higher[0]} has {rank} (lora.rank_pattern)"
    if scaled := [p for p in paths if not math.isclose(config.scaling_of(p), config.scaling)]:
        yield (
            f"it scales all modules by {config.scaling:g}, and {scaled[0]} is trained with "
            f"{config.scaling_of(scaled[0]):g} (lora.rank_pattern, lora.alpha_pattern)"
        )


def serve_command(
    base: str,
    revision: str | None,
    name: str,
    folder: str,
    max_rank: int,
    has_template: bool,
    template_kwargs: Mapping[str, Any],
) -> str:
    """The command line that serves the adapter in `folder` as the model `name`. has_template: the folder has
    the chat template of training, which is not the base's. template_kwargs: those of training."""
    words = ["vllm", "serve", base, *(["--revision", revision] if revision else [])]
    words += ["--enable-lora", "--max-lora-rank", str(max_rank), "--lora-modules", f"{name}={folder}"]
    if has_template:
        words += ["--chat-template", f"{folder}/chat_template.jinja"]
    if template_kwargs:
        words += ["--default-chat-template-kwargs", json.dumps(dict(template_kwargs))]
    return shlex.join(words)
