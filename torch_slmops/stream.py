"""Quantizing a model while transformers loads it, tensor by tensor.

What `optimize` would do is planned on the skeleton, whose weights are on the meta device. As soon
as all tensors of a layer or of a fused block are there, it is packed, and they are let go. What
needs the whole model (tied weights, norms, rotary tables) is left for the end. So is the look at
the activations, which then are those of the packed model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from torch_slmops import memory
from torch_slmops.activation_check import refine
from torch_slmops.attention import use_own_attention
from torch_slmops.carry_out import Codes, carry_out
from torch_slmops.fuse import TABLES, Block, Left
from torch_slmops.fused import AttentionSpec, ExpertsSpec
from torch_slmops.notes import note_left, note_options
from torch_slmops.plan import Work, make_formats, plan_work
from torch_slmops.progress import progress_bar
from torch_slmops.rebuild import real_tensors
from torch_slmops.survey import Site, weight_key

__all__ = ["Stream"]


@dataclass(eq=False)
class Unit:
    """A layer or a block that is packed at once.

    Attributes:
        work: What is done to it.
        missing: The names of its parameters that are not there yet.
    """

    work: Work
    missing: set[str] = field(default_factory=set)


class Stream:
    """What takes parameters as they are loaded; transformers calls its `convert`.

    Attributes:
        units: By the name of each parameter that is taken, what it belongs to.
    """

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        """Plans the work on a skeleton.

        Args:
            model: A transformers model with its weights on the meta device.
            options: The arguments of `optimize`, with `strict`.
        """
        self._options = dict(options)
        strict = self._options.pop("strict")
        self._chosen = {name: self._options[name] for name in ("include", "exclude", "fuse")}
        others = (*self._chosen, "kv_cache")
        formats = {k: v for k, v in self._options.items() if k not in others}
        self._formats = make_formats(**formats)
        self.units: dict[str, Unit] = {}
        self._left: dict[str, Left] = {}
        self._error: Exception | None = None
        model.eval()  # as from_pretrained leaves it
        with real_tensors():
            work = plan_work(model, self._formats, **self._chosen, strict=strict)
            self._left = work.left
            self._add_units(model, work)
            # Attention whose one projection is packed in its place, which hides it from a plan.
            first = [b for b in work.blocks if isinstance(b.spec, AttentionSpec) and not b.sites]
            part = replace(work, todo=[], alone=[], blocks=first)
            carry_out(model, part, Codes(), lambda count: None)

    def _add_units(self, model: nn.Module, work: Work) -> None:
        names: dict[nn.Module, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            names.setdefault(module, []).append(name)
        owners: dict[object, int] = {}
        for parameter in dict(model.named_parameters(remove_duplicate=False)).values():
            key = weight_key(parameter)
            owners[key] = owners.get(key, 0) + 1

        def add(part: Work, parameters: list[tuple[nn.Module, str]]) -> None:
            found = []
            for module, leaf in parameters:
                parameter = module._parameters.get(leaf)
                if parameter is None:
                    continue
                if len(names[module]) > 1 or owners[weight_key(parameter)] > 1:
                    return  # shared: at the end
                found.append(f"{names[module][0]}.{leaf}")
            unit = Unit(part, set(found))
            self.units.update(dict.fromkeys(found, unit))

        for site in work.alone:
            if not site.is_head:
                add(replace(work, todo=[site], alone=[site], blocks=[]), _own([site]))
        for block in work.blocks:
            if parameters := _of_block(block):
                part = replace(work, todo=list(block.sites), alone=[], blocks=[block])
                add(part, parameters)

    def convert(
        self, input_dict: dict[str, Any], *args: Any, model: Any, missing_keys: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Takes the parameters in `input_dict`, and packs what is complete.

        Returns:
            Nothing for transformers to put into the model.
        """
        for name, value in input_dict.items():
            if missing_keys is not None:
                missing_keys.discard(name)
            if self._error is None:
                try:
                    self._take(model, name, value[0] if isinstance(value, list) else value)
                except Exception as error:  # transformers would only log it here: see `finish`
                    self._error = error
        return {}

    def _take(self, model: nn.Module, name: str, value: Tensor) -> None:
        unit = self.units[name]
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        before = module._parameters[leaf]
        assert before is not None
        if value.shape != before.shape:
            raise ValueError(
                f"{name}: expected the shape {tuple(before.shape)}, got {tuple(value.shape)}"
            )
        module._parameters[leaf] = _loaded(value)
        unit.missing.discard(name)
        if unit.missing:
            return
        with real_tensors():
            carry_out(model, unit.work, Codes(), lambda count: None)
        for block in unit.work.blocks:
            # transformers would initialize what is not there any more.
            vars(block.module)["_is_hf_initialized"] = True

    def finish(self, model: nn.Module) -> None:
        """Does what is left, when all weights are there.

        Raises:
            ValueError: As `optimize`, or a tensor of another shape; then nothing was packed after.
        """
        if self._error is not None:
            raise self._error
        with real_tensors():
            work = plan_work(model, self._formats, **self._names(), strict=False)
            with progress_bar(work.size, True, "packing weights") as advance:
                carry_out(model, work, Codes(), advance)
        memory.give_back()
        if self._options["activations"] is None and self._options["act_group"] is None:
            refine(model)
        self._options["activations"] = self._options["activations"] or "int8"  # as `optimize` notes
        if self._chosen["fuse"]:
            use_own_attention(model)
            # Only rotary tables could not be judged before; others may hold packed layers by now.
            left = {
                name: now if name.endswith(TABLES) else self._left.get(name, now)
                for name, now in work.left.items()
            }
            note_left(model, left)
        note_options(model, self._options)

    def _names(self) -> dict[str, Any]:
        """Include and exclude as functions: layers that are fused by now have no name any more."""
        return {name: _function(value) for name, value in self._chosen.items()}


def _function(patterns: Any) -> Any:
    if patterns is None or isinstance(patterns, bool):
        return patterns
    from fnmatch import fnmatchcase

    given = [patterns] if isinstance(patterns, str) else list(patterns)
    match: Callable[[str], bool] = lambda name: any(fnmatchcase(name, p) for p in given)  # noqa: E731
    return match


def _own(sites: list[Site]) -> list[tuple[nn.Module, str]]:
    return [(site.module, leaf) for site in sites for leaf in ("weight", "bias")]


def _of_block(block: Block) -> list[tuple[nn.Module, str]]:
    """The parameters that go into the packed weights of a block; none if it has no such weights."""
    if isinstance(block.spec, ExpertsSpec):
        return [(block.module, block.spec.row.gate_up), (block.module, block.spec.row.down)]
    return _own(list(block.sites))


def _loaded(value: Tensor) -> nn.Parameter:
    made: Any = nn.Parameter(value, requires_grad=False)
    made._is_hf_initialized = True
    parameter: nn.Parameter = made
    return parameter
