//! The choice of what is fused with convolutions, how batch norm is computed behind them, and the defaults.

use std::fmt::{self, Display};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::choice::written_as_text;
use crate::exec::Device;
use crate::nn::epilogues::{Epilogues, Layers, ResidualGradient};
use crate::tensor::DType;

/// Compute capabilities for which cuDNN has a precompiled convolution with statistics.
const PRECOMPILED: [[u32; 2]; 2] = [[8, 0], [9, 0]];

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EpilogueChoice {
    /// Convolutions that compute the statistics for the batch norm after them.
    pub fuse_statistics: FuseStatistics,
    /// How the gradients of residual branches are added.
    #[serde(default)]
    pub residual_gradient: ResidualGradient,
    /// Whether the stem's batch norm and the max pooling behind it are one op. It saves 2 % of the memory traffic of a ResNet-50; in its
    /// first form it cost 0.6 % of the time on an H100 (batch 256), so it has to be asked for.
    #[serde(default)]
    pub fuse_pooling: bool,
    /// Whether the last batch norm of a block and that of its projection shortcut are one op. It changes no bit and takes 4 % of a
    /// ResNet-50's memory traffic away.
    #[serde(default = "fused")]
    pub fuse_shortcut: bool,
    /// How batch norm of the 1x1 convolutions to more channels is computed.
    #[serde(default)]
    pub bn: NormChoice,
}

fn fused() -> bool {
    true
}

impl Default for EpilogueChoice {
    fn default() -> EpilogueChoice {
        EpilogueChoice {
            fuse_statistics: FuseStatistics::default(),
            residual_gradient: ResidualGradient::default(),
            fuse_pooling: false,
            fuse_shortcut: fused(),
            bn: NormChoice::default(),
        }
    }
}

impl EpilogueChoice {
    /// What it comes to on `device`, with activations of `dtype`.
    pub fn resolve(&self, device: &Device, dtype: DType) -> Epilogues {
        self.resolve_for(Processor::of(device), dtype)
    }

    /// The same on a kind of device.
    pub fn resolve_for(&self, on: Processor, dtype: DType) -> Epilogues {
        let statistics = match &self.fuse_statistics {
            FuseStatistics::Layers(layers) => layers.clone(),
            FuseStatistics::Auto => measured_faster(on, dtype),
        };
        Epilogues {
            statistics,
            gram: self.bn.layers(on),
            residual_gradient: self.residual_gradient.clone(),
            pooling: self.fuse_pooling,
            shortcut: self.fuse_shortcut,
        }
    }
}

/// What the best choice depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// The CPU.
    Cpu,
    /// A CUDA device of this compute capability; an emulated one has none.
    Gpu(Option<[u32; 2]>),
}

impl Processor {
    fn of(device: &Device) -> Processor {
        match device {
            Device::Cpu(_) => Processor::Cpu,
            Device::Cuda(driver) => Processor::Gpu(driver.capability()),
        }
    }
}

/// Measured on an H100 (ResNet-50, batch 256): in float16 cuDNN's precompiled convolution with statistics takes 3 to 15 % more
/// time than the convolution alone, and the pass over its result that it saves 70 to 100 %. Only compute capabilities 8.0 and
/// 9.0 have it, and not for a 7x7 kernel on 8.0 (`tests/cudnn_plans.rs`). For bfloat16 there are only engines that are compiled
/// at run time, and they take 2 to 4 times as long as the convolution: the pass of our own is faster.
fn measured_faster(on: Processor, dtype: DType) -> Layers {
    match on {
        Processor::Gpu(Some(capability)) if dtype == DType::F16 && PRECOMPILED.contains(&capability) => {
            Layers::Ordinary
        }
        _ => Layers::NONE,
    }
}

/// Convolutions that compute the statistics for the batch norm after them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum FuseStatistics {
    /// Where convolutions alone were measured to be faster with them than with a pass over their results.
    Auto,
    /// These.
    Layers(Layers),
}

impl Default for FuseStatistics {
    /// None: the gain in whole steps is yet to be measured.
    fn default() -> FuseStatistics {
        FuseStatistics::Layers(Layers::NONE)
    }
}

impl FromStr for FuseStatistics {
    type Err = String;

    fn from_str(text: &str) -> Result<FuseStatistics, String> {
        match text {
            "auto" => Ok(FuseStatistics::Auto),
            _ => text.parse().map(FuseStatistics::Layers),
        }
    }
}

impl Display for FuseStatistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FuseStatistics::Auto => f.write_str("auto"),
            FuseStatistics::Layers(layers) => layers.fmt(f),
        }
    }
}

