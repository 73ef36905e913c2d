//! Pooled features of a dataset from a frozen backbone, and the kNN figure on them.

use std::sync::Arc;

use crate::data::augment::{AugmentConfig, Augmenter};
use crate::data::centre::centre_views;
use crate::data::dataset::Dataset;
use crate::data::reader::ImageReader;
use crate::error::{Error, Result};
use crate::eval::knn::{Knn, KnnResult, Labelled};
use crate::exec::{Device, Executor, Options};
use crate::graph::ValueId;
use crate::graph::plan::Target;
use crate::nn::ParamInfo;
use crate::nn::simsiam::{FeatureGraph, Layer, SimSiam};
use crate::tensor::DType;
use crate::tensor::safetensors::NamedTensors;
use crate::train::run::Probe;
use crate::train::state::write_params;

/// Images of one forward pass.
pub const BATCH: usize = 64;

/// Features and labels of a dataset, in record order.
#[derive(Debug, Clone, PartialEq)]
pub struct Features {
    /// Row-major, one row a record.
    pub values: Vec<f32>,
    /// The class of each record.
    pub labels: Vec<u32>,
    /// Length of a row.
    pub dim: usize,
}

impl Features {
    fn labelled(&self) -> Labelled<'_> {
        Labelled { features: &self.values, labels: &self.labels }
    }
}

/// A backbone in evaluation mode.
#[derive(Debug)]
pub struct FeatureExtractor {
    exec: Box<dyn Executor>,
    images: ValueId,
    features: ValueId,
    params: Vec<ParamInfo>,
    augment: AugmentConfig,
    dim: usize,
}

impl FeatureExtractor {
    /// Prepares the forward pass on `device` with activations of `dtype`; images are resized, cut and normalised as `augment` says, without random changes.
    ///
    /// # Errors
    /// Settings that do not fit together; memory that the system refuses.
    pub fn new(model: &SimSiam, augment: &AugmentConfig, device: &Device, dtype: DType) -> Result<FeatureExtractor> {
        FeatureExtractor::of_layer(model, Layer::Pooled, augment, device, (dtype, Options::default()))
    }

    /// The same with the outputs of `layer` as features, on an executor that works as the options say.
    ///
    /// # Errors
    /// As [`FeatureExtractor::new`].
    pub fn of_layer(
        model: &SimSiam,
        layer: Layer,
        augment: &AugmentConfig,
        device: &Device,
        (dtype, options): (DType, Options),
    ) -> Result<FeatureExtractor> {
        let padded = device.target() == Target::Cuda;
        let FeatureGraph { tape, images, features, params } =
            model.record_layer(layer, BATCH, augment.image_size, dtype, padded)?;
        let dim = tape.desc(features).shape.channels();
        let exec = device.executor_with(tape, options)?;
        Ok(FeatureExtractor { exec, images, features, params, augment: augment.clone(), dim })
    }

    /// Length of a feature.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The parameters and buffers that features depend on.
    pub fn params(&self) -> &[ParamInfo] {
        &self.params
    }

    /// Loads the backbone's parameters from tensors under PyTorch names.
    ///
    /// # Errors
    /// [`Error::Shape`] for missing or ill-shaped tensors.
    pub fn load(&mut self, params: &NamedTensors) -> Result<()> {
        write_params(&mut *self.exec, &self.params, |name, desc| {
            params.get(name).cloned().ok_or_else(|| Error::shape("load", name, desc, "no such tensor"))
        })
    }

