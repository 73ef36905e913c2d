//! The trained backbone for other programs: safetensors with torchvision's ResNet names.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::tensor::HostTensor;
use crate::tensor::safetensors::{self, NamedTensors};

/// Where the backbone lies in a SimSiam `state_dict`, and the projector inside it.
const ENCODER: &str = "encoder.";
const PROJECTOR: &str = "fc.";

/// Writes the backbone among `tensors` (`state_dict` names, PyTorch layouts: OIHW convolutions) to `path`, atomically, then
/// reads the file back and compares. `encoder.` is stripped; projector (`encoder.fc.*`), predictor and optimiser state
/// stay behind. Load it with `model.load_state_dict(safetensors.torch.load_file(path), strict=False)` into a torchvision
/// ResNet: only `fc.*` is missing. Returns the number of tensors written.
///
/// # Errors
/// [`Error::Mismatch`] when there is no backbone among the tensors or the file does not hold what was written, [`Error::Io`]
/// when it cannot be written.
pub fn write_backbone(path: &Path, tensors: NamedTensors, metadata: &BTreeMap<String, String>) -> Result<usize> {
    let backbone: NamedTensors = tensors.into_iter().filter_map(backbone_entry).collect();
    if backbone.is_empty() {
        return Err(Error::Mismatch(format!("nothing to export: no tensor is named {ENCODER}*")));
    }
    let mut metadata = metadata.clone();
    metadata.insert("format".into(), "pt".into()); // what Python loaders look for
    safetensors::write(path, &backbone, &metadata)?;
    let (stored, stored_metadata) = safetensors::read(path)?;
    if stored_metadata != metadata || !same_bits(&stored, &backbone) {
        return Err(Error::Mismatch(format!("{}: reading the export back gave other content", path.display())));
    }
    Ok(backbone.len())
}

fn backbone_entry((name, tensor): (String, HostTensor)) -> Option<(String, HostTensor)> {
    let name = name.strip_prefix(ENCODER)?;
    (!name.starts_with(PROJECTOR)).then(|| (name.to_string(), tensor))
}

/// Bit for bit, so that a NaN equals itself.
fn same_bits(a: &NamedTensors, b: &NamedTensors) -> bool {
    let same = |x: &HostTensor, y: &HostTensor| x.desc() == y.desc() && x.bytes() == y.bytes();
    a.len() == b.len() && a.iter().zip(b).all(|(x, y)| x.0 == y.0 && same(x.1, y.1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{DType, TensorDesc};

    fn state_dict() -> NamedTensors {
        let float = |n: usize| HostTensor::from_f32([n], &vec![n as f32; n]).unwrap();
        let counter = HostTensor::from_bytes(TensorDesc::new([], DType::I64), 6_i64.to_le_bytes().to_vec()).unwrap();
        let named = [
            ("encoder.conv1.weight", HostTensor::from_f32([2, 1, 1, 3], &[1.0, 2.0, 3.0, 4.0, f32::NAN, 6.0]).unwrap()),
            ("encoder.layer1.0.bn2.running_var", float(4)),
            ("encoder.layer1.0.bn2.num_batches_tracked", counter),
            ("encoder.fc.0.weight", float(5)),
            ("predictor.0.weight", float(6)),
            ("momentum/encoder.conv1.weight", float(7)),
        ];
        named.into_iter().map(|(name, tensor)| (name.to_string(), tensor)).collect()
    }

    #[test]
    fn keeps_the_backbone_under_torchvision_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("backbone.safetensors");
        let metadata = BTreeMap::from([("arch".to_string(), "resnet18".to_string())]);
        assert_eq!(write_backbone(&path, state_dict(), &metadata).unwrap(), 3);
        let bytes = std::fs::read(&path).unwrap();
        let stored = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let mut names = stored.names();
        names.sort();
        assert_eq!(names, ["conv1.weight", "layer1.0.bn2.num_batches_tracked", "layer1.0.bn2.running_var"]);
        assert_eq!(stored.tensor("conv1.weight").unwrap().shape(), [2, 1, 1, 3]);
        assert!(stored.tensor("layer1.0.bn2.num_batches_tracked").unwrap().shape().is_empty());
        let (_, read) = safetensors::read(&path).unwrap();
        assert_eq!((read["arch"].as_str(), read["format"].as_str()), ("resnet18", "pt"));
    }

    #[test]
    fn no_backbone_is_an_error_and_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("backbone.safetensors");
        let mut heads = state_dict();
        heads.retain(|name, _| !name.starts_with("encoder.") || name.contains(".fc."));
        let message = write_backbone(&path, heads, &BTreeMap::new()).unwrap_err().to_string();
        assert!(message.contains("no tensor is named encoder.*") && !path.exists(), "{message}");
    }
}
