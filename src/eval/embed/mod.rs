//! Features of a dataset as a file that other programs read: NumPy, Parquet or safetensors. Rows are written as they come,
//! so memory does not grow with the dataset.

mod npy;
#[cfg(feature = "parquet")]
mod parquet;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::atomic::{write_atomic, write_whole};
use crate::data::dataset::Dataset;
use crate::error::{Error, Result};
use crate::tensor::safetensors::header;
use crate::tensor::{DType, TensorDesc};

/// What takes rows of features: the number of the first record, and its row and those that follow.
pub type Sink<'a> = dyn FnMut(usize, &[f32]) -> Result<()> + 'a;

/// A label where there is none, in files that cannot leave it out.
const NO_LABEL: i64 = -1;

/// A kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `FILE.npy` with features `[n, d]` (float32), beside it `FILE.labels.npy` and `FILE.ids.npy` `[n]` (int64).
    Npy,
    /// One row a record: id, label and class name (null where there is none), feature (a list of floats).
    Parquet,
    /// Tensors `features` `[n, d]` (float32), `labels` and `ids` `[n]` (int64).
    Safetensors,
}

impl Format {
    /// The kind that a file is of by its name.
    ///
    /// # Errors
    /// [`Error::Config`] for other names; [`Error::Unsupported`] for Parquet in a build without it.
    pub fn of(path: &Path) -> Result<Format> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("npy") => Ok(Format::Npy),
            Some("safetensors") => Ok(Format::Safetensors),
            Some("parquet") if cfg!(feature = "parquet") => Ok(Format::Parquet),
            Some("parquet") => Err(Error::Unsupported {
                what: format!("{}: this build has no Parquet", path.display()),
                hint: Some("build with --features parquet, or write .npy or .safetensors".into()),
            }),
            _ => {
                let what = format!("cannot tell the format of {} by its name", path.display());
                Err(Error::config("--out", what).with_hint("end it in .npy, .parquet or .safetensors"))
            }
        }
    }

    /// All files that are written for `path`, which comes last.
    pub fn files(self, path: &Path) -> Vec<PathBuf> {
        match self {
            Format::Npy => vec![beside(path, "labels"), beside(path, "ids"), path.to_path_buf()],
            Format::Parquet | Format::Safetensors => vec![path.to_path_buf()],
        }
    }
}

/// `x.npy` as `x.<what>.npy`.
fn beside(path: &Path, what: &str) -> PathBuf {
    path.with_extension(format!("{what}.npy"))
}

/// What rows belong to.
#[derive(Debug)]
pub struct Table<'a> {
    /// Where labels and class names come from. A record's id is its number there.
    pub dataset: &'a Dataset,
    /// Length of a row.
    pub dim: usize,
    /// What is told of the features, in formats that have a place for it.
    pub metadata: BTreeMap<String, String>,
}

