//! What other programs call the tensors that PyTorch's `state_dict` of SimSiam names.

/// Where the backbone lies in a SimSiam `state_dict`.
const ENCODER: &str = "encoder.";

/// torchvision's and timm's name of a tensor of the backbone: `encoder.layer1.0.bn2.bias` is `layer1.0.bn2.bias`.
pub fn torchvision(name: &str) -> String {
    name.strip_prefix(ENCODER).unwrap_or(name).to_string()
}

/// detectron2's name: `encoder.layer1.0.bn2.bias` is `res2.0.conv2.norm.bias`. Stages count from 2, the stem is a module of its
/// own, a batch norm belongs to its convolution, and the shortcut is called that.
pub fn detectron2(name: &str) -> String {
    let name = torchvision(name);
    let staged = name.strip_prefix("layer").and_then(|rest| {
        let (stage, rest) = rest.split_once('.')?;
        let (block, tensor) = rest.split_once('.')?;
        Some(format!("res{}.{block}.{}", stage.parse::<usize>().ok()? + 1, in_block(tensor)))
    });
    staged.unwrap_or_else(|| format!("stem.{}", in_block(&name)))
}

/// Within a block: `bn2.bias` is `conv2.norm.bias`, `downsample.0.weight` is `shortcut.weight`.
fn in_block(name: &str) -> String {
    for (ours, theirs) in [("downsample.0.", "shortcut."), ("downsample.1.", "shortcut.norm.")] {
        if let Some(tensor) = name.strip_prefix(ours) {
            return format!("{theirs}{tensor}");
        }
    }
    match name.strip_prefix("bn").and_then(|rest| rest.split_once('.')) {
        Some((number, tensor)) => format!("conv{number}.norm.{tensor}"),
        None => name.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_name_has_one_in_detectron2() {
        assert_eq!(torchvision("encoder.layer1.0.bn2.bias"), "layer1.0.bn2.bias");
        for (ours, theirs) in [
            ("encoder.conv1.weight", "stem.conv1.weight"),
            ("encoder.bn1.running_var", "stem.conv1.norm.running_var"),
            ("encoder.layer1.0.conv1.weight", "res2.0.conv1.weight"),
            ("encoder.layer3.22.bn3.num_batches_tracked", "res4.22.conv3.norm.num_batches_tracked"),
            ("encoder.layer4.0.downsample.0.weight", "res5.0.shortcut.weight"),
            ("encoder.layer4.0.downsample.1.bias", "res5.0.shortcut.norm.bias"),
        ] {
            assert_eq!(detectron2(ours), theirs);
        }
    }
}
