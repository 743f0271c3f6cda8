"""selfcheck: it covers every op, finds what is wrong, and its digests are those published."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits

import torch_slmops
from torch_slmops import ops, reference, selfcheck
from torch_slmops.selfcheck import check, expected
from torch_slmops.selfcheck.cases import cases
from torch_slmops.selfcheck.model import TOKENS, VOCABULARY, Model
from torch_slmops.selfcheck.numbers import Numbers

ROOT = Path(__file__).parents[1]


def test_numbers_are_splitmix64() -> None:
    # The first outputs of the published algorithm for the seed 0.
    assert [int(word) for word in Numbers(0)._words(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def test_numbers_have_the_values_they_promise() -> None:
    numbers = Numbers(1)
    assert set(numbers.integers(3, 200).tolist()) == {0, 1, 2, 3}
    x = numbers.values(2000)
    assert x.abs().amax() < 3 and abs(float(x.mean())) < 0.1
    special = numbers.special(64, 64)
    assert special.isnan().any() and special.isinf().any()
    assert (special.isfinite().all(1)).any()
    assert sorted(numbers.permutation(50).tolist()) == list(range(50))
    assert numbers.patterns(4000).isnan().any()


def test_every_op_has_a_case() -> None:
    no_ops = {
        "Header",
        "Kept",
        "LAYER_PARTS",
        "checksum",
        "copy_checksum",
        "describe",
        "packed_bytes",
        "refuse_gradient",
    }
    no_ops |= {"int8_shape", "read_int8"}
    assert {case.op for case in cases()} == set(ops.__all__) - no_ops
    assert set(expected.OPS) == set(ops.__all__) - no_ops


def test_passes_here(threads: None) -> None:
    torch.set_num_threads(1)
    before = torch_slmops.isa()
    advanced: list[int] = []
    start = time.process_time()
    found = selfcheck.selfcheck(advance=advanced.append)
    assert time.process_time() - start < 30  # not found.seconds: others may use the machine too
    assert found.passed, found
    assert found.rows == tuple(torch_slmops.isas())
    assert found.threads == (1, 2)
    assert found.seconds > 0
    assert sum(advanced) == selfcheck.steps(found.rows, found.threads)
    assert len(found.logits) == 1 + 3 * len(found.rows) * 2
    assert (torch_slmops.isa(), torch.get_num_threads()) == (before, 1)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_does_not_depend_on_how_torch_computes(capability: str) -> None:
    """torch's own kernels, which make the definition's arithmetic, vary with the CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "torch_slmops", "selfcheck", "--isa", "scalar", "--threads", "1"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"logits  {expected.LOGITS} as published" in done.stdout


def test_docs_publish_the_digests() -> None:
    text = (ROOT / "docs" / "command-line.md").read_text()
    assert expected.VECTORS in text
    assert expected.LOGITS in text


def test_finds_one_wrong_bit_of_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.rms_norm

    def wrong(x: torch.Tensor, *options: Any) -> torch.Tensor:
        y = right(x, *options)
        if torch_slmops.isa() == "scalar" and y.dtype == torch.bfloat16:
            y.view(torch.int16)[-1, -1] ^= 1
        return y

    monkeypatch.setattr(ops, "rms_norm", wrong)
    found = selfcheck.selfcheck(threads=[1])
    assert not found.passed
    results = {op.op: op for op in found.ops}
    assert {op for op, result in results.items() if not result.passed} == {"rms_norm"}
    assert results["rms_norm"].wrong[0].startswith("row scalar, threads 1: case ")
    assert results["rms_norm"].digest == results["rms_norm"].published
    # The model norms in bfloat16 too.
    assert all(how.startswith("scalar") for how in found.wrong_logits)
    assert found.wrong_logits


def test_finds_a_definition_that_other_machines_do_not_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a CPU where torch computes the definition otherwise: op and definition still agree."""

    def both(x: torch.Tensor, *options: Any) -> torch.Tensor:
        return torch.full_like(x, 0.5)

    monkeypatch.setattr(ops, "rms_norm", both)
    monkeypatch.setattr(reference, "rms_norm", both)
    found = selfcheck.selfcheck(rows=["scalar"], threads=[1])
    result = next(op for op in found.ops if op.op == "rms_norm")
    assert not result.wrong and not result.passed and not found.passed


def test_one_other_digest_fails() -> None:
    found = selfcheck.selfcheck(rows=["scalar"], threads=[1])
    assert found.passed
    assert not replace(found, vectors="0" * 64).passed
    assert not replace(found, logits=found.logits | {"scalar, threads 1, decode": "0"}).passed


def test_zeros_of_both_signs_differ() -> None:
    zero = torch.zeros(3)
    assert not check._same_bits([zero], [-zero])
    assert not check._same_bits([zero], [zero.double()])
    assert check._same_bits([zero * torch.nan], [zero * torch.nan])
    assert check._digest([zero]) != check._digest([-zero])


def test_unknown_row_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        selfcheck.selfcheck(rows=["abacus"])


def test_model_decodes_what_it_reads() -> None:
    model = Model()
    logits = model.prefill()
    assert logits.shape == (TOKENS, VOCABULARY)
    assert logits.isfinite().all()
    assert len(set(logits.argmax(1).tolist())) > TOKENS // 2  # it depends on its tokens
    assert_same_bits(model.decode(), logits)
    assert_same_bits(model.layers(), logits)
    assert_same_bits(model.layers(reference), logits)
