//! The choice between algorithms, and how a piece of work runs with the one that was chosen.
#![allow(unsafe_code)] // runs algorithms

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cudarc::driver::sys;

use crate::error::{Error, Result};
use crate::tensor::DType;

use super::super::device::{Context, CudaDevice};
use super::super::{DevicePtr, Driver, cast};
use super::cache::{self, Cache, Key, Machine};
use super::cublaslt::{self, Calls, CublasLt, Matmul, Pointers};
use super::cudnn::{self, Cudnn, Epilogue, Graph, Limits, Plan, Tensor};
use super::{Choice, Convolution, Direction, Fused, Libraries, Operands, Prepared, Product, SCRATCH, Work};

/// How many algorithms are timed: of cuDNN, of cuBLASLt. Without autotuning each library's first few: on an H100 its first
/// alone made gradients that are added to what is there 10 to 20 % slower than autotuning did.
const FIRST: [usize; 2] = [4, 2];
const MANY: [usize; 2] = [12, 8];
/// How often each is run before it is timed, and how often it is timed.
const WARM_UP: usize = 2;
const TIMES: usize = 5;
/// How long a timing should take, and how many runs it has at most: of several runs, one is started while another goes on,
/// and what the host needs to start it does not count. In a captured step it does not either.
const TIMING: Duration = Duration::from_millis(1);
const MOST_RUNS: u32 = 16;

/// cuDNN and cuBLASLt on one device.
#[derive(Debug)]
pub struct CudaLibraries {
    cudnn: Arc<Cudnn>,
    target: cudnn::Target,
    products: Arc<cublaslt::Handle>,
    cache: Mutex<Cache>,
    /// Must be that of the thread in every call of the libraries; outlives their handles.
    context: Arc<Context>,
}

impl CudaLibraries {
    /// Loads both libraries and the choices that were made before for the device named `gpu`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the library that is missing, or that refuses the device.
    ///
    /// # Safety
    /// The stream is of the context, and outlives what is returned and all that it prepares.
    pub(in super::super) unsafe fn new(
        context: &Arc<Context>,
        stream: sys::CUstream,
        gpu: String,
    ) -> Result<CudaLibraries> {
        let (cudnn, cublaslt) = (Cudnn::load()?, CublasLt::load()?);
        context.bind()?;
        let stream: *mut c_void = stream.cast();
        // SAFETY: the context was just made current; the rest is the caller's promise.
        let (target, products) =
            unsafe { (cudnn::Target::device(&cudnn, stream)?, cublaslt::Handle::new(&cublaslt, stream)?) };
        let driver = CudaDevice::driver_version()?;
        let (cudnn_version, cublaslt) = (cudnn.version(), cublaslt.version());
        let cache =
            Cache::open(Machine { gpu, driver, cudnn: cudnn_version, cublaslt, engine: Machine::this_engine() });
        Ok(CudaLibraries { cudnn, target, products, cache: Mutex::new(cache), context: context.clone() })
    }

    /// Every algorithm that autotuning would time.
    pub(super) fn all(&self, work: &Work, accumulate: bool, choice: Choice) -> Result<Vec<Chosen>> {
        self.candidates(&Key { work: *work, accumulate, choice }, MANY)
    }

    pub(super) fn bind(&self) -> Result<()> {
        self.context.bind()
    }

    pub(super) fn cudnn(&self) -> &Arc<Cudnn> {
        &self.cudnn
    }

