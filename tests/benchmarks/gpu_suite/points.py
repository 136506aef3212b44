"""What a step is made of, operation by operation: what this trainer does, beside what could be done instead
and beside the least that the device needs for it.

The first way of every point is the product's own function; the others are timed to decide whether changing
that would pay. "a copy" reads and writes as many bytes as the operation has to. Weights are random and of one
decoder layer (random_base.py). A point that fails is a problem, and the others are taken.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.gpu_suite import training
from benchmarks.gpu_suite.timing import Timer, Way
from benchmarks.pieces.figures import compute_device, compute_dtype
from benchmarks.process import answer, error_lines
from benchmarks.random_base import make_random_base, write_config
from qlora_train.device.settings import apply_settings, determinism_of_before, make_deterministic
from qlora_train.kernels.dropout import DropoutKeys, dropout
from qlora_train.micro_batch import MicroBatch
from qlora_train.model.decoder import FrozenDecoder
from qlora_train.model.linear import FrozenLinear
from qlora_train.model.lora_parameters import LoraParameters
from qlora_train.model.loss import TiledLoss, reference_loss
from qlora_train.model.packed_tokens import PackedTokens
from qlora_train.model.vocab_matrix import ResidentMatrix
from qlora_train.model.weight_store import ResidentWeights
from qlora_train.quant.formats import Quantization
from qlora_train.quant.quantize import quantize
from qlora_train.quant.weight import QuantizedWeight
from qlora_train.walk.optimizer import FlatOptimizer
from qlora_train.weights.execution_plan import HEAD_TILE_ROWS, LOSS_TOKENS
from qlora_train.weights.host_memory import HostMemory
from qlora_train.weights.load import load_base
from qlora_train.weights.ring import Ring
from qlora_train.weights.stores import ItemReader

NF4 = Quantization("nf4", double_quant=True)
RANK, DROPPED = 16, 0.05
LAYER = "model.layers.0"
NUM_STREAMED = 4
"""Layers that pass through the ring in one run."""


class Bench:
    """What the points share. arguments: see `measure`."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.device, self.dtype = compute_device(), compute_dtype()
        self.config = {**arguments["model"]["config"], "num_hidden_layers": 1}
        self.num_tokens: int = arguments["num_tokens"]
        self.hidden: int = self.config["hidden_size"]
        self.intermediate: int = self.config["intermediate_size"]

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device.torch)

    def leaf(self, *shape: int) -> Tensor:
        return self.random(*shape).requires_grad_()

    def copy(self, point: str, num_bytes: int) -> Way:
        """num_bytes: read and written together."""
        source = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=self.device.torch)
        return Way(point, "a copy", partial(torch.empty_like(source).copy_, source), num_bytes)

    def weight(self, quantization: Quantization, num_rows: int, num_columns: int) -> QuantizedWeight:
        rows = self.random(num_rows, num_columns) * 0.02
        return quantize([rows], (num_rows, num_columns), quantization, self.device.torch)

    @cached_property
    def decoder(self) -> FrozenDecoder:
        """Of one layer, with all operations fused, and LoRA parameters on every linear."""
        with tempfile.TemporaryDirectory() as cache:
            folder = write_config(Path(cache) / "base", self.config)
            make_random_base(folder, NF4, self.dtype, Path(cache))
            decoder = load_base(folder, NF4, self.dtype, self.device, cache=Path(cache))
        decoder.fuse(norms=True, mlps=True, qkv=True)
        self.lora_of(decoder.linears)
        return decoder

    def lora_of(self, linears: dict[str, FrozenLinear]) -> LoraParameters:
        """Attached to these linears."""
        return LoraParameters(
            linears, rank=RANK, scaling=2.0, dropout=0.0, seed=0, dtype=self.dtype, device=self.device.torch
        )

    @cached_property
    def tokens(self) -> PackedTokens:
        """One row of eight documents, all of it supervised."""
        places = np.arange(self.num_tokens)
        ids, length = places % self.config["vocab_size"], self.num_tokens // 8
        ends = np.arange(0, self.num_tokens + 1, length)
        batch = MicroBatch(ids, places % length, np.roll(ids, -1), ends, np.zeros_like(ids), places)
        return PackedTokens.from_host(batch, self.device.torch)


