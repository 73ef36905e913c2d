//! What hostile files can do to the decoder: no panic, no memory over what is stated, no picture larger than its file.
//!
//! The bound: 16 bytes for each pixel the file declares, 16 for each byte of the file, and 2 MiB; and no more pixels are
//! believed than the file can hold (100 million at most). What counts here is the sum of all that is allocated while one image
//! is decoded, whether given back or not, so these tests run in a process of their own and one after the other.

use std::alloc::System;
use std::fs;
use std::io::Cursor;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cap::Cap;
use image::{DynamicImage, ImageFormat};
use libjpeg_turbo_rs::{PixelFormat, Subsampling, compress_progressive};
use simsiam_engine::data::decode::{Alpha, DecodeOptions, Decoder};
use simsiam_engine::rng::{Stream, below};

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// Pixels that a file of any length may have, in the formats where a byte can stand for any number of them.
const FREE_PIXELS: usize = 16_000_000;

fn bound(pixels: usize, file_len: usize) -> usize {
    16 * pixels + 16 * file_len + (2 << 20)
}

/// Nobody else allocates while this is held.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The outcome with fresh buffers, and the bytes allocated on the way.
fn decode(bytes: &[u8]) -> (Result<(u16, u16), String>, usize) {
    let before = ALLOCATOR.total_allocated();
    let mut decoder = Decoder::new(DecodeOptions { alpha: Alpha::White });
    let result = decoder.decode(bytes).map(|image| {
        assert_eq!(image.pixels.len(), usize::from(image.width) * usize::from(image.height) * 3);
        (image.width, image.height)
    });
    (result, ALLOCATOR.total_allocated() - before)
}

fn accepted(what: &str, bytes: &[u8]) {
    let (result, taken) = decode(bytes);
    let (width, height) = result.unwrap_or_else(|reason| panic!("{what}: {reason}"));
    let pixels = usize::from(width) * usize::from(height);
    assert!(taken <= bound(pixels, bytes.len()), "{what}: {:.2} bytes a pixel", taken as f64 / pixels as f64);
}

fn refused(what: &str, bytes: &[u8], why: &str) {
    let (result, taken) = decode(bytes);
    let reason = result.expect_err(what);
    assert!(reason.contains(why), "{what}: {reason}");
    assert!(taken < 1 << 20, "{what}: {taken} bytes taken before it was refused");
}

fn encoded(image: DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut out = Cursor::new(Vec::new());
    image.write_to(&mut out, format).unwrap();
    out.into_inner()
}

fn chunk(kind: &[u8], body: &[u8]) -> Vec<u8> {
    let mut crc = flate2::Crc::new();
    crc.update(kind);
    crc.update(body);
    [&(body.len() as u32).to_be_bytes()[..], kind, body, &crc.sum().to_be_bytes()].concat()
}

/// A PNG of these dimensions, grey, whose data is `deflated`.
fn png(width: u32, height: u32, depth: u8, deflated: &[u8]) -> Vec<u8> {
    let head = [&width.to_be_bytes()[..], &height.to_be_bytes(), &[depth, 0, 0, 0, 0]].concat();
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunk(b"IHDR", &head), chunk(b"IDAT", deflated), chunk(b"IEND", &[])].concat()
}

#[test]
fn large_images_take_what_is_stated() {
    let _alone = alone();
    let busy = |i: usize| ((i * 2654435761) >> 7) as u8;
    for (width, height) in [(500, 375), (2000, 1500)] {
        let rgb: Vec<u8> = (0..width * height * 3).map(busy).collect();
        for subsampling in [Subsampling::S444, Subsampling::S420] {
            let jpeg = compress_progressive(&rgb, width, height, PixelFormat::Rgb, 90, subsampling).unwrap();
            accepted("progressive JPEG", &jpeg);
            let jpeg = libjpeg_turbo_rs::compress(&rgb, width, height, PixelFormat::Rgb, 90, subsampling).unwrap();
            accepted("baseline JPEG", &jpeg);
        }
        let rgb = image::RgbImage::from_raw(width as u32, height as u32, rgb).unwrap();
        for format in [ImageFormat::Png, ImageFormat::Bmp, ImageFormat::WebP, ImageFormat::Tiff] {
            accepted(&format!("{format:?}"), &encoded(rgb.clone().into(), format));
        }
        accepted("16-bit PNG", &encoded(DynamicImage::from(rgb).into_rgba16().into(), ImageFormat::Png));
    }
}

