#!/usr/bin/env python3
"""Makes tests/fixtures/images: small image files of every kind `prepare` reads, with the RGB pixels Pillow gives for them.

    python3 tools/image_fixtures.py [OUT_DIR]

manifest.txt has a line for each: FILE WIDTH HEIGHT TOLERANCE (in levels); FILE.rgb holds height x width x 3 bytes. A line
    over FILE         has FILE.white.rgb and FILE.black.rgb: the picture on a white and on a black ground
    resize FILE ...   is: source, width, height, channels, side, tolerance; the golden is SOURCE.SIDE.raw
sizes.pack.gz is JPEGs of many small sizes in every subsampling, each with its pixels (see `sizes`).
Needs numpy, Pillow, simplejpeg and tifffile, and cjpeg of libjpeg-turbo-progs; those kept here were made with Pillow 13
(libjpeg-turbo 3.2) and simplejpeg 1.9. Deterministic.
"""
import gzip
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
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


def pillow(data):
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I;16"):
        # convert() would clip to 255, which leaves white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def add(name, data, tolerance=0):
    """Stores a file and what Pillow makes of it."""
    (OUT / name).write_bytes(data)
    rgb = pillow(data)
    (OUT / f"{name}.rgb").write_bytes(rgb.tobytes())
    LINES.append(f"{name} {rgb.width} {rgb.height} {tolerance}")


def add_transparent(name, data, tolerance=0):
    """Stores a file with transparency, also as it looks on white and on black."""
    add(name, data, tolerance)
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    for ground in ["white", "black"]:
        over = Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")
        (OUT / f"{name}.{ground}.rgb").write_bytes(over.tobytes())
    LINES.append(f"over {name}")


def encoded(image, fmt, **options):
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


def cjpeg(image, *options):
    """What Pillow cannot write."""
    return subprocess.run(["cjpeg", "-quality", "90", *options], input=encoded(image, "PPM"), capture_output=True, check=True).stdout


def jpegs():
    base = picture(53, 38)
    add("444.jpg", encoded(base, "JPEG", quality=92, subsampling=0))
    add("422.jpg", encoded(base, "JPEG", quality=90, subsampling=1))
    add("420.jpg", encoded(base, "JPEG", quality=90, subsampling=2))
    add("440.jpg", simplejpeg.encode_jpeg(np.asarray(base), 90, colorsubsampling="440"))
    add("411.jpg", simplejpeg.encode_jpeg(np.asarray(base), 90, colorsubsampling="411"))
    add("coarse.jpg", encoded(base, "JPEG", quality=5))
    add("finest.jpg", encoded(base, "JPEG", quality=100))
    add("progressive.jpg", encoded(base, "JPEG", quality=90, progressive=True, subsampling=2))
    add("progressive_grey.jpg", encoded(base.convert("L"), "JPEG", quality=90, progressive=True))
    add("restart.jpg", encoded(base, "JPEG", quality=90, restart_marker_blocks=2))
    add("progressive_restart.jpg", cjpeg(base, "-progressive", "-restart", "3B"))
    (OUT / "arithmetic.jpg").write_bytes(cjpeg(base, "-arithmetic"))  # to be refused
    add("rgb.jpg", cjpeg(base, "-rgb"))
    script = OUT / "scans.txt"
    script.write_text("1;\n0;\n2;\n")
    add("scans.jpg", cjpeg(base, "-scans", str(script)))
    script.unlink()
    add("tiny.jpg", encoded(picture(5, 3), "JPEG", quality=95))
    add("grey.jpg", encoded(base.convert("L"), "JPEG", quality=90))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: ignored, as torchvision's loader does
    add("oriented.jpg", encoded(base, "JPEG", quality=90, exif=exif))
    add("trailer.jpg", encoded(base, "JPEG", quality=90) + b"SEFT camera trailer")
    cmyk = Image.merge("CMYK", [*base.split(), picture(53, 38, 5).getchannel(1)])
    for name, options in [("", {}), ("progressive_", {"progressive": True})]:
        data = encoded(cmyk, "JPEG", quality=92, **options)
        add(f"{name}cmyk.jpg", data)
        adobe = data.index(b"Adobe")
        assert data[adobe + 11] == 0
        # Transform 2 makes the same planes YCCK: strange colours, yet a valid file with one right answer.
        add(f"{name}ycck.jpg", data[: adobe + 11] + b"\x02" + data[adobe + 12 :])


