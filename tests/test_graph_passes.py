"""The rewrites of the torch.compile backend: what they take, what they leave, the same bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from graph_models import (
    ACTIVATIONS,
    MLP,
    Decoder,
    K,
    Parallel,
    packed,
    rotate_by_chunks,
    rotate_by_slices,
)
from torch import Tensor, nn

from torch_slmops import ops, quantize_weight
from torch_slmops.compile import backend

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it traces

_activation: Any = torch.ops.slmops._activation


class Compiled:
    """A compiled callable, whose graph runs as it is, and counts of our ops in the graph."""

    def __init__(self, model: Callable[..., Any], dynamic: bool = True) -> None:
        torch.compiler.reset()
        self.ops: Counter[str] = Counter()
        self._run = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=self._backend)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return backend(graph, inputs, options={"inner_compile": self._count})

    def _count(self, graph: torch.fx.GraphModule, inputs: Any, config_patches: Any) -> Any:
        for node in graph.graph.nodes:
            name = str(node.target)
            if name.startswith("slmops.") and node.op == "call_function":
                self.ops[name.split(".")[1]] += 1
        return graph.forward

    def __call__(self, *args: Any) -> Any:
        with torch.no_grad():
            return self._run(*args)


def of_mlp(model: Any, kind: str, x: Tensor) -> Tensor:
    """What docs/arithmetic.md says of swiglu: the parts in float32, rounded once."""
    wide = x.float()
    gate, up = model.factors(wide)
    y: Tensor = model.w2(_activation(gate, kind) * up)
    return y.to(x.dtype)


class TestSwiglu:
    @pytest.mark.parametrize("name", ACTIVATIONS)
    def test_spelling(self, name: str) -> None:
        kind, activation = ACTIVATIONS[name]
        model = packed(MLP(activation))
        compiled = Compiled(model)
        for shape in ((2, 5, K), (2, 7, K)):
            x = torch.randn(shape)
            assert_same_bits(compiled(x), of_mlp(model, kind, x))
        assert compiled.ops == {"swiglu": 1}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("whole", [False, True])
    @pytest.mark.parametrize("options", [{}, {"weights": "int8"}, {"activations": "float"}])
    def test_weights(self, options: Any, whole: bool, bias: bool, dtype: torch.dtype) -> None:
        model = packed(MLP(torch.nn.functional.silu, whole, bias), dtype, **options)
        x = torch.randn(3, K).to(dtype)
        compiled = Compiled(model)
        assert_same_bits(compiled(x), of_mlp(model, "silu", x))
        assert compiled.ops == {"swiglu": 1}

    def test_left_where_something_else_uses_a_part(self) -> None:
        class Uses(MLP):
            def forward(self, x: Tensor) -> Any:
                gate, up = self.factors(x)
                return self.w2(up * self.activation(gate)), gate

        model = packed(Uses(torch.nn.functional.silu))
        compiled, x = Compiled(model), torch.randn(4, K)
        for got, want in zip(compiled(x), model(x), strict=True):
            assert_same_bits(got, want)
        assert compiled.ops == {"linear": 1, "qkv_rotary": 1}  # gate and up share x

    def test_left_where_a_part_is_changed(self) -> None:
        class Changes(MLP):
            def forward(self, x: Tensor) -> Tensor:
                gate, up = self.factors(x)
                gate.clamp_(-0.1, 0.1)
                y: Tensor = self.w2(up * self.activation(gate))
                return y

        model = packed(Changes(torch.nn.functional.silu))
        compiled, x = Compiled(model), torch.randn(4, K)
        assert_same_bits(compiled(x), model(x))
        assert "swiglu" not in compiled.ops


class TestLinearsThatShareAnInput:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", [(2, 5, K), (6, K)], ids=str)
    @pytest.mark.parametrize("sizes", [(64, 32), (64, 32, 32), (80, 48, 16)], ids=str)
    def test_one_product(
        self, sizes: tuple[int, ...], shape: tuple[int, ...], bias: bool, dtype: torch.dtype
    ) -> None:
        model = packed(Parallel(*sizes, bias=bias), dtype)
        compiled, x = Compiled(model), torch.randn(shape).to(dtype)
        for got, want in zip(compiled(x), model(x), strict=True):
            assert_same_bits(got, want)
            assert got.stride() == want.stride()
        assert compiled.ops == {"qkv_rotary": 1}

    @pytest.mark.parametrize(
        ("sizes", "products"),
        [
            ((32, 32, 32, 32), {"qkv_rotary": 1, "linear": 1}),
            ((32,) * 5, {"qkv_rotary": 2}),
            ((33, 31), {"linear": 2}),  # no common width of heads
            ((64,), {"linear": 1}),
        ],
    )
    def test_how_many(self, sizes: tuple[int, ...], products: dict[str, int]) -> None:
        model = packed(Parallel(*sizes))
        compiled, x = Compiled(model), torch.randn(2, 3, K)
        for got, want in zip(compiled(x), model(x), strict=True):
            assert_same_bits(got, want)
        assert compiled.ops == products

    def test_formats_that_differ(self) -> None:
        model: Any = packed(Parallel(32, 32, 32))
        model.layers[1].packed = quantize_weight(torch.randn(32, K), 8).pack()
        compiled, x = Compiled(model), torch.randn(2, 3, K)
        for got, want in zip(compiled(x), model(x), strict=True):
            assert_same_bits(got, want)
        assert compiled.ops == {"qkv_rotary": 1, "linear": 1}

    def test_left_where_the_input_is_changed(self) -> None:
        class Changes(Parallel):
            def forward(self, x: Tensor) -> list[Tensor]:
                x = x + 1
                first = self.layers[0](x)
                x.mul_(2)
                return [first, self.layers[1](x)]

        model = packed(Changes(32, 32))
        compiled, x = Compiled(model), torch.randn(2, 3, K)
        for got, want in zip(compiled(x), model(x), strict=True):
            assert_same_bits(got, want)
        assert compiled.ops == {"linear": 2}


class TestJoinedWeightsFollow:
    """A weight that is assigned or written to after compilation counts from the next call on."""

    @staticmethod
    def compiled() -> tuple[Any, Compiled, Tensor]:
        model, x = packed(Parallel(32, 32)), torch.randn(2, 3, K)
        compiled = Compiled(model)
        compiled(x)
        return model, compiled, x

    @staticmethod
    def check(model: Any, compiled: Compiled, x: Tensor) -> None:
        for got, want in zip(compiled(x), model(x), strict=True):
            assert_same_bits(got, want)
        assert compiled.ops == {"qkv_rotary": 1}  # compiled once

    def test_assignment(self) -> None:
        model, compiled, x = self.compiled()
        before = compiled(x)[1]
        model.layers[1].weight = torch.randn(32, K)
        self.check(model, compiled, x)
        assert not torch.equal(compiled(x)[1], before)

    def test_write(self) -> None:
        model, compiled, x = self.compiled()
        model.layers[0].packed.copy_(model.layers[1].packed)
        self.check(model, compiled, x)
        assert torch.equal(*compiled(x))

    def test_another_format_of_the_same_size(self) -> None:
        model, compiled, x = self.compiled()
        weight = quantize_weight(torch.randn(32, K))
        model.layers[0].packed = weight.pack(activations="float")
        with pytest.raises(RuntimeError, match="other formats now"):
            compiled(x)
        model.layers[1].packed = weight.pack(activations="float")
        self.check(model, compiled, x)


class Rotates(nn.Module):
    def __init__(self, rotate: Callable[[Tensor], Tensor], spelling: str = "+") -> None:
        super().__init__()
        self.rotate, self.spelling = rotate, spelling

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.view(*x.shape[:-1], 16)  # as in a model, where the width of a head is a constant
        if self.spelling == "add":
            return (self.rotate(x).mul(sin)).add(torch.mul(cos, x))
        return x * cos + self.rotate(x) * sin


class TestRotary:
    @staticmethod
    def tables(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        angles = torch.randn(shape)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("spelling", ["+", "add"])
    @pytest.mark.parametrize("rotate", [rotate_by_slices, rotate_by_chunks])
    def test_spelling(self, rotate: Any, spelling: str, dtype: torch.dtype) -> None:
        compiled = Compiled(Rotates(rotate, spelling))
        for length in (5, 7):
            x = torch.randn(2, length, 3, 16).to(dtype)
            cos, sin = self.tables(2, length, 16, dtype=dtype)
            got = compiled(x.transpose(1, 2), cos[:, None], sin[:, None])
            assert_same_bits(got, ops.rotary(x, cos, sin, False).transpose(1, 2))
        assert compiled.ops == {"rotary": 1}

    @pytest.mark.parametrize(
        ("x", "table", "heads"),
        [
            ((2, 3, 5, 16), (5, 16), 1),
            ((2, 3, 5, 16), (1, 5, 16), 1),
            ((2, 3, 5, 16), (1, 1, 5, 16), 1),
            ((2, 3, 1, 16), (2, 1, 1, 16), 1),
            ((2, 5, 3, 16), (2, 5, 1, 16), 2),
            ((2, 5, 3, 16), (1, 5, 1, 16), 2),
            ((2, 1, 3, 16), (1, 1, 1, 16), 2),
        ],
    )
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_layout(self, x: Any, table: Any, heads: int, dynamic: bool) -> None:
        compiled = Compiled(Rotates(rotate_by_slices), dynamic)
        values, (cos, sin) = torch.randn(x), self.tables(*table)
        got = compiled(values, cos, sin)
        flat = [t.reshape(*(t.shape[i] for i in range(-t.dim(), 0))) for t in (cos, sin)]
        flat = [t.squeeze(heads) if t.dim() == 4 else t.view(-1, *t.shape[-2:]) for t in flat]
        turned = values.transpose(1, 2) if heads == 1 else values
        want = ops.rotary(turned, *flat, False)
        assert_same_bits(got, want.transpose(1, 2) if heads == 1 else want)
        assert compiled.ops == {"rotary": 1}

    @pytest.mark.parametrize(
        ("x", "table"),
        [
            ((2, 3, 5, 16), (2, 3, 5, 16)),  # a table per head
            ((3, 5, 16), (5, 16)),  # no batch
            ((2, 3, 5, 16), (2, 1, 5, 1)),  # one angle for all
            ((2, 5, 3, 16), (5, 1, 16)),  # heads after tokens, no batch in the table
        ],
    )
    def test_other_shapes_are_left(self, x: Any, table: Any) -> None:
        model = Rotates(rotate_by_slices)
        compiled = Compiled(model, dynamic=False)
        arguments = (torch.randn(x), *self.tables(*table))
        assert_same_bits(compiled(*arguments), model(*arguments))
        assert not compiled.ops

    def test_other_computations_are_left(self) -> None:
        wrong: list[Callable[[Tensor], Tensor]] = [
            lambda x: torch.cat((x[..., 8:], x[..., :8]), -1),
            lambda x: torch.cat((-x[..., :8], x[..., 8:]), -1),
            lambda x: torch.cat((-x[..., 6:], x[..., :6]), -1),
            lambda x: torch.cat((-x[..., 1::2], x[..., ::2]), -1),
            lambda x: torch.cat((-(x + 1)[..., 8:], x[..., :8]), -1),
        ]
        x, (cos, sin) = torch.randn(2, 3, 5, 16), self.tables(5, 16)
        for rotate in wrong:
            model = Rotates(rotate)
            compiled = Compiled(model)
            assert_same_bits(compiled(x, cos, sin), model(x, cos, sin))
            assert not compiled.ops

    def test_result_of_another_dtype_is_left(self) -> None:
        model = Rotates(rotate_by_slices)
        compiled, x = Compiled(model), torch.randn(2, 3, 5, 16).bfloat16()
        got = compiled(x, *self.tables(5, 16))
        assert got.dtype == torch.float32
        assert not compiled.ops

    def test_gradients_are_kept(self) -> None:
        model = Rotates(rotate_by_slices)
        x, (cos, sin) = torch.randn(2, 3, 5, 16, requires_grad=True), self.tables(5, 16)
        compiled = Compiled(model)
        compiled._run(x, cos, sin).sum().backward()
        assert not compiled.ops
        assert x.grad is not None


def test_all_in_one_model() -> None:
    model = packed(Decoder())
    compiled = Compiled(model)
    for length in (5, 9):
        x, angles = torch.randn(2, length, K), torch.randn(2, 1, length, 16)
        got, want = compiled(x, angles.cos(), angles.sin()), model(x, angles.cos(), angles.sin())
        assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())
    assert compiled.ops == {"qkv_rotary": 1, "rotary": 2, "linear": 1, "swiglu": 1}
