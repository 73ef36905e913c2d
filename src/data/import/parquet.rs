//! Parquet files with images in a column, as Hugging Face stores them: `struct<bytes, path>`, or bytes alone. Images in a
//! compressed column cannot be read one by one, so all are unpacked once, in order, to a temporary file.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use ::parquet::basic::{Encoding, LogicalType, Type as Physical};
use ::parquet::column::page::{Page, PageMetadata, PageReader};
use ::parquet::column::reader::ColumnReaderImpl;
use ::parquet::data_type::{ByteArray, ByteArrayType, DataType, Int32Type, Int64Type};
use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::FileMetaData;
use ::parquet::file::reader::{ChunkReader, FileReader, Length, RowGroupReader, SerializedFileReader};
use ::parquet::schema::types::{ColumnDescPtr, ColumnDescriptor};
use bytes::Bytes;

use super::blob::Blob;
use super::detect::is_parquet_name;
use super::labels::{Label, Labels};
use super::parquet_guard::{check_footer, check_page, delta_count};
use super::select::{Split, shards};
use super::source::{Fault, Item, Source};
use super::spool::Spool;
use crate::data::quiet::contain;
use crate::error::{Error, Result};

/// Rows that are read at a time.
const ROWS: usize = 64;
/// The longest header of a page that is believed.
const MAX_PAGE_HEADER: usize = 1 << 17;
/// The largest metadata that are believed.
const MAX_FOOTER: u64 = 64 << 20;
/// Names of columns of labels, for files that do not say which one it is.
const LABEL_NAMES: [&str; 6] = ["label", "labels", "fine_label", "class", "cls", "target"];

/// Which columns are meant; the others are found out.
#[derive(Debug, Clone, Default)]
pub struct Columns {
    /// The images.
    pub image: Option<String>,
    /// Their labels.
    pub label: Option<String>,
}

/// The images in a set of Parquet files.
#[derive(Debug)]
pub struct Parquet {
    files: Vec<Blob>,
    /// Row with which each file starts.
    starts: Vec<usize>,
    columns: Columns,
    spool: Spool,
    places: Vec<Place>,
    labels: Labels,
    classes: Vec<String>,
    /// Why rows cannot be used.
    faults: HashMap<u32, String>,
}

/// Where an image lies in the temporary file.
#[derive(Debug)]
struct Place {
    offset: u64,
    len: u32,
}

impl Parquet {
    /// Unpacks the images at `source`, a file or a folder of them, to a temporary file in `scratch`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`] when it is not clear which files or columns are meant, [`Error::Format`] when a file is
    /// damaged.
    pub fn open(source: &Path, split: Option<Split>, columns: Columns, scratch: &Path) -> Result<Parquet> {
        let paths = match source.is_dir() {
            true => shards(source, split, &["data", "default"], is_parquet_name, "Parquet files")?,
            false => vec![source.to_path_buf()],
        };
        let mut set = Parquet {
            files: Vec::new(),
            starts: Vec::new(),
            columns,
            spool: Spool::create(scratch)?,
            places: Vec::new(),
            labels: Labels::default(),
            classes: Vec::new(),
            faults: HashMap::new(),
        };
        for path in &paths {
            // The crate is careful, but what it makes of a damaged file is not ours to promise.
            let added = contain(|| set.add_file(path));
            added.unwrap_or_else(|| Err(damaged(path, "the Parquet decoder gave up on it (a fault inside it)")))?;
        }
        if set.places.is_empty() {
            return Err(Error::format(source, None, "holds no rows"));
        }
        let numbered = set.labels.finish();
        if set.classes.is_empty() {
            set.classes = numbered;
        }
        Ok(set)
    }

