"""All LoRA parameters of a model in three flat buffers.

    masters    fp32            updated by the optimizer, and saved
    working    compute dtype   used by the forward pass; the A and B of each module are views of it
    gradient   fp32            backward adds to it; each module holds views of it

N = sum over modules of R (in + out) elements, E times as many for a matrix of E experts (expert_lora.py): 4 N
+ 4 N bytes for masters and gradient and 2 N for a 16-bit working copy (in fp32 the working copy *is* the
masters). One cast per optimizer step, one norm for clipping, one optimizer launch per learning-rate group,
one all-reduce. Separate tensors per module would need hundreds of small launches, and bitsandbytes' paging
and 8-bit state only apply to tensors above a size that a single A or B does not reach.

Order: every A first (by layer, then module), then the rows of trained tokens (token_rows.py), then every B,
so that LoRA+ (Hayou et al. 2024, arXiv:2402.12354), which gives B a higher learning rate than A, has two
contiguous parameter groups. With DoRA (model/magnitude.py) every m [out] follows, in the group of B and with
its weight decay, as in PEFT. m is used in fp32, as the masters have it; all else is read from the working
copy. Row norms are two more buffers of fp32, 8 bytes per row. With `lora_bias` every b [out] has the place of
m, and is read from the working copy.

Initialized as in PEFT: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B zero, so the adapted model
starts equal to the base, b zero, and m by the first forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from qlora_train.adapter.adapter_config import AdapterConfig
from qlora_train.adapter.expert_parameters import refuse_older_orientation
from qlora_train.errors import BaseModelError
from qlora_train.model.expert_lora import ExpertStack
from qlora_train.model.linear import DropoutContext, FrozenLinear, LinearLora
from qlora_train.model.magnitude import Magnitude

Adaptable = FrozenLinear | ExpertStack


class LoraParameters:
    """The LoRA parameters of `linears`, which may be matrices of experts too, in flat buffers, attached to
    each as views (`linear.lora`).

    rank: R. scaling: s; both either one number or one per linear by name. dropout: probability. seed: it
    decides the first values of A. dtype: that of the working copy. use_dora: every linear has a magnitude;
    dropout must be 0 with it. lora_bias: every B has a bias instead. None of them goes with experts.
    token_rows: what the rows of trained tokens begin with, fp32 [n, D] by module path of embedding and head.
    An existing `linear.lora` is replaced.
    """

    def __init__(
        self,
        linears: Mapping[str, Adaptable],
        *,
        rank: int | Mapping[str, int],
        scaling: float | Mapping[str, float],
        dropout: float,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        use_dora: bool = False,
        lora_bias: bool = False,
        token_rows: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        assert not (use_dora and dropout), "the base's product would be of what is dropped, too"
        self._experts = {n: m for n, m in linears.items() if isinstance(m, ExpertStack)}
        assert not (self._experts and (use_dora or lora_bias or dropout))
        self.scaling = scaling
        self.names = tuple(linears)
        self.ranks = {name: rank if isinstance(rank, int) else rank[name] for name in linears}
        self._shapes: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
        for name, linear in linears.items():
            rank_of_all = self.ranks[name] * linear.num_matrices
            self._shapes[name] = ((rank_of_all, linear.in_features), (linear.out_features, rank_of_all))
        self._row_shapes = {path: tuple(rows.shape) for path, rows in token_rows.items()}
        self._num_a = sum(math.prod(a) for a, _ in self._shapes.values())
        self.first_b = self._num_a + sum(map(math.prod, self._row_shapes.values()))
        self._num_ab = self.first_b + sum(math.prod(b) for _, b in self._shapes.values())
        num_rows = sum(linear.out_features for linear in linears.values())
        self._has_rows, self._has_biases = use_dora or lora_bias, lora_bias
        num_elements = self._num_ab + (num_rows if self._has_rows else 0)
        self.masters = torch.zeros(num_elements, dtype=torch.float32, device=device)
        self.gradient = torch.zeros_like(self.masters)
        self.working = self.masters if dtype == torch.float32 else torch.zeros_like(self.masters, dtype=dtype)
        self.row_norms, self._base_squares = (
            torch.zeros(num_rows if use_dora else 0, dtype=torch.float32, device=device) for _ in range(2)
        )
        self.dropout_context = DropoutContext()
        if not self.masters.is_meta:
            self._initialise(seed, token_rows)
        self._magnitudes: dict[str, Magnitude] = dict(self._make_magnitudes()) if use_dora else {}
        self._attach(linears, dropout)
        self.refresh_working()

    @staticmethod
    def of_adapter(
        linears: Mapping[str, Adaptable],
        config: AdapterConfig,
        lora: Mapping[str, tuple[Tensor, ...]],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> LoraParameters:
        """The LoRA parameters of a finished adapter, without dropout, attached to the linears that it adapts.

        lora: (A, B), with DoRA or biases a third, by the names of `linears`, and (rows,) of trained tokens.
        Raises `BaseModelError` if shapes differ."""
        targets = {name: linear for name, linear in linears.items() if name in lora}
        buffers = LoraParameters(
            targets,
            rank={name: config.rank_of(name) for name in targets},
            scaling={name: config.scaling_of(name) for name in targets},
            dropout=0.0,
            seed=0,
            dtype=dtype,
            device=device,
            use_dora=config.use_dora,
            lora_bias=config.lora_bias,
            token_rows={path: tensors[0] for path, tensors in lora.items() if len(tensors) == 1},
        )
        buffers.load(lora)
        return buffers

    def views(self, flat: Tensor) -> dict[str, tuple[Tensor, ...]]:
        """{module name: (A [R, in], B [out, R]), with DoRA or biases a third [out], of experts (A [E R, in],
        B [out, R E]), or (rows of tokens [n, D],)} as views of `flat`, one of the flat buffers."""
        pairs: dict[str, tuple[Tensor, ...]] = {}
        at_a, at_b = 0, self.first_b
        for name, (shape_a, shape_b) in self._shapes.items():
            size_a, size_b = math.prod(shape_a), math.prod(shape_b)
            pairs[name] = (flat[at_a : at_a + size_a].view(shape_a), flat[at_b : at_b + size_b].view(shape_b))
            at_a, at_b = at_a + size_a, at_b + size_b
        of_rows = self._of_rows(flat[self._num_ab :])
        adapted = {name: (*pair, *of_rows.get(name, ())) for name, pair in pairs.items()}
        return adapted | {path: (rows,) for path, rows in self.token_rows(flat).items()}

    def token_rows(self, flat: Tensor) -> dict[str, Tensor]:
        """{path of the embedding or head: rows of tokens [n, D]} as views of one of the flat buffers."""
        parts = flat[self._num_a : self.first_b].split([math.prod(s) for s in self._row_shapes.values()])
        return {
            path: part.view(shape)
            for (path, shape), part in zip(self._row_shapes.items(), parts, strict=True)
        }

    def _of_rows(self, flat: Tensor) -> dict[str, tuple[Tensor]]:
        """{module name: its part [out]} of numbers for every row; empty without DoRA and biases."""
        if not self._has_rows:
            return {}
        parts = flat.split([b[0] for _, b in self._shapes.values()])
        return {name: (part,) for name, part in zip(self._shapes, parts, strict=True)}

    def refresh_working(self) -> None:
        """Cast the masters into the working copy, and compute row norms at the next use; call it once per
        optimizer step."""
        if self.working is not self.masters:
            self.working.copy_(self.masters)
        for magnitude in self._magnitudes.values():
            magnitude.is_stale = True

    def load(self, lora: Mapping[str, tuple[Tensor, ...]]) -> None:
        """Set the masters to an adapter's (A, B), with DoRA or biases a third, by module name. Raises
        `BaseModelError` if modules or shapes differ."""
        views = self.views(self.masters)
        missing, unknown = sorted(views.keys() - lora.keys()), sorted(lora.keys() - views.keys())
        if missing or unknown:
            raise BaseModelError(
                f"the adapter does not fit lora.target_modules: it lacks {missing[:3] or 'nothing'} and has "
                f"{unknown[:3] or 'nothing'} besides; use the adapter's own target_modules"
            )
        of_module = ("A", "B", "bias" if self._has_biases else "m")
        for name, pair in lora.items():
            if (stack := self._experts.get(name)) is not None:
                a, b = (tensor.shape for tensor in pair)
                refuse_older_orientation(name, a, b, stack.in_features, stack.out_features)
            letters = of_module[: len(pair)] if len(pair) > 1 else ("rows of tokens",)
            for letter, mine, given in zip(letters, views[name], pair, strict=True):
                if mine.shape != given.shape:
                    raise BaseModelError(
                        f"the adapter's {name} {letter} is {tuple(given.shape)}, this run needs "
                        f"{tuple(mine.shape)}; "
                        "use the adapter's own rank and base model"
                    )
                mine.copy_(given)
        self.refresh_working()

    def _initialise(self, seed: int, token_rows: Mapping[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for path, rows in self.token_rows(self.masters).items():
            rows.copy_(token_rows[path])
        views = self.views(self.masters)
        for a, *_ in map(views.__getitem__, self.names):
            bound = 1.0 / math.sqrt(a.shape[1])
            a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))
        if not self._has_biases:
            self.masters[self._num_ab :].fill_(math.nan)  # until the base is measured

    def _make_magnitudes(self) -> Iterator[tuple[str, Magnitude]]:
        buffers = self.masters[self._num_ab :], self.gradient[self._num_ab :]
        parts = [self._of_rows(flat) for flat in (*buffers, self.row_norms, self._base_squares)]
        for name in self.names:
            yield name, Magnitude(*(part[name][0] for part in parts))

    def _attach(self, linears: Mapping[str, Adaptable], dropout: float) -> None:
        working, gradient = self.views(self.working), self.views(self.gradient)
        for module_id, (name, linear) in enumerate(linears.items()):
            (a, b, *row), (gradient_a, gradient_b, *gradient_row) = working[name], gradient[name]
            linear.lora = LinearLora(
                a,
                b,
                gradient_a,
                gradient_b,
                scaling=self.scaling[name] if isinstance(self.scaling, Mapping) else self.scaling,
                dropout_probability=dropout,
                module_id=module_id,
                context=self.dropout_context,
                magnitude=self._magnitudes.get(name),
                bias=(row[0], gradient_row[0]) if self._has_biases else None,
            )
