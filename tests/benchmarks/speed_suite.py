"""The speed cases: the same base, data, rank, optimizer and tokens for us and for peers.

Targets are printed beside the figures, never asserted. Peers that can be written in more than one way appear
in more than one: ratios are against the one that their documentation shows, the fastest stands beside it.
"""

from __future__ import annotations

from typing import Any

from benchmarks.case import Case, Contender

PIECES = "benchmarks.pieces"
OURS = "qlora-train"
PEFT, PEFT_FAST = "peft + bitsandbytes", "peft + bitsandbytes, autocast, nothing in fp32"
TRL, UNSLOTH, SOUP = "trl SFTTrainer", "unsloth", "soup-cli, layer streaming"
FROM_PRETRAINED = "transformers from_pretrained"
MERGE_AND_UNLOAD = "peft merge_and_unload, save_pretrained"
BITSANDBYTES = "bitsandbytes"


def _base(name: str, model_type: str = "llama", **sizes: int) -> dict[str, Any]:
    return {"name": name, "config": {"model_type": model_type, **sizes}}


LLAMA_200M = _base(
    "llama-200m",
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=32000,
    max_position_embeddings=4096,
)
MIXTURE_100M = _base(
    "mixture-100m",
    "qwen3_moe",
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=384,
    vocab_size=32000,
    max_position_embeddings=4096,
)
LLAMA_1B = _base(
    "tinyllama-1.1b",
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    vocab_size=32000,
    max_position_embeddings=2048,
)
LLAMA_8B = _base(
    "llama-3.1-8b",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
)
ROW_TOKENS = 512
STEPS = {
    "rank": 16,
    "optimizer": "paged_adamw_8bit",
    "accumulation": 1,
    "num_warm_up": 2,
    "num_timed": 5,
    "row_tokens": ROW_TOKENS,
}


def _texts(num_rows: int) -> dict[str, Any]:
    return {"name": f"texts-{num_rows}", "kind": "texts", "num_rows": num_rows, "num_tokens": ROW_TOKENS}


def _ours(name: str = OURS, **recipe: dict[str, Any]) -> Contender:
    """recipe: sections, with what the case changes in them."""
    return Contender(name, f"{PIECES}.ours", {"recipe": recipe})


def _peft(name: str, *, as_documented: bool) -> Contender:
    arguments = {"as_documented": as_documented}
    return Contender(name, f"{PIECES}.peft_loop", arguments, requires=("peft", "bitsandbytes"))


def _cpu_200m(activations: str, target: str) -> Case:
    return Case(
        name=f"cpu-200m-{activations}",
        about=f"200M LLaMA on the CPU, 2 x 512 tokens a step, activations: {activations}",
        contenders=(
            _ours(memory={"activations": activations}),
            _peft(PEFT, as_documented=True),
            _peft(PEFT_FAST, as_documented=False),
        ),
        reference=PEFT,
        settings={**STEPS, "sequence_length": ROW_TOKENS, "micro_batch_size": 2, "rows_per_micro_batch": 2},
        inputs={"base": LLAMA_200M, "rows": _texts(14)},
        target=target,
    )


