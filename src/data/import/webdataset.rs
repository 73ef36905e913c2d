//! WebDataset: tar files whose members belong together by name. `a/0017.jpg`, `a/0017.cls` and `a/0017.json` are one sample
//! with the key `a/0017`: all up to the first dot of the last part of the name, as in the `webdataset` library.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::blob::Blob;
use super::labels::{Label, Labels, shortened};
use super::select::{Split, shards};
use super::source::{Fault, Item, Source};
use super::spool::{self, Spool};
use super::tar::{Member, Members};
use crate::error::{Error, Result};

/// Fields that hold images; of several in a sample, the first of this list is taken.
const IMAGE_FIELDS: [&str; 9] = ["jpg", "jpeg", "png", "webp", "ppm", "bmp", "gif", "tif", "tiff"];
/// Where the label lies in a JSON field, if not told otherwise.
const LABEL_FIELDS: [&str; 3] = ["label", "cls", "class"];
/// More files than this are not kept open.
const OPEN_FILES: usize = 128;
/// The most files that a pattern may stand for.
const MAX_SHARDS: usize = 1 << 20;
/// The longest JSON text and class number that are read.
const MAX_JSON: u64 = 1 << 20;
const MAX_CLS: u64 = 1 << 10;

/// Which fields of the samples are meant.
#[derive(Debug, Clone, Default)]
pub struct Fields {
    /// Field of the image, as `jpg`; otherwise the first known one.
    pub image: Option<String>,
    /// Name in the JSON field of the label; otherwise the `cls` field, or a usual name in the JSON field.
    pub label: Option<String>,
}

/// The images in a set of tar files.
#[derive(Debug)]
pub struct WebDataset {
    shards: Vec<Blob>,
    fields: Fields,
    samples: Vec<Place>,
    labels: Labels,
    classes: Vec<String>,
    /// Why samples cannot be used.
    faults: HashMap<u32, String>,
    notes: Vec<String>,
}

/// Where an image lies: 24 bytes, whatever it is called.
#[derive(Debug)]
struct Place {
    shard: u32,
    len: u32,
    /// Where the first header of the image lies; the name is found again there.
    header: u64,
    data: u64,
}

/// A sample in the making.
struct Sample {
    key: Vec<u8>,
    first: Member,
    image: Option<(usize, Member)>,
    images: usize,
    label: Option<Label>,
    fields: Vec<String>,
    fault: Option<String>,
}

impl WebDataset {
    /// Lists the samples of `source`: a tar file, a folder of them, or a pattern like `train-{000..012}.tar`. What is gzipped
    /// is unpacked to a temporary file in `scratch`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Config`] when it is not clear which files are meant, [`Error::Format`] when one is damaged.
    pub fn open(source: &Path, split: Option<Split>, fields: Fields, scratch: &Path) -> Result<WebDataset> {
        let paths = shard_paths(source, split)?;
        let mut set = WebDataset {
            shards: Vec::new(),
            fields,
            samples: Vec::new(),
            labels: Labels::default(),
            classes: Vec::new(),
            faults: HashMap::new(),
            notes: Vec::new(),
        };
        let mut spool = None;
        for path in &paths {
            let blob = match spool::is_gzip(path)? {
                true => spool_in(&mut spool, scratch)?.unpack(path)?,
                false => Blob::open(path)?,
            };
            set.add_shard(&blob)?;
            set.shards.push(if paths.len() > OPEN_FILES { blob.closed() } else { blob });
        }
        if set.faults.len() == set.samples.len() {
            return Err(set.no_sample(source));
        }
        set.classes = set.labels.finish();
        Ok(set)
    }

    /// The files, in the order of the images.
    pub fn shards(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(Blob::path)
    }

