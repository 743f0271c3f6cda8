"""Writes docs/reference.md: signatures and docstrings of what users call.

    python tools/write_reference.py

A test compares the file with what this makes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch_slmops
from torch_slmops import compile as compiling
from torch_slmops import families, modules, ops, torchao
from torch_slmops.evaluate import Evaluation
from torch_slmops.isa import describe, features, missing_features
from torch_slmops.plot import plot_kl
from torch_slmops.report import Report

PATH = Path(__file__).parents[1] / "docs" / "reference.md"

_INTRO = """# Reference

Signatures and docstrings of what users call, written by `tools/write_reference.py`. What the ops
compute is defined in [arithmetic.md](arithmetic.md).
"""
_NOT_CALLED = ("__version__", "ops", "register_family")
_SECTIONS = ("Args", "Attributes", "Returns", "Raises")
_ENTRY = re.compile(r"^([*\w][\w*, ]*?): (.*)$")


def chapters() -> dict[str, dict[str, Any]]:
    """Title: what is in it, by the name that a user writes."""
    package = [name for name in torch_slmops.__all__ if name not in _NOT_CALLED]
    rows = ("Attention", "GatedMLP", "Experts", "RMSNorm", "DecoderLayer")
    return {
        "The package": {
            **{f"torch_slmops.{name}": getattr(torch_slmops, name) for name in package},
            "torch_slmops.isa.describe": describe,
            "torch_slmops.isa.features": features,
            "torch_slmops.isa.missing_features": missing_features,
            "torch_slmops.plot.plot_kl": plot_kl,
        },
        "Results and modules": {
            "torch_slmops.report.Report": Report,
            "torch_slmops.evaluate.Evaluation": Evaluation,
            "torch_slmops.modules.Linear": modules.Linear,
            "torch_slmops.modules.Embedding": modules.Embedding,
        },
        "Model families": {
            "torch_slmops.register_family": torch_slmops.register_family,
            **{f"torch_slmops.families.{name}": getattr(families, name) for name in rows},
        },
        "torchao and torch.compile": {
            "torch_slmops.torchao.SlmopsWeightOnlyConfig": torchao.SlmopsWeightOnlyConfig,
            'torch.compile(backend="slmops")': compiling.backend,
        },
        "Ops": {
            f"torch_slmops.ops.{name}": getattr(ops, name)
            for name in ops.__all__
            if inspect.isfunction(getattr(ops, name))
        },
    }


def text() -> str:
    """Returns the page."""
    parts = [_INTRO]
    for title, members in chapters().items():
        parts.append(f"## {title}\n")
        for name, member in members.items():
            parts.append(f"### {name}\n\n```text\n{signature(name, member)}\n```\n")
            parts.append("\n".join(markdown(inspect.getdoc(member) or "")) + "\n")
    return "\n".join(parts)


def signature(name: str, member: Any) -> str:
    """The call as it stands in the source, a parameter per line where it is long."""
    short = name.rpartition(".")[2] if "(" not in name else member.__name__
    if inspect.isclass(member) and issubclass(member, Exception):
        return short
    found = inspect.signature(member)
    made = []
    star = False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            made.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        made.append(_parameter(parameter))
    result = found.return_annotation
    end = ")" if result is found.empty or inspect.isclass(member) else f") -> {_type(result)}"
    line = f"{short}({', '.join(made)}{end}"
    if len(line) <= 100:
        return line
    return "\n".join([f"{short}(", *(f"    {part}," for part in made), end])


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    words = stars.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not parameter.empty:
        words += f": {_type(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return words
    default = parameter.default
    # Defaults that would print differently from run to run, or per version.
    value = repr(default) if isinstance(default, int | float | str | tuple | None) else "..."
    return f"{words} = {value}" if ":" in words else f"{words}={value}"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def markdown(doc: str) -> Iterator[str]:
    """Lines of a Google docstring in Markdown: sections in bold, their entries as lists."""
    section = ""
    for line in doc.splitlines():
        title = line.strip().rstrip(":")
        if line.strip().endswith(":") and title in _SECTIONS and not line.startswith(" "):
            section = title
            yield f"**{title}**\n"
            continue
        if line.strip() and not line.startswith(" "):
            section = ""
        if not section:
            yield line if line.startswith("    ") else _escaped(line)
            continue
        body = line[4:]
        entry = _ENTRY.match(body)
        if entry is not None and section != "Returns":
            yield f"- `{entry[1]}`: {_escaped(entry[2])}"
        else:
            indent = "  " if section != "Returns" and body.strip() else ""
            yield indent + _escaped(body.strip())


def _escaped(line: str) -> str:
    """Stars and underscores outside of code as they are."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*_<|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    PATH.write_text(text(), "utf-8")
