//! Augmentation of one image into one view: crop and resize, colour jitter, grey, blur, flip, normalise, in this order,
//! as torchvision and PIL do them. What to do is drawn first ([`ViewParams`]); doing it ([`Augmenter`]) draws nothing.
//!
//! The loops are written for the compiler to vectorise and are compiled for several instruction sets, of which the best
//! is chosen at run time. All sums have a fixed order and no multiply-add is fused, so every machine gives the same bits.

mod blur;
mod config;
mod crop;
mod jitter;
mod params;

use std::ops::Range;

pub use blur::MAX_REACH;
pub use config::{AugmentConfig, BlurKernel, Normalisation};
pub use crop::Filter;
pub use params::{CropBox, Jitter, JitterOp, ViewParams};

use crate::error::{Error, Result};
use blur::Blur;
use crop::{Resizer, Span};

/// A stored image: rows of bytes, channels innermost. It may be a resized version of its original.
#[derive(Debug, Clone, Copy)]
pub struct Image<'a> {
    pixels: &'a [u8],
    width: usize,
    height: usize,
    channels: usize,
    original_width: u32,
    original_height: u32,
}

impl<'a> Image<'a> {
    /// An image of 1 (grey) or 3 (red, green, blue) channels that is its own original.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of bytes does not fit the size, or a size or number of channels is not possible.
    pub fn new(pixels: &'a [u8], width: usize, height: usize, channels: usize) -> Result<Image<'a>> {
        if !matches!(channels, 1 | 3) {
            return Err(Error::shape("image", "channels", "1 or 3", channels));
        }
        if width == 0 || height == 0 || pixels.len() != width * height * channels {
            let expected = format!("width x height x channels = {width} x {height} x {channels} (not zero)");
            return Err(Error::shape("image", "bytes", expected, pixels.len()));
        }
        Ok(Image { pixels, width, height, channels, original_width: width as u32, original_height: height as u32 })
    }

    /// Says that this is a resized version of an image of another size, in whose pixels crops are given.
    ///
    /// # Errors
    /// [`Error::Shape`] when a side is zero.
    pub fn with_original_size(mut self, width: u32, height: u32) -> Result<Image<'a>> {
        if width == 0 || height == 0 {
            return Err(Error::shape("image", "original size", "at least 1 x 1", format!("{width} x {height}")));
        }
        (self.original_width, self.original_height) = (width, height);
        Ok(self)
    }

    /// Width and height.
    pub fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// The bytes: height x width x channels.
    pub fn pixels(&self) -> &'a [u8] {
        self.pixels
    }

    /// Width and height of the original.
    pub fn original_size(&self) -> (u32, u32) {
        (self.original_width, self.original_height)
    }

    /// 1 (grey) or 3 (red, green, blue).
    pub fn channels(&self) -> usize {
        self.channels
    }

    fn row(&self, y: usize) -> &'a [u8] {
        let len = self.width * self.channels;
        &self.pixels[y * len..(y + 1) * len]
    }
}

/// A square view in progress: three planes of levels in 0..255.
#[derive(Debug)]
struct Planes {
    size: usize,
    levels: [Vec<f32>; 3],
}

impl Planes {
    fn new(size: usize) -> Planes {
        Planes { size, levels: [(); 3].map(|()| vec![0.0; size * size]) }
    }

    fn size(&self) -> usize {
        self.size
    }

    fn pixels(&self) -> usize {
        self.size * self.size
    }

    fn each_mut(&mut self) -> [&mut [f32]; 3] {
        self.levels.each_mut().map(Vec::as_mut_slice)
    }

    fn row_mut(&mut self, y: usize) -> [&mut [f32]; 3] {
        let size = self.size;
        self.each_mut().map(|plane| &mut plane[y * size..(y + 1) * size])
    }

    /// The planes side by side in pieces of `len` pixels (the last may be shorter).
    fn tiles_mut(&mut self, len: usize) -> impl Iterator<Item = [&mut [f32]; 3]> {
        let [red, green, blue] = self.each_mut().map(|plane| plane.chunks_mut(len));
        red.zip(green).zip(blue).map(|((r, g), b)| [r, g, b])
    }
}

/// Makes views. Keeps its scratch memory from view to view; every thread has its own.
#[derive(Debug)]
pub struct Augmenter {
    stages: Stages,
    instructions: pulp::Arch,
}

impl Augmenter {
    /// An augmenter for views of the size and normalisation of `config`.
    ///
    /// # Errors
    /// [`Error::Config`] when `config` does not hold up to its checks.
    pub fn new(config: &AugmentConfig) -> Result<Augmenter> {
        config.validate()?;
        let stages = Stages {
            planes: Planes::new(config.image_size),
            resizer: Resizer::default(),
            blur: Blur::new(config),
            normalisation: config.normalisation(),
        };
        Ok(Augmenter { stages, instructions: pulp::Arch::new() })
    }

    /// Makes the view that `params` describe, normalised, as `[size][size][3]`.
    ///
    /// # Panics
    /// When `out` has another length, or `params` were drawn for an original of another size.
    pub fn view(&mut self, image: &Image, params: &ViewParams, out: &mut [f32]) {
        let filters = crop_filters(params.crop, image.original_size(), image.size(), self.stages.planes.size());
        self.run(Job { image, filters, params: Some(params), out });
    }

