//! The method's claim (paper, section 4.1 and 4.2) on the demo's data: with stop-gradient and predictor nothing collapses,
//! without either it does. Asserted on the spread of z and on its effective rank.
//!
//! Setting: 1,280 images of 14 pixels, a two-stage ResNet of width 8, d = 64, batch 64, 3 epochs, base lr 0.4, no batch
//! norm at the projector's output (with it the spread cannot fall, only the rank, and that takes longer).

mod common;

use simsiam_engine::train::metrics::{self, Line};

const OPTIONS: &str = "--preset cifar --arch custom --block basic --depths 1,1 --width 8 --dim 64 --projector-hidden 64 \
                       --image-size 14 --batch 64 --epochs 3 --base-lr 0.4 --head-bn hidden --log-every 5 --rank-every 5";

/// The last step's metrics of a run with extra options.
fn last(folder: &std::path::Path, data: &str, extra: &str) -> Line {
    let run = folder.join(extra.replace(' ', "_") + "run");
    let mut args = vec!["train", data, "--run", run.to_str().unwrap()];
    args.extend(OPTIONS.split_whitespace().chain(extra.split_whitespace()));
    common::succeed(&args);
    let lines = metrics::read(&run.join("metrics.jsonl")).unwrap();
    let line = lines.last().unwrap().clone();
    println!(
        "{extra:24} loss {:.3}, z std * sqrt(d) {:.3}, effective rank {:.1}",
        line.loss,
        line.z_std,
        line.effective_rank.unwrap()
    );
    line
}

#[test]
fn collapse_comes_without_stop_gradient_or_predictor_and_not_by_default() {
    let folder = tempfile::tempdir().unwrap();
    let data = common::fashion(folder.path(), "train", 1280);
    let data = data.to_str().unwrap();
    let healthy = last(folder.path(), data, "");
    let no_stop_gradient = last(folder.path(), data, "--stop-gradient false");
    let no_predictor = last(folder.path(), data, "--predictor none");
    let healthy_rank = healthy.effective_rank.unwrap();
    assert!(healthy.z_std > 0.6, "healthy: z std {}", healthy.z_std);
    for collapsed in [&no_stop_gradient, &no_predictor] {
        assert!(collapsed.z_std < 0.5 * healthy.z_std, "z std {}", collapsed.z_std);
        assert!(collapsed.effective_rank.unwrap() < 0.5 * healthy_rank, "rank {:?}", collapsed.effective_rank);
        assert!(collapsed.loss < -0.9, "loss {}", collapsed.loss);
    }
}