/// Pictures of one colour are the best that deflate and the like can do, and ordinary.
#[test]
fn one_colour_is_no_bomb() {
    let _alone = alone();
    for side in [3000, 4000] {
        let rgb = || DynamicImage::from(image::RgbImage::from_pixel(side, side, image::Rgb([255, 250, 240])));
        for format in [ImageFormat::Png, ImageFormat::WebP] {
            let bytes = encoded(rgb(), format);
            accepted(&format!("{format:?} of {} bytes", bytes.len()), &bytes);
        }
        let side = side as usize;
        let grey = vec![255; side * side];
        let jpeg =
            libjpeg_turbo_rs::compress_optimized(&grey, side, side, PixelFormat::Grayscale, 50, Subsampling::S444);
        accepted("JPEG", &jpeg.unwrap());
        let jpeg = compress_progressive(&grey, side, side, PixelFormat::Grayscale, 50, Subsampling::S444);
        accepted("progressive JPEG", &jpeg.unwrap());
        let mut gif = Vec::new();
        let mut encoder = gif::Encoder::new(&mut gif, side as u16, side as u16, &[255, 255, 255, 0, 0, 0]).unwrap();
        encoder
            .write_frame(&gif::Frame::from_indexed_pixels(side as u16, side as u16, vec![0; side * side], None))
            .unwrap();
        drop(encoder);
        accepted(&format!("GIF of {} bytes", gif.len()), &gif);
    }
    // 16 million pixels of one bit, at the highest level of deflate.
    let rows = vec![0; 4000 * 501];
    let mut deflater = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    std::io::Write::write_all(&mut deflater, &rows).unwrap();
    accepted("PNG of one bit", &png(4000, 4000, 1, &deflater.finish().unwrap()));
}

#[test]
fn what_a_file_cannot_hold_is_refused_before_memory_is_taken() {
    let _alone = alone();
    let some = vec![0x55; 2000];
    refused("PNG", &png(9000, 9000, 8, &some), "cannot hold");
    refused("PNG of one bit", &png(65000, 1500, 1, &some), "cannot hold");
    refused("PNG over the limit", &png(20000, 20000, 8, &some), "more than 100 million");
    refused("PNG without pixels", &png(0, 9, 8, &some), "Invalid image dimensions");
    let gif = |side: u16| {
        let side = side.to_le_bytes();
        let frame = [&b"\x2c\0\0\0\0"[..], &side, &side, b"\0\x08\xff", &some[..255], b"\0\x3b"].concat();
        [&b"GIF89a"[..], &side, &side, &[0x80, 0, 0, 1, 2, 3, 4, 5, 6], &frame].concat()
    };
    refused("GIF", &gif(9000), "cannot hold");
    refused("GIF over the limit", &gif(30000), "more than 100 million");
    let jpeg = |side: u16| {
        let [high, low] = side.to_be_bytes();
        let plain = libjpeg_turbo_rs::compress(&[9; 64], 8, 8, PixelFormat::Grayscale, 50, Subsampling::S444).unwrap();
        let frame = plain.windows(2).position(|marker| marker == [0xff, 0xc0]).unwrap();
        [&plain[..frame + 5], &[high, low, high, low], &plain[frame + 9..]].concat()
    };
    refused("JPEG", &jpeg(9000), "cannot hold");
    refused("JPEG over the limit", &jpeg(30000), "million");
    // A lossless WebP of one colour takes 30 bytes at any size: the size itself is the limit.
    let webp = |side: u32| {
        let size = (side - 1) | (side - 1) << 14;
        let data = [&[0x2f][..], &size.to_le_bytes(), &[0x88, 0x88, 0x08, 0, 0]].concat();
        let body = [b"WEBPVP8L".as_slice(), &(data.len() as u32).to_le_bytes(), &data].concat();
        [b"RIFF".as_slice(), &(body.len() as u32).to_le_bytes(), &body].concat()
    };
    refused("WebP", &webp(9000), "cannot hold");
    refused("WebP over the limit", &webp(16000), "more than 100 million");
    let bmp = |width: u32, height: u32, compression: u32| {
        let head = [40, width, height, 0x0008_0001, compression, 0, 0, 0, 0, 0].map(u32::to_le_bytes).concat();
        [b"BM".as_slice(), &[0; 8], &54u32.to_le_bytes(), &head, &some].concat()
    };
    for compression in [0, 1] {
        refused("BMP", &bmp(30000, 3000, compression), "cannot hold");
    }
    let entry = |tag: u16, value: u32| [&tag.to_le_bytes()[..], &[4, 0, 1, 0, 0, 0], &value.to_le_bytes()].concat();
    for compression in [1, 5, 8, 32773] {
        let tags = [
            (256, 9000),
            (257, 9000),
            (258, 8),
            (259, compression),
            (262, 1),
            (273, 122),
            (277, 1),
            (278, 9000),
            (279, 2000),
        ];
        let tags: Vec<u8> = tags.into_iter().flat_map(|(tag, value)| entry(tag, value)).collect();
        let tiff = [&b"II*\0\x08\0\0\0\x09\0"[..], &tags, &[0; 4], &some].concat();
        refused("TIFF", &tiff, "cannot hold");
    }
}