    /// Makes the view for evaluation: the short side of the original is resized to `short_side` (at least the size of a
    /// view), the centre is cut out, and normalised. Without `short_side` an image that is stored in the size of a view
    /// is taken as it is, and the short side of any other is resized to 256 / 224 of a view.
    ///
    /// # Panics
    /// When `out` has another length than a view.
    pub fn resize_center(&mut self, image: &Image, short_side: Option<usize>, out: &mut [f32]) {
        let filters = centre_filters(short_side, image.original_size(), image.size(), self.stages.planes.size());
        self.run(Job { image, filters, params: None, out });
    }

    fn run(&mut self, job: Job) {
        assert_eq!(job.out.len(), 3 * self.stages.planes.pixels(), "length of a view");
        self.instructions.dispatch(Run { stages: &mut self.stages, job });
    }
}

/// One view to be made.
struct Job<'a> {
    image: &'a Image<'a>,
    filters: [Filter; 2],
    /// `None` makes a plain resized cut-out.
    params: Option<&'a ViewParams>,
    out: &'a mut [f32],
}

/// The work on a view, with its scratch memory. Its methods and all they call are inlined into [`Run::call`], which is
/// compiled once for each instruction set.
#[derive(Debug)]
struct Stages {
    planes: Planes,
    resizer: Resizer,
    blur: Blur,
    normalisation: Normalisation,
}

impl Stages {
    #[inline(always)]
    fn run(&mut self, job: Job) {
        // A flip may as well come first: everything that follows treats left and right alike.
        let flip = job.params.is_some_and(|params| params.flip);
        let [horizontal, vertical] = &job.filters;
        self.resizer.resize(job.image, horizontal, vertical, flip, &mut self.planes);
        if let Some(params) = job.params {
            self.change(params);
        }
        self.normalise(job.out);
    }

    #[inline(always)]
    fn change(&mut self, params: &ViewParams) {
        if let Some(jitter) = &params.jitter {
            jitter::jitter_colour(&mut self.planes, jitter);
        }
        if params.grayscale {
            jitter::to_grayscale(&mut self.planes);
        }
        if let Some(sigma) = params.blur_sigma {
            self.blur.apply(&mut self.planes, sigma);
        }
    }

    #[inline(always)]
    fn normalise(&self, out: &mut [f32]) {
        let Stages { planes, normalisation: Normalisation { scale, offset }, .. } = self;
        let [red, green, blue] = &planes.levels;
        for (((pixel, r), g), b) in out.as_chunks_mut::<3>().0.iter_mut().zip(red).zip(green).zip(blue) {
            *pixel = [r * scale[0] + offset[0], g * scale[1] + offset[1], b * scale[2] + offset[2]];
        }
    }
}

/// A function object for [`pulp::Arch::dispatch`]: unlike a closure it is sure to be inlined there.
struct Run<'a> {
    stages: &'a mut Stages,
    job: Job<'a>,
}

impl pulp::NullaryFnOnce for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        self.stages.run(self.job);
    }
}

/// The filters of the columns and rows of a view of `size` that is cut out of an image whose original has a size in whose
/// pixels the crop is given.
///
/// # Panics
/// When the crop is empty or reaches outside the original.
pub fn crop_filters(crop: CropBox, original: (u32, u32), stored: (usize, usize), size: usize) -> [Filter; 2] {
    let CropBox { top, left, height, width } = crop;
    [stored_span(left, width, original.0, stored.0), stored_span(top, height, original.1, stored.1)]
        .map(|span| span.filter(size))
}

/// The filters of the columns and rows of a view for evaluation, see [`Augmenter::resize_center`].
pub fn centre_filters(
    short_side: Option<usize>,
    original: (u32, u32),
    stored: (usize, usize),
    size: usize,
) -> [Filter; 2] {
    let default = match stored == (size, size) {
        true => size,
        false => (size as f64 * 256.0 / 224.0).round() as usize,
    };
    let short_side = short_side.unwrap_or(default).max(size);
    let shorter = u64::from(original.0.min(original.1));
    let resized = |side: u32| (u64::from(side) * short_side as u64 / shorter) as usize;
    [centre_span(resized(original.0), size, stored.0), centre_span(resized(original.1), size, stored.1)]
        .map(|span| span.filter(size))
}

/// Where an interval of the original, `first..first + len` of `original` pixels, lies in a stored image of `stored`.
fn stored_span(first: u32, len: u32, original: u32, stored: usize) -> Span {
    assert!(len > 0 && first + len <= original, "crop {first}..{} of {original} pixels", first + len);
    let factor = stored as f64 / f64::from(original);
    let (start, end) = (f64::from(first) * factor, f64::from(first + len) * factor);
    Span { start, end, bounds: pixels_of(start, end, stored) }
}

/// The middle `size` of `resized` pixels, in the pixels of a stored image of `stored`. Its taps may reach outside it.
fn centre_span(resized: usize, size: usize, stored: usize) -> Span {
    // torchvision's CenterCrop rounds halves to the even neighbour, as Python does.
    let first = ((resized - size) as f64 / 2.0).round_ties_even();
    let factor = stored as f64 / resized as f64;
    Span { start: first * factor, end: (first + size as f64) * factor, bounds: 0..stored }
}

/// The pixels that an interval touches.
fn pixels_of(start: f64, end: f64, stored: usize) -> Range<usize> {
    let first = (start as usize).min(stored - 1);
    first..(end.ceil() as usize).clamp(first + 1, stored)
}

#[cfg(test)]
mod tests;
