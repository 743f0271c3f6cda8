"""Coverage-guided fuzzing of what reads saved models: `saved_model.py [OPTION...]`.

Options are those of libFuzzer, such as -max_total_time=30; `make fuzz` runs it. Whatever a file
holds, loading it gives the very model that was saved, or a SavedModelError that names the file and
leaves the model as it was. The first byte of an input chooses what the rest is: changes of the
file, a whole header, or changes of the recipe under a right digest.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
READERS = ("files", "rebuild", "recipe", "save_load")
with atheris.instrument_imports(include=[f"torch_slmops.{name}" for name in READERS]):
    import torch_slmops

from test_save_load import TestFuzz, digest, metadata_of, rewritten, tied  # noqa: E402

from torch_slmops.recipe import DIGEST_KEY, RECIPE_KEY  # noqa: E402

FOLDER = tempfile.TemporaryDirectory()
PATH = Path(FOLDER.name) / "model.safetensors"
torch_slmops.save(torch_slmops.optimize(tied(), progress=False), PATH)
GOOD, METADATA = PATH.read_bytes(), metadata_of(PATH)
HEADER_END = 8 + int.from_bytes(GOOD[:8], "little")


def changed_file(source: Any) -> bytes:
    """The file with some bytes set, cut away, put in or taken out."""
    data = bytearray(GOOD)
    for _ in range(source.ConsumeIntInRange(1, 4)):
        at = source.ConsumeIntInRange(0, len(data))
        count = source.ConsumeIntInRange(0, 12)
        data[at : at + count] = source.ConsumeBytes(source.ConsumeIntInRange(0, 12))
    return bytes(data)


def changed_header(source: Any) -> bytes:
    """The file with another header of its length, before the same tensors."""
    text = source.ConsumeBytes(source.remaining_bytes())
    return len(text).to_bytes(8, "little") + text + GOOD[HEADER_END:]


def value_of(source: Any) -> Any:
    """Something that JSON can hold."""
    kind = source.ConsumeIntInRange(0, 7)
    if kind == 0:
        return source.ConsumeInt(9)
    if kind == 1:
        return source.ConsumeFloat()
    if kind == 2:
        return source.ConsumeUnicodeNoSurrogates(8)
    if kind == 3:
        return [source.ConsumeInt(2) for _ in range(source.ConsumeIntInRange(0, 3))]
    fixed: list[Any] = [None, {}, {"a": {"a": 1}}, True]
    return fixed[kind - 4]


def changed_recipe(source: Any) -> dict[str, str]:
    """Metadata with some values of the recipe replaced, moved or dropped, and their digest."""
    root: Any = {"recipe": json.loads(METADATA[RECIPE_KEY])}
    for _ in range(source.ConsumeIntInRange(1, 3)):
        node, key = root, "recipe"
        while isinstance(node[key], dict | list) and node[key] and source.ConsumeBool():
            node = node[key]
            keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
            key = keys[source.ConsumeIntInRange(0, len(keys) - 1)]
        what = source.ConsumeIntInRange(0, 3)
        if what == 0 and node is not root:
            del node[key]
        elif what == 1 and isinstance(node, dict) and node is not root:
            node[source.ConsumeUnicodeNoSurrogates(12)] = node.pop(key)
        else:
            node[key] = value_of(source)
        if "recipe" not in root:
            break
    text = json.dumps(root["recipe"])
    return METADATA | {RECIPE_KEY: text, DIGEST_KEY: digest(text)}


def one_input(data: bytes) -> None:
    """Loads what an input says."""
    source = atheris.FuzzedDataProvider(data)
    kind = source.ConsumeIntInRange(0, 2)
    if kind == 0:
        PATH.write_bytes(changed_file(source))
    elif kind == 1:
        PATH.write_bytes(changed_header(source))
    else:
        PATH.write_bytes(GOOD)
        rewritten(PATH, changed_recipe(source))
    TestFuzz().check(PATH, GOOD)


if __name__ == "__main__":
    # A model is small, but torch and its allocator are not.
    atheris.Setup([*sys.argv, "-rss_limit_mb=4096"], one_input)
    atheris.Fuzz()
