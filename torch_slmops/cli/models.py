"""MODEL of the command line: what it names, how it is loaded, and how it is optimized."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch_slmops.cli.screen import USAGE, Screen, UserError

__all__ = [
    "METHODS",
    "Loaded",
    "add_model_options",
    "load",
    "load_float",
    "locate",
    "prepare_transformers",
    "read_texts",
    "require_transformers",
]

# Of checkpoints whose codes from_checkpoint takes over.
METHODS = ("gptq", "awq", "compressed-tensors", "bitsandbytes")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_DTYPES = ("auto", "float32", "bfloat16", "float16")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Source:
    """Where a model lies: a folder or hub id for transformers, and a GGUF file in it."""

    name: str
    folder: str
    gguf: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.gguf is None else {"gguf_file": self.gguf}


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Attributes:
        source: What was loaded.
        model: The transformers model, optimized unless --no-optimize.
        tokenizer: Its tokenizer, or None where the model has none.
        was_packed: Whether it was packed already, so that the options of quantization had no use.
        seconds: How long reading and packing took.
    """

    source: Source
    model: Any
    tokenizer: Any
    was_packed: bool
    seconds: float


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and what says how to load and quantize it; the names are those of `optimize`."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or a .gguf file")
    group = parser.add_argument_group("quantization (torch_slmops.optimize)")
    group.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="of what stays float; auto: the checkpoint"
    )
    group.add_argument("--weights", choices=("int4", "int8"), default="int4")
    group.add_argument("--lm-head", choices=("int4", "int8", "none"), default="int8")
    group.add_argument("--scale-kind", choices=("sub16", "group"))
    group.add_argument("--group-size", type=int, metavar="N", help="inputs that share a scale")
    group.add_argument("--asymmetric", action="store_true", help="with zero points")
    group.add_argument(
        "--activations",
        choices=("int8", "float", "float_fast"),
        help="default: int8 where it serves",
    )
    group.add_argument("--act-group", type=int, choices=(32, 64, 128, -1))
    group.add_argument("--include", action="append", metavar="PATTERN", help="layers to pack")
    group.add_argument("--exclude", action="append", metavar="PATTERN", help="layers to leave")
    group.add_argument("--kv-cache", choices=("int8",), help="keys and values in half the memory")
    group.add_argument("--no-fuse", action="store_true", help="only replace layers one by one")
    group.add_argument("--strict", action="store_true", help="fail if anything would be left")
    group.add_argument(
        "--calibration", type=Path, action="append", metavar="FILE", help="text for better codes"
    )
    group.add_argument("--no-optimize", action="store_true", help="run the model as it is")


def require_transformers() -> None:
    """Raises a UserError where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError("this command needs transformers: pip install 'torch_slmops[hf]'")


def load(
    args: argparse.Namespace,
    screen: Screen,
    *,
    wants_tokenizer: bool = True,
    budget: Mapping[str, Any] | None = None,
) -> Loaded:
    """Loads the model of the command line, and optimizes it if it is not packed yet.

    A float checkpoint of safetensors is packed while it is read, layer by layer, unless codes are
    chosen on text. Codes of another tool are taken over, of a .gguf file unless codes are chosen on
    text: then it is read as floats first.

    Args:
        args: The options of `add_model_options`.
        screen: For remarks.
        wants_tokenizer: Whether the command needs a tokenizer.
        budget: `max_kl` and what belongs to it, for `optimize`.

    Raises:
        UserError: There is no such model, it cannot be read, or an option does not suit it.
    """
    from torch_slmops.modules import PackedModule

    source = locate(args.model)
    texts = None if args.calibration is None else read_texts("--calibration", args.calibration)
    prepare_transformers()
    options = _quantization(args)
    start = time.perf_counter()
    config = _guarded(source, lambda: _load_config(source))
    method = _method(config)
    on_text = texts is not None or budget is not None
    streamed = options if not on_text and source.gguf is None and method is None else None
    foreign = method in METHODS or (source.gguf is not None and not on_text)
    if foreign and options is not None:
        _refuse_choice(source, on_text)
        taken = options | {"progress": sys.stderr.isatty()}
        model = _guarded(source, lambda: _load_foreign(source, args.dtype, taken))
    else:
        model = _guarded(source, lambda: _load_model(source, config, args.dtype, streamed)).eval()
    tokenizer = None
    if wants_tokenizer or on_text:
        tokenizer = _guarded(source, lambda: _load_tokenizer(source))
    packed = any(isinstance(module, PackedModule) for module in model.modules())
    was_packed = packed and streamed is None and not foreign
    if was_packed:
        screen.note(f"{args.model} is packed already")
    elif not packed and options is not None:
        _optimize(model, options | dict(budget or {}), texts, tokenizer)
    return Loaded(source, model, tokenizer, was_packed, time.perf_counter() - start)


def load_float(name: str, dtype: str) -> Any:
    """Loads a model and leaves it as it is; the errors of `load`."""
    source = locate(name)
    prepare_transformers()
    config = _guarded(source, lambda: _load_config(source))
    return _guarded(source, lambda: _load_model(source, config, dtype, None)).eval()


def locate(name: str) -> Source:
    """Returns where a model lies; a UserError where there is none, unless it may be a hub id."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(
                f"{name}: expected a folder, a hub id or a .gguf file, got another file"
            )
        return Source(name, str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name}: expected a folder with a config.json, found none in it")
        return Source(name, str(path))
    looks_like_a_path = name.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors")
    if looks_like_a_path or _HUB_ID.fullmatch(name) is None:
        raise UserError(f"{name}: no such folder or file")
    return Source(name, name)


