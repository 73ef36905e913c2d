//! What another program, or a person, needs to know to use the weights.

use std::collections::BTreeMap;

use crate::export::source::Source;
use crate::nn::heads::Heads;
use crate::nn::resnet::ResNet;
use crate::train::metrics::Line;
use crate::train::trained::Origin;

/// The engine that wrote a file.
pub const ENGINE: &str = concat!("simsiam-engine ", env!("CARGO_PKG_VERSION"));

/// Facts under a title: key and value.
pub type Section = (&'static str, Vec<(&'static str, String)>);

/// All facts, by section.
pub fn sections(source: &Source) -> Vec<Section> {
    vec![
        ("Network", network(source)),
        ("Input", input(source)),
        ("Training", training(source)),
        ("Figures", figures(&source.metrics)),
    ]
}

/// All facts as the metadata of a file.
pub fn metadata(source: &Source) -> BTreeMap<String, String> {
    let facts = sections(source).into_iter().flat_map(|(_, facts)| facts);
    facts.map(|(key, value)| (key.to_string(), value)).collect()
}

fn network(source: &Source) -> Vec<(&'static str, String)> {
    let backbone = &source.model.backbone;
    let ResNet { block, depths, width, stem } = backbone;
    let mut facts = vec![
        ("arch", backbone.arch().to_string()),
        ("block", format!("{block:?}").to_lowercase()),
        ("depths", joined(depths)),
        ("width", width.to_string()),
        ("stem", format!("{stem:?}").to_lowercase()),
        ("feature_dim", backbone.feature_dim().to_string()),
    ];
    if source.heads {
        let Heads { dim, projector_hidden, predictor_hidden, projector_layers, .. } = source.model.heads;
        facts.extend([
            ("dim", dim.to_string()),
            ("projector_layers", projector_layers.to_string()),
            ("projector_hidden", projector_hidden.to_string()),
            ("predictor_hidden", predictor_hidden.to_string()),
        ]);
    }
    facts
}

fn input(source: &Source) -> Vec<(&'static str, String)> {
    let augment = &source.augment;
    vec![
        ("layout", "float32 [n, 3, height, width], RGB in 0..1, minus mean, divided by std".into()),
        ("image_size", augment.image_size.to_string()),
        ("mean", joined(&augment.mean)),
        ("std", joined(&augment.std)),
    ]
}

fn training(source: &Source) -> Vec<(&'static str, String)> {
    let Source { origin, step, dataset, .. } = source;
    let config = match origin {
        Origin::Run(_, config) => config,
        Origin::File { name, blake3 } => {
            return vec![("imported_from", name.clone()), ("blake3", blake3.clone()), ("engine", ENGINE.into())];
        }
    };
    let file = config.data.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let recipe = &config.recipe;
    let mut facts = vec![("method", "SimSiam".into()), ("dataset", file)];
    facts.extend(dataset.iter().map(|identity| ("dataset_id", identity.clone())));
    facts.extend([
        ("epochs", recipe.epochs.to_string()),
        ("step", step.to_string()),
        ("batch", recipe.batch.to_string()),
        ("base_lr", recipe.base_lr.to_string()),
        ("warmup_epochs", recipe.warmup_epochs.to_string()),
        ("momentum", recipe.momentum.to_string()),
        ("weight_decay", recipe.weight_decay.to_string()),
        ("dtype", format!("{:?}", config.machine.dtype).to_lowercase()),
        ("seed", config.seed.to_string()),
        ("engine", ENGINE.into()),
    ]);
    facts
}

/// The last of each figure, with the step it was measured at where that is not the last one logged.
fn figures(metrics: &[Line]) -> Vec<(&'static str, String)> {
    let Some(last) = metrics.last() else { return Vec::new() };
    let newest = |figure: fn(&Line) -> Option<f64>| {
        let line = metrics.iter().rev().find(|line| figure(line).is_some())?;
        let value = format!("{:.4}", figure(line)?);
        Some(if line.step == last.step { value } else { format!("{value} at step {}", line.step) })
    };
    let mut facts = vec![("loss", format!("{:.4}", last.loss)), ("z_std", format!("{:.4}", last.z_std))];
    facts.extend(newest(|line| line.effective_rank).map(|value| ("effective_rank", value)));
    facts.extend(newest(|line| line.knn).map(|value| ("knn_top1", value)));
    facts
}

fn joined<T: ToString>(values: &[T]) -> String {
    values.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::metrics::Timing;

    #[test]
    fn figures_are_the_last_measured_ones() {
        let line = |step, loss, knn, effective_rank| Line {
            step,
            epoch: 0,
            loss,
            z_std: 0.5,
            effective_rank,
            lr: 0.1,
            predictor_lr: 0.1,
            knn,
            timing: Timing::default(),
        };
        let metrics =
            [line(3, -0.5, Some(0.3), None), line(7, -0.75, Some(0.41), Some(9.5)), line(11, -0.8125, None, None)];
        let expected = [
            ("loss", "-0.8125"),
            ("z_std", "0.5000"),
            ("effective_rank", "9.5000 at step 7"),
            ("knn_top1", "0.4100 at step 7"),
        ];
        assert_eq!(figures(&metrics), expected.map(|(key, value)| (key, value.to_string())));
        assert!(figures(&[]).is_empty());
    }
}
