//! The part of the zip format that `torch.save` uses: stored entries, found through the central directory, with CRC-32.
//! (APPNOTE.TXT 6.3, sections 4.3.7, 4.3.12, 4.3.14 to 4.3.16, 4.5.3.)

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crc_fast::CrcAlgorithm;

use super::pickle::shown;
use crate::error::{Error, Result};

/// How such a file begins.
pub const MAGIC: &[u8] = b"PK\x03\x04";

const END: &[u8] = b"PK\x05\x06";
const END_LEN: usize = 22;
const LONGEST_COMMENT: usize = 0xffff;
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const LOCATOR_64_LEN: usize = 20;
const CENTRAL: &[u8] = b"PK\x01\x02";
const CENTRAL_LEN: usize = 46;
const LOCAL_LEN: usize = 30;
/// Id of the extra field with 64-bit sizes.
const EXTRA_64: u16 = 1;
/// What a 32-bit field says when its value is in that extra field.
const SEE_EXTRA: u64 = 0xffff_ffff;
/// The largest number of entries that 16 bits can say: so many, or more.
const MANY: u64 = 0xffff;

/// Where the entries of a zip file lie, by name; all checksums are verified.
///
/// # Errors
/// [`Error::Format`] for a file that is cut, inconsistent, damaged or compressed.
pub fn entries(path: &Path, file: &[u8]) -> Result<HashMap<String, Range<usize>>> {
    let (mut at, promised) = directory(path, file)?;
    let mut entries = HashMap::new();
    // Entries that share bytes would cost more time than the file is long.
    let mut unread = file.len();
    loop {
        let record = Record { path, file, at };
        if record.signature()? != CENTRAL {
            return match promised == MANY || promised == entries.len() as u64 {
                true => Ok(entries),
                false => Err(record.fault(format!("the zip file has {} entries, expected {promised}", entries.len()))),
            };
        }
        let entry = Entry::read(&record)?;
        let range = entry.range(path, file)?;
        unread = unread
            .checked_sub(range.len())
            .ok_or_else(|| record.fault(format!("the zip entry {} overlaps others", shown(&entry.name))))?;
        entry.verify(&record, &file[range.clone()])?;
        at += entry.record_len;
        if let Some(name) = entries.insert(entry.name.clone(), range).map(|_| entry.name) {
            return Err(record.fault(format!("the zip entry {} is there twice", shown(&name))));
        }
    }
}

/// Where the central directory starts, and how many entries it has.
fn directory(path: &Path, file: &[u8]) -> Result<(usize, u64)> {
    let tail = file.len().saturating_sub(END_LEN + LONGEST_COMMENT);
    let Some(end) = memchr::memmem::rfind(&file[tail..], END).map(|found| tail + found) else {
        let what = "the file is cut: it begins as a zip file and does not end as one";
        return Err(Error::format(path, Some(file.len() as u64), what).with_hint("copy or download it again"));
    };
    let record = Record { path, file, at: end };
    let promised = end + END_LEN + record.number(20, 2)? as usize;
    if promised != file.len() {
        return Err(record.fault(format!("the zip file ends at byte {}, expected {promised}", file.len())));
    }
    let (count, offset) = (record.number(10, 2)?, record.number(16, 4)?);
    if offset != SEE_EXTRA {
        return Ok((offset as usize, count));
    }
    let locator = Record { path, file, at: end.saturating_sub(LOCATOR_64_LEN) };
    locator.expect(LOCATOR_64)?;
    let end_64 = Record { path, file, at: usize::try_from(locator.number(8, 8)?).unwrap_or(usize::MAX) };
    end_64.expect(END_64)?;
    Ok((usize::try_from(end_64.number(48, 8)?).unwrap_or(usize::MAX), end_64.number(32, 8)?))
}

/// A record of the format at a byte of the file.
struct Record<'a> {
    path: &'a Path,
    file: &'a [u8],
    at: usize,
}