    pub(super) fn target(&self) -> &cudnn::Target {
        &self.target
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The algorithms that may do the work, up to so many of cuDNN and of cuBLASLt.
    fn candidates(&self, key: &Key, [convolutions, products]: [usize; 2]) -> Result<Vec<Chosen>> {
        let chosen = |algorithm| Chosen { context: self.context.clone(), work: key.work, algorithm };
        let multiplied = |product: &Product| -> Result<Vec<Chosen>> {
            let found = Matmul::candidates(&self.products, product, key.choice.tf32, products)?;
            Ok(found.into_iter().map(|one| chosen(Algorithm::CublasLt(one))).collect())
        };
        match &key.work {
            Work::Product(product) => multiplied(product),
            Work::Convolution(convolution) => {
                let graph = graph(&self.cudnn, &self.target, convolution, key.accumulate)?;
                let plans = graph.plans(limits(convolution, key.choice), convolutions)?;
                let mut all: Vec<Chosen> = plans.into_iter().map(|plan| chosen(Algorithm::Cudnn(plan))).collect();
                match convolution.as_product().map(|product| multiplied(&product)) {
                    Some(Ok(more)) => all.extend(more),
                    Some(Err(error)) => tracing::debug!("{:?}: {error}", key.work),
                    None => {}
                }
                Ok(all)
            }
        }
    }

    /// What was chosen before, where it can still be had.
    fn remembered(&self, key: &Key) -> Result<Option<Chosen>> {
        let Some(algorithm) = self.cache().get(key).cloned() else { return Ok(None) };
        let found = match (algorithm, &key.work) {
            (cache::Algorithm::Cudnn(engine), Work::Convolution(convolution)) => {
                let graph = graph(&self.cudnn, &self.target, convolution, key.accumulate)?;
                graph.plan_of(&engine, limits(convolution, key.choice))?.map(Algorithm::Cudnn)
            }
            (cache::Algorithm::CublasLt(algorithm), work) => self.restored(work, key.choice, Calls::One, algorithm)?,
            (cache::Algorithm::CublasLtEach(algorithm), work) => {
                self.restored(work, key.choice, Calls::Each, algorithm)?
            }
            (cache::Algorithm::Cudnn(_), Work::Product(_)) => None,
        };
        Ok(found.map(|algorithm| Chosen { context: self.context.clone(), work: key.work, algorithm }))
    }

    fn restored(
        &self,
        work: &Work,
        choice: Choice,
        calls: Calls,
        algorithm: cublaslt::Algorithm,
    ) -> Result<Option<Algorithm>> {
        let Some(product) = work.as_product() else { return Ok(None) };
        let found = Matmul::restore(&self.products, &product, choice.tf32, calls, algorithm)?;
        Ok(found.map(Algorithm::CublasLt))
    }

    /// The fastest of the first algorithms, or of many with autotuning; of many as well when the first ones fail.
    ///
    /// # Safety
    /// As [`Libraries::prepare`].
    unsafe fn choose(&self, driver: &dyn Driver, key: &Key, operands: &Operands) -> Result<Chosen> {
        if !key.choice.autotune {
            // SAFETY: the caller's promise.
            let first = unsafe { self.fastest(driver, self.candidates(key, FIRST)?, operands) };
            if first.is_ok() {
                return first;
            }
        }
        // SAFETY: the caller's promise.
        unsafe { self.fastest(driver, self.candidates(key, MANY)?, operands) }
    }

    /// The fastest of several candidates. One that fails is left out; when all do, the last one's reason is the error.
    ///
    /// # Safety
    /// As [`Libraries::prepare`].
    unsafe fn fastest(&self, driver: &dyn Driver, candidates: Vec<Chosen>, operands: &Operands) -> Result<Chosen> {
        let mut best: Option<(Duration, Chosen)> = None;
        let mut refused = None;
        let alone = candidates.len() == 1;
        for candidate in candidates {
            // SAFETY: the caller's promise.
            let time = unsafe {
                match alone {
                    true => candidate.run(driver, operands).map(|()| Duration::ZERO),
                    false => candidate.time(driver, operands),
                }
            };
            match time {
                Ok(time) => {
                    tracing::debug!("{:?}: {} takes {time:?}", candidate.work, candidate.algorithm());
                    if best.as_ref().is_none_or(|(least, _)| time < *least) {
                        best = Some((time, candidate));
                    }
                }
                Err(error) => {
                    tracing::debug!("{:?}: {}: {error}", candidate.work, candidate.algorithm());
                    refused = Some(error);
                }
            }
        }
        best.map(|(_, chosen)| chosen).ok_or_else(|| refused.unwrap_or_else(no_algorithm))
    }
}

impl Drop for CudaLibraries {
    fn drop(&mut self) {
        // For the handles, which are given back now. What fails has been reported by the call that failed before.
        let _ = self.context.bind();
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        let _ = self.context.bind(); // as for `CudaLibraries`
    }
}

impl Libraries for CudaLibraries {
    unsafe fn prepare(
        &self,
        driver: &dyn Driver,
        work: &Work,
        operands: &Operands,
        choice: Choice,
    ) -> Result<Box<dyn Prepared>> {
        self.context.bind()?;
        let key = Key { work: *work, accumulate: operands.accumulate, choice };
        if let Some(chosen) = self.remembered(&key)? {
            // SAFETY: the caller's promise.
            match unsafe { chosen.run(driver, operands) } {
                Ok(()) => return Ok(Box::new(chosen)),
                Err(error) => tracing::warn!("{work:?}: the algorithm that was kept is chosen anew: {error}"),
            }
        }
        // SAFETY: the caller's promise.
        let chosen = unsafe { self.choose(driver, &key, operands) }.map_err(|error| of_work(error, work))?;
        self.cache().insert(key, chosen.to_remember());
        Ok(Box::new(chosen))
    }

