//! Compiles `kernels/*.cu` to one fatbin each and embeds them, and tells the crate its commit and target.
//!
//! Without nvcc the build succeeds with a warning and the CPU alone; `SIMSIAM_REQUIRE_NVCC=1` makes that an error.
//! `NVCC=PATH` chooses the compiler, `NVCC=none` builds without CUDA, `SIMSIAM_CUDA_ARCHS=90a` compiles for fewer devices.
//!
//! With the feature `emulator` a C++ compiler (`CXX=PATH`) compiles the same kernels for the CPU.

use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::iter::once_with;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, io, thread};

/// Machine code for every device from the A100 on; PTX for those to come.
const DEFAULT_ARCHS: &str = "80,86,89,90a,100,120,80-ptx,120-ptx";
/// The first release that knows all of them.
const OLDEST_NVCC: (u32, u32) = (13, 0);
const HOW_TO_GET_NVCC: &str = "run tools/install-nvcc.sh, or set NVCC=/path/to/nvcc";

const WITHOUT_CUDA: &str = "hint: NVCC=none builds without CUDA";

type Result<T> = std::result::Result<T, String>;

fn main() {
    if let Err(message) = run() {
        // A directive ends with its line.
        message.lines().for_each(|line| println!("cargo::error={line}"));
    }
}

fn run() -> Result<()> {
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    println!("cargo::rustc-env=SIMSIAM_TARGET={}", variable("TARGET")?);
    println!("cargo::rustc-env=SIMSIAM_COMMIT={}", commit(&root).unwrap_or("unknown".into()));

    let required = tracked("SIMSIAM_REQUIRE_NVCC").is_some_and(|value| value == "1");
    let mut table = String::from("[\n");
    match find_nvcc(&root)? {
        Some(nvcc) => {
            println!("cargo::rerun-if-changed={}", nvcc.path.display());
            println!("cargo::rustc-env=SIMSIAM_NVCC={}.{}", nvcc.release.0, nvcc.release.1);
            for module in compile_kernels(&nvcc, &root.join("kernels"), &out)? {
                let Module { name, fatbin, archs } = module;
                let (log, signatures) = (log_path(&fatbin), signatures_path(&fatbin));
                let bytes = format!("&Aligned(*include_bytes!({fatbin:?})).0");
                let texts = format!("log: include_str!({log:?}), signatures: include_str!({signatures:?})");
                table += &format!("    Module {{ name: {name:?}, fatbin: {bytes}, archs: &{archs:?}, {texts} }},\n");
            }
        }
        None if required => return Err(format!("nvcc not found and SIMSIAM_REQUIRE_NVCC=1: {HOW_TO_GET_NVCC}")),
        None => println!("cargo::rustc-env=SIMSIAM_NVCC=none"),
    }
    table.push_str("]\n");
    write(&out.join("modules.rs"), &table)?;
    if env::var_os("CARGO_FEATURE_EMULATOR").is_some() {
        tracked("CXX");
        build_emulator(&root.join("kernels/emulator/build.sh"), &out.join("emulator.so"))?;
    }
    Ok(())
}

fn build_emulator(script: &Path, library: &Path) -> Result<()> {
    let output = Command::new(script).arg(library).output();
    let output = output.map_err(|e| format!("cannot run {}: {e}", script.display()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        return Err(format!("cannot build the CUDA emulator, which the feature `emulator` asks for\n{said}"));
    }
    said.lines().for_each(|line| println!("cargo::warning={line}"));
    Ok(())
}

fn variable(name: &str) -> Result<String> {
    env::var(name).map_err(|_| format!("{name} is not set: build with cargo"))
}

/// An environment variable whose change must run this script again.
fn tracked(name: &str) -> Option<String> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// The short hash of the commit that is checked out, if this is a git work tree of the project itself.
fn commit(root: &Path) -> Option<String> {
    if !root.join(".git").exists() {
        return None;
    }
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(root).args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?.trim().to_string();
        (output.status.success() && !text.is_empty()).then_some(text)
    };
    // The log of HEAD grows with every commit and checkout, and is one file wherever the branch itself is stored.
    let log = root.join(git(&["rev-parse", "--git-path", "logs/HEAD"])?);
    if log.exists() {
        println!("cargo::rerun-if-changed={}", log.display());
    }
    git(&["rev-parse", "--short=12", "HEAD"])
}

