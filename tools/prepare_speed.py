#!/usr/bin/env python3
"""Compares `prepare` with torchvision and Pillow: JPEG files of about 500x375 to 256x256 pixels with antialias.

    python3 tools/prepare_speed.py photos PHOTOS OUT [--count 300]    makes OUT from a folder of photographs
    python3 tools/prepare_speed.py compare OUT [--engine target/release/simsiam-engine] [--rounds 5] [--copies 4]

`compare` runs all in turn, every round anew, each in a process of its own, and prints images per second of wall time and of
CPU time (user and system, of all threads): the median over the rounds. Start-up does not count: the Python processes time
themselves after one image, and of `prepare` a run on one image is taken off.
Needs numpy, Pillow, torch and torchvision. Photographs come for example with Debian's packages mate-backgrounds,
gnome-backgrounds, plasma-workspace-wallpapers and ukui-wallpapers.
"""
import argparse
import io
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def make_photos(source, out, count):
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    out.mkdir(parents=True)
    kinds = {".jpg", ".jpeg", ".png", ".webp"}
    photos = []
    for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in kinds and p.is_file() and not p.is_symlink()):
        try:
            with Image.open(path) as image:
                if min(image.size) >= 700:
                    photos.append(path)
        except OSError:
            continue
    rng = np.random.default_rng(0)
    made = 0
    for path in photos:
        image = Image.open(path)
        image.draft("RGB", (2400, 1800))
        image = image.convert("RGB")
        for _ in range(-(-count // len(photos))):
            if made == count:
                return
            width, height = int(rng.integers(480, 521)), int(rng.integers(350, 391))
            if rng.random() < 0.2:
                width, height = height, width
            scale = rng.uniform(0.45, 1) * min(image.width / width, image.height / height)
            across, down = int(width * scale), int(height * scale)
            x, y = int(rng.integers(0, image.width - across + 1)), int(rng.integers(0, image.height - down + 1))
            crop = image.crop((x, y, x + across, y + down)).resize((width, height), Image.Resampling.LANCZOS)
            crop.save(out / f"{made:04}.jpg", quality=90)
            made += 1


def run_pillow(files):
    from PIL import Image

    for path in files:
        Image.open(io.BytesIO(path.read_bytes())).convert("RGB").resize((256, 256), Image.Resampling.BILINEAR).tobytes()


def run_torchvision(files):
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms.v2 import functional

    torch.set_num_threads(1)
    for path in files:
        image = decode_jpeg(read_file(str(path)), mode=ImageReadMode.RGB)
        functional.resize(image, [256, 256], antialias=True).permute(1, 2, 0).contiguous().numpy().tobytes()


def seconds(who):
    usage = resource.getrusage(who)
    return np.array([time.perf_counter(), usage.ru_utime + usage.ru_stime])


def run(name, files):
    """One image first, then all of them; prints wall and CPU seconds of the second."""
    work = {"pillow": run_pillow, "torchvision": run_torchvision}[name]
    work(files[:1])
    start = seconds(resource.RUSAGE_SELF)
    work(files)
    print(*(seconds(resource.RUSAGE_SELF) - start))


def times_python(name, source):
    output = subprocess.run([sys.executable, __file__, "run", name, str(source)], check=True, capture_output=True).stdout
    return np.array([float(word) for word in output.split()])


def times_prepare(engine, source, out, threads):
    command = [engine, "prepare", source, out, "--source", "folder", "--store", "raw:256", "--threads", str(threads), "--force"]
    start = seconds(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return seconds(resource.RUSAGE_CHILDREN) - start


def compare(folder, engine, rounds, copies):
    count = len(list(folder.glob("*.jpg")))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        many, one = Path(scratch, "many"), Path(scratch, "one")
        for i in range(copies):
            shutil.copytree(folder, many / str(i), ignore=shutil.ignore_patterns("*.rgb"))
        one.mkdir()
        shutil.copy(next(folder.glob("*.jpg")), one)
        out = Path(scratch, "out.ssds")
        ours = lambda threads: times_prepare(engine, many, out, threads) - times_prepare(engine, one, out, threads)
        commands = {
            "prepare, 1 thread": lambda: ours(1),
            "prepare, 2 threads": lambda: ours(2),
            "torchvision": lambda: times_python("torchvision", many),
            "Pillow": lambda: times_python("pillow", many),
        }
        speeds = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                speeds[name].append(count * copies / command())
    print(f"{count * copies} images, {rounds} rounds, load {os.getloadavg()[0]:.1f}")
    print(f"{'images per second of':24}{'wall':>10}{'CPU':>10}")
    for name, rows in speeds.items():
        wall, cpu = (statistics.median(column) for column in zip(*rows))
        print(f"{name:24}{wall:10.0f}{cpu:10.0f}   CPU by round: {' '.join(f'{row[1]:.0f}' for row in rows)}")


def main():
    if sys.argv[1:2] == ["run"]:
        return run(sys.argv[2], sorted(Path(sys.argv[3]).rglob("*.jpg")))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    photos = commands.add_parser("photos")
    photos.add_argument("source", type=Path)
    photos.add_argument("out", type=Path)
    photos.add_argument("--count", type=int, default=300)
    speed = commands.add_parser("compare")
    speed.add_argument("folder", type=Path)
    speed.add_argument("--engine", type=Path, default=Path(__file__).parent.parent / "target/release/simsiam-engine")
    speed.add_argument("--rounds", type=int, default=5)
    speed.add_argument("--copies", type=int, default=4)
    args = parser.parse_args()
    if args.command == "photos":
        make_photos(args.source, args.out, args.count)
    else:
        compare(args.folder, args.engine.resolve(), args.rounds, args.copies)


if __name__ == "__main__":
    main()
