//! Options of `prepare` that say what the source is, and what of it to take.

use std::path::{Path, PathBuf};

use crate::data::import::cifar::Cifar;
use crate::data::import::detect::{Kind, detect};
use crate::data::import::folder::Folder;
use crate::data::import::idx::Idx;
use crate::data::import::select::{Split, Subset, names, names_in, split_folders};
use crate::data::import::webdataset::{Fields, WebDataset};
use crate::data::import::{Source, Store};
use crate::error::{Error, Result};

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Source")]
pub struct SourceArgs {
    /// What SOURCE is.
    #[arg(long = "source", value_name = "KIND", value_enum, default_value_t = Kind::Auto)]
    kind: Kind,
    /// Which part of a set that holds several.
    #[arg(long, value_enum)]
    split: Option<Split>,
    /// Take only these classes, numbered in this order: names with commas between, or @FILE with a name a line.
    #[arg(long, value_name = "A,B,...|@FILE")]
    classes: Option<String>,
    /// Names of classes that only have numbers: a file with a name a line, from class 0 on.
    #[arg(long, value_name = "FILE")]
    class_names: Option<PathBuf>,
    /// IDX labels file (default: the one beside the images).
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// CIFAR-100: the 20 groups as labels instead of the 100 classes.
    #[arg(long)]
    coarse_labels: bool,
    /// WebDataset: field of the image, as jpg (default: the first known one).
    #[arg(long, value_name = "FIELD")]
    image_field: Option<String>,
    /// WebDataset: name in the JSON field of the label (default: the cls field, or a usual name in the JSON field).
    #[arg(long, value_name = "NAME")]
    label_field: Option<String>,
    /// Parquet: column of the images (default: found out).
    #[arg(long, value_name = "NAME")]
    image_column: Option<String>,
    /// Parquet: column of the labels (default: found out).
    #[arg(long, value_name = "NAME")]
    label_column: Option<String>,
}

impl SourceArgs {
    /// Opens the source at `path` and tells about it on standard error. What must be unpacked goes to `scratch`.
    pub fn open(&self, path: &Path, scratch: &Path) -> Result<Box<dyn Source>> {
        let kind = match self.kind {
            Kind::Auto => detect(path)?,
            kind => kind,
        };
        self.check_options(kind)?;
        if self.split.is_some() && !path.is_dir() {
            return Err(Error::config("--split", format!("chooses from a folder, and {} is none", path.display())));
        }
        let mut source = self.open_kind(kind, path, scratch)?;
        if let Some(file) = &self.class_names {
            source = Box::new(Subset::with_names(source, names_in("--class-names", file)?)?);
        }
        if let Some(text) = &self.classes {
            source = Box::new(Subset::of_classes(source, names("--classes", text)?)?);
            eprintln!("{} images of {} classes are chosen", source.len(), source.classes().len());
        }
        Ok(source)
    }

    /// Options that say nothing about a source of this kind are a mistake.
    fn check_options(&self, kind: Kind) -> Result<()> {
        let options = [
            ("--labels", Kind::Idx, self.labels.is_some()),
            ("--coarse-labels", Kind::Cifar, self.coarse_labels),
            ("--image-field", Kind::Webdataset, self.image_field.is_some()),
            ("--label-field", Kind::Webdataset, self.label_field.is_some()),
            ("--image-column", Kind::Parquet, self.image_column.is_some()),
            ("--label-column", Kind::Parquet, self.label_column.is_some()),
        ];
        match options.into_iter().find(|(_, of, given)| *given && *of != kind) {
            None => Ok(()),
            Some((option, of, _)) => {
                Err(Error::config(option, format!("is for {}, and the source is {}", of.title(), kind.title())))
            }
        }
    }

    fn open_kind(&self, kind: Kind, path: &Path, scratch: &Path) -> Result<Box<dyn Source>> {
        Ok(match kind {
            Kind::Auto | Kind::Folder => Box::new(self.open_folder(path)?),
            Kind::Idx => {
                let source = Idx::open(path, self.labels.as_deref(), self.split, scratch)?;
                let labels =
                    source.labels().map_or("no labels".into(), |path| format!("labels from {}", path.display()));
                eprintln!("IDX: {} images from {}, {labels}", source.len(), source.images().display());
                Box::new(source)
            }
            Kind::Cifar => {
                let source = Cifar::open(path, self.split, self.coarse_labels)?;
                tell(source.title(), &source, &source.files().collect::<Vec<_>>());
                Box::new(source)
            }
            Kind::Webdataset => {
                let fields = Fields { image: self.image_field.clone(), label: self.label_field.clone() };
                let source = WebDataset::open(path, self.split, fields, scratch)?;
                tell("WebDataset", &source, &source.shards().collect::<Vec<_>>());
                for note in source.notes() {
                    eprintln!("note: {note}");
                }
                Box::new(source)
            }
            Kind::Parquet => self.open_parquet(path, scratch)?,
        })
    }

    fn open_folder(&self, path: &Path) -> Result<Folder> {
        if path.is_file() {
            return Err(Error::config("--source folder", format!("{} is a file", path.display())));
        }
        let source = Folder::open(path, self.split)?;
        let labels = match source.classes().len() {
            0 => "no class folders, so no labels".into(),
            n => format!("{n} classes"),
        };
        eprintln!("{} images in {}, {labels}", source.len(), source.root().display());
        if source.ignored() > 0 {
            eprintln!("note: {} other files are no images and were passed over", source.ignored());
        }
        let empty = source.empty_classes();
        if !empty.is_empty() {
            eprintln!("warning: {} classes have no images: {}", empty.len(), empty[..empty.len().min(5)].join(", "));
        }
        let splits = split_folders(source.root());
        if !splits.is_empty() && splits.len() == source.classes().len() {
            eprintln!(
                "warning: the classes are called {}; --split chooses one of them as the source",
                splits.join(", ")
            );
        }
        Ok(source)
    }

    #[cfg(feature = "parquet")]
    fn open_parquet(&self, path: &Path, scratch: &Path) -> Result<Box<dyn Source>> {
        use crate::data::import::parquet::{Columns, Parquet};
        let columns = Columns { image: self.image_column.clone(), label: self.label_column.clone() };
        let source = Parquet::open(path, self.split, columns, scratch)?;
        tell("Parquet", &source, &source.files().collect::<Vec<_>>());
        let Columns { image, label } = source.columns();
        eprintln!(
            "images from column {}, {}",
            image.as_deref().unwrap_or_default(),
            label.as_ref().map_or("no labels".into(), |label| format!("labels from column {label}"))
        );
        Ok(Box::new(source))
    }

    #[cfg(not(feature = "parquet"))]
    fn open_parquet(&self, path: &Path, _: &Path) -> Result<Box<dyn Source>> {
        let what = format!("{}: this build cannot read Parquet", path.display());
        Err(Error::Unsupported { what, hint: Some("build with the feature parquet, which is on by default".into()) })
    }
}

fn tell(title: &str, source: &dyn Source, files: &[&Path]) {
    let labels = match source.classes().len() {
        0 => "no labels".into(),
        n => format!("{n} classes"),
    };
    let files = match files {
        [one] => one.display().to_string(),
        [first, .., last] => format!("{} files, {} to {}", files.len(), first.display(), last.display()),
        [] => "no file".into(),
    };
    eprintln!("{title}: {} images, {labels}, from {files}", source.len());
}

/// How images of a source are stored if the user does not say: small ones, all of one size, as they are.
pub fn default_store(source: &dyn Source) -> Store {
    match source.kind() {
        "idx" | "cifar10" | "cifar100" => Store::Native,
        _ => Store::Square(256),
    }
}
