//! The ledger: bytes of every unusual op as its kernels move them, counted by hand, and `plan --ledger` as a user meets it.

mod common;

use common::{fail, run, succeed};
use serde_json::Value;
use simsiam_engine::data::augment::AugmentConfig;
use simsiam_engine::graph::ledger::entries;
use simsiam_engine::graph::plan::Target;
use simsiam_engine::graph::{Plan, Role, Tape, ValueId, backward, builtin};
use simsiam_engine::ops::augment::{AugmentViews, Augmentation};
use simsiam_engine::ops::batch_norm::pair::BatchNormPair;
use simsiam_engine::ops::batch_norm::pooled::BatchNormMaxPool;
use simsiam_engine::ops::batch_norm::{BatchNorm, BatchNormStatistics, Fusion};
use simsiam_engine::ops::conv2d::{Conv2d, Join};
use simsiam_engine::ops::cosine_loss::CosineLoss;
use simsiam_engine::ops::knn::KnnVote;
use simsiam_engine::ops::lars::LarsUpdate;
use simsiam_engine::ops::linear::Linear;
use simsiam_engine::ops::pool::MaxPool;
use simsiam_engine::ops::sgd::{Guard, SgdUpdate, StepParam};
use simsiam_engine::ops::similarity::{Kind, Similarity};
use simsiam_engine::ops::slice_rows::SliceRows;
use simsiam_engine::ops::z_std::ZStd;
use simsiam_engine::tensor::DType::{self, Bf16, F32, I64};
use simsiam_engine::tensor::TensorDesc;

fn leaf(tape: &mut Tape, dims: &[usize], dtype: DType, role: Role) -> ValueId {
    tape.leaf("leaf", TensorDesc::new(dims, dtype), role, matches!(role, Role::Parameter))
}

/// A leaf that a gradient flows to.
fn wanted(tape: &mut Tape, dims: &[usize], dtype: DType) -> ValueId {
    leaf(tape, dims, dtype, Role::Parameter)
}

/// A leaf without one.
fn given(tape: &mut Tape, dims: &[usize], dtype: DType) -> ValueId {
    leaf(tape, dims, dtype, Role::Input)
}

/// Appends the gradient of `y`.
fn differentiate(tape: &mut Tape, y: ValueId) {
    let d_y = tape.leaf("d_y", tape.desc(y).clone(), Role::Input, false);
    backward(tape, &[(y, d_y)]).unwrap();
}

/// Op, bytes read and bytes written of every node.
fn ledger(tape: &Tape) -> Vec<(&'static str, [u64; 2])> {
    let plan = Plan::new(tape, Target::Cuda).unwrap();
    let entries = entries(tape, &plan).into_iter();
    tape.nodes().iter().zip(entries).map(|(n, e)| (n.op.name(), [e.traffic.read, e.traffic.written])).collect()
}

const FUSION: Fusion = Fusion { affine: true, residual: true, relu: true };
const NORM: BatchNorm =
    BatchNorm { groups: 2, eps: 1e-5, momentum: 0.1, fusion: FUSION, sums_given: false, means: false };

/// Running statistics of `c` channels.
fn running(tape: &mut Tape, c: usize) -> [ValueId; 3] {
    [(vec![c], F32), (vec![c], F32), (vec![], I64)].map(|(dims, dtype)| leaf(tape, &dims, dtype, Role::State))
}

