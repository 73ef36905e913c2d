//! `metrics.jsonl`: one JSON object per logged step. An interrupted and resumed run ends with exactly the lines of an
//! uninterrupted one, [`Timing`] aside.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::atomic::write_atomic;
use crate::error::{Error, Result};

/// What is logged at one step. Every number is finite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// The optimiser step, counted from 0.
    pub step: u64,
    /// Its epoch, counted from 0.
    pub epoch: u64,
    /// The loss before the step's update, in -1..1 for cosine similarity.
    pub loss: f64,
    /// Mean over dimensions of std(z / norm(z)), times sqrt(d): 1 when spread evenly, 0 when collapsed.
    pub z_std: f64,
    /// Effective rank of z, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective_rank: Option<f64>,
    /// Learning rate of encoder and projector.
    pub lr: f64,
    /// Learning rate of the predictor.
    pub predictor_lr: f64,
    /// kNN top-1 accuracy in 0..1, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub knn: Option<f64>,
    /// What differs from run to run.
    pub timing: Timing,
}

/// Measurements of the machine; leave them out when comparing runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Source images per second since the line before.
    pub images_per_s: f64,
    /// Share of the time since the line before that was spent waiting for data, in 0..1.
    pub data_wait_share: f64,
}

impl Line {
    /// The line without its timing: equal for equal runs.
    pub fn without_timing(&self) -> Line {
        Line { timing: Timing::default(), ..self.clone() }
    }

    /// A number that JSON cannot hold, by name.
    fn non_finite(&self) -> Option<&'static str> {
        let numbers = [
            ("loss", self.loss),
            ("z_std", self.z_std),
            ("effective_rank", self.effective_rank.unwrap_or(0.0)),
            ("lr", self.lr),
            ("predictor_lr", self.predictor_lr),
            ("knn", self.knn.unwrap_or(0.0)),
            ("images_per_s", self.timing.images_per_s),
            ("data_wait_share", self.timing.data_wait_share),
        ];
        numbers.into_iter().find(|(_, number)| !number.is_finite()).map(|(name, _)| name)
    }
}

/// Appends lines to a metrics file.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Starts the metrics of a new run.
    ///
    /// # Errors
    /// [`Error::Io`] when the file exists already or cannot be created.
    pub fn create(path: &Path) -> Result<MetricsWriter> {
        let file = OpenOptions::new().append(true).create_new(true).open(path).map_err(Error::io("create", path))?;
        Ok(MetricsWriter { path: path.to_path_buf(), file })
    }

    /// Continues the metrics of a run whose next step is `step`: lines of that step and later are dropped, as is a last
    /// line torn by a kill. The file is rewritten atomically, and the kept lines byte by byte.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read or written, [`Error::Format`] when a line before the last is damaged.
    pub fn resume(path: &Path, step: u64) -> Result<MetricsWriter> {
        let text = if path.exists() { read_bytes(path)? } else { Vec::new() };
        let kept: Vec<&[u8]> =
            parse(path, &text)?.into_iter().filter(|(_, line)| line.step < step).map(|(raw, _)| raw).collect();
        write_atomic(path, |out| {
            kept.iter().try_for_each(|raw| {
                out.write_all(raw)?;
                out.write_all(b"\n")
            })
        })?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::io("open", path))?;
        Ok(MetricsWriter { path: path.to_path_buf(), file })
    }

    /// Appends one line; it has reached the operating system on return.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be written, [`Error::Internal`] when a number is not finite.
    pub fn append(&mut self, line: &Line) -> Result<()> {
        if let Some(name) = line.non_finite() {
            let message = format!("{name} of step {} is not finite", line.step);
            return Err(Error::Internal { thread: "the metrics log".into(), message });
        }
        let mut text = serde_json::to_vec(line).map_err(|e| Error::io("encode", &self.path)(e.into()))?;
        text.push(b'\n');
        self.file.write_all(&text).map_err(Error::io("write", &self.path))
    }

    /// Makes everything appended durable. Call it before saving a checkpoint: then no metrics from before a checkpoint can
    /// be missing after a power failure.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("make durable", &self.path))
    }
}

/// All lines of a metrics file; a torn last line is left out.
///
/// # Errors
/// [`Error::Io`] when the file cannot be read, [`Error::Format`] when a line before the last is damaged.
pub fn read(path: &Path) -> Result<Vec<Line>> {
    let text = read_bytes(path)?;
    Ok(parse(path, &text)?.into_iter().map(|(_, line)| line).collect())
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(Error::io("read", path))
}

