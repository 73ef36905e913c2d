"""Writing and reading safetensors files, byte for byte reproducibly.

The safetensors package writes metadata in hash-map order, so the same content gives different bytes on every run. Committed
files should not change unless their content does; hence this writer. Reading goes through the package, which checks the result.
"""

import json
import os
import struct

import torch
from safetensors import safe_open

_DTYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32"}


def write(path, tensors, metadata):
    """Writes `tensors` (name -> tensor) and `metadata` (string -> string) to `path`, through a temporary file."""
    # Wide types first keeps every tensor aligned to its own size, which readers that map the file rely on.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    temporary = f"{path}.tmp"
    with open(temporary, "wb") as out:
        out.write(struct.pack("<Q", len(text)))
        out.write(text)
        for name in names:
            out.write(tensors[name].detach().contiguous().numpy().tobytes())
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def read(path):
    """The tensors and the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
