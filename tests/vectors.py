"""Inputs and exact results of every op, and of the shipped model, in a file for another machine.

A file written on one CPU is checked on another: on each of its ISA rows every op has to give the
bits in the file, weights have to be packed into the same bytes, and the model's logits have to be
the same.

usage: python tests/vectors.py write FILE
       python tests/vectors.py check FILE [--row ROW] [--out FILE2]

ROW is what the best row has to be; FILE2 gets the same with the results of this CPU's best row.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_cases import ATTENTION_CASES
from bits import assert_same_bits, bits_of
from cases import CASES, FLOATS, Case
from fused_cases import FUSED_CASES
from torch import Tensor

import torch_slmops
from torch_slmops import ops

SHIPPED = Path(__file__).parent.parent / "examples" / "tiny_llama"
TOKENS = 272  # more than the 256 keys of an attention split


def vectors() -> list[dict[str, Any]]:
    """A call and its result for every case and dtype."""
    found = []
    for case in [*CASES, *FUSED_CASES, *ATTENTION_CASES]:
        for dtype in FLOATS:
            arguments = case.arguments(dtype)
            if finite(case, arguments):
                vector = {"name": f"{case} {dtype}", "op": case.op, "arguments": arguments}
                found.append(vector | {"result": call(vector)})
    return found


def finite(case: Case, arguments: tuple[Any, ...]) -> bool:
    """Whether a case is a result and no error: `quantize` refuses what float16 overflows."""
    return case.op != "quantize" or bool(arguments[0].isfinite().all())


def digest(tensors: list[Tensor]) -> str:
    total = hashlib.sha256()
    for x in tensors:
        total.update(bits_of(x).numpy().tobytes())
    return total.hexdigest()


def shipped_model() -> Any:
    """The model of examples/tiny_llama in int4, with our attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    torch_slmops.optimize(model)
    torch_slmops.register_attention()
    model.set_attn_implementation("slmops")
    return model


def model_digests(model: Any) -> dict[str, str]:
    """SHA-256 of the packed weights, the logits over a text, and the tokens generated after it."""
    text = np.load(SHIPPED / "val_tokens.npy").reshape(-1)[:TOKENS]
    tokens = torch.from_numpy(text.astype(np.int64))
    packed = [tensor for tensor in model.state_dict().values() if tensor.dtype == torch.uint8]
    assert packed
    with torch.inference_mode():
        logits = model(tokens[None]).logits
        generated = model.generate(tokens[None, :8], max_new_tokens=16, do_sample=False)
    return {
        "packed": digest(packed),
        "logits": digest([logits]),
        "generated": digest([generated]),
    }


def write(path: Path) -> None:
    torch.save({"vectors": vectors(), "model": model_digests(shipped_model())}, path)
    print(f"row {torch_slmops.isa()}: wrote {path.stat().st_size >> 10} KiB")


def check(path: Path, row: str | None, out: Path | None) -> None:
    rows = torch_slmops.isas()
    assert row is None or rows[0] == row, f"expected the row {row}, got {rows[0]}"
    # Our own file; weights_only takes no dtypes among the arguments in torch 2.10.
    stored = torch.load(path, weights_only=False)
    model = shipped_model()
    for name in rows:
        torch_slmops.set_isa(name)
        here = [vector | {"result": call(vector)} for vector in stored["vectors"]]
        for vector, expected in zip(here, stored["vectors"], strict=True):
            what = f"{name}: {vector['name']}"
            for one, other in zip(parts(vector), parts(expected), strict=True):
                assert_same_bits(one, other, what)
        found = model_digests(model)
        assert found == stored["model"], f"{name}: {found}, expected {stored['model']}"
        print(f"row {name}: {len(here)} calls, logits {found['logits']}", flush=True)
        if out is not None and name == rows[0]:
            torch.save({"vectors": here, "model": found}, out)


def call(vector: dict[str, Any]) -> Any:
    return getattr(ops, vector["op"])(*vector["arguments"])


def parts(vector: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors of a result."""
    result = vector["result"]
    return (result,) if isinstance(result, Tensor) else tuple(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=["write", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--row")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.do == "write":
        write(arguments.file)
    else:
        check(arguments.file, arguments.row, arguments.out)


if __name__ == "__main__":
    main()
