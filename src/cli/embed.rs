//! `embed`: the features of a dataset as a file, a map, a gallery of neighbours.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use super::meter::Meter;
use super::model_args::arch_name;
use super::output::print;
use super::picture;
use crate::atomic::write_atomic;
use crate::backend::cpu::Tier;
use crate::data::dataset::Dataset;
use crate::data::mapped::Access;
use crate::data::reader::ImageReader;
use crate::data::writer::refuse_existing;
use crate::error::{Error, Result};
use crate::eval::embed::{Format, Sink, Table, evenly, normalise_rows};
use crate::eval::features::{FeatureExtractor, FeatureSource};
use crate::eval::map::{Map, Method};
use crate::eval::neighbours::Search;
use crate::exec::{DeviceChoice, Opened, Options, Precision};
use crate::nn::simsiam::Layer;
use crate::report::chart::gallery::{Row, Tile, write_gallery};
use crate::report::chart::scatter::{Point, Scatter, write_scatter};
use crate::train::trained;

/// Computes the features of every image of a dataset, as evaluation sees it: resized, the centre cut out, no augmentation,
/// batch norm by its running statistics. Memory does not grow with the dataset.
///
/// The id of an image is its number in the dataset, from 0, which `inspect --extract ID` takes; where it has no label, files
/// say -1 (Parquet: null).
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("output").required(true).multiple(true)))]
pub struct EmbedArgs {
    /// Run directory, whose newest checkpoint is taken, a checkpoint file in one, or a file of `import --out`.
    #[arg(value_name = "RUN_OR_CHECKPOINT")]
    source: PathBuf,
    /// Dataset file, or manifest of shards; labels are not needed.
    dataset: PathBuf,
    /// Write the features: .npy (with .labels.npy and .ids.npy beside it), .parquet or .safetensors.
    #[arg(long, value_name = "FILE", group = "output")]
    out: Option<PathBuf>,
    /// What is taken as the feature: the backbone's pooled output, or the projector's z.
    #[arg(long, value_enum, default_value_t)]
    layer: Layer,
    /// Give every feature length 1.
    #[arg(long)]
    normalize: bool,
    /// Replace files that exist.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    map: MapArgs,
    #[command(flatten)]
    gallery: GalleryArgs,
    #[command(flatten)]
    machine: MachineArgs,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Map")]
struct MapArgs {
    /// Write a PNG with the images as points in a plane, coloured by class.
    #[arg(long, value_name = "PNG", group = "output")]
    map: Option<PathBuf>,
    /// Write the points of the map: id, x, y, label, class.
    #[arg(long, value_name = "CSV", group = "output")]
    map_csv: Option<PathBuf>,
    /// How features become points.
    #[arg(long, value_enum, default_value_t)]
    map_method: Method,
    /// At most so many images, evenly chosen.
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = clap::value_parser!(u64).range(2..=100_000))]
    map_points: u64,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Neighbours")]
struct GalleryArgs {
    /// Write a PNG with images in a column, each beside the images of the dataset that are nearest to it by cosine.
    #[arg(long, value_name = "PNG", group = "output")]
    neighbours: Option<PathBuf>,
    /// Images in the column, evenly chosen.
    #[arg(long, value_name = "Q", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=64))]
    queries: u64,
    /// Neighbours of each.
    #[arg(long, value_name = "K", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=50))]
    k: u64,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Machine")]
struct MachineArgs {
    /// Where to compute: auto (the first NVIDIA GPU if there is one, else the CPU), cpu, cuda, cuda:N or cuda-emulated.
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
    /// In what to compute; files hold float32.
    #[arg(long, value_enum, default_value_t)]
    dtype: Precision,
    /// How records are read.
    #[arg(long, value_enum, default_value_t)]
    io: Access,
    /// Implementation of the CPU's convolutions.
    #[arg(long, value_enum, default_value_t)]
    cpu_conv: Tier,
}

pub fn run(args: &EmbedArgs) -> Result<()> {
    let format = args.out.as_deref().map(Format::of).transpose()?;
    refuse_outputs(args, format)?;
    let dataset = Dataset::open_with(&args.dataset, args.machine.io)?;
    let (mut extractor, title, metadata) = load(args)?;
    let dim = extractor.dim();
    let mut collected = Collected::begin(args, &dataset, &mut extractor)?;
    let mut meter = Meter::new("embedding", dataset.len() as u64);
    let mut rows = |sink: &mut Sink<'_>| {
        let mut normalised = Vec::new();
        extractor.centres(&dataset, &mut (0..dataset.len()), &mut |records, values| {
            let first = records[0];
            check_finite(values, dim, first)?;
            normalised.clear();
            normalised.extend_from_slice(values);
            if args.normalize {
                normalise_rows(&mut normalised, dim);
            }
            collected.see(first, &normalised);
            sink(first, &normalised)?;
            meter.set((first + values.len() / dim) as u64);
            Ok(())
        })
    };
    match (&args.out, format) {
        (Some(path), Some(format)) => Table { dataset: &dataset, dim, metadata }.write(path, format, &mut rows)?,
        _ => rows(&mut |_, _| Ok(()))?,
    }
    let seconds = meter.finish();
    let images = dataset.len();
    print(|out| {
        let layer = args.layer.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string());
        let rate = images as f64 / seconds.max(1e-9);
        writeln!(out, "{title}: {layer} features [{images}, {dim}], {seconds:.1} s, {rate:.0} images/s")?;
        format
            .iter()
            .zip(&args.out)
            .flat_map(|(format, path)| format.files(path))
            .try_for_each(|file| writeln!(out, "  {}", file.display()))
    })?;
    collected.finish(args, &dataset, dim, &title)
}