#[test]
fn batch_norm_reads_x_twice_and_d_y_twice() {
    // 60 rows of 16 channels in bf16; gamma, beta, running statistics: 16 float32; mean and rstd: 2 x 16; a mask of 2 bytes a row.
    let (x, c, statistics, mask) = (1920, 64, 128, 120);
    for residual_has_gradient in [false, true] {
        let mut tape = Tape::new();
        let [a, residual] = [0; 2].map(|_| wanted(&mut tape, &[4, 3, 5, 16], Bf16));
        let [gamma, beta] = [0; 2].map(|_| wanted(&mut tape, &[16], F32));
        let updates = running(&mut tape, 16);
        let mut y = tape.record_updating(NORM, &[a, gamma, beta, residual], &updates).unwrap()[0];
        if residual_has_gradient {
            y = tape.record_one(builtin::Add, &[y, residual]).unwrap();
        }
        differentiate(&mut tape, y);
        let nodes = ledger(&tape);
        let states = 2 * c + 8;
        let forward = [2 * x + x + 2 * c + states, x + 2 * statistics + mask + states];
        assert_eq!(nodes[0], ("batch_norm", forward));
        // d_y and x by the first pass; the masked d_y that it left, and x, by the second.
        let small = 2 * statistics + 2 * c;
        let (read, written) = (4 * x + small + mask, 2 * x + 2 * c);
        // Where d_residual is added to, the second pass reads d_y and mask again, and adds.
        let expected = if residual_has_gradient { [read + mask + x, written] } else { [read, written] };
        assert_eq!(*nodes.last().unwrap(), ("batch_norm_backward", expected), "{residual_has_gradient}");
    }
}

#[test]
fn batch_norm_with_sums_reads_x_once() {
    let mut tape = Tape::new();
    let x = given(&mut tape, &[4, 6, 5, 8], Bf16);
    let w = wanted(&mut tape, &[16, 3, 3, 8], Bf16);
    let conv = Conv2d { statistics: Some(2), ..Conv2d::new([1; 2], [1; 2]) };
    let outputs = tape.record(conv, &[x, w]).unwrap();
    let fusion = Fusion { affine: false, residual: false, relu: true };
    let updates = running(&mut tape, 16);
    let norm = BatchNorm { fusion, sums_given: true, ..NORM };
    tape.record_updating(norm, &outputs, &updates).unwrap();
    let (x, w, y, sums) = (4 * 30 * 8 * 2, 16 * 72 * 2, 4 * 30 * 16 * 2, 2 * 2 * 16 * 4);
    assert_eq!(ledger(&tape), [("conv2d", [x + w, y + sums]), ("batch_norm", [y + sums + 136, y + 2 * 128 + 136])]);
}

#[test]
fn a_pair_of_batch_norms_never_touches_the_normalised_shortcut() {
    for sums_given in [false, true] {
        let mut tape = Tape::new();
        let [x, r] = [0; 2].map(|_| wanted(&mut tape, &[4, 3, 5, 16], Bf16));
        let [gamma, beta, gamma_r, beta_r] = [0; 4].map(|_| wanted(&mut tape, &[16], F32));
        let sums = [0; 2].map(|_| sums_given.then(|| given(&mut tape, &[2, 2, 16], F32)));
        let [of_x, of_r] = [0; 2].map(|_| running(&mut tape, 16));
        let inputs: Vec<ValueId> = [r].into_iter().chain(sums[1]).collect();
        let statistics =
            tape.record_updating(BatchNormStatistics::new(2, 1e-5, 0.1, sums_given), &inputs, &of_r).unwrap();
        let of_shortcut = [r, statistics[0], statistics[1], gamma_r, beta_r];
        let inputs: Vec<ValueId> = [x, gamma, beta].into_iter().chain(of_shortcut).chain(sums[0]).collect();
        let pair = BatchNormPair::new(2, 1e-5, 0.1, sums_given);
        let y = tape.record_updating(pair, &inputs, &of_x).unwrap()[0];
        differentiate(&mut tape, y);
        // As above, and sums: 2 x 2 x 16 float32.
        let (x, c, statistics, mask, states) = (1920, 64, 128, 120, 2 * 64 + 8);
        let (first, sums) = if sums_given { (0, 256) } else { (x, 0) };
        let apply = [first + sums + 2 * x + 4 * c + 2 * statistics + states, x + mask + 2 * statistics + states];
        // d_y, the mask, x and r by each pass.
        let backward = [2 * (3 * x + mask) + 4 * statistics + 2 * c, 2 * x + 4 * c];
        let expected = [
            ("batch_norm_statistics", [first + sums + states, 2 * statistics + states]),
            ("batch_norm_pair", apply),
            ("batch_norm_pair_backward", backward),
        ];
        assert_eq!(ledger(&tape), expected, "{sums_given}");
    }
}

