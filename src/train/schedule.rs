//! Learning rates as a pure function of the step, so that a resumed run needs no scheduler state.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The learning-rate schedule of a run.
///
/// With `peak = base_lr * batch / 256` (linear scaling, Goyal et al. 2017, arXiv 1706.02677), `W` warm-up epochs, `E` epochs
/// and `S` steps per epoch, step `s` of epoch `e = floor(s / S)` has
/// - during warm-up (`s < W S`): `peak * (s + 1) / (W S)`, the gradual warm-up of the same paper, ramped every step: the first
///   step already moves and the last warm-up step runs at `peak`;
/// - afterwards: `peak / 2 * (1 + cos(pi t))`, `t = (e - W) / (E - W)`, constant within an epoch as in the SimSiam
///   reference, or with `per_step` `t = (s - W S) / ((E - W) S)` (Loshchilov & Hutter 2017, arXiv 1608.03983).
///
/// Without warm-up the first case is empty and `t = e / E`, the reference's formula.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Learning rate at batch 256.
    pub base_lr: f64,
    /// Source images per step.
    pub batch: usize,
    /// Epochs of the whole run.
    pub epochs: u64,
    /// Steps of one epoch.
    pub steps_per_epoch: u64,
    /// Epochs of linear warm-up; the SimSiam paper uses 10 for batches from 1024.
    pub warmup_epochs: u64,
    /// Decays every step instead of every epoch.
    pub per_step: bool,
    /// Keeps the predictor at the scaled learning rate, without decay and without warm-up.
    pub fix_predictor_lr: bool,
}

impl Schedule {
    /// Checks that every step has a finite, positive-to-zero learning rate.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option at fault.
    pub fn validate(&self) -> Result<()> {
        if !(self.base_lr.is_finite() && self.base_lr > 0.0) {
            return Err(Error::config("--base-lr", format!("expected a positive number, got {}", self.base_lr)));
        }
        if self.batch == 0 {
            return Err(Error::config("--batch", "expected at least 1 image, got 0"));
        }
        if self.epochs == 0 {
            return Err(Error::config("--epochs", "expected at least 1, got 0"));
        }
        if self.steps_per_epoch == 0 {
            return Err(Error::config("--batch", format!("the dataset holds no full batch of {} images", self.batch))
                .with_hint("choose a smaller --batch"));
        }
        if self.epochs.checked_mul(self.steps_per_epoch).is_none() {
            return Err(Error::config("--epochs", format!("{} epochs overflow the step counter", self.epochs)));
        }
        if self.warmup_epochs >= self.epochs {
            return Err(Error::config(
                "--warmup-epochs",
                format!("expected fewer than the {} epochs of the run, got {}", self.epochs, self.warmup_epochs),
            ));
        }
        Ok(())
    }

    /// The scaled initial learning rate, `base_lr * batch / 256`.
    pub fn peak_lr(&self) -> f64 {
        self.base_lr * self.batch as f64 / 256.0
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.epochs * self.steps_per_epoch
    }

    /// The epoch that `step` belongs to, counted from 0.
    pub fn epoch(&self, step: u64) -> u64 {
        step / self.steps_per_epoch
    }

    /// The learning rate of `step` (counted from 0); 0 from the end of the run on.
    pub fn lr(&self, step: u64) -> f64 {
        let warmup_steps = self.warmup_epochs * self.steps_per_epoch;
        if step < warmup_steps {
            return self.peak_lr() * (step + 1) as f64 / warmup_steps as f64;
        }
        let (done, all) = if self.per_step {
            (step - warmup_steps, self.total_steps() - warmup_steps)
        } else {
            (self.epoch(step) - self.warmup_epochs, self.epochs - self.warmup_epochs)
        };
        let progress = (done as f64 / all as f64).min(1.0);
        self.peak_lr() / 2.0 * (1.0 + (PI * progress).cos())
    }

