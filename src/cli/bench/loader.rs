//! `bench loader`: the loader without a training step behind it, or with one that takes its time.

use std::io::{self, IsTerminal, Write, stderr};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressStyle};
use serde_json::json;

use crate::cli::{machine, output};
use crate::data::augment::AugmentConfig;
use crate::data::dataset::Dataset;
use crate::data::loader::{Loader, LoaderConfig, Output, Position, Work};
use crate::data::mapped::Access;
use crate::error::{Error, Result};

/// A consumer that waits for less than this share of its time is fed.
const FED: f64 = 0.05;
/// A disk that delivers more than this share of the bytes is in use; else they lie in memory.
const FROM_DISK: f64 = 0.1;
/// Time between looks at the memory, and updates of the display.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Time between plain lines, when standard error is not a terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// The views of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Views {
    /// As `train --preset imagenet`, on the CPU.
    Imagenet,
    /// As `train --preset cifar`, on the CPU.
    Cifar,
    /// Stored pixels and what was drawn for the views: a device makes them.
    None,
}

#[derive(Debug, clap::Args)]
pub struct LoaderArgs {
    /// Dataset file, or manifest of several.
    data: PathBuf,
    /// Images per batch.
    #[arg(long, value_name = "N", default_value_t = 256)]
    batch: usize,
    /// Threads that read and augment images, of every rank [default: one per core].
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// How records are read.
    #[arg(long, value_enum, default_value_t)]
    io: Access,
    /// Shuffle within windows of N records, each read from its start to its end: for slow disks; 0: all at once.
    #[arg(long, value_name = "N", default_value_t = 0)]
    shuffle_window: u64,
    /// Which views the CPU makes.
    #[arg(long, value_enum, default_value_t = Views::Imagenet)]
    augment: Views,
    /// Simulate a training step that takes RATE images a second.
    #[arg(long, value_name = "RATE")]
    consume: Option<f64>,
    /// Share every batch among N loaders, as N devices would.
    #[arg(long, value_name = "N", default_value_t = 1)]
    ranks: usize,
    /// How long to measure.
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    seconds: f64,
    /// How long to run before that.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    warm_up: f64,
    /// Batches in memory, of every rank.
    #[arg(long, value_name = "N", default_value_t = 3)]
    loader_slots: usize,
    /// Seed of order and augmentation.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &LoaderArgs) -> Result<()> {
    args.validate()?;
    let dataset = Arc::new(Dataset::open_with(&args.data, args.io)?);
    let mut bench = Bench::start(args, &dataset)?;
    bench.run(args.warm_up, "warming up")?;
    let measured = bench.run(args.seconds, "measuring")?;
    let report = Report { args, dataset: &dataset, measured, peak_anonymous: bench.peak_anonymous };
    output::print(|out| if args.json { writeln!(out, "{:#}", report.json()) } else { report.print(out) })
}

impl LoaderArgs {
    fn validate(&self) -> Result<()> {
        let numbers = [("--seconds", Some(self.seconds)), ("--consume", self.consume)];
        for (option, value) in numbers {
            if value.is_some_and(|value| !(value > 0.0 && value <= 1e9)) {
                let what = format!("expected a number above 0, got {}", value.unwrap_or_default());
                return Err(Error::config(option, what));
            }
        }
        if !(0.0..=1e9).contains(&self.warm_up) {
            return Err(Error::config("--warm-up", format!("expected 0 or more seconds, got {}", self.warm_up)));
        }
        if self.ranks == 0 {
            return Err(Error::config("--ranks", "expected at least 1, got 0"));
        }
        Ok(())
    }

    fn workers(&self) -> usize {
        self.workers.unwrap_or_else(machine::cores)
    }

