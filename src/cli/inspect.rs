//! `inspect`: what a dataset file holds, and whether it is whole.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use image::RgbImage;
use rayon::prelude::*;
use serde_json::json;

use super::meter::Meter;
use crate::data::format::{MAJOR, SHUFFLED};
use crate::data::mapped::{Dataset, Record};
use crate::error::{Error, Result};
use crate::report::grid::write_grid;

/// Classes, sizes and rejected files printed; `--json` has all.
const LINES_SHOWN: usize = 40;
/// Damaged records named by `--verify`.
const DAMAGED_SHOWN: usize = 10;
/// Width of the longest bar of the histogram.
const BAR: usize = 40;
/// Images of a contact sheet, and how it is laid out.
const TILES: usize = 64;
const COLUMNS: usize = 8;
const CELL: u32 = 112;
/// Records that a thread verifies at a time, asked for ahead.
const VERIFY_BLOCK: usize = 64;

#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// Dataset file.
    file: PathBuf,
    /// Read every record and compare its checksum.
    #[arg(long)]
    verify: bool,
    /// Write a PNG with 64 images spread over the file.
    #[arg(long, value_name = "PNG")]
    contact_sheet: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: InspectArgs) -> Result<()> {
    let dataset = Dataset::open(&args.file)?;
    let facts = Facts::gather(&dataset)?;
    match print(&dataset, &facts, args.json, &mut io::stdout().lock()) {
        // A reader like `head` that has seen enough.
        Err(e) if e.kind() == ErrorKind::BrokenPipe => {}
        result => result.map_err(Error::io("write to", Path::new("standard output")))?,
    }
    if let Some(path) = &args.contact_sheet {
        write_grid(path, &contact_sheet(&dataset)?, COLUMNS, CELL)?;
        eprintln!("wrote {}", path.display());
    }
    if args.verify { verify(&dataset) } else { Ok(()) }
}

fn print(dataset: &Dataset, facts: &Facts, json: bool, out: &mut dyn Write) -> io::Result<()> {
    if json {
        return writeln!(out, "{:#}", facts.json(dataset));
    }
    print_header(dataset, out)?;
    facts.print(dataset, out)?;
    print_rejected(dataset, out)
}

/// Sums over the index.
struct Facts {
    /// Records of each class, and of none.
    counts: Vec<u64>,
    unlabelled: u64,
    /// Records by (width, height, channels), stored and original.
    stored: BTreeMap<(usize, usize, usize), u64>,
    originals: BTreeMap<(usize, usize), u64>,
}

impl Facts {
    fn gather(dataset: &Dataset) -> Result<Facts> {
        let mut facts = Facts {
            counts: vec![0; dataset.classes().len()],
            unlabelled: 0,
            stored: BTreeMap::new(),
            originals: BTreeMap::new(),
        };
        for i in 0..dataset.len() {
            let entry = dataset.entry(i)?;
            match dataset.label(i)? {
                Some(label) => facts.counts[label as usize] += 1,
                None => facts.unlabelled += 1,
            }
            let size = (entry.width.into(), entry.height.into(), entry.channels.into());
            *facts.stored.entry(size).or_default() += 1;
            *facts.originals.entry((entry.original_width.into(), entry.original_height.into())).or_default() += 1;
        }
        Ok(facts)
    }

    fn print(&self, dataset: &Dataset, out: &mut dyn Write) -> io::Result<()> {
        let sizes = self.stored.iter().map(|((w, h, c), n)| (format!("{w}x{h}x{c}"), *n));
        writeln!(out, "stored      {}", most_common(sizes.collect()))?;
        let sizes = self.originals.iter().map(|((w, h), n)| (format!("{w}x{h}"), *n));
        writeln!(out, "originals   {}", most_common(sizes.collect()))?;
        if self.unlabelled > 0 {
            writeln!(out, "unlabelled  {}", self.unlabelled)?;
        }
        writeln!(out, "classes     {}", self.counts.len())?;
        let most = self.counts.iter().copied().max().unwrap_or(0).max(1);
        let name_width = dataset.classes().iter().map(|c| c.chars().count()).max().unwrap_or(0).min(32);
        for (name, count) in dataset.classes().iter().zip(&self.counts).take(LINES_SHOWN) {
            let bar = "#".repeat((*count as f64 / most as f64 * BAR as f64).round() as usize);
            writeln!(out, "  {name:name_width$} {count:>9} {bar}")?;
        }
        if self.counts.len() > LINES_SHOWN {
            let least = self.counts.iter().min().unwrap_or(&0);
            writeln!(
                out,
                "  ... {} more classes; the smallest has {least} images, the largest {most}",
                self.counts.len() - LINES_SHOWN
            )?;
        }
        Ok(())
    }

    fn json(&self, dataset: &Dataset) -> serde_json::Value {
        let header = dataset.header();
        let classes = dataset.classes().iter().zip(&self.counts);
        let stored = self.stored.iter();
        let originals = self.originals.iter();
        json!({
            "file": dataset.path().display().to_string(),
            "format": format!("{}.{}", header.major, header.minor),
            "bytes": header.file_len,
            "uuid": uuid_text(dataset),
            "records": header.records,
            "alignment": header.alignment,
            "stride": header.stride,
            "shuffle_seed": seed(dataset),
            "shard": header.shard,
            "shards": header.shards,
            "first_id": header.first_id,
            "classes": classes.map(|(name, count)| json!({"name": name, "records": count})).collect::<Vec<_>>(),
            "unlabelled": self.unlabelled,
            "stored": stored.map(|((w, h, c), n)| json!({"width": w, "height": h, "channels": c, "records": n})).collect::<Vec<_>>(),
            "originals": originals.map(|((w, h), n)| json!({"width": w, "height": h, "records": n})).collect::<Vec<_>>(),
            "meta": dataset.meta(),
        })
    }
}

