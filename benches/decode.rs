//! Decoding and resizing, the work of `prepare`: one picture of 500 x 375 pixels, as JPEG and as PNG, on one thread.
//! tools/prepare_speed.py compares the whole path with torchvision and Pillow, on photographs.
#![allow(missing_docs)]

use std::hint::black_box;
use std::io::Cursor;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use image::{ImageFormat, RgbImage};
use libjpeg_turbo_rs::{PixelFormat, Subsampling, compress, compress_progressive};
use simsiam_engine::data::decode::{Decoder, Resizer};
use simsiam_engine::rng::Stream;

const WIDTH: usize = 500;
const HEIGHT: usize = 375;

/// Smooth shapes with some grain: at quality 90 about as many bytes as a photograph.
fn picture() -> Vec<u8> {
    let mut stream = Stream::new(1, 2, 3);
    let mut pixels = Vec::with_capacity(WIDTH * HEIGHT * 3);
    for y in 0..HEIGHT {
        for x in 0..WIDTH {
            let (x, y) = (x as f32 / 40.0, y as f32 / 30.0);
            let grain = (stream.word() % 9) as f32;
            for wave in [x + y.sin(), y - (0.7 * x).cos(), (x * y / 5.0).sin()] {
                pixels.push((120.0 + 100.0 * wave.sin() + grain) as u8);
            }
        }
    }
    pixels
}

fn decoding(c: &mut Criterion) {
    let pixels = picture();
    let mut png = Cursor::new(Vec::new());
    let image = RgbImage::from_raw(WIDTH as u32, HEIGHT as u32, pixels.clone()).unwrap();
    image.write_to(&mut png, ImageFormat::Png).unwrap();
    let files = [
        ("jpeg 4:2:0", compress(&pixels, WIDTH, HEIGHT, PixelFormat::Rgb, 90, Subsampling::S420).unwrap()),
        ("jpeg 4:4:4", compress(&pixels, WIDTH, HEIGHT, PixelFormat::Rgb, 90, Subsampling::S444).unwrap()),
        ("progressive", compress_progressive(&pixels, WIDTH, HEIGHT, PixelFormat::Rgb, 90, Subsampling::S420).unwrap()),
        ("png", png.into_inner()),
    ];
    let mut group = c.benchmark_group("decode");
    group.throughput(Throughput::Elements(1));
    let mut decoder = Decoder::default();
    for (name, file) in &files {
        group.bench_function(format!("{name}, {} bytes", file.len()), |b| {
            b.iter(|| decoder.decode(black_box(file)).unwrap().pixels.len())
        });
    }
    let mut resizer = Resizer::default();
    let image = decoder.decode(&files[0].1).unwrap();
    group.bench_function("stretch to 256", |b| {
        b.iter(|| resizer.resize(black_box(image), 256, 256).unwrap().pixels.len())
    });
    group.finish();
}

criterion_group!(benches, decoding);
criterion_main!(benches);
