"""Packed modules: they behave like those whose places they take, `weight` included."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from test_optimize import IDS, Tied, formats, tied
from torch import Tensor, nn

import torch_slmops
from torch_slmops import ops, optimize
from torch_slmops.modules import Linear
from torch_slmops.weight_view import WeightView


class TestModules:
    """The packed modules behave like those whose places they take."""

    def linear(self) -> Linear:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(96, 40)).eval()
        module = optimize(model)[0]
        assert isinstance(module, Linear)
        return module

    def test_state_dict_round_trip(self) -> None:
        module = self.linear()
        fresh = Linear(96, 40)
        fresh.load_state_dict(module.state_dict())
        x = torch.randn(3, 96)
        assert_same_bits(fresh(x), module(x))
        assert fresh.packed.data_ptr() != module.packed.data_ptr()

    def test_loading_keeps_shared_buffers_shared(self) -> None:
        source, target = optimize(tied()), Tied().eval()
        optimize(target)
        target.load_state_dict(source.state_dict())
        assert target.embed.packed is target.head.packed
        assert_same_bits(target(IDS), source(IDS))

    def test_loading_another_format(self) -> None:
        source, target = optimize(tied(), weights="int8"), optimize(tied())
        target.load_state_dict(source.state_dict())
        assert formats(target) == formats(source)
        assert_same_bits(target(IDS), source(IDS))

    @pytest.mark.parametrize("damage", ["size", "header", "length", "type"])
    def test_loading_refuses_other_weights(self, damage: str) -> None:
        module, target = self.linear(), Linear(96, 41 if damage == "size" else 40)
        state = dict(module.state_dict())
        if damage == "size":
            state["bias"] = torch.zeros(41)
        if damage == "header":
            state["packed"] = state["packed"].clone()
            state["packed"][17] ^= 1
        if damage == "length":
            state["packed"] = state["packed"][:-1]
        if damage == "type":
            state["packed"] = state["packed"].float()
        with pytest.raises(RuntimeError, match="packed"):
            target.load_state_dict(state)
        assert target.packed.numel() == 0

    def test_save_pickle_and_deepcopy(self) -> None:
        module, x = self.linear(), torch.randn(3, 96)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for other in (
            torch.load(file, weights_only=False),
            pickle.loads(pickle.dumps(module)),
            copy.deepcopy(module),
        ):
            assert_same_bits(other(x), module(x))

    def test_dtype_conversion_keeps_the_codes(self) -> None:
        module = self.linear()
        packed = module.packed.clone()
        module.to(torch.bfloat16)
        assert_same_bits(module.packed, packed)
        assert module.bias is not None
        assert (module.bias.dtype, module.weight.dtype) == (torch.bfloat16, torch.bfloat16)
        assert module(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16
        embedding = optimize(tied()).half().embed
        assert embedding(IDS).dtype == torch.float16

    def test_another_device_is_a_clear_error(self) -> None:
        module = self.linear().to("meta")
        with pytest.raises(RuntimeError, match="expected x and packed on one device"):
            module(torch.randn(2, 96))
        for device in ("CUDA", "MPS", "XPU"):
            for op in ("slmops::linear", "slmops::embedding"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(op, device)

    def test_gradient_of_its_input(self) -> None:
        module, x = self.linear(), torch.randn(2, 3, 96, requires_grad=True)
        with torch.no_grad():
            expected = module(x)
        y, grad = module(x), torch.randn(2, 3, 40)
        assert_same_bits(y.detach(), expected)
        y.backward(grad)
        assert x.grad is not None
        assert_same_bits(x.grad, grad @ module.dequantize())
        assert module.bias is not None and module.bias.grad is None

    def test_gradient_of_its_bias(self) -> None:
        module = self.linear()
        assert module.bias is not None
        module.bias.requires_grad_(True)
        grad = torch.randn(2, 3, 40)
        module(torch.randn(2, 3, 96)).backward(grad)
        assert module.bias.grad is not None
        assert_same_bits(module.bias.grad, grad.reshape(-1, 40).sum(0))

    def test_the_op_refuses_gradients(self) -> None:
        module, x = self.linear(), torch.randn(2, 96, requires_grad=True)
        with pytest.raises(RuntimeError, match="no_grad"):
            ops.linear(x, module.packed, 40)

    def test_repr_names_the_format(self) -> None:
        assert "96, 40, bias=True, int4 sub16, int8 activations per 32" in repr(self.linear())
        assert "no weight yet" in repr(Linear(3, 4))

    def test_module_without_a_weight_says_so(self) -> None:
        with pytest.raises(RuntimeError, match="header"):
            Linear(3, 4)(torch.randn(1, 3))


class TestWeight:
    """`module.weight` stands in for the parameter that is gone."""

    def module(self) -> Linear:
        torch.manual_seed(2)
        return optimize(nn.Sequential(nn.Linear(64, 48)).eval())[0]

    def test_says_what_it_is_without_values(self) -> None:
        weight = self.module().weight
        assert isinstance(weight, WeightView)
        assert isinstance(weight, nn.Parameter)  # as code that ties weights asks
        assert (tuple(weight.shape), weight.dtype) == ((48, 64), torch.float32)
        assert (weight.device.type, weight.requires_grad) == ("cpu", False)

    def test_has_the_values_when_used(self) -> None:
        module = self.module()
        values = module.dequantize()
        assert_same_bits(module.weight + 0, values + 0)
        assert_same_bits(module.weight[3], values[3])
        assert_same_bits(module.weight.data.t() @ values, values.t() @ values)
        assert type(module.weight.bfloat16()) is Tensor

    @pytest.mark.parametrize(
        "write",
        [
            lambda w: w.zero_(),
            lambda w: w.data.copy_(torch.ones(48, 64)),
            lambda w: nn.init.normal_(w),
            lambda w: w.__setitem__(0, 1.0),
            lambda w: setattr(w, "data", torch.ones(48, 64)),
        ],
    )
    def test_is_read_only(self, write: Callable[[Tensor], Any]) -> None:
        module = self.module()
        before = module.packed.clone()
        with pytest.raises(RuntimeError, match="read-only"):
            write(module.weight)
        assert_same_bits(module.packed, before)

    def test_assigning_a_tensor_packs_it(self) -> None:
        module, new = self.module(), torch.randn(30, 96)
        module.weight = nn.Parameter(new)
        assert_same_bits(module.dequantize(), torch_slmops.quantize_weight(new).dequantize())
        assert (module.out_features, module.in_features) == (30, 96)

    def test_assigning_a_packed_weight_shares_it(self) -> None:
        model = optimize(tied())
        model.head.weight = self.module().weight
        model.head.weight = model.embed.weight
        assert model.head.packed is model.embed.packed

    def test_torch_fast_paths_use_the_packed_module(self) -> None:
        # torch's encoder layer has a fused path in eval mode that takes linear1.weight itself.
        torch.manual_seed(3)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
        optimize(layer)
        calls: list[str] = []
        layer.linear1.register_forward_hook(lambda *args: calls.append("linear1"))
        with torch.no_grad():
            layer(torch.randn(1, 3, 64))
        assert calls == ["linear1"]