MIXTURE = Case(
    name="cpu-moe-16-experts",
    about="16 experts on the CPU, 2 x 512 tokens a step; peers keep the experts in 16 or 32 bits",
    contenders=(
        _ours(memory={"activations": "recompute"}),
        _ours(f"{OURS}, from disk", memory={"activations": "recompute", "weights": "disk"}),
        _peft(PEFT, as_documented=True),
    ),
    reference=PEFT,
    settings={**STEPS, "sequence_length": ROW_TOKENS, "micro_batch_size": 2, "rows_per_micro_batch": 2},
    inputs={"base": MIXTURE_100M, "rows": _texts(14)},
)
CHAT_ROWS = Case(
    name="cpu-chat-rows",
    about="200M LLaMA on the CPU, short prompts and answers of very different lengths, packed to 1,024",
    contenders=(_ours(), Contender(TRL, f"{PIECES}.trl_sft", requires=("trl", "peft", "bitsandbytes"))),
    reference=TRL,
    settings={**STEPS, "sequence_length": 1024, "micro_batch_size": 1},
    inputs={
        "base": LLAMA_200M,
        "rows": {
            "name": "prompts-120",
            "kind": "prompts",
            "num_rows": 72,
            "mean_tokens": 120,
            "sigma": 0.8,
            "max_tokens": 1024,
        },
    },
    target=">= 5x tokens/s at <= 0.4x peak",
)
LOAD = Case(
    name="cpu-load-1.1b",
    about="a 1.1B base from a 16-bit checkpoint to NF4 in memory",
    contenders=(
        Contender(f"{OURS}, no cache", f"{PIECES}.load", {"by": "ours"}),
        Contender(f"{OURS}, cached", f"{PIECES}.load", {"by": "ours-cached"}),
        Contender(FROM_PRETRAINED, f"{PIECES}.load", {"by": "transformers"}, requires=("peft",)),
    ),
    reference=FROM_PRETRAINED,
    inputs={"base": LLAMA_1B, "is_quantized": True},
    target="no cache: <= 0.6x load at <= 0.5x peak",
)
MERGE = Case(
    name="cpu-merge-1.1b",
    about="an adapter and a 1.1B base to merged float16 weights on disk",
    contenders=(
        Contender(f"{OURS} export", f"{PIECES}.merge", {"by": "dequantized"}),
        Contender(f"{OURS} export --base original", f"{PIECES}.merge", {"by": "original"}),
        Contender(MERGE_AND_UNLOAD, f"{PIECES}.merge", {"by": "peft"}, requires=("peft",)),
    ),
    reference=MERGE_AND_UNLOAD,
    inputs={"base": LLAMA_1B, "run_rank": 16, "is_quantized": True},
    target="<= 0.5x merge at <= 0.33x peak",
)


def _gpu_8b(name: str, about: str, memory: dict[str, Any]) -> Case:
    """One row of 4,096 tokens of 512-token documents for us, 8 x 512 for peers: the same tokens, and the same
    attention."""
    return Case(
        name=f"gpu-8b-{name}",
        about=f"Llama-3.1-8B shape, 4,096 packed tokens a micro-batch, {about}",
        contenders=(
            _ours(memory=memory),
            _peft(PEFT, as_documented=True),
            _peft(PEFT_FAST, as_documented=False),
            Contender(UNSLOTH, f"{PIECES}.unsloth_loop", requires=("unsloth",)),
        ),
        reference=PEFT_FAST,
        settings={**STEPS, "sequence_length": 4096, "micro_batch_size": 1, "rows_per_micro_batch": 8},
        inputs={"base": LLAMA_8B, "rows": _texts(56)},
        needs_cuda=True,
    )


GPU_8B = _gpu_8b("keep", "nothing recomputed", {"activations": "keep"})
STREAMED = Case(
    name="gpu-8b-streamed-512",
    about="Llama-3.1-8B shape, one row of 512 tokens a step in 3.3 GB of VRAM, streamed from RAM",
    contenders=(
        _ours(memory={"vram": "3.3GB", "weights": "ram"}),
        Contender(SOUP, f"{PIECES}.soup", commands=("soup",)),
    ),
    reference=SOUP,
    settings={**STEPS, "sequence_length": ROW_TOKENS, "micro_batch_size": 1},
    inputs={"base": LLAMA_8B, "rows": _texts(7)},
    needs_cuda=True,
)
DEQUANTIZE = Case(
    name="gpu-dequantize",
    about="dequantizing a 4096 x 14336 weight from NF4 to bfloat16",
    contenders=(
        Contender(OURS, f"{PIECES}.dequantize", {"by": "ours"}, requires=("triton",)),
        Contender(BITSANDBYTES, f"{PIECES}.dequantize", {"by": "bitsandbytes"}),
    ),
    reference=BITSANDBYTES,
    settings={"num_rows": 4096, "num_columns": 14336},
    needs_cuda=True,
)

CASES: tuple[Case, ...] = (
    _cpu_200m("keep", ">= 2.3x tokens/s at <= 0.85x peak"),
    _cpu_200m("recompute", ">= 1.7x tokens/s at <= 0.62x peak"),
    MIXTURE,
    CHAT_ROWS,
    LOAD,
    MERGE,
    GPU_8B,
    _gpu_8b("recompute", "as few layers recomputed as fit into 16 GiB", {"vram": "16GiB"}),
    _gpu_8b("full-recompute", "every layer recomputed", {"activations": "recompute"}),
    STREAMED,
    DEQUANTIZE,
)
