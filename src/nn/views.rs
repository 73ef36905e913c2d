//! How the two views of a step go through the network: as one batch, or one after the other.

use std::collections::BTreeSet;
use std::fmt::{self, Display};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::graph::ValueId;
use crate::graph::recompute::repeatable;
use crate::nn::builder::{Builder, Mode};
use crate::nn::heads::PredictorKind;
use crate::nn::params::ParamGroup;
use crate::nn::simsiam::{SimSiam, StepShape, ViewSource, pad};
use crate::ops::slice_rows::{SliceRows, StackRows, record_rows};

/// Whether the views go through the network together. Both ways compute the same, as the target is a constant: the sums over
/// both views in the weights' gradients are rounded otherwise (in 16 bits, which libraries write, once for each view), and that
/// is all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Views {
    /// As one batch.
    #[default]
    Together,
    /// View 1, then view 2; the way back is view 2's, then view 1's, whose activations are computed again when it begins: only
    /// those of one view are in memory at a time.
    Sequential,
}

impl Display for Views {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_possible_value().map_or(Ok(()), |value| f.write_str(value.get_name()))
    }
}

/// What the loss is of.
pub(super) struct Recorded {
    /// Predictions: of both views, or of the first.
    pub p: ValueId,
    /// Projections of both views.
    pub z: ValueId,
    /// Nodes that are to be computed again on the way back.
    pub repeated: BTreeSet<usize>,
}

impl SimSiam {
    /// Predictions p and projections z of `views`, of which the first half are view 1.
    pub(super) fn record_pair(&self, b: &mut Builder<'_>, shape: &StepShape, views: ValueId) -> Result<Recorded> {
        match shape.views {
            Views::Together => self.record_together(b, shape, views),
            Views::Sequential if !self.stop_gradient => {
                let what = "expected together with --stop-gradient false, where each view's gradient needs the other's \
                            activations; got sequential";
                Err(Error::config("--views", what))
            }
            Views::Sequential => self.record_in_turn(b, shape, views),
        }
    }

    fn record_together(&self, b: &mut Builder<'_>, shape: &StepShape, views: ValueId) -> Result<Recorded> {
        let z = self.record_projection(b, shape, views)?;
        let mut predicted = z;
        if !self.symmetric {
            let view = SliceRows { start: 0, len: shape.batch };
            predicted = b.tape.scoped("view1", |tape| tape.record_one(view, &[z]))?;
            b.mode = Mode::Train { groups: 1 };
        }
        let p = self.record_prediction(b, predicted)?;
        Ok(Recorded { p, z, repeated: BTreeSet::new() })
    }

    /// Only where both views are predicted is there anything to be computed again: else there is no way back through view 2.
    fn record_in_turn(&self, b: &mut Builder<'_>, shape: &StepShape, views: ValueId) -> Result<Recorded> {
        b.mode = Mode::Train { groups: 1 };
        let view = |b: &mut Builder<'_>, name: &str, start| {
            let rows = SliceRows { start, len: shape.batch };
            b.tape.scoped(name, |tape| record_rows(tape, rows, views))
        };
        let start = b.tape.nodes().len();
        let one = view(b, "view1", 0)?;
        let z1 = self.record_projection(b, shape, one)?;
        let p1 = self.record_prediction(b, z1)?;
        let end = b.tape.nodes().len();
        let two = view(b, "view2", shape.batch)?;
        let z2 = self.record_projection(b, shape, two)?;
        let p2 = if self.symmetric { Some(self.record_prediction(b, z2)?) } else { None };

        let stack = |b: &mut Builder<'_>, name: &str, of: [ValueId; 2]| {
            b.tape.scoped(name, |tape| tape.record_one(StackRows, &of))
        };
        let z = stack(b, "z", [z1, z2])?;
        let p = match p2 {
            None => p1,
            Some(p2) if [p1, p2] == [z1, z2] => z,
            Some(p2) => stack(b, "p", [p1, p2])?,
        };
        let repeated = if self.symmetric { repeatable(b.tape, start, end) } else { BTreeSet::new() };
        Ok(Recorded { p, z, repeated })
    }

    fn record_projection(&self, b: &mut Builder<'_>, shape: &StepShape, views: ValueId) -> Result<ValueId> {
        (b.group, b.trainable) = (ParamGroup::Encoder, true);
        let images = match shape.source {
            ViewSource::Given { padded: true } => pad(b, &self.backbone, views)?,
            _ => views,
        };
        let features = self.backbone.record(b, "encoder.", images)?;
        self.heads.projector(b, "encoder.fc.", features)
    }

    fn record_prediction(&self, b: &mut Builder<'_>, z: ValueId) -> Result<ValueId> {
        (b.group, b.trainable) = (ParamGroup::Predictor, self.heads.predictor == PredictorKind::Mlp);
        self.heads.predictor(b, "predictor.", z)
    }
}
