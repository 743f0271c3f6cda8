"""save and load: the same bits, one file, and clear errors for whatever else a file may be."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torch_slmops
from torch_slmops import SavedModelError, load, ops, optimize, report, save
from torch_slmops.modules import PackedModule
from torch_slmops.recipe import DIGEST_KEY, RECIPE_KEY, VERSION_KEY, Recipe


class Tied(nn.Module):
    """An embedding, a layer that is used twice, one with a bias, and a tied head."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width, padding_idx=3)
        self.layer = nn.Linear(width, width)
        self.again = self.layer
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((), 2.0))

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.layer(self.embed(ids)))
        x = self.norm(self.again(x).transpose(1, 2)).transpose(1, 2) * self.scale
        y: Tensor = self.head(x)
        return y


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def tied(seed: int = 0, **options: Any) -> Tied:
    torch.manual_seed(seed)
    model = Tied(**options)
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(optimize(tied()), path)
    return path


def expected_logits() -> Tensor:
    found: Tensor = optimize(tied())(IDS)
    return found


@pytest.mark.parametrize(
    "options", [{}, {"weights": "int8"}, {"lm_head": None}, {"include": "layer"}], ids=str
)
def test_round_trip_gives_the_same_bits(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = optimize(tied(), **options)
    save(model, path)
    other = load(path, into=tied(1).train())
    assert_same_bits(other(IDS), model(IDS))
    assert not other.training
    assert str(report(other)) == str(report(model))
    assert other.again is other.layer
    name = "packed" if isinstance(model.head, PackedModule) else "weight"
    assert getattr(other.head, name) is getattr(other.embed, name)
    assert not any(parameter.requires_grad for parameter in other.parameters())
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_into_a_model_on_the_meta_device(saved: Path) -> None:
    with torch.device("meta"):
        model = Tied()
    assert_same_bits(load(saved, into=model)(IDS), expected_logits())


def test_dtype_of_the_file_counts(tmp_path: Path) -> None:
    model = optimize(tied().to(torch.bfloat16))
    save(model, tmp_path / "model.safetensors")
    other = load(tmp_path / "model.safetensors", into=tied(1))
    assert other.layer.weight.dtype == other.norm.weight.dtype == torch.bfloat16
    assert_same_bits(other(IDS), model(IDS))


def test_saving_again_gives_the_same_file(saved: Path, tmp_path: Path) -> None:
    save(load(saved, into=tied(1)), tmp_path / "again.safetensors")
    again = tmp_path / "again.safetensors"
    assert metadata_of(again) == metadata_of(saved)  # the package writes them in any order
    want = load_file(saved)
    for name, tensor in load_file(again).items():
        assert_same_bits(tensor, want.pop(name))
    assert not want


def test_nothing_is_packed_on_load(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("packed")

    want = expected_logits()
    for module in (ops, torch_slmops.weights.ops):
        monkeypatch.setattr(module, "pack_", refuse)
        monkeypatch.setattr(module, "quantize", refuse)
    assert_same_bits(load(saved, into=tied(1))(IDS), want)


def test_an_unoptimized_model_is_saved_too(tmp_path: Path) -> None:
    save(tied(), tmp_path / "m.safetensors")
    # Without gradients, as the loaded one: torch multiplies otherwise with them, in other bits.
    expected = tied().requires_grad_(False)(IDS)
    assert_same_bits(load(tmp_path / "m.safetensors", into=tied(1))(IDS), expected)


class TestWrongArguments:
    """What is no file of ours, or not meant for this model."""

    def test_not_modules(self, saved: Path) -> None:
        for call in (lambda: save(3, saved), lambda: load(saved, into=3)):
            with pytest.raises(TypeError, match=r"expected an nn.Module, got a int"):
                call()

    def test_an_optimized_model(self, saved: Path) -> None:
        with pytest.raises(ValueError, match="expected a float model, but embed is a Embedding"):
            load(saved, into=optimize(tied()))

    def test_another_model_is_left_as_it_was(self, saved: Path) -> None:
        cases: list[tuple[nn.Module, str]] = [
            (nn.Sequential(nn.Linear(3, 3)), r"embed: expected a model with such a module"),
            (tied(width=32), r"layer\.bias: the model has the shape \[32\] there, the file \[64"),
            (nn.ModuleDict({"embed": nn.Linear(64, 50)}), r"embed: the file has a packed Embed"),
        ]
        extra = tied()
        extra.more = nn.Linear(2, 2)
        cases.append((extra, r"more\.bias: the model has such a tensor, the file none"))
        less = tied()
        del less.norm
        cases.append((less, r"norm\.bias: expected a model with such a tensor"))
        other = tied()
        other.norm.weight = nn.Parameter(torch.ones(65))
        cases.append((other, r"norm\.weight: the model has the shape \[65\] there, the file \[64"))
        for model, message in cases:
            before = [(name, id(t)) for name, t in model.state_dict(keep_vars=True).items()]
            modules = [type(module) for module in model.modules()]
            with pytest.raises(SavedModelError, match=rf"model\.safetensors: {message}"):
                load(saved, into=model)
            after = [(name, id(t)) for name, t in model.state_dict(keep_vars=True).items()]
            assert (after, [type(module) for module in model.modules()]) == (before, modules)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(SavedModelError, match=r"absent: expected a safetensors file"):
            load(tmp_path / "absent", into=tied())
        with pytest.raises(SavedModelError, match=r"expected model\.safetensors or model\.saf"):
            load(tmp_path, into=tied())

    def test_foreign_files(self, tmp_path: Path) -> None:
        foreign = tmp_path / "foreign.safetensors"
        save_file({"embed.weight": torch.ones(2)}, foreign, metadata={"format": "pt"})
        with pytest.raises(SavedModelError, match=r"foreign.*slmops_format.*\['format'\]"):
            load(foreign, into=tied())
        torch.save({"a": torch.ones(2)}, tmp_path / "pickle.bin")
        with pytest.raises(SavedModelError, match=r"pickle\.bin: expected a safetensors file"):
            load(tmp_path / "pickle.bin", into=tied())

    def test_what_cannot_be_saved(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            model = Tied()
        with pytest.raises(TypeError, match=r"scale: expected a tensor on the CPU to save, got"):
            save(model, tmp_path / "model.safetensors")


def rewritten(
    path: Path, metadata: dict[str, str], tensors: dict[str, Tensor] | None = None
) -> None:
    save_file(load_file(path) if tensors is None else tensors, path, metadata=metadata)


def metadata_of(path: Path) -> dict[str, str]:
    header: dict[str, Any] = json.loads(header_of(path.read_bytes()))
    found: dict[str, str] = header["__metadata__"]
    return found


def header_of(data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length]


class TestDamage:
    """A file that is not what was saved is refused, and the error says where."""

    @pytest.mark.parametrize("left", [0, 7, 8, 100, -1, -5000])
    def test_truncated(self, saved: Path, left: int) -> None:
        data = saved.read_bytes()
        saved.write_bytes(data[:left])
        with pytest.raises(SavedModelError, match=r"model\.safetensors: expected .* (bytes|dam)"):
            load(saved, into=tied())

    def test_truncated_says_which_tensor(self, saved: Path) -> None:
        data = saved.read_bytes()
        saved.write_bytes(data[:-1])
        with pytest.raises(
            SavedModelError, match=rf"expected {len(data)} bytes.*got {len(data) - 1}.*in \w+\.pac"
        ):
            load(saved, into=tied())

    def test_newer(self, saved: Path) -> None:
        rewritten(saved, metadata_of(saved) | {VERSION_KEY: "2"})
        with pytest.raises(SavedModelError, match=r"expected format 1, .*got format '2'.*upgrade"):
            load(saved, into=tied())

    def test_recipe(self, saved: Path) -> None:
        metadata = metadata_of(saved)
        recipe = metadata[RECIPE_KEY].replace("Embedding", "embedding")
        rewritten(saved, metadata | {RECIPE_KEY: recipe})
        with pytest.raises(SavedModelError, match="its metadata is damaged"):
            load(saved, into=tied())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"exclude": [[0], 1]}, r"option exclude of \[\[0\], 1\]"),
            ({"weights": "int3"}, r"expected weights \"int4\" or \"int8\", got 'int3'"),
            ({"fuse": "yes"}, r"option fuse of 'yes'"),
            ({"kv_cache": "int4"}, r"kv_cache: expected \"int8\" or None, got 'int4'"),
            ({"wieghts": "int4"}, r"options wieghts"),
        ],
    )
    def test_options(self, saved: Path, change: dict[str, Any], message: str) -> None:
        metadata = metadata_of(saved)
        recipe = json.loads(metadata[RECIPE_KEY])
        recipe["options"] |= change
        text = json.dumps(recipe)
        rewritten(saved, metadata | {RECIPE_KEY: text, DIGEST_KEY: digest(text)})
        with pytest.raises(SavedModelError, match=rf"model\.safetensors: .*{message}"):
            load(saved, into=tied())

    @pytest.mark.parametrize(
        "shape", [[1 << 64], [1 << 62, 4], [0, 1 << 63], [-1], [float("inf")], ["a"], 3, [None]]
    )
    def test_shapes(self, saved: Path, shape: Any) -> None:
        metadata = metadata_of(saved)
        recipe = json.loads(metadata[RECIPE_KEY])
        recipe["tensors"]["norm.weight"]["shape"] = shape
        text = json.dumps(recipe)
        rewritten(saved, metadata | {RECIPE_KEY: text, DIGEST_KEY: digest(text)})
        with pytest.raises(SavedModelError, match=r"model\.safetensors: expected a recipe"):
            load(saved, into=tied())

    def test_every_tensor(self, saved: Path) -> None:
        data, tensors = saved.read_bytes(), load_file(saved)
        entries = json.loads(header_of(data))
        start = 8 + len(header_of(data))
        for name in tensors:
            begin, end = entries[name]["data_offsets"]
            for at in {begin, (begin + end) // 2, end - 1}:
                damaged = bytearray(data)
                damaged[start + at] ^= 0x40
                saved.write_bytes(damaged)
                with pytest.raises(SavedModelError, match=rf"model\.safetensors: {name}: expected"):
                    load(saved, into=tied())

    def test_tensors_missing_extra_or_of_another_dtype(self, saved: Path) -> None:
        metadata, tensors = metadata_of(saved), load_file(saved)
        less = {name: tensor for name, tensor in tensors.items() if name != "norm.weight"}
        cases = [
            (less, r"norm\.weight: expected such a tensor, there is none"),
            (tensors | {"more": torch.ones(1)}, r"more: expected no such tensor"),
            (
                tensors | {"norm.weight": tensors["norm.weight"].view(torch.int32)},
                r"norm\.weight: expected float32 \[64\], got int32 \[64\]",
            ),
        ]
        for changed, message in cases:
            rewritten(saved, metadata, changed)
            with pytest.raises(SavedModelError, match=message):
                load(saved, into=tied())


@pytest.mark.parametrize("block", [{}, {"kind": 3}, {"kind": "MLPSpec"}, {"kind": "NoSuchSpec"}])
def test_a_block_of_no_kind(block: dict[str, Any], saved: Path) -> None:
    metadata = metadata_of(saved)
    plain = json.loads(metadata[RECIPE_KEY])
    plain["blocks"]["layer"] = block
    text = json.dumps(plain)
    rewritten(saved, metadata | {RECIPE_KEY: text, DIGEST_KEY: digest(text)})
    with pytest.raises(SavedModelError, match=r"model\.safetensors: "):
        load(saved, into=tied())


class TestFuzz:
    """Whatever the bytes are: an error that names the file, or the very model that was saved."""

    @settings(max_examples=150)
    @given(data=st.data())
    def test_any_change_of_a_file(self, data: st.DataObject, tmp_path_factory: Any) -> None:
        path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
        save(optimize(tied(), progress=False), path)
        good = path.read_bytes()
        # Changes aim at the header of the file and those of packed weights.
        targets = [0, 8, good.index(b'"__metadata__"'), len(header_of(good)) + 8]
        targets += [i for i in range(len(good)) if good.startswith(b"SLMO", i)]
        changed = bytearray(good)
        for _ in range(data.draw(st.integers(1, 3))):
            near = data.draw(st.sampled_from(targets)) + data.draw(st.integers(0, 120))
            at = data.draw(st.one_of(st.just(near), st.integers(0, len(good))))
            what = data.draw(st.sampled_from(["set", "cut", "insert", "remove"]))
            at = min(at, len(changed) - 1)
            if what == "set":
                changed[at] = data.draw(st.integers(0, 255))
            elif what == "cut":
                changed = changed[:at] or bytearray(b"\0")
            elif what == "insert":
                changed[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            else:
                del changed[at : at + data.draw(st.integers(1, 9))]
                changed = changed or bytearray(b"\0")
        path.write_bytes(changed)
        self.check(path, good)

    def check(self, path: Path, good: bytes) -> None:
        model = tied(1)
        want = optimize(tied(), progress=False)(IDS)
        try:
            load(path, into=model)
        except SavedModelError as error:
            assert str(path) in str(error)
            assert type(model.head) is nn.Linear
        else:
            assert_same_bits(model(IDS), want)

    @settings(max_examples=150)
    @given(data=st.data())
    def test_any_recipe_under_a_right_digest(
        self, data: st.DataObject, tmp_path_factory: Any
    ) -> None:
        path = tmp_path_factory.getbasetemp() / "recipe.safetensors"
        save(optimize(tied(), progress=False), path)
        good, metadata = path.read_bytes(), metadata_of(path)
        plain = json.loads(metadata[RECIPE_KEY])
        node: Any = {"recipe": plain}
        key: Any = "recipe"
        while isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            keys = sorted(node) if isinstance(node, dict) else range(len(node))
            key = data.draw(st.sampled_from(list(keys)))
        values = st.one_of(
            st.none(),
            st.integers(-5, 1 << 70),
            st.text(max_size=5),
            st.floats(),
            st.just([]),
            st.just({}),
            st.just([1]),
            st.just({"a": 1}),
            st.sampled_from(["float16", "embed.packed"]),
        )
        if isinstance(node, dict) and data.draw(st.booleans()):
            node[data.draw(st.sampled_from(["a", "head", "head.packed", "layer"]))] = node.pop(key)
        else:
            node[key] = data.draw(values)
        text = json.dumps(node.get("recipe", plain))
        rewritten(path, metadata | {RECIPE_KEY: text, DIGEST_KEY: digest(text)})
        self.check(path, good)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def reference_checksum(data: bytes) -> int:
    """csrc/pack/checksum.h in Python integers."""
    mask, start, factor = (1 << 64) - 1, 0x9AE16A3B2F90404F, 0xD6E8FEB86659FD93

    def mix(h: int, w: int) -> int:
        return ((((h << 29) | (h >> 35)) & mask) ^ w) * factor & mask

    total = len(data)
    for at in range(0, len(data), 1 << 20):
        chunk = data[at : at + (1 << 20)]
        words = np.frombuffer(chunk + bytes(-len(chunk) % 8), np.uint64)
        lanes = [start + lane for lane in range(8)]
        for i, word in enumerate(words.tolist()):
            lanes[i % 8] = mix(lanes[i % 8], word)
        whole = start
        for lane in lanes:
            whole = mix(whole, lane)
        total = mix(total, whole)
    return total


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 63, 64, 65, 1000, (1 << 20) + 77])
def test_checksum_is_what_its_definition_says(size: int, threads: None) -> None:
    values = torch.randint(0, 256, (size,), dtype=torch.uint8)
    want = reference_checksum(values.numpy().tobytes())
    for count in (1, 2):
        torch.set_num_threads(count)
        assert ops.checksum(values) == want
        copy = torch.zeros_like(values)
        assert ops.copy_checksum(copy, values) == want
        assert torch.equal(copy, values)


def test_copies_have_the_size_of_what_they_copy() -> None:
    bytes_ = torch.zeros(10, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="_copy_checksum: expected out of 10 bytes, got 9"):
        ops.copy_checksum(bytes_[:9], bytes_)
    with pytest.raises(RuntimeError, match="_copy_checksum: expected out of one dimension"):
        ops.copy_checksum(torch.zeros(20, dtype=torch.uint8)[::2], bytes_)
    with pytest.raises(RuntimeError, match="_copy_checksum: expected bytes of dtype uint8"):
        ops.copy_checksum(bytes_, bytes_.float())


def test_checksum_of_other_tensors() -> None:
    for tensor in (torch.randn(3, 5).T, torch.tensor(True), torch.randn(4).bfloat16()):
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert ops.checksum(tensor) == reference_checksum(raw)


def test_recipe_is_text_and_back(saved: Path) -> None:
    metadata = metadata_of(saved)
    recipe = Recipe.parse(metadata, "file")
    assert recipe.metadata() == metadata
    assert recipe.shared == {
        "again.bias": "layer.bias",
        "again.packed": "layer.packed",
        "head.packed": "embed.packed",
    }
    assert recipe.options["weights"] == "int4"
