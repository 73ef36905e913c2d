//! Convolution weights between PyTorch's layout `[c_out][c_in][kh][kw]` (OIHW) and the engine's `[c_out][kh][kw][c_in]`
//! (KRSC). Every other parameter has the same layout in both.

use crate::error::Result;
use crate::tensor::{HostTensor, TensorDesc};

/// From OIHW to KRSC, any element type.
///
/// # Errors
/// [`crate::error::Error::Shape`] when the tensor does not have four dimensions.
pub fn oihw_to_krsc(weight: &HostTensor) -> Result<HostTensor> {
    let [o, i, h, w] = weight.desc().shape.expect("layout", "OIHW weight")?;
    swap_inner(weight, [o, i, h * w], [o, h, w, i])
}

/// From KRSC to OIHW, any element type.
///
/// # Errors
/// [`crate::error::Error::Shape`] when the tensor does not have four dimensions.
pub fn krsc_to_oihw(weight: &HostTensor) -> Result<HostTensor> {
    let [k, r, s, c] = weight.desc().shape.expect("layout", "KRSC weight")?;
    swap_inner(weight, [k, r * s, c], [k, c, r, s])
}

/// Transposes each of the `blocks` matrices of `rows` x `cols`: both directions are this, with pixels as one dimension.
fn swap_inner(weight: &HostTensor, [blocks, rows, cols]: [usize; 3], shape: [usize; 4]) -> Result<HostTensor> {
    let size = weight.desc().dtype.size();
    let mut swapped = Vec::with_capacity(weight.bytes().len());
    for block in 0..blocks {
        for col in 0..cols {
            for row in 0..rows {
                let at = ((block * rows + row) * cols + col) * size;
                swapped.extend_from_slice(&weight.bytes()[at..at + size]);
            }
        }
    }
    HostTensor::from_bytes(TensorDesc::new(shape, weight.desc().dtype), swapped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    #[test]
    fn every_element_moves_to_its_place() {
        let (o, i, h, w) = (3, 5, 2, 4);
        let values: Vec<f32> = (0..o * i * h * w).map(|k| k as f32).collect();
        let oihw = HostTensor::from_f32([o, i, h, w], &values).unwrap();
        let krsc = oihw_to_krsc(&oihw).unwrap();
        assert_eq!(krsc.desc().shape.dims(), [o, h, w, i]);
        let moved = krsc.to_f32().unwrap();
        for (k, &value) in moved.iter().enumerate() {
            let (c, s, r, n) = (k % i, k / i % w, k / i / w % h, k / i / w / h);
            assert_eq!(value, values[((n * i + c) * h + r) * w + s]);
        }
        assert_eq!(krsc_to_oihw(&krsc).unwrap(), oihw);
    }

    #[test]
    fn any_element_size_and_only_four_dimensions() {
        let desc = TensorDesc::new([1, 2, 1, 3], DType::Bf16);
        let half = HostTensor::from_bytes(desc, (0..12).collect()).unwrap();
        assert_eq!(oihw_to_krsc(&half).unwrap().bytes(), [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
        let flat = HostTensor::from_f32([2, 3], &[0.0; 6]).unwrap();
        let message = oihw_to_krsc(&flat).unwrap_err().to_string();
        assert!(message.contains("OIHW weight: expected 4 dimensions, got [2, 3]"), "{message}");
    }
}
