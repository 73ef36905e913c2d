//! Where NVIDIA's libraries are: nothing of CUDA is linked, what is needed is looked for and mapped when it is needed.
#![allow(unsafe_code)] // maps libraries

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// A library of NVIDIA's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Library {
    /// Matrix products.
    CublasLt,
    /// Convolutions.
    Cudnn,
    /// The compiler that cuDNN's run-time engines use.
    Nvrtc,
    /// What that compiler loads by its bare name.
    NvrtcBuiltins,
}

impl Library {
    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            Library::CublasLt => "cuBLASLt",
            Library::Cudnn => "cuDNN",
            Library::Nvrtc => "nvrtc",
            Library::NvrtcBuiltins => "nvrtc-builtins",
        }
    }

    /// Its file's names, best first.
    fn files(self) -> &'static [&'static str] {
        match self {
            Library::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12"],
            Library::Cudnn => &["libcudnn.so.9"],
            Library::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12"],
            Library::NvrtcBuiltins => &[
                "libnvrtc-builtins.so.13.0",
                "libnvrtc-builtins.so.13.1",
                "libnvrtc-builtins.so.13.2",
                "libnvrtc-builtins.so.12.9",
                "libnvrtc-builtins.so.12.8",
            ],
        }
    }

    /// The folders of its Python packages within `site-packages/nvidia`.
    fn packages(self) -> &'static [&'static str] {
        match self {
            Library::CublasLt => &["cu13/lib", "cublas/lib"],
            Library::Cudnn => &["cudnn/lib"],
            Library::Nvrtc | Library::NvrtcBuiltins => &["cu13/lib", "cuda_nvrtc/lib"],
        }
    }

    /// What a user does about its absence.
    pub fn hint(self) -> &'static str {
        match self {
            Library::CublasLt => "`pip install nvidia-cublas`, or name its folder in SIMSIAM_CUDA_LIBS",
            Library::Cudnn => "`pip install nvidia-cudnn-cu13 nvidia-cublas`, or name its folder in SIMSIAM_CUDA_LIBS",
            Library::Nvrtc | Library::NvrtcBuiltins => {
                "`pip install nvidia-cuda-nvrtc`: for cuDNN's fused engines only"
            }
        }
    }
}

/// A library that is mapped, for as long as the program runs.
#[derive(Debug, Clone)]
pub struct Mapped {
    /// For its functions.
    pub library: &'static libloading::Library,
    /// Where it lies, as far as the system says.
    pub path: PathBuf,
}

/// Finds and maps a library; the same one at every call.
///
/// # Errors
/// [`Error::Unsupported`] with what was looked for, in how many places, and a hint.
pub fn find(wanted: Library) -> Result<Mapped> {
    static FOUND: Mutex<Option<HashMap<Library, Mapped>>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    let found = found.get_or_insert_default();
    if let Some(mapped) = found.get(&wanted) {
        return Ok(mapped.clone());
    }
    let mapped = map(wanted, &places(wanted, &OfProcess))?;
    found.insert(wanted, mapped.clone());
    Ok(mapped)
}

/// Maps what cuDNN's run-time engines compile with, where it is there: without it those engines are not offered.
pub fn prepare_run_time_compilation() {
    // The builtins first: the compiler looks for them by their bare name, which then is mapped already.
    for library in [Library::NvrtcBuiltins, Library::Nvrtc] {
        if let Err(error) = find(library) {
            tracing::debug!("cuDNN compiles no engines at run time: {error}");
        }
    }
}

/// What decides where is looked.
trait Surroundings {
    /// The value of an environment variable that is set and not empty.
    fn variable(&self, name: &str) -> Option<OsString>;

    /// The prefixes of the `python3` in a folder of PATH.
    fn prefixes(&self, folder: &Path) -> Vec<PathBuf>;

    /// The folders that NVIDIA's Python packages install into, below an installation's prefix.
    fn site_packages(&self, prefix: &Path) -> Vec<PathBuf>;
}

/// Those of this process.
struct OfProcess;

impl Surroundings for OfProcess {
    fn variable(&self, name: &str) -> Option<OsString> {
        std::env::var_os(name).filter(|value| !value.is_empty())
    }

