//! Matrix products by cuBLASLt, loaded at run time.
#![allow(unsafe_code)] // calls of cuBLASLt

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::tensor::DType;

use super::super::DevicePtr;
use super::search::{self, Library};
use super::table::functions;
use super::{Product, SCRATCH};

/// A handle, a descriptor or a stream.
type Opaque = *mut c_void;

functions! {
    /// The functions of cuBLASLt that are used.
    Functions {
        fn cublasLtGetVersion() -> usize;
        fn cublasLtGetStatusName(i32) -> *const c_char;
        fn cublasLtCreate(*mut Opaque) -> i32;
        fn cublasLtDestroy(Opaque) -> i32;
        fn cublasLtMatmulDescCreate(*mut Opaque, i32, i32) -> i32;
        fn cublasLtMatmulDescDestroy(Opaque) -> i32;
        fn cublasLtMatmulDescSetAttribute(Opaque, i32, *const c_void, usize) -> i32;
        fn cublasLtMatrixLayoutCreate(*mut Opaque, i32, u64, u64, i64) -> i32;
        fn cublasLtMatrixLayoutDestroy(Opaque) -> i32;
        fn cublasLtMatrixLayoutSetAttribute(Opaque, i32, *const c_void, usize) -> i32;
        fn cublasLtMatmulPreferenceCreate(*mut Opaque) -> i32;
        fn cublasLtMatmulPreferenceDestroy(Opaque) -> i32;
        fn cublasLtMatmulPreferenceSetAttribute(Opaque, i32, *const c_void, usize) -> i32;
        fn cublasLtMatmulAlgoGetHeuristic(
            Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, i32, *mut Ranked, *mut i32,
        ) -> i32;
        fn cublasLtMatmulAlgoCheck(
            Opaque, Opaque, Opaque, Opaque, Opaque, Opaque, *const Algorithm, *mut Ranked,
        ) -> i32;
        fn cublasLtMatmul(
            Opaque, Opaque, *const c_void, *const c_void, Opaque, *const c_void, Opaque, *const c_void, *const c_void,
            Opaque, *mut c_void, Opaque, *const Algorithm, *mut c_void, usize, Opaque,
        ) -> i32;
    }
}

// The values of cuBLASLt's enumerations that are used, by the names of its header.
const CUBLAS_COMPUTE_32F: i32 = 68;
const CUBLAS_COMPUTE_32F_FAST_TF32: i32 = 77;
const CUDA_R_32F: i32 = 0;
const CUDA_R_16F: i32 = 2;
const CUDA_R_16BF: i32 = 14;
const CUBLAS_OP_N: i32 = 0;
const CUBLAS_OP_T: i32 = 1;
const MATMUL_DESC_TRANSA: i32 = 3;
const MATMUL_DESC_TRANSB: i32 = 4;
const MATMUL_DESC_EPILOGUE: i32 = 7;
const MATMUL_DESC_BIAS_POINTER: i32 = 8;
const MATMUL_DESC_BIAS_BATCH_STRIDE: i32 = 10;
const EPILOGUE_DEFAULT: i32 = 1;
const EPILOGUE_RELU: i32 = 2;
const EPILOGUE_BIAS: i32 = 4;
const MATRIX_LAYOUT_BATCH_COUNT: i32 = 5;
const MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: i32 = 6;
const PREF_MAX_WORKSPACE_BYTES: i32 = 1;
const PREF_REDUCTION_SCHEME_MASK: i32 = 3;
const PREF_MIN_ALIGNMENTS_ABCD: [i32; 4] = [5, 6, 7, 8];
const REDUCTION_SCHEME_COMPUTE_TYPE: u32 = 2;

/// What tensors and the bias are aligned to at least, in bytes: the arena's grid.
const ALIGNMENT: usize = 64;
/// How many algorithms are asked for at most.
const MOST: usize = 8;

/// An algorithm with its settings: bytes that only cuBLASLt reads, and that it allows to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
#[repr(transparent)]
pub struct Algorithm(pub [u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Ranked {
    algorithm: Algorithm,
    workspace: usize,
    status: i32,
    waves: f32,
    reserved: [i32; 4],
}

impl Ranked {
    const EMPTY: Ranked =
        Ranked { algorithm: Algorithm([0; 8]), workspace: 0, status: 0, waves: 0.0, reserved: [0; 4] };

    fn usable(&self) -> bool {
        self.status == 0 && self.workspace <= SCRATCH
    }
}

/// How the products of several groups are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Calls {
    /// All by one call.
    One,
    /// Each by a call of its own.
    Each,
}

impl Calls {
    /// What each call computes of `product`.
    fn part(self, product: &Product) -> Product {
        match self {
            Calls::One => *product,
            Calls::Each => Product { groups: 1, ..*product },
        }
    }
}

/// A matrix as cuBLASLt sees it: columns one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Matrix {
    rows: usize,
    columns: usize,
    transposed: bool,
    /// Elements from a group's to the next one's.
    stride: usize,
}