    fn remember(&self) {
        if let Err(error) = self.cache().write() {
            tracing::warn!("the next run chooses algorithms anew: {error}");
        }
    }
}

/// What a plan for a convolution must keep to.
pub fn limits(convolution: &Convolution, choice: Choice) -> Limits {
    Limits { workspace: SCRATCH, tensor_cores: convolution.dtype != DType::F32 || choice.tf32 }
}

/// The graph that brings the result of a convolution to its place, or to its staging. cuDNN's statistics are those of a whole
/// tensor: with statistics of parts of the batch, the graph is that of one part, and runs once for each.
///
/// # Errors
/// As [`Graph::new`]; [`Error::Unsupported`] for parts that do not lie where cuDNN's engines count on.
pub fn graph(cudnn: &Arc<Cudnn>, target: &cudnn::Target, convolution: &Convolution, accumulate: bool) -> Result<Graph> {
    match convolution.fused {
        Fused::Statistics { groups } => {
            let part = Part::of(convolution, groups)?;
            Graph::new(cudnn, target, &part.convolution, Epilogue::Statistics)
        }
        Fused::Addition => Graph::new(cudnn, target, convolution, Epilogue::Add),
        Fused::Nothing => {
            // What is staged is added when it is converted.
            let staged = Work::Convolution(*convolution).staging() > 0;
            let epilogue = if accumulate && !staged { Epilogue::Accumulate } else { Epilogue::None };
            Graph::new(cudnn, target, convolution, epilogue)
        }
    }
}

/// One of the equal parts of a batch that have statistics of their own.
struct Part {
    /// The convolution of its images.
    convolution: Convolution,
    /// Bytes of its x, of its y, and of one of its two sums.
    bytes: [usize; 3],
}

impl Part {
    fn of(convolution: &Convolution, groups: usize) -> Result<Part> {
        let mut convolution = *convolution;
        convolution.geometry.n /= groups;
        let (geometry, dtype) = (&convolution.geometry, convolution.dtype);
        let activations = [geometry.x_len(), geometry.y_len()].map(|len| len * dtype.size());
        let bytes = [activations[0], activations[1], geometry.c_out * DType::F32.size()];
        match bytes.iter().find(|bytes| !bytes.is_multiple_of(cudnn::ALIGNMENT)) {
            None => Ok(Part { convolution, bytes }),
            Some(bytes) => {
                let what = format!(
                    "cuDNN: expected statistics of parts whose x, y and sums take multiples of {} bytes, got {bytes}",
                    cudnn::ALIGNMENT
                );
                Err(Error::Unsupported { what, hint: None })
            }
        }
    }