    /// The files, in the order of the images.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(Blob::path)
    }

    /// The columns that are used.
    pub fn columns(&self) -> &Columns {
        &self.columns
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let blob = Arc::new(Blob::open(path)?);
        let chunks = Chunks { pages_end: check_ends(&blob)?, blob: Arc::clone(&blob) };
        let reader = SerializedFileReader::new(chunks).map_err(|e| unreadable(path, e))?;
        let meta = reader.metadata().file_metadata();
        let features = features(meta);
        let leaves = meta.schema_descr().columns();
        if self.files.is_empty() {
            self.columns.image = Some(choose_image(path, self.columns.image.take(), leaves, &features)?);
            self.columns.label = choose_label(path, self.columns.label.take(), leaves, &features)?;
        }
        let image = self.columns.image.as_deref().and_then(|name| image_leaf(leaves, name));
        let image = image.ok_or_else(|| missing(path, &self.columns.image))?;
        let label = match &self.columns.label {
            Some(name) => Some(label_leaf(leaves, name).ok_or_else(|| missing(path, &self.columns.label))?),
            None => None,
        };
        let classes = self.columns.label.as_ref().and_then(|name| features.get(name)).map(|f| f.classes.clone());
        let classes = classes.unwrap_or_default();
        if self.files.is_empty() {
            self.classes = classes;
        } else if self.classes != classes {
            let what = format!("its classes are not those of {}", self.files[0].path().display());
            return Err(Error::format(path, None, what).with_hint("prepare the files one by one"));
        }
        self.starts.push(self.places.len());
        for group in 0..reader.num_row_groups() {
            let group = reader.get_row_group(group).map_err(|e| unreadable(path, e))?;
            self.add_group(path, &*group, image, label)?;
        }
        self.files.push(match Arc::try_unwrap(blob) {
            Ok(blob) => blob.closed(),
            // The reader may hold on to it.
            Err(shared) => Blob::open(shared.path())?.closed(),
        });
        Ok(())
    }

    fn add_group(&mut self, path: &Path, group: &dyn RowGroupReader, image: usize, label: Option<usize>) -> Result<()> {
        let rows =
            usize::try_from(group.metadata().num_rows()).map_err(|_| damaged(path, "a negative number of rows"))?;
        let mut images = Column::<ByteArrayType>::open(group, image).map_err(|e| unreadable(path, e))?;
        let mut labels =
            label.map(|leaf| LabelColumn::open(group, leaf)).transpose().map_err(|e| unreadable(path, e))?;
        let mut left = rows;
        while left > 0 {
            let count = left.min(ROWS);
            let images = images.read(count).map_err(|e| unreadable(path, e))?;
            let labels = match &mut labels {
                Some(labels) => labels.read(count).map_err(|e| unreadable(path, e))?,
                None => vec![Label::None; count],
            };
            for (image, label) in images.into_iter().zip(labels) {
                self.add_row(path, image, label)?;
            }
            left -= count;
        }
        Ok(())
    }

    fn add_row(&mut self, path: &Path, image: Option<ByteArray>, label: Label) -> Result<()> {
        let row = u32::try_from(self.places.len()).map_err(|_| damaged(path, "more than 4294967295 rows"))?;
        let named = self.classes.len();
        let label = match label {
            Label::Number(n) if named > 0 && n >= named as i64 => {
                self.faults.insert(row, format!("its label {n} is not one of the {named} classes"));
                Label::None
            }
            label => label,
        };
        if let Err(reason) = self.labels.push(label) {
            self.faults.insert(row, reason);
        }
        let bytes = image.as_ref().map_or(&[][..], ByteArray::data);
        if image.is_none() {
            self.faults.insert(row, "the row has no image (null)".into());
        }
        let len = u32::try_from(bytes.len()).map_err(|_| damaged(path, "an image of more than 4 GiB"))?;
        self.places.push(Place { offset: self.spool.append(bytes)?, len });
        Ok(())
    }
}

impl Source for Parquet {
    fn kind(&self) -> &'static str {
        "parquet"
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn len(&self) -> usize {
        self.places.len()
    }

    fn label(&self, i: usize) -> Option<u32> {
        self.labels.get(i)
    }

    fn name(&self, i: usize) -> String {
        let file = self.starts.partition_point(|&start| start <= i) - 1;
        let name = self.files[file].path().file_name().unwrap_or_default().to_string_lossy();
        format!("{name} row {}", i - self.starts[file])
    }

    fn read<'a>(&'a self, i: usize, buffer: &'a mut Vec<u8>) -> Result<Item<'a>, Fault> {
        if let Some(reason) = self.faults.get(&(i as u32)) {
            return Err(Fault::Bad(reason.clone()));
        }
        let Place { offset, len } = self.places[i];
        Ok(Item::Encoded(self.spool.read(offset, len as usize, buffer)?))
    }

    fn fingerprint(&self, hasher: &mut blake3::Hasher) {
        for file in &self.files {
            file.fingerprint(hasher);
        }
        for column in [&self.columns.image, &self.columns.label] {
            hasher.update(column.as_deref().unwrap_or_default().as_bytes()).update(&[0]);
        }
    }
}

// ---- the columns

/// What Hugging Face's `datasets` writes about a column.
#[derive(Debug, Default)]
struct Feature {
    image: bool,
    /// Names of the classes, for a column of their numbers.
    classes: Vec<String>,
    class_label: bool,
}