/// Looks at every output before any work is done.
fn refuse_outputs(args: &EmbedArgs, format: Option<Format>) -> Result<()> {
    let features = format.iter().zip(&args.out).flat_map(|(format, path)| format.files(path));
    let pictures = [&args.map.map, &args.map.map_csv, &args.gallery.neighbours].into_iter().flatten().cloned();
    let mut files: Vec<PathBuf> = features.chain(pictures).collect();
    files.iter().try_for_each(|file| refuse_existing(file, args.force))?;
    files.sort();
    match files.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::config(pair[0].display().to_string(), "is named for two outputs")),
        None => Ok(()),
    }
}

/// The network with its trained weights, what it is called, and what files say of it.
fn load(args: &EmbedArgs) -> Result<(FeatureExtractor, String, BTreeMap<String, String>)> {
    let trained = trained::open(&args.source)?;
    let MachineArgs { device, dtype, cpu_conv, .. } = args.machine;
    let Opened { device, instead_of_gpu } = device.open(cpu_conv)?;
    if let Some(error) = instead_of_gpu {
        tracing::info!("computing on the CPU, because there is no GPU to be used: {error}");
    }
    dtype.check_trainable_on(&device)?;
    let options = Options { choice: dtype.choice(false), ..Options::default() };
    let mut extractor =
        FeatureExtractor::of_layer(&trained.model, args.layer, &trained.augment, &device, (dtype.dtype(), options))?;
    extractor.load(trained.checkpoint.tensors())?;
    let title = format!("{} {}", args.source.display(), trained.history());
    let metadata = [
        ("source", args.source.display().to_string()),
        ("arch", arch_name(&trained.model.backbone)),
        ("layer", args.layer.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())),
        ("normalized", args.normalize.to_string()),
        ("dataset", args.dataset.display().to_string()),
        ("engine", format!("simsiam-engine {}", env!("CARGO_PKG_VERSION"))),
    ];
    let step = trained.step().map(|step| ("step", step.to_string()));
    let metadata = metadata.into_iter().chain(step).map(|(key, value)| (key.to_string(), value));
    Ok((extractor, title, metadata.collect()))
}

fn check_finite(values: &[f32], dim: usize, first: usize) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::Mismatch(format!(
            "the feature of record {} is not finite: the checkpoint's weights or the --dtype are at fault",
            first + at / dim
        ))),
    }
}

/// What pictures need of the features that come by.
struct Collected {
    /// Records of the map, rising, and the features of those seen.
    records: Vec<usize>,
    features: Vec<f32>,
    dim: usize,
    search: Option<Search>,
}

impl Collected {
    fn begin(args: &EmbedArgs, dataset: &Dataset, extractor: &mut FeatureExtractor) -> Result<Collected> {
        let dim = extractor.dim();
        let wanted = args.map.map.is_some() || args.map.map_csv.is_some();
        let records = if wanted { evenly(dataset.len(), args.map.map_points as usize) } else { Vec::new() };
        let search = match &args.gallery.neighbours {
            None => None,
            Some(_) if dataset.len() < 2 => {
                return Err(Error::config("--neighbours", "expected a dataset of at least 2 images, got 1"));
            }
            Some(_) => {
                let queries = evenly(dataset.len(), args.gallery.queries as usize);
                let mut features = Vec::with_capacity(queries.len() * dim);
                extractor.centres(dataset, &mut queries.iter().copied(), &mut |_, rows| {
                    features.extend_from_slice(rows);
                    Ok(())
                })?;
                Some(Search::new(queries, &features, dim, args.gallery.k as usize)?)
            }
        };
        Ok(Collected { records, features: Vec::new(), dim, search })
    }

