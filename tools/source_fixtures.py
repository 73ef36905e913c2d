#!/usr/bin/env python3
"""Makes tests/fixtures/sources: small sets of images in the forms that `prepare` reads, written by others' software, and
expected.json with what a reader of others finds in them.

    pip install numpy pillow pyarrow webdataset torchvision
    tools/source_fixtures.py tests/fixtures/sources
"""

import gzip
import io
import json
import pickle
import struct
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torchvision
import webdataset
from PIL import Image

EXPECTED = {}


def digest(array):
    """Columns x rows x channels, and the CRC-32 of the pixels."""
    height, width, channels = (*array.shape, 1)[:3]
    crc = zlib.crc32(np.ascontiguousarray(array, dtype=np.uint8).tobytes())
    return f"{width}x{height}x{channels} {crc:08x}"


def picture(number):
    """A small picture of its own size, with a pattern that no other has, turned or mirrored."""
    height, width = 5 + number % 4, 7 + number % 3
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return ((x * 31 + y * 57 + c * 83 + number * 11) % 256).astype(np.uint8)


def png(number):
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, "png", optimize=True)
    return out.getvalue()


def webp(number):
    out = io.BytesIO()
    Image.fromarray(picture(number)).save(out, "webp", lossless=True)
    return out.getvalue()


def expect(name, numbers, labels, classes):
    """What a reader finds: digests of pixels and labels in order, and the classes."""
    EXPECTED[name] = {"pixels": [digest(picture(n)) for n in numbers], "labels": labels, "classes": classes}


# ---- tar