/// The features in the file's own description, where there is one.
fn features(meta: &FileMetaData) -> HashMap<String, Feature> {
    let entry = meta.key_value_metadata().into_iter().flatten().find(|entry| entry.key == "huggingface");
    let text = entry.and_then(|entry| entry.value.as_deref()).unwrap_or_default();
    let json: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
    let Some(features) = json.pointer("/info/features").and_then(|features| features.as_object()) else {
        return HashMap::new();
    };
    let feature = |value: &serde_json::Value| {
        let kind = value.get("_type").and_then(|kind| kind.as_str()).unwrap_or_default();
        let names = value.get("names").and_then(|names| names.as_array());
        let classes = names.into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)).collect();
        let class_label = kind == "ClassLabel";
        Feature { image: kind == "Image", classes: if class_label { classes } else { Vec::new() }, class_label }
    };
    features.iter().map(|(name, value)| (name.clone(), feature(value))).collect()
}

/// The leaf with the bytes of the images of column `name`.
fn image_leaf(leaves: &[ColumnDescPtr], name: &str) -> Option<usize> {
    let is = |leaf: &ColumnDescPtr| {
        let parts = leaf.path().parts();
        let place = parts == [name, "bytes"] || (parts == [name] && !is_text(leaf));
        place && leaf.physical_type() == Physical::BYTE_ARRAY && leaf.max_rep_level() == 0
    };
    leaves.iter().position(is)
}

/// The leaf with the labels of column `name`.
fn label_leaf(leaves: &[ColumnDescPtr], name: &str) -> Option<usize> {
    let is = |leaf: &ColumnDescPtr| {
        let kind = leaf.physical_type();
        let fits = matches!(kind, Physical::INT32 | Physical::INT64) || (kind == Physical::BYTE_ARRAY && is_text(leaf));
        leaf.path().parts() == [name] && fits && leaf.max_rep_level() == 0
    };
    leaves.iter().position(is)
}

fn is_text(leaf: &ColumnDescriptor) -> bool {
    matches!(leaf.logical_type_ref(), Some(LogicalType::String | LogicalType::Enum))
        || matches!(
            leaf.converted_type(),
            ::parquet::basic::ConvertedType::UTF8 | ::parquet::basic::ConvertedType::ENUM
        )
}

/// The names of the columns, in order.
fn roots(leaves: &[ColumnDescPtr]) -> Vec<&str> {
    let mut roots: Vec<&str> =
        leaves.iter().filter_map(|leaf| leaf.path().parts().first().map(String::as_str)).collect();
    roots.dedup();
    roots
}

fn choose_image(
    path: &Path,
    wanted: Option<String>,
    leaves: &[ColumnDescPtr],
    features: &HashMap<String, Feature>,
) -> Result<String> {
    let roots = roots(leaves);
    if let Some(name) = wanted {
        return match image_leaf(leaves, &name) {
            Some(_) => Ok(name),
            None => Err(no_such(path, "--image-column", &name, "column of images (bytes)", &roots)),
        };
    }
    let usable = || roots.iter().copied().filter(|name| image_leaf(leaves, name).is_some());
    let said: Vec<&str> = usable().filter(|name| features.get(*name).is_some_and(|f| f.image)).collect();
    let is_struct = |name: &&str| leaves.iter().any(|leaf| leaf.path().parts() == [*name, "bytes"]);
    let structs: Vec<&str> = usable().filter(is_struct).collect();
    let all: Vec<&str> = usable().collect();
    match [said, structs, all].into_iter().find(|names| !names.is_empty()) {
        Some(names) if names.len() == 1 => Ok(names[0].to_owned()),
        Some(names) => Err(Error::config(
            "--image-column",
            format!("{} has several columns of images: {}", path.display(), names.join(", ")),
        )
        .with_hint("choose one with --image-column")),
        None => {
            Err(Error::format(path, None, format!("has no column of images; its columns are {}", roots.join(", ")))
                .with_hint("images are bytes, or struct<bytes, path> as Hugging Face writes them"))
        }
    }
}