    /// Where the tensors of part number `index` lie.
    fn tensors(&self, operands: &Operands, index: usize) -> [(Tensor, DevicePtr); 5] {
        let ([x, w], [x_bytes, y_bytes, sum_bytes]) = (operands.inputs, self.bytes);
        let sum = operands.sums.offset(2 * index * sum_bytes);
        [
            (Tensor::X, x.offset(index * x_bytes)),
            (Tensor::W, w),
            (Tensor::Y, operands.out.offset(index * y_bytes)),
            (Tensor::Sum, sum),
            (Tensor::SquareSum, sum.offset(sum_bytes)),
        ]
    }
}

fn no_algorithm() -> Error {
    let what = format!("neither cuDNN nor cuBLASLt has an algorithm within {} MiB of workspace", SCRATCH >> 20);
    Error::Unsupported { what, hint: Some("RUST_LOG=debug tells why each was refused".into()) }
}

/// Says what could not be done, and what to do without.
fn of_work(error: Error, work: &Work) -> Error {
    let fused = match work {
        Work::Convolution(convolution) => convolution.fused,
        Work::Product(_) => Fused::Nothing,
    };
    match error {
        Error::Unsupported { what, hint } => {
            let hint = match fused {
                Fused::Nothing => hint,
                Fused::Statistics { .. } => Some("leave this layer out of --fuse-statistics".into()),
                Fused::Addition => Some("leave this layer out of --residual-gradient fused".into()),
            };
            Error::Unsupported { what: format!("{what}, for {work:?}"), hint }
        }
        other => other,
    }
}

/// The median time of what `run` starts.
pub(super) fn median(driver: &dyn Driver, run: &mut dyn FnMut() -> Result<()>) -> Result<Duration> {
    (0..WARM_UP).try_for_each(|_| run())?;
    let once = driver.time(run)?.max(Duration::from_nanos(1));
    let runs = (TIMING.div_duration_f64(once) as u32).clamp(1, MOST_RUNS);
    let mut several = || (0..runs).try_for_each(|_| run());
    let mut times = (0..TIMES).map(|_| driver.time(&mut several)).collect::<Result<Vec<_>>>()?;
    times.sort_unstable();
    Ok(times[TIMES / 2] / runs)
}

/// A piece of work with an algorithm.
#[derive(Debug)]
pub(super) struct Chosen {
    work: Work,
    algorithm: Algorithm,
    context: Arc<Context>,
}

#[derive(Debug)]
enum Algorithm {
    Cudnn(Plan),
    CublasLt(Matmul),
}

impl Chosen {
    fn to_remember(&self) -> cache::Algorithm {
        match &self.algorithm {
            Algorithm::Cudnn(plan) => cache::Algorithm::Cudnn(plan.engine.clone()),
            Algorithm::CublasLt(matmul) => match matmul.calls {
                Calls::One => cache::Algorithm::CublasLt(matmul.algorithm),
                Calls::Each => cache::Algorithm::CublasLtEach(matmul.algorithm),
            },
        }
    }

    /// cuDNN's plan, if it is one.
    pub(super) fn plan(&self) -> Option<&Plan> {
        match &self.algorithm {
            Algorithm::Cudnn(plan) => Some(plan),
            Algorithm::CublasLt(_) => None,
        }
    }

    /// The median time of a run.
    ///
    /// # Safety
    /// As [`Prepared::run`].
    pub(super) unsafe fn time(&self, driver: &dyn Driver, operands: &Operands) -> Result<Duration> {
        // SAFETY: the caller's promise.
        median(driver, &mut || unsafe { self.run(driver, operands) })
    }

