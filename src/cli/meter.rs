//! Progress of a pass over images: a bar with speed and time left, or a plain line now and then when standard error is not a
//! terminal.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

/// Time between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

pub struct Meter {
    bar: Option<ProgressBar>,
    total: u64,
    started: Instant,
    /// What was done before: the work of an earlier call says nothing about the speed of this one.
    before: Option<u64>,
    line_due: Duration,
}

impl Meter {
    /// A meter for `total` images; `verb` says what is done to them.
    pub fn new(verb: &'static str, total: u64) -> Meter {
        let template = "{prefix} [{wide_bar}] {human_pos}/{human_len} images, {msg}, {eta} left";
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = stderr().is_terminal().then(|| ProgressBar::new(total).with_style(style).with_prefix(verb));
        Meter { bar, total, started: Instant::now(), before: None, line_due: LINE_EVERY }
    }

    /// Tells that `done` images are done.
    pub fn set(&mut self, done: u64) {
        self.before.get_or_insert(done.saturating_sub(1));
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{:.0} images/s", self.rate(done)));
            bar.set_position(done);
        } else if self.started.elapsed() >= self.line_due {
            self.line_due = self.started.elapsed() + LINE_EVERY;
            let rate = self.rate(done);
            let left = Duration::from_secs_f64((self.total.saturating_sub(done)) as f64 / rate.max(1e-3));
            eprintln!("{done}/{} images, {rate:.0} images/s, {} left", self.total, HumanDuration(left));
        }
    }

    /// Prints a line of its own.
    pub fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    /// Clears the bar; returns the seconds it took.
    pub fn finish(self) -> f64 {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.started.elapsed().as_secs_f64()
    }

    fn rate(&self, done: u64) -> f64 {
        (done - self.before.unwrap_or(0).min(done)) as f64 / self.started.elapsed().as_secs_f64().max(1e-9)
    }
}
