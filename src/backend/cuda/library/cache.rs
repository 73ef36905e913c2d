//! The algorithms that were chosen, kept from run to run: choices by timing would otherwise differ, and with them the order
//! of sums.

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::atomic::write_atomic;
use crate::error::{Error, Result};

use super::cudnn::Engine;
use super::{Choice, Work, cublaslt};

/// What is decided for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Key {
    /// The work.
    pub work: Work,
    /// Whether the result is added to what is there.
    pub accumulate: bool,
    /// How the algorithm was chosen.
    pub choice: Choice,
}

/// What was decided.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// An engine of cuDNN's.
    Cudnn(Engine),
    /// An algorithm of cuBLASLt's.
    CublasLt(#[serde(with = "hex")] cublaslt::Algorithm),
    /// One of cuBLASLt's for a single product, which each group's is computed with.
    CublasLtEach(#[serde(with = "hex")] cublaslt::Algorithm),
}

/// What choices hold for: with another device or version they are made anew.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Machine {
    /// The device's name.
    pub gpu: String,
    /// The newest CUDA that the driver supports.
    pub driver: [u32; 2],
    /// As `cudnnGetVersion` counts.
    pub cudnn: usize,
    /// As `cublasLtGetVersion` counts.
    pub cublaslt: usize,
    /// The version and commit of this program.
    pub engine: String,
}

impl Machine {
    /// The version and commit of this program.
    pub fn this_engine() -> String {
        format!("{} {}", env!("CARGO_PKG_VERSION"), env!("SIMSIAM_COMMIT"))
    }

    /// A name for the file, of letters that every file system takes.
    fn file_name(&self) -> String {
        let Machine { gpu, driver, cudnn, cublaslt, engine } = self;
        let [major, minor] = driver;
        let name = format!("algorithms-{gpu}-driver-{major}.{minor}-cudnn-{cudnn}-cublaslt-{cublaslt}-engine-{engine}");
        let plain = |c: char| if c.is_ascii_alphanumeric() || "-.".contains(c) { c } else { '_' };
        format!("{}.json", name.chars().map(plain).collect::<String>())
    }
}

/// The file's content. A list, since JSON's keys are strings.
#[derive(serde::Serialize, serde::Deserialize)]
struct Content {
    machine: Machine,
    choices: Vec<(Key, Algorithm)>,
}

/// The choices for one machine.
#[derive(Debug)]
pub struct Cache {
    machine: Machine,
    /// None where the system names no place.
    path: Option<PathBuf>,
    choices: HashMap<Key, Algorithm>,
    changed: bool,
}

impl Cache {
    /// Reads what is kept in the user's folder; a file that cannot be read is told of, and choices are made anew.
    pub fn open(machine: Machine) -> Cache {
        let folder = folder(|name| std::env::var_os(name));
        if folder.is_none() {
            tracing::warn!("chosen algorithms are not kept: neither SIMSIAM_CACHE, XDG_CACHE_HOME nor HOME is set");
        }
        Cache::at(machine, folder.as_deref())
    }

    /// Reads what is kept in `folder`.
    fn at(machine: Machine, folder: Option<&Path>) -> Cache {
        let path = folder.map(|folder| folder.join(machine.file_name()));
        let read = path.as_deref().map_or(Ok(HashMap::new()), |path| read(path, &machine));
        let choices = read.unwrap_or_else(|error| {
            tracing::warn!("algorithms are chosen anew: {error}");
            HashMap::new()
        });
        Cache { machine, path, choices, changed: false }
    }

    /// What was decided for `key`.
    pub fn get(&self, key: &Key) -> Option<&Algorithm> {
        self.choices.get(key)
    }

    /// Decides.
    pub fn insert(&mut self, key: Key, algorithm: Algorithm) {
        self.changed |= self.choices.insert(key, algorithm.clone()).as_ref() != Some(&algorithm);
    }

    /// Writes what was decided since it was read, beside what other runs have written meanwhile.
    ///
    /// # Errors
    /// A file or folder that cannot be written.
    pub fn write(&mut self) -> Result<()> {
        let Some(path) = self.path.as_deref().filter(|_| self.changed) else { return Ok(()) };
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let mut all = read(path, &self.machine).unwrap_or_default();
        all.extend(self.choices.clone());
        let mut choices: Vec<(Key, Algorithm)> = all.into_iter().collect();
        choices.sort_by_cached_key(|(key, _)| format!("{key:?}"));
        let content = Content { machine: self.machine.clone(), choices };
        let text = serde_json::to_string_pretty(&content)
            .map_err(|error| Error::Internal { thread: "algorithm cache".into(), message: error.to_string() })?;
        write_atomic(path, |out| out.write_all(text.as_bytes()))?;
        self.changed = false;
        Ok(())
    }
}

