//! The convolution's three passes on the layers of ResNet-18 (CIFAR stem, 128 views) and ResNet-50 (224 pixels, 16 views).
//! `cargo bench --bench conv -- r18` runs those whose name contains "r18"; throughput is in floating-point operations.

#![allow(missing_docs)] // the macros below make a public function

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use simsiam_engine::backend::conv::ConvGeometry;
use simsiam_engine::ops::conv2d::direct;

fn layer(n: usize, size: usize, channels: [usize; 2], kernel: usize, stride: usize) -> ConvGeometry {
    let [c_in, c_out] = channels;
    let padding = [kernel / 2; 2];
    ConvGeometry { n, h: size, w: size, c_in, c_out, kernel: [kernel; 2], stride: [stride; 2], padding }
}

fn layers() -> Vec<(&'static str, ConvGeometry)> {
    vec![
        ("r18_stem", layer(128, 32, [3, 64], 3, 1)),
        ("r18_32_64", layer(128, 32, [64, 64], 3, 1)),
        ("r18_32_64_128_s2", layer(128, 32, [64, 128], 3, 2)),
        ("r18_32_64_128_1x1_s2", layer(128, 32, [64, 128], 1, 2)),
        ("r18_16_128", layer(128, 16, [128, 128], 3, 1)),
        ("r18_8_256", layer(128, 8, [256, 256], 3, 1)),
        ("r18_4_512", layer(128, 4, [512, 512], 3, 1)),
        ("r50_stem", layer(16, 224, [3, 64], 7, 2)),
        ("r50_56_64_256_1x1", layer(16, 56, [64, 256], 1, 1)),
        ("r50_56_256_64_1x1", layer(16, 56, [256, 64], 1, 1)),
        ("r50_56_64", layer(16, 56, [64, 64], 3, 1)),
        ("r50_14_256_1024_1x1", layer(16, 14, [256, 1024], 1, 1)),
        ("r50_14_1024_256_1x1", layer(16, 14, [1024, 256], 1, 1)),
        ("r50_14_256", layer(16, 14, [256, 256], 3, 1)),
        ("r50_7_512", layer(16, 7, [512, 512], 3, 1)),
    ]
}

/// Values without denormals or patterns that a cache or a branch could learn from.
fn values(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 16) as f32 / 65536.0 - 0.5).collect()
}

fn passes(criterion: &mut Criterion) {
    for (name, g) in layers() {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(g.flops())).sample_size(10).measurement_time(Duration::from_secs(2));
        let (mut x, mut w, mut y) = (values(g.x_len()), values(g.w_len()), values(g.y_len()));
        let mut workspace = vec![0.0; direct::wgrad_workspace(&g)];
        group.bench_function("forward", |b| b.iter(|| direct::forward(&g, &x, &w, black_box(&mut y))));
        group.bench_function("dgrad", |b| b.iter(|| direct::dgrad(&g, &y, &w, black_box(&mut x), false)));
        group.bench_function("wgrad", |b| {
            b.iter(|| direct::wgrad(&g, &x, &y, black_box(&mut w), false, &mut workspace));
        });
        group.finish();
    }
}

criterion_group!(benches, passes);
criterion_main!(benches);
