//! What network a file holds, read off the shapes of its tensors.

use std::collections::BTreeMap;
use std::fmt;

use clap::ValueEnum;

use crate::error::Result;
use crate::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use crate::nn::resnet::{Arch, Block, ResNet, Stem};
use crate::nn::simsiam::{SimSiam, TrainGraph};
use crate::ops::similarity::Kind;
use crate::tensor::{DType, Shape};

/// A step of any size names the parameters; this one is small.
const BATCH: usize = 2;
const IMAGE_SIZE: usize = 32;

/// A backbone, and the heads if there are any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The backbone.
    pub backbone: ResNet,
    /// Projector and predictor.
    pub heads: Option<Heads>,
}

impl Network {
    /// The network whose tensors have these shapes under the engine's names; `trained_bias` says that the bias of the
    /// projector's last layer is trained. `None` where there is no such ResNet. What else differs from it shows when the
    /// tensors are fitted to it.
    pub fn detect(shapes: &BTreeMap<&str, Shape>, trained_bias: bool) -> Option<Network> {
        let found = Found(shapes);
        let [width, _, kernel, _] = found.dims("encoder.conv1.weight")?;
        let stem = if kernel == 7 { Stem::Imagenet } else { Stem::Cifar };
        let block = if found.has("encoder.layer1.0.conv3.weight") { Block::Bottleneck } else { Block::Basic };
        let has_block = |stage: usize, i: usize| found.has(&format!("encoder.layer{stage}.{i}.conv1.weight"));
        let depth = |stage: usize| (0..).take_while(|i| has_block(stage, *i)).count();
        let depths: Vec<usize> = (1..).map(depth).take_while(|depth| *depth > 0).collect();
        let backbone = ResNet { block, depths, width, stem };
        backbone.validate().ok()?;
        let heads = found.heads(trained_bias).filter(|heads| heads.validate().is_ok());
        Some(Network { backbone, heads })
    }

    /// A model of this network; without heads its heads are arbitrary.
    pub fn model(&self) -> SimSiam {
        let arbitrary = Heads {
            dim: 4,
            projector_hidden: 4,
            predictor_hidden: 4,
            projector_layers: 3,
            projector_out_affine: false,
            projector_out_bias: OutBias::None,
            norm: HeadNorm::Default,
            predictor: PredictorKind::None,
        };
        SimSiam {
            backbone: self.backbone.clone(),
            heads: self.heads.clone().unwrap_or(arbitrary),
            similarity: Kind::Cosine,
            stop_gradient: true,
            symmetric: true,
        }
    }

    /// The options of `train` that ask for this network.
    pub fn options(&self) -> String {
        let ResNet { block, depths, width, stem } = &self.backbone;
        let (stem, block) = (value_name(stem), value_name(block));
        let mut options = match named(&self.backbone) {
            Some(arch) => format!("--arch {arch} --stem {stem}"),
            None => {
                let depths: Vec<String> = depths.iter().map(usize::to_string).collect();
                format!("--arch custom --block {block} --depths {} --width {width} --stem {stem}", depths.join(","))
            }
        };
        if let Some(heads) = &self.heads {
            let Heads { dim, projector_hidden, predictor_hidden, projector_layers, .. } = heads;
            options +=
                &format!(" --dim {dim} --projector-hidden {projector_hidden} --projector-layers {projector_layers}");
            options += &format!(" --predictor-hidden {predictor_hidden}");
            if heads.projector_out_affine {
                options += " --projector-out-affine";
            }
            if heads.norm != HeadNorm::Default {
                options += &format!(" --head-bn {}", value_name(&heads.norm));
            }
            if heads.predictor == PredictorKind::None {
                options += " --predictor none";
            }
        }
        options
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ResNet { block, depths, width, stem } = &self.backbone;
        match named(&self.backbone) {
            Some(arch) => write!(f, "{arch}")?,
            None => write!(f, "ResNet of {} blocks {depths:?}, width {width}", value_name(block))?,
        }
        write!(f, ", {} stem; ", value_name(stem))?;
        let Some(heads) = &self.heads else { return write!(f, "no heads") };
        let bias = match heads.projector_out_bias {
            OutBias::None => "",
            OutBias::Frozen => ", with a frozen bias",
            OutBias::Trained => ", with a trained bias",
        };
        let hidden = format!("{}-", heads.projector_hidden).repeat(heads.projector_layers - 1);
        write!(f, "projector {}-{hidden}{}{bias}", self.backbone.feature_dim(), heads.dim)?;
        match heads.predictor {
            PredictorKind::None => write!(f, "; no predictor"),
            _ => write!(f, "; predictor {}-{}-{}", heads.dim, heads.predictor_hidden, heads.dim),
        }
    }
}

/// A step of a model, for the names and shapes of its parameters.
///
/// # Errors
/// Settings that do not fit together.
pub fn graph(model: &SimSiam) -> Result<TrainGraph> {
    model.train_graph(BATCH, IMAGE_SIZE, DType::F32, false)
}

fn named(resnet: &ResNet) -> Option<String> {
    let arch = Arch::value_variants().iter().find(|arch| ResNet::named(**arch, resnet.stem).as_ref() == Some(resnet));
    arch.map(value_name)
}

fn value_name<T: ValueEnum>(value: &T) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
}

struct Found<'a>(&'a BTreeMap<&'a str, Shape>);

impl Found<'_> {
    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn dims<const R: usize>(&self, name: &str) -> Option<[usize; R]> {
        self.0.get(name)?.dims().try_into().ok()
    }

    fn heads(&self, trained_bias: bool) -> Option<Heads> {
        let linear = |layer: usize| self.dims::<2>(&format!("encoder.fc.{}.weight", 3 * layer));
        let projector_layers = (0..).take_while(|layer| linear(*layer).is_some()).count();
        let last = 3 * projector_layers.checked_sub(1)?;
        let ([projector_hidden, _], [dim, _]) = (linear(0)?, linear(projector_layers - 1)?);
        let normed = |name: &str| self.has(&format!("{name}.running_mean"));
        let norm = match (normed("encoder.fc.1"), normed(&format!("encoder.fc.{}", last + 1)), normed("predictor.4")) {
            (false, ..) => HeadNorm::None,
            (true, false, _) => HeadNorm::Hidden,
            (true, true, false) => HeadNorm::Default,
            (true, true, true) => HeadNorm::All,
        };
        let predictor = self.dims::<2>("predictor.0.weight");
        Some(Heads {
            dim,
            projector_hidden,
            predictor_hidden: predictor.map_or(dim, |[hidden, _]| hidden),
            projector_layers,
            projector_out_affine: self.has(&format!("encoder.fc.{}.weight", last + 1)),
            projector_out_bias: match norm {
                // There the layer has a bias in any case.
                HeadNorm::None | HeadNorm::Hidden => OutBias::None,
                _ if !self.has(&format!("encoder.fc.{last}.bias")) => OutBias::None,
                _ if trained_bias => OutBias::Trained,
                _ => OutBias::Frozen,
            },
            norm,
            predictor: if predictor.is_some() { PredictorKind::Mlp } else { PredictorKind::None },
        })
    }
}
