"""Other 4-bit codes at about the same bytes: the `codes` section of `benchmarks.accuracy`.

A study of formats that no kernel computes. Every linear layer gets the values that its codes would
stand for, `scale * table[code]`, and the float model runs on them; embedding and head are int8 as
`optimize` packs them. The first two rows are the project's own formats, by its own quantizer; the
others are chosen by one search, which is given sub16's shape as well. A second table has some of
them calibrated: scales by the mean squares of the inputs, codes by error feedback, as `optimize`
does.

Tables have 16 entries. `uniform` is -8..7; `NF4` is that of QLoRA (arXiv 2305.14314); `fitted` are
those of least squared error, one for all layers or one for each. Entries other than uniform's are
rounded to int8, since a kernel would multiply them with int8 activations; `-9..10` is a table whose
products with the multiples of a row's scale are int8 as well.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

import torch_slmops
from benchmarks.recorded import BATCH
from torch_slmops.feedback import Factor, factorize
from torch_slmops.weights import quantize_weight

UNIFORM = torch.arange(-8.0, 8.0)
# The entries up to 10 of least error where the multiple of a row's scale is at most 12, so that
# their product fits int8: found entry by entry on the weights of `make tiny-qwen3`.
SMALL = (-9, -7, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 8, 10)
# Largest |w| of a group over the scale, relative to the largest entry; beyond 1 it is cut off.
RATIOS = (*torch.linspace(0.75, 1.25, 17).tolist(), 1.375, 1.5, 1.75, 2.0)
ROW_RATIOS = (1.0, 0.94, 0.97, 1.02, 1.04, 1.07, 1.12, 1.2)
ROUNDS = 12  # of fitting
ROWS = 128  # of a layer that a table is fitted to
TINY = 1e-30


@dataclass(frozen=True)
class Scales:
    """How groups are scaled.

    Attributes:
        size: Inputs that share a scale.
        bits: Of it: 16 is a float16, fewer a multiple of a float32 per output.
        signed: It may be negative.
        most: The largest multiple, if not what the bits allow.
    """

    size: int
    bits: int
    signed: bool
    most: int | None = None

    @property
    def bits_per_weight(self) -> float:
        """With the codes; without the scale per output and the tables."""
        return 4 + self.bits / self.size


SCALES = {
    "4 bits per 16": Scales(16, 4, False),  # sub16's
    "signed 4 bits per 16": Scales(16, 4, True),
    "6 bits per 16": Scales(16, 6, False),
    "signed 6 bits per 32": Scales(32, 6, True),
    "float16 per 32": Scales(32, 16, True),
}
SMALL_SCALES = Scales(16, 4, False, 12)
TABLES = ("uniform", "NF4", "fitted", "fitted per layer")


def nf4() -> Tensor:
    """NF4's table by its definition: quantiles of a normal distribution, the largest 8."""
    least = 0.9677083
    above = torch.special.ndtri(torch.linspace(least, 0.5, 9, dtype=torch.float64)[:-1])
    below = torch.special.ndtri(torch.linspace(least, 0.5, 8, dtype=torch.float64)[:-1])
    table = torch.cat((-below, torch.zeros(1, dtype=torch.float64), above.flip(0)))
    return as_integers((table * (8 / table.abs().max())).float())


