//! The two streams of an emulated device: queues of tasks that run as late as the rules allow, and in an order drawn from a
//! seed, so that a wait that the engine forgot shows as stale data.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::cuda::{Call, DevicePtr, Event, Graph, Grid, HostTask, Stream};
use crate::error::{Error, Result};
use crate::rng::Stream as Random;

/// Something that a stream does.
#[derive(Clone)]
pub(super) enum Task {
    Launch(Grid, Call),
    Host(HostTask),
    Upload { to: DevicePtr, from: HostRange },
    Download { from: DevicePtr, to: HostRange },
    Record(Arc<Mark>, u64),
    Wait(Arc<Mark>, u64),
}

/// Pinned memory of the host, which lives until the task has run: the promise of `Driver::upload_later`.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostRange {
    pub address: u64,
    pub bytes: usize,
}

/// What runs the tasks of a device.
pub(super) trait Machine {
    fn run(&self, task: &Task) -> Result<()>;
}

/// The state of an event: it is passed when the newest record has run.
#[derive(Debug, Default)]
pub(super) struct Mark {
    recorded: AtomicU64,
    passed: AtomicU64,
    time: Mutex<Option<Instant>>,
}

impl Mark {
    pub fn event() -> Event {
        Event(Box::new(Arc::new(Mark::default())))
    }

    fn of(event: &Event) -> Result<&Arc<Mark>> {
        event.0.downcast_ref().ok_or_else(|| fault("an event of another device".into()))
    }

    fn is_passed(&self, record: u64) -> bool {
        self.passed.load(Ordering::Acquire) >= record
    }

    fn time(&self) -> Option<Instant> {
        *self.time.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The tasks of a captured graph.
struct Captured(Vec<Task>);

#[derive(Default)]
struct Queues {
    waiting: [VecDeque<Task>; 2],
    capture: Option<Capture>,
    random: Option<Random>,
}

/// A capture in progress.
#[derive(Default)]
struct Capture {
    tasks: Vec<Task>,
    /// The first call that a capture does not allow: the device throws the capture away for it.
    broken_by: Option<&'static str>,
}

/// Both streams.
#[derive(Default)]
pub(super) struct Streams(Mutex<Queues>);

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Streams")
    }
}

/// Domain of the random numbers that order the streams.
const ORDER: u32 = 0x57_52;

impl Streams {
    pub fn new(seed: u64) -> Streams {
        let random = Some(Random::new(seed, ORDER, 0));
        Streams(Mutex::new(Queues { random, ..Queues::default() }))
    }

    fn queues(&self) -> std::sync::MutexGuard<'_, Queues> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a task: into the capture if there is one, at once when nothing on the compute stream comes before it, else
    /// later. Copies on the copy stream always run later.
    pub fn start(&self, stream: Stream, task: Task, machine: &dyn Machine) -> Result<()> {
        let mut queues = self.queues();
        if stream == Stream::Compute {
            if let Some(capture) = &mut queues.capture {
                capture.tasks.push(task);
                return Ok(());
            }
            if queues.waiting[Stream::Compute as usize].is_empty() && queues.may_run(&task) {
                return machine.run(&task).map(|()| passed(&task));
            }
        }
        queues.waiting[stream as usize].push_back(task);
        Ok(())
    }

    pub fn record(&self, event: &Event, stream: Stream, machine: &dyn Machine) -> Result<()> {
        self.allow("record an event")?;
        let mark = Mark::of(event)?;
        let record = mark.recorded.fetch_add(1, Ordering::AcqRel) + 1;
        self.start(stream, Task::Record(mark.clone(), record), machine)
    }

    pub fn wait(&self, stream: Stream, event: &Event, machine: &dyn Machine) -> Result<()> {
        self.allow("wait for an event")?;
        let mark = Mark::of(event)?;
        let record = mark.recorded.load(Ordering::Acquire);
        self.start(stream, Task::Wait(mark.clone(), record), machine)
    }

