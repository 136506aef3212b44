"""The families that `export --to gguf` writes: llama.cpp's name for each, and what its program fixes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import MODEL_ARCH, MODEL_TENSOR, MODEL_TENSORS

CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
ROPE_SETTINGS = {
    "linear": {"factor"},
    "proportional": {"partial_rotary_factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
"""What a file says of each kind of rotary embedding, beside its base."""
_ROPES = ("default", "linear", "yarn")
GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Family:
    """name: llama.cpp's architecture. pairs_rotate: it rotates neighbours in a head, where transformers
    rotates the two halves, so rows of q and k change places. adds_one: norms are stored as w of 1 + w, and
    llama.cpp wants the sum. has_biases: its linears may have them. full_every: the only layers that attend
    to everything are every so manieth, in a family with sliding windows; 0: llama.cpp has no window there.
    ropes: kinds of rotary embedding. caps: sets of logits that may be capped. fixed: settings of config.json
    that llama.cpp's program has whatever the file says. alternates: experts are [in, out], and rows of gate
    and up take turns. sizes_by_layer: layers with a sliding window have heads of another size, and the file
    says which they are. sliding_theta: base of the rotary embedding in layers with a window; None: as in the
    others. rope: further settings of its rotary embedding, with the only value that may be there; None: any.
    """

    name: MODEL_ARCH
    pairs_rotate: bool = False
    adds_one: bool = False
    has_biases: bool = False
    full_every: int = 0
    activation: str = "silu"
    ropes: tuple[str, ...] = _ROPES
    caps: tuple[tuple[str, ...], ...] = ((),)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    alternates: bool = False
    sizes_by_layer: bool = False
    sliding_theta: float | None = 10000.0
    rope: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fuses_gate_and_up(self) -> bool:
        """Whether gate and up of all experts are one tensor in the file."""
        return MODEL_TENSOR.FFN_GATE_UP_EXP in MODEL_TENSORS[self.name]


FAMILIES = {
    "llama": Family(MODEL_ARCH.LLAMA, pairs_rotate=True, ropes=(*_ROPES, "llama3"), has_biases=True),
    "mistral": Family(MODEL_ARCH.LLAMA, pairs_rotate=True, ropes=(*_ROPES, "llama3")),
    "smollm3": Family(MODEL_ARCH.SMOLLM3, pairs_rotate=True),
    "qwen2": Family(MODEL_ARCH.QWEN2, has_biases=True),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "phi3": Family(MODEL_ARCH.PHI3),
    "olmo2": Family(MODEL_ARCH.OLMO2),
    "olmo3": Family(MODEL_ARCH.OLMO2, full_every=4, sliding_theta=None),
    "arcee": Family(MODEL_ARCH.ARCEE, pairs_rotate=True, activation="relu2"),
    "ernie4_5": Family(MODEL_ARCH.ERNIE4_5),
    "exaone4": Family(MODEL_ARCH.EXAONE4, fixed={"sliding_window": None}),
    "ministral": Family(MODEL_ARCH.LLAMA, pairs_rotate=True),
    "ministral3": Family(
        MODEL_ARCH.MISTRAL3,
        pairs_rotate=True,
        ropes=("yarn",),
        rope={"mscale_all_dim": 1.0, "llama_4_scaling_beta": None, "max_position_embeddings": None},
    ),
    "glm": Family(MODEL_ARCH.CHATGLM, has_biases=True, rope={"partial_rotary_factor": None}),
    "glm4": Family(MODEL_ARCH.GLM4, has_biases=True, rope={"partial_rotary_factor": None}),
    "seed_oss": Family(MODEL_ARCH.SEED_OSS, has_biases=True),
    "granite": Family(MODEL_ARCH.GRANITE, pairs_rotate=True),
    "gemma": Family(MODEL_ARCH.GEMMA, adds_one=True, activation=GELU),
    "gemma2": Family(MODEL_ARCH.GEMMA2, adds_one=True, full_every=2, activation=GELU, caps=(CAPS,)),
    "gemma3_text": Family(MODEL_ARCH.GEMMA3, adds_one=True, full_every=6, activation=GELU),
    "gemma4_text": Family(
        MODEL_ARCH.GEMMA4,
        activation=GELU,
        ropes=("proportional",),
        caps=((), CAPS[1:]),
        fixed={"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0},
        sizes_by_layer=True,
    ),
    "gpt_oss": Family(
        MODEL_ARCH.GPT_OSS,
        has_biases=True,
        full_every=2,
        fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        alternates=True,
        rope={"truncate": False},
    ),
    "qwen2_moe": Family(MODEL_ARCH.QWEN2MOE, has_biases=True, fixed={"norm_topk_prob": False}),
    "qwen3_moe": Family(MODEL_ARCH.QWEN3MOE, fixed={"norm_topk_prob": True}),
    "olmoe": Family(MODEL_ARCH.OLMOE, fixed={"norm_topk_prob": False, "clip_qkv": None}),
    "mixtral": Family(MODEL_ARCH.LLAMA, pairs_rotate=True, ropes=(*_ROPES, "llama3")),
}
