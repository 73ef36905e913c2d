//! Convolutions as operation graphs.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::tensor::DType;

use super::super::{Convolution, Direction};
use super::constants::{self as c, attribute, data, descriptor, kind};
use super::descriptor::{Descriptor, Flag};
use super::{Cudnn, Target};

/// Alignment that plans may count on: the arena's tensors lie at multiples of 64 bytes, and 16 is what a vector access needs.
pub const ALIGNMENT: usize = 16;

/// What follows a convolution in the same graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing.
    None,
    /// The result is added to what is there (beta = 1).
    Accumulate,
    /// The same as an operation of its own, from one tensor to another: such engines are compiled at run time.
    Add,
    /// The sum and the sum of squares of each channel of the result, in float32.
    Statistics,
}

/// The tensors of a graph: their numbers in cuDNN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i64)]
pub enum Tensor {
    /// x or d_x.
    X = 1,
    /// w or d_w.
    W,
    /// y or d_y.
    Y,
    /// What [`Epilogue::Add`] adds to the result.
    Addend,
    /// The sum over each channel.
    Sum,
    /// The sum of squares over each channel.
    SquareSum,
    /// A result that stays inside the graph.
    Inner,
}

/// An operation graph for a device.
#[derive(Debug)]
pub struct Graph {
    pub(super) descriptor: Arc<Descriptor>,
    pub(super) target: Target,
}

impl Graph {
    /// `convolution` and what follows it. In 16 bits d_w has the element type of x: no engine widens it.
    ///
    /// # Errors
    /// An element type that cuDNN does not convolve, a convolution that it refuses, an epilogue that does not fit.
    pub fn new(cudnn: &Arc<Cudnn>, target: &Target, convolution: &Convolution, epilogue: Epilogue) -> Result<Graph> {
        let builder = Builder { cudnn, convolution };
        let operations = match epilogue {
            Epilogue::None => vec![builder.convolve(None, 0.0)?],
            Epilogue::Accumulate => vec![builder.convolve(None, 1.0)?],
            Epilogue::Add => {
                let inner = builder.result(Tensor::Inner, true)?;
                vec![builder.convolve(Some(&inner), 0.0)?, builder.add(&inner)?]
            }
            Epilogue::Statistics => {
                // Under one name: the statistics are those of what the convolution writes.
                let y = builder.result(builder.result_name(), false)?;
                vec![builder.convolve(Some(&y), 0.0)?, builder.statistics(&y)?]
            }
        };
        let graph = Descriptor::new(cudnn, descriptor::OPERATIONGRAPH)?;
        let mut graph = graph.refer(attribute::OPERATIONGRAPH_OPS, &operations.iter().collect::<Vec<_>>())?;
        if let Target::Device(handle) = target {
            graph = graph.pointers(attribute::OPERATIONGRAPH_HANDLE, kind::HANDLE, &[*handle.raw()])?;
        }
        let graph = graph.finish("make an operation graph")?;
        Ok(Graph { descriptor: Arc::new(graph), target: target.clone() })
    }
}

struct Builder<'a> {
    cudnn: &'a Arc<Cudnn>,
    convolution: &'a Convolution,
}