    fn prefixes(&self, folder: &Path) -> Vec<PathBuf> {
        python_prefixes(folder)
    }

    fn site_packages(&self, prefix: &Path) -> Vec<PathBuf> {
        site_packages(prefix)
    }
}

/// Where `wanted` may lie, in the order in which it is looked for: a file name alone is for the system's loader.
fn places(wanted: Library, around: &impl Surroundings) -> Vec<PathBuf> {
    let paths = |name| around.variable(name).map_or(vec![], |value| std::env::split_paths(&value).collect::<Vec<_>>());
    let mut folders = paths("SIMSIAM_CUDA_LIBS");
    folders.push(PathBuf::new()); // the loader's own: LD_LIBRARY_PATH, its cache, the system's folders
    let toolkits = ["CUDA_HOME", "CUDA_PATH"].map(paths).concat().into_iter().chain([PathBuf::from("/usr/local/cuda")]);
    for toolkit in toolkits {
        folders.extend(["lib64", "lib", "targets/x86_64-linux/lib"].map(|folder| toolkit.join(folder)));
    }
    let mut prefixes = ["VIRTUAL_ENV", "CONDA_PREFIX"].map(paths).concat();
    prefixes.extend(paths("PATH").iter().flat_map(|folder| around.prefixes(folder)));
    for nvidia in prefixes.iter().flat_map(|prefix| around.site_packages(prefix)) {
        folders.extend(wanted.packages().iter().map(|package| nvidia.join(package)));
    }
    let mut places: Vec<PathBuf> = vec![];
    for place in folders.iter().flat_map(|folder| wanted.files().iter().map(move |file| folder.join(file))) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places
}

/// The prefixes of the `python3` in a folder of PATH: that of a virtual environment, then that of what it is made from.
fn python_prefixes(folder: &Path) -> Vec<PathBuf> {
    let python = folder.join("python3");
    let real = python.canonicalize().ok();
    let prefix = |program: &Path| program.parent().and_then(Path::parent).map(Path::to_path_buf);
    real.iter().flat_map(|real| [prefix(&python), prefix(real)]).flatten().collect()
}

/// The folders that NVIDIA's Python packages install into, below an installation's prefix.
fn site_packages(prefix: &Path) -> Vec<PathBuf> {
    let mut found = vec![];
    for lib in ["lib", "lib64", "local/lib"] {
        let entries = std::fs::read_dir(prefix.join(lib)).into_iter().flatten().flatten();
        let mut versions: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        versions.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python3")));
        versions.sort();
        let packages = versions.iter().flat_map(|path| ["site-packages", "dist-packages"].map(|name| path.join(name)));
        found.extend(packages.map(|path| path.join("nvidia")).filter(|path| path.is_dir()));
    }
    found
}

