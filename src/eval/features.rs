//! Features of a dataset from a frozen network, and the kNN figure on them.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::data::views::{View, make_views};
use crate::error::{Error, Result};
use crate::eval::knn::{Knn, KnnResult, Labelled};
use crate::exec::{Device, Executor, Options};
use crate::graph::ValueId;
use crate::graph::plan::Target;
use crate::nn::ParamInfo;
use crate::nn::simsiam::{FeatureGraph, Layer, SimSiam};
use crate::tensor::safetensors::NamedTensors;
use crate::tensor::{DType, HostTensor};
use crate::train::run::Probe;
use crate::train::state::{read_params, write_params};

/// Images of one forward pass.
const BATCH: usize = 64;
/// Forward passes that a device may have before it while the images of the next are made.
const IN_FLIGHT: usize = 1;

/// What a stream of features is handed to: the numbers of some records, and their features row by row.
pub type Receiver<'a> = dyn FnMut(&[usize], &[f32]) -> Result<()> + 'a;

/// Turns images into features.
pub trait FeatureSource {
    /// Length of a feature.
    fn dim(&self) -> usize;

    /// Hands the features of the `records` of `dataset`, as the centre of each image gives them, to `receive`, in order and a
    /// few at a time.
    ///
    /// # Errors
    /// Damaged records; faults of the executor; what `receive` returns.
    fn centres(
        &mut self,
        dataset: &Dataset,
        records: &mut dyn Iterator<Item = usize>,
        receive: &mut Receiver<'_>,
    ) -> Result<()>;
}

/// The features of every record of a labelled dataset, in memory.
fn collect(source: &mut dyn FeatureSource, dataset: &Dataset) -> Result<Features> {
    let labels = labels(dataset)?;
    let mut values = Vec::with_capacity(dataset.len() * source.dim());
    source.centres(dataset, &mut (0..dataset.len()), &mut |_, rows| {
        values.extend_from_slice(rows);
        Ok(())
    })?;
    Ok(Features { values, labels, dim: source.dim() })
}

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

/// A network up to one of its layers, in evaluation mode.
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

    /// Loads the network's parameters from tensors under PyTorch names.
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

    /// Names the parameters that are loaded: the same name means the same features.
    ///
    /// # Errors
    /// Faults of the executor.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for (name, tensor) in read_params(&*self.exec, &self.params)? {
            hasher.update(format!("{name} {}\n", tensor.desc()).as_bytes());
            hasher.update(tensor.bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Features of every record of `dataset`, which must be labelled.
    ///
    /// # Errors
    /// Damaged records; records without a label.
    pub fn extract(&mut self, dataset: &Dataset) -> Result<Features> {
        collect(self, dataset)
    }

    /// Hands the features of the `records` of `dataset` to `receive`, in order and a few at a time. The images of a
    /// batch are made while a device is at work on the one before.
    ///
    /// # Errors
    /// Damaged records; faults of the executor; what `receive` returns.
    pub fn stream(
        &mut self,
        dataset: &Dataset,
        records: &mut dyn Iterator<Item = usize>,
        view: View<'_>,
        receive: &mut Receiver<'_>,
    ) -> Result<()> {
        self.exec.watch(&[self.features])?;
        let dtype = self.exec.tape().desc(self.images).dtype;
        let mut images = vec![0f32; BATCH * self.augment.view_len()];
        let mut started = VecDeque::new();
        loop {
            let batch: Vec<usize> = records.take(BATCH).collect();
            if batch.is_empty() {
                return self.deliver(0, &mut started, receive);
            }
            let images = &mut images[..batch.len() * self.augment.view_len()];
            make_views(&self.augment, dataset, &batch, view, images)?;
            self.exec.stage(self.images, &dtype.encode_f32(images))?;
            self.exec.run_step()?;
            started.push_back(batch);
            self.deliver(IN_FLIGHT, &mut started, receive)?;
        }
    }

    /// Hands on what all batches but the newest `in_flight` gave.
    fn deliver(
        &mut self,
        in_flight: usize,
        started: &mut VecDeque<Vec<usize>>,
        receive: &mut Receiver<'_>,
    ) -> Result<()> {
        while let Some(results) = self.exec.collect(in_flight)? {
            let (Some(batch), Some(features)) = (started.pop_front(), results.first()) else { return Ok(()) };
            receive(&batch, &in_float32(features)[..batch.len() * self.dim])?;
        }
        Ok(())
    }
}