def sizes():
    """Each: u32 bytes of the JPEG, u16 width, u16 height, the JPEG, its pixels."""
    pack = b""
    for subsampling in ["444", "422", "420", "440", "411"]:
        for width in [1, 2, 3, 5, 8, 9, 15, 16, 17]:
            for height in [1, 2, 3, 7, 8, 9, 15, 16, 17]:
                image = np.ascontiguousarray(np.asarray(picture(width, height, width * height)))
                data = simplejpeg.encode_jpeg(image, 90, colorsubsampling=subsampling)
                pack += struct.pack("<IHH", len(data), width, height) + data + pillow(data).tobytes()
    (OUT / "sizes.pack.gz").write_bytes(gzip.compress(pack, 9, mtime=0))


def pngs():
    base = picture(41, 29, 1)
    rgb = np.asarray(base)
    grey = np.asarray(base.convert("L"))
    veil = np.asarray(picture(41, 29, 2).getchannel(1)).copy()
    veil[3:6] = 0
    veil[9:11] = 255
    wide = lambda samples: samples.astype(np.uint16) * 251 + 77
    palette = picture(16, 16, 3).convert("RGB").tobytes()
    for interlaced in [False, True]:
        i = "interlaced_" if interlaced else ""
        for depth in [1, 2, 4, 8]:
            levels = grey >> (8 - depth)
            add(f"{i}grey{depth}.png", png(levels, depth, 0, interlaced))
            add(f"{i}palette{depth}.png", png(levels, depth, 3, interlaced, PLTE=palette[: 3 << depth]))
        add(f"{i}rgb.png", png(rgb, 8, 2, interlaced))
        add(f"{i}grey16.png", png(wide(grey), 16, 0, interlaced))
        add(f"{i}rgb16.png", png(wide(rgb), 16, 2, interlaced))
        add_transparent(f"{i}grey_alpha.png", png(np.dstack([grey, veil]), 8, 4, interlaced))
        add_transparent(f"{i}alpha.png", png(np.dstack([rgb, veil]), 8, 6, interlaced))
    add_transparent("grey_alpha16.png", png(wide(np.dstack([grey, veil])), 16, 4))
    add_transparent("alpha16.png", png(wide(np.dstack([rgb, veil])), 16, 6))
    add("palette.png", encoded(base.quantize(37), "PNG"))
    # Transparency by colour: one grey, one RGB value, one alpha for each of the first palette entries.
    add_transparent("grey_trns.png", png(grey, 8, 0, tRNS=struct.pack(">H", int(grey[4, 7]))))
    add("grey2_trns.png", png(grey >> 6, 2, 0, tRNS=struct.pack(">H", 2)))  # whose alpha Pillow gets wrong
    flat = rgb & 0xC0
    add_transparent("rgb_trns.png", png(flat, 8, 2, tRNS=struct.pack(">HHH", *map(int, flat[8, 11]))))
    add_transparent("palette_trns.png", png(grey >> 4, 4, 3, PLTE=palette[:48], tRNS=bytes(range(0, 250, 25))))