/// Maps the first of `places` that can be.
fn map(wanted: Library, places: &[PathBuf]) -> Result<Mapped> {
    use libloading::os::unix::{Library as Loaded, RTLD_GLOBAL, RTLD_NOW};
    let mut refused = vec![];
    for place in places {
        let by_loader = place.components().count() == 1;
        if !by_loader && !place.exists() {
            continue;
        }
        // SAFETY: NVIDIA's libraries have initialisers only of their own.
        match unsafe { Loaded::open(Some(place), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => {
                let library: &'static libloading::Library = Box::leak(Box::new(library.into()));
                let path = if by_loader { mapped_path(place) } else { place.clone() };
                tracing::debug!("{}: {}", wanted.name(), path.display());
                return Ok(Mapped { library, path });
            }
            Err(error) if !by_loader => refused.push(format!("{}: {}", place.display(), super::super::reason(&error))),
            Err(_) => {}
        }
    }
    let (name, file) = (wanted.name(), wanted.files()[0]);
    let what = match refused.first() {
        Some(reason) => format!("{name} cannot be loaded: {reason}"),
        None => format!(
            "{name} ({file}) was not found in {} places (SIMSIAM_CUDA_LIBS, the loader's, CUDA_HOME, /usr/local/cuda, Python's packages)",
            places.len()
        ),
    };
    Err(Error::Unsupported { what, hint: Some(wanted.hint().into()) })
}

/// The path of a mapped file that was asked for by its name alone.
fn mapped_path(name: &Path) -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let paths = maps.lines().filter_map(|line| line.split_once('/')).map(|(_, path)| PathBuf::from(format!("/{path}")));
    let prefix = name.to_string_lossy();
    let of_name = |path: &PathBuf| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(&*prefix));
    paths.into_iter().find(of_name).unwrap_or_else(|| name.to_path_buf())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Told(&'static [(&'static str, &'static str)]);

    impl Surroundings for Told {
        fn variable(&self, name: &str) -> Option<OsString> {
            self.0.iter().find(|(told, _)| *told == name).map(|(_, value)| (*value).into())
        }

        fn prefixes(&self, folder: &Path) -> Vec<PathBuf> {
            if folder == Path::new("/opt/py/bin") { vec!["/opt/py".into()] } else { vec![] }
        }

        fn site_packages(&self, prefix: &Path) -> Vec<PathBuf> {
            vec![prefix.join("lib/python3.11/site-packages/nvidia")]
        }
    }

    #[test]
    fn is_looked_for_in_the_promised_order() {
        let around = Told(&[
            ("SIMSIAM_CUDA_LIBS", "/mine:/yours"),
            ("CUDA_HOME", "/cuda"),
            ("VIRTUAL_ENV", "/venv"),
            ("CONDA_PREFIX", "/conda"),
            ("PATH", "/usr/bin:/opt/py/bin"),
        ]);
        let folders = |wanted| -> Vec<String> {
            places(wanted, &around).iter().map(|p| p.parent().unwrap().display().to_string()).collect()
        };
        let site = "lib/python3.11/site-packages/nvidia";
        let expected = [
            "/mine",
            "/yours",
            "",
            "/cuda/lib64",
            "/cuda/lib",
            "/cuda/targets/x86_64-linux/lib",
            "/usr/local/cuda/lib64",
            "/usr/local/cuda/lib",
            "/usr/local/cuda/targets/x86_64-linux/lib",
            &format!("/venv/{site}/cudnn/lib"),
            &format!("/conda/{site}/cudnn/lib"),
            &format!("/opt/py/{site}/cudnn/lib"),
        ];
        assert_eq!(folders(Library::Cudnn), expected);
        // In each folder the newer name comes first.
        let products = places(Library::CublasLt, &around);
        assert_eq!(products[..2], [PathBuf::from("/mine/libcublasLt.so.13"), "/mine/libcublasLt.so.12".into()]);
    }

    #[test]
    fn no_place_is_named_twice() {
        let around = Told(&[("CUDA_HOME", "/usr/local/cuda"), ("CUDA_PATH", "/usr/local/cuda")]);
        let all = places(Library::Cudnn, &around);
        assert_eq!(all.len(), 4, "{all:?}");
    }

    #[test]
    fn what_is_missing_is_said_with_a_hint() {
        let folder = tempfile::tempdir().unwrap();
        let message = map(Library::Cudnn, &[folder.path().join("libcudnn.so.9")]).unwrap_err().to_string();
        assert!(message.starts_with("cuDNN (libcudnn.so.9) was not found in 1 places"), "{message}");
        assert!(message.contains("pip install nvidia-cudnn-cu13 nvidia-cublas"), "{message}");
    }

    #[test]
    fn a_broken_file_is_named_with_the_loaders_reason() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("libcublasLt.so.13");
        std::fs::write(&file, "no ELF file").unwrap();
        let message = map(Library::CublasLt, &[folder.path().join("libcublasLt.so.12"), file]).unwrap_err().to_string();
        assert!(
            message.starts_with("cuBLASLt cannot be loaded: ") && message.contains("libcublasLt.so.13"),
            "{message}"
        );
    }

    #[test]
    fn packages_of_a_python_installation_are_found() {
        let prefix = tempfile::tempdir().unwrap();
        let nvidia = prefix.path().join("lib/python3.12/site-packages/nvidia");
        std::fs::create_dir_all(&nvidia).unwrap();
        std::fs::create_dir_all(prefix.path().join("lib/python2.7/site-packages/nvidia")).unwrap();
        assert_eq!(site_packages(prefix.path()), [nvidia]);
        assert!(site_packages(&prefix.path().join("absent")).is_empty());
    }
}
