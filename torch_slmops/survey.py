"""What is in a model: the modules that can be packed, those that cannot, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

from torch_slmops.foreign import source_of
from torch_slmops.hooks import HOOKS
from torch_slmops.modules import PackedModule
from torch_slmops.weights import FLOAT_DTYPES

__all__ = [
    "Patterns",
    "Site",
    "check_model",
    "chooser",
    "find_sites",
    "listed",
    "spelled",
    "weight_key",
]

# Names as fnmatch patterns, or a function of the qualified name.
Patterns: TypeAlias = str | Iterable[str] | Callable[[str], bool]

# Packages whose modules hold weights that are quantized already.
_QUANTIZERS = (
    "aqlm",
    "auto_gptq",
    "auto_round",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "gptqmodel",
    "hqq",
    "optimum.gptq",
    "optimum.quanto",
    "quanto",
    "torch.ao",
    "torchao",
    "transformers.integrations",
)
# Their layers may have brought the codes into the order of a kernel, which the layer does not tell.
_READ_FROM_DISK = ("auto_gptq", "awq", "gptqmodel", "optimum.gptq", "gptq")
_ADVICE = (
    "read its codes from the checkpoint instead, with torch_slmops.from_checkpoint(folder), or "
    "load it unquantized"
)


@dataclass(frozen=True, eq=False)
class Site:
    """A module that holds a weight of two or more dimensions.

    Attributes:
        module: The module.
        names: Its qualified names: more than one where it is shared.
        is_head: It gives the model's output logits or looks up embeddings, or shares its weight
            with such a module.
        obstacle: Why it cannot be packed, or None if it can or is packed already.
    """

    module: nn.Module
    names: tuple[str, ...]
    is_head: bool
    obstacle: str | None

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    @property
    def is_packed(self) -> bool:
        """Whether `optimize` has been here."""
        return isinstance(self.module, PackedModule)


def find_sites(model: nn.Module) -> list[Site]:
    """Returns the modules of `model` that hold a weight matrix, packed or not, in its order."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    holders = [module for module in names if _holds_matrix(module)]
    heads = _output_layers(names)
    heads.update(module for module in holders if _is_embedding(module))
    keys = {module: weight_key(w) for module in names if (w := _own_weight(module)) is not None}
    tied = {keys[module] for module in heads if module in keys}
    heads.update(module for module in holders if keys.get(module) in tied)
    return [
        Site(module, tuple(names[module]), module in heads, _obstacle(module)) for module in holders
    ]


