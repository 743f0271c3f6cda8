"""report: what of a model is packed, what is not and why, and what that means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from torch_slmops.attention import NAME
from torch_slmops.budget import Budget, Choice
from torch_slmops.fuse import looks_like_a_block
from torch_slmops.fused import Fused, FusedAttention
from torch_slmops.isa import isa
from torch_slmops.modules import Embedding, PackedModule
from torch_slmops.notes import budget_of, left_of, was_rotated
from torch_slmops.ops import describe
from torch_slmops.packed_rows import Rows
from torch_slmops.stack import Layers, connects_only
from torch_slmops.survey import Site, find_sites

__all__ = ["FusedRow", "LeftRow", "PackedRow", "Report", "UnfusedRow", "report"]

_ITSELF = "(the model)"  # which has no name

_FAST = " (float_fast)"
# Modules that copy, choose or clear values: the same bits on every CPU.
_EXACT = (
    Layers,
    nn.Dropout,
    nn.Embedding,
    nn.Flatten,
    nn.Identity,
    nn.ModuleDict,
    nn.ModuleList,
    nn.ReLU,
    nn.Sequential,
    nn.Unflatten,
)


@dataclass(frozen=True)
class PackedRow:
    """Packed modules that are alike: one row of the report.

    Attributes:
        name: Their qualified name, with * for the numbers in which they differ.
        count: How many they are.
        was: What stood there, such as "Linear 2048 -> 512 bfloat16".
        now: The packed format.
        bytes_before: Of their weights together, a shared one counted once over the whole report.
        bytes_after: Likewise.
    """

    name: str
    count: int
    was: str
    now: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class LeftRow:
    """Modules with a weight matrix that is not packed, and why."""

    name: str
    count: int
    what: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class FusedRow:
    """Fused blocks that are alike: their names, number and class, and what they are now."""

    name: str
    count: int
    what: str
    now: str


@dataclass(frozen=True)
class UnfusedRow:
    """Blocks that are not fused, and why."""

    name: str
    count: int
    what: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `report` found; `str()` is a table of it.

    Attributes:
        model: The model's class.
        isa: The ISA row in use.
        packed: Rows of packed modules.
        left: Rows of modules that hold a weight matrix and are not packed.
        fused: Rows of fused blocks.
        unfused: Rows of blocks that look like those that are fused elsewhere.
        bytes_before: All parameters and buffers, had nothing been packed.
        bytes_after: All parameters and buffers now.
        not_portable: Classes of modules, with their numbers, that compute by other code than the
            ops of this package; their results may differ between CPUs.
        budget: What `optimize(max_kl=...)` chose, predicted and measured; else None.
        rotated: Whether `rotate` was here before; a model that was saved does not know.
    """

    model: str
    isa: str
    packed: tuple[PackedRow, ...]
    left: tuple[LeftRow, ...]
    fused: tuple[FusedRow, ...]
    unfused: tuple[UnfusedRow, ...]
    bytes_before: int
    bytes_after: int
    not_portable: tuple[tuple[str, int], ...]
    budget: Budget | None = None
    rotated: bool = False

    @property
    def bit_portable(self) -> bool:
        """Whether the whole model gives the same bits on every CPU, as its packed layers do."""
        return not self.not_portable

    def __str__(self) -> str:
        lines = [f"torch_slmops report: {self.model}, ISA row {self.isa}", "", "packed"]
        lines += _table(
            ("layers", "", "was", "now", "MB before", "MB after"),
            [
                (p.name, f"x{p.count}", p.was, p.now, _mb(p.bytes_before), _mb(p.bytes_after))
                for p in self.packed
            ],
        )
        lines += ["", "left as it was"]
        lines += _table(
            ("layers", "", "what", "why", "MB"),
            [(e.name, f"x{e.count}", e.what, e.reason, _mb(e.bytes)) for e in self.left],
        )
        lines += ["", "fused blocks"]
        lines += _table(
            ("blocks", "", "class", "now"),
            [(f.name, f"x{f.count}", f.what, f.now) for f in self.fused],
        )
        if self.unfused:
            lines += ["", "blocks not fused"]
            lines += _table(
                ("blocks", "", "class", "why"),
                [(u.name, f"x{u.count}", u.what, u.reason) for u in self.unfused],
            )
        if self.budget is not None:
            lines += _budget_lines(self.budget)
        if self.rotated:
            lines += ["", "residual stream rotated before (torch_slmops.rotate)"]
        smaller = self.bytes_before / max(self.bytes_after, 1)
        before, after = _mb(self.bytes_before), _mb(self.bytes_after)
        lines += [
            "",
            f"all weights and buffers: {before} MB -> {after} MB ({smaller:.1f} x smaller)",
        ]
        if self.bit_portable:
            lines.append("same bits on every CPU: yes")
        elif any(name.endswith(_FAST) for name, _ in self.not_portable):
            lines.append(
                'same bits on every CPU: no, activations="float_fast" sums in the order that is '
                "fastest on each CPU, within a bound (docs/arithmetic.md)"
            )
        else:
            others = ", ".join(f"{name} x{count}" for name, count in self.not_portable)
            lines.append(
                "same bits on every CPU: the packed layers yes, the whole model not promised; code "
                f"other than this package's computes in {others}"
            )
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """Returns what of `model` is packed, what is left and why; print it for a table.

    It reads the model as it is now, so it serves copies and loaded models too.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: expected an nn.Module, got a {type(model).__name__}")
    sites = find_sites(model)
    packed = _packed_rows(site for site in sites if site.is_packed)
    bytes_after = _model_bytes(model)
    saved = sum(row.bytes_before - row.bytes_after for row in packed)
    ours = {module for module in model.modules() if _is_ours(module)}
    for block in list(ours):
        if isinstance(block, Fused):  # what it passes by, such as an activation
            inner = [block.get_submodule(name) for name in block._inner()]
            ours.update(module for module in inner if not isinstance(module, FusedAttention))
    others = Counter(
        _class(module) + _FAST * _is_fast(module)
        for module in model.modules()
        if module not in ours and type(module) not in _EXACT
    )
    return Report(
        type(model).__name__,
        isa(),
        packed,
        _left_rows(site for site in sites if not site.is_packed),
        _fused_rows(model),
        _unfused_rows(model),
        bytes_after + saved,
        bytes_after,
        tuple(others.items()),
        budget_of(model),
        was_rotated(model),
    )


def _budget_lines(budget: Budget) -> list[str]:
    """The budget, and the KL of its choices, those of alike pieces in one format together."""
    measured = budget.measured
    groups: dict[tuple[str, str], list[Choice]] = {}
    for choice in budget.choices:
        groups.setdefault((_pattern(choice.name), choice.format), []).append(choice)
    ordered = sorted(groups.items(), key=lambda group: -sum(c.kl for c in group[1]))
    return [
        "",
        f"budget: mean KL at most {budget.max_kl:g} nats per token; predicted "
        f"{budget.predicted:.3g}, measured {measured.value:.3g} (95 % interval {measured.low:.3g} "
        f"to {measured.high:.3g}, {budget.tokens} tokens)",
        *_table(
            ("quantized alone", "", "format", "KL", "MB"),
            [
                (
                    pattern if len(choices) > 1 else choices[0].name,
                    f"x{len(choices)}",
                    how,
                    f"{sum(c.kl for c in choices):.2g}",
                    _mb(sum(c.bytes for c in choices)),
                )
                for (pattern, how), choices in ordered
            ],
        ),
    ]


def _is_fast(module: nn.Module) -> bool:
    """Whether its weight is outside of the promise of bits."""
    if isinstance(module, Embedding) or not isinstance(module, PackedModule):
        return False
    return describe(module.packed).activations == "float_fast"


def _is_ours(module: nn.Module) -> bool:
    """Whether it computes with nothing but the ops of this package in fixed order, or exactly."""
    if _is_fast(module):
        return False
    if isinstance(module, FusedAttention):  # else softmax and its two matrix products are torch's
        config: Any = getattr(module, "config", None)
        used = getattr(config, "_attn_implementation", None)
        return module.slmops.row.forward is None and used == NAME
    return isinstance(module, PackedModule | Rows | Fused) or connects_only(module)


def _class(module: nn.Module) -> str:
    """The name of a module's class, as it was before it was fused."""
    kind = type(module).__bases__[1] if isinstance(module, Fused) else type(module)
    return kind.__name__