written_as_text!(FuseStatistics);

/// How batch norm of the 1x1 convolutions to more channels is computed (`ops::gram_norm`).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NormChoice {
    /// From their results.
    #[default]
    Standard,
    /// From the covariance of their inputs, in these layers.
    Gram(Layers),
    /// Whichever was measured to be faster.
    Auto,
}

impl NormChoice {
    /// The layers whose results are never formed. Automatically, on a CPU: those of up to 128 input channels, with which a step
    /// of a ResNet-50 (224 pixels, batch 8, 2 cores of a Zen 4) takes 6 % less time, while with all of them it takes 9 % more
    /// (and 5 % less at batch 24): the products of the wide ones' weights pay with many rows only. On a GPU whole steps are yet to be measured.
    pub fn layers(&self, on: Processor) -> Layers {
        match (self, on) {
            (NormChoice::Gram(layers), _) => layers.clone(),
            (NormChoice::Auto, Processor::Cpu) => Layers::Narrow,
            (NormChoice::Standard | NormChoice::Auto, _) => Layers::NONE,
        }
    }
}

impl FromStr for NormChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<NormChoice, String> {
        match text.split_once(':').unwrap_or((text, "all")) {
            ("standard", "all") => Ok(NormChoice::Standard),
            ("auto", "all") => Ok(NormChoice::Auto),
            ("gram", layers) => layers.parse().map(NormChoice::Gram),
            _ => Err(format!("expected standard, gram, gram:LAYERS or auto, got {text:?}")),
        }
    }
}

impl Display for NormChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NormChoice::Standard => f.write_str("standard"),
            NormChoice::Gram(Layers::All) => f.write_str("gram"),
            NormChoice::Gram(layers) => write!(f, "gram:{layers}"),
            NormChoice::Auto => f.write_str("auto"),
        }
    }
}

written_as_text!(NormChoice);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Tier;

    #[test]
    fn the_default_is_what_was_measured_to_be_faster() {
        for capability in [[8, 0], [9, 0]] {
            let gpu = Processor::Gpu(Some(capability));
            assert_eq!(measured_faster(gpu, DType::F16), Layers::Ordinary);
            assert_eq!(measured_faster(gpu, DType::Bf16), Layers::NONE);
            assert_eq!(measured_faster(gpu, DType::F32), Layers::NONE);
        }
        for capability in [None, Some([8, 6]), Some([8, 9]), Some([10, 0])] {
            assert_eq!(measured_faster(Processor::Gpu(capability), DType::F16), Layers::NONE);
            assert_eq!(NormChoice::Auto.layers(Processor::Gpu(capability)), Layers::NONE);
        }
        assert_eq!(measured_faster(Processor::Cpu, DType::F16), Layers::NONE);
        assert_eq!(NormChoice::Auto.layers(Processor::Cpu), Layers::Narrow);
    }

    #[test]
    fn only_the_default_asks_the_device() {
        let cpu = Device::Cpu(Tier::Direct);
        let choice =
            |text: &str| EpilogueChoice { fuse_statistics: text.parse().unwrap(), ..EpilogueChoice::default() };
        assert_eq!(choice("auto").resolve(&cpu, DType::F16), Epilogues::default());
        assert_eq!(choice("all").resolve(&cpu, DType::F32).statistics, Layers::All);
        assert_eq!(EpilogueChoice::default().resolve(&cpu, DType::F16), Epilogues::default());
    }

    #[test]
    fn choices_survive_the_configuration() {
        for (statistics, bn, gradient) in [
            ("auto", "standard", "accumulate"),
            ("all", "gram", "separate:a.b,c"),
            ("encoder.layer1,x", "gram:encoder.layer2,y", "fused"),
            ("none", "auto", "separate"),
        ] {
            let (fuse_statistics, residual_gradient) = (statistics.parse().unwrap(), gradient.parse().unwrap());
            let (fuse_pooling, fuse_shortcut) = (true, bn != "gram");
            let bn = bn.parse().unwrap();
            let choice = EpilogueChoice { fuse_statistics, bn, residual_gradient, fuse_pooling, fuse_shortcut };
            let text = toml::to_string(&choice).unwrap();
            assert!([statistics, gradient].iter().all(|one| text.contains(one)), "{text}");
            assert_eq!(toml::from_str::<EpilogueChoice>(&text).unwrap(), choice);
            // Runs from before there was a choice.
            let without = text.lines().filter(|line| !line.starts_with("fuse_shortcut")).collect::<Vec<_>>().join("\n");
            assert!(toml::from_str::<EpilogueChoice>(&without).unwrap().fuse_shortcut);
        }
    }
}
