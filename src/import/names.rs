//! Names of other programs' tensors as the engine's: `encoder.<torchvision name>`, `encoder.fc.<i>` the projector,
//! `predictor.<i>`.

use std::collections::BTreeMap;

/// Where the engine has its backbone.
const ENCODER: &str = "encoder.";
/// Where the projector is inside of it; torchvision's classifier has the same place.
const HEAD: &str = "fc.";
const PREDICTOR: &str = "predictor.";
/// The tensor that every ResNet has, and no other place of it.
const STEM: &str = "conv1.weight";
/// Backbones that are preferred where a file has several, by the end of their prefix: MoCo's copy is a moving average.
const PREFERRED: [&str; 4] = ["encoder.", "encoder_q.", "backbone.", "module."];

/// How the names of a file correspond to the engine's.
#[derive(Debug, Default)]
pub struct Names {
    /// The file's name for each of the engine's.
    pub engine: BTreeMap<String, String>,
    /// What is left out and why.
    pub skipped: Vec<(String, &'static str)>,
    /// What the backbone's names begin with in the file.
    pub prefix: String,
}

impl Names {
    /// Sorts the names of a file; `None` when there is no ResNet among them.
    pub fn of<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Option<Names> {
        let prefix = backbone_prefix(names.clone())?;
        let simsiam = prefix.strip_suffix(ENCODER);
        let has_projector = simsiam.is_some() && names.clone().any(|name| name == format!("{prefix}{HEAD}0.weight"));
        let mut sorted = Names { prefix: prefix.to_string(), ..Names::default() };
        for name in names {
            let within = name.strip_prefix(prefix);
            let predictor = simsiam.and_then(|outer| name.strip_prefix(outer)).filter(|n| n.starts_with(PREDICTOR));
            match (within, predictor) {
                (Some(rest), _) if rest.starts_with(HEAD) && !has_projector => {
                    sorted.skip(name, "a classifier or a head of another method");
                }
                (Some(rest), _) if prefix.is_empty() && is_other_module(rest) => {
                    sorted.skip(name, "outside of the backbone")
                }
                (Some(rest), _) => _ = sorted.engine.insert(format!("{ENCODER}{rest}"), name.to_string()),
                (None, Some(name_of_ours)) => _ = sorted.engine.insert(name_of_ours.to_string(), name.to_string()),
                (None, None) => sorted.skip(name, "outside of the backbone"),
            }
        }
        Some(sorted)
    }

    /// Leaves the heads out.
    pub fn skip_heads(&mut self) {
        let (backbone, heads) = std::mem::take(&mut self.engine).into_iter().partition(|(ours, _)| is_backbone(ours));
        self.engine = backbone;
        let heads: BTreeMap<String, String> = heads;
        self.skipped.extend(heads.into_values().map(|theirs| (theirs, "only the backbone is taken")));
    }

    fn skip(&mut self, name: &str, reason: &'static str) {
        self.skipped.push((name.to_string(), reason));
    }
}

/// Whether a name of the engine belongs to the backbone.
pub fn is_backbone(name: &str) -> bool {
    name.strip_prefix(ENCODER).is_some_and(|rest| !rest.starts_with(HEAD))
}

/// Whether a name of a file ends as that of a projector's bias: the only bias that belongs to no batch norm and is not trained.
pub fn is_projector_out_bias(name: &str) -> bool {
    let mut parts = name.rsplit('.');
    let [last, index, head] = [parts.next(), parts.next(), parts.next()].map(Option::unwrap_or_default);
    last == "bias" && head == "fc" && matches!(index, "3" | "6")
}

/// Without a prefix everything seems to be in the backbone; what lies there as a module of another name does not.
fn is_other_module(name: &str) -> bool {
    let known = ["conv1.", "bn1.", "layer", HEAD];
    !known.iter().any(|start| name.starts_with(start))
}

/// What stands before `conv1.weight` of the stem: the prefix that is preferred, or else the shortest.
fn backbone_prefix<'a>(names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let prefix = |name: &'a str| {
        let prefix = name.strip_suffix(STEM)?;
        let whole_part = prefix.is_empty() || prefix.ends_with('.');
        // Blocks have a conv1 too: layer1.0.conv1.
        let in_block = prefix.trim_end_matches('.').rsplit('.').next().is_some_and(|part| part.parse::<u32>().is_ok());
        (whole_part && !in_block).then_some(prefix)
    };
    let rank = |prefix: &&str| {
        let preferred = PREFERRED.iter().position(|end| prefix.ends_with(end));
        (preferred.unwrap_or(PREFERRED.len()), prefix.len())
    };
    names.filter_map(prefix).min_by_key(rank)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(names: &[&str]) -> (Vec<String>, Vec<String>, String) {
        let found = Names::of(names.iter().copied()).unwrap();
        let pairs = found.engine.iter().map(|(ours, theirs)| format!("{theirs} > {ours}")).collect();
        (pairs, found.skipped.into_iter().map(|(name, _)| name).collect(), found.prefix)
    }

    #[test]
    fn the_reference_has_a_projector_in_the_place_of_fc() {
        let names = [
            "module.encoder.conv1.weight",
            "module.encoder.layer1.0.conv1.weight",
            "module.encoder.fc.0.weight",
            "module.predictor.3.bias",
            "module.queue",
        ];
        let (pairs, skipped, prefix) = sorted(&names);
        let expected = [
            "module.encoder.conv1.weight > encoder.conv1.weight",
            "module.encoder.fc.0.weight > encoder.fc.0.weight",
            "module.encoder.layer1.0.conv1.weight > encoder.layer1.0.conv1.weight",
            "module.predictor.3.bias > predictor.3.bias",
        ];
        assert_eq!(pairs, expected);
        assert_eq!((skipped, prefix.as_str()), (vec!["module.queue".to_string()], "module.encoder."));
    }

    #[test]
    fn classifiers_and_other_methods_heads_stay_behind() {
        for prefix in ["", "module.", "model.backbone.", "module.encoder_q."] {
            let names =
                ["conv1.weight", "layer2.1.conv1.weight", "fc.weight", "fc.0.weight"].map(|n| format!("{prefix}{n}"));
            let (pairs, skipped, found) = sorted(&names.each_ref().map(String::as_str));
            assert_eq!((pairs.len(), skipped.len(), found.as_str()), (2, 2, prefix), "{pairs:?}");
        }
        let moco = ["module.encoder_k.conv1.weight", "module.encoder_q.conv1.weight", "module.queue"];
        assert_eq!(sorted(&moco).0, ["module.encoder_q.conv1.weight > encoder.conv1.weight"]);
    }

    #[test]
    fn what_is_no_resnet_is_said_so() {
        for names in [&["layer1.0.conv1.weight"][..], &["myconv1.weight"], &["blocks.0.attn.qkv.weight"], &[]] {
            assert!(Names::of(names.iter().copied()).is_none(), "{names:?}");
        }
        assert!(is_projector_out_bias("module.encoder.fc.6.bias") && !is_projector_out_bias("encoder.fc.7.bias"));
        assert!(!is_projector_out_bias("predictor.3.bias") && !is_projector_out_bias("bias"));
    }
}