    fn config(&self, rank: usize) -> LoaderConfig {
        LoaderConfig {
            batch: self.batch,
            seed: self.seed,
            augment: if self.augment == Views::Cifar { AugmentConfig::cifar() } else { AugmentConfig::imagenet() },
            output: if self.augment == Views::None { Output::Records } else { Output::Views },
            shuffle_window: self.shuffle_window,
            rank,
            world_size: self.ranks,
            workers: self.workers(),
            slots: self.loader_slots,
            epochs: None,
        }
    }
}

/// Loaders, one for each rank, and a consumer.
struct Bench {
    loaders: Vec<Loader>,
    batch: usize,
    /// How long the consumer works on a batch.
    step_time: Duration,
    /// When it is done with the last one. Its clock runs on by waiting and working alone: what a sleep takes too long is
    /// made up for.
    done_at: Instant,
    peak_anonymous: u64,
}

/// What happened in some time.
#[derive(Debug, Clone, Copy)]
struct Measured {
    seconds: f64,
    /// Images that the consumer got.
    images: u64,
    /// How long it waited for them.
    waited: Duration,
    work: Work,
    from_storage: Option<u64>,
}

impl Bench {
    fn start(args: &LoaderArgs, dataset: &Arc<Dataset>) -> Result<Bench> {
        let start = |rank| Loader::start(dataset.clone(), args.config(rank), Position::default());
        Ok(Bench {
            loaders: (0..args.ranks).map(start).collect::<Result<_>>()?,
            batch: args.batch,
            step_time: args.consume.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(args.batch as f64 / rate)),
            done_at: Instant::now(),
            peak_anonymous: 0,
        })
    }

    /// Consumes batches for `seconds`, at least one.
    fn run(&mut self, seconds: f64, verb: &'static str) -> Result<Measured> {
        let mut display = Display::new(seconds, verb);
        self.done_at = Instant::now();
        let (start, work, storage) = (Instant::now(), self.work(), machine::read_from_storage());
        let (mut images, mut waited, mut look_due) = (0, Duration::ZERO, Duration::ZERO);
        while images == 0 || start.elapsed().as_secs_f64() < seconds {
            waited += self.step()?;
            images += self.batch as u64;
            if start.elapsed() >= look_due {
                look_due = start.elapsed() + LOOK_EVERY;
                self.peak_anonymous = machine::anonymous_memory().unwrap_or(0).max(self.peak_anonymous);
                display.update(start.elapsed(), images);
            }
        }
        let from_storage = machine::read_from_storage().zip(storage).map(|(after, before)| after - before);
        let (seconds, work) = (start.elapsed().as_secs_f64(), self.work() - work);
        Ok(Measured { seconds, images, waited, work, from_storage })
    }

    /// A training step: a batch from every rank, then the time it takes to train on them. Returns the time spent waiting.
    fn step(&mut self) -> Result<Duration> {
        let start = Instant::now();
        let batches = self.loaders.iter_mut().map(Loader::next_batch).collect::<Result<Vec<_>>>()?;
        let waited = start.elapsed();
        self.done_at += waited + self.step_time;
        if self.step_time > Duration::ZERO {
            sleep(self.done_at.saturating_duration_since(Instant::now()));
        }
        drop(batches);
        Ok(waited)
    }

    fn work(&self) -> Work {
        self.loaders.iter().map(Loader::work).fold(Work::default(), |sum, work| sum + work)
    }
}

/// Progress on standard error.
struct Display {
    bar: Option<ProgressBar>,
    verb: &'static str,
    line_due: Duration,
}

impl Display {
    fn new(seconds: f64, verb: &'static str) -> Display {
        let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {msg}");
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new((seconds * 1e3) as u64).with_prefix(verb);
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Display { bar, verb, line_due: LINE_EVERY }
    }