fn choose_label(
    path: &Path,
    wanted: Option<String>,
    leaves: &[ColumnDescPtr],
    features: &HashMap<String, Feature>,
) -> Result<Option<String>> {
    let roots = roots(leaves);
    if let Some(name) = wanted {
        return match label_leaf(leaves, &name) {
            Some(_) => Ok(Some(name)),
            None => Err(no_such(path, "--label-column", &name, "column of whole numbers or texts", &roots)),
        };
    }
    let usable = |name: &&str| label_leaf(leaves, name).is_some();
    let said = roots.iter().copied().filter(|name| features.get(*name).is_some_and(|f| f.class_label)).filter(usable);
    let said: Vec<&str> = said.collect();
    let common = LABEL_NAMES.into_iter().filter(|name| roots.contains(name)).find(usable);
    match (&said[..], common) {
        ([one], _) => Ok(Some((*one).to_owned())),
        (_, Some(name)) => Ok(Some(name.to_owned())),
        ([], None) => Ok(None),
        (several, None) => {
            let what = format!("{} has several columns of classes: {}", path.display(), several.join(", "));
            Err(Error::config("--label-column", what).with_hint("choose one with --label-column"))
        }
    }
}

fn no_such(path: &Path, option: &str, name: &str, what: &str, roots: &[&str]) -> Error {
    Error::config(option, format!("{} has no {what} called {name}", path.display()))
        .with_hint(format!("its columns are {}", roots.join(", ")))
}

fn missing(path: &Path, column: &Option<String>) -> Error {
    let name = column.as_deref().unwrap_or_default();
    Error::format(path, None, format!("lacks the column {name} of the files before, or has another type in it"))
}

/// A column of a row group.
struct Column<T: DataType> {
    reader: ColumnReaderImpl<T>,
    max_def: i16,
}

impl<T: DataType> Column<T> {
    fn open(group: &dyn RowGroupReader, leaf: usize) -> Result<Column<T>, ParquetError> {
        let descriptor = group.metadata().column(leaf).column_descr_ptr();
        let max_def = descriptor.max_def_level();
        let pages = Pages { inner: group.get_column_page_reader(leaf)?, levels: max_def > 0 };
        Ok(Column { reader: ColumnReaderImpl::new(descriptor, Box::new(pages)), max_def })
    }

    /// The next `count` values, with `None` for null.
    fn read(&mut self, count: usize) -> Result<Vec<Option<T::T>>, ParquetError> {
        let (mut values, mut levels) = (Vec::new(), Vec::new());
        while levels.len() < count {
            let want = count - levels.len();
            let before = values.len();
            let levels_of = (self.max_def > 0).then_some(&mut levels);
            let (records, ..) = self.reader.read_records(want, levels_of, None, &mut values)?;
            if self.max_def == 0 {
                levels.resize(values.len(), 0);
            }
            if records == 0 || (self.max_def == 0 && values.len() == before) {
                return Err(ParquetError::EOF("a column has fewer rows than its row group".into()));
            }
        }
        let mut values = values.into_iter();
        let present = levels.iter().map(|level| if *level == self.max_def { values.next() } else { None });
        Ok(present.collect())
    }
}

/// A column of labels.
enum LabelColumn {
    Int32(Column<Int32Type>),
    Int64(Column<Int64Type>),
    Text(Column<ByteArrayType>),
}

impl LabelColumn {
    fn open(group: &dyn RowGroupReader, leaf: usize) -> Result<LabelColumn, ParquetError> {
        Ok(match group.metadata().column(leaf).column_descr().physical_type() {
            Physical::INT32 => LabelColumn::Int32(Column::open(group, leaf)?),
            Physical::INT64 => LabelColumn::Int64(Column::open(group, leaf)?),
            _ => LabelColumn::Text(Column::open(group, leaf)?),
        })
    }

    fn read(&mut self, count: usize) -> Result<Vec<Label>, ParquetError> {
        let text = |value: ByteArray| String::from_utf8_lossy(value.data()).into_owned();
        Ok(match self {
            LabelColumn::Int32(column) => labels(column.read(count)?, |n| Label::Number(n.into())),
            LabelColumn::Int64(column) => labels(column.read(count)?, Label::Number),
            LabelColumn::Text(column) => labels(column.read(count)?, |value| Label::Name(text(value))),
        })
    }
}

fn labels<T>(values: Vec<Option<T>>, label: impl Fn(T) -> Label) -> Vec<Label> {
    values.into_iter().map(|value| value.map_or(Label::None, &label)).collect()
}

// ---- between the file and the crate

/// The bytes of a file, for the crate.
struct Chunks {
    blob: Arc<Blob>,
    /// Where the pages end and the metadata start.
    pages_end: u64,
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.blob.len()
    }
}

impl ChunkReader for Chunks {
    type T = std::io::Cursor<Bytes>;