#[test]
fn pooled_batch_norm_never_touches_what_lies_between() {
    let mut tape = Tape::new();
    let x = wanted(&mut tape, &[2, 8, 6, 16], Bf16);
    let [gamma, beta] = [0; 2].map(|_| wanted(&mut tape, &[16], F32));
    let updates = running(&mut tape, 16);
    let op = BatchNormMaxPool::new(2, 1e-5, 0.1, false);
    let y = tape.record_updating(op, &[x, gamma, beta], &updates).unwrap()[0];
    differentiate(&mut tape, y);
    let (x, y) = (2 * 48 * 16 * 2, 2 * 12 * 16 * 2); // and a byte for each element of y
    let (statistics, c) = (128, 64);
    assert_eq!(
        ledger(&tape),
        [
            ("batch_norm_max_pool", [2 * x + 2 * c + 136, y + y / 2 + 2 * statistics + 136]),
            ("batch_norm_max_pool_backward", [2 * (x + y + y / 2) + 2 * statistics + c, x + 2 * c]),
        ]
    );
}

#[test]
fn the_gradient_of_a_max_pool_reads_a_byte_in_the_place_of_its_input() {
    let pool = MaxPool { kernel: 3, stride: 2, padding: 1, taken: true };
    let (x, y, taken) = (3 * 63 * 16 * 2, 3 * 20 * 16 * 2, 3 * 20 * 16); // 9 x 7 and 5 x 4 pixels
    for accumulated in [false, true] {
        let mut tape = Tape::new();
        let a = wanted(&mut tape, &[3, 9, 7, 16], Bf16);
        let pooled = tape.record_one(pool, &[a]).unwrap();
        let copy = tape.record_one(builtin::Copy, &[a]).unwrap();
        let ends = if accumulated { vec![pooled, copy] } else { vec![pooled] };
        let seed = |v: &ValueId| (*v, tape.leaf("seed", tape.desc(*v).clone(), Role::Input, false));
        let seeds: Vec<_> = ends.iter().map(seed).collect();
        backward(&mut tape, &seeds).unwrap();
        let nodes = ledger(&tape);
        assert_eq!(nodes[0], ("max_pool", [x, y + taken]));
        let there = if accumulated { x } else { 0 };
        assert_eq!(*nodes.last().unwrap(), ("max_pool_backward", [y + taken + there, x]));
    }
    // Without a gradient no byte is written.
    let mut tape = Tape::new();
    let a = given(&mut tape, &[3, 9, 7, 16], Bf16);
    tape.record_one(MaxPool { taken: false, ..pool }, &[a]).unwrap();
    assert_eq!(ledger(&tape), [("max_pool", [x, y])]);
}

#[test]
fn strided_convolutions_read_the_pixels_that_they_use() {
    let mut tape = Tape::new();
    let x = wanted(&mut tape, &[3, 9, 8, 16], Bf16);
    let w = wanted(&mut tape, &[24, 1, 1, 16], Bf16);
    let y = tape.record_one(Conv2d::new([2; 2], [0; 2]), &[x, w]).unwrap();
    differentiate(&mut tape, y);
    // 5 x 4 of 9 x 8 pixels. The weight gradient comes from cuDNN in 16 bits, and is widened.
    let (x, used, w, y) = (3 * 72 * 16 * 2, 3 * 20 * 16 * 2, 24 * 16 * 2, 3 * 20 * 24 * 2);
    assert_eq!(
        ledger(&tape),
        [("conv2d", [used + w, y]), ("conv2d_wgrad", [used + y + w, w + 2 * w]), ("conv2d_dgrad", [y + w, x]),]
    );
}

#[test]
fn weight_gradients_that_are_products_are_not_widened() {
    for (dtype, size) in [(Bf16, 2), (F32, 4)] {
        let mut tape = Tape::new();
        let x = given(&mut tape, &[3, 9, 8, 16], dtype);
        let w = wanted(&mut tape, &[24, 1, 1, 16], dtype);
        let y = tape.record_one(Conv2d::new([1; 2], [0; 2]), &[x, w]).unwrap();
        differentiate(&mut tape, y);
        let (x, y, w) = (3 * 72 * 16 * size, 3 * 72 * 24 * size, 24 * 16);
        assert_eq!(ledger(&tape)[1], ("conv2d_wgrad", [x + y, 4 * w]), "{dtype}");
    }
}

