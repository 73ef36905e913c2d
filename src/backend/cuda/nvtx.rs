//! Named ranges for profilers: NVIDIA's NVTX 3, without its headers.
//!
//! NVTX is no library but a handshake. A profiler that starts a program names its own library in `NVTX_INJECTION64_PATH`;
//! the program loads it and calls its `InitializeInjectionNvtx2` with a function that hands out tables of the program's
//! function pointers, which the profiler then fills with its functions (nvtx3/nvtxDetail/nvtxInit.h, load sequence 2).
#![allow(unsafe_code)] // calls into a profiler's library

use std::env;
use std::ffi::{CString, OsStr, OsString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::mem::transmute;
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

use libloading::Library;

use crate::error::{Error, Result};

/// The version of the interface, `NVTX_VERSION`.
const VERSION: u32 = 3;
/// Functions of each module, with the unused number 0 (`NVTX_CBID_..._SIZE`): none, core, CUDA, OpenCL, CUDA run time, core 2,
/// synchronisation.
const FUNCTIONS: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
const MOST_FUNCTIONS: usize = 16;
/// The module whose functions are called here, and their numbers.
const CORE: usize = 1;
const RANGE_PUSH_A: usize = 9;
const RANGE_POP: usize = 11;

type PushRange = unsafe extern "C" fn(*const c_char) -> c_int;
type PopRange = unsafe extern "C" fn() -> c_int;
type GetExportTable = extern "C" fn(u32) -> *const c_void;
type Initialize = unsafe extern "C" fn(GetExportTable) -> c_int;

/// A profiler that listens.
#[derive(Debug, Clone, Copy)]
pub struct Nvtx {
    push: PushRange,
    pop: PopRange,
}

/// A range that lasts until it is dropped. It belongs to the thread that began it.
#[derive(Debug)]
pub struct Range {
    pop: PopRange,
    _of_this_thread: PhantomData<*const ()>,
}

impl Nvtx {
    /// Finds the profiler that started this program; once for the process.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with a hint when there is none, or it does not take ranges.
    pub fn load() -> Result<Nvtx> {
        static LOADED: OnceLock<Result<Nvtx, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| attach(env::var_os("NVTX_INJECTION64_PATH")));
        loaded.clone().map_err(|what| Error::Unsupported {
            what: format!("no profiler takes NVTX ranges: {what}"),
            hint: Some("run under `nsys profile --trace=cuda,nvtx`, or without --nvtx".into()),
        })
    }

    /// Begins a range, within those of this thread that still last. A zero byte ends its name.
    pub fn range(&self, name: &str) -> Range {
        let name = name.split('\0').next().unwrap_or_default();
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the profiler's function, with its signature; it copies the name.
        unsafe { (self.push)(name.as_ptr()) };
        Range { pop: self.pop, _of_this_thread: PhantomData }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the profiler's function, with its signature; a range of this thread lasts.
        unsafe { (self.pop)() };
    }
}

/// Lets the library at `path` fill the tables.
fn attach(path: Option<OsString>) -> Result<Nvtx, String> {
    let path = path.filter(|path| !path.is_empty()).ok_or("NVTX_INJECTION64_PATH is not set")?;
    initialize(&path)?;
    let [push, pop] = [RANGE_PUSH_A, RANGE_POP].map(|function| SLOTS[CORE][function].load(Ordering::Acquire));
    if push.is_null() || pop.is_null() {
        return Err(format!("{} has no functions for them", Path::new(&path).display()));
    }
    // SAFETY: the profiler has filled these slots with functions of these signatures, and its library stays loaded.
    unsafe {
        Ok(Nvtx { push: transmute::<*mut c_void, PushRange>(push), pop: transmute::<*mut c_void, PopRange>(pop) })
    }
}