impl Table<'_> {
    /// Writes the rows that `rows` hands to the sink it is given, one for each record in order, to `path` and the files that
    /// belong to it. Each appears whole, and `path` after the others.
    ///
    /// # Errors
    /// What `rows` returns; [`Error::Io`]; [`Error::Internal`] when the rows are not as many as the records.
    pub fn write(&self, path: &Path, format: Format, rows: &mut dyn FnMut(&mut Sink<'_>) -> Result<()>) -> Result<()> {
        let mut checked = |sink: &mut Sink<'_>| {
            let mut written = 0;
            rows(&mut |first, values| {
                written += values.len();
                sink(first, values)
            })?;
            let expected = self.dataset.len() * self.dim;
            if written == expected {
                return Ok(());
            }
            let message = format!("{written} values of {expected}");
            Err(Error::Internal { thread: "the writer of features".into(), message })
        };
        match format {
            Format::Npy => self.write_npy(path, &mut checked),
            Format::Safetensors => self.write_safetensors(path, &mut checked),
            #[cfg(feature = "parquet")]
            Format::Parquet => parquet::write(path, self, &mut checked),
            #[cfg(not(feature = "parquet"))]
            Format::Parquet => Format::of(path).map(drop),
        }
    }

    fn write_npy(&self, path: &Path, rows: &mut dyn FnMut(&mut Sink<'_>) -> Result<()>) -> Result<()> {
        let n = self.dataset.len();
        write_whole(path, |out| {
            out.write_all(&npy::header("<f4", &[n, self.dim])).map_err(Error::io("write", path))?;
            rows(&mut |_, values| out.write_all(bytemuck::cast_slice(values)).map_err(Error::io("write", path)))?;
            let ids = beside(path, "ids");
            write_atomic(&ids, |out| {
                out.write_all(&npy::header("<i8", &[n]))?;
                (0..n as i64).try_for_each(|id| out.write_all(&id.to_le_bytes()))
            })?;
            let labels = beside(path, "labels");
            write_whole(&labels, |out| {
                out.write_all(&npy::header("<i8", &[n])).map_err(Error::io("write", &labels))?;
                self.write_labels(&labels, out)
            })
        })
    }

    fn write_safetensors(&self, path: &Path, rows: &mut dyn FnMut(&mut Sink<'_>) -> Result<()>) -> Result<()> {
        let n = self.dataset.len();
        let (column, matrix) = (TensorDesc::new([n], DType::I64), TensorDesc::new([n, self.dim], DType::F32));
        let header = header(&[("ids", &column), ("labels", &column), ("features", &matrix)], &self.metadata)
            .map_err(|e| Error::io("encode", path)(e.into()))?;
        write_whole(path, |out| {
            let io = |result: std::io::Result<()>| result.map_err(Error::io("write", path));
            io(out.write_all(&header))?;
            io((0..n as i64).try_for_each(|id| out.write_all(&id.to_le_bytes())))?;
            self.write_labels(path, out)?;
            rows(&mut |_, values| io(out.write_all(bytemuck::cast_slice(values))))
        })
    }

    fn write_labels(&self, path: &Path, out: &mut dyn Write) -> Result<()> {
        for record in 0..self.dataset.len() {
            let label = self.dataset.label(record)?.map_or(NO_LABEL, i64::from);
            out.write_all(&label.to_le_bytes()).map_err(Error::io("write", path))?;
        }
        Ok(())
    }
}

/// Gives each row of `dim` values length 1; a row of zeros stays one.
pub fn normalise_rows(values: &mut [f32], dim: usize) {
    for row in values.chunks_exact_mut(dim) {
        let norm = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        if norm > 0.0 {
            row.iter_mut().for_each(|v| *v = (f64::from(*v) / norm) as f32);
        }
    }
}

/// `count` of `n` records, evenly spread over all; all where there are no more.
pub fn evenly(n: usize, count: usize) -> Vec<usize> {
    let count = count.min(n);
    (0..count).map(|i| i * n / count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_after_the_features() {
        let format = |name: &str| Format::of(Path::new(name));
        let names = Format::Npy.files(Path::new("out/a.b.npy"));
        assert_eq!(names, ["out/a.b.labels.npy", "out/a.b.ids.npy", "out/a.b.npy"].map(PathBuf::from));
        assert_eq!(format("x.safetensors").unwrap(), Format::Safetensors);
        for name in ["x", "x.csv", "npy", ".npy"] {
            let message = format(name).unwrap_err().to_string();
            assert!(message.contains("hint: end it in .npy, .parquet or .safetensors"), "{message}");
        }
    }

    #[test]
    fn rows_are_normalised_in_double_precision() {
        let mut rows = [3e-30, -4e-30, 0.0, 0.0, 5e20, 12e20];
        normalise_rows(&mut rows, 2);
        assert_eq!(rows, [0.6, -0.8, 0.0, 0.0, 5.0 / 13.0, 12.0 / 13.0]);
    }

    #[test]
    fn records_are_chosen_evenly() {
        assert_eq!(evenly(10, 4), [0, 2, 5, 7]);
        assert_eq!(evenly(3, 8), [0, 1, 2]);
        assert_eq!(evenly(7, 7), [0, 1, 2, 3, 4, 5, 6]);
    }
}
