//! `inspect`: what a dataset holds, and whether it is whole.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use image::RgbImage;
use rayon::prelude::*;

use super::facts::Facts;
use super::meter::Meter;
use super::{output, picture};
use crate::atomic::write_atomic;
use crate::data::dataset::Dataset;
use crate::data::format::{Codec, MAJOR, SHUFFLED};
use crate::data::mapped::Access;
use crate::data::reader::ImageReader;
use crate::data::shard::Shard;
use crate::error::{Error, Result};
use crate::report::grid::{write_grid, write_png};

/// Classes, sizes, shards and rejected files printed; `--json` has all.
const LINES_SHOWN: usize = 40;
/// Damaged records named by `--verify`.
const DAMAGED_SHOWN: usize = 10;
/// Images of a contact sheet, and how it is laid out.
const TILES: usize = 64;
const COLUMNS: usize = 8;
const CELL: u32 = 112;
/// Records that a thread verifies at a time, asked for ahead.
const VERIFY_BLOCK: usize = 64;

#[derive(Debug, clap::Args)]
pub struct InspectArgs {
    /// Dataset file, or manifest of shards.
    file: PathBuf,
    /// Read every record and compare its checksum.
    #[arg(long)]
    verify: bool,
    /// Decode every record too (with --verify): finds JPEGs that this build cannot read.
    #[arg(long, requires = "verify")]
    decode: bool,
    /// How the file is read.
    #[arg(long, value_enum, default_value_t = Access::Map)]
    io: Access,
    /// Write a PNG with 64 images spread over the file.
    #[arg(long, value_name = "PNG")]
    contact_sheet: Option<PathBuf>,
    /// Write record ID (from 0) to --output: a JPEG as it is stored, pixels as PNG.
    #[arg(long, value_name = "ID")]
    extract: Option<usize>,
    /// Where --extract writes [default: ID.jpg or ID.png].
    #[arg(long, value_name = "FILE", requires = "extract")]
    output: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: InspectArgs) -> Result<()> {
    let dataset = Dataset::open_with(&args.file, args.io)?;
    if let Some(id) = args.extract {
        return extract(&dataset, id, args.output);
    }
    let facts = Facts::gather(&dataset)?;
    output::print(|out| print(&dataset, &facts, args.json, out))?;
    if let Some(path) = &args.contact_sheet {
        write_grid(path, &contact_sheet(&dataset)?, COLUMNS, CELL)?;
        eprintln!("wrote {}", path.display());
    }
    if args.verify { verify(&dataset, args.decode) } else { Ok(()) }
}

fn print(dataset: &Dataset, facts: &Facts, json: bool, out: &mut dyn Write) -> io::Result<()> {
    if json {
        return writeln!(out, "{:#}", facts.json(dataset));
    }
    print_headers(dataset, out)?;
    facts.print(dataset, LINES_SHOWN, out)?;
    print_rejected(dataset, out)
}

fn print_headers(dataset: &Dataset, out: &mut dyn Write) -> io::Result<()> {
    let shards = dataset.shards();
    writeln!(out, "{}", dataset.path().display())?;
    if let [only] = shards {
        return print_shard(only, out);
    }
    writeln!(out, "records     {} in {} shards, {} bytes", dataset.len(), shards.len(), dataset.bytes())?;
    writeln!(out, "uuid        {}", dataset.uuid())?;
    for shard in shards.iter().take(LINES_SHOWN) {
        let name = shard.path().file_name().unwrap_or_default().to_string_lossy();
        let header = shard.header();
        writeln!(
            out,
            "  {name}: {} records from number {}, {} bytes, {}",
            header.records,
            header.first_id,
            header.file_len,
            order(shard)
        )?;
    }
    if shards.len() > LINES_SHOWN {
        writeln!(out, "  ... {} more shards", shards.len() - LINES_SHOWN)?;
    }
    print_origin(&shards[0], out)
}

fn print_shard(shard: &Shard, out: &mut dyn Write) -> io::Result<()> {
    let header = shard.header();
    let stride =
        if header.stride == 0 { "records of different length".into() } else { format!("stride {}", header.stride) };
    writeln!(
        out,
        "format      .ssds {}.{} (this build reads {MAJOR}.x), {} bytes",
        header.major, header.minor, header.file_len
    )?;
    writeln!(out, "uuid        {}", uuid::Uuid::from_bytes(header.uuid))?;
    writeln!(out, "records     {}, {stride}, aligned to {}", header.records, header.alignment)?;
    if header.shards != 1 {
        writeln!(out, "shard       number {} of a manifest, first record is number {}", header.shard, header.first_id)?;
    }
    writeln!(out, "order       {}", order(shard))?;
    print_origin(shard, out)
}

