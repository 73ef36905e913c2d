//! Kernels as Rust sees them: their names, their parameters, and a call with its arguments.

use bytemuck::NoUninit;

use crate::tensor::DType;

/// Where something lies in a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// No memory: an argument that the kernel is told not to use.
    pub const NULL: DevicePtr = DevicePtr(0);

    /// The address `bytes` further on.
    pub fn offset(self, bytes: usize) -> DevicePtr {
        DevicePtr(self.0 + bytes as u64)
    }
}

/// The declaration of a kernel. `tests/cuda_kernels.rs` holds all of them against the compiled code.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The file in `kernels/` without extension.
    pub file: &'static str,
    /// The name in the compiled code, for each element type it was compiled for: `("relu_f32", Some(F32))`; one entry
    /// without a type for a kernel that has no variants.
    pub variants: &'static [(Option<DType>, &'static str)],
    /// Threads in a block.
    pub threads: u32,
    /// Size in bytes of each parameter, in order.
    pub parameters: &'static [usize],
}

/// A kernel with its arguments, ready to be launched.
#[derive(Debug, Clone)]
pub struct Call {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// Its name in the compiled code.
    pub name: &'static str,
    /// All arguments one after the other, each at a multiple of 8 bytes.
    words: Vec<u64>,
    /// Where in `words` each argument starts.
    starts: Vec<usize>,
}

impl Call {
    /// A call of the variant for `dtype`.
    ///
    /// # Panics
    /// When the kernel has no variant for `dtype`: the op's `infer` admits only those it has.
    pub fn new(kernel: &'static Kernel, dtype: Option<DType>) -> Call {
        let variant = kernel.variants.iter().find(|(of, _)| *of == dtype);
        let (_, name) = variant.unwrap_or_else(|| panic!("no kernel {:?} for {dtype:?}", kernel.variants));
        Call { kernel, name, words: Vec::new(), starts: Vec::new() }
    }

    /// Appends an argument.
    pub fn push<A: NoUninit>(&mut self, argument: A) {
        self.starts.push(self.words.len());
        let bytes = bytemuck::bytes_of(&argument);
        let first = self.words.len();
        self.words.resize(first + bytes.len().div_ceil(8), 0);
        bytemuck::cast_slice_mut(&mut self.words[first..])[..bytes.len()].copy_from_slice(bytes);
    }

    /// Pointers to the arguments, in the order of the parameters: what `cuLaunchKernel` takes.
    pub fn argument_pointers(&mut self) -> Vec<*mut std::ffi::c_void> {
        let words = &mut self.words;
        self.starts.iter().map(|&start| (&raw mut words[start]).cast()).collect()
    }
}

/// How many blocks a kernel is launched with, and how much dynamic shared memory each has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks along x, y and z.
    pub blocks: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

/// Blocks of a grid-stride loop: several waves on the largest device. A constant, so that every device adds in one order.
const MAX_BLOCKS: usize = 4096;

impl Grid {
    /// Blocks without dynamic shared memory.
    pub fn new(blocks: [u32; 3]) -> Grid {
        Grid { blocks, shared: 0 }
    }

    /// Enough blocks of `threads` for a grid-stride loop over `items`, at least one.
    pub fn stride(items: usize, threads: u32) -> Grid {
        Grid::new([items.div_ceil(threads as usize).clamp(1, MAX_BLOCKS) as u32, 1, 1])
    }

    /// Blocks of 256 threads for `for_each_pack` over `n` elements: one 16-byte access a thread and round.
    pub fn packs(n: usize, dtype: DType) -> Grid {
        Grid::stride(n.div_ceil(16 / dtype.size()), 256)
    }

    /// The same with dynamic shared memory.
    pub fn with_shared(self, bytes: usize) -> Grid {
        Grid { shared: bytes as u32, ..self }
    }
}

/// Declares the kernels of one file of `kernels/`, each as a function that makes a [`Call`], and `KERNELS`, the list of
/// their declarations.
///
/// ```text
/// kernels! { "relu";
///     /// y = max(x, 0)
///     fn relu[F32, Bf16, F16; 256](x: DevicePtr, y: DevicePtr, n: i64);
///     fn philox_stream[; 256](words: DevicePtr, n: u32);
/// }
/// let call = relu(dtype, x, y, n);          // launches relu_f32, relu_bf16 or relu_f16
/// let call = philox_stream(words, n);
/// ```
macro_rules! kernels {
    ($file:literal; $($(#[$doc:meta])* fn $name:ident[$($dtype:ident),*; $threads:literal]($($arg:ident: $type:ty),* $(,)?);)*) => {
        /// The kernels of this file.
        pub(crate) const KERNELS: &[&$crate::backend::cuda::Kernel] = &[$(&declarations::$name),*];

        #[allow(non_upper_case_globals)]
        mod declarations {
            #[allow(unused_imports)]
            use super::*;
            $(pub static $name: $crate::backend::cuda::Kernel = $crate::backend::cuda::Kernel {
                file: $file,
                variants: $crate::backend::cuda::kernel::variants!($name $($dtype)*),
                threads: $threads,
                parameters: &[$(size_of::<$type>()),*],
            };)*
        }

        $($crate::backend::cuda::kernel::call!([$(#[$doc])*] $name [$($dtype)*] ($($arg: $type),*));)*
    };
}

/// The names of a kernel by element type.
macro_rules! variants {
    ($name:ident) => { &[(None, stringify!($name))] };
    ($name:ident $($dtype:ident)+) => { &[$($crate::backend::cuda::kernel::variant!($name $dtype)),+] };
}

macro_rules! variant {
    ($name:ident F32) => {
        (Some($crate::tensor::DType::F32), concat!(stringify!($name), "_f32"))
    };
    ($name:ident Bf16) => {
        (Some($crate::tensor::DType::Bf16), concat!(stringify!($name), "_bf16"))
    };
    ($name:ident F16) => {
        (Some($crate::tensor::DType::F16), concat!(stringify!($name), "_f16"))
    };
}

/// The function that makes a call: with the element type first where there are variants.
macro_rules! call {
    ([$(#[$doc:meta])*] $name:ident [] ($($arg:ident: $type:ty),*)) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        fn $name($($arg: $type),*) -> $crate::backend::cuda::Call {
            #[allow(unused_mut)]
            let mut call = $crate::backend::cuda::Call::new(&declarations::$name, None);
            $(call.push($arg);)*
            call
        }
    };
    ([$(#[$doc:meta])*] $name:ident [$($dtype:ident)+] ($($arg:ident: $type:ty),*)) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        fn $name(dtype: $crate::tensor::DType, $($arg: $type),*) -> $crate::backend::cuda::Call {
            let mut call = $crate::backend::cuda::Call::new(&declarations::$name, Some(dtype));
            $(call.push($arg);)*
            call
        }
    };
}

pub(crate) use {call, kernels, variant, variants};