    /// Gives the backbone its start values for `seed`: the untrained network.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn initialise(&mut self, seed: u64) -> Result<()> {
        crate::train::state::write_initial(&mut *self.exec, &self.params, seed)
    }

    /// Pooled features of every record of `dataset`, which must be labelled.
    ///
    /// # Errors
    /// Damaged records; records without a label.
    pub fn extract(&mut self, dataset: &Dataset) -> Result<Features> {
        let labels = labels(dataset)?;
        let mut values = Vec::with_capacity(dataset.len() * self.dim);
        self.stream(dataset, &mut |_, rows| {
            values.extend_from_slice(rows);
            Ok(())
        })?;
        Ok(Features { values, labels, dim: self.dim })
    }

    /// Features of every record of `dataset`, labelled or not, in record order: `sink` gets those of a few records at a time,
    /// with the number of the first.
    ///
    /// # Errors
    /// Damaged records; what `sink` returns.
    pub fn stream(&mut self, dataset: &Dataset, sink: &mut dyn FnMut(usize, &[f32]) -> Result<()>) -> Result<()> {
        for first in (0..dataset.len()).step_by(BATCH) {
            let records: Vec<usize> = (first..dataset.len().min(first + BATCH)).collect();
            sink(first, &self.forward(dataset, &records)?)?;
        }
        Ok(())
    }

    /// Features of at most [`BATCH`] records, one row each.
    ///
    /// # Errors
    /// Damaged records; [`Error::Shape`] for too many.
    pub fn forward(&mut self, dataset: &Dataset, records: &[usize]) -> Result<Vec<f32>> {
        if records.len() > BATCH {
            return Err(Error::shape("features", "records", format!("at most {BATCH}"), records.len()));
        }
        let mut images = vec![0f32; BATCH * self.augment.view_len()];
        centre_views(dataset, records, &self.augment, &mut images)?;
        self.exec.write(self.images, &self.exec.tape().desc(self.images).dtype.encode_f32(&images))?;
        self.exec.run_step()?;
        let features = self.exec.read(self.features)?.to_f64();
        Ok(features[..records.len() * self.dim].iter().map(|&value| value as f32).collect())
    }
}

fn labels(dataset: &Dataset) -> Result<Vec<u32>> {
    let label = |i| {
        dataset.label(i)?.ok_or_else(|| {
            Error::format(dataset.path(), None, format!("record {i} has no label, and the kNN figure needs one"))
                .with_hint("leave out --knn-bank and --knn-queries, or prepare the images with classes")
        })
    };
    (0..dataset.len()).map(label).collect()
}

/// Both sides of a kNN figure.
#[derive(Debug)]
pub struct KnnProbe {
    extractor: FeatureExtractor,
    bank: Arc<Dataset>,
    queries: Arc<Dataset>,
    knn: Knn,
}

impl KnnProbe {
    /// Checks that both datasets are labelled with the same classes and large enough.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Format`] naming what does not fit.
    pub fn new(extractor: FeatureExtractor, bank: Arc<Dataset>, queries: Arc<Dataset>, knn: Knn) -> Result<KnnProbe> {
        if bank.classes() != queries.classes() {
            let what = format!("its {} classes are not those of {}", queries.classes().len(), bank.path().display());
            return Err(
                Error::format(queries.path(), None, what).with_hint("prepare both from folders of the same names")
            );
        }
        knn.validate(bank.len())?;
        labels(&bank)?;
        labels(&queries)?;
        Ok(KnnProbe { extractor, bank, queries, knn })
    }

    /// kNN on the features of the network as it is loaded now.
    ///
    /// # Errors
    /// Damaged records.
    pub fn evaluate(&mut self) -> Result<KnnResult> {
        let (bank, queries) = (self.extractor.extract(&self.bank)?, self.extractor.extract(&self.queries)?);
        self.knn.evaluate(bank.labelled(), queries.labelled(), bank.dim, self.bank.classes().len())
    }

    /// The same of the untrained network.
    ///
    /// # Errors
    /// Damaged records.
    pub fn untrained(&mut self, seed: u64) -> Result<KnnResult> {
        self.extractor.initialise(seed)?;
        self.evaluate()
    }

    /// The same of the raw pixels, resized and cut but not normalised: the floor that needs no network.
    ///
    /// # Errors
    /// Damaged records.
    pub fn raw_pixels(&self) -> Result<KnnResult> {
        let (bank, queries) = (self.pixels(&self.bank)?, self.pixels(&self.queries)?);
        self.knn.evaluate(bank.labelled(), queries.labelled(), bank.dim, self.bank.classes().len())
    }

    fn pixels(&self, dataset: &Dataset) -> Result<Features> {
        let plain = AugmentConfig { mean: [0.0; 3], std: [1.0; 3], ..self.extractor.augment.clone() };
        let mut augmenter = Augmenter::new(&plain)?;
        let mut reader = ImageReader::default();
        let dim = plain.view_len();
        let mut values = vec![0f32; dataset.len() * dim];
        for (i, out) in values.chunks_exact_mut(dim).enumerate() {
            augmenter.resize_center(&reader.read(dataset, i)?.0, None, out);
        }
        Ok(Features { values, labels: labels(dataset)?, dim })
    }
}

impl Probe for KnnProbe {
    fn measure(&mut self, params: &NamedTensors) -> Result<f64> {
        self.extractor.load(params)?;
        Ok(self.evaluate()?.top1)
    }
}
