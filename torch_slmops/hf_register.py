"""Tells transformers of the quantizer "slmops", when and if transformers is imported.

So `import torch_slmops` stays quick, and `from_pretrained` of a saved model works whichever of the
two packages comes first.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_when_imported"]

_MODULE = "transformers.quantizers.auto"
_logger = logging.getLogger("torch_slmops")


def register_when_imported() -> None:
    """Registers now if transformers is there, else as soon as it is."""
    if _MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module as the others do, and has it followed by `_register`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader  # an object of this import alone
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = execute_and_register
        return spec


def _register() -> None:
    try:
        importlib.import_module("torch_slmops.hf_quantizer")
    except Exception as error:  # a transformers without these interfaces must stay importable
        _logger.warning("transformers does not get the quantizer 'slmops': %s", error)