def _fused_rows(model: nn.Module) -> tuple[FusedRow, ...]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Fused):
            key = (_pattern(name), _class(module), module.describe())
            groups.setdefault(key, []).append(name)
    return tuple(
        FusedRow(pattern if len(names) > 1 else names[0] or _ITSELF, len(names), what, now)
        for (pattern, what, now), names in groups.items()
    )


def _unfused_rows(model: nn.Module) -> tuple[UnfusedRow, ...]:
    notes = left_of(model)
    if notes is None:
        unasked = "optimize was not called, or with fuse=False"
        notes = {
            name: (type(module).__name__, unasked)
            for name, module in model.named_modules()
            if looks_like_a_block(module) and not isinstance(module, Fused)
        }
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, (what, reason) in notes.items():
        groups.setdefault((_pattern(name), what, reason), []).append(name)
    return tuple(
        UnfusedRow(pattern if len(names) > 1 else names[0] or _ITSELF, len(names), what, reason)
        for (pattern, what, reason), names in groups.items()
    )


def _model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared memory counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    sizes = {(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}
    return sum(sizes.values())


def _pattern(name: str) -> str:
    if not name:
        return _ITSELF
    return re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name)


def _group(keyed: Iterable[tuple[tuple[str, ...], Site]]) -> dict[tuple[str, ...], list[Site]]:
    groups: dict[tuple[str, ...], list[Site]] = {}
    for key, site in keyed:
        groups.setdefault((_pattern(site.name), *key), []).append(site)
    return groups