    /// Before the metadata, the crate asks for this at the headers of pages.
    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        let left = self.blob.len().saturating_sub(start);
        let head = self.get_bytes(start, left.min(MAX_PAGE_HEADER as u64) as usize)?;
        let checked = if start < self.pages_end { check_page(&head) } else { Ok(()) };
        checked.map_err(|what| ParquetError::General(format!("byte {start}: {what}")))?;
        Ok(std::io::Cursor::new(head))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let mut bytes = Vec::new();
        self.blob.read(start, length, &mut bytes).map_err(|e| ParquetError::External(Box::new(e)))?;
        Ok(bytes.into())
    }
}

/// Pages, checked once more when they are unpacked.
struct Pages {
    inner: Box<dyn PageReader>,
    /// Whether levels come before the values.
    levels: bool,
}

impl Pages {
    fn check(&self, page: &Page) -> Result<(), ParquetError> {
        let refuse = |what: &str| Err(ParquetError::General(what.into()));
        let before = match page {
            Page::DataPage { buf, .. } if self.levels => {
                let len = buf.get(..4).map_or([255; 4], |len| [len[0], len[1], len[2], len[3]]);
                4 + u32::from_le_bytes(len) as usize
            }
            Page::DataPageV2 { def_levels_byte_len, rep_levels_byte_len, .. } => {
                *def_levels_byte_len as usize + *rep_levels_byte_len as usize
            }
            _ => 0,
        };
        match page.encoding() {
            // It announces a second number of values deep inside the page.
            Encoding::DELTA_BYTE_ARRAY => refuse("the encoding DELTA_BYTE_ARRAY is not supported"),
            Encoding::DELTA_LENGTH_BYTE_ARRAY => {
                let values = page.buffer().get(before..).and_then(delta_count);
                match values.is_some_and(|values| values <= u64::from(page.num_values())) {
                    true => Ok(()),
                    false => refuse("a page with more values inside than its header says"),
                }
            }
            _ => Ok(()),
        }
    }
}

impl Iterator for Pages {
    type Item = Result<Page, ParquetError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>, ParquetError> {
        let page = self.inner.get_next_page()?;
        page.as_ref().map_or(Ok(()), |page| self.check(page))?;
        Ok(page)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>, ParquetError> {
        self.inner.peek_next_page()
    }

    fn skip_next_page(&mut self) -> Result<(), ParquetError> {
        self.inner.skip_next_page()
    }

    fn at_record_boundary(&mut self) -> Result<bool, ParquetError> {
        self.inner.at_record_boundary()
    }
}

/// Checks what frames the file: its mark at both ends, and the metadata before the last one. Returns where these start.
fn check_ends(blob: &Blob) -> Result<u64> {
    let path = blob.path();
    if blob.len() < 12 {
        return Err(damaged(path, &format!("{} bytes are no Parquet file", blob.len())));
    }
    let (mut head, mut tail) = ([0; 4], [0; 8]);
    blob.read_at(0, &mut head)?;
    blob.read_at(blob.len() - 8, &mut tail)?;
    if &tail[4..] == b"PARE" {
        let what = format!("{} is encrypted", path.display());
        return Err(Error::Unsupported { what, hint: Some("write it without encryption".into()) });
    }
    if &head != b"PAR1" {
        return Err(Error::format(path, Some(0), "does not start like a Parquet file (PAR1)"));
    }
    if &tail[4..] != b"PAR1" {
        let error = Error::format(path, Some(blob.len() - 4), "does not end like a Parquet file (PAR1)");
        return Err(error.with_hint("the file is cut"));
    }
    let len = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    if len > MAX_FOOTER || len + 12 > blob.len() {
        let what = format!("metadata of {len} bytes in a file of {}", blob.len());
        return Err(Error::format(path, Some(blob.len() - 8), what).with_hint("the file is cut or damaged"));
    }
    let mut footer = Vec::new();
    let start = blob.len() - 8 - len;
    blob.read(start, len as usize, &mut footer)?;
    check_footer(&footer).map_err(|what| Error::format(path, Some(start), what).with_hint("the file is damaged"))?;
    Ok(start)
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::format(path, None, what).with_hint("the file is damaged")
}

/// What the crate says, or what went wrong with the file below it.
fn unreadable(path: &Path, error: ParquetError) -> Error {
    match error {
        ParquetError::External(inner) => match inner.downcast::<Error>() {
            Ok(own) => *own,
            Err(other) => damaged(path, &format!("cannot be read as Parquet: {other}")),
        },
        ParquetError::General(what) | ParquetError::EOF(what) => {
            damaged(path, &format!("cannot be read as Parquet: {what}"))
        }
        ParquetError::NYI(what) => damaged(path, &format!("uses a part of Parquet that is not supported: {what}")),
        other => damaged(path, &format!("cannot be read as Parquet: {other}")),
    }
}
