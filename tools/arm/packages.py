"""Prints name==version of what the Python tests need, all dependencies included, as installed here.

torch itself is left out.
"""

from __future__ import annotations

from importlib.metadata import distribution

from packaging.requirements import Requirement

ROOTS = ["torch", "transformers", "safetensors", "numpy", "tqdm", "rich", "pytest", "hypothesis"]


def closure(names: list[str]) -> dict[str, str]:
    """Versions of the packages and of all that they require here."""
    found: dict[str, str] = {}
    todo = list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found:
            continue
        package = distribution(name)
        found[name] = package.version
        for text in package.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name)
    return found


print(*(f"{name}=={v}" for name, v in sorted(closure(ROOTS).items()) if name != "torch"))