def _row_name(pattern: str, sites: list[Site]) -> str:
    return pattern if len(sites) > 1 else sites[0].name


def _packed_rows(sites: Iterable[Site]) -> tuple[PackedRow, ...]:
    seen: set[int] = set()  # packed buffers that an earlier module has
    rows = []
    groups = _group(((_was(site.module), _now(site.module)), site) for site in sites)
    for (pattern, was, now), members in groups.items():
        before = after = 0
        shared = False
        for site in members:
            module = site.module
            assert isinstance(module, PackedModule)
            if module.packed.data_ptr() in seen:
                shared = True
                continue
            seen.add(module.packed.data_ptr())
            n, k = module.weight.shape
            before += n * k * module.dtype.itemsize
            after += module.packed.numel()
        name = _row_name(pattern, members)
        note = ", shared with a layer above" if shared else ""
        rows.append(PackedRow(name, len(members), was, now + note, before, after))
    return tuple(rows)


def _was(module: nn.Module) -> str:
    assert isinstance(module, PackedModule)
    n, k = module.weight.shape
    dtype = str(module.dtype).removeprefix("torch.")
    if isinstance(module, Embedding):
        return f"Embedding {n} x {k} {dtype}"
    return f"Linear {k} -> {n} {dtype}"


def _now(module: nn.Module) -> str:
    assert isinstance(module, PackedModule)
    notes = ["calibrated"] * module.calibrated + [module.origin] * bool(module.origin)
    return ", ".join([module.format(), *notes])


def _left_rows(sites: Iterable[Site]) -> tuple[LeftRow, ...]:
    def key(site: Site) -> tuple[str, str]:
        unasked = "not chosen (include, exclude, lm_head=None), or optimize was not called"
        return type(site.module).__name__, site.obstacle or unasked

    groups = _group((key(site), site) for site in sites)
    return tuple(
        LeftRow(_row_name(pattern, members), len(members), what, reason, _own_bytes(members))
        for (pattern, what, reason), members in groups.items()
    )


def _own_bytes(sites: Iterable[Site]) -> int:
    parameters = [p for site in sites for p in site.module.parameters(recurse=False)]
    return sum(p.numel() * p.element_size() for p in parameters)


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["  nothing"]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    numeric = [title.startswith("MB") for title in head]

    def line(row: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return "  " + "  ".join(cells).rstrip()

    return [line(row) for row in (head, *rows)]