    fn update(&mut self, elapsed: Duration, images: u64) {
        let rate = format!("{:.0} images/s", images as f64 / elapsed.as_secs_f64().max(1e-9));
        if let Some(bar) = &self.bar {
            bar.set_position(elapsed.as_millis() as u64);
            bar.set_message(rate);
        } else if elapsed >= self.line_due {
            self.line_due = elapsed + LINE_EVERY;
            eprintln!("{}: {rate}", self.verb);
        }
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// What keeps the images from coming faster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bottleneck {
    Consumer,
    Disk,
    Memory,
    Decode,
    Augment,
    Copy,
}

impl Bottleneck {
    fn name(self) -> &'static str {
        match self {
            Bottleneck::Consumer => "consumer",
            Bottleneck::Disk => "disk",
            Bottleneck::Memory => "memory",
            Bottleneck::Decode => "decode",
            Bottleneck::Augment => "augment",
            Bottleneck::Copy => "copy",
        }
    }

    fn advice(self) -> &'static str {
        match self {
            Bottleneck::Consumer => "the loader keeps up",
            Bottleneck::Disk => "a faster disk, --shuffle-window, or a smaller store (`prepare --store jpeg:S`) helps",
            Bottleneck::Memory => {
                "fetching and checking records that lie in memory; more --workers help, up to the cores"
            }
            Bottleneck::Decode => "decoding JPEG; more cores help, or pixels stored raw (`prepare --store raw:256`)",
            Bottleneck::Augment => "making views on the CPU; more cores help, or a device that makes them",
            Bottleneck::Copy => "copying pixels into the batch; more --workers help, up to the cores",
        }
    }
}

struct Report<'a> {
    args: &'a LoaderArgs,
    dataset: &'a Dataset,
    measured: Measured,
    peak_anonymous: u64,
}

