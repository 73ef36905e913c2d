#!/usr/bin/env python3
"""Cuts the demo's Fashion-MNIST subset out of the full data set.

Reads the four IDX files of the full set (by default where Debian's package `dataset-fashion-mnist` puts them) and writes
four IDX files of the same format: the first PER_CLASS images of every class, in the order of the full set, so the classes
stay mixed as they were. Nothing is drawn at random and the gzip streams carry no name and no time, so the same zlib gives
the same bytes.

    tools/make_demo_data.py                       # writes assets/fashion-mnist
    tools/make_demo_data.py --check               # compares assets/fashion-mnist with the full set, writes nothing
"""

import argparse
import gzip
import io
import os
import pathlib
import struct
import sys

import numpy as np

CLASSES = 10
SPLITS = {"train": "train", "test": "t10k"}


def read_idx(path):
    """The array in one gzipped IDX file of unsigned bytes."""
    data = gzip.decompress(path.read_bytes())
    zero, kind, rank = struct.unpack_from(">HBB", data)
    if zero != 0 or kind != 8:
        sys.exit(f"{path}: not an IDX file of unsigned bytes (magic {data[:4].hex()})")
    shape = struct.unpack_from(f">{rank}I", data, 4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if body.size != np.prod(shape):
        sys.exit(f"{path}: header promises {shape}, file holds {body.size} bytes")
    return body.reshape(shape)


def write_idx(path, array):
    """Writes `array` as gzipped IDX, through a temporary file."""
    out = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=out, mtime=0) as stream:
        stream.write(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape))
        stream.write(array.tobytes())
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(out.getvalue())
    os.replace(temporary, path)


def subset(images, labels, per_class):
    """The first `per_class` images of every class, in their original order."""
    keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(CLASSES)]))
    if len(keep) != per_class * CLASSES:
        sys.exit(f"the source has fewer than {per_class} images in some class")
    return images[keep], labels[keep]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=pathlib.Path, default="/usr/share/datasets/fashion-mnist", help="folder of the full set's IDX files")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent.parent / "assets/fashion-mnist")
    parser.add_argument("--train-per-class", type=int, default=600)
    parser.add_argument("--test-per-class", type=int, default=100)
    parser.add_argument("--check", action="store_true", help="compare the files in --out with the source instead of writing them")
    args = parser.parse_args()

    per_class = {"train": args.train_per_class, "test": args.test_per_class}
    args.out.mkdir(parents=True, exist_ok=True)
    for split, prefix in SPLITS.items():
        images = read_idx(args.source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(args.source / f"{prefix}-labels-idx1-ubyte.gz")
        images, labels = subset(images, labels, per_class[split])
        for name, array in ((f"{split}-images-idx3-ubyte.gz", images), (f"{split}-labels-idx1-ubyte.gz", labels)):
            path = args.out / name
            if args.check:
                if not np.array_equal(read_idx(path), array):
                    sys.exit(f"{path}: differs from the source")
            else:
                write_idx(path, array)
            print(f"{path}: {array.shape}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