struct Nvcc {
    path: PathBuf,
    release: (u32, u32),
    /// All that `--version` prints, down to the build.
    version: String,
}

impl Nvcc {
    /// The compiler at `path`, if it answers: "... release 13.0, V13.0.88 ...".
    fn at(path: PathBuf) -> Option<Nvcc> {
        let output = Command::new(&path).arg("--version").output().ok()?;
        let version = String::from_utf8_lossy(&output.stdout).into_owned();
        let (major, minor) = version.split_once("release ")?.1.split_once(',')?.0.split_once('.')?;
        let release = (major.parse().ok()?, minor.parse().ok()?);
        Some(Nvcc { path, release, version })
    }

    /// Compiles `source` to `to`; returns what the compiler said.
    fn run(&self, flags: &[String], source: &Path, to: &Path) -> Result<String> {
        let output = Command::new(&self.path).args(LANGUAGE_FLAGS).args(flags).arg("-o").arg(to).arg(source).output();
        let output = output.map_err(|e| format!("cannot run {}: {e}", self.path.display()))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        let failed = format!("{} cannot compile {}", self.path.display(), source.display());
        Err(format!("{failed}; {WITHOUT_CUDA}\n{said}"))
    }
}

/// The compiler: the one that `NVCC` names, or the first that is new enough.
fn find_nvcc(root: &Path) -> Result<Option<Nvcc>> {
    if let Some(chosen) = tracked("NVCC") {
        if chosen == "none" {
            return Ok(None);
        }
        return match Nvcc::at(PathBuf::from(&chosen)) {
            Some(nvcc) if nvcc.release >= OLDEST_NVCC => Ok(Some(nvcc)),
            Some(Nvcc { release: (major, minor), .. }) => {
                Err(format!("NVCC={chosen} is release {major}.{minor}, expected 13.0 or newer; {WITHOUT_CUDA}"))
            }
            None => Err(format!("NVCC={chosen} does not answer to --version; {WITHOUT_CUDA}")),
        };
    }
    let own_python = || in_python(&root.join(".venv"));
    let places = once_with(in_toolkits).chain(once_with(own_python)).chain(once_with(in_active_python));
    let mut too_old = String::new();
    for nvcc in places.flatten().filter(|path| path.is_file()).filter_map(Nvcc::at) {
        if nvcc.release >= OLDEST_NVCC {
            return Ok(Some(nvcc));
        }
        too_old = format!(" ({} is release {}.{})", nvcc.path.display(), nvcc.release.0, nvcc.release.1);
    }
    let missing = format!("built without CUDA kernels, for the CPU alone: found no nvcc 13{too_old}");
    println!("cargo::warning={missing}; to get it, {HOW_TO_GET_NVCC}");
    Ok(None)
}