/// `product` column by column. What is row-major is the transpose of a column-major matrix, so C = A B becomes
/// C' = B' A': the engine's B is the first operand and its A the second. Each is as long as its rows, without gaps.
fn column_major(product: &Product) -> [Matrix; 3] {
    let Product { m, n, k, a_transposed, b_transposed, .. } = *product;
    let [a, b, c] = product.strides();
    let stored = |rows: usize, columns: usize, transposed, stride| match transposed {
        false => Matrix { rows, columns, transposed, stride },
        true => Matrix { rows: columns, columns: rows, transposed, stride },
    };
    [stored(n, k, b_transposed, b), stored(k, m, a_transposed, a), stored(n, m, false, c)]
}

/// What the matrices, or biases, of all groups are aligned to when they lie `stride` bytes apart.
fn alignment(groups: usize, stride: usize) -> usize {
    if groups == 1 || stride == 0 { ALIGNMENT } else { ALIGNMENT.min(1 << stride.trailing_zeros()) }
}

/// cuBLASLt, loaded.
#[derive(Debug)]
pub struct CublasLt {
    functions: Functions,
    /// Where it was found.
    pub path: PathBuf,
}

impl CublasLt {
    /// Finds and loads it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it is not there, or lacks a function.
    pub fn load() -> Result<Arc<CublasLt>> {
        let found = search::find(Library::CublasLt)?;
        let functions = Functions::load(found.library, Library::CublasLt.name())?;
        Ok(Arc::new(CublasLt { functions, path: found.path }))
    }

    /// Its version: 130002 is 13.0.2.
    pub fn version(&self) -> usize {
        // SAFETY: takes nothing.
        unsafe { (self.functions.cublasLtGetVersion)() }
    }

    fn check(&self, status: i32, action: &str) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: returns a constant string for every code.
        let name = unsafe { CStr::from_ptr((self.functions.cublasLtGetStatusName)(status)) }.to_string_lossy();
        Err(Error::Unsupported { what: format!("cuBLASLt cannot {action}: {name} ({status})"), hint: None })
    }
}

/// cuBLASLt on the current device.
pub struct Handle {
    library: Arc<CublasLt>,
    raw: Opaque,
    stream: Opaque,
}

// SAFETY: cuBLASLt's handle may be used by several threads at a time, as may a stream.
unsafe impl Send for Handle {}
// SAFETY: as for `Send`.
unsafe impl Sync for Handle {}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuBLASLt {}", self.library.version())
    }
}

impl Handle {
    /// A handle whose products run on `stream`.
    ///
    /// # Errors
    /// A device that cuBLASLt refuses.
    ///
    /// # Safety
    /// The context of `stream` is that of this thread, and both outlive the handle and its products.
    pub unsafe fn new(library: &Arc<CublasLt>, stream: *mut c_void) -> Result<Arc<Handle>> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes the handle.
        library.check(unsafe { (library.functions.cublasLtCreate)(&mut raw) }, "make a handle")?;
        Ok(Arc::new(Handle { library: library.clone(), raw, stream }))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once; products keep it alive.
        unsafe { (self.library.functions.cublasLtDestroy)(self.raw) };
    }
}

/// A descriptor or layout, and what gives it back.
struct Owned {
    raw: Opaque,
    destroy: unsafe extern "C" fn(Opaque) -> i32,
}

// SAFETY: plain host memory of cuBLASLt's.
unsafe impl Send for Owned {}
// SAFETY: as for `Send`; what is changed after its making is behind a mutex.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made by the create function that belongs to `destroy`, destroyed once.
        unsafe { (self.destroy)(self.raw) };
    }
}

/// A product as cuBLASLt's descriptors, for no device yet.
struct Described {
    operation: Owned,
    /// Of the first operand, the second, and the result.
    layouts: [Owned; 3],
}

