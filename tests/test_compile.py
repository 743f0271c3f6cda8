"""torch.compile with inductor, generate with a static cache, export, and running without Python."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from graph_models import Decoder, K, packed
from torch import Tensor

import torch_slmops
from torch_slmops import optimize

transformers = pytest.importorskip("transformers")

from small_models import CACHE, logits, small, tokens  # noqa: E402

from examples import quickstart  # noqa: E402
from examples.aoti import export  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles

ROOT = Path(torch_slmops.__file__).parents[1]
EXTENSION = ROOT / "torch_slmops" / "_C.abi3.so"
LOADS = """
#include <dlfcn.h>
#include <cstdio>
int main(int, char** argv) {
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) std::puts(dlerror());
  if (dlsym(RTLD_DEFAULT, "Py_IsInitialized") != nullptr) std::puts("there is a Python");
  std::puts("done");
}
"""


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def optimized(dtype: torch.dtype = torch.float32) -> Any:
    """A small Llama with our attention."""
    torch_slmops.register_attention()
    model = optimize(small("llama", dtype=dtype), progress=False)
    model.set_attn_implementation("slmops")
    return model


def graph_breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


class TestBackend:
    def test_is_found_by_its_name(self) -> None:
        assert "slmops" in torch._dynamo.list_backends()

    def test_with_inductor(self) -> None:
        model = packed(Decoder())
        compiled = torch.compile(model, backend="slmops", fullgraph=True, dynamic=True)
        with torch.no_grad():
            for length in (5, 9):
                x, angles = torch.randn(2, length, K), torch.randn(2, 1, length, 16)
                want = model(x, angles.cos(), angles.sin())
                got = compiled(x, angles.cos(), angles.sin())
                # float32 sums of other order and fused multiply-adds, K terms in all
                assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())
            model.mlp.w1.weight = torch.randn(model.mlp.w1.weight.shape)
            want = model(x, angles.cos(), angles.sin())
            got = compiled(x, angles.cos(), angles.sin())
            assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max())

    def test_options_are_inductors(self) -> None:
        model = packed(Decoder())
        with pytest.raises(Exception, match="no_such_option"):
            torch.compile(model, backend="slmops", options={"no_such_option": 1})(
                torch.randn(2, 5, K), torch.ones(16), torch.ones(16)
            )


class TestStaticCache:
    @pytest.mark.parametrize("backend", ["inductor", "slmops"])
    def test_generate_without_graph_breaks(self, backend: str) -> None:
        model, prompt = optimized(), tokens(1, 5)
        options = {
            "do_sample": False,
            "max_new_tokens": 8,
            "cache_implementation": "static",
            "output_logits": True,
            "return_dict_in_generate": True,
        }
        want = model.generate(prompt, **options)
        assert not torch._dynamo.utils.counters["stats"]
        config = transformers.CompileConfig(backend=backend, fullgraph=True, mode="default")
        config._compile_all_devices = True  # not only on GPUs
        got = model.generate(prompt, compile_config=config, **options)
        assert_same_bits(got.sequences, want.sequences)
        for a, b in zip(got.logits, want.logits, strict=True):
            assert_same_bits(a, b)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not graph_breaks()

    def test_cache_is_not_copied(self) -> None:
        from torch._inductor.utils import run_and_get_code

        model, room = optimized(torch.bfloat16), 1024
        caches = [transformers.StaticCache(config=model.config, max_cache_len=room) for _ in "ab"]
        with torch.no_grad():
            for cache in caches:
                model(input_ids=tokens(1, 5), **{CACHE: cache})
            compiled = torch.compile(model, fullgraph=True)
            got, code = run_and_get_code(compiled, input_ids=tokens(1, 1), **{CACHE: caches[0]})
            want = model(input_ids=tokens(1, 1), **{CACHE: caches[1]})
        assert_same_bits(got.logits, want.logits)
        for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
            assert_same_bits(a.keys, b.keys)
            assert_same_bits(a.values, b.values)
        (source,) = code
        made = re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", source)
        sizes = [
            math.prod(int(size) for size in found.split(",") if size.strip()) for found in made
        ]
        assert sizes
        assert max(sizes) <= room < caches[0].layers[0].keys.numel()


class TestExport:
    def test_step_with_a_cache(self) -> None:
        model = export.load(export.MODEL)
        step = export.Decoder(model, 32).eval()
        length = torch.export.Dim("length", min=1, max=32)
        example = (tokens(1, 5), torch.tensor(0))
        with torch.no_grad():
            program = torch.export.export(step, example, dynamic_shapes=({1: length}, None))
            exported, position = program.module(), 0
            for part in tokens(1, 12).split([7, 1, 1, 3], dim=1):
                got = exported(part, torch.tensor(position))
                assert_same_bits(got, step(part, torch.tensor(position)))
                position += part.shape[1]
        assert_same_bits(got, logits(model, tokens(1, 12))[:, -1])

    def test_vocabulary(self) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(export.MODEL)
        data, texts = export.vocabulary_bytes(tokenizer), []
        while data:
            size = int.from_bytes(data[:4], "little")
            texts.append(data[4 : 4 + size])
            data = data[4 + size :]
        text = "def f(x):\n    return 'ä' + x\n"
        assert b"".join(texts[i] for i in tokenizer(text)["input_ids"]).decode() == text


def torch_libraries() -> str:
    return str(Path(torch.__file__).parent / "lib")


def test_ops_load_into_a_program_without_python(tmp_path: Path) -> None:
    source = tmp_path / "loads.cpp"
    source.write_text(LOADS)
    compiler = os.environ.get("CXX", "c++").split()
    subprocess.run([*compiler, source, "-o", tmp_path / "loads", "-ldl"], check=True)
    done = subprocess.run(
        [tmp_path / "loads", EXTENSION],
        env={"LD_LIBRARY_PATH": torch_libraries()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "done\n"


@pytest.mark.full
def test_package_runs_without_python(tmp_path: Path) -> None:
    prompt, new = quickstart.PROMPTS[2], 24
    export.main([str(tmp_path), "--prompt", prompt, "--tokens", "64"])
    program = tmp_path / "run"
    subprocess.run([export.MODEL.parent / "aoti" / "build.sh", sys.executable, program], check=True)
    needed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so" in needed
    assert "libpython" not in needed
    assert "libtorch_python" not in needed

    tokenizer = transformers.AutoTokenizer.from_pretrained(export.MODEL)
    model = export.load(export.MODEL)
    ids: Tensor = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, do_sample=False, max_new_tokens=new, eos_token_id=None)
    for row in (*torch_slmops.isas(), ""):
        done = subprocess.run(
            [program, tmp_path, EXTENSION, str(new)],
            stdin=(tmp_path / "prompt.txt").open(),
            env={"SLMOPS_ISA": row} if row else {},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == tokenizer.decode(expected[0]) + "\n"
        assert f"ISA row {row or torch_slmops.isas()[0]}\n" in done.stderr
