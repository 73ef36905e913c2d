//! GPUs that a ledger can be held against without having them.

use std::fmt;

use crate::exec::Precision;
use crate::tensor::DType;

/// A GPU by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Gpu {
    /// A100 with 80 GB (SXM).
    A100,
    /// H100 with 80 GB (SXM), the one that was measured.
    #[default]
    H100,
    /// H200 (SXM).
    H200,
    /// GeForce RTX 4090.
    #[value(name = "4090")]
    Rtx4090,
}

/// Where a figure comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Source {
    /// Measured on this kind of GPU: `tools/bench_runs`.
    Measured,
    /// This share of what the maker's data sheet states.
    DataSheet { share: f64, stated: f64 },
    /// An option.
    Given,
}

/// The most that a GPU does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceiling {
    /// In GB/s or TFLOP/s.
    pub value: f64,
    pub source: Source,
}

/// What the H100 was measured to reach, in GB/s and TFLOP/s: `bench step` and `profile` measure all of them in every run. Copies
/// between places of its memory 2,841 to 2,876; products of 8192 x 8192 matrices in bf16 805 to 835, in fp16 763 to 793; float32
/// multiply-adds 62 (a product of float32 matrices was not measured, and reaches less).
const H100_COPY: f64 = 2850.0;
const H100_BF16: f64 = 830.0;
const H100_FP16: f64 = 765.0;
const H100_F32: f64 = 62.0;

/// What these are of what its data sheet states: so much of their own is expected of the GPUs that were not measured.
const COPY_SHARE: f64 = 0.85;
const TENSOR_SHARE: f64 = 0.84;
const F32_SHARE: f64 = 0.92;

/// What a data sheet states: GB/s of the memory; dense TFLOP/s of products in 16 bits with float32 sums, in tf32, and in float32
/// without tensor cores.
struct Stated {
    memory: f64,
    half: f64,
    tf32: f64,
    f32: f64,
}

impl Gpu {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Gpu::A100 => "NVIDIA A100 SXM 80 GB",
            Gpu::H100 => "NVIDIA H100 SXM 80 GB",
            Gpu::H200 => "NVIDIA H200 SXM",
            Gpu::Rtx4090 => "NVIDIA GeForce RTX 4090",
        }
    }

    /// Its compute capability.
    pub fn capability(self) -> [u32; 2] {
        match self {
            Gpu::A100 => [8, 0],
            Gpu::H100 | Gpu::H200 => [9, 0],
            Gpu::Rtx4090 => [8, 9],
        }
    }

    fn stated(self) -> Stated {
        match self {
            Gpu::A100 => Stated { memory: 2039.0, half: 312.0, tf32: 156.0, f32: 19.5 },
            Gpu::H100 => Stated { memory: 3350.0, half: 989.0, tf32: 495.0, f32: 67.0 },
            Gpu::H200 => Stated { memory: 4800.0, half: 989.0, tf32: 495.0, f32: 67.0 },
            Gpu::Rtx4090 => Stated { memory: 1008.0, half: 165.2, tf32: 82.6, f32: 82.6 },
        }
    }

    /// GB/s of a copy within its memory, read and written together.
    pub fn copy(self) -> Ceiling {
        match self {
            Gpu::H100 => Ceiling::measured(H100_COPY),
            _ => Ceiling::stated(COPY_SHARE, self.stated().memory),
        }
    }

    /// TFLOP/s of a large product of matrices.
    pub fn product(self, precision: Precision) -> Ceiling {
        match (self, precision) {
            (Gpu::H100, Precision::Bf16) => Ceiling::measured(H100_BF16),
            (Gpu::H100, Precision::Fp16) => Ceiling::measured(H100_FP16),
            (Gpu::H100, Precision::F32 | Precision::F64) => Ceiling::measured(H100_F32),
            (_, Precision::Bf16 | Precision::Fp16) => Ceiling::stated(TENSOR_SHARE, self.stated().half),
            (_, Precision::Tf32) => Ceiling::stated(TENSOR_SHARE, self.stated().tf32),
            (_, Precision::F32 | Precision::F64) => Ceiling::stated(F32_SHARE, self.stated().f32),
        }
    }
}

impl Ceiling {
    fn measured(value: f64) -> Ceiling {
        Ceiling { value, source: Source::Measured }
    }

    fn stated(share: f64, stated: f64) -> Ceiling {
        Ceiling { value: share * stated, source: Source::DataSheet { share, stated } }
    }

    /// The same with the value of an option, if it was given.
    pub fn or(self, given: Option<f64>) -> Ceiling {
        given.map_or(self, |value| Ceiling { value, source: Source::Given })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Measured => f.write_str("measured"),
            Source::DataSheet { share, stated } => {
                write!(f, "{:.0} % of the {stated} of its data sheet", 100.0 * share)
            }
            Source::Given => f.write_str("given"),
        }
    }
}

/// The precision of products of tensors of `dtype` in a step of `precision`.
pub fn precision_of(dtype: Option<DType>, precision: Precision) -> Precision {
    match dtype {
        Some(DType::Bf16) => Precision::Bf16,
        Some(DType::F16) => Precision::Fp16,
        Some(DType::F32) if precision != Precision::Tf32 => Precision::F32,
        _ => precision,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_those_of_the_measured_gpu() {
        let stated = Gpu::H100.stated();
        for (measured, stated, share) in [
            (H100_COPY, stated.memory, COPY_SHARE),
            (H100_BF16, stated.half, TENSOR_SHARE),
            (H100_F32, stated.f32, F32_SHARE),
        ] {
            assert!((measured / stated - share).abs() < 0.01, "{measured} of {stated}");
        }
    }

    #[test]
    fn figures_say_where_they_come_from() {
        let text = |ceiling: Ceiling| format!("{:.1}: {}", ceiling.value, ceiling.source);
        assert_eq!(text(Gpu::H100.product(Precision::Bf16)), "830.0: measured");
        assert_eq!(text(Gpu::A100.copy()), "1733.1: 85 % of the 2039 of its data sheet");
        assert_eq!(text(Gpu::Rtx4090.product(Precision::Tf32)), "69.4: 84 % of the 82.6 of its data sheet");
        assert_eq!(text(Gpu::H100.product(Precision::Tf32).or(Some(7.0))), "7.0: given");
    }

    #[test]
    fn float32_products_in_a_step_of_16_bits_are_as_slow_as_they_are() {
        assert_eq!(precision_of(Some(DType::F32), Precision::Bf16), Precision::F32);
        assert_eq!(precision_of(Some(DType::F32), Precision::Tf32), Precision::Tf32);
        assert_eq!(precision_of(Some(DType::F16), Precision::Fp16), Precision::Fp16);
        assert_eq!(precision_of(None, Precision::Bf16), Precision::Bf16);
    }
}