impl Builder<'_> {
    fn empty(&self, descriptor: i32) -> Result<Descriptor> {
        Descriptor::new(self.cudnn, descriptor)
    }

    /// The sizes of x, w or y as cuDNN orders them: N, C, H, W; of w: K, C, R, S.
    fn sizes(&self, tensor: Tensor) -> [i64; 4] {
        let c = &self.convolution.geometry;
        let sizes = match tensor {
            Tensor::X => [c.n, c.c_in, c.h, c.w],
            Tensor::W => [c.c_out, c.c_in, c.kernel[0], c.kernel[1]],
            _ => [c.n, c.c_out, c.oh(), c.ow()],
        };
        sizes.map(|size| size as i64)
    }

    fn result_name(&self) -> Tensor {
        match self.convolution.direction {
            Direction::Forward => Tensor::Y,
            Direction::DataGradient => Tensor::X,
            Direction::WeightGradient => Tensor::W,
        }
    }

    fn tensor(&self, tensor: Tensor) -> Result<Arc<Descriptor>> {
        self.described(tensor, self.sizes(tensor), data_type(self.convolution.dtype)?, false)
    }

    /// A tensor like the result of the convolution.
    fn result(&self, name: Tensor, inner: bool) -> Result<Arc<Descriptor>> {
        self.described(name, self.sizes(self.result_name()), data_type(self.convolution.dtype)?, inner)
    }

    fn described(&self, name: Tensor, sizes: [i64; 4], data: i32, inner: bool) -> Result<Arc<Descriptor>> {
        let [_, channels, height, width] = sizes;
        let strides = [channels * height * width, 1, channels * width, channels];
        let tensor = self
            .empty(descriptor::TENSOR)?
            .set(attribute::TENSOR_DATA_TYPE, kind::DATA_TYPE, &[data])?
            .set(attribute::TENSOR_DIMENSIONS, kind::INT64, &sizes)?
            .set(attribute::TENSOR_STRIDES, kind::INT64, &strides)?
            .set(attribute::TENSOR_UNIQUE_ID, kind::INT64, &[name as i64])?
            .set(attribute::TENSOR_BYTE_ALIGNMENT, kind::INT64, &[ALIGNMENT as i64])?
            .set(attribute::TENSOR_IS_VIRTUAL, kind::BOOLEAN, &[Flag(inner.into())])?;
        Ok(Arc::new(tensor.finish("describe a tensor")?))
    }

    /// The convolution itself; its result may be a tensor that is there already.
    fn convolve(&self, result: Option<&Arc<Descriptor>>, beta: f32) -> Result<Arc<Descriptor>> {
        let names = Names::of(self.convolution.direction);
        let tensor = |name| match result {
            Some(result) if name == self.result_name() => Ok(result.clone()),
            _ => self.tensor(name),
        };
        let operation = self
            .empty(names.operation)?
            .refer(names.x, &[&tensor(Tensor::X)?])?
            .refer(names.w, &[&tensor(Tensor::W)?])?
            .refer(names.y, &[&tensor(Tensor::Y)?])?
            .refer(names.geometry, &[&self.geometry()?])?
            .set(names.alpha, kind::FLOAT, &[1.0f32])?
            .set(names.beta, kind::FLOAT, &[beta])?;
        Ok(Arc::new(operation.finish("describe a convolution")?))
    }

    fn geometry(&self) -> Result<Arc<Descriptor>> {
        let two = |sizes: [usize; 2]| sizes.map(|size| size as i64);
        let (padding, stride) = (two(self.convolution.geometry.padding), two(self.convolution.geometry.stride));
        let geometry = self
            .empty(descriptor::CONVOLUTION)?
            .set(attribute::CONVOLUTION_COMP_TYPE, kind::DATA_TYPE, &[data::FLOAT])?
            .set(attribute::CONVOLUTION_CONV_MODE, kind::CONVOLUTION_MODE, &[c::CROSS_CORRELATION])?
            .set(attribute::CONVOLUTION_SPATIAL_DIMS, kind::INT64, &[2i64])?
            .set(attribute::CONVOLUTION_PRE_PADDINGS, kind::INT64, &padding)?
            .set(attribute::CONVOLUTION_POST_PADDINGS, kind::INT64, &padding)?
            .set(attribute::CONVOLUTION_DILATIONS, kind::INT64, &[1i64, 1])?
            .set(attribute::CONVOLUTION_FILTER_STRIDES, kind::INT64, &stride)?;
        Ok(Arc::new(geometry.finish("describe a convolution's geometry")?))
    }

    /// result = inner + addend.
    fn add(&self, inner: &Arc<Descriptor>) -> Result<Arc<Descriptor>> {
        let addition = self
            .empty(descriptor::POINTWISE)?
            .set(attribute::POINTWISE_MODE, kind::POINTWISE_MODE, &[c::POINTWISE_ADD])?
            .set(attribute::POINTWISE_MATH_PREC, kind::DATA_TYPE, &[data::FLOAT])?;
        let addition = Arc::new(addition.finish("describe an addition")?);
        let operation = self
            .empty(descriptor::OPERATION_POINTWISE)?
            .refer(attribute::OPERATION_POINTWISE_PW_DESCRIPTOR, &[&addition])?
            .refer(attribute::OPERATION_POINTWISE_XDESC, &[inner])?
            .refer(attribute::OPERATION_POINTWISE_BDESC, &[&self.result(Tensor::Addend, false)?])?
            .refer(attribute::OPERATION_POINTWISE_YDESC, &[&self.result(self.result_name(), false)?])?;
        Ok(Arc::new(operation.finish("describe an addition")?))
    }

    fn statistics(&self, of: &Arc<Descriptor>) -> Result<Arc<Descriptor>> {
        if self.convolution.direction != Direction::Forward {
            let message = "statistics were asked of a gradient".into();
            return Err(Error::Internal { thread: "cuDNN".into(), message });
        }
        let sizes = [1, self.convolution.geometry.c_out as i64, 1, 1];
        let operation = self
            .empty(descriptor::OPERATION_GEN_STATS)?
            .refer(attribute::OPERATION_GENSTATS_XDESC, &[of])?
            .set(attribute::OPERATION_GENSTATS_MODE, kind::GENSTATS_MODE, &[c::GENSTATS_SUM_SQSUM])?
            .set(attribute::OPERATION_GENSTATS_MATH_PREC, kind::DATA_TYPE, &[data::FLOAT])?
            .refer(attribute::OPERATION_GENSTATS_SUMDESC, &[&self.described(Tensor::Sum, sizes, data::FLOAT, false)?])?
            .refer(
                attribute::OPERATION_GENSTATS_SQSUMDESC,
                &[&self.described(Tensor::SquareSum, sizes, data::FLOAT, false)?],
            )?;
        Ok(Arc::new(operation.finish("describe statistics")?))
    }
}