impl FeatureSource for FeatureExtractor {
    fn dim(&self) -> usize {
        self.dim
    }

    fn centres(
        &mut self,
        dataset: &Dataset,
        records: &mut dyn Iterator<Item = usize>,
        receive: &mut Receiver<'_>,
    ) -> Result<()> {
        self.stream(dataset, records, View::Centre, receive)
    }
}

/// The pixels themselves as features, resized and cut but not normalised: the floor that needs no network.
#[derive(Debug, Clone)]
pub struct Pixels {
    augment: AugmentConfig,
}

impl Pixels {
    /// In views of the size that `augment` says.
    pub fn new(augment: &AugmentConfig) -> Pixels {
        Pixels { augment: AugmentConfig { mean: [0.0; 3], std: [1.0; 3], ..augment.clone() } }
    }
}

impl FeatureSource for Pixels {
    fn dim(&self) -> usize {
        self.augment.view_len()
    }

    fn centres(
        &mut self,
        dataset: &Dataset,
        records: &mut dyn Iterator<Item = usize>,
        receive: &mut Receiver<'_>,
    ) -> Result<()> {
        let mut views = vec![0f32; BATCH * self.dim()];
        loop {
            let batch: Vec<usize> = records.take(BATCH).collect();
            if batch.is_empty() {
                return Ok(());
            }
            let views = &mut views[..batch.len() * self.augment.view_len()];
            make_views(&self.augment, dataset, &batch, View::Centre, views)?;
            receive(&batch, views)?;
        }
    }
}

/// The elements as float32, which holds those of 16 bits exactly.
fn in_float32(tensor: &HostTensor) -> Vec<f32> {
    tensor.to_f32().unwrap_or_else(|_| tensor.to_f64().into_iter().map(|value| value as f32).collect())
}

/// The class of every record.
///
/// # Errors
/// [`Error::Format`] when one has none, or one that the dataset does not name.
pub fn labels(dataset: &Dataset) -> Result<Vec<u32>> {
    let classes = dataset.classes().len();
    let label = |i| match dataset.label(i)? {
        Some(label) if (label as usize) < classes => Ok(label),
        Some(label) => {
            let what = format!("record {i} has label {label}, but the dataset names {classes} classes");
            Err(Error::format(dataset.path(), None, what))
        }
        None => {
            let what = format!("record {i} has no label, and this figure needs one for every image");
            Err(Error::format(dataset.path(), None, what)
                .with_hint("prepare the images with classes (folders, or a label file)"))
        }
    };
    (0..dataset.len()).map(label).collect()
}

/// Checks that two datasets have the same classes.
///
/// # Errors
/// [`Error::Format`] when they do not.
pub fn check_same_classes(dataset: &Dataset, other: &Dataset) -> Result<()> {
    if dataset.classes() == other.classes() {
        return Ok(());
    }
    let (classes, others) = (dataset.classes().len(), other.classes().len());
    let what = match classes == others {
        true => format!("its {classes} classes have other names than those of {}", other.path().display()),
        false => format!("it has {classes} classes, but {} has {others}", other.path().display()),
    };
    Err(Error::format(dataset.path(), None, what).with_hint("prepare both from folders of the same names"))
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
        check_same_classes(&queries, &bank)?;
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
        let mut pixels = Pixels::new(&self.extractor.augment);
        let (bank, queries) = (collect(&mut pixels, &self.bank)?, collect(&mut pixels, &self.queries)?);
        self.knn.evaluate(bank.labelled(), queries.labelled(), bank.dim, self.bank.classes().len())
    }
}

impl Probe for KnnProbe {
    fn measure(&mut self, params: &NamedTensors) -> Result<f64> {
        self.extractor.load(params)?;
        Ok(self.evaluate()?.top1)
    }
}
