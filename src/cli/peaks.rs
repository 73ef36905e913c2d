//! What a device can do at best, measured in the run that is held against it, and what a step makes of it.

use std::fmt;

use serde_json::Value;

use super::bench::ceilings::{Ceilings, matrix_product};
use super::costs::Roofline;
use crate::error::Result;
use crate::exec::{Device, Precision};

/// Runs of which the fastest is a ceiling: on a CPU, and on a GPU, whose clock has to rise first.
const PEAK_RUNS: [usize; 2] = [3, 40];

/// What a device can do at best.
pub struct Peaks {
    pub ceilings: Ceilings,
    /// TFLOP/s of a large matrix product.
    product: f64,
    precision: Precision,
    given: Option<f64>,
}

impl Peaks {
    /// Measures; `given` is another peak to compare with, in TFLOP/s.
    ///
    /// # Errors
    /// As [`Ceilings::measure`] and [`matrix_product`].
    pub fn measure(device: &Device, precision: Precision, given: Option<f64>) -> Result<Peaks> {
        let repeat = PEAK_RUNS[usize::from(device.is_gpu())];
        let ceilings = Ceilings::measure(device, repeat)?;
        Ok(Peaks { ceilings, product: matrix_product(device, precision, repeat)?, precision, given })
    }

    /// The most floating-point operations a second that anything reached here, in TFLOP/s.
    pub fn measured(&self) -> f64 {
        self.ceilings.arithmetic(self.precision.dtype()).unwrap_or(0.0).max(self.product)
    }

    /// Model FLOPs utilisation: of what was measured to be possible, and of `--peak-tflops`.
    pub fn mfu(&self, flops: u64, seconds: f64) -> (f64, Option<f64>) {
        let speed = flops as f64 / seconds / 1e12;
        (speed / self.measured(), self.given.map(|peak| speed / peak))
    }

    /// The roofline of what was measured.
    pub fn roofline(&self) -> Roofline {
        Roofline { copy: self.ceilings.copy, product: self.measured() }
    }

    pub fn json(&self) -> Value {
        let mut json = self.ceilings.json();
        json["matrix_product_tflop_per_s"] = self.product.into();
        json["peak_tflop_per_s"] = self.measured().into();
        json["given_peak_tflop_per_s"] = self.given.into();
        json
    }

    /// MFU for people.
    pub fn describe_mfu(&self, flops: u64, seconds: f64) -> String {
        let (measured, given) = self.mfu(flops, seconds);
        let mut text = format!("{:.1} % of {} TFLOP/s measured", 100.0 * measured, teraflops(self.measured()));
        if let (Some(share), Some(peak)) = (given, self.given) {
            text += &format!(", {:.1} % of the given {peak} TFLOP/s", 100.0 * share);
        }
        text
    }
}

impl fmt::Display for Peaks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {} matrix product {} TFLOP/s", self.ceilings, self.precision, teraflops(self.product))
    }
}

/// TFLOP/s in four digits or so.
pub fn teraflops(speed: f64) -> String {
    let decimals = if speed < 10.0 { 3 } else { 1 };
    format!("{speed:.decimals$}")
}