def of_dropout(bench: Bench) -> Iterator[Way]:
    rows = torch.arange(bench.num_tokens, device=bench.device.torch)
    keys = DropoutKeys(1, 1, torch.zeros_like(rows), rows)
    for width in (bench.hidden, bench.intermediate):
        point, x = f"dropout [{bench.num_tokens}, {width}]", bench.random(bench.num_tokens, width)
        num_bytes = 2 * x.nbytes
        yield Way(point, "ours", partial(dropout, x, keys, 0, DROPPED), num_bytes)
        yield Way(point, "torch", partial(F.dropout, x, DROPPED), num_bytes)
        yield bench.copy(point, num_bytes)


def of_dequantizing(bench: Bench) -> Iterator[Way]:
    kernel = bench.device.description.dequantize_kernel
    for shape in ((bench.hidden, bench.hidden), (bench.intermediate, bench.hidden)):
        out = torch.empty(shape, dtype=bench.dtype, device=bench.device.torch)
        for quantization in (NF4, Quantization("int8", double_quant=False)):
            point = f"{quantization.format} dequantized {[*shape]}"
            weight = bench.weight(quantization, *shape)
            num_bytes = weight.num_bytes + out.nbytes
            yield Way(point, "ours", partial(weight.dequantize_into, out, kernel), num_bytes)
            if quantization == NF4:
                yield Way(point, "bitsandbytes", partial(weight.dequantize_into, out, "library"), num_bytes)
            yield bench.copy(point, num_bytes)


def of_loss(bench: Bench) -> Iterator[Way]:
    decoder, tokens, head = bench.decoder, bench.tokens, bench.decoder.head
    assert isinstance(head, ResidentMatrix)
    x = bench.random(1, bench.num_tokens, bench.hidden)
    point = f"loss [{bench.num_tokens}, {bench.hidden}] x {head.num_rows} words"
    num_flops = 4 * bench.num_tokens * bench.hidden * head.num_rows

    def tiled(block_tokens: int, tile_rows: int) -> object:
        head.tile_rows = tile_rows
        return TiledLoss(decoder, block_tokens)([x], [tokens], 1.0)

    usual = partial(tiled, LOSS_TOKENS, HEAD_TILE_ROWS)
    yield Way(point, "ours", usual, num_flops=num_flops)
    with determinism_of_before():
        make_deterministic()
        yield Way(point, "ours, deterministic", usual, num_flops=num_flops)
    for blocks in ((1024, 4096), (1024, 16384), (4096, 4096), (4096, 16384)):
        run = partial(tiled, *blocks)
        yield Way(point, f"ours, {blocks[0]} tokens x {blocks[1]} words", run, num_flops=num_flops)
    whole = partial(reference_loss, decoder, head.weight, x, tokens, bench.num_tokens, 1.0)
    yield Way(point, "all logits at once", whole, num_flops=num_flops)
    logits = x[0] @ head.weight.t()
    yield Way(
        point,
        "its two products",
        lambda: (torch.mm(x[0], head.weight.t(), out=logits), logits @ head.weight),
        num_flops=num_flops,
    )


def _there_and_back(run: Callable[[], Tensor | Sequence[Tensor]], *leaves: Tensor) -> Callable[[], object]:
    """Forward, and backward to the leaves from gradients of ones."""
    ys = run()
    gradients = [torch.ones_like(y) for y in ([ys] if isinstance(ys, Tensor) else ys)]
    return lambda: torch.autograd.grad(run(), leaves, gradients)


def _products(weight: Tensor, x: Tensor) -> Callable[[], object]:
    """Of a frozen linear there and back."""
    gradient = torch.ones(len(x), len(weight), dtype=x.dtype, device=x.device)
    return lambda: (x.detach() @ weight.t(), gradient @ weight)


def of_linears(bench: Bench) -> Iterator[Way]:
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        linear = bench.decoder.linears[f"{LAYER}.{name}"]
        size = [linear.out_features, linear.in_features]
        point, x = f"linear {size}, {bench.num_tokens} tokens", bench.leaf(bench.num_tokens, size[1])
        num_flops = 4 * bench.num_tokens * size[0] * size[1]
        yield Way(point, "ours", _there_and_back(partial(linear, x), x), num_flops=num_flops)
        lora, linear.lora = linear.lora, None
        try:
            plain = _there_and_back(partial(linear, x), x)
            yield Way(point, "ours, without factors", plain, num_flops=num_flops)
        finally:
            linear.lora = lora
        weight = linear.source.dequantize(linear.name, bench.dtype).clone()
        yield Way(point, "its two products", _products(weight, x), num_flops=num_flops)


