"""What the ops refuse: damaged packed weights and arguments that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FORMATS, Format, random_packed, random_parts
from torch import Tensor

from torch_slmops import ops

N, K = 40, 96


def packed(fmt: Format = FORMATS[0]) -> Tensor:
    return random_packed(fmt, N, K).clone()


def readers(weight: Tensor) -> list[Any]:
    """Each op that reads a packed weight, ready to be called."""
    x = torch.zeros(2, K)
    heads = ([2, 1, 1], N // 4)
    return [
        lambda: ops.unpack(weight),
        lambda: ops.linear(x, weight, N),
        lambda: ops.qkv_rotary(
            x[None], weight, *heads, None, None, None, 0.0, 0.0, None, None, False
        ),
        lambda: ops.swiglu(x, weight, weight, K, N, "silu"),
        lambda: ops.embedding(torch.zeros(1, dtype=torch.int64), weight, K, torch.float32),
        lambda: ops.describe(weight),
    ]


@pytest.mark.parametrize("offset", range(64))
@pytest.mark.parametrize("fmt", [FORMATS[0], FORMATS[8]], ids=str)
def test_any_wrong_header_byte_is_an_error(fmt: Format, offset: int) -> None:
    for change in (1, 0x80, 0xFF):
        weight = packed(fmt)
        weight[offset] ^= change
        for read in readers(weight):
            with pytest.raises(RuntimeError, match="packed weights"):
                read()


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, -1])
def test_truncated_weights_are_errors(size: int) -> None:
    for read in readers(packed()[:size]):
        with pytest.raises(RuntimeError, match="packed weights are not valid"):
            read()


@pytest.mark.parametrize(
    "foreign",
    [
        torch.zeros(4096, dtype=torch.uint8),
        torch.cat((random_packed(FORMATS[0], N, K), torch.zeros(1, dtype=torch.uint8))),
        random_packed(FORMATS[0], N, K).view(-1, 2),
        random_packed(FORMATS[0], N, K).view(torch.int8),
        torch.zeros(64),
    ],
    ids=["zeros", "too long", "2-D", "int8", "float"],
)
def test_foreign_tensors_are_errors(foreign: Tensor) -> None:
    for read in readers(foreign):
        with pytest.raises(RuntimeError, match="packed"):
            read()


LINEAR = {
    "K": ((torch.zeros(2, K + 1),), {}, "96"),
    "N": ((torch.zeros(2, K),), {"out_features": N + 1}, "40"),
    "scalar": ((torch.zeros(()),), {}, "dimension"),
    "dtype": ((torch.zeros(2, K, dtype=torch.float64),), {}, "float64"),
    "integers": ((torch.zeros(2, K, dtype=torch.int64),), {}, "int64"),
    "bias shape": ((torch.zeros(2, K),), {"bias": torch.zeros(N + 1)}, "bias"),
    "bias dtype": ((torch.zeros(2, K),), {"bias": torch.zeros(N, dtype=torch.int32)}, "bias"),
    "perm shape": ((torch.zeros(2, K),), {"perm": torch.arange(K - 1)}, "perm"),
    "perm dtype": ((torch.zeros(2, K),), {"perm": torch.arange(K).int()}, "perm"),
    "perm below": ((torch.zeros(2, K),), {"perm": torch.arange(K) - 1}, "perm"),
    "perm above": ((torch.zeros(2, K),), {"perm": torch.arange(K) + 1}, "perm"),
    "out dtype": ((torch.zeros(2, K),), {"out_dtype": torch.int8}, "int8"),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_refuses(name: str) -> None:
    (x,), options, words = LINEAR[name]
    arguments = {"out_features": N, **options}
    with pytest.raises(RuntimeError, match=words):
        ops.linear(x, packed(), **arguments)


def qkv_rotary(**changes: Any) -> Any:
    """A valid call with some arguments replaced."""
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 3, K),
        "packed": packed(),
        "heads_q_k_v": [2, 1, 1],
        "head_dim": 10,
        "bias": None,
        "q_norm": None,
        "k_norm": None,
        "eps": 1e-6,
        "offset": 0.0,
        "cos": torch.zeros(1, 3, 8),
        "sin": torch.zeros(1, 3, 8),
        "interleaved": False,
    }
    return ops.qkv_rotary(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(3, K)}, r"\(batch, length, k\)"),
        ({"x": torch.zeros(2, 3, K + 1)}, "96"),
        ({"x": torch.zeros(2, 3, K, dtype=torch.float64)}, "float64"),
        ({"heads_q_k_v": [2, 1]}, "three numbers"),
        ({"heads_q_k_v": [2, 1, 2]}, "40"),
        ({"heads_q_k_v": [5, -2, 1]}, "three numbers"),
        ({"head_dim": 0}, "positive head_dim"),
        ({"bias": torch.zeros(N + 1)}, "bias"),
        ({"q_norm": torch.zeros(11)}, "q_norm"),
        ({"k_norm": torch.zeros(10, 1)}, "k_norm"),
        ({"k_norm": torch.zeros(10, dtype=torch.int32)}, "k_norm"),
        ({"cos": None}, "both or none"),
        ({"sin": torch.zeros(1, 3, 6)}, "one shape"),
        ({"cos": torch.zeros(1, 2, 8)}, "cos of shape"),
        ({"cos": torch.zeros(1, 3, 12), "sin": torch.zeros(1, 3, 12)}, "at most 10"),
        ({"cos": torch.zeros(1, 3, 7), "sin": torch.zeros(1, 3, 7)}, "even"),
        ({"perm": torch.arange(K) + 1}, "perm"),
    ],
)
def test_qkv_rotary_refuses(changes: dict[str, Any], words: str) -> None:
    qkv_rotary()
    with pytest.raises(RuntimeError, match=words):
        qkv_rotary(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, K + 1)}, "96"),
        ({"hidden": 0}, "hidden"),
        ({"hidden": 65}, "192"),
        ({"out_features": N + 1}, "40"),
        ({"down": random_packed(FORMATS[0], N, 63)}, "hidden == 63"),
        ({"activation": "swish"}, "gelu_tanh"),
        ({"gate_up_bias": torch.zeros(64)}, "gate_up_bias"),
        ({"down_bias": torch.zeros(N, dtype=torch.int8)}, "down_bias"),
    ],
)
def test_swiglu_refuses(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, K),
        "gate_up": random_packed(FORMATS[0], 128, K),
        "down": random_packed(FORMATS[0], N, 64),
        "hidden": 64,
        "out_features": N,
        "activation": "silu",
    }
    ops.swiglu(**arguments)
    with pytest.raises(RuntimeError, match=words):
        ops.swiglu(**(arguments | changes))


@pytest.mark.parametrize("ids", [[-1], [N], [0, 1 << 40]])
def test_embedding_refuses_ids_outside(ids: list[int]) -> None:
    with pytest.raises(RuntimeError, match=r"0\.\.39"):
        ops.embedding(torch.tensor(ids), packed(), K, torch.float32)


def test_embedding_refuses_other_arguments() -> None:
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="96"):
        ops.embedding(ids, packed(), K + 1, torch.float32)
    with pytest.raises(RuntimeError, match="float64"):
        ops.embedding(ids, packed(), K, torch.float64)
    with pytest.raises(RuntimeError, match="int64 or int32"):
        ops.embedding(ids.float(), packed(), K, torch.float32)


def changed(index: int, value: float) -> tuple[Any, ...]:
    """Parts of an asymmetric int4 weight with one element of part `index` replaced."""
    parts = list(random_parts(Format(4, 32, 32, "int16"), N, K, seed=7))
    part = parts[index]
    assert part is not None
    part[N - 1, 1] = value
    return tuple(parts)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (changed(0, 16), r"codes in 0\.\.15"),
        (changed(1, float("inf")), "finite"),
        (changed(1, float("nan")), "finite"),
        (changed(2, 16), r"zero_point in 0\.\.15"),
        (changed(2, -1), r"zero_point in 0\.\.15"),
    ],
)
def test_pack_refuses_values_out_of_range(parts: tuple[Any, ...], words: str) -> None:
    out = torch.empty(ops.packed_bytes(N, K, 4, "group", True, 32, 32), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=words):
        ops.pack_(out, *parts, 4, 32, 32, "int8")
    with pytest.raises(RuntimeError, match="not valid"):
        ops.unpack(out)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_refuses_weights_that_are_not_finite(dtype: torch.dtype, bad: float) -> None:
    for at in ((0, 0), (N - 1, K - 1), (17, 50)):
        w = torch.zeros(N, K, dtype=dtype)
        w[at] = bad
        with pytest.raises(RuntimeError, match="finite"):
            ops.quantize(w, 4, "sub16", 16, True, "mse")


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        (torch.full((K,), -1.0), "negative"),
        (torch.full((K,), float("nan")), "finite"),
        (torch.full((K,), float("inf")), "finite"),
        (torch.ones(K + 1), "importance"),
        (torch.ones(K, dtype=torch.float64), "importance"),
    ],
)
def test_quantize_refuses_importance(importance: Tensor, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        ops.quantize(torch.zeros(N, K), 4, "group", 32, True, "mse", importance)