    /// # Safety
    /// As [`Prepared::run`].
    unsafe fn convolve(&self, driver: &dyn Driver, plan: &Plan, operands: &Operands) -> Result<()> {
        let Work::Convolution(convolution) = &self.work else {
            let message = "a convolution was prepared for a product".into();
            return Err(Error::Internal { thread: "cuDNN".into(), message });
        };
        if let Fused::Statistics { groups } = convolution.fused {
            let part = Part::of(convolution, groups)?;
            // SAFETY: the parts lie one after the other in the operands, which are the caller's promise; the rest as below.
            return (0..groups).try_for_each(|i| unsafe { plan.run(&part.tensors(operands, i), operands.workspace) });
        }
        let staged = self.work.staging() > 0;
        let staging = operands.workspace.offset(SCRATCH);
        let out = if staged { staging } else { operands.out };
        let [first, second] = operands.inputs;
        let mut tensors = match convolution.direction {
            Direction::Forward => [(Tensor::X, first), (Tensor::W, second), (Tensor::Y, out)],
            Direction::DataGradient => [(Tensor::Y, first), (Tensor::W, second), (Tensor::X, out)],
            Direction::WeightGradient => [(Tensor::X, first), (Tensor::Y, second), (Tensor::W, out)],
        }
        .to_vec();
        if convolution.fused == Fused::Addition {
            tensors.push((Tensor::Addend, operands.added[0]));
        }
        // SAFETY: the operands are the caller's promise, the context is bound, and the plan keeps to `SCRATCH`.
        unsafe { plan.run(&tensors, operands.workspace) }?;
        if staged {
            let (dtype, len) = (convolution.dtype, convolution.geometry.w_len());
            // SAFETY: the workspace has room for d_w at `SCRATCH`, and the result is d_w in float32.
            unsafe { cast::widen(driver, dtype, staging, operands.out, len, operands.accumulate) }?;
        }
        Ok(())
    }

    /// # Safety
    /// As [`Prepared::run`].
    unsafe fn multiply(&self, driver: &dyn Driver, matmul: &Matmul, operands: &Operands) -> Result<()> {
        let [mut a, mut b] = operands.inputs;
        let [mut bias, mut addend] = [DevicePtr::NULL; 2];
        match &self.work {
            Work::Convolution(c) if c.direction == Direction::WeightGradient => (a, b) = (b, a),
            Work::Convolution(_) => {}
            Work::Product(product) => {
                [bias, addend] = product.added(operands.added);
                if self.work.staging() > 0 {
                    let (from, len) = (bias, product.groups * product.n);
                    bias = operands.workspace.offset(SCRATCH);
                    // SAFETY: the bias has a float32 for each group and column, and the workspace has room for as many in
                    // 16 bits.
                    unsafe { cast::narrow(driver, product.out, from, bias, len) }?;
                }
            }
        }
        let pointers = Pointers { a, b, c: operands.out, bias, addend, workspace: operands.workspace };
        // SAFETY: the operands are the caller's promise, and the context is bound.
        unsafe { matmul.run(&pointers, operands.accumulate) }
    }
}

impl Prepared for Chosen {
    fn algorithm(&self) -> String {
        match &self.algorithm {
            Algorithm::Cudnn(plan) => format!("cuDNN engine {}", plan.engine.index),
            Algorithm::CublasLt(matmul) => match matmul.calls {
                Calls::One => "cuBLASLt".into(),
                Calls::Each => "cuBLASLt, a call for each group".into(),
            },
        }
    }

    unsafe fn run(&self, driver: &dyn Driver, operands: &Operands) -> Result<()> {
        self.context.bind()?;
        // SAFETY: the caller's promise.
        unsafe {
            match &self.algorithm {
                Algorithm::Cudnn(plan) => self.convolve(driver, plan, operands),
                Algorithm::CublasLt(matmul) => self.multiply(driver, matmul, operands),
            }
        }
    }
}