impl Described {
    /// What `calls` compute of `product`.
    fn new(library: &CublasLt, product: &Product, calls: Calls, tf32: bool) -> Result<Described> {
        let bias_alignment = alignment(product.groups, product.n * product.out.size());
        let product = &calls.part(product);
        let functions = &library.functions;
        let tf32 = tf32 && !product.exact && product.dtype == DType::F32;
        let compute = if tf32 { CUBLAS_COMPUTE_32F_FAST_TF32 } else { CUBLAS_COMPUTE_32F };
        let matrices = column_major(product);
        let operation = Owned::new(library, functions.cublasLtMatmulDescDestroy, "describe a product", |raw| {
            // SAFETY: writes the descriptor.
            unsafe { (functions.cublasLtMatmulDescCreate)(raw, compute, CUDA_R_32F) }
        })?;
        let described = Described { operation, layouts: layouts(library, product, matrices)? };
        let transposed = |matrix: Matrix| if matrix.transposed { CUBLAS_OP_T } else { CUBLAS_OP_N };
        described.set(library, MATMUL_DESC_TRANSA, &transposed(matrices[0]))?;
        described.set(library, MATMUL_DESC_TRANSB, &transposed(matrices[1]))?;
        described.set_epilogue(library, product, bias_alignment)?;
        Ok(described)
    }

    fn set_epilogue(&self, library: &CublasLt, product: &Product, bias_alignment: usize) -> Result<()> {
        let epilogue = match (product.bias, product.relu) {
            (false, false) => EPILOGUE_DEFAULT,
            (false, true) => EPILOGUE_RELU,
            (true, false) => EPILOGUE_BIAS,
            (true, true) => EPILOGUE_RELU | EPILOGUE_BIAS,
        };
        self.set(library, MATMUL_DESC_EPILOGUE, &epilogue)?;
        if product.bias {
            // An address that is aligned as the bias will be: heuristics look at it, a run sets the real one.
            self.set(library, MATMUL_DESC_BIAS_POINTER, &(bias_alignment as u64))?;
            if product.groups > 1 {
                self.set(library, MATMUL_DESC_BIAS_BATCH_STRIDE, &(product.n as i64))?;
            }
        }
        Ok(())
    }

    fn set<T: bytemuck::NoUninit>(&self, library: &CublasLt, attribute: i32, value: &T) -> Result<()> {
        let set = library.functions.cublasLtMatmulDescSetAttribute;
        // SAFETY: `value` has as many bytes as are said, and cuBLASLt checks that the attribute has as many.
        let status = unsafe { set(self.operation.raw, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) };
        library.check(status, &format!("set attribute {attribute} of a product"))
    }
}

impl Owned {
    fn new(
        library: &CublasLt,
        destroy: unsafe extern "C" fn(Opaque) -> i32,
        action: &str,
        create: impl FnOnce(*mut Opaque) -> i32,
    ) -> Result<Owned> {
        let mut raw = std::ptr::null_mut();
        library.check(create(&mut raw), action)?;
        Ok(Owned { raw, destroy })
    }
}

fn layouts(library: &CublasLt, product: &Product, matrices: [Matrix; 3]) -> Result<[Owned; 3]> {
    let functions = &library.functions;
    let layout = |matrix: Matrix, dtype| {
        let (data, rows, columns) = (data_type(dtype)?, matrix.rows as u64, matrix.columns as u64);
        let layout = Owned::new(library, functions.cublasLtMatrixLayoutDestroy, "describe a matrix", |raw| {
            // SAFETY: writes the layout.
            unsafe { (functions.cublasLtMatrixLayoutCreate)(raw, data, rows, columns, rows as i64) }
        })?;
        let set = |attribute: i32, bytes: &[u8]| {
            let set = functions.cublasLtMatrixLayoutSetAttribute;
            // SAFETY: cuBLASLt checks that the attribute has as many bytes.
            let status = unsafe { set(layout.raw, attribute, bytes.as_ptr().cast(), bytes.len()) };
            library.check(status, &format!("set attribute {attribute} of a matrix"))
        };
        if product.groups > 1 {
            set(MATRIX_LAYOUT_BATCH_COUNT, &(product.groups as i32).to_ne_bytes())?;
            set(MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &(matrix.stride as i64).to_ne_bytes())?;
        }
        Ok(layout)
    };
    let [first, second, result] = matrices;
    Ok([layout(first, product.dtype)?, layout(second, product.dtype)?, layout(result, product.out)?])
}