/// One damage of many kinds, half of them in the first bytes, where the headers are.
fn damage(bytes: &mut Vec<u8>, stream: &mut Stream, donors: &[(String, Vec<u8>)]) {
    if bytes.is_empty() {
        return;
    }
    let end = if stream.word() & 1 == 0 { bytes.len().min(200) } else { bytes.len() };
    let at = below(stream.word(), end as u32) as usize;
    let mut put = |new: &[u8]| bytes.iter_mut().skip(at).zip(new).for_each(|(byte, new)| *byte = *new);
    match below(stream.word(), 9) {
        0 | 1 => put(&[stream.word() as u8]),
        2 => put(&[bytes_of(stream)[0] ^ 1 << below(stream.word(), 8)]),
        3 => put(&[0xff; 4][..1 + below(stream.word(), 4) as usize]),
        4 => put(&[0; 4][..1 + below(stream.word(), 4) as usize]),
        5 => put(&[[0x7f, 0xff, 0xff, 0xff], [0, 0, 0x80, 0], [0xff, 0xff, 0xff, 0x7f], [0x3f, 0xff, 0, 0]]
            [(stream.word() & 3) as usize]),
        6 => bytes.truncate(at),
        7 => {
            let len = (1 + below(stream.word(), 40) as usize).min(bytes.len() - at);
            let copy = bytes[at..at + len].to_vec();
            let to = below(stream.word(), bytes.len() as u32) as usize;
            bytes.splice(to..to, copy);
        }
        _ => {
            let donor = &donors[below(stream.word(), donors.len() as u32) as usize].1;
            let from = below(stream.word(), donor.len() as u32) as usize;
            let piece = &donor[from..donor.len().min(from + 64)];
            bytes.splice(at..at, piece.iter().copied());
        }
    }
}

fn bytes_of(stream: &mut Stream) -> [u8; 4] {
    stream.word().to_le_bytes()
}

/// Makes the checksums of a PNG right again, or damage would never get past them.
fn mend_png(bytes: &mut [u8]) {
    let mut at = 8;
    while let Some(head) = bytes.get(at..at + 4) {
        let len = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(body) = at.checked_add(8 + len).and_then(|end| bytes.get(at + 4..end)) else { return };
        let mut crc = flate2::Crc::new();
        crc.update(body);
        let sum = crc.sum().to_be_bytes();
        at += 8 + len;
        match bytes.get_mut(at..at + 4) {
            Some(place) => place.copy_from_slice(&sum),
            None => return,
        }
        at += 4;
    }
}

/// Damage without a checksum may go unseen, but it must not get past the checks of size, or out of the decoder as a panic.
#[test]
fn damaged_files_are_decoded_or_refused() {
    let _alone = alone();
    let rounds: u64 = std::env::var("DECODE_ROUNDS").map_or(330, |rounds| rounds.parse().unwrap());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images");
    let kinds = ["jpg", "png", "gif", "bmp", "webp", "tiff"];
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let images = paths.filter(|path| path.extension().is_some_and(|e| kinds.contains(&e.to_str().unwrap())));
    let mut files: Vec<_> = images.map(|path| (path.display().to_string(), fs::read(&path).unwrap())).collect();
    files.sort();
    let (mut inputs, mut good, mut faults) = (0, 0, Vec::new());
    for (i, (name, bytes)) in files.iter().enumerate() {
        for round in 0..rounds {
            let mut stream = Stream::new(round, 0, i as u64);
            let mut damaged = bytes.clone();
            for _ in 0..=below(stream.word(), 4) {
                damage(&mut damaged, &mut stream, &files);
            }
            if stream.word() & 1 == 0 {
                mend_png(&mut damaged);
            }
            let (result, taken) = decode(&damaged);
            inputs += 1;
            good += usize::from(result.is_ok());
            let pixels = result.as_ref().map_or(FREE_PIXELS, |size| usize::from(size.0) * usize::from(size.1));
            if taken > bound(pixels, damaged.len()) {
                faults.push(format!("{name} round {round}: {taken} bytes taken for {pixels} pixels ({result:?})"));
            }
            if let Err(reason) = result
                && reason.contains("fault inside")
            {
                faults.push(format!("{name} round {round}: {reason}"));
            }
        }
    }
    assert!(inputs >= 30_000 || rounds < 330, "only {inputs} inputs");
    assert!(good > inputs / 20, "only {good} of {inputs} were decoded: the damage is too coarse to get anywhere");
    assert!(faults.is_empty(), "{} of {inputs}: {:#?}", faults.len(), &faults[..faults.len().min(20)]);
}
