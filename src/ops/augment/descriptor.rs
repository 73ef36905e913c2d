//! What the kernels are told about a view: the structs of `kernels/augment.cu`, field for field.

use bytemuck::{Pod, Zeroable};

use super::Filter;
use crate::data::augment::{JitterOp, MAX_REACH, ViewParams};
use crate::data::loader::StoredImage;

/// Room for the weights of a kernel's centre and right half.
const BLUR_TAPS: usize = 128;
const _: () = assert!(MAX_REACH < BLUR_TAPS);

/// The filter of one axis.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Axis {
    start: f64,
    step: f64,
    support: f64,
    first: i32,
    end: i32,
    taps: i32,
    pub mirrored: i32,
}

impl Axis {
    fn new(filter: &Filter, mirrored: bool) -> Axis {
        let &Filter { start, step, support, ref bounds, taps } = filter;
        // Sides fit 16 bits.
        let [first, end, taps] = [bounds.start, bounds.end, taps].map(|value| value as i32);
        Axis { start, step, support, first, end, taps, mirrored: mirrored.into() }
    }
}

/// Everything that makes one view of an image in device memory. It is uploaded as it is.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct ViewDescriptor {
    pub(super) offset: i64,
    /// Columns, rows.
    pub(super) axes: [Axis; 2],
    row_bytes: i32,
    channels: i32,
    order: [i32; 4],
    factors: [f32; 4],
    operations: i32,
    before_contrast: i32,
    grayscale: i32,
    blur_taps: i32,
    blur: [f32; BLUR_TAPS],
}

// As in kernels/augment.cu.
const _: () = assert!(size_of::<ViewDescriptor>() == 656);

impl ViewDescriptor {
    /// A view of unchanged colours, blurred by the kernel of which `half` is the centre and the right half.
    pub(super) fn new(image: &StoredImage, filters: &[Filter; 2], flip: bool, half: &[f32]) -> ViewDescriptor {
        let [columns, rows] = filters;
        let mut view = ViewDescriptor {
            offset: image.offset as i64,
            axes: [Axis::new(columns, flip), Axis::new(rows, false)],
            row_bytes: (image.width * image.channels) as i32,
            channels: image.channels as i32,
            blur_taps: half.len() as i32,
            ..Zeroable::zeroed()
        };
        view.blur[..half.len()].copy_from_slice(half);
        view
    }

    /// The same with colours changed as `params` say.
    pub(super) fn with_colours(mut self, params: &ViewParams) -> ViewDescriptor {
        if let Some(jitter) = &params.jitter {
            self.order = jitter.order.map(code);
            self.factors = [jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue];
            self.operations = jitter.order.len() as i32;
            self.before_contrast = jitter.order.iter().take_while(|&&op| op != JitterOp::Contrast).count() as i32;
        }
        self.grayscale = params.grayscale.into();
        self
    }

    /// Taps of the columns' and the rows' filter.
    pub(super) fn taps(&self) -> [usize; 2] {
        self.axes.map(|axis| axis.taps as usize)
    }
}

fn code(op: JitterOp) -> i32 {
    match op {
        JitterOp::Brightness => 0,
        JitterOp::Contrast => 1,
        JitterOp::Saturation => 2,
        JitterOp::Hue => 3,
    }
}
