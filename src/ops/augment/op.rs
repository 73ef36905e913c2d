//! The augmentation as the first node of a training step.

use super::cuda::Places;
use super::{Augmentation, ViewDescriptor};
use crate::backend::cpu::CpuIo;
use crate::backend::cuda::CudaIo;
use crate::error::{Error, Result};
use crate::graph::{Again, Op, Tensors, Traffic};
use crate::tensor::{DType, TensorDesc};

/// Views of stored images; inputs: their pixels, u8, and the views' descriptors as bytes. Whoever writes these takes both
/// from one call of [`Augmentation::describe`]: the kernels go where a descriptor sends them.
#[derive(Debug, Clone)]
pub struct AugmentViews {
    /// How views are made.
    pub augmentation: Augmentation,
    /// Their number.
    pub views: usize,
    /// Room for pixels, in bytes.
    pub pixel_bytes: usize,
}

impl AugmentViews {
    /// What the inputs are: pixels and descriptors.
    pub fn inputs(&self) -> [TensorDesc; 2] {
        let pixels = Augmentation::pixel_memory(self.pixel_bytes);
        [TensorDesc::new([pixels], DType::U8), TensorDesc::new([self.views, size_of::<ViewDescriptor>()], DType::U8)]
    }
}

impl Op for AugmentViews {
    fn name(&self) -> &'static str {
        "augment"
    }

    fn infer(&self, inputs: &[&TensorDesc]) -> Result<Vec<TensorDesc>> {
        for ((what, expected), got) in ["pixels", "descriptors"].into_iter().zip(self.inputs()).zip(inputs) {
            if expected != **got {
                return Err(Error::shape("augment", what, expected, got));
            }
        }
        Ok(vec![self.augmentation.output(self.views)])
    }

    fn differentiable(&self) -> bool {
        false
    }

    /// It takes far longer than its traffic tells.
    fn again(&self) -> Again {
        Again::Never
    }

    fn cpu(&self, _io: &mut CpuIo<'_>) -> Result<()> {
        let what = "augment: on the CPU the loader makes the views".into();
        Err(Error::Unsupported { what, hint: None })
    }

    /// Of the pixels the crops, as large as they are on average; and tables of filters on the way.
    fn traffic(&self, tensors: &Tensors<'_>) -> Traffic {
        let [pixels, descriptors, views] = [tensors.inputs[0], tensors.inputs[1], tensors.outputs[0].0];
        let crops = self.augmentation.cropped_bytes(self.views).min(self.views as u64 * pixels.bytes() as u64);
        let once = Traffic { read: crops, written: views.bytes() as u64 };
        once.reading(descriptors).staging(self.augmentation.tables(self.views))
    }

    fn cuda_workspace(&self, _inputs: &[&TensorDesc]) -> usize {
        self.augmentation.workspace(self.views)
    }

    #[allow(unsafe_code)] // launches
    fn cuda(&self, io: &CudaIo<'_>) -> Result<()> {
        let places = Places {
            pixels: io.inputs[0].ptr,
            descriptors: io.inputs[1].ptr,
            workspace: io.workspace,
            views: io.outputs[0].ptr,
        };
        // SAFETY: `infer` checked the room for pixels, descriptors and views, `cuda_workspace` counted the scratch; that the
        // descriptors are of `describe` and for these pixels is what the type's documentation asks of whoever writes them.
        unsafe { self.augmentation.launch(io.driver, self.views, &places) }
    }
}