def of_qkv(bench: Bench) -> Iterator[Way]:
    attention: Any = bench.decoder.layers[0].self_attn
    together = [attention.q_proj, attention.k_proj, attention.v_proj]
    x = bench.leaf(bench.num_tokens, bench.hidden)
    num_rows = sum(each.linear.out_features for each in together)
    point, num_flops = f"q, k and v of {bench.num_tokens} tokens", 4 * x.numel() * num_rows
    yield Way(point, "ours", _there_and_back(lambda: [f(x) for f in together], x), num_flops=num_flops)
    apart = _there_and_back(lambda: [each.linear(x) for each in together], x)
    yield Way(point, "one by one", apart, num_flops=num_flops)
    names = [each.linear.name for each in together]
    weight = torch.cat([together[0].linear.source.dequantize(n, bench.dtype).clone() for n in names])
    yield Way(point, "two products of one weight", _products(weight, x), num_flops=num_flops)


def of_elementwise(bench: Bench) -> Iterator[Way]:
    layer: Any = bench.decoder.layers[0]
    x, rest = (bench.leaf(1, bench.num_tokens, bench.hidden) for _ in range(2))
    point, norm = f"residual + norm [{bench.num_tokens}, {bench.hidden}]", layer.input_layernorm
    num_bytes = 8 * x.nbytes  # x and rest in, their sum and the norm out; back: both gradients, the sum, dx

    def residual_and_norm() -> list[Tensor]:
        total = x + rest
        return [total, norm(total)]

    yield Way(point, "ours", _there_and_back(residual_and_norm, x, rest), num_bytes)
    yield Way(point, "norm alone", _there_and_back(lambda: norm(x), x), 5 * x.nbytes)
    yield bench.copy(point, num_bytes)
    _, (arguments,) = bench.decoder.embed_packed(bench.tokens)
    cos, sin = arguments["position_embeddings"]
    size = bench.config["head_dim"]
    heads = bench.config["num_attention_heads"], bench.config["num_key_value_heads"]
    q, k = (bench.leaf(1, number, bench.num_tokens, size) for number in heads)
    point, num_bytes = f"rotary embedding of {bench.num_tokens} tokens", 4 * (q.nbytes + k.nbytes)
    rotate = _there_and_back(lambda: apply_rotary_pos_emb(q, k, cos, sin), q, k)
    yield Way(point, "transformers", rotate, num_bytes)
    yield bench.copy(point, num_bytes)


def of_generating(bench: Bench) -> Iterator[Way]:
    """One linear for the next token of 1 and 4 prompts."""
    kernel = bench.device.description.dequantize_kernel

    def ours(x: Tensor, weight: QuantizedWeight, out: Tensor) -> Tensor:
        return F.linear(x, weight.dequantize_into(out, kernel))

    for shape in ((bench.hidden, bench.hidden), (bench.intermediate, bench.hidden)):
        weight = bench.weight(NF4, *shape)
        out = torch.empty(shape, dtype=bench.dtype, device=bench.device.torch)
        data, state = bnb.functional.quantize_4bit(out.normal_(), quant_type="nf4", compress_statistics=True)
        for num_rows in (1, 4):
            point, x = f"{num_rows} tokens through {[*shape]}", bench.random(num_rows, shape[1])
            yield Way(point, "ours", partial(ours, x, weight, out), weight.num_bytes)
            library = partial(bnb.matmul_4bit, x, data, state)
            yield Way(point, "bitsandbytes", library, weight.num_bytes)
            yield Way(point, "16-bit weight", partial(F.linear, x, out), out.nbytes)
            yield bench.copy(point, weight.num_bytes)