    /// Runs tasks until the event is passed.
    pub fn finish(&self, event: &Event, machine: &dyn Machine) -> Result<()> {
        self.allow("wait for an event")?;
        let mark = Mark::of(event)?;
        let record = mark.recorded.load(Ordering::Acquire);
        self.queues().run_until(machine, |_| mark.is_passed(record))
    }

    /// Runs tasks until a stream has none.
    pub fn drain(&self, stream: Stream, machine: &dyn Machine) -> Result<()> {
        self.queues().run_until(machine, |queues| queues.waiting[stream as usize].is_empty())
    }

    pub fn elapsed(&self, start: &Event, end: &Event) -> Result<Duration> {
        match (Mark::of(start)?.time(), Mark::of(end)?.time()) {
            (Some(start), Some(end)) => Ok(end.saturating_duration_since(start)),
            _ => Err(fault("an event was not recorded, or is not passed".into())),
        }
    }

    /// Checks that `action` is not done while a graph is captured.
    pub fn allow(&self, action: &'static str) -> Result<()> {
        let mut queues = self.queues();
        let Some(capture) = &mut queues.capture else { return Ok(()) };
        capture.broken_by.get_or_insert(action);
        Err(fault(format!("cannot {action} while a graph is captured")))
    }

    pub fn begin_capture(&self) -> Result<()> {
        let mut queues = self.queues();
        if queues.capture.is_some() {
            return Err(fault("cannot begin a capture: one goes on already".into()));
        }
        queues.capture = Some(Capture::default());
        Ok(())
    }

    pub fn end_capture(&self) -> Result<Graph> {
        match self.queues().capture.take() {
            None => Err(fault("cannot end a capture: none has begun".into())),
            Some(Capture { broken_by: Some(action), .. }) => {
                Err(fault(format!("the capture was lost when something tried to {action}")))
            }
            Some(Capture { tasks, .. }) => Ok(Graph(Box::new(Captured(tasks)))),
        }
    }

    pub fn replay(&self, graph: &Graph, machine: &dyn Machine) -> Result<()> {
        self.allow("replay a graph")?;
        let graph: &dyn Any = &*graph.0;
        let captured = graph.downcast_ref::<Captured>().ok_or_else(|| fault("a graph of another device".into()))?;
        captured.0.iter().try_for_each(|task| self.start(Stream::Compute, task.clone(), machine))
    }
}

impl Queues {
    fn may_run(&self, task: &Task) -> bool {
        match task {
            Task::Wait(mark, record) => mark.is_passed(*record),
            _ => true,
        }
    }

