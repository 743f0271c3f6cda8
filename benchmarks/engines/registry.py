"""The engines that are compared, as data: what runs them and what they read."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engines import checkpoints

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class EngineKind:
    """An engine with one way to set it.

    Attributes:
        name: As tables show it.
        script: Its worker, in this folder.
        product: What it reads, in a model's folder.
        options: Of its worker's `load`.
        write: Makes `product` from the float model.
        environment: Folder of its environment in build/engines; None is this one.
        package: What must be importable there, for engines in this environment.
    """

    name: str
    script: str
    product: str = "float"
    options: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[Path, Path], None] | None = None
    environment: str | None = None
    package: str | None = None

    def python(self, folder: Path) -> Path:
        """The interpreter that runs it; `folder` has the environments."""
        if self.environment is None:
            return Path(sys.executable)
        return folder / self.environment / "venv/bin/python"

    def is_there(self, folder: Path) -> bool:
        """Whether it has been set up."""
        if self.environment is None:
            return self.package is None or importlib.util.find_spec(self.package) is not None
        if self.environment == "llama.cpp" and llama_library(folder) is None:
            return False
        return self.python(folder).exists()

    def variables(self, folder: Path) -> dict[str, str]:
        """Environment variables of its process."""
        if self.environment is None:
            return {"PYTHONPATH": str(ROOT)}
        library = llama_library(folder)
        if self.environment == "llama.cpp" and library is not None:
            source = next((folder / "llama.cpp").glob("llama_cpp_python-*/llama_cpp")).parent
            return {"PYTHONPATH": str(source), "LLAMA_CPP_LIB_PATH": str(library.parent)}
        return {}


def llama_library(folder: Path) -> Path | None:
    """llama.cpp's library as setup.sh leaves it."""
    found = sorted((folder / "llama.cpp/build/bin").glob("libllama.so"))
    return found[0] if found else None


def _slmops(name: str, **options: str) -> EngineKind:
    return EngineKind(name, "torch_worker.py", options={"kind": "slmops", **options})


_LLAMA = {"script": "llama_cpp_worker.py", "environment": "llama.cpp"}

ENGINES = (
    _slmops("slmops int4", weights="int4", lm_head="int4"),
    _slmops("slmops int4, int8 keys", weights="int4", lm_head="int4", kv_cache="int8"),
    _slmops("slmops int4, int8 head", weights="int4"),
    _slmops("slmops int8", weights="int8"),
    EngineKind("transformers bf16", "torch_worker.py", options={"kind": "bf16"}),
    EngineKind("transformers bf16 compiled", "torch_worker.py", options={"kind": "compiled"}),
    EngineKind("torchao int4", "torch_worker.py", options={"kind": "torchao"}, package="torchao"),
    EngineKind(
        "llama.cpp Q4_0", product="q4_0.gguf",
        write=checkpoints.write_gguf("q4_0"), **_LLAMA,
    ),
    EngineKind(
        "OpenVINO GenAI int4", "openvino_worker.py", "openvino",
        {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 128}, checkpoints.write_openvino, "openvino",
    ),
    EngineKind(
        "onnxruntime-genai int4", "onnxruntime_worker.py", "onnxruntime",
        write=checkpoints.write_onnx, environment="onnxruntime",
    ),
)  # fmt: skip
BY_NAME = {engine.name: engine for engine in ENGINES}