    fn see(&mut self, first: usize, rows: &[f32]) {
        let end = first + rows.len() / self.dim;
        let from = self.records.partition_point(|&record| record < first);
        for &record in self.records[from..].iter().take_while(|&&record| record < end) {
            self.features.extend_from_slice(&rows[(record - first) * self.dim..][..self.dim]);
        }
        self.search.iter_mut().for_each(|search| search.see(first, rows));
    }

    fn finish(self, args: &EmbedArgs, dataset: &Dataset, dim: usize, title: &str) -> Result<()> {
        if !self.records.is_empty() {
            let map = Map::of(&self.features, dim, args.map.map_method)?;
            if let Some(path) = &args.map.map_csv {
                write_csv(path, dataset, &self.records, &map)?;
                print(|out| writeln!(out, "  {}", path.display()))?;
            }
            if let Some(path) = &args.map.map {
                draw_map(path, dataset, &self.records, map, title)?;
                print(|out| writeln!(out, "  {}", path.display()))?;
            }
        }
        if let (Some(search), Some(path)) = (self.search, &args.gallery.neighbours) {
            draw_gallery(path, dataset, search, title)?;
            print(|out| writeln!(out, "  {}", path.display()))?;
        }
        Ok(())
    }
}

fn class_of(dataset: &Dataset, record: usize) -> Result<Option<usize>> {
    Ok(dataset.label(record)?.map(|label| label as usize))
}

fn draw_map(path: &Path, dataset: &Dataset, records: &[usize], map: Map, title: &str) -> Result<()> {
    let points = records.iter().zip(&map.points);
    let points = points.map(|(&record, &at)| Ok(Point { at, class: class_of(dataset, record)? }));
    let (shown, all) = (records.len(), dataset.len());
    let count = if shown < all { format!("{shown} of {all} images, evenly chosen") } else { format!("{all} images") };
    let scatter = Scatter {
        title: title.to_string(),
        subtitle: format!("{}: {count}; {}", dataset.path().display(), map.method),
        axes: map.axes,
        classes: dataset.classes().to_vec(),
        points: points.collect::<Result<_>>()?,
    };
    write_scatter(path, &scatter)
}

fn write_csv(path: &Path, dataset: &Dataset, records: &[usize], map: &Map) -> Result<()> {
    let mut text = String::from("id,x,y,label,class\n");
    for (&record, [x, y]) in records.iter().zip(&map.points) {
        let class = class_of(dataset, record)?;
        let label = class.map_or_else(String::new, |class| class.to_string());
        let name = class.map_or_else(String::new, |class| quoted(&dataset.classes()[class]));
        text += &format!("{record},{x},{y},{label},{name}\n");
    }
    write_atomic(path, |out| out.write_all(text.as_bytes()))
}

/// A field of a CSV file (RFC 4180).
fn quoted(field: &str) -> String {
    match field.contains(['"', ',', '\n', '\r']) {
        true => format!("\"{}\"", field.replace('"', "\"\"")),
        false => field.to_string(),
    }
}

fn draw_gallery(path: &Path, dataset: &Dataset, search: Search, title: &str) -> Result<()> {
    let mut reader = ImageReader::default();
    let mut tile = |record: usize, text: String, agrees| {
        let (image, _) = reader.read(dataset, record)?;
        Ok::<_, Error>(Tile { image: picture::in_proportion(&image), text, agrees })
    };
    let name = |class: Option<usize>| class.map_or("", |class| dataset.classes()[class].as_str());
    let mut rows = Vec::new();
    for (query, near) in search.finish() {
        let own = class_of(dataset, query)?;
        let mut neighbours = Vec::with_capacity(near.len());
        for (record, cosine) in near {
            let class = class_of(dataset, record)?;
            let agrees = own.zip(class).map(|(own, class)| own == class);
            neighbours.push(tile(record, format!("{cosine:.3} {}", name(class)), agrees)?);
        }
        let label = if own.is_some() { name(own).to_string() } else { format!("record {query}") };
        rows.push(Row { query: tile(query, label, None)?, neighbours });
    }
    let subtitle = format!(
        "left: images of {}; beside each its nearest of {} by cosine (blue: the same class)",
        dataset.path().display(),
        dataset.len()
    );
    write_gallery(path, title, &subtitle, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_with_commas_and_quotes_are_quoted() {
        for (field, expected) in [("cat", "cat"), ("a, b", "\"a, b\""), ("12\" disc", "\"12\"\" disc\"")] {
            assert_eq!(quoted(field), expected);
        }
    }
}