    /// Runs the first task of one stream or the other, by chance, until `done`. A fault loses what still waits.
    fn run_until(&mut self, machine: &dyn Machine, done: impl Fn(&Queues) -> bool) -> Result<()> {
        while !done(self) {
            let ready = |queue: &VecDeque<Task>| queue.front().is_some_and(|task| self.may_run(task));
            let stream = match [ready(&self.waiting[0]), ready(&self.waiting[1])] {
                [true, true] => self.random.as_mut().map_or(0, |random| (random.word() & 1) as usize),
                [true, false] => 0,
                [false, true] => 1,
                [false, false] => return Err(self.stuck()),
            };
            let Some(task) = self.waiting[stream].pop_front() else { return Err(self.stuck()) };
            match machine.run(&task) {
                Ok(()) => passed(&task),
                Err(error) => {
                    self.waiting = Default::default();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn stuck(&self) -> Error {
        let [compute, copy] = [&self.waiting[0], &self.waiting[1]].map(VecDeque::len);
        fault(format!("the streams wait for each other, with {compute} tasks to compute and {copy} copies to make"))
    }
}

/// Marks an event as passed.
fn passed(task: &Task) {
    if let Task::Record(mark, record) = task {
        *mark.time.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        mark.passed.fetch_max(*record, Ordering::AcqRel);
    }
}

fn fault(message: String) -> Error {
    Error::Internal { thread: "emulated CUDA device".into(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes down which tasks ran; a task is told by its address.
    #[derive(Default)]
    struct Log(Mutex<Vec<u64>>);

    impl Machine for Log {
        fn run(&self, task: &Task) -> Result<()> {
            if let Task::Upload { to, .. } | Task::Download { from: to, .. } = task {
                self.0.lock().unwrap().push(to.0);
            }
            Ok(())
        }
    }

    impl Log {
        fn ran(&self) -> Vec<u64> {
            self.0.lock().unwrap().clone()
        }
    }

    fn task(number: u64) -> Task {
        Task::Upload { to: DevicePtr(number), from: HostRange { address: 0, bytes: 0 } }
    }

    #[test]
    fn copies_run_late_and_a_wait_orders_them() {
        let (streams, log) = (Streams::new(1), Log::default());
        let event = Mark::event();
        streams.start(Stream::Copy, task(1), &log).unwrap();
        streams.record(&event, Stream::Copy, &log).unwrap();
        streams.start(Stream::Compute, task(2), &log).unwrap();
        assert_eq!(log.ran(), [2], "nothing waited for the copy");
        streams.wait(Stream::Compute, &event, &log).unwrap();
        streams.start(Stream::Compute, task(3), &log).unwrap();
        assert_eq!(log.ran(), [2], "what waits does not run before somebody needs it");
        streams.drain(Stream::Compute, &log).unwrap();
        assert_eq!(log.ran(), [2, 1, 3]);
    }

    #[test]
    fn without_a_wait_some_seed_puts_the_copy_last() {
        let orders = (0..8).map(|seed| {
            let (streams, log) = (Streams::new(seed), Log::default());
            let gate = Mark::event();
            streams.start(Stream::Copy, task(9), &log).unwrap();
            streams.record(&gate, Stream::Copy, &log).unwrap();
            streams.wait(Stream::Compute, &gate, &log).unwrap();
            streams.start(Stream::Compute, task(2), &log).unwrap();
            streams.start(Stream::Copy, task(1), &log).unwrap();
            streams.drain(Stream::Compute, &log).unwrap();
            streams.drain(Stream::Copy, &log).unwrap();
            log.ran()
        });
        let orders: Vec<_> = orders.collect();
        assert!(orders.contains(&vec![9, 1, 2]) && orders.contains(&vec![9, 2, 1]), "{orders:?}");
    }

    #[test]
    fn a_graph_is_written_down_and_replayed() {
        let (streams, log) = (Streams::new(0), Log::default());
        streams.begin_capture().unwrap();
        streams.start(Stream::Compute, task(1), &log).unwrap();
        streams.start(Stream::Compute, task(2), &log).unwrap();
        let graph = streams.end_capture().unwrap();
        assert!(log.ran().is_empty());
        streams.replay(&graph, &log).unwrap();
        streams.replay(&graph, &log).unwrap();
        assert_eq!(log.ran(), [1, 2, 1, 2]);
    }

    #[test]
    fn a_capture_refuses_what_a_graph_cannot_hold() {
        let (streams, log) = (Streams::new(0), Log::default());
        assert!(streams.end_capture().unwrap_err().to_string().contains("none has begun"));
        streams.begin_capture().unwrap();
        assert!(streams.begin_capture().unwrap_err().to_string().contains("one goes on already"));
        assert!(streams.allow("allocate memory").unwrap_err().to_string().contains("cannot allocate memory"));
        let lost = streams.end_capture().unwrap_err().to_string();
        assert!(lost.contains("lost when something tried to allocate memory"), "{lost}");
        streams.start(Stream::Compute, task(1), &log).unwrap();
        assert_eq!(log.ran(), [1], "the device works again");
    }

    #[test]
    fn waiting_for_what_nobody_starts_is_an_error() {
        let (streams, log) = (Streams::new(0), Log::default());
        let (first, second) = (Mark::event(), Mark::event());
        let never = Mark::of(&first).unwrap();
        never.recorded.store(1, Ordering::Release);
        streams.wait(Stream::Compute, &first, &log).unwrap();
        streams.record(&second, Stream::Compute, &log).unwrap();
        assert!(streams.finish(&second, &log).unwrap_err().to_string().contains("wait for each other"));
        assert!(streams.elapsed(&first, &second).is_err());
    }
}
