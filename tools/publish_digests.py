"""Writes the digests of `selfcheck` into the package and docs/command-line.md, after new cases.

    python tools/publish_digests.py

It refuses where a row differs from the definition, or ways of computing the logits differ.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch_slmops.selfcheck import Result, selfcheck

ROOT = Path(__file__).resolve().parents[1]
EXPECTED = ROOT / "torch_slmops" / "selfcheck" / "expected.py"
DOCS = ROOT / "docs" / "command-line.md"

TEMPLATE = '''"""What every CPU must give: the published digests, by tools/publish_digests.py."""

from __future__ import annotations

__all__ = ["LOGITS", "OPS", "VECTORS"]

OPS = {{
{ops}
}}

VECTORS = "{vectors}"

LOGITS = "{logits}"
'''


def check(found: Result) -> str:
    """Returns the digest of the logits."""
    wrong = [place for op in found.ops for place in op.wrong]
    if wrong:
        raise SystemExit(f"ops differ from their definitions, nothing is written: {wrong[:5]}")
    digests = set(found.logits.values())
    if len(digests) > 1:
        raise SystemExit(f"the model's logits differ, nothing is written: {found.logits}")
    return digests.pop()


def main() -> None:
    found = selfcheck()
    logits = check(found)
    ops = "\n".join(f'    "{op.op}": "{op.digest}",' for op in found.ops)
    EXPECTED.write_text(TEMPLATE.format(ops=ops, vectors=found.vectors, logits=logits))
    text = DOCS.read_text()
    for name, digest in (("vectors", found.vectors), ("logits ", logits)):
        text = re.sub(rf"^    {name} [0-9a-f]{{64}}$", f"    {name} {digest}", text, flags=re.M)
    DOCS.write_text(text)
    print(f"vectors {found.vectors}\nlogits  {logits}")


if __name__ == "__main__":
    main()
