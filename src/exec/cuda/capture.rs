//! When a step is run node by node, and when it is replayed from a graph: the first step warms up, the second is captured for
//! every copy of the inputs, and nothing is made after that.

use crate::backend::cuda::{Driver, Graph};
use crate::error::{Error, Result};

/// Copies of the inputs, and so of the graph that reads them.
pub(super) const SLOTS: usize = 2;

/// Where an executor stands on the way from its first step to the replay of a graph.
#[derive(Debug, Default)]
pub(super) struct Capture {
    warm: bool,
    /// One for each copy of the inputs, once they are captured.
    graphs: Option<[Graph; SLOTS]>,
}

/// How a step is to be run.
#[derive(Debug)]
pub(super) enum Mode<'a> {
    /// Node by node: libraries and the driver load kernels and set themselves up on the way, which a capture forbids.
    Eager,
    /// Node by node into graphs, one of which is replayed then.
    Capture,
    /// From the graph.
    Replay(&'a Graph),
}

impl Capture {
    /// How the next step that reads copy `slot` of the inputs is to be run.
    pub fn mode(&self, slot: usize) -> Mode<'_> {
        match &self.graphs {
            _ if !self.warm => Mode::Eager,
            None => Mode::Capture,
            Some(graphs) => Mode::Replay(&graphs[slot]),
        }
    }

    /// Says that every node has run once.
    pub fn warmed_up(&mut self) {
        self.warm = true;
    }

    /// Captures what `launch` launches for each copy of the inputs, and returns the graph of `slot`. A capture is ended whatever
    /// happens in it.
    ///
    /// # Errors
    /// [`Error::Internal`] before a warm-up, or when there are graphs already; those of `launch` and of the driver.
    pub fn capture(
        &mut self,
        slot: usize,
        driver: &dyn Driver,
        launch: impl Fn(usize) -> Result<()>,
    ) -> Result<&Graph> {
        match self.mode(slot) {
            Mode::Capture => {}
            Mode::Eager => return Err(fault("a step is captured before one has run: nothing is warmed up")),
            Mode::Replay(_) => return Err(fault("a step is captured that has a graph already")),
        }
        let captured = |slot| {
            driver.synchronize()?;
            driver.begin_capture()?;
            let launched = launch(slot);
            let ended = driver.end_capture();
            launched.and(ended)
        };
        Ok(&self.graphs.insert([captured(0)?, captured(1)?])[slot])
    }
}

fn fault(message: &str) -> Error {
    Error::Internal { thread: "CUDA graph".into(), message: message.into() }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::backend::cuda::Emulator;
    use crate::backend::cuda::emulator::Options;

    #[test]
    fn the_way_to_a_replay_has_no_short_cut() {
        let device = Emulator::new(Options { threads: 1, seed: 0 }).unwrap();
        let mut capture = Capture::default();
        assert!(matches!(capture.mode(0), Mode::Eager));
        let early = capture.capture(1, &device, |_| Ok(())).unwrap_err().to_string();
        assert!(early.contains("before one has run"), "{early}");
        capture.warmed_up();
        assert!(matches!(capture.mode(1), Mode::Capture));
        let captured = RefCell::new(Vec::new());
        let launch = |slot| {
            captured.borrow_mut().push(slot);
            Ok(())
        };
        capture.capture(1, &device, launch).unwrap();
        assert_eq!(*captured.borrow(), [0, 1], "one graph for each copy of the inputs");
        assert!(matches!((capture.mode(0), capture.mode(1)), (Mode::Replay(_), Mode::Replay(_))));
        let twice = capture.capture(1, &device, |_| Ok(())).unwrap_err().to_string();
        assert!(twice.contains("has a graph already"), "{twice}");
    }

    #[test]
    fn a_failed_capture_is_ended_and_can_be_tried_again() {
        let device = Emulator::new(Options { threads: 1, seed: 0 }).unwrap();
        let mut capture = Capture::default();
        capture.warmed_up();
        let refused = capture.capture(1, &device, |_| device.allocate(64).map(|_| ())).unwrap_err().to_string();
        assert!(refused.contains("cannot allocate memory while a graph is captured"), "{refused}");
        let lost = capture.capture(1, &device, |_| device.download(Default::default(), &mut []).or(Ok(())));
        assert!(lost.unwrap_err().to_string().contains("the capture was lost"));
        assert!(matches!(capture.mode(0), Mode::Capture));
        capture.capture(1, &device, |_| Ok(())).unwrap();
        let memory = device.allocate(64).unwrap();
        device.free(memory).unwrap();
    }
}
