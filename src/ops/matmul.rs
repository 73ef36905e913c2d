//! Matrix products, one for each group of rows, with what is added to them and their ReLU.

use crate::backend::cpu::{CpuIo, Epilogue, Mat, Real, long_workspace, multiply_long, multiply_rows};
use crate::backend::cuda::library::{Product, Work};
use crate::error::{Error, Result};
use crate::graph::op::dispatch_real;
use crate::graph::{Again, Op};
use crate::ops::conv2d::gradient_dtype;
use crate::tensor::{DType, TensorDesc};

/// How one factor of a product lies in its tensor, which is seen as a matrix with the innermost dimension as columns: the
/// matrices of all groups one below the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Factor {
    /// Each matrix is stored as its transpose.
    pub transposed: bool,
    /// There is one matrix, which every group uses.
    pub shared: bool,
}

impl Factor {
    /// A matrix for each group, as it is.
    pub const PLAIN: Factor = Factor { transposed: false, shared: false };
    /// A matrix for each group, stored as its transpose.
    pub const TRANSPOSED: Factor = Factor { transposed: true, shared: false };

    /// The same with one matrix for all groups.
    pub const fn shared(self) -> Factor {
        Factor { shared: true, ..self }
    }

    /// Rows and columns of each group's matrix in `desc`, as it is multiplied.
    fn dims(self, what: &str, desc: &TensorDesc, groups: usize) -> Result<[usize; 2]> {
        if desc.shape.rank() == 0 || desc.shape.is_empty() {
            return Err(Error::shape("matmul", what, "a matrix with elements", desc));
        }
        let parts = if self.shared { 1 } else { groups };
        let (rows, columns) = (desc.shape.rows(), desc.shape.channels());
        if !rows.is_multiple_of(parts) {
            return Err(Error::shape("matmul", &format!("rows of {what}"), format!("{parts} equal parts"), rows));
        }
        let [rows, columns] = [rows / parts, columns];
        Ok(if self.transposed { [columns, rows] } else { [rows, columns] })
    }

    /// The matrix of group `group`, of `rows` x `columns` as it is multiplied.
    fn matrix<T>(self, data: &[T], group: usize, [rows, columns]: [usize; 2]) -> Mat<&[T]> {
        let data = if self.shared { data } else { &data[group * rows * columns..][..rows * columns] };
        match self.transposed {
            false => Mat::row_major(data, rows, columns),
            true => Mat::row_major(data, columns, rows).t(),
        }
    }
}

/// `C_g = act(A_g B_g + bias_g + addend_g)` for each group g; inputs A, B, then the bias `[groups][n]` if there is one, in
/// float32 (of float64 in float64), then the addend, which is like C.
///
/// Where A is neither transposed nor shared, C is like A with the innermost dimension replaced by n, else `[groups][m][n]`.
/// The result may be added to what is there if there is neither addend nor ReLU. No gradient flows through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matmul {
    /// Products.
    pub groups: usize,
    /// How A lies in the first input.
    pub a: Factor,
    /// How B lies in the second one.
    pub b: Factor,
    /// Whether a value is added to each column.
    pub bias: bool,
    /// Whether a tensor like C is added.
    pub addend: bool,
    /// Whether what is below zero becomes zero.
    pub relu: bool,
    /// C is float32 whatever A and B are.
    pub widened: bool,
    /// Float32 operands are not rounded to TF32 even where a run allows it.
    pub exact: bool,
}

impl Matmul {
    /// `C_g = A_g B_g` in the factors' own element type.
    pub const fn new(groups: usize, a: Factor, b: Factor) -> Matmul {
        Matmul { groups, a, b, bias: false, addend: false, relu: false, widened: false, exact: false }
    }

    /// Rows and columns of C, and the length of the sums.
    fn sizes(&self, inputs: &[&TensorDesc]) -> Result<[usize; 3]> {
        if self.groups == 0 {
            return Err(Error::shape("matmul", "groups", "at least 1", 0));
        }
        let expected = 2 + usize::from(self.bias) + usize::from(self.addend);
        if inputs.len() != expected {
            return Err(Error::shape("matmul", "inputs", expected, inputs.len()));
        }
        let [m, k] = self.a.dims("A", inputs[0], self.groups)?;
        let [rows, n] = self.b.dims("B", inputs[1], self.groups)?;
        if rows != k {
            return Err(Error::shape("matmul", "rows of each B as multiplied", k, rows));
        }
        Ok([m, n, k])
    }

