#!/usr/bin/env python3
"""Reads files that `simsiam-engine embed` wrote with the libraries that own the formats, and compares them with each other.

    tools/check_embed.py features.npy features.parquet features.safetensors [--dataset-size N] [--unit]

Needs numpy, pyarrow and safetensors. Exit code 1 when a file is not what it should be, or they differ in one bit.
"""
import argparse
import pathlib
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file


def read_npy(path):
    """Features (mapped, not loaded), labels and ids."""
    features = np.load(path, mmap_mode="r")
    labels, ids = (np.load(path.with_suffix(f".{what}.npy")) for what in ("labels", "ids"))
    assert isinstance(features, np.memmap) and features.flags.c_contiguous
    return features, labels, ids


def read_parquet(path):
    """The same of a Parquet file; class names have to belong to labels one to one."""
    table = pq.read_table(path)
    assert table.column_names == ["id", "label", "class", "feature"], table.column_names
    assert table.schema.field("feature").type == pa.list_(pa.field("element", pa.float32(), nullable=False)), table.schema
    feature = table["feature"].combine_chunks()
    features = feature.flatten().to_numpy().reshape(len(feature), -1)
    assert (np.diff(feature.offsets.to_numpy()) == features.shape[1]).all(), "rows of different lengths"
    labels, names = table["label"].to_pylist(), table["class"].to_pylist()
    assert all((label is None) == (name is None) for label, name in zip(labels, names))
    pairs = {(label, name) for label, name in zip(labels, names)}
    assert len(pairs) == len({label for label, _ in pairs}) == len({name for _, name in pairs}), pairs
    metadata = {k.decode(): v.decode() for k, v in pq.read_metadata(path).metadata.items()}
    print(f"{path}: {pq.read_metadata(path).num_row_groups} row groups, {metadata}")
    return features, np.array([-1 if label is None else label for label in labels], np.int64), table["id"].to_numpy()


def read_safetensors(path):
    """The same of a safetensors file."""
    tensors = load_file(path)
    assert sorted(tensors) == ["features", "ids", "labels"], sorted(tensors)
    return tensors["features"], tensors["labels"], tensors["ids"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=pathlib.Path, nargs="+")
    parser.add_argument("--dataset-size", type=int, help="images that there have to be")
    parser.add_argument("--unit", action="store_true", help="features have to have length 1")
    args = parser.parse_args()
    readers = {".npy": read_npy, ".parquet": read_parquet, ".safetensors": read_safetensors}
    first = None
    for path in args.files:
        features, labels, ids = readers[path.suffix](path)
        n, dim = features.shape
        assert features.dtype == np.float32 and labels.dtype == ids.dtype == np.int64
        assert labels.shape == ids.shape == (n,) and (ids == np.arange(n)).all() and n == (args.dataset_size or n)
        assert np.isfinite(features).all() and features.std(0).mean() > 0, "features do not differ from image to image"
        lengths = np.linalg.norm(np.asarray(features, np.float64), axis=1)
        assert not args.unit or np.abs(lengths - 1).max() < 1e-6, lengths
        classes, counts = np.unique(labels, return_counts=True)
        print(f"{path}: [{n}, {dim}], {len(classes)} labels of {counts.min()} to {counts.max()} images, lengths {lengths.min():.4f} to {lengths.max():.4f}")
        first = first or (features, labels, ids)
        for what, own, other in zip(("features", "labels", "ids"), (features, labels, ids), first):
            if not np.array_equal(own, other):
                sys.exit(f"{path}: {what} differ from those of {args.files[0]}")
    print(f"{len(args.files)} files hold the same, bit for bit")


if __name__ == "__main__":
    main()