/// Where CUDA toolkits are installed.
fn in_toolkits() -> Vec<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(tracked).map(|home| Path::new(&home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = homes.chain(env::split_paths(&path)).chain([PathBuf::from("/usr/local/cuda/bin")]);
    folders.map(|folder| folder.join("nvcc")).collect()
}

/// Where NVIDIA's PyPI packages put it in the Python environment at `prefix`.
fn in_python(prefix: &Path) -> Vec<PathBuf> {
    let versions = fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten();
    versions.map(|version| version.path().join("site-packages").join(NVCC_IN_SITE_PACKAGES)).collect()
}

const NVCC_IN_SITE_PACKAGES: &str = "nvidia/cu13/bin/nvcc";

/// The active virtual environment, then the folders that the `python3` on PATH imports from.
fn in_active_python() -> Vec<PathBuf> {
    if let Some(prefix) = tracked("VIRTUAL_ENV") {
        return in_python(Path::new(&prefix));
    }
    let script = "import site; print(*site.getsitepackages(), site.getusersitepackages(), sep='\\n')";
    let output = Command::new("python3").args(["-c", script]).output();
    let folders = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    folders.lines().map(|folder| Path::new(folder).join(NVCC_IN_SITE_PACKAGES)).collect()
}

/// A compiled file of `kernels/`.
struct Module {
    name: String,
    fatbin: PathBuf,
    archs: Vec<String>,
}

/// Compiles every `.cu` of `folder` whose fatbin in `out` is not that of the same sources, flags and compiler.
fn compile_kernels(nvcc: &Nvcc, folder: &Path, out: &Path) -> Result<Vec<Module>> {
    let archs = parse_archs(&tracked("SIMSIAM_CUDA_ARCHS").unwrap_or(DEFAULT_ARCHS.into()))?;
    let generations = archs.iter().flat_map(|arch| ["-gencode".to_string(), arch.gencode()]);
    let flags = Flags {
        fatbin: FATBIN_FLAGS.iter().map(|flag| flag.to_string()).chain(generations).collect(),
        ptx: vec!["-ptx".into(), format!("-arch=compute_{}", archs[0].generation)],
    };

    let sources = files_in(folder, &["cu"])?;
    let mut common = DefaultHasher::new();
    (LANGUAGE_FLAGS, &flags, &nvcc.version).hash(&mut common);
    for header in files_in(folder, &["cuh", "h"])? {
        (file_name(&header), read(&header)?).hash(&mut common);
    }

    let queue = Mutex::new(sources.iter());
    let next = || queue.lock().ok()?.next();
    let worker = || -> Result<()> {
        while let Some(source) = next() {
            let mut key = common.clone();
            read(source)?.hash(&mut key);
            compile(nvcc, &flags, source, &fatbin_path(out, source), &format!("{:016x}", key.finish()))?;
        }
        Ok(())
    };
    let jobs = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1).clamp(1, sources.len().max(1));
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or(Err("a compile thread panicked".into())))
    })?;

    let archs: Vec<String> = archs.iter().map(Arch::code).collect();
    let module =
        |source: &PathBuf| Module { name: stem(source), fatbin: fatbin_path(out, source), archs: archs.clone() };
    Ok(sources.iter().map(module).collect())
}

/// How the language is understood; the emulator's compiler is told the same.
const LANGUAGE_FLAGS: &[&str] = &["-std=c++17", "-O3", "-fmad=false", "-Werror=all-warnings"];
/// Source lines for profilers, the assembler's figures, and as small as can be: it travels in the program.
const FATBIN_FLAGS: &[&str] = &["-fatbin", "-lineinfo", "-Xptxas", "-v", "--compress-mode=size", "--threads=2"];

/// What nvcc is told beyond the language.
#[derive(Hash)]
struct Flags {
    fatbin: Vec<String>,
    ptx: Vec<String>,
}

/// Compiles a source, unless the stamp beside `fatbin` already carries `key`.
fn compile(nvcc: &Nvcc, flags: &Flags, source: &Path, fatbin: &Path, key: &str) -> Result<()> {
    let stamp = fatbin.with_extension("stamp");
    let (log, signatures, ptx) = (log_path(fatbin), signatures_path(fatbin), fatbin.with_extension("ptx"));
    let complete = [fatbin, &log, &signatures].into_iter().all(Path::exists);
    if complete && fs::read_to_string(&stamp).is_ok_and(|old| old == key) {
        return Ok(());
    }
    // A stamp must never outlive its fatbin, not even when the compiler is killed.
    match fs::remove_file(&stamp) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(format!("cannot remove {}: {e}", stamp.display())),
        _ => {}
    }
    write(&log, &nvcc.run(&flags.fatbin, source, fatbin)?)?;
    nvcc.run(&flags.ptx, source, &ptx)?;
    let text = String::from_utf8_lossy(&read(&ptx)?).into_owned();
    write(&signatures, &kernel_signatures(&text).ok_or_else(|| format!("cannot make sense of {}", ptx.display()))?)?;
    write(&stamp, key)
}

