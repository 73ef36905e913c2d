//! The networks have torchvision's tensors, by name, shape and number.

use std::path::Path;

use simsiam_engine::graph::{Role, Tape};
use simsiam_engine::nn::builder::{Builder, Mode};
use simsiam_engine::nn::heads::{HeadNorm, Heads, OutBias, PredictorKind};
use simsiam_engine::nn::resnet::{Arch, ResNet, Stem};
use simsiam_engine::nn::simsiam::{SimSiam, TrainGraph};
use simsiam_engine::ops::similarity::Kind;
use simsiam_engine::tensor::{DType, TensorDesc};

/// The model with the reference's heads.
fn simsiam(arch: Arch) -> SimSiam {
    let backbone = ResNet::named(arch, Stem::Imagenet).unwrap();
    let heads = Heads {
        dim: 2048,
        projector_hidden: backbone.feature_dim(),
        predictor_hidden: 512,
        projector_layers: 3,
        projector_out_affine: false,
        projector_out_bias: OutBias::None,
        norm: HeadNorm::Default,
        predictor: PredictorKind::Mlp,
    };
    SimSiam { backbone, heads, similarity: Kind::Cosine, stop_gradient: true, symmetric: true }
}

fn graph(model: &SimSiam) -> TrainGraph {
    model.train_graph(2, 32, DType::F32, false).unwrap()
}

fn trainable(model: &SimSiam) -> usize {
    let graph = graph(model);
    let trained = graph.params.iter().filter(|p| p.trainable);
    let count = trained.clone().map(|p| p.desc.shape.len()).sum();
    assert_eq!(trained.count(), graph.momenta.len(), "every trainable parameter is trained");
    count
}

#[test]
fn resnet50_has_as_many_trainable_parameters_as_the_reference() {
    let mut model = simsiam(Arch::Resnet50);
    assert_eq!(trainable(&model), 38_199_360);
    model.heads.projector_out_bias = OutBias::Frozen;
    assert_eq!(trainable(&model), 38_199_360, "a frozen bias is no trainable parameter");
    model.heads.projector_out_affine = true;
    assert_eq!(trainable(&model), 38_199_360 + 2 * 2048);
}

#[test]
fn backbones_are_torchvisions() {
    for (arch, name, parameters) in [
        (Arch::Resnet18, "resnet18", 11_176_512),
        (Arch::Resnet34, "resnet34", 21_284_672),
        (Arch::Resnet50, "resnet50", 23_508_032),
        (Arch::Resnet101, "resnet101", 42_500_160),
    ] {
        let TrainGraph { tape, params, .. } = graph(&simsiam(arch));
        let backbone = || {
            let stripped = params.iter().filter_map(|p| Some((p.name.strip_prefix("encoder.")?, p)));
            stripped.filter(|(name, _)| !name.starts_with("fc."))
        };
        let weights = backbone().filter(|(_, p)| tape.value(p.value).role == Role::Parameter);
        assert_eq!(weights.map(|(_, p)| p.desc.shape.len()).sum::<usize>(), parameters, "{name}");

        let mut tensors: Vec<String> = backbone().map(|(name, p)| format!("{name} {}", p.torch_shape())).collect();
        tensors.sort();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/torchvision-names/{name}.txt"));
        let text = std::fs::read_to_string(path).unwrap();
        let mut expected: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        expected.sort();
        assert_eq!(tensors, expected, "{name}");
    }
}

#[test]
fn what_a_pooling_took_is_written_where_a_gradient_reads_it() {
    let outputs = |tape: &Tape| {
        let pools = tape.nodes().iter().filter(|node| node.op.name() == "max_pool");
        pools.map(|node| node.outputs.len()).collect::<Vec<_>>()
    };
    let model = simsiam(Arch::Resnet18);
    assert_eq!(outputs(&graph(&model).tape), [2]);
    assert_eq!(outputs(&model.eval_graph(2, 32, DType::F32, true).unwrap().tape), [1]);
    // A stem that is trained, and one that is not in a network that is.
    for (frozen, expected) in [(0, 2), (1, 1), (3, 1)] {
        let mut tape = Tape::new();
        let images = tape.leaf("images", TensorDesc::new([2, 32, 32, 3], DType::F32), Role::Input, false);
        let mut b = Builder::new(&mut tape, Mode::Train { groups: 1 }, DType::F32);
        model.backbone.record_frozen(&mut b, "", images, frozen).unwrap();
        assert_eq!(outputs(&tape), [expected], "{frozen} frozen layers");
    }
}