fn print_header(dataset: &Dataset, out: &mut dyn Write) -> io::Result<()> {
    let (header, meta) = (dataset.header(), dataset.meta());
    let order = seed(dataset).map_or("that of the source".into(), |seed| format!("shuffled with seed {seed}"));
    let stride =
        if header.stride == 0 { "records of different length".into() } else { format!("stride {}", header.stride) };
    writeln!(out, "{}", dataset.path().display())?;
    writeln!(
        out,
        "format      .ssds {}.{} (this build reads {MAJOR}.x), {} bytes",
        header.major, header.minor, header.file_len
    )?;
    writeln!(out, "uuid        {}", uuid_text(dataset))?;
    writeln!(out, "records     {}, {stride}, aligned to {}", header.records, header.alignment)?;
    if header.shards > 1 {
        writeln!(out, "shard       {} of {}, first record is number {}", header.shard, header.shards, header.first_id)?;
    }
    writeln!(out, "order       {order}")?;
    writeln!(out, "made        from {}, stored as {}, by {}", meta.source, meta.store, meta.writer)?;
    writeln!(out, "with        {}; {}", meta.decoder, meta.resizer)?;
    Ok(())
}

fn print_rejected(dataset: &Dataset, out: &mut dyn Write) -> io::Result<()> {
    let rejected = &dataset.meta().rejected;
    writeln!(out, "rejected    {}", rejected.len())?;
    for file in rejected.iter().take(LINES_SHOWN) {
        writeln!(out, "  {}: {}", file.path, file.reason)?;
    }
    if rejected.len() > LINES_SHOWN {
        writeln!(out, "  ... {} more; --json lists all", rejected.len() - LINES_SHOWN)?;
    }
    Ok(())
}

/// "60000 of 28x28x1", or the most common sizes of several.
fn most_common(mut sizes: Vec<(String, u64)>) -> String {
    const SHOWN: usize = 3;
    sizes.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let shown: Vec<String> = sizes.iter().take(SHOWN).map(|(size, count)| format!("{count} of {size}")).collect();
    let more = if sizes.len() > SHOWN { format!(" and {} other sizes", sizes.len() - SHOWN) } else { String::new() };
    shown.join(", ") + &more
}

fn seed(dataset: &Dataset) -> Option<u64> {
    let header = dataset.header();
    (header.optional_features & SHUFFLED != 0).then_some(header.shuffle_seed)
}

fn uuid_text(dataset: &Dataset) -> String {
    uuid::Uuid::from_bytes(dataset.header().uuid).to_string()
}

/// Reads everything on all cores. Names what is damaged, and fails if anything is.
fn verify(dataset: &Dataset) -> Result<()> {
    dataset.verify_hashes()?;
    let meter = Mutex::new(Meter::new("verifying", dataset.len() as u64));
    let done = AtomicU64::new(0);
    let blocks: Vec<usize> = (0..dataset.len()).step_by(VERIFY_BLOCK).collect();
    let damaged: Vec<Error> = blocks
        .into_par_iter()
        .flat_map_iter(|start| {
            let block = start..(start + VERIFY_BLOCK).min(dataset.len());
            block.clone().for_each(|i| dataset.prefetch(i));
            let bad: Vec<Error> = block.clone().filter_map(|i| dataset.record(i).err()).collect();
            let done = done.fetch_add(block.len() as u64, Ordering::Relaxed) + block.len() as u64;
            // Whoever finds the meter in use leaves the drawing to the next.
            if let Ok(mut meter) = meter.try_lock() {
                meter.set(done);
            }
            bad
        })
        .collect();
    let seconds = meter.into_inner().map_or(0.0, Meter::finish);
    for error in damaged.iter().take(DAMAGED_SHOWN) {
        eprintln!("{error}");
    }
    if !damaged.is_empty() {
        let what = format!("{} of {} records are damaged", damaged.len(), dataset.len());
        return Err(Error::format(dataset.path(), None, what));
    }
    let rate = dataset.header().file_len as f64 / 1e6 / seconds.max(1e-9);
    eprintln!("all {} records are whole ({seconds:.2} s, {rate:.0} MB/s)", dataset.len());
    Ok(())
}

fn contact_sheet(dataset: &Dataset) -> Result<Vec<RgbImage>> {
    let count = dataset.len().min(TILES);
    (0..count).map(|tile| dataset.record(tile * dataset.len() / count).map(|record| rgb(&record))).collect()
}

fn rgb(record: &Record) -> RgbImage {
    RgbImage::from_fn(record.width as u32, record.height as u32, |x, y| {
        let at = (y as usize * record.width + x as usize) * record.channels;
        let pixel = &record.pixels[at..at + record.channels];
        image::Rgb(if record.channels == 1 { [pixel[0]; 3] } else { [pixel[0], pixel[1], pixel[2]] })
    })
}