def read_texts(option: str, files: list[Path]) -> list[str]:
    """The texts of an option's files; a UserError where one cannot be read."""
    try:
        return [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: expected text files in UTF-8: {error}") from error


def _method(config: Any) -> str | None:
    """The `quant_method` of a model's config; None where it is not quantized."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    settings = found if isinstance(found, Mapping) else found.to_dict()
    return str(settings.get("quant_method", "")).lower()


def _refuse_choice(source: Source, on_text: bool) -> None:
    if on_text:
        raise UserError(
            f"{source.name}: --calibration and --max-kl choose codes, and this checkpoint has "
            "codes already",
            USAGE,
        )


def _load_foreign(source: Source, dtype: str, options: dict[str, Any]) -> Any:
    """A packed model with the codes of another tool."""
    from torch_slmops import from_checkpoint

    path = source.folder if source.gguf is None else Path(source.folder) / source.gguf
    return from_checkpoint(path, dtype=dtype, **options)


def prepare_transformers() -> None:
    """Quietens transformers but for errors and, on a terminal, progress bars.

    Raises:
        UserError: transformers is not installed.
    """
    require_transformers()
    for name in ("torchao", "torch.utils._pytree"):  # what importing transformers imports warns of
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as theirs

    transformers_logging: Any = theirs
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers|torch|torchao")


def _load_config(source: Source) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source.folder, **source.options)


def _load_model(source: Source, config: Any, dtype: str, packing: dict[str, Any] | None) -> Any:
    """The model, packed while it is read where `packing` has the arguments of `optimize`."""
    import torch
    import transformers

    names = config.architectures or [""]
    found = getattr(transformers, names[0], transformers.AutoModelForCausalLM)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    if source.gguf is not None:
        return _load_gguf(found, source, wanted)
    if packing is None:
        return found.from_pretrained(source.folder, dtype=wanted)
    from torch_slmops import SlmopsConfig

    plan = SlmopsConfig(**packing)
    return found.from_pretrained(source.folder, dtype=wanted, quantization_config=plan)


def _load_gguf(model_class: Any, source: Source, dtype: Any) -> Any:
    """A plain float model: transformers dequantizes all of it, and its marks of that are taken off.

    They would say that the model is quantized, and what is saved afterwards that it is a GGUF.
    """
    from transformers import GgufConfig

    plain = GgufConfig(dequantize=True)
    model = model_class.from_pretrained(
        source.folder, dtype=dtype, quantization_config=plain, **source.options
    )
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    vars(model.config).pop("quantization_config", None)
    return model


def _load_tokenizer(source: Source) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source.folder, **source.options)


def _guarded(source: Source, read: Callable[[], _T]) -> _T:
    """Makes one line of what transformers says about a model that it cannot read."""
    from safetensors import SafetensorError

    try:
        return read()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        what = " ".join(lines) or type(error).__name__
        if source.name == source.folder and not Path(source.folder).is_dir():
            what = f"no such folder, and as a hub id it cannot be had: {what}"
        raise UserError(f"{source.name}: {what}") from error


def _quantization(args: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of `optimize`, checked; None with --no-optimize."""
    from torch_slmops.plan import make_formats

    if args.no_optimize:
        return None
    formats = {
        "weights": args.weights,
        "scale_kind": args.scale_kind,
        "group_size": args.group_size,
        "symmetric": not args.asymmetric,
        "activations": args.activations,
        "act_group": args.act_group,
        "lm_head": None if args.lm_head == "none" else args.lm_head,
    }
    try:
        make_formats(**formats)
    except (ValueError, TypeError) as error:
        raise UserError(str(error), USAGE) from error
    chosen = {"include": args.include, "exclude": args.exclude, "kv_cache": args.kv_cache}
    return formats | chosen | {"fuse": not args.no_fuse, "strict": args.strict}


def _optimize(model: Any, options: dict[str, Any], texts: list[str] | None, tokenizer: Any) -> None:
    from torch_slmops.optimize import optimize

    try:
        optimize(
            model,
            **options,
            calibration=texts,
            tokenizer=tokenizer,
            progress=sys.stderr.isatty(),
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error), USAGE) from error
