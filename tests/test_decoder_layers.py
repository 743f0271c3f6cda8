"""decoder_layers: the bits of the ops that it is made of, for every kind of layer."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import FLOATS, FORMATS, Format, random_packed, random_values
from fused_cases import random_gate_up
from int8_kv import int8_heads
from torch import Tensor

from torch_slmops import ops, reference

SUB16, GROUP, INT8, FLOAT, WHOLE = FORMATS[1], FORMATS[6], FORMATS[14], FORMATS[22], FORMATS[3]
NORMS = {
    "pre": ("pre_attention_norm", "pre_mlp_norm"),
    "post": ("post_attention_norm", "post_mlp_norm"),
    "both": (
        "pre_attention_norm",
        "post_attention_norm",
        "pre_mlp_norm",
        "post_mlp_norm",
    ),
    "none": (),
}


@dataclass(frozen=True)
class Layers:
    """A call of decoder_layers."""

    formats: tuple[Format, ...] = (SUB16,)  # of each layer
    batch: int = 2
    length: int = 3
    start: int = 0
    slots: int = 24  # of the cache; 0: none
    blocked: bool = False  # its keys, with slots rounded up
    int8: bool = False  # keys and values
    heads: tuple[int, int, int] = (4, 2, 2)
    d: int = 16
    k: int = 96
    hidden: int = 70
    norms: str = "pre"
    qk_norms: str = ""  # "", "head" or "full"
    biases: bool = False
    rotary: bool = True
    mask: str = ""  # "", "bool" or "float"
    positions: bool = False
    activation: str = "silu"
    offset: float = 0.0
    cast: bool = True
    softcap: float = 0.0
    multiplier: float = 1.0
    keep: int = 0
    values: str = "normal"

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        source = torch.Generator().manual_seed(3)
        batch, length, d = self.batch, self.length, self.d

        def floats(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source)

        weights = [part for i in range(len(self.formats)) for part in self._weights(i, dtype)]
        shape = (batch, self.heads[1], self.slots, d)
        blocks = (*shape[:2], -(-self.slots // 16), d, 16)
        pair = (blocks if self.blocked else shape, shape)
        layers = len(self.formats) if self.slots else 0
        cos, sin = floats(2, 1, length, d) if self.rotary else (None, None)
        keys = self.slots or length
        mask: Tensor | None = None
        if self.mask:
            mask = torch.rand((batch, 1, length, keys), generator=source) < 0.6
        if self.mask == "float" and mask is not None:
            mask = torch.where(mask, floats(batch, 1, length, keys), -torch.inf)
        ids = torch.arange(length)[None] + torch.tensor([[self.start - 2], [300]])[:batch]
        cache = [floats(*one).to(dtype) for _ in range(layers) for one in pair]
        if self.int8:
            cache = [part for i in range(layers) for part in self._int8(floats)]
        return {
            "x": random_values(self.values, (batch, length, self.k), 1).to(dtype),
            "weights": weights,
            "cache": cache,
            "start": torch.tensor(self.start),
            "cos": cos,
            "sin": sin,
            "mask": mask,
            "position_ids": ids if self.positions else None,
            "heads_q_k_v": list(self.heads),
            "head_dim": d,
            "hidden": self.hidden,
            "activation": self.activation,
            "eps": 1e-5,
            "offset": self.offset,
            "cast_before_weight": self.cast,
            "qk_eps": 1e-6,
            "qk_offset": self.offset,
            "interleaved": False,
            "scale": 0.3,
            "softcap": self.softcap,
            "residual_multiplier": self.multiplier,
            "keep": self.keep,
        }

    def _int8(self, floats: Any) -> list[Tensor]:
        """Keys and values of all slots as int8, and their scales."""
        shape = (self.batch, self.slots, self.heads[1], self.d)
        (k, k_scale), (v, v_scale) = (int8_heads(floats(*shape), kind) for kind in (False, True))
        return [k, v, k_scale, v_scale]

    def _weights(self, layer: int, dtype: torch.dtype) -> list[Tensor]:
        fmt, seed = self.formats[layer], 10 * layer
        source = torch.Generator().manual_seed(seed)

        def floats(size: int) -> Tensor:
            return torch.randn(size, generator=source).to(dtype)

        n, width = sum(self.heads) * self.d, self.heads[0] * self.d
        parts = {
            "qkv": random_packed(fmt, n, self.k, seed),
            "output": random_packed(fmt, self.k, width, seed + 1),
            "gate_up": random_gate_up(fmt, self.hidden, self.k, seed + 2),
            "down": random_packed(fmt, self.k, self.hidden, seed + 3),
        }
        parts |= {name: floats(self.k) for name in NORMS[self.norms]}
        if self.qk_norms:
            full = self.qk_norms == "full"
            for name, heads in zip(("q_norm", "k_norm"), self.heads, strict=False):
                parts[name] = floats(heads * self.d if full else self.d)
        if self.biases:
            parts |= {"qkv_bias": floats(n), "output_bias": floats(self.k)}
            parts |= {"gate_up_bias": floats(2 * self.hidden), "down_bias": floats(self.k)}
        return [parts.get(name, torch.empty(0)) for name in ops.LAYER_PARTS]


CASES = [
    *(Layers((fmt,)) for fmt in (SUB16, GROUP, INT8, FLOAT, WHOLE)),
    Layers((SUB16, SUB16, INT8, FLOAT, SUB16)),
    *(Layers((SUB16, SUB16), norms=norms, qk_norms=qk) for norms in NORMS for qk in ("head", "")),
    Layers((SUB16, GROUP), qk_norms="full", norms="post", biases=True),
    Layers(biases=True, activation="gelu_tanh", offset=1.0, norms="both", softcap=20.0),
    Layers((SUB16, SUB16), slots=0),
    Layers((SUB16, SUB16), start=7, length=1),
    Layers(start=7, length=2, mask="bool", positions=True),
    Layers(start=20, length=4, mask="float", positions=True),
    Layers((SUB16, INT8), batch=1, length=1, start=600, slots=610, positions=True),
    Layers((SUB16,), batch=1, length=60, slots=70, multiplier=0.22, cast=False),
    Layers(rotary=False, multiplier=-1.5, values="special"),
    Layers(rotary=False, values="denormal"),
    Layers((SUB16, SUB16), heads=(2, 2, 2), d=40, k=64, hidden=1),
    *(
        Layers((SUB16, INT8), 1 + masked, length, start, 620, True, mask="bool" * masked, d=24)
        for length, start in ((1, 0), (40, 0), (1, 5), (4, 30), (1, 600), (20, 590))
        for masked in (False, True)
    ),
    *(
        Layers((SUB16,), length=length, start=start, slots=340, blocked=True, positions=True)
        for length, start in ((1, 13), (1, 300), (33, 290))
    ),
    *(
        Layers((SUB16, INT8), 1 + masked, length, start, 620, mask="bool" * masked, int8=True, d=24)
        for length, start in ((1, 0), (40, 0), (1, 5), (4, 30), (1, 600), (20, 590))
        for masked in (False, True)
    ),
    *(
        Layers((SUB16, SUB16), length=length, start=start, slots=340, int8=True, positions=True)
        for length, start in ((1, 13), (33, 290))
    ),
    Layers(rotary=False, values="special", int8=True, qk_norms="full"),
    *(
        Layers((SUB16, INT8), 2, 20, 590, 620, mask=mask, d=24, keep=keep, **cache)
        for keep, mask in ((1, ""), (1, "bool"), (5, "float"), (20, "bool"))
        for cache in ({}, {"blocked": True}, {"int8": True})
    ),
    Layers(batch=1, length=300, slots=300, keep=1, norms="both", positions=True),
    Layers((SUB16, SUB16), length=40, slots=0, keep=7),
    Layers(batch=0),
    Layers(length=0, start=3),
]


def run(implementation: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """The result and what became of the cache."""
    cache = [part.clone() for part in arguments["cache"]]
    return [implementation.decoder_layers(**arguments | {"cache": cache}), *cache]


def assert_all_same(actual: list[Tensor], expected: list[Tensor], what: str = "") -> None:
    for i, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(left, right, f"{what} result {i}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(CASES.index(case)))
def test_equals_reference(case: Layers, dtype: torch.dtype, isa: str) -> None:
    arguments = case.arguments(dtype)
    assert_all_same(run(ops, arguments), run(reference, arguments))


def test_layers_together_are_layers_one_by_one() -> None:
    case = Layers((SUB16, GROUP, GROUP, SUB16), batch=1, length=50, slots=70, start=9)
    arguments = case.arguments(torch.bfloat16)
    expected = run(ops, arguments)
    parts, x, caches = len(ops.LAYER_PARTS), arguments["x"], []
    for i in range(len(case.formats)):
        one = {
            "x": x,
            "weights": arguments["weights"][parts * i : parts * (i + 1)],
            "cache": arguments["cache"][2 * i : 2 * i + 2],
        }
        x, *cache = run(ops, arguments | one)
        caches += cache
    assert_all_same([x, *caches], expected)


@pytest.mark.parametrize("keep", [1, 7, 299, 300])
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_kept_is_the_end_of_all(count: int, keep: int) -> None:
    case = Layers((SUB16,) * count, length=300, start=7, slots=320, mask="bool", positions=True)
    arguments = case.arguments(torch.bfloat16)
    x, *cache = run(ops, arguments)
    expected = [x[:, -keep:].contiguous(), *cache]
    assert_all_same(run(ops, arguments | {"keep": keep}), expected)


@pytest.mark.parametrize("norms", ["pre", "post"])
@pytest.mark.parametrize("length", [1, 60])
def test_number_of_threads(length: int, norms: str, threads: None) -> None:
    qk_norms = "full" if norms == "post" else ""
    case = Layers((SUB16, INT8), 2, length, 560, 620, k=256, hidden=320, qk_norms=qk_norms)
    case = replace(case, int8=norms == "post")
    arguments = replace(case, norms=norms, d=64, keep=length // 9).arguments(torch.bfloat16)
    torch.set_num_threads(1)
    expected = run(ops, arguments)
    for count in range(2, 9):
        torch.set_num_threads(count)
        assert_all_same(run(ops, arguments), expected, f"{count} threads:")


def test_calls_from_many_threads_at_once() -> None:
    case = Layers((SUB16, SUB16), batch=1, length=5, k=256, hidden=320, d=64)
    arguments = case.arguments(torch.float32)
    expected = run(ops, arguments)
    results: list[list[Tensor]] = []

    def work() -> None:
        results.extend(run(ops, arguments) for _ in range(10))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 40
    for result in results:
        assert_all_same(result, expected)


def test_caches_of_any_strides(isa: str) -> None:
    case = Layers((SUB16,), start=5)
    arguments = case.arguments(torch.float16)
    expected = run(ops, arguments)
    slots_first = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in arguments["cache"]]
    wide = [torch.zeros(2, 2, 30, 20).half()[:, :, 3:27, 2:18].copy_(c) for c in slots_first]
    for cache in (slots_first, wide):
        y = ops.decoder_layers(**arguments | {"cache": cache})
        assert_all_same([y, *(part.contiguous() for part in cache)], expected)


def test_what_was_in_free_slots_does_not_matter() -> None:
    case = Layers((SUB16,), start=5, mask="bool", positions=True)
    arguments = case.arguments(torch.float32)
    expected = run(ops, arguments)[0]
    for part in arguments["cache"]:
        part[:, :, 8:] = torch.nan
    assert_same_bits(run(ops, arguments)[0], expected)


WRONG = {
    "x of two dimensions": ({"x": torch.zeros(3, 96)}, "x of shape"),
    "too few weights": ({"weights": []}, "a list of 14 tensors"),
    "a cache of one": ({"cache": [torch.zeros(2, 2, 24, 16)]}, "keys and values of each"),
    "short cache": ({"cache": [torch.zeros(2, 2, 2, 16)] * 2}, "at least 3"),
    "a cache of another dtype": ({"cache": [torch.zeros(2, 2, 24, 16).half()] * 2}, "dtype of x"),
    "start is a float": ({"start": torch.tensor(0.0)}, "start"),
    "start is negative": ({"start": torch.tensor(-1)}, "number of keys"),
    "start without a cache": ({"cache": [], "start": torch.tensor(1)}, "number of keys"),
    "heads": ({"heads_q_k_v": [3, 2, 2]}, "of q a multiple"),
    "head_dim": ({"head_dim": 300}, "head_dim in 1..256"),
    "hidden": ({"hidden": 71}, "down to be 96 x 71"),
    "activation": ({"activation": "tanh"}, "activation"),
    "mask": ({"mask": torch.ones(2, 1, 3, 2, dtype=torch.bool)}, "mask of shape"),
    "short blocks": (
        {"cache": [torch.zeros(2, 2, 0, 16, 16), torch.zeros(2, 2, 24, 16)]},
        "blocks",
    ),
    "a cache of three": ({"cache": [torch.zeros(2, 2, 24, 16)] * 3}, "keys and values of each"),
    "int8 of floats": ({"cache": [torch.zeros(2, 2, 24, 16)] * 4}, "keys of dtype uint8"),
    "blocks of values": ({"cache": [torch.zeros(2, 2, 2, 16, 16)] * 2}, "values"),
    "positions": ({"position_ids": torch.zeros(2, 4, dtype=torch.long)}, "position_ids of shape"),
    "scale": ({"scale": float("nan")}, "finite"),
    "softcap": ({"softcap": -1.0}, "softcap"),
    "more kept than there are": ({"keep": 4}, "keep in 0..3"),
    "fewer kept than none": ({"keep": -1}, "keep in 0..3"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong: str) -> None:
    change, message = WRONG[wrong]
    arguments = Layers().arguments(torch.float32)
    with pytest.raises(RuntimeError, match=f"decoder_layers: .*{message}"):
        ops.decoder_layers(**arguments | change)


@pytest.mark.parametrize("part", ["qkv", "gate_up", "pre_mlp_norm", "q_norm", "down_bias"])
def test_wrong_weights(part: str) -> None:
    arguments = Layers().arguments(torch.float32)
    arguments["weights"][ops.LAYER_PARTS.index(part)] = torch.zeros(5)
    with pytest.raises(RuntimeError, match=f"decoder_layers: .*({part}|packed)"):
        ops.decoder_layers(**arguments)


@pytest.mark.parametrize(
    "case",
    [CASES[5], CASES[15], CASES[16], Layers((SUB16, GROUP), int8=True, keep=2)],
    ids=["many", "none", "masked", "int8, the last two"],
)
def test_opcheck(case: Layers) -> None:
    arguments = tuple(case.arguments(torch.bfloat16).values())
    torch.library.opcheck(torch.ops.slmops.decoder_layers.default, arguments)
