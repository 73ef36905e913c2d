//! `eval knn`: weighted kNN accuracy, many settings in one pass.

use std::io::{self, Write};
use std::path::PathBuf;

use serde_json::{Value, json};

use super::super::meter::Meter;
use super::super::output::print;
use super::{NetworkArgs, dataset_facts, percent};
use crate::error::{Error, Result};
use crate::eval::features::{FeatureSource, Pixels};
use crate::eval::scores::Confusion;
use crate::eval::sweep::{KnnTask, Setting, Sweep, SweepResult};
use crate::exec::Device;
use crate::report::chart::confusion::write_confusion;

/// Up to so many classes the confusion is printed.
const PRINTED_CLASSES: usize = 12;
/// Up to so many classes the accuracy of each is printed; of more, the worst.
const LISTED_CLASSES: usize = 20;
/// Classes that are named when there are more.
const WORST_CLASSES: usize = 10;

#[derive(Debug, clap::Args)]
pub struct KnnArgs {
    #[command(flatten)]
    network: NetworkArgs,
    /// Labelled dataset file whose images vote.
    #[arg(long, value_name = "FILE")]
    bank: PathBuf,
    /// Labelled dataset file whose images are classified.
    #[arg(long, value_name = "FILE")]
    queries: PathBuf,
    /// Numbers of neighbours that vote.
    #[arg(long, value_name = "K,...", value_delimiter = ',', default_value = "1,5,10,20,50,100,200")]
    k: Vec<usize>,
    /// Temperatures T of the votes, exp(cos / T).
    #[arg(long, value_name = "T,...", value_delimiter = ',', default_value = "0.07,0.1,0.2")]
    temperature: Vec<f64>,
    /// Measure the raw pixels and the untrained network too.
    #[arg(long)]
    compare: bool,
    /// Write which class is taken for which as a PNG.
    #[arg(long, value_name = "PNG")]
    confusion: Option<PathBuf>,
    /// About how much memory features may take, in MiB; where the queries need more, the bank is passed over several times.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: usize,
}

/// Features, by what they are, and how well they do.
struct Figure {
    name: &'static str,
    title: &'static str,
    result: SweepResult,
}

pub fn run(args: &KnnArgs) -> Result<()> {
    if args.memory == 0 {
        return Err(Error::config("--memory", "expected at least 1 MiB, got 0"));
    }
    let sweep = Sweep::new(&args.k, &args.temperature)?;
    let (bank, queries) = (args.network.dataset(&args.bank)?, args.network.dataset(&args.queries)?);
    let task = KnnTask::new(&bank, &queries, sweep)?;
    let mut network = args.network.open()?;
    eprintln!("{}", network.title);
    let mut figures =
        vec![figure(args, &task, &mut network.extractor, &network.device, ["trained", "trained network"])?];
    if args.compare {
        network.extractor.initialise(network.seed)?;
        let untrained = ["untrained", "untrained network"];
        figures.push(figure(args, &task, &mut network.extractor, &network.device, untrained)?);
        let mut pixels = Pixels::new(&network.augment);
        figures.push(figure(args, &task, &mut pixels, &network.device, ["raw_pixels", "raw pixels"])?);
    }
    let trained = &figures[0].result;
    if let Some(path) = &args.confusion {
        let title = format!("kNN, {}", setting(trained.best()));
        let rows: Vec<&[u64]> = trained.confusion.rows().collect();
        write_confusion(path, &title, bank.classes(), &rows)?;
    }
    print(|out| match args.network.json {
        true => {
            let datasets = [dataset_facts(&bank), dataset_facts(&queries)];
            writeln!(out, "{:#}", report(&network.facts, datasets, bank.classes(), &figures))
        }
        false => {
            writeln!(out, "{} images vote, {} are classified\n", bank.len(), queries.len())?;
            print_table(&figures, out)?;
            print_best(&figures, out)?;
            print_classes(bank.classes(), &trained.confusion, out)?;
            args.confusion.iter().try_for_each(|path| writeln!(out, "\nconfusion: {}", path.display()))
        }
    })
}