def add(tar, name, data, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def tars(out):
    # Names over 100 bytes, with folders: GNU's long names, and PAX records (with a name that is not ASCII).
    long = "a-folder-with-quite-a-long-name/" * 4
    forms = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    for form, number in forms.items():
        prefix = {"ustar": "plain/", "gnu": long, "pax": long + "größe/"}[form]
        with tarfile.open(out / f"{form}.tar", "w", format=number) as tar:
            if form != "ustar":
                add(tar, prefix, b"", type=tarfile.DIRTYPE)
            labels = [7, 0, None, 3]
            for n, label in enumerate(labels):
                add(tar, f"{prefix}{n:04}.PNG", png(n), mtime=1.5 if form == "pax" else 1)
                if label is not None:
                    add(tar, f"{prefix}{n:04}.cls", str(label).encode())
                if n == 1:
                    add(tar, f"{prefix}{n:04}.txt", b"a caption")
                    add(tar, f"{prefix}link", b"", type=tarfile.SYMTYPE, linkname="nowhere")
        expect(f"{form}.tar", range(4), labels, [str(c) for c in range(8)])
    # The whole of webdataset's own reader on the same file.
    for form in forms:
        read = list(webdataset.WebDataset(str(out / f"{form}.tar"), shardshuffle=False).decode("rgb8"))
        assert [digest(sample["png"]) for sample in read] == EXPECTED[f"{form}.tar"]["pixels"]
        assert [sample.get("cls") for sample in read] == EXPECTED[f"{form}.tar"]["labels"]


def shards(out):
    """webdataset's writer: two shards, labels as names in JSON."""
    (out / "shards").mkdir()
    animals = ["wolf", "ant", "emu"]
    with webdataset.ShardWriter(str(out / "shards/set-train-%03d.tar"), maxcount=4, verbose=0, mtime=0) as sink:
        for n in range(7):
            meta = {"class": animals[n % 3], "id": n, "group": n // 2}
            sink.write({"__key__": f"x/{n:03}", "webp": webp(n), "json": meta})
    urls = sorted(str(path) for path in (out / "shards").iterdir())
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [digest(sample["webp"]) for sample in read] == [digest(picture(n)) for n in range(7)]
    classes = sorted(animals)
    expect("shards", range(7), [classes.index(animals[n % 3]) for n in range(7)], classes)
    EXPECTED["shards by group"] = dict(EXPECTED["shards"], labels=[n // 2 for n in range(7)], classes=list("0123"))


# ---- Parquet


def features(image, labels):
    described = {image: {"_type": "Image"}}
    for name, classes in labels.items():
        described[name] = {"_type": "ClassLabel", "names": classes}
    return {b"huggingface": json.dumps({"info": {"features": described}}).encode()}


def parquets(out):
    classes = ["plane", "car", "bird", "cat"]
    labels = [3, 1, None, 0, 2, -1, 1, 3, 0, 1, 2]
    images = [{"bytes": png(n), "path": f"{n}.png"} for n in range(11)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {"id": list(range(11)), "img": pa.array(images, kind), "label": pa.array(labels, pa.int64())}
    ).replace_schema_metadata(features("img", {"label": classes}))
    wanted = [None if label in (None, -1) else label for label in labels]
    for codec in ["none", "snappy", "zstd", "gzip", "lz4"]:
        pq.write_table(table, out / f"{codec}.parquet", compression=codec, row_group_size=6)
        expect(f"{codec}.parquet", range(11), wanted, classes)
    # Pages of version 2, several to a row group, statistics, no dictionary, lengths in front of the bytes.
    pq.write_table(
        table,
        out / "pages2.parquet",
        compression="zstd",
        data_page_version="2.0",
        data_page_size=256,
        write_batch_size=2,
        use_dictionary=False,
        column_encoding={"img.bytes": "DELTA_LENGTH_BYTE_ARRAY", "label": "DELTA_BINARY_PACKED"},
    )
    expect("pages2.parquet", range(11), wanted, classes)
    # Bytes without a struct, never null, the same images several times (a dictionary), labels as texts.
    numbers = [4, 2, 4, 9, 2, 4]
    names = ["oak", "elm", None, "oak", "ash", "elm"]
    schema = pa.schema([pa.field("kind", pa.string()), pa.field("picture", pa.binary(), nullable=False)])
    plain = pa.table([pa.array(names), pa.array([png(n) for n in numbers], pa.binary())], schema=schema)
    pq.write_table(plain, out / "plain.parquet", use_dictionary=True)
    expect("plain.parquet", numbers, [2, 1, None, 2, 0, 1], ["ash", "elm", "oak"])
    assert "RLE_DICTIONARY" in pq.ParquetFile(out / "plain.parquet").metadata.row_group(0).column(1).encodings
    # Rows without an image; two columns of images and of classes.
    holes = [images[0], None, {"bytes": None, "path": "2.png"}, images[3]]
    two = pa.table(
        {
            "left": pa.array(holes, kind),
            "right": pa.array(images[:4], kind),
            "fine": pa.array([0, 1, 9, 3], pa.int32()),
            "coarse": pa.array([1, 1, 0, 0], pa.int64()),
        }
    ).replace_schema_metadata(features("left", {"fine": classes, "coarse": ["air", "land"]}))
    pq.write_table(two, out / "two.parquet")
    expect("two.parquet", [0, 3], [1, 0], ["air", "land"])
    # The layout of a repository of Hugging Face.
    (out / "hub/data").mkdir(parents=True)
    for split, rows in [("train", [0, 5]), ("test", [1])]:
        for i, start in enumerate(rows):
            part = table.slice(start, 3)
            pq.write_table(part, out / f"hub/data/{split}-{i:05}-of-{len(rows):05}.parquet")
    expect("hub train", [0, 1, 2, 5, 6, 7], [3, 1, None, None, 1, 3], classes)


# ---- CIFAR and IDX


def cifar(out):
    """The binary layout, from the same rows as the Python layout that torchvision reads."""
    folder = out / "cifar-10-batches-bin"
    folder.mkdir()
    with tempfile.TemporaryDirectory() as place:
        python = Path(place) / "cifar-10-batches-py"
        python.mkdir()
        labels = {}
        files = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
        for n, name in enumerate(files):
            count = 2 if n == 1 else 1
            rows = ramp(count, n)
            labels[name] = [(n * 3 + i) % 10 for i in range(count)]
            records = [bytes([label]) + row.tobytes() for label, row in zip(labels[name], rows)]
            (folder / f"{name}.bin").write_bytes(b"".join(records))
            batch = {"data": rows.reshape(count, 3072), "labels": labels[name]}
            (python / name).write_bytes(pickle.dumps(batch))
        names = "airplane automobile bird cat deer dog frog horse ship truck".split()
        (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
        (python / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
        for split in ["train", "test"]:
            # Its check of MD5 sums is for the published files.
            torchvision.datasets.CIFAR10._check_integrity = lambda self: True
            torchvision.datasets.utils.check_integrity = lambda *args: True
            torchvision.datasets.cifar.check_integrity = lambda *args: True
            read = torchvision.datasets.CIFAR10(place, train=split == "train")
            EXPECTED[f"cifar10 {split}"] = {
                "pixels": [digest(image) for image in read.data],
                "labels": read.targets,
                "classes": read.classes,
            }
    folder = out / "cifar-100-binary"
    folder.mkdir()
    fine, coarse = [f"fine{n}" for n in range(100)], [f"coarse{n}" for n in range(20)]
    (folder / "fine_label_names.txt").write_text("\n".join(fine) + "\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(coarse) + "\n")
    for split, count in [("train", 2), ("test", 1)]:
        rows = ramp(count, 20 + count)
        marks = [(n * 7 % 20, 99 - n * 70) for n in range(count)]
        records = [bytes(mark) + row.tobytes() for mark, row in zip(marks, rows)]
        (folder / f"{split}.bin").write_bytes(b"".join(records))
        found = [digest(row.transpose(1, 2, 0)) for row in rows]
        EXPECTED[f"cifar100 {split}"] = {"pixels": found, "labels": [m[1] for m in marks], "classes": fine}
        EXPECTED[f"cifar100 {split} coarse"] = {"pixels": found, "labels": [m[0] for m in marks], "classes": coarse}


def ramp(count, seed):
    n, c, y, x = np.mgrid[0:count, 0:3, 0:32, 0:32]
    return ((x * (3 + seed) + y * 5 + c * 70 + n * 29 + seed * 17) % 256).astype(np.uint8)


def idx(out):
    """MNIST's layout, checked by torchvision's reader."""
    folder = out / "MNIST/raw"
    folder.mkdir(parents=True)
    for split, count in [("train", 6), ("t10k", 4)]:
        # torchvision reads the plain files; of the training set the packed ones are kept.
        n, y, x = np.mgrid[0:count, 0:9, 0:5]
        images = ((n * 41 + y * 13 + x * 29) % 256).astype(np.uint8)
        labels = (np.arange(count) * 3 % 5).astype(np.uint8)
        head = struct.pack(">IIII", 0x803, count, 9, 5)
        files = {"images-idx3": head + images.tobytes(), "labels-idx1": struct.pack(">II", 0x801, count) + labels.tobytes()}
        for name, data in files.items():
            path = folder / f"{split}-{name}-ubyte"
            path.write_bytes(data)
            if split == "train":
                path.with_suffix(".gz").write_bytes(gzip.compress(data, mtime=0))
    for split in ["train", "t10k"]:
        read = torchvision.datasets.MNIST(out, train=split == "train")
        classes = [str(c) for c in range(int(read.targets.max()) + 1)]
        EXPECTED[f"idx {split}"] = {
            "pixels": [digest(image) for image in read.data.numpy()],
            "labels": read.targets.tolist(),
            "classes": classes,
        }
    for path in folder.glob("train-*-ubyte"):
        path.unlink()


def main():
    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    for make in [tars, shards, parquets, cifar, idx]:
        make(out)
    (out / "expected.json").write_text(json.dumps(EXPECTED, indent=1, ensure_ascii=False) + "\n")
    total = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{total} bytes in {out}")


if __name__ == "__main__":
    main()
