//! Parameters: what each is called, where it lies in PyTorch's layout, how it starts.

use crate::graph::ValueId;
use crate::rng::Stream;
use crate::tensor::{DType, HostTensor, Shape, TensorDesc};

/// Which learning rate a parameter follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParamGroup {
    /// Backbone and projector.
    Encoder,
    /// Predictor.
    Predictor,
}

/// How a parameter or buffer starts (recipe: torchvision's ResNet and PyTorch's defaults).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// The same value everywhere.
    Constant(f64),
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in (-bound, bound).
    Uniform(f64),
}

impl Init {
    /// Kaiming-normal with fan_out and ReLU gain, for a convolution (He et al. 2015, equation 14).
    pub fn kaiming_fan_out(kernel: [usize; 2], c_out: usize) -> Init {
        Init::Normal((2.0 / (kernel[0] * kernel[1] * c_out) as f64).sqrt())
    }

    /// PyTorch's default for linear weights and biases.
    pub fn linear(fan_in: usize) -> Init {
        Init::Uniform(1.0 / (fan_in as f64).sqrt())
    }
}

/// One entry of the `state_dict`.
#[derive(Debug, Clone)]
pub struct ParamInfo {
    /// PyTorch name, e.g. `encoder.layer1.0.conv2.weight`.
    pub name: String,
    /// Its value on the tape.
    pub value: ValueId,
    /// Shape and type in the engine's layout; convolution weights are `[c_out][kh][kw][c_in]`.
    pub desc: TensorDesc,
    /// Whether the optimiser changes it.
    pub trainable: bool,
    /// Learning-rate group.
    pub group: ParamGroup,
    /// Start value.
    pub init: Init,
}

impl ParamInfo {
    /// The start value for `seed`, in the engine's layout. Each name has a stream of its own, so the values depend neither
    /// on the order of creation nor on what other parameters exist.
    pub fn initial(&self, seed: u64) -> HostTensor {
        let n = self.desc.shape.len();
        let mut stream = Stream::new(seed, INIT_DOMAIN, name_hash(&self.name));
        let mut draw = || match self.init {
            Init::Constant(value) => value,
            Init::Normal(std) => std * stream.normal(),
            Init::Uniform(bound) => stream.uniform(-bound, bound),
        };
        let bytes: Vec<u8> = match self.desc.dtype {
            DType::F64 => (0..n).flat_map(|_| draw().to_le_bytes()).collect(),
            DType::I64 => (0..n).flat_map(|_| (draw() as i64).to_le_bytes()).collect(),
            _ => (0..n).flat_map(|_| (draw() as f32).to_le_bytes()).collect(),
        };
        HostTensor::from_bytes(self.desc.clone(), bytes).unwrap_or_else(|_| unreachable!("one value per element"))
    }

    /// Whether PyTorch stores it in another order (`[c_out][c_in][kh][kw]`).
    pub fn is_convolution(&self) -> bool {
        self.desc.shape.rank() == 4
    }

    /// PyTorch's shape.
    pub fn torch_shape(&self) -> Shape {
        match *self.desc.shape.dims() {
            [o, h, w, i] => Shape::from([o, i, h, w]),
            ref dims => Shape::from(dims),
        }
    }
}

/// Separates the draws of initialisation from all others under the same seed.
const INIT_DOMAIN: u32 = 0x1A17;

/// FNV-1a, 64 bits.
fn name_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}
