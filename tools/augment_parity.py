#!/usr/bin/env python3
"""Truth for the augmentation, from torchvision and PIL.

    augment_parity.py fixtures PHOTO PHOTO      writes tests/fixtures/augment (small, committed)
    augment_parity.py check PHOTO...            the same comparison over more and larger views (needs cargo)
    augment_parity.py speed                     views/s of one core: PIL chain against this engine (needs cargo)

`fixtures` takes scikit-image's chelsea.png and coffee.png (CC0). Parameters are drawn here by an independent Philox, then the
test tests/augment.rs compares the engine's draws with them and the engine's pixels with what torchvision's float tensor chain
and the official PIL chain make of them.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from torchvision.transforms import InterpolationMode

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEED, EPOCH = 0x1234_5678_9ABC_DEF0, 7
DRAWS = 40_000
# Probabilities of jitter, grayscale and blur.
PRESETS = {"imagenet": (0.8, 0.2, 0.5), "cifar": (0.8, 0.2, 0.0), "blur": (0.0, 0.0, 1.0)}


# --- parameters ---------------------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def draw(sample, view, width, height, preset):
    """The parameters of one view by the engine's stated scheme: 32 words in fixed slots."""
    words = []
    for block in range(8):
        counter = [sample & 0xFFFFFFFF, (sample >> 32) | (view << 24), EPOCH, block]
        words += philox(counter, [SEED & 0xFFFFFFFF, SEED >> 32])

    def uniform(slot, low, high):
        return low + (high - low) * ((words[slot] >> 8) / 2**24)

    def below(slot, n):
        return (words[slot] * n) >> 32

    for attempt in range(10):
        area = width * height * uniform(2 * attempt, 0.2, 1.0)
        ratio = math.exp(uniform(2 * attempt + 1, math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = below(20, height - h + 1), below(21, width - w + 1)
            break
    else:
        h, w = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
        top, left = (height - h) // 2, (width - w) // 2
    jitter, grayscale, blur = PRESETS[preset]
    orders = [(a, b, c, 6 - a - b - c) for a in range(4) for b in range(4) for c in range(4) if len({a, b, c}) == 3]
    return {
        "top": top,
        "left": left,
        "height": h,
        "width": w,
        "jitter": uniform(22, 0, 1) < jitter,
        "order": orders[below(23, 24)],
        "brightness": uniform(24, 0.6, 1.4),
        "contrast": uniform(25, 0.6, 1.4),
        "saturation": uniform(26, 0.6, 1.4),
        "hue": uniform(27, -0.1, 0.1),
        "grayscale": uniform(28, 0, 1) < grayscale,
        "blur": uniform(29, 0, 1) < blur,
        "sigma": uniform(30, 0.1, 2.0),
        "flip": uniform(31, 0, 1) < 0.5,
    }


# --- the two chains -----------------------------------------------------------------------------------------------------


def chain(x, p, size, blur):
    """RandomResizedCrop, ColorJitter, RandomGrayscale, blur and flip on a PIL image or a tensor, with given parameters."""
    box = p["top"], p["left"], p["height"], p["width"]
    x = F.resized_crop(x, *box, [size, size], InterpolationMode.BILINEAR, antialias=True)
    if p["jitter"]:
        adjust = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
        for op in p["order"]:
            x = adjust[op](x, p[["brightness", "contrast", "saturation", "hue"][op]])
    if p["grayscale"]:
        x = F.rgb_to_grayscale(x, 3)
    if p["blur"]:
        x = blur(x, p["sigma"])
    return F.hflip(x) if p["flip"] else x


def float_chain(photo, p, size):
    """Levels in 0..255 as [size][size][3] floats."""
    x = F.to_tensor(photo)
    x = chain(x, p, size, lambda x, sigma: F.gaussian_blur(x, [13, 13], [sigma, sigma]))
    return x.permute(1, 2, 0).numpy() * 255.0


def pil_chain(photo, p, size):
    x = chain(photo, p, size, lambda x, sigma: x.filter(ImageFilter.GaussianBlur(radius=sigma)))
    return np.asarray(x)


def evaluation(photo, size):
    short = round(size * 256 / 224)
    x = F.resize(F.to_tensor(photo), short, InterpolationMode.BILINEAR, antialias=True)
    return F.center_crop(x, [size, size]).permute(1, 2, 0).numpy() * 255.0


# --- distribution of the draws --------------------------------------------------------------------------------------------


def distribution(values):
    """The cumulative distribution at up to 32 of its own quantiles: [threshold, share of values <= threshold]."""
    values = np.sort(np.asarray(values, dtype=np.float64))
    thresholds = np.unique(np.quantile(values, np.linspace(0, 1, 33)[:-1], method="inverted_cdf"))
    return [[float(t), float(np.searchsorted(values, t, side="right") / len(values))] for t in thresholds]


def crop_distributions(width, height):
    image = torch.empty(3, height, width)
    draws = [T.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)]
    top, left, h, w = np.array(draws).T
    stats = {"top": top, "left": left, "height": h, "width": w, "bottom": top + h, "right": left + w, "area": w * h, "ratio": w / h}
    return {"width": width, "height": height, "stats": {name: distribution(v) for name, v in stats.items()}}


def jitter_distributions():
    factors = (0.6, 1.4)
    draws = [T.ColorJitter.get_params(factors, factors, factors, (-0.1, 0.1)) for _ in range(DRAWS)]
    b, c, s, h = (np.array([draw[i] for draw in draws]) for i in range(1, 5))
    # The rank of the order of the operations among all 24.
    order = [sum(int(op) * 4 ** (3 - i) for i, op in enumerate(draw[0])) for draw in draws]
    stats = {"brightness": b, "contrast": c, "saturation": s, "hue": h, "order": order, "product": b * c * s}
    return {name: distribution(v) for name, v in stats.items()}


# --- commands -----------------------------------------------------------------------------------------------------------


def write_views(folder, photos, plan):
    """Photos, parameters (views.json) and what the two chains make of them (views.bin): of every `stride`-th row and column,
    about 1,000 pixels of a view, the float chain as u16 (level x 256), then the PIL chain as u8.
    `plan`: (preset, size, views of each photo)."""
    views, data = [], bytearray()

    def store(pixels, stride, dtype, scale):
        data.extend(np.round(pixels[::stride, ::stride].astype(np.float64) * scale).astype(dtype).tobytes())

    for number, photo in enumerate(photos):
        name = f"photo{number}.png"
        photo.save(folder / name, optimize=True)
        sample = 1000 * (number + 1) + (number << 33)
        for preset, size, count in plan:
            stride = max(1, size // 32)
            head = {"photo": name, "preset": preset, "size": size, "stride": stride}
            for i in range(count):
                p = draw(sample, i % 2, *photo.size, preset)
                views.append(head | {"sample": sample, "view": i % 2, "params": p})
                store(float_chain(photo, p, size), stride, "<u2", 256)
                store(pil_chain(photo, p, size), stride, "u1", 1)
                sample += 1
            if preset == "imagenet":
                # One view for evaluation: no parameters, no PIL chain.
                views.append(head | {"sample": 0, "view": 0, "params": None})
                store(evaluation(photo, size), stride, "<u2", 256)
    (folder / "views.bin").write_bytes(data)
    text = ",\n".join(json.dumps(view) for view in views)
    (folder / "views.json").write_text(f'{{"seed": {SEED}, "epoch": {EPOCH}, "views": [\n{text}\n]}}\n')


def fixtures(args):
    sizes = [(200, 150), (124, 168)]
    if len(args.photos) != len(sizes):
        raise SystemExit(f"fixtures: expected {len(sizes)} photos, got {len(args.photos)}")
    photos = [Image.open(path).convert("RGB").resize(size, Image.LANCZOS) for path, size in zip(args.photos, sizes)]
    folder = ROOT / "tests/fixtures/augment"
    folder.mkdir(parents=True, exist_ok=True)
    write_views(folder, photos, [("imagenet", 96, 4), ("imagenet", 224, 3), ("cifar", 32, 2), ("blur", 32, 2), ("blur", 96, 2)])
    torch.manual_seed(0)
    crops = [crop_distributions(*size) for size in [(500, 375), (256, 256), (37, 500), (500, 40), (32, 32)]]
    draws = {"draws": DRAWS, "crops": crops, "jitter": jitter_distributions()}
    (folder / "draws.json").write_text(json.dumps(draws) + "\n")


def check(args):
    photos = [Image.open(path).convert("RGB") for path in args.photos]
    each = max(1, args.views // (2 * len(photos)))
    with tempfile.TemporaryDirectory() as folder:
        write_views(pathlib.Path(folder), photos, [("imagenet", 224, each), ("blur", 224, each)])
        command = ["cargo", "test", "--test", "augment", "views_", "--", "--nocapture"]
        result = subprocess.run(command, cwd=ROOT, env=os.environ | {"AUGMENT_VIEWS": folder})
    sys.exit(result.returncode)


def speed(_args):
    torch.set_num_threads(1)
    noise = torch.randint(0, 256, (8, 8, 3), dtype=torch.uint8).numpy()
    photo = Image.fromarray(noise).resize((256, 256), Image.BICUBIC)
    transform = T.Compose([
        T.RandomResizedCrop(224, scale=(0.2, 1.0)),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        T.RandomGrayscale(p=0.2),
        T.RandomApply([lambda x: x.filter(ImageFilter.GaussianBlur(radius=np.random.uniform(0.1, 2.0)))], p=0.5),
        T.RandomHorizontalFlip(),
        T.ToTensor(),
        T.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ])  # fmt: skip
    subprocess.run(["cargo", "bench", "--bench", "augment", "--", "views_224_from_256"], cwd=ROOT, check=True)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    samples = json.loads((target / "criterion/augment/views_224_from_256/new/sample.json").read_text())
    # The best of several runs on both sides: other work on the machine only ever adds time.
    ours = max(64e9 * count / nanoseconds for count, nanoseconds in zip(samples["iters"], samples["times"]))
    pil = 0.0
    for _ in range(30):
        start = time.perf_counter()
        for _ in range(20):
            transform(photo)
        pil = max(pil, 20 / (time.perf_counter() - start))
    print(f"views/s of one core, 224 from 256x256: PIL chain {pil:.0f}, engine {ours:.0f} ({ours / pil:.1f} times)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for run in (fixtures, check, speed):
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        if run is not speed:
            command.add_argument("photos", nargs="+", type=pathlib.Path)
        if run is check:
            command.add_argument("--views", type=int, default=120)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