fn figure(
    args: &KnnArgs,
    task: &KnnTask<'_>,
    source: &mut dyn FeatureSource,
    device: &Device,
    [name, title]: [&'static str; 2],
) -> Result<Figure> {
    let memory = args.memory << 20;
    if let (shape, passes @ 2..) = task.passes(source.dim(), memory) {
        eprintln!(
            "{title}: {passes} passes over the bank, for {} queries each; with a larger --memory they are fewer",
            shape.queries
        );
    }
    let mut meter = Meter::new(title, task.images(source.dim(), memory));
    let mut done = 0;
    let result = task.evaluate(source, device, memory, &mut |images| {
        done += images;
        meter.set(done);
    });
    meter.finish();
    Ok(Figure { name, title, result: result? })
}

fn setting(setting: &Setting) -> String {
    format!("k = {}, T = {}", setting.k, setting.temperature)
}

fn report(network: &Value, [bank, queries]: [Value; 2], classes: &[String], figures: &[Figure]) -> Value {
    let mut report = json!({ "network": network, "bank": bank, "queries": queries, "classes": classes });
    for Figure { name, result, .. } in figures {
        let per_class = result.confusion.per_class();
        let per_class: Vec<Value> = classes
            .iter()
            .zip(per_class)
            .map(|(class, (images, accuracy))| json!({ "class": class, "images": images, "accuracy": accuracy }))
            .collect();
        report[*name] = json!({
            "settings": result.settings,
            "best": result.best(),
            "per_class": per_class,
            "confusion": result.confusion.rows().collect::<Vec<_>>(),
        });
    }
    report
}

/// A row for each setting, a pair of columns for each kind of features.
fn print_table(figures: &[Figure], out: &mut dyn Write) -> io::Result<()> {
    write!(out, "{:>4} {:>6}", "", "")?;
    figures.iter().try_for_each(|figure| write!(out, "  {:^21}", figure.title))?;
    write!(out, "\n{:>4} {:>6}", "k", "T")?;
    figures.iter().try_for_each(|_| write!(out, "  {:>10} {:>10}", "top-1", "top-5"))?;
    writeln!(out)?;
    let Some(first) = figures.first() else { return Ok(()) };
    for (place, Setting { k, temperature, .. }) in first.result.settings.iter().enumerate() {
        write!(out, "{k:>4} {temperature:>6}")?;
        for Figure { result, .. } in figures {
            let accuracy = result.settings[place].accuracy;
            write!(out, "  {:>10} {:>10}", percent(accuracy.top1), percent(accuracy.top5))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn print_best(figures: &[Figure], out: &mut dyn Write) -> io::Result<()> {
    writeln!(out, "\nbest of these settings (chosen on the queries themselves):")?;
    for Figure { title, result, .. } in figures {
        let best = result.best();
        writeln!(out, "  {title:18} {:>8}  at {}", percent(best.accuracy.top1), setting(best))?;
    }
    Ok(())
}

fn print_classes(classes: &[String], confusion: &Confusion, out: &mut dyn Write) -> io::Result<()> {
    let mut per_class: Vec<_> = classes.iter().zip(confusion.per_class()).collect();
    if classes.len() > LISTED_CLASSES {
        per_class.retain(|(_, (_, accuracy))| accuracy.is_some());
        per_class.sort_by(|(_, (_, a)), (_, (_, b))| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
        per_class.truncate(WORST_CLASSES);
        writeln!(out, "\nthe {} worst of {} classes:", per_class.len(), classes.len())?;
    } else {
        writeln!(out, "\naccuracy by class:")?;
    }
    let width = per_class.iter().map(|(class, _)| class.chars().count()).max().unwrap_or(0);
    for (class, (images, accuracy)) in &per_class {
        let accuracy = accuracy.map_or("no images".into(), percent);
        writeln!(out, "  {class:width$}  {accuracy:>9}  of {images}")?;
    }
    if classes.len() > PRINTED_CLASSES {
        return Ok(());
    }
    writeln!(out, "\nrow: true class, column: what it is taken for")?;
    write!(out, "  {:width$}", "")?;
    (0..classes.len()).try_for_each(|column| write!(out, " {column:>6}"))?;
    writeln!(out)?;
    for (number, (row, class)) in confusion.rows().zip(classes).enumerate() {
        write!(out, "  {class:width$}")?;
        row.iter().try_for_each(|count| write!(out, " {count:>6}"))?;
        writeln!(out, "  {number}")?;
    }
    Ok(())
}