    /// What the user may want to know about the files.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    fn add_shard(&mut self, blob: &Blob) -> Result<()> {
        let mut members = Members::from(blob, 0);
        let mut sample: Option<Sample> = None;
        let mut several = 0;
        while let Some(member) = members.read_next()? {
            let Some((key, field)) = key_and_field(&member.path) else { continue };
            if sample.as_ref().is_none_or(|sample| sample.key != member.path[key.clone()]) {
                several += sample.take().map_or(Ok(0), |sample| self.add(sample))?;
                sample = Some(Sample::new(member.path[key].to_vec(), member.clone()));
            }
            if let Some(sample) = &mut sample {
                sample.take(blob, member, field, &self.fields)?;
            }
        }
        several += sample.map_or(Ok(0), |sample| self.add(sample))?;
        if several > 0 {
            let order = IMAGE_FIELDS.join(", ");
            self.notes
                .push(format!("{}: {several} samples hold several images; the first of {order} is taken", name(blob)));
        }
        if !members.marked_end() {
            self.notes.push(format!("{}: lacks the mark of its end, so it may have been cut", name(blob)));
        }
        Ok(())
    }

    /// Adds a sample; returns whether it held more than one image.
    fn add(&mut self, sample: Sample) -> Result<usize> {
        let number = u32::try_from(self.samples.len())
            .map_err(|_| Error::format(&self.path_of_next(), None, "more than 4294967295 samples"))?;
        let mut fault = sample.fault;
        if sample.image.is_none() {
            fault = Some(format!("no image in this sample, which has {}", shortened(&sample.fields.join(", "))));
        }
        let (_, image) = sample.image.unwrap_or((0, sample.first));
        let len = u32::try_from(image.len).unwrap_or_else(|_| {
            fault.get_or_insert_with(|| format!("an image of {} bytes", image.len));
            0
        });
        let label = self.labels.push(sample.label.unwrap_or(Label::None));
        if let Some(reason) = fault.or(label.err()) {
            self.faults.insert(number, reason);
        }
        self.samples.push(Place { shard: self.shards.len() as u32, len, header: image.start, data: image.data });
        Ok(usize::from(sample.images > 1))
    }

    fn path_of_next(&self) -> PathBuf {
        self.shards.last().map_or(PathBuf::new(), |blob| blob.path().to_path_buf())
    }

    fn no_sample(&self, source: &Path) -> Error {
        let error = match self.samples.len() {
            0 => Error::format(source, None, "no member of the form KEY.jpg, KEY.png, ... in the tar files"),
            _ => {
                let reason = self.faults.get(&0).map_or("", String::as_str);
                let what = format!("no sample can be used; the first, {}: {reason}", self.name(0));
                Error::format(source, None, what)
            }
        };
        error.with_hint("a WebDataset sample is a run of members like 17.jpg and 17.cls; unpack other archives first")
    }
}

impl Source for WebDataset {
    fn kind(&self) -> &'static str {
        "webdataset"
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn len(&self) -> usize {
        self.samples.len()
    }

    fn label(&self, i: usize) -> Option<u32> {
        self.labels.get(i)
    }

    fn name(&self, i: usize) -> String {
        let place = &self.samples[i];
        let shard = &self.shards[place.shard as usize];
        match Members::from(shard, place.header).read_next() {
            Ok(Some(member)) => format!("{}/{}", name(shard), String::from_utf8_lossy(&member.path)),
            _ => format!("{}, byte {}", name(shard), place.header),
        }
    }

    fn read<'a>(&'a self, i: usize, buffer: &'a mut Vec<u8>) -> Result<Item<'a>, Fault> {
        if let Some(reason) = self.faults.get(&(i as u32)) {
            return Err(Fault::Bad(reason.clone()));
        }
        let place = &self.samples[i];
        Ok(Item::Encoded(self.shards[place.shard as usize].read(place.data, place.len as usize, buffer)?))
    }

    fn fingerprint(&self, hasher: &mut blake3::Hasher) {
        for shard in &self.shards {
            shard.fingerprint(hasher);
        }
        for field in [&self.fields.image, &self.fields.label] {
            hasher.update(field.as_deref().unwrap_or_default().as_bytes()).update(&[0]);
        }
    }
}

impl Sample {
    fn new(key: Vec<u8>, first: Member) -> Sample {
        Sample { key, first, image: None, images: 0, label: None, fields: Vec::new(), fault: None }
    }