/// What heuristics may name: split sums are added up in float32, in workspace and in order. Adding them up in the result
/// would round them to its type.
fn preferences(library: &CublasLt, product: &Product) -> Result<Owned> {
    let functions = &library.functions;
    let preferences = Owned::new(library, functions.cublasLtMatmulPreferenceDestroy, "state preferences", |raw| {
        // SAFETY: writes the preferences.
        unsafe { (functions.cublasLtMatmulPreferenceCreate)(raw) }
    })?;
    let set = |attribute: i32, bytes: &[u8]| {
        let set = functions.cublasLtMatmulPreferenceSetAttribute;
        // SAFETY: cuBLASLt checks that the attribute has as many bytes.
        let status = unsafe { set(preferences.raw, attribute, bytes.as_ptr().cast(), bytes.len()) };
        library.check(status, &format!("set preference {attribute}"))
    };
    set(PREF_MAX_WORKSPACE_BYTES, &(SCRATCH as u64).to_ne_bytes())?;
    set(PREF_REDUCTION_SCHEME_MASK, &REDUCTION_SCHEME_COMPUTE_TYPE.to_ne_bytes())?;
    let [first, second, result] = column_major(product).map(|matrix| matrix.stride);
    let (factor, out) = (product.dtype.size(), product.out.size());
    let strides = [first * factor, second * factor, result * out, result * out];
    for (attribute, stride) in PREF_MIN_ALIGNMENTS_ABCD.into_iter().zip(strides) {
        set(attribute, &(alignment(product.groups, stride) as u32).to_ne_bytes())?;
    }
    Ok(preferences)
}

fn data_type(dtype: DType) -> Result<i32> {
    match dtype {
        DType::F32 => Ok(CUDA_R_32F),
        DType::Bf16 => Ok(CUDA_R_16BF),
        DType::F16 => Ok(CUDA_R_16F),
        other => Err(Error::shape("cuBLASLt", "element type", "f32, bf16 or f16", other)),
    }
}

/// A product with its algorithm.
pub struct Matmul {
    handle: Arc<Handle>,
    product: Product,
    /// How the products of its groups are computed.
    pub calls: Calls,
    /// What each call computes; the bias pointer in it is set at each.
    described: Mutex<Described>,
    /// The algorithm, to be kept.
    pub algorithm: Algorithm,
}

impl fmt::Debug for Matmul {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?} {:x?}", self.handle, self.calls, self.algorithm)
    }
}

/// Where the tensors of a product lie.
#[derive(Debug, Clone, Copy)]
pub struct Pointers {
    /// A.
    pub a: DevicePtr,
    /// B.
    pub b: DevicePtr,
    /// C.
    pub c: DevicePtr,
    /// The bias, in the element type of C, or NULL.
    pub bias: DevicePtr,
    /// What is added to the product besides, or NULL.
    pub addend: DevicePtr,
    /// [`SCRATCH`] bytes.
    pub workspace: DevicePtr,
}

impl Pointers {
    /// Where those of group `group` lie.
    fn of_group(&self, product: &Product, group: usize) -> Pointers {
        let [a, b, c] = product.strides();
        let at = |first: DevicePtr, stride: usize, dtype: DType| match first {
            DevicePtr::NULL => first,
            _ => first.offset(group * stride * dtype.size()),
        };
        Pointers {
            a: at(self.a, a, product.dtype),
            b: at(self.b, b, product.dtype),
            c: at(self.c, c, product.out),
            bias: at(self.bias, product.n, product.out),
            addend: at(self.addend, c, product.out),
            workspace: self.workspace,
        }
    }
}

impl Matmul {
    /// `product` with up to `most` algorithms, best first; where there are groups, up to as many more that compute each by
    /// itself.
    ///
    /// # Errors
    /// An element type that cuBLASLt does not multiply; no algorithm.
    pub fn candidates(handle: &Arc<Handle>, product: &Product, tf32: bool, most: usize) -> Result<Vec<Matmul>> {
        let together = Matmul::ranked(handle, product, Calls::One, tf32, most);
        if product.groups == 1 {
            return together;
        }
        match (together, Matmul::ranked(handle, product, Calls::Each, tf32, most)) {
            (Ok(mut together), Ok(each)) => {
                together.extend(each);
                Ok(together)
            }
            (Ok(found), Err(error)) | (Err(error), Ok(found)) => {
                tracing::debug!("{product:?}: {error}");
                Ok(found)
            }
            (Err(error), Err(_)) => Err(error),
        }
    }

