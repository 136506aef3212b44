"""What each family's code decides beside its config.json: linears, biases, norms, and defaults.

A config.json is not enough to know a model: whether q, k and v are one linear, what the MLP's linears are
called and whether a missing `head_dim` means 128 or hidden / heads is written in the family's code. One entry
here per family that the start-up probe accepts; a test builds each of them with transformers and compares
names, shapes, windows and the numbers of all parameters. A family without an entry is taken for a llama, and
its plan says that it is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Bias = bool | tuple[str, bool]
"""Always, never, or as a key of the config says, with its default."""
QkNorm = Literal["none", "per_head", "per_transposed_head", "per_rotated_head", "whole"]
Norm = Literal["rms", "wide_rms", "layer", "wide_layer", "mean_free"]
Rotary = Literal["plain", "interleaved", "half_interleaved", "in_fp32", "where_windowed"]
Windows = Literal["none", "all", "listed", "after", "without_rope"]
_ATTENTION_BIAS, _MLP_BIAS = ("attention_bias", False), ("mlp_bias", False)


@dataclass(frozen=True)
class Family:
    """One family.

    qkv_bias, output_bias, mlp_bias: of the linears. fuses_qkv: q, k and v are one. mlp: names of its linears;
    gate and up may be one. square_output: the output projection is [hidden, hidden]. num_norms: per layer,
    over the hidden size, norm_weights vectors in each. norm: how the module writes it (ghost_norm.py).
    fuses_norms: that is kernels/rms_norm.py to the bit. only_post_norms: they stand behind attention and MLP,
    not before. is_parallel: attention and MLP read the same norm. qk_norm: of queries and keys, whole or by
    head; this while tokens are outside heads, after they are inside, or after the rotary embedding. rotary:
    "interleaved" makes its tables in every layer (half_interleaved: for half of a head); "where_windowed" is
    "in_fp32" in layers with a window, and nothing in others. scales_residual: what is added to the residual
    is multiplied by a number. scales_logits: so are the logits. activation_numbers: parameters of the
    activation. is_exact: the byte model replays the family operation by operation, held to the meter.

    Where the config says nothing: kv_heads (None: as many as heads), head_dim (None: hidden / heads),
    is_tied, activation, caps_scores (with tanh; logits too), window. windows: which layers have one.
    "listed": those of `layer_types` or, without, all but every full_every-th (None: all),
    `sliding_window_pattern` of the config where reads_pattern. "after": those from `max_window_layers` on.
    "without_rope": those without rotary embedding. The last two only if the config says
    `use_sliding_window`.
    """

    qkv_bias: Bias = False
    output_bias: Bias = False
    mlp_bias: Bias = False
    num_norms: int = 2
    norm_weights: int = 1
    norm: Norm = "rms"
    fuses_norms: bool = True
    only_post_norms: bool = False
    qk_norm: QkNorm = "none"
    is_parallel: bool = False
    rotary: Rotary = "plain"
    scales_residual: bool = False
    scales_logits: bool = False
    fuses_qkv: bool = False
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    square_output: bool = False
    activation_numbers: int = 0
    is_exact: bool = True
    kv_heads: int | None = None
    head_dim: int | None = None
    is_tied: bool = False
    window: int | None = None
    activation: str = "silu"
    caps_scores: bool = False
    windows: Windows = "none"
    full_every: int | None = None
    reads_pattern: bool = False

    @property
    def fuses_gate(self) -> bool:
        """Gate and up are one linear."""
        return self.mlp[0] == "gate_up_proj"


_FUSED_MLP = ("gate_up_proj", "down_proj")
_LLAMA = Family(_ATTENTION_BIAS, _ATTENTION_BIAS, _MLP_BIAS)
_MISTRAL = Family(kv_heads=8, window=4096, windows="all")
_QWEN2 = Family(qkv_bias=True, kv_heads=32, window=4096, windows="after")
_OLMO = Family(_ATTENTION_BIAS, _ATTENTION_BIAS, norm="wide_layer", fuses_norms=False)
_OLMO2 = replace(_OLMO, norm="wide_rms", only_post_norms=True, qk_norm="whole")
_GELU = "gelu_pytorch_tanh"
_GEMMA = Family(
    _ATTENTION_BIAS,
    _ATTENTION_BIAS,
    kv_heads=16,
    head_dim=256,
    is_tied=True,
    activation=_GELU,
    norm="wide_rms",
)
_GEMMA2 = replace(_GEMMA, num_norms=4, kv_heads=4, window=4096, windows="listed", full_every=2)
_GLM = Family(("attention_bias", True), rotary="half_interleaved", mlp=_FUSED_MLP, kv_heads=2, head_dim=128)
_COHERE = Family(
    _ATTENTION_BIAS,
    _ATTENTION_BIAS,
    num_norms=1,
    norm="mean_free",
    fuses_norms=False,
    is_parallel=True,
    rotary="in_fp32",
    scales_logits=True,
    is_tied=True,
)

UNKNOWN = replace(_LLAMA, is_exact=False)
FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral": replace(_MISTRAL, windows="listed"),
    "qwen2": _QWEN2,
    "qwen3": Family(
        _ATTENTION_BIAS,
        _ATTENTION_BIAS,
        qk_norm="per_head",
        kv_heads=32,
        head_dim=128,
        window=4096,
        windows="after",
    ),
    "phi3": Family(fuses_qkv=True, mlp=_FUSED_MLP, windows="all"),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA2, caps_scores=True),
    "gemma3_text": replace(_GEMMA2, qk_norm="per_transposed_head", full_every=6, reads_pattern=True),
    "smollm3": replace(_LLAMA, kv_heads=4, is_tied=True, windows="without_rope"),
    "granite": replace(_LLAMA, scales_residual=True, scales_logits=True),
    "olmo": replace(_OLMO, norm_weights=0),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, window=4096, windows="listed", full_every=4),
    "glm": _GLM,
    "glm4": replace(_GLM, num_norms=4),
    "exaone4": Family(
        only_post_norms=True,
        qk_norm="per_transposed_head",
        kv_heads=32,
        window=4096,
        windows="listed",
        full_every=4,
        reads_pattern=True,
    ),
    "cohere": _COHERE,
    "cohere2": replace(
        _COHERE, rotary="where_windowed", window=4096, windows="listed", full_every=4, reads_pattern=True
    ),
    "starcoder2": Family(
        ("use_bias", True),
        ("use_bias", True),
        ("use_bias", True),
        norm_weights=2,
        norm="layer",
        fuses_norms=False,
        mlp=("c_fc", "c_proj"),
        kv_heads=2,
        is_tied=True,
        activation=_GELU,
        windows="all",
    ),
    "seed_oss": Family(
        ("attention_bias", True), ("attention_out_bias", False), _MLP_BIAS, kv_heads=8, head_dim=128
    ),
    "apertus": Family(
        _ATTENTION_BIAS,
        _ATTENTION_BIAS,
        qk_norm="per_transposed_head",
        mlp=("up_proj", "down_proj"),
        activation="xielu",
        activation_numbers=2,
    ),
    "hunyuan_v1_dense": Family(_ATTENTION_BIAS, _ATTENTION_BIAS, qk_norm="per_rotated_head"),
    "helium": Family(
        _ATTENTION_BIAS,
        mlp_bias=_MLP_BIAS,
        norm="wide_rms",
        fuses_norms=False,
        rotary="interleaved",
        square_output=True,
        kv_heads=20,
        head_dim=128,
    ),
}
"""By `model_type`."""