fn print_origin(shard: &Shard, out: &mut dyn Write) -> io::Result<()> {
    let meta = shard.meta();
    writeln!(out, "made        from {}, stored as {}, by {}", meta.source, meta.store, meta.writer)?;
    writeln!(out, "with        {}; {}", meta.decoder, meta.resizer)
}

fn order(shard: &Shard) -> String {
    let header = shard.header();
    let shuffled = header.optional_features & SHUFFLED != 0;
    if shuffled { format!("shuffled with seed {}", header.shuffle_seed) } else { "in the order of the source".into() }
}

fn print_rejected(dataset: &Dataset, out: &mut dyn Write) -> io::Result<()> {
    let rejected = || dataset.shards().iter().flat_map(|shard| &shard.meta().rejected);
    let count = rejected().count();
    writeln!(out, "rejected    {count}")?;
    for file in rejected().take(LINES_SHOWN) {
        writeln!(out, "  {}: {}", file.path, file.reason)?;
    }
    if count > LINES_SHOWN {
        writeln!(out, "  ... {} more; --json lists all", count - LINES_SHOWN)?;
    }
    Ok(())
}

/// Reads everything on all cores. Names what is damaged, and fails if anything is.
fn verify(dataset: &Dataset, decode: bool) -> Result<()> {
    dataset.shards().iter().try_for_each(Shard::verify_hashes)?;
    let meter = Mutex::new(Meter::new("verifying", dataset.len() as u64));
    let done = AtomicU64::new(0);
    let blocks = dataset.len().div_ceil(VERIFY_BLOCK);
    let (damaged, shown) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    (0..blocks).into_par_iter().for_each_init(ImageReader::default, |reader, block| {
        let block = block * VERIFY_BLOCK..((block + 1) * VERIFY_BLOCK).min(dataset.len());
        block.clone().for_each(|i| dataset.prefetch(i));
        for i in block.clone() {
            let check = if decode { reader.read(dataset, i).map(drop) } else { reader.fetch(dataset, i).map(drop) };
            if let Err(error) = check {
                damaged.fetch_add(1, Ordering::Relaxed);
                keep_first(&shown, i, error);
            }
        }
        let done = done.fetch_add(block.len() as u64, Ordering::Relaxed) + block.len() as u64;
        // Whoever finds the meter in use leaves the drawing to the next.
        if let Ok(mut meter) = meter.try_lock() {
            meter.set(done);
        }
    });
    let seconds = meter.into_inner().map_or(0.0, Meter::finish);
    for (_, error) in shown.into_inner().unwrap_or_default() {
        eprintln!("{error}");
    }
    let damaged = damaged.into_inner();
    if damaged > 0 {
        let what = format!("{damaged} of {} records are damaged", dataset.len());
        return Err(Error::format(dataset.path(), None, what));
    }
    let rate = dataset.bytes() as f64 / 1e6 / seconds.max(1e-9);
    eprintln!("all {} records are whole ({seconds:.2} s, {rate:.0} MB/s)", dataset.len());
    Ok(())
}

/// Keeps the errors of the lowest records, whatever the order in which the threads find them.
fn keep_first(kept: &Mutex<Vec<(usize, Error)>>, i: usize, error: Error) {
    if let Ok(mut kept) = kept.lock() {
        let place = kept.partition_point(|(other, _)| *other < i);
        kept.insert(place, (i, error));
        kept.truncate(DAMAGED_SHOWN);
    }
}

fn contact_sheet(dataset: &Dataset) -> Result<Vec<RgbImage>> {
    let count = dataset.len().min(TILES);
    let mut reader = ImageReader::default();
    (0..count).map(|tile| Ok(picture::stored(&reader.read(dataset, tile * dataset.len() / count)?.0))).collect()
}

fn extract(dataset: &Dataset, id: usize, output: Option<PathBuf>) -> Result<()> {
    if id >= dataset.len() {
        let what = format!("there is no record {id}: {} has {}, from 0", dataset.path().display(), dataset.len());
        return Err(Error::config("--extract", what));
    }
    let mut reader = ImageReader::default();
    let record = reader.fetch(dataset, id)?;
    let label = record.label.map_or("no label".into(), |label| format!("class {}", dataset.classes()[label as usize]));
    let (original_width, original_height) = (record.original_width, record.original_height);
    let jpeg = record.codec == Codec::Jpeg;
    let path = output.unwrap_or_else(|| format!("{id}.{}", if jpeg { "jpg" } else { "png" }).into());
    if jpeg {
        write_atomic(&path, |out| out.write_all(record.bytes))?;
    } else {
        write_png(&path, &picture::stored(&reader.read(dataset, id)?.0))?;
    }
    output::print(|out| {
        writeln!(out, "{}: record {id}, {label}, original {original_width}x{original_height}", path.display())
    })
}