/// cuDNN has an operation for each direction, whose attributes differ only in their numbers.
struct Names {
    operation: i32,
    x: i32,
    w: i32,
    y: i32,
    geometry: i32,
    alpha: i32,
    beta: i32,
}

impl Names {
    fn of(direction: Direction) -> Names {
        match direction {
            Direction::Forward => Names {
                operation: descriptor::OPERATION_CONVOLUTION_FORWARD,
                x: attribute::OPERATION_CONVOLUTION_FORWARD_X,
                w: attribute::OPERATION_CONVOLUTION_FORWARD_W,
                y: attribute::OPERATION_CONVOLUTION_FORWARD_Y,
                geometry: attribute::OPERATION_CONVOLUTION_FORWARD_CONV_DESC,
                alpha: attribute::OPERATION_CONVOLUTION_FORWARD_ALPHA,
                beta: attribute::OPERATION_CONVOLUTION_FORWARD_BETA,
            },
            Direction::DataGradient => Names {
                operation: descriptor::OPERATION_CONVOLUTION_BACKWARD_DATA,
                x: attribute::OPERATION_CONVOLUTION_BWD_DATA_DX,
                w: attribute::OPERATION_CONVOLUTION_BWD_DATA_W,
                y: attribute::OPERATION_CONVOLUTION_BWD_DATA_DY,
                geometry: attribute::OPERATION_CONVOLUTION_BWD_DATA_CONV_DESC,
                alpha: attribute::OPERATION_CONVOLUTION_BWD_DATA_ALPHA,
                beta: attribute::OPERATION_CONVOLUTION_BWD_DATA_BETA,
            },
            Direction::WeightGradient => Names {
                operation: descriptor::OPERATION_CONVOLUTION_BACKWARD_FILTER,
                x: attribute::OPERATION_CONVOLUTION_BWD_FILTER_X,
                w: attribute::OPERATION_CONVOLUTION_BWD_FILTER_DW,
                y: attribute::OPERATION_CONVOLUTION_BWD_FILTER_DY,
                geometry: attribute::OPERATION_CONVOLUTION_BWD_FILTER_CONV_DESC,
                alpha: attribute::OPERATION_CONVOLUTION_BWD_FILTER_ALPHA,
                beta: attribute::OPERATION_CONVOLUTION_BWD_FILTER_BETA,
            },
        }
    }
}

fn data_type(dtype: DType) -> Result<i32> {
    match dtype {
        DType::F32 => Ok(data::FLOAT),
        DType::Bf16 => Ok(data::BFLOAT16),
        DType::F16 => Ok(data::HALF),
        other => Err(Error::shape("cuDNN", "element type", "f32, bf16 or f16", other)),
    }
}
