//! Sums over the index of a dataset: classes and sizes.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde_json::json;

use crate::data::dataset::Dataset;
use crate::data::format::SHUFFLED;
use crate::data::shard::Shard;
use crate::error::Result;

/// Width of the longest bar of the histogram.
const BAR: usize = 40;

/// Sums over the index.
pub struct Facts {
    /// Records of each class, and of none.
    counts: Vec<u64>,
    unlabelled: u64,
    /// Records by (width, height, channels), stored and original.
    stored: BTreeMap<(usize, usize, usize), u64>,
    originals: BTreeMap<(usize, usize), u64>,
}

impl Facts {
    /// Reads the whole index.
    ///
    /// # Errors
    /// As [`Dataset::entry`].
    pub fn gather(dataset: &Dataset) -> Result<Facts> {
        let mut facts = Facts {
            counts: vec![0; dataset.classes().len()],
            unlabelled: 0,
            stored: BTreeMap::new(),
            originals: BTreeMap::new(),
        };
        for i in 0..dataset.len() {
            let entry = dataset.entry(i)?;
            match entry.label() {
                Some(label) => facts.counts[label as usize] += 1,
                None => facts.unlabelled += 1,
            }
            let size = (entry.width.into(), entry.height.into(), entry.channels.into());
            *facts.stored.entry(size).or_default() += 1;
            *facts.originals.entry((entry.original_width.into(), entry.original_height.into())).or_default() += 1;
        }
        Ok(facts)
    }

    /// Stored sizes, original sizes, and the classes with a histogram; at most `lines` of them.
    pub fn print(&self, dataset: &Dataset, lines: usize, out: &mut dyn Write) -> io::Result<()> {
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
        for (name, count) in dataset.classes().iter().zip(&self.counts).take(lines) {
            let bar = "#".repeat((*count as f64 / most as f64 * BAR as f64).round() as usize);
            writeln!(out, "  {name:name_width$} {count:>9} {bar}")?;
        }
        if self.counts.len() > lines {
            let least = self.counts.iter().min().unwrap_or(&0);
            writeln!(
                out,
                "  ... {} more classes; the smallest has {least} images, the largest {most}",
                self.counts.len() - lines
            )?;
        }
        Ok(())
    }

    /// All there is to tell.
    pub fn json(&self, dataset: &Dataset) -> serde_json::Value {
        let shards = dataset.shards().iter();
        let classes = dataset.classes().iter().zip(&self.counts);
        let stored = self.stored.iter();
        let originals = self.originals.iter();
        json!({
            "file": dataset.path().display().to_string(),
            "bytes": dataset.bytes(),
            "uuid": dataset.uuid(),
            "records": dataset.len(),
            "classes": classes.map(|(name, count)| json!({"name": name, "records": count})).collect::<Vec<_>>(),
            "unlabelled": self.unlabelled,
            "stored": stored.map(|((w, h, c), n)| json!({"width": w, "height": h, "channels": c, "records": n})).collect::<Vec<_>>(),
            "originals": originals.map(|((w, h), n)| json!({"width": w, "height": h, "records": n})).collect::<Vec<_>>(),
            "shards": shards.map(shard_json).collect::<Vec<_>>(),
        })
    }
}

fn shard_json(shard: &Shard) -> serde_json::Value {
    let header = shard.header();
    json!({
        "file": shard.path().display().to_string(),
        "format": format!("{}.{}", header.major, header.minor),
        "bytes": header.file_len,
        "uuid": uuid::Uuid::from_bytes(header.uuid),
        "records": header.records,
        "alignment": header.alignment,
        "stride": header.stride,
        "shuffle_seed": (header.optional_features & SHUFFLED != 0).then_some(header.shuffle_seed),
        "shard": header.shard,
        "first_id": header.first_id,
        "meta": shard.meta(),
    })
}

/// "60000 of 28x28x1", or the most common sizes of several.
fn most_common(mut sizes: Vec<(String, u64)>) -> String {
    const SHOWN: usize = 3;
    sizes.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let shown: Vec<String> = sizes.iter().take(SHOWN).map(|(size, count)| format!("{count} of {size}")).collect();
    let more = if sizes.len() > SHOWN { format!(" and {} other sizes", sizes.len() - SHOWN) } else { String::new() };
    shown.join(", ") + &more
}