def as_integers(table: Tensor, most: int = 127) -> Tensor:
    """Rounds entries to integers, the largest being `most`; returned with 8 for that one."""
    return torch.round(table * (most / table.abs().max())) * (8 / most)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Index of the entry next to each x."""
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


def _reciprocal(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / x)


def group_scales(x: Tensor, table: Tensor, signed: bool, importance: Tensor) -> Tensor:
    """Scales [N, G] of groups [N, G, size] by the least squared error of several.

    Args:
        x: The weights.
        table: Of codes.
        signed: Whether scales may be negative.
        importance: Of each input, [G, size] or anything that fits.
    """
    amax = x.abs().amax(-1).clamp_min(TINY)
    y = x / amax[..., None]
    best, found = torch.zeros_like(amax), torch.zeros_like(amax)
    for ratio in RATIOS:
        top = float(table.abs().max()) * ratio
        for divisor in (top, -top) if signed else (top,):
            value = table[nearest(y * divisor, table)]
            along, square = (y * value * importance).sum(-1), (value * value * importance).sum(-1)
            scale = along * _reciprocal(square)
            better = along * scale > best
            best = torch.where(better, along * scale, best)
            found = torch.where(better, scale, found)
    return found * amax


def sub_scales(x: Tensor, s: Tensor, table: Tensor, scales: Scales, importance: Tensor) -> Tensor:
    """Scales [N, G] near `s` that are multiples of one number per row, by squared error."""
    most = scales.most or (1 << (scales.bits - scales.signed)) - 1
    least = -most - 1 if scales.signed else 0
    at = s.abs().argmax(1, keepdim=True)
    largest = s.gather(1, at) / (least or most)
    best = torch.full_like(largest, torch.inf)
    found = torch.zeros_like(s)
    for ratio in ROW_RATIOS:
        unit = largest / ratio
        middle = torch.round(s * _reciprocal(unit))
        options = [(middle + step).clamp(least, most) * unit for step in (0, -1, 1)]
        errors = torch.stack([_error(x, option, table, importance) for option in options])
        error, which = errors.min(0)
        chosen = torch.stack(options).gather(0, which[None])[0]
        total = error.sum(1, keepdim=True)
        found = torch.where(total < best, chosen, found)
        best = torch.minimum(total, best)
    return found


def _error(x: Tensor, s: Tensor, table: Tensor, importance: Tensor) -> Tensor:
    return ((_rounded(x, s, table) - x).square() * importance).sum(-1)


def _rounded(x: Tensor, s: Tensor, table: Tensor) -> Tensor:
    return table[nearest(x * _reciprocal(s)[..., None], table)] * s[..., None]


def scales_of(w: Tensor, table: Tensor, scales: Scales, mean_square: Tensor | None) -> Tensor:
    """Scales [N, G] of a weight [N, K], by its inputs' mean squares [K] if these are given."""
    x = w.unflatten(1, (-1, scales.size))
    importance = torch.ones(())
    if mean_square is not None:
        importance = mean_square.clamp_min(TINY).unflatten(0, (-1, scales.size))
    s = group_scales(x, table, scales.signed, importance)
    return s.half().float() if scales.bits == 16 else sub_scales(x, s, table, scales, importance)


def round_weight(w: Tensor, table: Tensor, scales: Scales) -> Tensor:
    """What a weight [N, K] becomes in codes of `table` with `scales`; K a multiple of the group."""
    s = scales_of(w, table, scales, None)
    return _rounded(w.unflatten(1, (-1, scales.size)), s, table).flatten(1)


@dataclass(frozen=True)
class Inputs:
    """What a layer gets: the mean square of each input, [K], and the factor of their moments."""

    mean_square: Tensor
    factor: Factor