fn initialize(path: &OsStr) -> Result<(), String> {
    let failed = |e: libloading::Error| format!("cannot load NVTX_INJECTION64_PATH: {}", super::reason(&e));
    // SAFETY: what the profiler wants to be loaded; the address has the signature that NVTX gives it.
    let library = unsafe { Library::new(path) }.map_err(failed)?;
    // SAFETY: as above; it is called once, with a function that hands out tables which live as long as the process.
    let attached = unsafe { library.get::<Initialize>(b"InitializeInjectionNvtx2").map_err(failed)?(get_export_table) };
    std::mem::forget(library); // its functions are called until the program ends
    match attached {
        0 => Err(format!("{} does not start", Path::new(path).display())),
        _ => Ok(()),
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What the profiler is shown: tables of places for its functions.

/// A place for each function of each module.
static SLOTS: [[AtomicPtr<c_void>; MOST_FUNCTIONS]; FUNCTIONS.len()] =
    [const { [const { AtomicPtr::new(null_mut()) }; MOST_FUNCTIONS] }; FUNCTIONS.len()];

/// The addresses of a module's places; none at 0 and behind the last.
#[repr(transparent)]
struct Table([*const AtomicPtr<c_void>; MOST_FUNCTIONS + 1]);

// SAFETY: the addresses are those of atomics that live as long as the process.
unsafe impl Send for Table {}
// SAFETY: as for `Send`.
unsafe impl Sync for Table {}

static TABLES: OnceLock<Vec<Table>> = OnceLock::new();

fn tables() -> &'static [Table] {
    TABLES.get_or_init(|| {
        let table = |(slots, &functions): (&'static [AtomicPtr<c_void>; MOST_FUNCTIONS], &usize)| {
            let address = |index| if (1..functions).contains(&index) { &raw const slots[index] } else { null() };
            Table(std::array::from_fn(address))
        };
        SLOTS.iter().zip(&FUNCTIONS).map(table).collect()
    })
}

/// `NvtxExportTableCallbacks`.
#[repr(C)]
struct Callbacks {
    bytes: usize,
    get_module_function_table: unsafe extern "C" fn(u32, *mut *const Table, *mut u32) -> c_int,
}

/// `NvtxExportTableVersionInfo`.
#[repr(C)]
struct VersionInfo {
    bytes: usize,
    version: u32,
    reserved: u32,
    set_injection_version: extern "C" fn(u32),
}

static CALLBACKS: Callbacks = Callbacks { bytes: size_of::<Callbacks>(), get_module_function_table };
static VERSION_INFO: VersionInfo =
    VersionInfo { bytes: size_of::<VersionInfo>(), version: VERSION, reserved: 0, set_injection_version };

/// `nvtxGetExportTable`.
extern "C" fn get_export_table(id: u32) -> *const c_void {
    match id {
        1 => (&raw const CALLBACKS).cast(),
        3 => (&raw const VERSION_INFO).cast(),
        _ => null(),
    }
}

/// Hands out the table of a module and the number of its functions; 0 for a module that there is not.
unsafe extern "C" fn get_module_function_table(module: u32, table: *mut *const Table, functions: *mut u32) -> c_int {
    let module = module as usize;
    if module == 0 || module >= FUNCTIONS.len() {
        return 0;
    }
    // SAFETY: the profiler passes null, or where the answer goes.
    unsafe {
        if let Some(table) = table.as_mut() {
            *table = &raw const tables()[module];
        }
        if let Some(functions) = functions.as_mut() {
            *functions = FUNCTIONS[module] as u32;
        }
    }
    1
}

/// Tells the version of a profiler, for working around its faults; none is known here.
extern "C" fn set_injection_version(_version: u32) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_profiler_the_reason_is_said() {
        assert_eq!(attach(None).unwrap_err(), "NVTX_INJECTION64_PATH is not set");
        assert_eq!(attach(Some("".into())).unwrap_err(), "NVTX_INJECTION64_PATH is not set");
        let missing = attach(Some("/nowhere/libprofiler.so".into())).unwrap_err();
        assert!(missing.starts_with("cannot load NVTX_INJECTION64_PATH: /nowhere/libprofiler.so: "), "{missing}");
        let other = attach(Some("libc.so.6".into())).unwrap_err();
        assert!(other.contains("InitializeInjectionNvtx2"), "{other}");
    }

    #[test]
    fn a_module_that_there_is_not_has_no_table() {
        for module in [0, 7, u32::MAX] {
            // SAFETY: null is allowed.
            assert_eq!(unsafe { get_module_function_table(module, null_mut(), null_mut()) }, 0);
        }
        assert!(get_export_table(2).is_null());
    }
}
