"""Writes docs/reference.md: signatures and docstrings of what users call, read from the source.

    python tools/write_reference.py

A test compares the file with what this makes.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "docs" / "reference.md"

_INTRO = """# Reference

Signatures and docstrings of what users call, written by `tools/write_reference.py`. What the ops
compute is defined in [arithmetic.md](arithmetic.md).
"""
_ELSEWHERE = ("__version__", "ops", "register_family")
_SECTIONS = ("Args", "Attributes", "Returns", "Raises")
_ENTRY = re.compile(r"^([*\w][\w*, ]*?): (.*)$")
_WIDTH = 100

Definition: TypeAlias = "ast.FunctionDef | ast.ClassDef"


def chapters() -> dict[str, dict[str, str]]:
    """Title: what is in it, as a user writes it, and the module that defines it."""
    homes = _homes("torch_slmops/__init__.py")
    package = [name for name in _all("torch_slmops/__init__.py") if name not in _ELSEWHERE]
    isa = ("describe", "features", "missing_features")
    rows = ("Attention", "GatedMLP", "Experts", "RMSNorm", "DecoderLayer")
    parts = _homes("torch_slmops/ops/__init__.py")
    ops = [name for name in _all("torch_slmops/ops/__init__.py") if name[0].islower()]
    return {
        "The package": {f"torch_slmops.{name}": homes[name] for name in package}
        | {f"torch_slmops.isa.{name}": "isa" for name in isa}
        | {"torch_slmops.plot.plot_kl": "plot"},
        "Results and modules": {
            "torch_slmops.report.Report": "report",
            "torch_slmops.evaluate.Evaluation": "evaluate",
            "torch_slmops.tune.Tuned": "tune",
            "torch_slmops.tune.Measurement": "tune",
            "torch_slmops.tuning.Settings": "tuning",
            "torch_slmops.modules.Linear": "modules",
            "torch_slmops.modules.Embedding": "modules",
        },
        "Model families": {"torch_slmops.register_family": "families"}
        | {f"torch_slmops.families.{name}": "families" for name in rows},
        "torchao and training": {"torch_slmops.torchao.SlmopsWeightOnlyConfig": "torchao"}
        | {f"torch_slmops.qat.{name}": "qat" for name in _all("torch_slmops/qat.py")},
        "Ops": {f"torch_slmops.ops.{name}": parts[name] for name in ops},
    }


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text("utf-8"))


def _homes(file: str) -> dict[str, str]:
    """The modules, below torch_slmops, that names of a file are imported from."""
    return {
        alias.name: str(node.module).partition(".")[2]
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def _all(file: str) -> list[str]:
    for node in _tree(file).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise ValueError(f"{file}: expected __all__")


def _definition(module: str, name: str) -> Definition:
    path = f"torch_slmops/{module.replace('.', '/')}"
    file = f"{path}.py" if (ROOT / f"{path}.py").is_file() else f"{path}/__init__.py"
    for node in _tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
    return _definition(_homes(file)[name], name)


def text() -> str:
    """Returns the page."""
    parts = [_INTRO]
    for title, members in chapters().items():
        parts.append(f"## {title}\n")
        for name, module in members.items():
            node = _definition(module, name.rpartition(".")[2])
            parts += _entry("###", name, node)
            for method in _methods(node):
                parts += _entry("####", f"{node.name}.{method.name}", method)
    return "\n".join(parts)


def _entry(level: str, name: str, node: Definition) -> Iterator[str]:
    yield f"{level} {name}\n\n```text\n{signature(node)}\n```\n"
    yield "\n".join(markdown(_doc(node))) + "\n"


def _doc(node: Definition) -> str:
    return ast.get_docstring(node) or ""


def _methods(node: Definition) -> Iterator[ast.FunctionDef]:
    """The public methods that say what they do."""
    for part in node.body if isinstance(node, ast.ClassDef) else []:
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_") and _doc(part):
            yield part


def signature(node: Definition) -> str:
    """The call as it stands in the source, a parameter per line where it is long."""
    parts, end = _parameters(node), ")"
    if isinstance(node, ast.FunctionDef):
        if any(ast.unparse(decorator) == "property" for decorator in node.decorator_list):
            assert node.returns is not None
            return f"{node.name}: {ast.unparse(node.returns)}"
        if node.returns is not None:
            end = f") -> {ast.unparse(node.returns)}"
    elif not parts:
        return node.name
    line = f"{node.name}({', '.join(parts)}{end}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"{node.name}(", *(f"    {part}," for part in parts), end])


def _parameters(node: Definition) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return [part for part in _arguments(node.args) if part not in ("self", "cls")]
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return _parameters(part)
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    return [ast.unparse(field) for field in fields] if _is_dataclass(node) else []


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _arguments(args: ast.arguments) -> Iterator[str]:
    positional = [*args.posonlyargs, *args.args]
    missing = len(positional) - len(args.defaults)
    for arg, default in zip(positional, [None] * missing + list(args.defaults), strict=True):
        yield _argument(arg, default)
    if args.vararg is not None:
        yield f"*{ast.unparse(args.vararg)}"
    elif args.kwonlyargs:
        yield "*"
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _argument(arg, default)
    if args.kwarg is not None:
        yield f"**{ast.unparse(args.kwarg)}"


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(arg)
    equals = " = " if arg.annotation is not None else "="
    return f"{ast.unparse(arg)}{equals}{ast.unparse(default)}"


def markdown(doc: str) -> Iterator[str]:
    """Lines of a Google docstring in Markdown: sections in bold, their entries as lists."""
    section = ""
    for line in doc.splitlines():
        title = line.rstrip(":")
        if line.endswith(":") and title in _SECTIONS:
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
    """Stars and the like outside of code as they are."""
    parts = line.split("`")
    parts[::2] = [re.sub(r"([*_<|])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


if __name__ == "__main__":
    PATH.write_text(text(), "utf-8")