#[test]
fn gradients_that_join_are_read_where_they_are_added_to() {
    let (x, w) = (2 * 35 * 8 * 2, 8 * 8 * 2);
    for (join, expected) in [
        (Join::Accumulate, vec![("conv2d_dgrad", [x + w + x, x])]),
        (Join::Fused, vec![("conv2d_dgrad", [x + w + x, x])]),
        (Join::Separate, vec![("conv2d_dgrad", [x + w, x]), ("copy", [2 * x, x])]),
    ] {
        let mut tape = Tape::new();
        let x = wanted(&mut tape, &[2, 7, 5, 8], Bf16);
        let w = given(&mut tape, &[8, 1, 1, 8], Bf16);
        let branch = tape.record_one(Conv2d { join, ..Conv2d::new([1; 2], [0; 2]) }, &[x, w]).unwrap();
        let y = tape.record_one(builtin::Add, &[branch, x]).unwrap();
        differentiate(&mut tape, y);
        let nodes = ledger(&tape);
        // The convolution, the sum, and the two gradients of the sum come first.
        assert_eq!(nodes[4..], expected, "{join:?}");
    }
}

#[test]
fn the_stem_reads_x_for_every_64_channels_and_writes_its_sums() {
    let mut tape = Tape::new();
    let x = given(&mut tape, &[2, 64, 48, 4], Bf16);
    let w = wanted(&mut tape, &[128, 7, 7, 4], Bf16);
    let y = tape.record_one(Conv2d::new([2; 2], [3; 2]), &[x, w]).unwrap();
    differentiate(&mut tape, y);
    let (x, w, y) = (2 * 64 * 48 * 4 * 2, 128 * 49 * 4, 2 * 32 * 24 * 128 * 2);
    // 16 tiles of 8 x 16 pixels for 4 blocks, each of which sums up 7 rows of 8 taps of 4 channels.
    let sums = 4 * 128 * 7 * 8 * 4 * 4;
    assert_eq!(ledger(&tape), [("conv2d", [2 * x + 2 * w, y]), ("conv2d_wgrad", [2 * x + y + sums, 4 * w + sums])]);
}

#[test]
fn a_bias_is_rounded_on_the_way_to_a_product() {
    let mut tape = Tape::new();
    let x = given(&mut tape, &[6, 10], Bf16);
    let w = wanted(&mut tape, &[14, 10], Bf16);
    let b = wanted(&mut tape, &[14], F32);
    let y = tape.record_one(Linear, &[x, w, b]).unwrap();
    differentiate(&mut tape, y);
    let (x, w, y) = (6 * 10 * 2, 14 * 10 * 2, 6 * 14 * 2);
    assert_eq!(
        ledger(&tape),
        [
            ("linear", [x + w + 14 * 4 + 14 * 2, y + 14 * 2]),
            ("linear_wgrad", [x + y, 2 * w]),
            ("sum_rows", [y, 14 * 4]),
        ]
    );
}

#[test]
fn losses_read_what_they_pair() {
    let (d, p, z) = (10, 3 * 10 * 2, 7 * 10 * 2);
    let mut tape = Tape::new();
    let [a, b] = [3, 7].map(|rows| wanted(&mut tape, &[rows, d], Bf16));
    let loss = tape.record_one(Similarity { kind: Kind::Cosine, z_shift: 5 }, &[a, b]).unwrap();
    differentiate(&mut tape, loss);
    assert_eq!(
        ledger(&tape),
        [
            ("negative_cosine", [2 * p, 4]),
            ("negative_cosine_backward", [2 * p + 4, p]),
            ("negative_cosine_backward", [2 * p + 4, z]),
        ]
    );

    // Added to a gradient that is there, only rows with a partner are touched: y = z + loss(p, z), as far as z goes.
    let mut tape = Tape::new();
    let [a, b] = [3, 7].map(|rows| wanted(&mut tape, &[rows, d], Bf16));
    let loss = tape.record_one(Similarity { kind: Kind::SoftmaxXent, z_shift: 5 }, &[a, b]).unwrap();
    let y = tape.record_one(builtin::Copy, &[b]).unwrap();
    let seeds = [loss, y].map(|v| (v, tape.leaf("seed", tape.desc(v).clone(), Role::Input, false)));
    backward(&mut tape, &seeds).unwrap();
    assert_eq!(*ledger(&tape).last().unwrap(), ("softmax_xent_backward", [3 * p + 4, p]));

    let mut tape = Tape::new();
    let [a, b] = [3, 7].map(|rows| given(&mut tape, &[rows, d], Bf16));
    let d_loss = given(&mut tape, &[], F32);
    tape.record(CosineLoss { z_shift: 5 }, &[a, b, d_loss]).unwrap();
    tape.record(ZStd, &[b]).unwrap();
    assert_eq!(ledger(&tape), [("cosine_loss", [p + 2 * z + 4, p + 8]), ("z_std", [2 * z, 4])]);
}