    /// C, where the factors' sizes are these.
    fn result(&self, a: &TensorDesc, [m, n, _]: [usize; 3]) -> TensorDesc {
        let dtype = if self.widened { gradient_dtype(a.dtype) } else { a.dtype };
        if self.a != Factor::PLAIN {
            return TensorDesc::new([self.groups, m, n], dtype);
        }
        let mut dims = a.shape.dims().to_vec();
        if let Some(innermost) = dims.last_mut() {
            *innermost = n;
        }
        TensorDesc::new(&dims[..], dtype)
    }

    fn compute<T: Real>(&self, io: &mut CpuIo<'_>, [m, n, k]: [usize; 3]) {
        let (a, b) = (io.inputs[0].get::<T>(), io.inputs[1].get::<T>());
        let added = |present: bool, index: usize| present.then(|| io.inputs[index].get::<T>());
        let (bias, addend) = (added(self.bias, 2), added(self.addend, 2 + usize::from(self.bias)));
        let accumulate = io.outputs[0].accumulate;
        let workspace = bytemuck::cast_slice_mut(io.workspace);
        for (group, c) in io.outputs[0].get::<T>().chunks_exact_mut(m * n).enumerate() {
            let (a, b) = (self.a.matrix(a, group, [m, k]), self.b.matrix(b, group, [k, n]));
            let epilogue = Epilogue {
                bias: bias.map(|bias| &bias[group * n..][..n]),
                addend: addend.map(|addend| &addend[group * m * n..][..m * n]),
                relu: self.relu,
                accumulate,
            };
            match self.a.transposed {
                false => multiply_rows(c, a, b, &epilogue),
                true => multiply_long(c, a.t(), b, &epilogue, workspace),
            }
        }
    }
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        let sizes = self.sizes(inputs)?;
        let (a, b) = (inputs[0], inputs[1]);
        if matches!(a.dtype, DType::I64 | DType::U8) {
            return Err(Error::shape("matmul", "element type of A", "a floating-point type", a.dtype));
        }
        if a.dtype != b.dtype {
            return Err(Error::shape("matmul", "element type of B", a.dtype, b.dtype));
        }
        let c = self.result(a, sizes);
        let mut added = inputs[2..].iter();
        let bias = TensorDesc::new([self.groups, sizes[1]], gradient_dtype(a.dtype));
        for (what, expected) in [("bias", self.bias.then_some(&bias)), ("addend", self.addend.then_some(&c))] {
            if let Some(expected) = expected
                && let Some(got) = added.next()
                && *got != expected
            {
                return Err(Error::shape("matmul", what, expected, got));
            }
        }
        Ok(vec![c])
    }

    fn workspace(&self, inputs: &[&TensorDesc]) -> usize {
        match self.sizes(inputs) {
            Ok(sizes) if self.a.transposed => long_workspace(sizes) * gradient_dtype(inputs[0].dtype).size(),
            _ => 0,
        }
    }

    /// Products of a shared matrix are of weights and statistics: as small as what they are made of, and kept.
    fn again(&self) -> Again {
        if self.a.shared { Again::Never } else { Again::Same }
    }

    fn accumulates(&self) -> bool {
        !self.addend && !self.relu
    }

    fn library_work(&self, inputs: &[&TensorDesc]) -> Option<Work> {
        let sizes = self.sizes(inputs).ok()?;
        let transposed = [self.a.transposed, self.b.transposed];
        let out = self.result(inputs[0], sizes).dtype;
        Some(Work::Product(Product {
            groups: self.groups,
            shared: [self.a.shared, self.b.shared],
            bias: self.bias,
            addend: self.addend,
            relu: self.relu,
            exact: self.exact,
            ..Product::new(sizes, transposed, inputs[0].dtype, out)
        }))
    }

    fn cpu(&self, io: &mut CpuIo<'_>) -> Result<()> {
        let descs: Vec<&TensorDesc> = io.inputs.iter().map(|input| input.desc).collect();
        let sizes = self.sizes(&descs)?;
        dispatch_real!("matmul", io.inputs[0].desc.dtype, T => self.compute::<T>(io, sizes));
        Ok(())
    }

    fn flops(&self, inputs: &[&TensorDesc]) -> u64 {
        self.sizes(inputs).map_or(0, |[m, n, k]| 2 * (self.groups * m * n * k) as u64)
    }
}

#[cfg(test)]
mod tests;