    /// The predictor's learning rate of `step`: [`Schedule::lr`], or [`Schedule::peak_lr`] with `fix_predictor_lr`.
    pub fn predictor_lr(&self, step: u64) -> f64 {
        if self.fix_predictor_lr { self.peak_lr() } else { self.lr(step) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule() -> Schedule {
        Schedule {
            base_lr: 0.05,
            batch: 512,
            epochs: 100,
            steps_per_epoch: 2502,
            warmup_epochs: 0,
            per_step: false,
            fix_predictor_lr: false,
        }
    }

    fn assert_close(got: f64, expected: f64) {
        assert!((got - expected).abs() <= 1e-12, "expected {expected}, got {got}");
    }

    #[test]
    fn reference_epochs() {
        let s = schedule();
        // 0.1 / 2 * (1 + cos(pi e / 100)), computed with numpy.
        for (epoch, lr) in [(0, 0.1), (1, 0.09997532801828658), (33, 0.07545207078751858), (99, 2.467198171342e-05)] {
            assert_close(s.lr(epoch * 2502), lr);
            assert_close(s.lr(epoch * 2502 + 2501), lr);
        }
        assert_close(s.predictor_lr(33 * 2502), s.lr(33 * 2502));
    }

    #[test]
    fn per_step_is_finer_and_meets_the_epochs() {
        let (by_epoch, by_step) = (schedule(), Schedule { per_step: true, ..schedule() });
        assert_close(by_step.lr(40 * 2502), by_epoch.lr(40 * 2502));
        assert!(by_step.lr(40 * 2502 + 1) < by_step.lr(40 * 2502));
        // Half way through the run of an odd number of epochs.
        let odd = Schedule { epochs: 3, steps_per_epoch: 2, per_step: true, ..schedule() };
        assert_close(odd.lr(3), 0.05);
        assert_close(odd.lr(6), 0.0);
        assert_close(odd.lr(1000), 0.0);
    }

    #[test]
    fn warm_up_ramps_to_the_peak_then_decays_over_the_rest() {
        let s = Schedule { epochs: 8, steps_per_epoch: 3, warmup_epochs: 2, batch: 64, ..schedule() };
        let peak = 0.0125;
        let ramp: Vec<f64> = (0..6).map(|i| s.lr(i)).collect();
        for (i, lr) in ramp.iter().enumerate() {
            assert_close(*lr, peak * (i + 1) as f64 / 6.0);
        }
        assert_close(s.lr(6), peak);
        assert_close(s.lr(15), peak / 2.0); // epoch 5 of 2..8
        let per_step = Schedule { per_step: true, ..s };
        assert_close(per_step.lr(6), peak);
        assert_close(per_step.lr(15), peak / 2.0);
        assert_close(per_step.lr(12), peak * 0.75); // cos(pi/3) = 1/2
    }

    #[test]
    fn fixed_predictor_lr_never_moves() {
        let s = Schedule { fix_predictor_lr: true, warmup_epochs: 3, ..schedule() };
        for step in [0, 1, 2502 * 3, 2502 * 99] {
            assert_close(s.predictor_lr(step), 0.1);
        }
        assert!(s.lr(0) < 0.001);
    }

    #[test]
    fn bad_options_are_named() {
        let cases = [
            (Schedule { base_lr: f64::NAN, ..schedule() }, "--base-lr"),
            (Schedule { base_lr: -0.1, ..schedule() }, "--base-lr"),
            (Schedule { batch: 0, ..schedule() }, "--batch"),
            (Schedule { epochs: 0, ..schedule() }, "--epochs"),
            (Schedule { epochs: u64::MAX, ..schedule() }, "--epochs"),
            (Schedule { steps_per_epoch: 0, ..schedule() }, "no full batch of 512 images"),
            (Schedule { warmup_epochs: 100, ..schedule() }, "fewer than the 100 epochs"),
        ];
        for (schedule, expected) in cases {
            let message = schedule.validate().unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        schedule().validate().unwrap();
    }

    #[test]
    fn survives_toml() {
        let text = toml::to_string(&schedule()).unwrap();
        assert_eq!(toml::from_str::<Schedule>(&text).unwrap(), schedule());
    }
}