#[test]
fn a_slice_reads_its_rows() {
    let (x, y) = (7 * 6 * 4, 3 * 6 * 4);
    for accumulated in [false, true] {
        let mut tape = Tape::new();
        let a = wanted(&mut tape, &[7, 6], F32);
        let slice = tape.record_one(SliceRows { start: 2, len: 3 }, &[a]).unwrap();
        let copy = tape.record_one(builtin::Copy, &[a]).unwrap();
        let ends = if accumulated { vec![slice, copy] } else { vec![slice] };
        let seed = |v: &ValueId| (*v, tape.leaf("seed", tape.desc(*v).clone(), Role::Input, false));
        let seeds: Vec<_> = ends.iter().map(seed).collect();
        backward(&mut tape, &seeds).unwrap();
        let nodes = ledger(&tape);
        assert_eq!(nodes[0], ("slice_rows", [y, y]));
        let expected = if accumulated { [2 * y, y] } else { [y, x] };
        assert_eq!(*nodes.last().unwrap(), ("slice_rows_backward", expected));
    }
}

#[test]
fn optimisers_read_weights_momenta_and_gradients() {
    let mut tape = Tape::new();
    let step = tape.leaf("step", StepParam::desc(), Role::Input, false);
    let shapes = [vec![5, 3], vec![11]];
    let [gradients, weights, momenta] =
        [0; 3].map(|_| shapes.iter().map(|dims| given(&mut tape, dims, F32)).collect::<Vec<ValueId>>());
    let lr = vec![StepParam::Lr, StepParam::PredictorLr];
    let inputs = [&[step], &gradients[..]].concat();
    let sgd = SgdUpdate { lr: lr.clone(), guard: Guard::None };
    tape.update(sgd, &inputs, &[&weights[..], &momenta].concat()).unwrap();
    let lars = LarsUpdate { lr, adapted: vec![true, false], trust: 1e-3, eps: 1e-8 };
    tape.update(lars, &inputs, &[&weights[..], &momenta].concat()).unwrap();
    let (all, step) = (26 * 4, 4 * 8);
    assert_eq!(ledger(&tape), [("sgd", [3 * all + step, 2 * all]), ("lars", [5 * all + step, 2 * all])]);
}

#[test]
fn a_vote_reads_the_labels_of_the_neighbours() {
    for (bank, labels) in [(1000, 5 * 3), (7, 7)] {
        let mut tape = Tape::new();
        let best = given(&mut tape, &[5, 3], I64);
        let of_bank = given(&mut tape, &[bank], I64);
        tape.record_one(KnnVote { temperature: 0.1, classes: 4 }, &[best, of_bank]).unwrap();
        assert_eq!(ledger(&tape), [("knn_vote", [(15 + labels) * 8, 5 * 8])]);
    }
}

#[test]
fn views_are_made_of_crops() {
    // Crops of a fifth to all of images of 50 x 50 pixels: 0.6 on average.
    let config = AugmentConfig { image_size: 32, ..AugmentConfig::imagenet() };
    let augmentation = Augmentation::new(&config, Bf16, 8, 50).unwrap();
    let op = AugmentViews { augmentation, views: 6, pixel_bytes: 3 * 50 * 50 * 3 };
    let mut tape = Tape::new();
    let inputs = op.inputs().map(|desc| tape.leaf("input", desc, Role::Input, false));
    tape.record_one(op, &inputs).unwrap();
    let [(_, [read, written])] = ledger(&tape)[..] else { panic!("one node") };
    // Tables of filters: first positions, and room for 2 (50 + 32) weights an axis; sums of luma.
    let tables = written - 6 * 32 * 32 * 8 * 2;
    let least = 6 * (2 * 32 * 4 + 2 * 2 * (50 + 32) * 4 + 8);
    assert!((least..least + 3 * 256).contains(&tables), "{tables} of {least}");
    assert_eq!(read - tables, 6 * 4500 + 6 * 656);
}