def of_optimizer(bench: Bench) -> Iterator[Way]:
    layers = range(bench.arguments["model"]["config"]["num_hidden_layers"])
    lora = bench.lora_of(
        {
            f"{layer}.{name}": FrozenLinear(name, linear.in_features, linear.out_features)
            for layer in layers
            for name, linear in bench.decoder.linears.items()
        }
    )
    lora.gradient.normal_()
    point = f"optimizer, {lora.masters.numel() / 1e6:.0f}M numbers"
    for name in ("paged_adamw_8bit", "adamw_8bit", "paged_adamw_32bit", "adamw"):
        optimizer = FlatOptimizer(name, lora, bench.device, lora_b_lr_ratio=1.0, weight_decay=0.0)
        yield Way(point, name, partial(optimizer.step, 1e-5))
    parameter = nn.Parameter(lora.masters)
    parameter.grad = lora.gradient
    library = bnb.optim.AdamW8bit([parameter])
    library.step()  # allocates its state
    group = library.param_groups[0]
    yield Way(point, "adamw_8bit, no wait", partial(library.update_step, group, parameter, 0, 0))
    yield Way(point, "working copy", lora.refresh_working)


def of_copies(bench: Bench) -> Iterator[Way]:
    host = HostMemory(bench.device)
    assert isinstance(weights := bench.decoder.weights, ResidentWeights)
    num_bytes = weights.num_bytes
    layers = [host.empty(num_bytes) for _ in range(NUM_STREAMED)]
    point, reader = f"a layer of {num_bytes / 1e6:.0f} MB", ItemReader(bench.device, host)
    here = torch.empty_like(layers[0], device=bench.device.torch)
    reader.items = dict(enumerate(layers))
    ring = Ring(reader, 2, num_bytes, bench.device)

    def stream() -> None:
        ring.set_schedule(reader.items)
        for item in reader.items:
            ring.acquire(item)
            ring.release(item)

    try:
        yield Way(point, f"{NUM_STREAMED} through the ring", stream, NUM_STREAMED * num_bytes)
    finally:
        ring.close()
        reader.close()
    yield Way(point, "to the device", lambda: here.copy_(layers[0], non_blocking=True), num_bytes)
    yield Way(point, "to the host", lambda: layers[0].copy_(here, non_blocking=True), num_bytes)


def of_products(bench: Bench) -> Iterator[Way]:
    size = bench.arguments["matrix_size"]
    shapes = (size, size, size), (bench.num_tokens, bench.hidden, bench.intermediate)
    for rows, inner, columns in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            a, b = bench.random(rows, inner, dtype=dtype), bench.random(columns, inner, dtype=dtype)
            point, num_flops = f"product {rows} x {inner} x {columns}", 2 * rows * inner * columns
            yield Way(point, str(dtype).removeprefix("torch."), partial(F.linear, a, b), num_flops=num_flops)


POINTS: tuple[Callable[[Bench], Iterator[Way]], ...] = (
    of_products, of_copies, of_dequantizing, of_dropout, of_loss, of_linears, of_qkv, of_elementwise,
    of_generating, of_optimizer,
)  # fmt: skip


def measure(arguments: dict[str, Any]) -> dict[str, Any]:
    """arguments: work; model: with its config; num_tokens; matrix_size: of a product that shows the ceiling;
    flush_bytes, most_runs: see timing.py; steps: arguments of training.py, of models so small that the host
    may be what a step waits for."""
    apply_settings()
    with determinism_of_before():
        make_deterministic()  # cuBLAS is told at its first product or never
    bench, points, problems = Bench(arguments), dict[str, dict[str, Any]](), list[str]()
    timer = Timer(bench.device, arguments["flush_bytes"], arguments["most_runs"])

    def attempt(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception:  # whatever it is: what comes after it is to be measured
            problems.append(f"{name}: {error_lines()}")

    def take(ways: Iterator[Way]) -> None:
        for way in ways:
            attempt(f"{way.point}, {way.way}", partial(keep, way))

    def keep(way: Way) -> None:
        points.setdefault(way.point, {})[way.way] = timer.figures(way)

    for point in POINTS:
        attempt(point.__name__, partial(take, point(bench)))
        bench.device.release_cached()
    found: dict[str, Any] = {"runs": {}, "points": points, "remarks": [], "problems": problems}
    for step in arguments["steps"]:
        attempt(step["model"]["name"], partial(_step, step, arguments["work"], found))
    return found


def _step(step: dict[str, Any], work: str, found: dict[str, Any]) -> None:
    """A traced step of a whole model; its trace is not kept."""
    with tempfile.TemporaryDirectory() as out:
        figures = training.measure({**step, "work": work, "out": out})
    (run,) = figures["runs"].values()
    found["runs"][step["model"]["name"]] = run
    found["problems"] += figures["problems"]


if __name__ == "__main__":
    answer(measure)