/// Where the choices are kept: SIMSIAM_CACHE, or `simsiam-engine` in the user's folder for such files.
fn folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let path = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    path("SIMSIAM_CACHE")
        .or_else(|| Some(path("XDG_CACHE_HOME")?.join("simsiam-engine")))
        .or_else(|| Some(path("HOME")?.join(".cache/simsiam-engine")))
}

/// The choices in a file; none when there is no file.
fn read(path: &Path, machine: &Machine) -> Result<HashMap<Key, Algorithm>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(HashMap::new()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let content: Content = serde_json::from_str(&text).map_err(|e| Error::format(path, None, e.to_string()))?;
    if content.machine != *machine {
        let what = format!("the algorithms in it are for {:?}, expected {machine:?}", content.machine);
        return Err(Error::format(path, None, what));
    }
    Ok(content.choices.into_iter().collect())
}

/// An algorithm's bytes as hexadecimal digits: as numbers, JSON readers may round them.
mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::cublaslt::Algorithm;

    pub fn serialize<S: Serializer>(algorithm: &Algorithm, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&algorithm.0.map(|word| format!("{word:016x}")).concat())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Algorithm, D::Error> {
        let text = String::deserialize(from)?;
        let wrong = || D::Error::custom(format!("expected 128 hexadecimal digits, got {text:?}"));
        let mut words = [0; 8];
        if text.len() != 128 || !text.is_ascii() {
            return Err(wrong());
        }
        for (word, digits) in words.iter_mut().zip(text.as_bytes().chunks_exact(16)) {
            let digits = std::str::from_utf8(digits).map_err(|_| wrong())?;
            *word = u64::from_str_radix(digits, 16).map_err(|_| wrong())?;
        }
        Ok(Algorithm(words))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Convolution, Direction, Fused, Product};
    use super::*;
    use crate::backend::conv::ConvGeometry;
    use crate::tensor::DType;

    fn machine() -> Machine {
        Machine {
            gpu: "NVIDIA H100 80GB/HBM3".into(),
            driver: [13, 0],
            cudnn: 91_900,
            cublaslt: 130_002,
            engine: "0.1.0 abc".into(),
        }
    }

    fn product(m: usize) -> Key {
        let (dtype, out) = (DType::Bf16, DType::F32);
        let product = Product { groups: 2, bias: true, ..Product::new([m, 7, 9], [true, false], dtype, out) };
        Key { work: Work::Product(product), accumulate: true, choice: Choice { tf32: false, autotune: true } }
    }

    fn convolution() -> Key {
        let (direction, dtype) = (Direction::WeightGradient, DType::F16);
        let (kernel, stride, padding) = ([7, 7], [2, 2], [3, 3]);
        let geometry = ConvGeometry { n: 3, h: 5, w: 6, c_in: 8, c_out: 64, kernel, stride, padding };
        let convolution = Convolution::new(direction, geometry, dtype);
        Key { work: Work::Convolution(convolution), accumulate: false, choice: Choice::default() }
    }

    /// A convolution with something fused.
    fn fused(fused: Fused) -> Key {
        let Work::Convolution(plain) = convolution().work else { panic!("a convolution") };
        let work = Work::Convolution(Convolution { direction: Direction::Forward, fused, ..plain });
        Key { work, ..convolution() }
    }

    fn engine() -> Algorithm {
        Algorithm::Cudnn(Engine { index: 62, knobs: vec![[2, 0], [28, -3]] })
    }

    fn bytes() -> Algorithm {
        Algorithm::CublasLt(cublaslt::Algorithm([u64::MAX, 1, 2, 3, 4, 5, 0x0123_4567_89AB_CDEF, 1 << 63]))
    }

    #[test]
    fn what_was_chosen_is_found_again() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("not/there/yet");
        let mut cache = Cache::at(machine(), Some(&folder));
        assert_eq!(cache.get(&product(2)), None);
        cache.insert(product(2), bytes());
        cache.insert(convolution(), engine());
        let [plain, summed] = [Fused::Nothing, Fused::Statistics { groups: 3 }].map(fused);
        let other = Algorithm::Cudnn(Engine { index: 2, knobs: vec![] });
        let Algorithm::CublasLt(same) = bytes() else { panic!("cuBLASLt's") };
        cache.insert(product(4), Algorithm::CublasLtEach(same));
        cache.insert(plain, engine());
        cache.insert(summed, other.clone());
        cache.write().unwrap();
        let again = Cache::at(machine(), Some(&folder));
        assert_eq!(again.get(&product(2)), Some(&bytes()));
        assert_eq!(again.get(&product(4)), Some(&Algorithm::CublasLtEach(same)));
        assert_eq!(again.get(&convolution()), Some(&engine()));
        assert_eq!((again.get(&plain), again.get(&summed)), (Some(&engine()), Some(&other)));
        // Everything that decides is part of the key.
        assert_eq!(again.get(&fused(Fused::Statistics { groups: 1 })), None);
        assert_eq!(again.get(&fused(Fused::Addition)), None);
        assert_eq!(again.get(&Key { accumulate: false, ..product(2) }), None);
        assert_eq!(again.get(&Key { choice: Choice { tf32: true, autotune: true }, ..product(2) }), None);
        assert_eq!(again.get(&product(3)), None);
        let Work::Product(known) = product(2).work else { panic!("a product") };
        for other in [
            Product { groups: 3, ..known },
            Product { shared: [true, false], ..known },
            Product { addend: true, ..known },
            Product { relu: true, ..known },
            Product { exact: true, ..known },
        ] {
            assert_eq!(again.get(&Key { work: Work::Product(other), ..product(2) }), None, "{other:?}");
        }
    }

    #[test]
    fn runs_at_the_same_time_keep_each_other_s_choices() {
        let folder = tempfile::tempdir().unwrap();
        let [mut first, mut second] = [0, 1].map(|_| Cache::at(machine(), Some(folder.path())));
        first.insert(product(2), bytes());
        second.insert(convolution(), engine());
        first.write().unwrap();
        second.write().unwrap();
        let both = Cache::at(machine(), Some(folder.path()));
        assert_eq!((both.get(&product(2)), both.get(&convolution())), (Some(&bytes()), Some(&engine())));
    }

    #[test]
    fn nothing_is_written_when_nothing_was_decided() {
        let folder = tempfile::tempdir().unwrap();
        let mut cache = Cache::at(machine(), Some(folder.path()));
        cache.write().unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn other_machines_and_damaged_files_are_no_choices() {
        let folder = tempfile::tempdir().unwrap();
        let mut cache = Cache::at(machine(), Some(folder.path()));
        cache.insert(convolution(), engine());
        cache.write().unwrap();
        let newer = Machine { cudnn: 91_901, ..machine() };
        assert_eq!(Cache::at(newer.clone(), Some(folder.path())).get(&convolution()), None);
        // A file under the name of another machine is refused with the reason.
        let path = folder.path().join(machine().file_name());
        let message = read(&path, &newer).unwrap_err().to_string();
        assert!(message.contains("are for") && message.contains("91901"), "{message}");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(read(&path, &machine()).is_err());
        let mut anew = Cache::at(machine(), Some(folder.path()));
        assert_eq!(anew.get(&convolution()), None);
        anew.insert(product(5), bytes());
        anew.write().unwrap();
        assert_eq!(Cache::at(machine(), Some(folder.path())).get(&product(5)), Some(&bytes()));
    }

    /// A file of a version that knew less of products, as a build of the same commit may leave it.
    #[test]
    fn a_file_that_says_less_is_no_choice() {
        let folder = tempfile::tempdir().unwrap();
        let mut cache = Cache::at(machine(), Some(folder.path()));
        cache.insert(product(2), bytes());
        cache.write().unwrap();
        let path = folder.path().join(machine().file_name());
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().filter(|line| !line.contains("\"exact\"")).collect();
        assert_eq!(lines.len() + 1, text.lines().count());
        std::fs::write(&path, lines.join("\n")).unwrap();
        let message = read(&path, &machine()).unwrap_err().to_string();
        assert!(message.contains("missing field `exact`"), "{message}");
        assert_eq!(Cache::at(machine(), Some(folder.path())).get(&product(2)), None);
    }

    #[test]
    fn the_folder_is_the_first_that_is_named() {
        let all = [("SIMSIAM_CACHE", "/mine"), ("XDG_CACHE_HOME", "/xdg"), ("HOME", "/home/me")];
        let found =
            |from: usize| folder(|name| all[from..].iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()));
        let expected = ["/mine", "/xdg/simsiam-engine", "/home/me/.cache/simsiam-engine"];
        assert_eq!([0, 1, 2].map(found), expected.map(|path| Some(PathBuf::from(path))));
        assert_eq!(found(3), None);
        assert_eq!(
            machine().file_name(),
            "algorithms-NVIDIA_H100_80GB_HBM3-driver-13.0-cudnn-91900-cublaslt-130002-engine-0.1.0_abc.json"
        );
    }
}