/// A step small enough to be counted by hand: one stage of one block of two 3x3 convolutions.
const TINY: &str = "--arch custom --block basic --depths 1 --width 16 --stem cifar --dim 24 --projector-hidden 40 \
                    --predictor-hidden 8 --projector-layers 2 --batch 3 --image-size 10 --stored-size 12";

fn plan(args: &str) -> Value {
    let args = format!("plan --json {args}");
    serde_json::from_str(&succeed(&args.split_whitespace().collect::<Vec<_>>())).unwrap()
}

fn text(args: &str) -> String {
    succeed(&format!("plan {args}").split_whitespace().collect::<Vec<_>>())
}

/// Bytes read and written, and operations.
fn figures(entry: &Value) -> [u64; 3] {
    ["bytes_read", "bytes_written", "flops"]
        .map(|key| entry[key].as_u64().unwrap_or_else(|| panic!("{key} in {entry}")))
}

fn added(entries: &Value) -> [u64; 3] {
    let entries = entries.as_array().unwrap();
    assert!(entries.iter().all(|e| e["bytes"].as_u64().unwrap() == figures(e)[0] + figures(e)[1]));
    entries.iter().map(figures).fold([0; 3], |sum, entry| [0, 1, 2].map(|i| sum[i] + entry[i]))
}

fn near(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b.abs()
}

#[test]
fn a_small_step_is_what_was_counted_by_hand() {
    let report = plan(&format!("--ledger {TINY}"));
    assert_eq!(report["dtype"], "bf16");
    let kind = |op: &str, phase: &str| {
        let kinds = report["ledger"]["ops"].as_array().unwrap();
        figures(kinds.iter().find(|k| k["op"] == op && k["phase"] == phase).unwrap_or_else(|| panic!("no {op}")))
    };
    // 6 views of 10 x 10 pixels, of 8 channels at first (padded) and of 16 then, in bf16. Weights: 8 to 16, twice 16 to 16.
    let (image, x, first, next) = (6 * 100 * 8 * 2, 6 * 100 * 16 * 2, 16 * 72, 16 * 144);
    let flops = 2 * 6 * 100 * (first + 2 * next);
    assert_eq!(kind("conv2d", "forward"), [image + 2 * x + 2 * (first + 2 * next), 3 * x, flops]);
    // d_w in bf16 from cuDNN, widened to float32.
    let staged = 2 * (first + 2 * next);
    assert_eq!(kind("conv2d_wgrad", "backward"), [image + 5 * x + staged, 3 * staged, flops]);
    // The images want no gradient; that of the block's input is added to the residual's.
    assert_eq!(kind("conv2d_dgrad", "backward"), [3 * x + 2 * 2 * next, 2 * x, 2 * 2 * 6 * 100 * next]);
    // Three of 16 channels, the last with a residual and a mask; in the heads of 40, 24 (no gamma, no beta) and 8.
    let channels = [16, 16, 16, 40, 24, 8];
    let heads = 6 * (40 + 24 + 8) * 2;
    let affine: u64 = 2 * 4 * (16 * 3 + 40 + 8);
    let statistics: u64 = 2 * 2 * 4 * channels.iter().sum::<u64>();
    let states: u64 = channels.iter().map(|c| 2 * 4 * c + 8).sum();
    let read = 7 * x + 2 * heads + affine + states;
    assert_eq!(kind("batch_norm", "forward"), [read, 3 * x + x / 16 + heads + statistics + states, 0]);
    let read = 12 * x + x / 16 + 4 * heads + statistics + affine;
    assert_eq!(kind("batch_norm_backward", "backward"), [read, 4 * x + heads + affine, 0]);
    // The images' weights are those of 3 channels; projector 16 to 40 to 24, predictor 24 to 8 to 24 with a bias.
    let weights = 16 * 27 + 2 * next + 16 * 40 + 40 * 24 + 24 * 8 + 8 * 24;
    let parameters = weights + affine / 4 + 24;
    assert_eq!(kind("sgd", "update"), [3 * 4 * parameters + 4 * 8 + 4, 2 * 4 * parameters, 0]);
    assert_eq!(kind("cast", "forward"), [4 * weights, 2 * weights, 0]);
    assert_eq!(kind("global_avg_pool", "forward"), [x, 6 * 16 * 2, 0]);
}