def weight_key(weight: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are the same memory seen alike: one packed buffer serves them."""
    # On the meta device all addresses are 0; their storages are objects of their own.
    address = weight.data_ptr() or weight.untyped_storage()._cdata
    return address, tuple(weight.shape), weight.stride(), weight.dtype


def chooser(
    sites: list[Site], blocks: Iterable[str], include: Patterns | None, exclude: Patterns | None
) -> tuple[Callable[..., bool], Callable[..., bool]]:
    """Returns which modules `include` (None: all) names, and which `exclude` (None: none) does.

    Args:
        sites: What patterns are meant for: an error shows their names.
        blocks: Other names that patterns may match.
        include: Names to choose.
        exclude: Names to leave.

    Returns:
        Two functions of all the names of a module: included, and excluded.

    Raises:
        ValueError: A pattern matches none of the names.
        TypeError: Neither patterns nor a function.
    """
    names = [*(name for site in sites for name in site.names), *blocks]
    included = _matching("include", include, sites, names, default=True)
    excluded = _matching("exclude", exclude, sites, names, default=False)
    return lambda *names: included(names), lambda *names: excluded(names)


def listed(patterns: Patterns | None) -> Patterns | None:
    """Returns `patterns` as something that can be gone through again and again."""
    if patterns is None or isinstance(patterns, str) or callable(patterns):
        return patterns
    return tuple(patterns)


def spelled(patterns: Patterns | None, names: Iterable[str]) -> str | list[str] | None:
    """Returns `patterns` as text: of a function, those of `names` that it chooses."""
    if patterns is None or isinstance(patterns, str):
        return patterns
    if callable(patterns):
        return sorted(filter(patterns, names))
    return sorted(patterns)


def _matching(
    argument: str,
    patterns: Patterns | None,
    sites: list[Site],
    known: list[str],
    default: bool,
) -> Callable[[Iterable[str]], bool]:
    if patterns is None:
        return lambda names: default
    if callable(patterns):
        chosen = patterns
        return lambda names: any(chosen(name) for name in names)
    listed = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    if not all(isinstance(pattern, str) for pattern in listed):
        raise TypeError(f"{argument}: expected patterns of names or a function, got {patterns!r}")
    for pattern in listed:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"{argument}: expected patterns (as in fnmatch) that match the name of a layer, "
                f"got {pattern!r}; the layers are named like {_some_names(sites)}"
            )
    return lambda names: any(fnmatchcase(name, one) for name in names for one in listed)


def _some_names(sites: list[Site]) -> str:
    return ", ".join(repr(site.name) for site in sites[:3] + sites[-1:]) or "nothing: it has none"


def check_model(model: object) -> None:
    """Raises unless `model` is one that `optimize` can work on; see there."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: expected an nn.Module, got a {type(model).__name__}")
    if type(model) in (nn.Linear, nn.Embedding):
        raise ValueError(
            f"optimize: a lone {type(model).__name__} has no parent to be replaced in; wrap it, as "
            "in nn.Sequential(module)"
        )
    _check_unquantized(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if source_of(tensor) is not None:
            continue
        if tensor.device.type == "meta":
            raise ValueError(
                f"optimize: {name} is on the meta device and has no values; load the weights first "
                "(a model that is offloaded, or dispatched by device_map, has to be on the CPU)"
            )
        if tensor.device.type != "cpu":
            raise ValueError(
                f"optimize: expected a model on the CPU, got {name} on {tensor.device}; packed "
                'weights run on the CPU only: call model.to("cpu") first'
            )
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        what = f"its module {training!r}" if training else "it"
        raise ValueError(
            f"optimize: the model is in training mode ({what} is), and packed weights are for "
            "inference: call model.eval() first"
        )


def _check_unquantized(model: nn.Module) -> None:
    ours = getattr(getattr(model, "hf_quantizer", None), "is_slmops", False)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if getattr(model, mark, None) and not ours:
            raise ValueError(
                f"optimize: the model is quantized already (its {mark} is set); {_advice(model)}"
            )
    for name, module in model.named_modules():
        package = type(module).__module__
        if _is_of(package, _QUANTIZERS):
            advice = _ADVICE if _is_of(package, _READ_FROM_DISK) else "load it unquantized"
            raise ValueError(
                f"optimize: {name or 'the model'} is a {package}.{type(module).__qualname__}: the "
                f"model is quantized, or prepared for it, already; {advice}"
            )
        for key, parameter in module._parameters.items():
            if parameter is None or type(parameter) in (nn.Parameter, Tensor):
                continue
            raise ValueError(
                f"optimize: {name}.{key} is a {type(parameter).__name__}, not a plain parameter: "
                "the model is quantized, sharded or not initialized; load it as plain tensors"
            )


def _is_of(package: str, packages: Iterable[str]) -> bool:
    return any(package == one or package.startswith(one + ".") for one in packages)


def _advice(model: nn.Module) -> str:
    """What to do with a model that transformers says is quantized."""
    method = getattr(model, "quantization_method", "")
    known = str(getattr(method, "value", method)) in _READ_FROM_DISK
    return _ADVICE if known else "load it unquantized"


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _own_weight(module: nn.Module) -> Tensor | None:
    return module._parameters.get("weight")


def _holds_matrix(module: nn.Module) -> bool:
    if isinstance(module, PackedModule | nn.Linear | nn.Embedding):
        return True
    return any(p is not None and p.dim() >= 2 for p in module._parameters.values())


def _output_layers(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """The modules that transformers calls output embeddings."""
    found: set[nn.Module] = set()
    for module in modules:
        get = getattr(module, "get_output_embeddings", None)
        if get is None:
            continue
        try:
            head = get()
        except (AttributeError, NotImplementedError):  # a model without such a layer may say so
            continue
        if isinstance(head, nn.Module):
            found.add(head)
    return found


def _obstacle(module: nn.Module) -> str | None:
    """Why `module` cannot be packed, or None."""
    if isinstance(module, PackedModule):
        return None
    kind = type(module)
    if kind not in (nn.Linear, nn.Embedding):
        for base in (nn.Linear, nn.Embedding):
            if isinstance(module, base):
                return f"a subclass of nn.{base.__name__} that may compute something else"
        return "not an nn.Linear or nn.Embedding"
    if "forward" in vars(module):
        return "its forward was replaced"
    if any(getattr(module, hooks, None) for hooks in HOOKS):
        return "it has hooks, which may change its input, output or weight"
    weight = _own_weight(module)
    if weight is None:
        return "its weight is not a parameter of its own"
    if weight.numel() == 0:
        return "its weight is empty"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm changes its rows as they are used"
    bias = getattr(module, "bias", None)
    if bias is not None and bias.dtype not in FLOAT_DTYPES:
        return f"its bias is {str(bias.dtype).removeprefix('torch.')}"
    return None
