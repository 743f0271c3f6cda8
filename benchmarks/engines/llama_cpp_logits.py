"""llama.cpp's logits for windows of tokens, after it has quantized a model itself.

    python llama_cpp_logits.py FOLDER TYPE TOKENS.npy OUT.npy [--importance FILE.npz] [--head TYPE]

FOLDER holds a bfloat16 checkpoint of transformers. It becomes a float32 GGUF file, which llama.cpp
quantizes to TYPE (such as Q4_K_M) by its own rules for each tensor. OUT.npy gets the logits,
float32 [windows, tokens, vocabulary]; standard output one line of JSON: the bytes of all tensors,
and how many tensors have which type. Runs in the environment of llama.cpp, without torch.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from convert_gguf import ARCHITECTURES, convert


def importance(folder: Path, file: Path) -> tuple[Any, list[Any]]:
    """An importance matrix as llama.cpp takes it, and what must live as long.

    Args:
        folder: The checkpoint, whose config tells the names of the tensors.
        file: Per linear layer, by its name in transformers, the mean square of each input.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    kept: list[Any] = []
    entries = []
    for name, values in np.load(file).items():
        array = np.ascontiguousarray(values, dtype=np.float32)
        bytes_name = f"{names.get_name(name)}.weight".encode()
        kept += [array, bytes_name]
        data = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entries.append(llama_cpp.llama_model_imatrix_data(bytes_name, data, array.size))
    entries.append(llama_cpp.llama_model_imatrix_data(None, None, 0))  # ends the list
    return (llama_cpp.llama_model_imatrix_data * len(entries))(*entries), kept


def quantize(folder: Path, out: Path, kind: str, matrix: Path | None, head: str | None) -> None:
    """Writes `out`, quantized by llama.cpp; a `head` is the type of embedding and output layer."""
    whole = out.with_suffix(".f32.gguf")
    convert(folder, whole, "f32")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 1
    if kind == "F32":
        parameters.ftype = llama_cpp.LLAMA_FTYPE_ALL_F32
    else:
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if head is not None:
        kinds = gguf.GGMLQuantizationType
        parameters.token_embedding_type = parameters.output_tensor_type = kinds[head].value
    kept = None
    if matrix is not None:
        parameters.imatrix, kept = importance(folder, matrix)
    code = llama_cpp.llama_model_quantize(
        str(whole).encode(), str(out).encode(), ctypes.byref(parameters)
    )
    del kept
    if code != 0:
        raise RuntimeError(f"llama_model_quantize gave {code}")


def logits(path: Path, windows: np.ndarray, out: Path) -> None:
    """Writes the logits of every token of every window, each from an empty context."""
    model_parameters = llama_cpp.llama_model_default_params()
    model_parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_parameters)
    if not model:
        raise RuntimeError(f"llama.cpp does not read {path}")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    count, length = windows.shape
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama_cpp.llama_init_from_model(model, parameters)
    shape = (count, length, vocabulary)
    found = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=shape)
    for row, ids in zip(found, windows, strict=True):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        batch = llama_cpp.llama_batch_init(length, 0, 1)
        batch.n_tokens = length
        for i, token in enumerate(ids.tolist()):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        code = llama_cpp.llama_decode(context, batch)
        llama_cpp.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        given = llama_cpp.llama_get_logits(context)
        row[:] = np.ctypeslib.as_array(given, shape=(length, vocabulary))
    llama_cpp.llama_free(context)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--importance", type=Path)
    parser.add_argument("--head")
    args = parser.parse_args()
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        quantize(args.folder, path, args.kind, args.importance, args.head)
        tensors = gguf.GGUFReader(path).tensors
        types = collections.Counter(tensor.tensor_type.name for tensor in tensors)
        size = sum(int(tensor.n_bytes) for tensor in tensors)
        del tensors
        logits(path, np.load(args.tokens), args.out)
    print(json.dumps({"bytes": size, "types": types}))


if __name__ == "__main__":
    main()
