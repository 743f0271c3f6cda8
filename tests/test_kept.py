"""Lists of tensors that ops keep, and the extension's functions for Python."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from bits import assert_same_bits

from torch_slmops import _C, ops


def test_tensors_stay_as_long_as_the_list() -> None:
    tensors = [torch.arange(3), torch.ones(2)]
    kept = ops.Kept(tensors)
    assert [id(x) for x in kept] == [id(x) for x in tensors]
    alive = [weakref.ref(x) for x in tensors]
    del tensors
    assert all(ref() is not None for ref in alive)
    number = kept.number
    del kept
    assert not any(ref() is not None for ref in alive)
    torch.ops.slmops._drop(number)  # there is nothing left to drop


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_a_list_of_its_own(way: object) -> None:
    kept = ops.Kept([torch.arange(3)])
    made = way(kept)  # type: ignore[operator]
    assert isinstance(made, ops.Kept)
    assert made.number != kept.number
    assert_same_bits(made[0], kept[0])


@pytest.mark.parametrize("number", [0, -1, 1 << 62])
def test_an_unknown_number(number: int) -> None:
    x, start = torch.zeros(1, 1, 32), torch.tensor(0)
    none = (None, None, None, None)
    rest = ([1, 1, 1], 32, 32, "silu", 1e-6, 0.0, False, 0.0, 0.0, False, 1.0)
    kept = ops.Kept([torch.zeros(1)] * len(ops.LAYER_PARTS))
    for numbers in ((number, kept.number), (kept.number, number)):
        with pytest.raises(RuntimeError, match=f"the number of a list.* got {number}"):
            torch.ops.slmops._kept_decoder_layers(x, *numbers, start, *none, *rest)


def test_values_are() -> None:
    a, b, c = object(), object(), object()
    dicts = [{"x": a, "y": b}, {}, {"z": c}]
    assert _C.values_are(dicts, [a, b, c])
    assert _C.values_are([], [])
    for others in ([a, b], [a, b, c, c], [b, a, c], [a, b, a], []):
        assert not _C.values_are(dicts, others)
    dicts[1]["new"] = a
    assert not _C.values_are(dicts, [a, b, c])


def test_lack() -> None:
    dicts = [{f"{i}": i} for i in range(40)]
    assert _C.lack(dicts, "forward")
    assert _C.lack([], "forward")
    dicts[33]["forward"] = 1
    assert not _C.lack(dicts, "forward")


@pytest.mark.parametrize(
    "call",
    [
        lambda: _C.values_are([{}], ()),  # type: ignore[arg-type]
        lambda: _C.values_are(({},), []),  # type: ignore[arg-type]
        lambda: _C.values_are([{}, 1], []),  # type: ignore[list-item]
        lambda: _C.lack({}, "x"),  # type: ignore[arg-type]
        lambda: _C.lack([[]], "x"),  # type: ignore[list-item]
        lambda: _C.lack([{}], []),  # type: ignore[arg-type]
        lambda: _C.lack(),  # type: ignore[call-arg]
    ],
)
def test_other_arguments(call: object) -> None:
    with pytest.raises(TypeError):
        call()  # type: ignore[operator]