#[test]
fn everything_is_the_sum_of_its_nodes() {
    let report = plan(&format!("--ledger {TINY} --gpu 4090"));
    let ledger = &report["ledger"];
    let total = figures(&ledger["per_step"]);
    for list in ["nodes", "ops", "phases"] {
        assert_eq!(added(&ledger[list]), total, "{list}");
    }
    assert_eq!(report["flops_per_step"], total[2]);
    let number = |value: &Value| value.as_f64().unwrap();
    for (part, count) in [("per_image", 3.0), ("per_view", 6.0)] {
        for (key, total) in ["bytes_read", "bytes_written", "flops"].iter().zip(total) {
            assert!(near(number(&ledger[part][key]) * count, total as f64), "{part} {key}");
        }
    }
    let saved = number(&report["memory"]["saved_activations"]);
    assert!(near(number(&ledger["saved_activation_bytes_per_view"]) * 6.0, saved));

    // The roofline, node by node.
    let nodes = ledger["nodes"].as_array().unwrap();
    let [copy, products] =
        ["copy_gb_per_s", "product_tflop_per_s"].map(|key| number(&ledger["ceilings"][key]["value"]));
    assert!(near(copy, 0.85 * 1008.0) && near(products, 0.84 * 165.2), "{copy} {products}");
    let mut seconds = 0.0;
    for node in nodes.iter().filter(|node| node["dtype"] != "f32") {
        let [bytes, flops] = [number(&node["bytes"]) / copy / 1e9, number(&node["flops"]) / products / 1e12];
        assert!(near(number(&node["roofline_s"]), bytes.max(flops)), "{node}");
        assert_eq!(node["bound_by"], if bytes >= flops { "bytes" } else { "FLOPs" }, "{node}");
    }
    nodes.iter().for_each(|node| seconds += number(&node["roofline_s"]));
    assert!(near(number(&ledger["per_step"]["roofline_s"]), seconds));
    assert!(near(number(&ledger["roofline_views_per_s"]), 6.0 / seconds));
    assert!(plan(TINY)["ledger"].is_null());
}

#[test]
fn a_gpu_is_named_or_given() {
    let line = |args: &str, label: &str| {
        let text = text(&format!("--ledger {TINY} --top 1 {args}"));
        text.lines().find(|line| line.starts_with(label)).unwrap_or_else(|| panic!("{label} in {text}")).to_string()
    };
    for (args, label, expected) in [
        ("", "gpu ", "gpu       NVIDIA H100 SXM 80 GB"),
        ("", "copy ", "copy      2850 GB/s (measured)"),
        ("", "products ", "products  830.0 TFLOP/s in bf16 (measured)"),
        ("--gpu h200", "copy ", "copy      4080 GB/s (85 % of the 4800 of its data sheet)"),
        ("--gpu a100 --dtype tf32", "products ", "products  131.0 TFLOP/s in tf32 (84 % of the 156 of its data sheet)"),
        ("--gpu 4090 --dtype f32", "products ", "products  76.0 TFLOP/s in f32 (92 % of the 82.6 of its data sheet)"),
        ("--copy-gb-s 1234.4", "copy ", "copy      1234 GB/s (given)"),
        ("--gpu 4090 --tflops 0.25", "products ", "products  0.250 TFLOP/s in bf16 (given)"),
    ] {
        assert_eq!(line(args, label), expected, "{args}");
    }
    // Twice the bytes a second is half the time of what is bound by bytes: all of it, where products cost nothing.
    let seconds = |args: &str| {
        let report = plan(&format!("--ledger {TINY} --tflops 1e9 {args}"));
        report["ledger"]["per_step"]["bound_by_bytes_s"].as_f64().unwrap()
    };
    assert!(near(seconds("--copy-gb-s 500"), 2.0 * seconds("--copy-gb-s 1000")));
}