impl Record<'_> {
    fn fault(&self, what: String) -> Error {
        Error::format(self.path, Some(self.at as u64), what)
    }

    fn bytes(&self, offset: usize, len: usize) -> Result<&[u8]> {
        let start = self.at.checked_add(offset);
        let range = start.and_then(|start| Some(start..start.checked_add(len)?));
        range
            .and_then(|range| self.file.get(range))
            .ok_or_else(|| self.fault("a record of the zip file lies outside of it: cut or damaged".into()))
    }

    fn signature(&self) -> Result<&[u8]> {
        self.bytes(0, 4)
    }

    fn expect(&self, signature: &[u8]) -> Result<()> {
        match self.signature()? == signature {
            true => Ok(()),
            false => Err(self.fault("the zip file has another record here than it says: cut or damaged".into())),
        }
    }

    /// A little-endian number of `len` bytes.
    fn number(&self, offset: usize, len: usize) -> Result<u64> {
        let mut number = [0; 8];
        number[..len].copy_from_slice(self.bytes(offset, len)?);
        Ok(u64::from_le_bytes(number))
    }
}

/// An entry of the central directory.
struct Entry {
    name: String,
    method: u64,
    crc: u64,
    size: u64,
    packed: u64,
    local: u64,
    record_len: usize,
}

impl Entry {
    fn read(record: &Record<'_>) -> Result<Entry> {
        let number = |offset, len| record.number(offset, len);
        let (name_len, extra_len) = (number(28, 2)? as usize, number(30, 2)? as usize);
        let name = String::from_utf8_lossy(record.bytes(CENTRAL_LEN, name_len)?).into_owned();
        let mut entry = Entry {
            name,
            method: number(10, 2)?,
            crc: number(16, 4)?,
            packed: number(20, 4)?,
            size: number(24, 4)?,
            local: number(42, 4)?,
            record_len: CENTRAL_LEN + name_len + extra_len + number(32, 2)? as usize,
        };
        entry.widen(record.bytes(CENTRAL_LEN + name_len, extra_len)?);
        Ok(entry)
    }

    /// Takes what did not fit 32 bits from the extra fields.
    fn widen(&mut self, mut extra: &[u8]) {
        while let [a, b, c, d, rest @ ..] = extra {
            let len = usize::from(u16::from_le_bytes([*c, *d])).min(rest.len());
            let (field, after) = rest.split_at(len);
            if u16::from_le_bytes([*a, *b]) == EXTRA_64 {
                let (numbers, _) = field.as_chunks::<8>();
                let mut numbers = numbers.iter();
                for value in [&mut self.size, &mut self.packed, &mut self.local] {
                    if *value == SEE_EXTRA {
                        *value = numbers.next().map_or(u64::MAX, |bytes| u64::from_le_bytes(*bytes));
                    }
                }
            }
            extra = after;
        }
    }

    /// Where its bytes lie; the local header repeats name and extra fields in lengths of its own.
    fn range(&self, path: &Path, file: &[u8]) -> Result<Range<usize>> {
        let local = Record { path, file, at: usize::try_from(self.local).unwrap_or(usize::MAX) };
        local.expect(MAGIC)?;
        let start = LOCAL_LEN + (local.number(26, 2)? + local.number(28, 2)?) as usize;
        let len = usize::try_from(self.size).unwrap_or(usize::MAX);
        local.bytes(start, len)?;
        Ok(local.at + start..local.at + start + len)
    }

    fn verify(&self, record: &Record<'_>, bytes: &[u8]) -> Result<()> {
        if self.method != 0 || self.packed != self.size {
            let what = format!("the zip entry {} is compressed, which torch.save never does", shown(&self.name));
            return Err(record.fault(what).with_hint("pass the file that PyTorch wrote, not an archive of it"));
        }
        let actual = crc_fast::checksum(CrcAlgorithm::Crc32IsoHdlc, bytes);
        // 0: PyTorch was told to leave it out (torch.serialization.set_crc32_options).
        if self.crc != 0 && self.crc != actual {
            let (name, stored) = (shown(&self.name), self.crc);
            let what = format!("the zip entry {name} is damaged: expected CRC-32 {stored:08x}, got {actual:08x}");
            return Err(record.fault(what).with_hint("copy or download the file again"));
        }
        Ok(())
    }
}