/// Each line raw (without its newline) and parsed.
fn parse<'a>(path: &Path, text: &'a [u8]) -> Result<Vec<(&'a [u8], Line)>> {
    let mut lines = Vec::new();
    let mut offset = 0;
    for piece in text.split_inclusive(|&byte| byte == b'\n') {
        let (raw, whole) = piece.strip_suffix(b"\n").map_or((piece, false), |raw| (raw, true));
        match serde_json::from_slice(raw) {
            Ok(line) => lines.push((raw, line)),
            Err(_) if !whole => {} // only the last piece can lack its newline: torn by a kill
            Err(e) => {
                let what = format!("line {} is not a metrics line: {e}", lines.len() + 1);
                return Err(Error::format(path, Some(offset), what));
            }
        }
        offset += piece.len() as u64;
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64, speed: f64) -> Line {
        Line {
            step,
            epoch: step / 4,
            loss: -(step as f64 / 7.0).sin(),
            z_std: f64::from(0.99_f32),
            effective_rank: (step.is_multiple_of(5)).then_some(70.25),
            lr: 0.1 / (step + 3) as f64,
            predictor_lr: 0.1,
            knn: (step % 4 == 3).then_some(0.784),
            timing: Timing { images_per_s: speed, data_wait_share: 0.01 },
        }
    }

    fn write(path: &Path, steps: std::ops::Range<u64>, speed: f64) {
        let mut writer = MetricsWriter::create(path).unwrap();
        steps.for_each(|step| writer.append(&line(step, speed)).unwrap());
        writer.sync().unwrap();
    }

    #[test]
    fn reads_what_it_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, 0..13, 812.5);
        let lines = read(&path).unwrap();
        assert_eq!(lines, (0..13).map(|step| line(step, 812.5)).collect::<Vec<_>>());
        let text = std::fs::read_to_string(&path).unwrap();
        let second = text.lines().nth(1).unwrap();
        assert!(second.starts_with(r#"{"step":1,"epoch":0,"loss":-0.14"#) && !second.contains("rank"), "{second}");
        assert!(MetricsWriter::create(&path).is_err(), "a run's metrics are never overwritten");
    }

    #[test]
    fn a_resumed_run_equals_an_uninterrupted_one_from_any_cut() {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join("full.jsonl");
        write(&full, 0..9, 812.5);
        let bytes = std::fs::read(&full).unwrap();
        let expected: Vec<Line> = read(&full).unwrap().iter().map(Line::without_timing).collect();
        let path = folder.path().join("cut.jsonl");
        for cut in 0..=bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            // The newest checkpoint lies some steps before the last whole line.
            let checkpoint = read(&path).unwrap().len().saturating_sub(2) as u64;
            let mut writer = MetricsWriter::resume(&path, checkpoint).unwrap();
            (checkpoint..9).for_each(|step| writer.append(&line(step, 3.0)).unwrap());
            let resumed: Vec<Line> = read(&path).unwrap().iter().map(Line::without_timing).collect();
            assert_eq!(resumed, expected, "cut at byte {cut}");
            let kept = bytes.split_inclusive(|&b| b == b'\n').take(checkpoint as usize).flatten().count();
            assert_eq!(std::fs::read(&path).unwrap()[..kept], bytes[..kept], "cut at byte {cut}");
        }
    }

    #[test]
    fn a_whole_line_without_newline_is_kept_and_healed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, 0..3, 1.0);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        MetricsWriter::resume(&path, 3).unwrap().append(&line(3, 1.0)).unwrap();
        assert_eq!(read(&path).unwrap().len(), 4);
    }

    #[test]
    fn damage_in_the_middle_is_an_error_with_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, 0..3, 1.0);
        let mut bytes = std::fs::read(&path).unwrap();
        let second = bytes.iter().position(|&b| b == b'\n').unwrap() + 1;
        bytes[second + 2] = 0xff;
        std::fs::write(&path, &bytes).unwrap();
        for result in [read(&path).map(drop), MetricsWriter::resume(&path, 2).map(drop)] {
            let message = result.unwrap_err().to_string();
            assert!(message.contains(&format!("byte {second}: line 2 is not a metrics line")), "{message}");
        }
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "a refused file is left as it is");
    }

    #[test]
    fn non_finite_numbers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = MetricsWriter::create(&folder.path().join("metrics.jsonl")).unwrap();
        let bad = Line { effective_rank: Some(f64::NAN), ..line(4, 1.0) };
        assert!(writer.append(&bad).unwrap_err().to_string().contains("effective_rank of step 4"));
        assert!(read(&folder.path().join("metrics.jsonl")).unwrap().is_empty());
    }
}