    /// Takes in a member. Errors are those of the file; what is wrong with the sample is noted in it.
    fn take(&mut self, blob: &Blob, member: Member, field: String, wanted: &Fields) -> Result<()> {
        if self.fields.contains(&field) {
            self.fault = Some(format!("two members with the field {}", shortened(&field)));
        }
        let rank = match &wanted.image {
            Some(image) => (field == image.to_lowercase()).then_some(0),
            None => IMAGE_FIELDS.iter().position(|known| *known == field),
        };
        let from_json = wanted.label.is_some();
        if let Some(rank) = rank {
            self.images += 1;
            if self.image.as_ref().is_none_or(|(best, _)| rank < *best) {
                self.image = Some((rank, member));
            }
        } else if field == "cls" && !from_json {
            // Before what a JSON field says.
            let label = label_of(blob, &member, MAX_CLS, label_of_cls)?;
            self.label = label.map_err(|reason| self.fault = Some(reason)).ok();
        } else if field == "json" && (from_json || self.label.is_none()) {
            let read = |text: &[u8]| label_of_json(text, wanted.label.as_deref());
            match label_of(blob, &member, MAX_JSON, read)? {
                Ok(label) => self.label = (label != Label::None).then_some(label),
                Err(reason) => self.fault = Some(reason),
            }
        }
        // Enough to tell what is there.
        if self.fields.len() < 32 {
            self.fields.push(field);
        }
        Ok(())
    }
}

/// The part of a member's name that is the key, and its field in lower case. Names without a dot belong to no sample, nor do
/// those `__like__` that, which describe a whole shard, nor hidden files.
fn key_and_field(path: &[u8]) -> Option<(Range<usize>, String)> {
    let base = memchr::memrchr(b'/', path).map_or(0, |slash| slash + 1);
    let dot = base + memchr::memchr(b'.', &path[base..])?;
    let top = &path[..memchr::memchr(b'/', path).unwrap_or(path.len())];
    if dot == base || (top.len() >= 4 && top.starts_with(b"__") && top.ends_with(b"__")) {
        return None;
    }
    Some((0..dot, String::from_utf8_lossy(&path[dot + 1..]).to_lowercase()))
}

/// What `parse` makes of a short member.
fn label_of(
    blob: &Blob,
    member: &Member,
    longest: u64,
    parse: impl Fn(&[u8]) -> Result<Label, String>,
) -> Result<Result<Label, String>> {
    if member.len > longest {
        return Ok(Err(format!("its label has {} bytes, more than {longest}", member.len)));
    }
    let mut text = Vec::new();
    blob.read(member.data, member.len as usize, &mut text)?;
    Ok(parse(&text))
}

/// The number or name of a class as text.
fn label_of_cls(text: &[u8]) -> Result<Label, String> {
    let text = std::str::from_utf8(text).map_err(|_| "its cls is no text".to_string())?.trim();
    match text.parse() {
        Ok(number) => Ok(Label::Number(number)),
        Err(_) if text.is_empty() => Err("its cls is empty".into()),
        Err(_) => Ok(Label::Name(text.to_owned())),
    }
}

fn label_of_json(text: &[u8], field: Option<&str>) -> Result<Label, String> {
    let json: serde_json::Value = serde_json::from_slice(text).map_err(|e| format!("its json cannot be read: {e}"))?;
    let value = match field {
        Some(field) => json.get(field).map(|value| (field, value)),
        None => LABEL_FIELDS.iter().find_map(|field| Some((*field, json.get(field)?))),
    };
    match value {
        None | Some((_, serde_json::Value::Null)) => Ok(Label::None),
        Some((_, serde_json::Value::String(name))) => Ok(Label::Name(name.clone())),
        Some((field, value)) => {
            let number = value.as_i64().map(Label::Number);
            number.ok_or_else(|| {
                format!("its json has {} for {field}, no number or name of a class", shortened(&value.to_string()))
            })
        }
    }
}

fn spool_in<'a>(spool: &'a mut Option<Spool>, scratch: &Path) -> Result<&'a mut Spool> {
    Ok(match spool {
        Some(spool) => spool,
        None => spool.insert(Spool::create(scratch)?),
    })
}

