#!/usr/bin/env python3
"""Makes tests/fixtures/images: small image files of every kind `prepare` reads, with the RGB pixels Pillow gives for them.

    python3 tools/image_fixtures.py [OUT_DIR]

Each line of manifest.txt is: file, width, height, tolerance in levels; FILE.rgb holds height x width x 3 bytes. A line that
starts with `resize` is: source .rgb, width, height, channels, side, tolerance; the golden is SOURCE.SIDE.raw.
Needs numpy and Pillow; those kept here were made with Pillow 13 and libjpeg-turbo 3.2. Deterministic.
"""
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

OUT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests/fixtures/images")
LINES = []


def picture(width, height, seed=0):
    """A smooth scene with edges and mild texture: different in x and y and in every channel."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    rng = np.random.default_rng(seed)
    rgb = np.stack([0.15 + 0.7 * x, 0.8 - 0.6 * y + 0.1 * np.sin(9 * x), 0.5 + 0.4 * np.cos(7 * (x + 2 * y))], -1)
    rgb[(x - 0.3) ** 2 + (y - 0.2) ** 2 < 0.02] = [0.9, 0.2, 0.1]
    rgb[x > 0.8 - 0.5 * y] *= 0.6
    rgb += rng.normal(0, 0.01, rgb.shape)
    return Image.fromarray((rgb.clip(0, 1) * 255).astype(np.uint8))


def add(name, data, tolerance=0):
    """Stores a file and what Pillow makes of it."""
    (OUT / name).write_bytes(data)
    rgb = Image.open(io.BytesIO(data)).convert("RGB")
    (OUT / f"{name}.rgb").write_bytes(rgb.tobytes())
    LINES.append(f"{name} {rgb.width} {rgb.height} {tolerance}")


def encoded(image, fmt, **options):
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def jpegs():
    # Subsampled chroma is 3: libjpeg-turbo interpolates it with more bits than zune-jpeg does.
    base = picture(53, 38)
    add("444.jpg", encoded(base, "JPEG", quality=92, subsampling=0), 2)
    add("422.jpg", encoded(base, "JPEG", quality=90, subsampling=1), 3)
    add("420.jpg", encoded(base, "JPEG", quality=90, subsampling=2), 3)
    add("progressive.jpg", encoded(base, "JPEG", quality=90, progressive=True, subsampling=2), 3)
    add("restart.jpg", encoded(base, "JPEG", quality=90, restart_marker_blocks=2), 3)
    add("tiny.jpg", encoded(picture(5, 3), "JPEG", quality=95), 2)
    add("grey.jpg", encoded(base.convert("L"), "JPEG", quality=90), 2)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: ignored, as torchvision's loader does
    add("oriented.jpg", encoded(base, "JPEG", quality=90, exif=exif), 3)
    add("trailer.jpg", encoded(base, "JPEG", quality=90) + b"SEFT camera trailer", 3)
    cmyk = Image.merge("CMYK", [base.getchannel(0), base.getchannel(1), base.getchannel(2), picture(53, 38, 5).getchannel(1)])
    data = encoded(cmyk, "JPEG", quality=92)
    add("cmyk.jpg", data, 2)
    adobe = data.index(b"Adobe")
    assert data[adobe + 11] == 0
    # Transform 2 makes the same planes YCCK: strange colours, yet a valid file with one right answer.
    add("ycck.jpg", data[: adobe + 11] + b"\x02" + data[adobe + 12 :], 3)


def others():
    base = picture(41, 29, 1)
    grey = base.convert("L")
    alpha = base.copy()
    alpha.putalpha(picture(41, 29, 2).getchannel(1))
    add("rgb.png", encoded(base, "PNG"))
    add("grey.png", encoded(grey, "PNG"))
    add("alpha.png", encoded(alpha, "PNG"))
    add("grey_alpha.png", encoded(alpha.convert("LA"), "PNG"))
    add("palette.png", encoded(base.quantize(37), "PNG"))
    add("palette_transparent.png", encoded(base.quantize(13), "PNG", transparency=4))
    add("bilevel.png", encoded(grey.convert("1"), "PNG"))
    add("rgb16.png", png16(np.asarray(base).astype(np.uint16) * 251 + 77))
    add("a.bmp", encoded(base, "BMP"))
    add("grey.bmp", encoded(grey, "BMP"))
    add("a.gif", encoded(base.quantize(64), "GIF"))
    frames = [base.quantize(16), picture(41, 29, 3).quantize(16)]
    add("animated.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50))
    add("lossless.webp", encoded(base, "WEBP", lossless=True))
    add("lossy.webp", encoded(base, "WEBP", quality=90), 2)
    add("a.tiff", encoded(base, "TIFF"))
    add("lzw.tiff", encoded(base, "TIFF", compression="tiff_lzw"))


def png16(samples):
    """A 16-bit RGB PNG, which Pillow reads (by the high byte) but cannot write."""
    import struct
    import zlib

    height, width, _ = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def resizes():
    for name, image, side in [("wide", picture(97, 31, 4), 24), ("small", picture(11, 17, 5), 32), ("grey", picture(28, 28, 6).convert("L"), 20)]:
        channels = len(image.getbands())
        (OUT / f"{name}.raw").write_bytes(image.tobytes())
        (OUT / f"{name}.{side}.raw").write_bytes(image.resize((side, side), Image.Resampling.BILINEAR).tobytes())
        LINES.append(f"resize {name}.raw {image.width} {image.height} {channels} {side} 1")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    jpegs()
    others()
    resizes()
    (OUT / "manifest.txt").write_text("\n".join(LINES) + "\n")
