//! The progress of a run on standard error: a bar on a terminal, otherwise a plain line every few seconds.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Time between plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

/// What is shown of a step.
#[derive(Debug, Clone, Copy)]
pub struct Snapshot {
    /// Steps done, this one included.
    pub steps_done: u64,
    /// The step's epoch, counted from 0.
    pub epoch: u64,
    /// Its loss.
    pub loss: f64,
    /// z std * sqrt(d).
    pub z_std: f64,
    /// Source images per second of late.
    pub images_per_s: f64,
    /// Share of the time spent waiting for data, in 0..1.
    pub data_wait_share: f64,
}

/// Displays a run of a known number of steps.
#[derive(Debug)]
pub struct Progress {
    epochs: u64,
    total_steps: u64,
    first_step: u64,
    started: Instant,
    display: Display,
}

#[derive(Debug)]
enum Display {
    Bar(ProgressBar),
    Plain { last: Option<Instant> },
}

impl Progress {
    /// The display of a run of `epochs` epochs and `total_steps` steps that starts, or was resumed, at `first_step`.
    pub fn new(epochs: u64, total_steps: u64, first_step: u64) -> Progress {
        let display = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new(total_steps).with_position(first_step).with_style(style());
            Display::Bar(bar)
        } else {
            Display::Plain { last: None }
        };
        Progress { epochs, total_steps, first_step, started: Instant::now(), display }
    }

    /// Shows a step: at once in the bar; as a plain line when it is the first or last, or some seconds after the line before.
    pub fn update(&mut self, now: &Snapshot) {
        let elapsed = self.started.elapsed();
        let (line, message) = (self.describe(now, elapsed), self.compact(now, elapsed));
        let last_step = now.steps_done == self.total_steps;
        match &mut self.display {
            Display::Bar(bar) => {
                bar.set_position(now.steps_done);
                bar.set_message(message);
            }
            Display::Plain { last } => {
                if last_step || last.is_none_or(|last| last.elapsed() >= PLAIN_EVERY) {
                    eprintln!("{line}");
                    *last = Some(Instant::now());
                }
            }
        }
    }

    /// Prints a line of its own (a kNN figure, a checkpoint, a warning) without disturbing the bar.
    pub fn note(&self, text: &str) {
        match &self.display {
            Display::Bar(bar) => bar.suspend(|| eprintln!("{text}")),
            Display::Plain { .. } => eprintln!("{text}"),
        }
    }

    /// Ends the display; the bar's last state stays on the screen.
    pub fn finish(self) {
        if let Display::Bar(bar) = self.display {
            bar.abandon();
            eprintln!(); // the bar leaves the cursor behind itself
        }
    }

    /// The message of the bar: what matters most comes first, for a terminal of 80 columns cuts the rest.
    fn compact(&self, now: &Snapshot, elapsed: Duration) -> String {
        let done = now.steps_done;
        let left = time_left(elapsed, done.saturating_sub(self.first_step), self.total_steps.saturating_sub(done));
        let mut text = left.map_or(String::new(), |left| format!("{} left, ", human(left)));
        text += &format!("{:.0} images/s, loss {:.4}, z std*√d {:.3}", now.images_per_s, now.loss, now.z_std);
        if now.data_wait_share >= 0.05 {
            text += &format!(", data wait {:.0} %", 100.0 * now.data_wait_share);
        }
        text + &format!(", epoch {}/{}", now.epoch + 1, self.epochs)
    }

    fn describe(&self, now: &Snapshot, elapsed: Duration) -> String {
        let (done, total) = (now.steps_done, self.total_steps);
        let mut text = format!(
            "epoch {}/{}, step {done}/{total}, loss {:.4}, z std*sqrt(d) {:.3}, {:.0} images/s",
            now.epoch + 1,
            self.epochs,
            now.loss,
            now.z_std,
            now.images_per_s,
        );
        if now.data_wait_share >= 0.05 {
            text += &format!(" (waiting for data {:.0} %)", 100.0 * now.data_wait_share);
        }
        match time_left(elapsed, done.saturating_sub(self.first_step), total.saturating_sub(done)) {
            Some(left) => text + &format!(", {} left", human(left)),
            None => text,
        }
    }
}

fn style() -> ProgressStyle {
    let template = "[{bar:8}] {percent} % {wide_msg}";
    // A fixed template parses; were it ever broken, the default bar is better than no run.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

/// The time that `left` steps take at the mean pace of the `done` steps of this process.
fn time_left(elapsed: Duration, done: u64, left: u64) -> Option<Duration> {
    let seconds = elapsed.as_secs_f64() / done as f64 * left as f64;
    Duration::try_from_secs_f64(seconds).ok() // 0 steps done: no estimate
}

/// A duration in its two largest units.
fn human(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().round() as u64;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {:02} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(first_step: u64) -> Progress {
        let display = Display::Plain { last: None };
        Progress { epochs: 12, total_steps: 552, first_step, started: Instant::now(), display }
    }

    fn snapshot(steps_done: u64) -> Snapshot {
        let epoch = (steps_done - 1) / 46;
        Snapshot { steps_done, epoch, loss: -0.50816, z_std: 0.99712, images_per_s: 812.4, data_wait_share: 0.004 }
    }

    #[test]
    fn the_bar_shows_time_speed_loss_and_spread_in_80_columns() {
        let now = Snapshot {
            steps_done: 400,
            epoch: 99,
            loss: -0.8123,
            z_std: 0.998,
            images_per_s: 1978.4,
            data_wait_share: 0.0,
        };
        let text = Progress::new(100, 1000, 0).compact(&now, Duration::from_secs(29_000));
        assert_eq!(text, "12 h 05 min left, 1978 images/s, loss -0.8123, z std*√d 0.998, epoch 100/100");
        let bar = "[========] 40 % ".chars().count();
        assert!(bar + text.find(", epoch").unwrap() <= 80);
    }

    #[test]
    fn lines_carry_units_and_the_time_left() {
        // 92 steps in 46 s, 368 to go.
        let text = plain(92).describe(&snapshot(184), Duration::from_secs(46));
        assert_eq!(text, "epoch 4/12, step 184/552, loss -0.5082, z std*sqrt(d) 0.997, 812 images/s, 3 min 04 s left");
        let slow = Snapshot { data_wait_share: 0.314, ..snapshot(552) };
        let text = plain(0).describe(&slow, Duration::from_secs(600));
        assert!(text.ends_with("812 images/s (waiting for data 31 %), 0 s left"), "{text}");
    }

    #[test]
    fn no_estimate_before_the_first_step() {
        let text = plain(184).describe(&snapshot(184), Duration::from_secs(3));
        assert!(text.ends_with("images/s"), "{text}");
    }

    #[test]
    fn durations_read_well() {
        let cases = [
            (0.4, "0 s"),
            (59.6, "1 min 00 s"),
            (3599.0, "59 min 59 s"),
            (3660.0, "1 h 01 min"),
            (266_400.0, "3 d 02 h"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(human(Duration::from_secs_f64(seconds)), expected);
        }
    }

    #[test]
    fn plain_lines_are_rare() {
        let mut progress = plain(0);
        progress.update(&snapshot(1));
        let Display::Plain { last: Some(first) } = progress.display else { panic!("the first step is shown") };
        progress.update(&snapshot(2));
        assert!(matches!(progress.display, Display::Plain { last: Some(at) } if at == first), "too soon for a line");
        progress.update(&snapshot(552));
        assert!(matches!(progress.display, Display::Plain { last: Some(at) } if at > first), "the last step is shown");
    }
}