fn name(blob: &Blob) -> String {
    blob.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether a file is named like a tar file.
pub fn is_tar_name(name: &str) -> bool {
    let name = name.to_lowercase();
    [".tar", ".tar.gz", ".tgz"].iter().any(|end| name.ends_with(end))
}

/// Whether `source` is a pattern for several files rather than one.
pub fn is_pattern(source: &Path) -> bool {
    source.to_str().is_some_and(|text| text.contains('{') && text.contains('}')) && !source.exists()
}

fn shard_paths(source: &Path, split: Option<Split>) -> Result<Vec<PathBuf>> {
    if source.is_dir() {
        return shards(source, split, &[], is_tar_name, "tar files");
    }
    if !is_pattern(source) {
        return Ok(vec![source.to_path_buf()]);
    }
    let text = source.to_str().unwrap_or_default();
    let expanded = expand(text).map_err(|what| {
        Error::config("SOURCE", format!("{text}: {what}"))
            .with_hint("a pattern looks like train-{000..012}.tar or {a,b}.tar")
    })?;
    Ok(expanded.into_iter().map(PathBuf::from).collect())
}

/// The names that a pattern with braces stands for: `{000..012}` a range, `{a,b}` a choice. The last braces vary fastest.
fn expand(pattern: &str) -> Result<Vec<String>, String> {
    let Some((before, rest)) = pattern.split_once('{') else {
        return Ok(vec![pattern.to_owned()]);
    };
    let (inside, after) = rest.split_once('}').ok_or("a brace is not closed")?;
    let choices = match inside.split_once("..") {
        Some((first, last)) => range(first, last)?,
        None => inside.split(',').map(str::to_owned).collect(),
    };
    let tails = expand(after)?;
    if choices.len().saturating_mul(tails.len()) > MAX_SHARDS {
        return Err(format!("stands for more than {MAX_SHARDS} files"));
    }
    Ok(choices.iter().flat_map(|choice| tails.iter().map(move |tail| format!("{before}{choice}{tail}"))).collect())
}

fn range(first: &str, last: &str) -> Result<Vec<String>, String> {
    let number = |text: &str| text.parse::<u32>().map_err(|_| format!("{text} is no number"));
    let (from, to) = (number(first)?, number(last)?);
    if from > to || (to - from) as usize >= MAX_SHARDS {
        return Err(format!("{first}..{last} is no range of at most {MAX_SHARDS} numbers"));
    }
    // As wide as the wider end when either has a leading zero.
    let padded = [first, last].iter().any(|text| text.len() > 1 && text.starts_with('0'));
    let width = if padded { first.len().max(last.len()) } else { 0 };
    Ok((from..=to).map(|n| format!("{n:0width$}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_stand_for_files() {
        assert_eq!(expand("a-{098..101}.tar").unwrap(), ["a-098.tar", "a-099.tar", "a-100.tar", "a-101.tar"]);
        assert_eq!(expand("{9..10}{x,y}").unwrap(), ["9x", "9y", "10x", "10y"]);
        assert_eq!(expand("plain.tar").unwrap(), ["plain.tar"]);
        for bad in ["{1..", "{a..b}", "{2..1}", "{0..4000000000}", "{0..999999}{0..9}", "{-1..3}"] {
            assert!(expand(bad).is_err(), "{bad}");
        }
    }

    /// What webdataset gives for these names, but for hidden files: it makes samples of them that split those around them.
    #[test]
    fn keys_end_at_the_first_dot_of_the_last_part() {
        let parts = |path: &str| key_and_field(path.as_bytes()).map(|(key, field)| (path[key].to_owned(), field));
        let some = |key: &str, field: &str| Some((key.to_owned(), field.to_owned()));
        assert_eq!(parts("a.b/c.d.JPG"), some("a.b/c", "d.jpg"));
        assert_eq!(parts("0017.jpg"), some("0017", "jpg"));
        assert_eq!(parts("./x/0017."), some("./x/0017", ""));
        assert_eq!(parts("a..jpg"), some("a", ".jpg"));
        for none in ["a/b", "a/._0017.jpg", ".hidden", "__info.json__", "__x__/y.jpg", ""] {
            assert_eq!(parts(none), None, "{none}");
        }
    }

    #[test]
    fn labels_are_numbers_or_names() {
        assert_eq!(label_of_cls(b" 42\n"), Ok(Label::Number(42)));
        assert_eq!(label_of_cls(b"tabby cat"), Ok(Label::Name("tabby cat".into())));
        assert!(label_of_cls(b" ").is_err() && label_of_cls(b"\xff").is_err());
        let json = br#"{"class": "ant", "cls": 7, "deep": {"n": 1}, "half": 0.5, "none": null}"#;
        assert_eq!(label_of_json(json, None), Ok(Label::Number(7)));
        assert_eq!(label_of_json(json, Some("class")), Ok(Label::Name("ant".into())));
        assert_eq!(label_of_json(json, Some("none")), Ok(Label::None));
        assert_eq!(label_of_json(json, Some("absent")), Ok(Label::None));
        for field in ["deep", "half"] {
            assert!(label_of_json(json, Some(field)).unwrap_err().contains("no number or name"));
        }
        assert!(label_of_json(b"{", None).unwrap_err().contains("cannot be read"));
    }
}