def inputs_of(original: nn.Module, windows: Tensor) -> dict[str, Inputs]:
    """Those of the linear layers while the model reads windows of tokens, by name."""
    sums: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        rows = args[0].flatten(0, -2)
        sums[name] = sums.get(name, 0) + rows.t() @ rows

    layers = linear_layers(original).items()
    hooks = [m.register_forward_pre_hook(functools.partial(add, name)) for name, m in layers]
    with torch.no_grad():
        for batch in windows.split(BATCH):
            original(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    moments = {name: total / windows.numel() for name, total in sums.items()}
    return {name: Inputs(h.diagonal().clone(), factorize(h)) for name, h in moments.items()}


def round_with_feedback(w: Tensor, inputs: Inputs, table: Tensor, scales: Scales) -> Tensor:
    """As `round_weight`, each input making up for the errors of those before; see feedback.py."""
    steps = scales_of(w, table, scales, inputs.mean_square)
    wanted = w.t().double()[inputs.factor.order]
    error, found = torch.zeros_like(wanted), torch.empty_like(w.t())
    for i, k in enumerate(inputs.factor.order.tolist()):
        target = wanted[i] + inputs.factor.ratio[:i, i] @ error[:i]
        step = steps[:, k // scales.size]
        found[k] = _rounded(target.float()[:, None], step, table)[:, 0]
        error[i] = wanted[i] - found[k].double()
    return found.t()


def fit(weights: Sequence[Tensor], size: int, signed: bool) -> Tensor:
    """The table of least squared error for groups of `size`; every weight counts alike.

    Scales and entries are chosen in turn, as in k-means, from NF4's table on.
    """
    rows = [w[:: -(-len(w) // ROWS)] for w in weights]
    x = torch.cat(
        [(w / w.square().mean().sqrt()).unflatten(1, (-1, size)).flatten(0, 1) for w in rows]
    )
    table = nf4()
    for _ in range(ROUNDS):
        s = group_scales(x, table, signed, torch.ones(()))[..., None]
        codes = nearest(x * _reciprocal(s), table).flatten()
        along = torch.bincount(codes, (x * s).flatten(), 16)
        square = torch.bincount(codes, s.square().expand_as(x).flatten(), 16)
        table = torch.where(square > 0, along / square, table)
        table = table * (8 / table.abs().max())
    return table


Rounding = Callable[[Tensor], Tensor]
Roundings: TypeAlias = Rounding | dict[str, Rounding]


def own(scale_kind: str) -> Rounding:
    """What `optimize` makes of a weight in int4 without calibration."""
    return lambda w: quantize_weight(w, 4, scale_kind).dequantize()


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers without the head, by name."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return {name: m for name, m in layers if m is not output}


def rounded(original: nn.Module, rounding: Roundings) -> nn.Module:
    """A float model with rounded layers; embedding and head are those of `optimize`.

    Args:
        original: The float32 model; it stays as it is.
        rounding: For all layers, or for each by its name.
    """
    model = torch_slmops.optimize(copy.deepcopy(original), activations="float", progress=False)
    torch_slmops.dequantize(model)
    layers = linear_layers(original)
    with torch.no_grad():
        for name, layer in linear_layers(model).items():
            make = rounding[name] if isinstance(rounding, dict) else rounding
            layer.weight.copy_(make(layers[name].weight))
    return model


def signal_to_noise(original: nn.Module, model: nn.Module) -> float:
    """Mean over the linear layers of the weights' signal-to-noise ratio in dB."""
    pairs = zip(linear_layers(original).values(), linear_layers(model).values(), strict=True)
    with torch.no_grad():
        ratios = [a.weight.square().sum() / (b.weight - a.weight).square().sum() for a, b in pairs]
    return float(10 * torch.stack(ratios).log10().mean())


def formats(original: nn.Module) -> Iterator[tuple[str, float, Roundings]]:
    """Name, bits per weight and rounding of each row of the table."""
    yield "int4 sub16", 4.25, own("sub16")
    yield "int4 group 32", 4.5, own("group")
    small = as_integers(torch.tensor(SMALL), max(SMALL))
    rounding = functools.partial(round_weight, table=small, scales=SMALL_SCALES)
    yield "-9..10, 4 bits to 12 per 16", SMALL_SCALES.bits_per_weight, rounding
    weights = {name: layer.weight.detach() for name, layer in linear_layers(original).items()}

    @functools.cache
    def fitted(size: int, signed: bool) -> Tensor:
        return as_integers(fit(list(weights.values()), size, signed))

    @functools.cache
    def fitted_to(name: str, size: int, signed: bool) -> Tensor:
        return as_integers(fit([weights[name]], size, signed))

    for kind in TABLES:
        for told, scales in SCALES.items():
            size, signed = scales.size, scales.signed
            if kind == "fitted per layer":
                tables = {name: fitted_to(name, size, signed) for name in weights}
            else:
                every = {"uniform": lambda: UNIFORM, "NF4": nf4}.get(kind)
                table = fitted(size, signed) if every is None else every()
                tables = dict.fromkeys(weights, table)
            each: dict[str, Rounding] = {
                name: functools.partial(round_weight, table=one, scales=scales)
                for name, one in tables.items()
            }
            yield f"{kind}, {told}", scales.bits_per_weight, each


def calibrated(original: nn.Module, windows: Tensor) -> Iterator[tuple[str, float, Roundings]]:
    """Those of the second table, in the shape of sub16; calibrated on windows of tokens."""
    weights = {name: layer.weight.detach() for name, layer in linear_layers(original).items()}
    inputs = inputs_of(original, windows)
    scales = SCALES["4 bits per 16"]
    tables = {
        "uniform": (UNIFORM, scales),
        "-9..10": (as_integers(torch.tensor(SMALL), max(SMALL)), SMALL_SCALES),
        "NF4": (nf4(), scales),
        "fitted": (as_integers(fit(list(weights.values()), scales.size, scales.signed)), scales),
    }
    for name, (entries, shape) in tables.items():
        each: dict[str, Rounding] = {
            layer: functools.partial(
                round_with_feedback, inputs=inputs[layer], table=entries, scales=shape
            )
            for layer in weights
        }
        yield f"{name}, calibrated", shape.bits_per_weight, each


def table(
    original: nn.Module,
    columns: Sequence[str],
    measure: Callable[[nn.Module], Sequence[str]],
    windows: Tensor | None = None,
) -> None:
    """Prints a row per format: bits, the weights' noise, and what `measure` says of the model."""
    print("\nOther 4-bit codes; embedding and head int8, float activations\n")
    print(f"| format | bits per weight | weights, dB | {' | '.join(columns)} |")
    print("|---" * (3 + len(columns)) + "|", flush=True)
    more = () if windows is None else calibrated(original, windows)
    for name, bits, rounding in itertools.chain(formats(original), more):
        model = rounded(original, rounding)
        noise = signal_to_noise(original, model)
        cells = (name, f"{bits:g}", f"{noise:.2f}", *measure(model))
        print(f"| {' | '.join(cells)} |", flush=True)