/// A line for each kernel in a PTX text: its name, the threads of a block, and the bytes of each parameter.
fn kernel_signatures(ptx: &str) -> Option<String> {
    let mut lines = String::new();
    for entry in ptx.split(".visible .entry ").skip(1) {
        let (name, rest) = entry.split_once('(')?;
        let (parameters, rest) = rest.split_once(')')?;
        let threads = rest.split_once(".maxntid ")?.1.split(|c: char| !c.is_ascii_digit()).next()?;
        let parameters = parameters.split(".param ").skip(1).map(parameter_bytes).collect::<Option<Vec<_>>>()?;
        let sizes: Vec<String> = parameters.iter().map(usize::to_string).collect();
        lines += &format!("{name} {threads} {}\n", sizes.join(" "));
    }
    Some(lines)
}

/// `.u64 .ptr .align 1 relu_f32_param_0` has 8 bytes, `.align 8 .b8 sgd_param_0[4096]` 4096.
fn parameter_bytes(text: &str) -> Option<usize> {
    if let Some((_, count)) = text.split_once('[') {
        return count.split(']').next()?.parse().ok();
    }
    let bits = text.trim_start_matches(['.', 'u', 's', 'f', 'b']).split(' ').next()?;
    Some(bits.parse::<usize>().ok()? / 8)
}

/// A device generation such as 90a, as machine code or as PTX.
struct Arch {
    generation: String,
    ptx: bool,
}

impl Arch {
    fn code(&self) -> String {
        format!("{}_{}", if self.ptx { "compute" } else { "sm" }, self.generation)
    }

    fn gencode(&self) -> String {
        format!("arch=compute_{},code={}", self.generation, self.code())
    }
}

fn parse_archs(list: &str) -> Result<Vec<Arch>> {
    list.split(',').map(|item| parse_arch(item.trim()).ok_or_else(|| bad_arch(item))).collect()
}

fn parse_arch(item: &str) -> Option<Arch> {
    let generation = item.strip_suffix("-ptx").unwrap_or(item);
    let digits = generation.strip_suffix(['a', 'f']).unwrap_or(generation);
    let valid = matches!(digits.len(), 2 | 3) && digits.bytes().all(|b| b.is_ascii_digit());
    valid.then(|| Arch { generation: generation.into(), ptx: item.ends_with("-ptx") })
}

fn bad_arch(item: &str) -> String {
    format!("SIMSIAM_CUDA_ARCHS: {item:?} is no device generation; expected a list such as {DEFAULT_ARCHS}")
}

/// The files of `folder` with one of the `extensions`, sorted.
fn files_in(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(|e| format!("cannot list {}: {e}", folder.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let wanted = |path: &PathBuf| path.extension().and_then(OsStr::to_str).is_some_and(|x| extensions.contains(&x));
    let mut files: Vec<PathBuf> = paths.filter(wanted).collect();
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// The kernels with their parameters, see [`kernel_signatures`].
fn signatures_path(fatbin: &Path) -> PathBuf {
    fatbin.with_extension("signatures")
}

/// What ptxas said of registers, shared memory and spills.
fn log_path(fatbin: &Path) -> PathBuf {
    fatbin.with_extension("ptxas")
}

fn fatbin_path(out: &Path, source: &Path) -> PathBuf {
    out.join(stem(source)).with_extension("fatbin")
}
