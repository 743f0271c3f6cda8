"""Inputs and exact results of every op, and of the shipped model, in a file for another machine.

A file written on one CPU is checked on another: on each of its ISA rows every op has to give the
bits in the file, weights have to be packed into the same bytes, and the model's logits have to be
the same.

usage: python tests/vectors.py write FILE
       python tests/vectors.py check FILE [--row ROW]   ROW: the best one, which has to be this
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
                result = getattr(ops, case.op)(*arguments)
                name = f"{case} {dtype}"
                found.append(
                    {"name": name, "op": case.op, "arguments": arguments, "result": result}
                )
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


def check(path: Path, row: str | None) -> None:
    rows = torch_slmops.isas()
    assert row is None or rows[0] == row, f"expected the row {row}, got {rows[0]}"
    # Our own file; weights_only takes no dtypes among the arguments in torch 2.10.
    stored = torch.load(path, weights_only=False)
    model = shipped_model()
    for name in rows:
        torch_slmops.set_isa(name)
        for vector in stored["vectors"]:
            results = getattr(ops, vector["op"])(*vector["arguments"])
            if isinstance(results, Tensor):
                assert_same_bits(results, vector["result"], f"{name}: {vector['name']}")
                continue
            for actual, expected in zip(results, vector["result"], strict=True):
                assert_same_bits(actual, expected, f"{name}: {vector['name']}")
        found = model_digests(model)
        assert found == stored["model"], f"{name}: {found}, expected {stored['model']}"
        print(f"row {name}: {len(stored['vectors'])} calls, logits {found['logits']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=["write", "check"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--row")
    arguments = parser.parse_args()
    if arguments.do == "write":
        write(arguments.file)
    else:
        check(arguments.file, arguments.row)


if __name__ == "__main__":
    main()