def png(samples, depth, colour, interlaced=False, **chunks):
    """A PNG of any depth and colour type, with unfiltered and "Up" rows in turn."""
    height, width = samples.shape[:2]
    samples = samples.reshape(height, width, -1)

    def rows(part):
        if part.size == 0:
            return b""
        if depth == 16:
            lines = part.astype(">u2").reshape(part.shape[0], -1).view(np.uint8)
        elif depth == 8:
            lines = part.astype(np.uint8).reshape(part.shape[0], -1)
        else:
            bits = (part.reshape(part.shape[0], -1, 1) >> np.arange(depth - 1, -1, -1)) & 1
            lines = np.packbits(bits.astype(np.uint8).reshape(part.shape[0], -1), axis=1)
        above = np.vstack([np.zeros_like(lines[:1]), lines[:-1]])
        return b"".join(bytes([2]) + (l - a).tobytes() if y % 2 else bytes([0]) + l.tobytes() for y, (l, a) in enumerate(zip(lines, above)))

    adam7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    passes = [samples[y::dy, x::dx] for y, x, dy, dx in adam7] if interlaced else [samples]
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    body = b"".join(chunk(kind.encode(), body) for kind, body in chunks.items())
    data = zlib.compress(b"".join(map(rows, passes)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bmps():
    base = picture(41, 29, 1)
    grey = base.convert("L")
    add("a.bmp", encoded(base, "BMP"))
    add("grey.bmp", encoded(grey, "BMP"))
    add("bilevel.bmp", encoded(grey.convert("1"), "BMP"))
    add("palette.bmp", encoded(base.quantize(37), "BMP"))
    add("rgb32.bmp", bmp(np.dstack([np.asarray(base)[..., ::-1], np.zeros((29, 41), np.uint8)]), 32))
    add("top_down.bmp", bmp(np.asarray(base)[..., ::-1], 24, top_down=True))
    b, g, r = (np.asarray(base)[..., c].astype(np.uint16) for c in (2, 1, 0))
    # 5 and 6 bits are spread over 8 by rounding, which Pillow leaves out.
    add("rgb555.bmp", bmp((r >> 3 << 10 | g >> 3 << 5 | b >> 3)[..., None].view(np.uint8), 16), 1)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    add("rgb565.bmp", bmp((r >> 3 << 11 | g >> 2 << 5 | b >> 3)[..., None].view(np.uint8), 16, 3, masks), 1)
    levels = np.asarray(grey) >> 4
    palette = b"".join(bytes([*colour, 0]) for colour in np.asarray(picture(16, 1, 3))[0])
    packed = np.pad(levels, [(0, 0), (0, 1)])
    add("palette4.bmp", bmp((packed[:, ::2] << 4 | packed[:, 1::2])[..., None], 4, 0, palette))
    add("rle8.bmp", bmp(levels, 8, 1, palette))


def bmp(rows, depth, compression=0, extra=b"", top_down=False):
    """A BMP whose rows of bytes are given, top first; run-length coded where `compression` is 1."""
    height, width = rows.shape[0], 41
    if not top_down:
        rows = rows[::-1]
    if compression == 1:
        data = b"".join(rle(row) + b"\0\0" for row in rows) + b"\0\1"
    else:
        data = b"".join(row.tobytes() + bytes(-row.size % 4) for row in rows)
    colours = len(extra) // 4 if depth <= 8 else 0
    head = struct.pack("<IiiHHIIiiII", 40, width, -height if top_down else height, 1, depth, compression, len(data), 2835, 2835, colours, 0)
    at = 14 + len(head) + len(extra)
    return b"BM" + struct.pack("<IHHI", at + len(data), 0, 0, at) + head + extra + data


def rle(row):
    out, x = b"", 0
    while x < len(row):
        run = next((i for i in range(x, len(row)) if row[i] != row[x]), len(row)) - x
        if run == 1 and x + 3 <= len(row):  # a stretch as it is, of odd length, so padded
            out += bytes([0, 3, *row[x : x + 3], 0])
            x += 3
        else:
            out += bytes([run, row[x]])
            x += run
    return out


def gifs():
    base = picture(41, 29, 1)
    data = encoded(base.quantize(64), "GIF", interlace=0)
    add("a.gif", data)
    add("interlaced.gif", encoded(base.quantize(64), "GIF", interlace=1))
    frames = [base.quantize(16), picture(41, 29, 3).quantize(16)]
    add("animated.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50))
    clear = encoded(base.quantize(16), "GIF", transparency=5, interlace=0)
    add_transparent("transparent.gif", clear)
    # The frame covers only a part of the screen: the screen grows, the frame moves.
    for name, data in [("offset.gif", data), ("offset_transparent.gif", clear)]:
        frame = data.index(b"\x2c\0\0\0\0\x29\0\x1d\0")
        data = bytearray(data)
        data[6:10] = struct.pack("<HH", 49, 38)
        data[frame + 1 : frame + 5] = struct.pack("<HH", 5, 3)
        add_transparent(name, bytes(data))


def webps():
    base = picture(41, 29, 1)
    veiled = base.copy()
    veiled.putalpha(picture(41, 29, 2).getchannel(1))
    add("lossless.webp", encoded(base, "WEBP", lossless=True))
    add("palette.webp", encoded(base.quantize(9).convert("RGB"), "WEBP", lossless=True))
    add("lossy.webp", encoded(base, "WEBP", quality=90))
    add("coarse.webp", encoded(base, "WEBP", quality=10))
    add_transparent("lossless_alpha.webp", encoded(veiled, "WEBP", lossless=True, exact=True))
    add_transparent("lossy_alpha.webp", encoded(veiled, "WEBP", quality=90))
    add("animated.webp", encoded(base, "WEBP", lossless=True, save_all=True, append_images=[picture(41, 29, 3)]))


def tiffs():
    base = picture(41, 29, 1)
    rgb = np.asarray(base)
    grey = base.convert("L")
    veiled = base.copy()
    veiled.putalpha(picture(41, 29, 2).getchannel(1))
    add("a.tiff", encoded(base, "TIFF"))
    for name, compression in [("lzw", "tiff_lzw"), ("deflate", "tiff_adobe_deflate"), ("packbits", "packbits")]:
        add(f"{name}.tiff", encoded(base, "TIFF", compression=compression))
    add("grey.tiff", encoded(grey, "TIFF"))
    add("bilevel.tiff", encoded(grey.convert("1"), "TIFF"))
    (OUT / "palette.tiff").write_bytes(encoded(base.quantize(37), "TIFF"))  # to be refused
    add_transparent("alpha.tiff", encoded(veiled, "TIFF"))
    add("cmyk.tiff", encoded(Image.merge("CMYK", [*base.split(), picture(41, 29, 5).getchannel(1)]), "TIFF"), 1)
    wide = rgb.astype(np.uint16) * 251 + 77
    for order, byteorder in [("", "<"), ("big_endian_", ">")]:
        add(f"{order}rgb.tiff", tiff(rgb, byteorder, photometric="rgb"))
        add(f"{order}rgb16.tiff", tiff(wide, byteorder, photometric="rgb"))
        add(f"{order}grey16.tiff", tiff(wide[..., 1], byteorder, photometric="minisblack"))
        add(f"{order}white_is_zero.tiff", tiff(rgb[..., 1], byteorder, photometric="miniswhite"))
    add("planar.tiff", tiff(np.ascontiguousarray(rgb.transpose(2, 0, 1)), "<", photometric="rgb", planarconfig="separate"))
    add("tiled.tiff", tiff(rgb, "<", photometric="rgb", tile=(16, 16)))
    add("jpeg.tiff", encoded(base, "TIFF", compression="jpeg"), 1)


def tiff(samples, byteorder, **options):
    out = io.BytesIO()
    tifffile.imwrite(out, samples, byteorder=byteorder, metadata=None, software=False, **options)
    return out.getvalue()


def resizes():
    for name, image, side in [("wide", picture(97, 31, 4), 24), ("small", picture(11, 17, 5), 32), ("grey", picture(28, 28, 6).convert("L"), 20)]:
        channels = len(image.getbands())
        (OUT / f"{name}.raw").write_bytes(image.tobytes())
        (OUT / f"{name}.{side}.raw").write_bytes(image.resize((side, side), Image.Resampling.BILINEAR).tobytes())
        LINES.append(f"resize {name}.raw {image.width} {image.height} {channels} {side} 1")


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for make in [jpegs, sizes, pngs, bmps, gifs, webps, tiffs, resizes]:
        make()
    (OUT / "manifest.txt").write_text("\n".join(LINES) + "\n")