impl Report<'_> {
    fn images_per_s(&self) -> f64 {
        self.measured.images as f64 / self.measured.seconds
    }

    fn wait_share(&self) -> f64 {
        self.measured.waited.as_secs_f64() / self.measured.seconds
    }

    /// Share of the workers' time in which they had work to do.
    fn busy_share(&self) -> f64 {
        let workers = (self.args.ranks * self.args.workers()) as f64;
        self.measured.work.total().as_secs_f64() / (workers * self.measured.seconds)
    }

    /// Name, time and what it is as a bottleneck, of every stage.
    fn stages(&self) -> [(&'static str, Duration, Bottleneck); 3] {
        let work = &self.measured.work;
        let from_disk = self.measured.from_storage.unwrap_or(0) as f64 > FROM_DISK * work.bytes as f64;
        let read = if from_disk { Bottleneck::Disk } else { Bottleneck::Memory };
        let last = if self.args.augment == Views::None { Bottleneck::Copy } else { Bottleneck::Augment };
        [("read", work.read, read), ("decode", work.decode, Bottleneck::Decode), (last.name(), work.finish, last)]
    }

    fn bottleneck(&self) -> Bottleneck {
        if self.args.consume.is_some() && self.wait_share() < FED {
            return Bottleneck::Consumer;
        }
        self.stages().into_iter().max_by_key(|stage| stage.1).map_or(Bottleneck::Consumer, |stage| stage.2)
    }

    fn us_per_image(&self, time: Duration) -> f64 {
        time.as_secs_f64() * 1e6 / self.measured.work.images.max(1) as f64
    }

    fn share(&self, time: Duration) -> f64 {
        time.as_secs_f64() / self.measured.work.total().as_secs_f64().max(1e-9)
    }

    /// Workers, all of them busy, that the rate of the consumer needs.
    fn workers_needed(&self) -> Option<f64> {
        self.args.consume.map(|rate| self.us_per_image(self.measured.work.total()) * 1e-6 * rate)
    }

    fn megabytes_per_s(&self, bytes: u64) -> f64 {
        bytes as f64 / 1e6 / self.measured.seconds
    }

    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let Report { args, dataset, .. } = self;
        let (path, images, bytes) =
            (dataset.path().display(), HumanCount(dataset.len() as u64), HumanBytes(dataset.bytes()));
        row(out, "data", format!("{path}: {images} images, {bytes}, {}", self.access()))?;
        let cpu = machine::cpu_name().unwrap_or_else(|| "unknown processor".into());
        row(out, "machine", format!("{cpu}, {} cores; {} workers", machine::cores(), args.ranks * args.workers()))?;
        self.print_speed(out)?;
        self.print_work(out)?;
        if let Some(peak) = machine::peak_memory() {
            let (own, peak) = (HumanBytes(self.peak_anonymous), HumanBytes(peak));
            row(out, "memory", format!("peak {own} of its own, {peak} with mapped files"))?;
        }
        let bottleneck = self.bottleneck();
        let needed = self.workers_needed().filter(|_| bottleneck != Bottleneck::Consumer);
        let needed = needed.map_or(String::new(), |n| format!("; {n:.1} such workers would be needed"));
        row(out, "bottleneck", format!("{}: {}{needed}", bottleneck.name(), bottleneck.advice()))
    }

    fn print_speed(&self, out: &mut dyn Write) -> io::Result<()> {
        let speed = self.images_per_s();
        row(out, "speed", format!("{speed:.0} images/s, {:.0} views/s", 2.0 * speed))?;
        let records = self.megabytes_per_s(self.measured.work.bytes);
        let disk =
            self.measured.from_storage.map(|bytes| format!(", {:.0} MB/s from the disk", self.megabytes_per_s(bytes)));
        row(out, "records", format!("{records:.0} MB/s{}", disk.unwrap_or_default()))?;
        let consumer =
            self.args.consume.map_or("takes batches at once".into(), |rate| format!("takes {rate} images/s"));
        row(out, "consumer", format!("{consumer}, waits for {:.1} % of its time", 100.0 * self.wait_share()))
    }

    fn print_work(&self, out: &mut dyn Write) -> io::Result<()> {
        row(out, "workers", format!("busy for {:.0} % of their time", 100.0 * self.busy_share()))?;
        self.stages().into_iter().try_for_each(|(name, time, _)| {
            let (us, share) = (self.us_per_image(time), 100.0 * self.share(time));
            row(out, &format!("  {name}"), format!("{us:>8.1} us an image, {share:>5.1} %"))
        })
    }

    /// How records are read, as the option is typed.
    fn access(&self) -> String {
        format!("{:?}", self.dataset.access()).to_lowercase()
    }

    fn json(&self) -> serde_json::Value {
        let Report { args, dataset, measured, .. } = self;
        let stage = |time| json!({ "us_per_image": self.us_per_image(time), "share": self.share(time) });
        let stages: serde_json::Map<_, _> =
            self.stages().into_iter().map(|(name, time, _)| (name.to_string(), stage(time))).collect();
        json!({
            "data": dataset.path(),
            "records": dataset.len(),
            "data_bytes": dataset.bytes(),
            "batch": args.batch,
            "ranks": args.ranks,
            "workers_per_rank": args.workers(),
            "io": self.access(),
            "shuffle_window": args.shuffle_window,
            "augment": format!("{:?}", args.augment).to_lowercase(),
            "consume": args.consume,
            "seconds": measured.seconds,
            "images": measured.images,
            "images_per_s": self.images_per_s(),
            "views_per_s": 2.0 * self.images_per_s(),
            "mb_per_s": self.megabytes_per_s(measured.work.bytes),
            "disk_mb_per_s": measured.from_storage.map(|bytes| self.megabytes_per_s(bytes)),
            "wait_share": self.wait_share(),
            "worker_busy_share": self.busy_share(),
            "workers_needed": self.workers_needed(),
            "stages": stages,
            "bottleneck": self.bottleneck().name(),
            "peak_anonymous_bytes": self.peak_anonymous,
            "peak_rss_bytes": machine::peak_memory(),
            "machine": { "cpu": machine::cpu_name(), "cores": machine::cores() },
        })
    }
}

fn row(out: &mut dyn Write, label: &str, text: String) -> io::Result<()> {
    writeln!(out, "{label:<12}{text}")
}
