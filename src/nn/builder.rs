//! Records layers and collects their parameters under PyTorch names.

use std::collections::HashMap;

use crate::error::Result;
use crate::graph::{Role, Tape, ValueId};
use crate::nn::epilogues::Epilogues;
use crate::nn::params::{Init, ParamGroup, ParamInfo};
use crate::ops::batch_norm::pair::BatchNormPair;
use crate::ops::batch_norm::pooled::BatchNormMaxPool;
use crate::ops::batch_norm::{BatchNorm, BatchNormEval, BatchNormStatistics, Fusion, channel_desc};
use crate::ops::cast::Cast;
use crate::ops::conv2d::Conv2d;
use crate::ops::gram_norm::{self, Layer, Operands};
use crate::ops::linear::Linear;
use crate::ops::pad_channels::PadChannels;
use crate::ops::pool::MaxPool;
use crate::ops::subsample::Subsample;
use crate::tensor::{DType, TensorDesc};

/// Constants of every batch norm (recipe).
const EPS: f64 = 1e-5;
const MOMENTUM: f64 = 0.1;

/// How batch norm behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Statistics of the batch, one set per group of rows (view); running statistics are updated.
    Train {
        /// Statistics groups.
        groups: usize,
    },
    /// Running statistics.
    Eval,
}

/// A batch norm's options.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// Whether it has gamma and beta.
    pub affine: bool,
    /// ReLU after it.
    pub relu: bool,
    /// Added before the ReLU.
    pub residual: Option<ValueId>,
    /// Whether the means of its output are wanted, by a layer of [`Builder::is_gram`] behind it.
    pub means: bool,
    /// Start value of gamma.
    pub gamma: f64,
}

impl Norm {
    /// Affine, no ReLU, no residual, gamma 1.
    pub const PLAIN: Norm = Norm { affine: true, relu: false, residual: None, means: false, gamma: 1.0 };
    /// Affine with ReLU.
    pub const RELU: Norm = Norm { relu: true, ..Norm::PLAIN };
    /// The last one of a residual block, which starts with gamma 0.
    pub const LAST: Norm = Norm { gamma: 0.0, ..Norm::RELU };
}

/// The result of a convolution that only a batch norm reads.
#[derive(Debug, Clone, Copy)]
pub enum Convolved {
    /// As it is.
    Formed(ValueId),
    /// Never formed: of x and the weight, the batch norm makes its own output.
    Unformed {
        /// The pixels that are read.
        x: ValueId,
        /// The weight, `[c_out][1][1][c_in]`.
        w: ValueId,
        /// Statistics groups.
        groups: usize,
    },
}

/// Records layers on a tape. A layer may be recorded twice under its name: it has its parameters once.
#[derive(Debug)]
pub struct Builder<'t> {
    /// The tape.
    pub tape: &'t mut Tape,
    /// Every parameter and buffer so far, in order of creation.
    pub params: Vec<ParamInfo>,
    /// Behaviour of batch norm.
    pub mode: Mode,
    /// Learning-rate group of parameters created from now on.
    pub group: ParamGroup,
    /// Whether parameters created from now on are trained.
    pub trainable: bool,
    /// What training fuses with convolutions.
    pub epilogues: Epilogues,
    dtype: DType,
    /// The sums that a convolution has computed of its result.
    sums: HashMap<ValueId, ValueId>,
    /// The means of what a batch norm has made, over the rows of each group.
    means: HashMap<ValueId, ValueId>,
    /// Weights as layers take them: in the activations' type, padded.
    prepared: HashMap<ValueId, ValueId>,
    /// The position of the node that makes all copies of weights in the activations' type.
    copies: Option<usize>,
}

impl<'t> Builder<'t> {
    /// Records on `tape` with activations of `dtype`; bf16 keeps float32 master weights.
    pub fn new(tape: &'t mut Tape, mode: Mode, dtype: DType) -> Builder<'t> {
        Builder {
            tape,
            params: Vec::new(),
            mode,
            group: ParamGroup::Encoder,
            trainable: true,
            epilogues: Epilogues::default(),
            dtype,
            sums: HashMap::new(),
            means: HashMap::new(),
            prepared: HashMap::new(),
            copies: None,
        }
    }

    /// Element type of the activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Element type of weights, statistics and gradients of weights.
    fn master(&self) -> DType {
        channel_desc(1, self.dtype).dtype
    }

    /// A convolution without bias; `kernel`, `stride` and `padding` hold in both directions.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn conv(
        &mut self,
        name: &str,
        x: ValueId,
        c_out: usize,
        [kernel, stride, padding]: [usize; 3],
    ) -> Result<ValueId> {
        let c_in = self.tape.desc(x).shape.channels();
        self.conv_of(name, x, [c_in, c_out], [kernel, stride, padding])
    }