    fn ranked(handle: &Arc<Handle>, product: &Product, calls: Calls, tf32: bool, most: usize) -> Result<Vec<Matmul>> {
        let library = &handle.library;
        let described = Described::new(library, product, calls, tf32)?;
        let preferences = preferences(library, product)?;
        let mut ranked = [Ranked::EMPTY; MOST];
        let mut count = 0;
        let [first, second, result] = &described.layouts;
        let rank = library.functions.cublasLtMatmulAlgoGetHeuristic;
        // SAFETY: handle, descriptors and preferences are alive; `ranked` has room for `MOST` results.
        let status = unsafe {
            let (operation, result) = (described.operation.raw, result.raw);
            let (wanted, found) = (most.min(MOST) as i32, ranked.as_mut_ptr());
            let preferences = preferences.raw;
            rank(handle.raw, operation, first.raw, second.raw, result, result, preferences, wanted, found, &mut count)
        };
        library.check(status, &format!("find an algorithm for {product:?}"))?;
        let found = ranked.iter().take(usize::try_from(count).unwrap_or(0)).filter(|one| one.usable());
        found.map(|one| Matmul::with(handle, product, calls, tf32, one.algorithm)).collect()
    }

    fn with(handle: &Arc<Handle>, product: &Product, calls: Calls, tf32: bool, algorithm: Algorithm) -> Result<Matmul> {
        let described = Mutex::new(Described::new(&handle.library, product, calls, tf32)?);
        Ok(Matmul { handle: handle.clone(), product: *product, calls, described, algorithm })
    }

    /// `product` with an algorithm that was chosen before; none when cuBLASLt does not take it any more.
    ///
    /// # Errors
    /// As [`Matmul::candidates`].
    pub fn restore(
        handle: &Arc<Handle>,
        product: &Product,
        tf32: bool,
        calls: Calls,
        algorithm: Algorithm,
    ) -> Result<Option<Matmul>> {
        let described = Described::new(&handle.library, product, calls, tf32)?;
        let mut ranked = Ranked::EMPTY;
        let [first, second, result] = &described.layouts;
        let check = handle.library.functions.cublasLtMatmulAlgoCheck;
        // SAFETY: handle and descriptors are alive; cuBLASLt checks the algorithm and writes one result.
        let status = unsafe {
            let (operation, result) = (described.operation.raw, result.raw);
            check(handle.raw, operation, first.raw, second.raw, result, result, &algorithm, &mut ranked)
        };
        if status != 0 || !ranked.usable() {
            return Ok(None);
        }
        Matmul::with(handle, product, calls, tf32, algorithm).map(Some)
    }

    /// Starts it; with `accumulate` the product is added to C.
    ///
    /// # Errors
    /// What cuBLASLt refuses.
    ///
    /// # Safety
    /// The context of the device is that of this thread. The pointers are to device memory of the sizes that the product
    /// says, at multiples of 64 bytes.
    pub unsafe fn run(&self, pointers: &Pointers, accumulate: bool) -> Result<()> {
        let described = self.described.lock().unwrap_or_else(PoisonError::into_inner);
        let calls = match self.calls {
            Calls::One => 1,
            Calls::Each => self.product.groups,
        };
        (0..calls).try_for_each(|group| {
            // SAFETY: the tensors of a group lie within those of the product, the caller's promise.
            unsafe { self.call(&described, &pointers.of_group(&self.product, group), accumulate) }
        })
    }

    /// # Safety
    /// As [`Matmul::run`], but for what `described` says of the product; the pointers as `preferences` says.
    unsafe fn call(&self, described: &Described, pointers: &Pointers, accumulate: bool) -> Result<()> {
        let library = &self.handle.library;
        if pointers.bias != DevicePtr::NULL {
            described.set(library, MATMUL_DESC_BIAS_POINTER, &pointers.bias.0)?;
        }
        let added = self.product.addend || accumulate;
        let (alpha, beta) = (1.0f32, if added { 1.0f32 } else { 0.0 });
        let pointer = |memory: DevicePtr| memory.0 as Opaque;
        let (a, b, out, workspace) =
            (pointer(pointers.a), pointer(pointers.b), pointer(pointers.c), pointer(pointers.workspace));
        let addend = if self.product.addend { pointer(pointers.addend) } else { out };
        let [first, second, result] = &described.layouts;
        // SAFETY: handle, stream and descriptors are alive; alpha and beta are read before the call returns, for scalars are
        // the host's by default; the memory is the caller's promise.
        let status = unsafe {
            (library.functions.cublasLtMatmul)(
                self.handle.raw,
                described.operation.raw,
                (&raw const alpha).cast(),
                b, // the first operand: see `column_major`
                first.raw,
                a,
                second.raw,
                (&raw const beta).cast(),
                addend,
                result.raw,
                out,
                result.raw,
                &self.algorithm,
                workspace,
                SCRATCH,
                self.handle.stream,
            )
        };
        library.check(status, "multiply")
    }
}

#[cfg(test)]
mod tests;