#[test]
fn as_many_nodes_are_listed_as_are_asked_for() {
    let listed = |top: usize| -> Vec<String> {
        let text = text(&format!("--ledger {TINY} --top {top}"));
        let (_, nodes) = text.rsplit_once("\n\n").unwrap();
        nodes.lines().skip(1).map(|line| line.split_whitespace().next().unwrap().to_string()).collect()
    };
    let report = plan(&format!("--ledger {TINY}"));
    let nodes = report["ledger"]["nodes"].as_array().unwrap();
    let name = |node: &Value| node["name"].as_str().unwrap().to_string();
    assert_eq!(listed(0), nodes.iter().map(name).collect::<Vec<_>>(), "all, in their order");
    let seconds = |node: &&Value| node["roofline_s"].as_f64().unwrap();
    let mut slowest: Vec<&Value> = nodes.iter().collect();
    slowest.sort_by(|a, b| seconds(b).total_cmp(&seconds(a)));
    assert_eq!(listed(3), slowest[..3].iter().map(|node| name(node)).collect::<Vec<_>>());
}

#[test]
fn resnet50_moves_what_the_design_says() {
    let with = |fused: &str| plan(&format!("--ledger --batch 512 {fused}"));
    let (separate, pooled) = (with(""), with("--fuse-pooling true"));
    let megabytes = |report: &Value| report["ledger"]["per_view"]["bytes"].as_f64().unwrap() / 1e6;
    // Fused batch norm, ReLU and residual, statistics by a pass of their own: at most 345 MB a view.
    assert!((325.0..345.0).contains(&megabytes(&separate)), "{}", megabytes(&separate));
    // With a batch norm of its own for each of the four shortcuts: 5 passes over its result more, but for the mask.
    let shortcuts: f64 =
        [(56.0, 256.0), (28.0, 512.0), (14.0, 1024.0), (7.0, 2048.0)].map(|(s, c)| s * s * c).iter().sum();
    let more = megabytes(&with("--fuse-shortcut false")) - megabytes(&separate);
    assert!((4.93..4.95).contains(&(more / (shortcuts * 2.0 / 1e6))), "{more} MB");
    // Batch norm and pooling of the stem apart: 4.6 passes over 112 x 112 x 64 more.
    let stem = 112.0 * 112.0 * 64.0 * 2.0 / 1e6;
    let more = megabytes(&separate) - megabytes(&pooled);
    assert!((4.5..4.8).contains(&(more / stem)), "{more} MB");
    // 24.4 GFLOP a view; with the fourth channel of the images, which is zero, 0.6 % more.
    let stem_flops: u64 = 2 * 2 * 112 * 112 * 64 * 49;
    let flops = separate["ledger"]["per_view"]["flops"].as_f64().unwrap();
    let model = plan("--batch 512")["flops_per_image"].as_f64().unwrap() / 2.0;
    assert_eq!(flops - model, stem_flops as f64);
    assert!((24.3e9..24.4e9).contains(&model), "{model}");
}

#[test]
fn faults_are_named() {
    for (args, expected) in [
        (
            "--ledger --device cpu",
            "error: --device: with --ledger, which counts what a GPU does, expected cuda, got cpu",
        ),
        ("--ledger --copy-gb-s 0", "error: --copy-gb-s: expected more than 0, got 0"),
        ("--ledger --tflops inf", "error: --tflops: expected more than 0, got inf"),
    ] {
        let args = format!("plan {TINY} {args}");
        assert_eq!(fail(&args.split_whitespace().collect::<Vec<_>>()), expected, "{args}");
    }
    for args in ["--gpu h100", "--tflops 3", "--ledger --gpu b200", "--ledger --copy-gb-s many"] {
        let args = format!("plan {TINY} {args}");
        assert_eq!(run(&args.split_whitespace().collect::<Vec<_>>()).status.code(), Some(2), "{args}");
    }
}