    /// The same of the first `c_in` channels of x; the weights of the others, which are all zero, are none to be trained.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn conv_of(
        &mut self,
        name: &str,
        x: ValueId,
        [c_in, c_out]: [usize; 2],
        [kernel, stride, padding]: [usize; 3],
    ) -> Result<ValueId> {
        let channels = self.tape.desc(x).shape.channels();
        let init = Init::kaiming_fan_out([kernel; 2], c_out);
        let desc = TensorDesc::new([c_out, kernel, kernel, c_in], self.master());
        let w = self.param(&format!("{name}.weight"), desc, init);
        let statistics = match self.mode {
            Mode::Train { groups } if self.epilogues.statistics.contain(name, kernel, [channels, c_out]) => {
                Some(groups)
            }
            _ => None,
        };
        let join = self.epilogues.join(name, kernel, [channels, c_out]);
        let op = Conv2d { statistics, join, ..Conv2d::new([stride; 2], [padding; 2]) };
        let padded = (channels != c_in).then_some(channels);
        let w = self.prepare(name, w, padded)?;
        let outputs = self.tape.scoped(name, |tape| tape.record(op, &[x, w]))?;
        self.sums.extend(outputs.get(1).map(|sums| (outputs[0], *sums)));
        Ok(outputs[0])
    }

    /// Whether the convolution `name` with so many channels, kernel and padding is one whose result is not formed.
    pub fn is_gram(&self, name: &str, [c_in, c_out]: [usize; 2], [kernel, padding]: [usize; 2]) -> bool {
        let possible = kernel == 1 && padding == 0 && c_out > c_in && matches!(self.mode, Mode::Train { .. });
        possible && self.epilogues.gram.contain(name, kernel, [c_in, c_out])
    }

    /// The pixels that a 1x1 convolution with a stride reads.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn subsample(&mut self, name: &str, x: ValueId, stride: usize) -> Result<ValueId> {
        match stride {
            1 => Ok(x),
            _ => self.tape.scoped(name, |tape| tape.record_one(Subsample { stride }, &[x])),
        }
    }

    /// A convolution that [`Builder::norm_of`] goes on from.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn conv_to_norm(
        &mut self,
        name: &str,
        x: ValueId,
        c_out: usize,
        [kernel, stride, padding]: [usize; 3],
    ) -> Result<Convolved> {
        let c_in = self.tape.desc(x).shape.channels();
        let gram = self.is_gram(name, [c_in, c_out], [kernel, padding]);
        let (Mode::Train { groups }, true) = (self.mode, gram) else {
            return self.conv(name, x, c_out, [kernel, stride, padding]).map(Convolved::Formed);
        };
        let desc = TensorDesc::new([c_out, kernel, kernel, c_in], self.master());
        let w = self.param(&format!("{name}.weight"), desc, Init::kaiming_fan_out([kernel; 2], c_out));
        let x = self.subsample(name, x, stride)?;
        Ok(Convolved::Unformed { x, w, groups })
    }

    /// The batch norm of a convolution; `names` are those of both.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn norm_of(&mut self, [conv, name]: [&str; 2], y: Convolved, norm: Norm) -> Result<ValueId> {
        let (x, w, groups) = match y {
            Convolved::Formed(y) => return self.batch_norm(name, y, norm),
            Convolved::Unformed { x, w, groups } => (x, w, groups),
        };
        let c_out = self.tape.desc(w).shape.rows();
        let (affine, running) = self.batch_norm_leaves(name, c_out, norm);
        let layer = Layer { groups, eps: EPS, momentum: MOMENTUM, relu: norm.relu };
        let mean = self.means.get(&x).copied();
        let operands = Operands { z: x, mean, w, gamma: affine[0], beta: affine[1], residual: norm.residual, running };
        self.tape.scoped(conv, |tape| gram_norm::record(tape, layer, &operands))
    }

    /// The batch norms of two convolutions, of which the second is the way around a block, their sum and the ReLU; `names` are
    /// those of each convolution and its batch norm. The first one starts with gamma 0.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn norm_of_pair(&mut self, names: [[&str; 2]; 2], y: Convolved, r: Convolved) -> Result<ValueId> {
        if let (Convolved::Formed(x), Convolved::Formed(r), Mode::Train { groups }, true) =
            (y, r, self.mode, self.epilogues.shortcut)
        {
            return self.batch_norm_pair([names[0][1], names[1][1]], x, r, groups);
        }
        let residual = Some(self.norm_of(names[1], r, Norm::PLAIN)?);
        self.norm_of(names[0], y, Norm { residual, ..Norm::LAST })
    }

    fn batch_norm_pair(&mut self, [of_x, of_r]: [&str; 2], x: ValueId, r: ValueId, groups: usize) -> Result<ValueId> {
        let channels = self.tape.desc(x).shape.channels();
        let (affine_r, updates_r) = self.batch_norm_leaves(of_r, channels, Norm::PLAIN);
        let (affine, updates) = self.batch_norm_leaves(of_x, channels, Norm::LAST);
        let [sums, sums_r] = [x, r].map(|convolved| self.sums.get(&convolved).copied());

        let op = BatchNormStatistics::new(groups, EPS, MOMENTUM, sums_r.is_some());
        let inputs: Vec<ValueId> = [r].into_iter().chain(sums_r).collect();
        let statistics = self.tape.scoped(of_r, |tape| tape.record_updating(op, &inputs, &updates_r))?;

        let op = BatchNormPair::new(groups, EPS, MOMENTUM, sums.is_some());
        let of_r = [r].into_iter().chain(statistics).chain(affine_r);
        let inputs: Vec<ValueId> = [x].into_iter().chain(affine).chain(of_r).chain(sums).collect();
        self.tape.scoped(of_x, |tape| Ok(tape.record_updating(op, &inputs, &updates)?[0]))
    }

    /// A fully connected layer.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn linear(&mut self, name: &str, x: ValueId, out: usize, bias: bool) -> Result<ValueId> {
        let fan_in = self.tape.desc(x).shape.channels();
        let desc = TensorDesc::new([out, fan_in], self.master());
        let w = self.param(&format!("{name}.weight"), desc, Init::linear(fan_in));
        let mut bias_input = None;
        if bias {
            let desc = TensorDesc::new([out], self.master());
            bias_input = Some(self.param(&format!("{name}.bias"), desc, Init::linear(fan_in)));
        }
        let w = self.prepare(name, w, None)?;
        let inputs: Vec<ValueId> = [x, w].into_iter().chain(bias_input).collect();
        self.tape.scoped(name, |tape| tape.record_one(Linear, &inputs))
    }

    /// The weight `w` as layer `name` takes it: in the activations' type, with so many channels.
    fn prepare(&mut self, name: &str, w: ValueId, channels: Option<usize>) -> Result<ValueId> {
        if let Some(&prepared) = self.prepared.get(&w) {
            return Ok(prepared);
        }
        let copy = self.low_precision(w)?;
        let pad = |channels| self.tape.scoped(name, |tape| tape.record_one(PadChannels { channels }, &[copy]));
        let prepared = channels.map_or(Ok(copy), pad)?;
        self.prepared.insert(w, prepared);
        Ok(prepared)
    }

    /// The copy of a master weight in the activations' type; one node in front of the first layer makes all of them, whose
    /// launches would take longer than their bytes.
    fn low_precision(&mut self, w: ValueId) -> Result<ValueId> {
        if self.tape.desc(w).dtype == self.dtype {
            return Ok(w);
        }
        match self.copies {
            Some(node) => self.tape.extend(node, w),
            None => {
                self.copies = Some(self.tape.nodes().len());
                self.tape.record_one(Cast { to: self.dtype }, &[w])
            }
        }
    }

    /// The parameters of a batch norm over so many channels, and its running statistics.
    fn batch_norm_leaves(&mut self, name: &str, channels: usize, norm: Norm) -> (Vec<ValueId>, [ValueId; 3]) {
        let desc = channel_desc(channels, self.dtype);
        let mut affine = Vec::new();
        if norm.affine {
            affine.push(self.param(&format!("{name}.weight"), desc.clone(), Init::Constant(norm.gamma)));
            affine.push(self.param(&format!("{name}.bias"), desc.clone(), Init::Constant(0.0)));
        }
        let running_mean = self.buffer(&format!("{name}.running_mean"), desc.clone(), 0.0);
        let running_var = self.buffer(&format!("{name}.running_var"), desc, 1.0);
        let tracked = self.buffer(&format!("{name}.num_batches_tracked"), TensorDesc::new([], DType::I64), 0.0);
        (affine, [running_mean, running_var, tracked])
    }

    /// Batch norm, ReLU, and max pooling of 3x3 windows with stride 2 and padding 1.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn batch_norm_max_pool(&mut self, [norm, pool]: [&str; 2], x: ValueId) -> Result<ValueId> {
        let Mode::Train { groups } = self.mode else { return self.batch_norm_then_max_pool([norm, pool], x) };
        if !self.epilogues.pooling {
            return self.batch_norm_then_max_pool([norm, pool], x);
        }
        let (affine, updates) = self.batch_norm_leaves(norm, self.tape.desc(x).shape.channels(), Norm::RELU);
        let sums = self.sums.get(&x).copied();
        let inputs: Vec<ValueId> = [x].into_iter().chain(affine).chain(sums).collect();
        let op = BatchNormMaxPool::new(groups, EPS, MOMENTUM, sums.is_some());
        self.tape.scoped(norm, |tape| Ok(tape.record_updating(op, &inputs, &updates)?[0]))
    }

    fn batch_norm_then_max_pool(&mut self, [norm, pool]: [&str; 2], x: ValueId) -> Result<ValueId> {
        let x = self.batch_norm(norm, x, Norm::RELU)?;
        let taken = matches!(self.mode, Mode::Train { .. });
        let op = MaxPool { kernel: 3, stride: 2, padding: 1, taken };
        self.tape.scoped(pool, |tape| tape.record_one(op, &[x]))
    }

    /// Batch norm with what is fused around it.
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn batch_norm(&mut self, name: &str, x: ValueId, norm: Norm) -> Result<ValueId> {
        let (affine, updates) = self.batch_norm_leaves(name, self.tape.desc(x).shape.channels(), norm);
        let [running_mean, running_var, _] = updates;
        let fusion = Fusion { affine: norm.affine, residual: norm.residual.is_some(), relu: norm.relu };
        let (mode, sums) = (self.mode, self.sums.get(&x).copied());
        let (y, means) = self.tape.scoped(name, |tape| match mode {
            Mode::Train { groups } => {
                let inputs = [x].into_iter().chain(affine).chain(norm.residual).chain(sums);
                let inputs: Vec<ValueId> = inputs.collect();
                let op = BatchNorm {
                    groups,
                    eps: EPS,
                    momentum: MOMENTUM,
                    fusion,
                    sums_given: sums.is_some(),
                    means: norm.means,
                };
                let outputs = tape.record_updating(op, &inputs, &updates)?;
                let means = outputs.last().copied().filter(|_| norm.means);
                Ok((outputs[0], means))
            }
            Mode::Eval => {
                let inputs: Vec<ValueId> =
                    [x, running_mean, running_var].into_iter().chain(affine).chain(norm.residual).collect();
                Ok((tape.record_one(BatchNormEval { eps: EPS, fusion }, &inputs)?, None))
            }
        })?;
        self.means.extend(means.map(|means| (y, means)));
        Ok(y)
    }

    /// Takes the parameter `name` out of training.
    pub fn freeze(&mut self, name: &str) {
        if let Some(param) = self.params.iter_mut().find(|param| param.name == name) {
            param.trainable = false;
            self.tape.freeze(param.value);
        }
    }

    /// The value of a parameter or buffer that is there already.
    fn recorded(&self, name: &str) -> Option<ValueId> {
        self.params.iter().find(|param| param.name == name).map(|param| param.value)
    }

    fn param(&mut self, name: &str, desc: TensorDesc, init: Init) -> ValueId {
        if let Some(value) = self.recorded(name) {
            return value;
        }
        let trainable = self.trainable && matches!(self.mode, Mode::Train { .. });
        let value = self.tape.leaf(name, desc.clone(), Role::Parameter, trainable);
        self.params.push(ParamInfo { name: name.into(), value, desc, trainable, group: self.group, init });
        value
    }

    fn buffer(&mut self, name: &str, desc: TensorDesc, start: f64) -> ValueId {
        if let Some(value) = self.recorded(name) {
            return value;
        }
        let value = self.tape.leaf(name, desc.clone(), Role::State, false);
        let init = Init::Constant(start);
        self.params.push(ParamInfo { name: name.into(), value, desc, trainable: false, group: self.group, init });
        value
    }
}
