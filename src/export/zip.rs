//! Zip archives whose entries are stored as they are, as PyTorch writes them: the data of an entry starts at a multiple of 64
//! bytes, so that a reader may map it.

use std::io::{self, Write};

use crc_fast::{CrcAlgorithm, checksum};

/// Where the data of entries start.
const ALIGNMENT: usize = 64;
/// Lengths of the three kinds of headers, without names and extra fields.
const LOCAL: usize = 30;
const CENTRAL: usize = 46;
const END: usize = 22;
/// An extra field that readers pass over: id `FB`, then its length.
const PADDING: &[u8; 2] = b"FB";
/// The only date that is the same tomorrow: 1 January 1980.
const DATE: u16 = 0x0021;

/// Writes an archive with the entries (name, content) in their order. The bytes follow from the content alone.
///
/// # Errors
/// What `out` reports; archives of 4 GiB and more, which the format without extensions cannot hold.
pub fn write(entries: &[(String, &[u8])], out: &mut dyn Write) -> io::Result<()> {
    let (mut at, mut directory) = (0, Vec::new());
    for (name, content) in entries {
        let common = common(name, content)?;
        let padding = padding(at + LOCAL + name.len());
        put(out, &[b"PK\x03\x04", &common, &(padding.len() as u16).to_le_bytes(), name.as_bytes(), &padding, content])?;
        // Made by version 2.0; neither extra field nor comment, disk 0, no attributes; where the local header lies.
        put(&mut directory, &[b"PK\x01\x02", &20u16.to_le_bytes(), &common, &[0; 12], &size(at)?, name.as_bytes()])?;
        at += LOCAL + name.len() + padding.len() + content.len();
    }
    let count = u16::try_from(entries.len()).map_err(|_| too_large())?.to_le_bytes();
    out.write_all(&directory)?;
    put(out, &[b"PK\x05\x06", &[0; 4], &count, &count, &size(directory.len())?, &size(at)?, &[0; 2]])
}

/// What the local and the central header share, up to the length of the name: version 2.0, UTF-8 names, stored, the date, CRC,
/// both sizes.
fn common(name: &str, content: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(name.len()).map_err(|_| too_large())?;
    let crc = checksum(CrcAlgorithm::Crc32IsoHdlc, content) as u32;
    let mut bytes: Vec<u8> = [20u16, 0x0800, 0, 0, DATE].iter().flat_map(|word| word.to_le_bytes()).collect();
    put(&mut bytes, &[&crc.to_le_bytes(), &size(content.len())?, &size(content.len())?, &length.to_le_bytes()])?;
    Ok(bytes)
}

fn put(out: &mut dyn Write, parts: &[&[u8]]) -> io::Result<()> {
    parts.iter().try_for_each(|part| out.write_all(part))
}

fn size(value: usize) -> io::Result<[u8; 4]> {
    u32::try_from(value).map(u32::to_le_bytes).map_err(|_| too_large())
}

fn too_large() -> io::Error {
    io::Error::other("a zip archive ends at 4 GiB; hint: export as safetensors")
}

/// The extra field that moves what would start at `at` to a multiple of [`ALIGNMENT`].
fn padding(at: usize) -> Vec<u8> {
    let header = PADDING.len() + 2;
    let zeros = (at + header).next_multiple_of(ALIGNMENT) - (at + header);
    [PADDING.as_slice(), &(zeros as u16).to_le_bytes(), &vec![0; zeros]].concat()
}

/// The entries (name, content) of an archive that [`write`] wrote.
///
/// # Errors
/// What is wrong with it.
pub fn read(archive: &[u8]) -> Result<Vec<(String, &[u8])>, String> {
    let cut = || "the zip archive is cut or damaged".to_string();
    let end = archive.len().checked_sub(END).ok_or_else(cut)?;
    let tail = field(archive, end, END).filter(|tail| tail.starts_with(b"PK\x05\x06")).ok_or_else(cut)?;
    let (count, mut at) = (number(tail, 10, 2).ok_or_else(cut)?, number(tail, 16, 4).ok_or_else(cut)?);
    let mut entries = Vec::with_capacity(count);
    for _ in 0..count {
        let header = field(archive, at, CENTRAL).filter(|header| header.starts_with(b"PK\x01\x02")).ok_or_else(cut)?;
        let [length, extra, comment] = [28, 30, 32].map(|offset| number(header, offset, 2).unwrap_or(0));
        let [crc, size, local] = [16, 24, 42].map(|offset| number(header, offset, 4).unwrap_or(0));
        let name =
            field(archive, at + CENTRAL, length).and_then(|name| std::str::from_utf8(name).ok()).ok_or_else(cut)?;
        let start = field(archive, local, LOCAL).filter(|header| header.starts_with(b"PK\x03\x04")).ok_or_else(cut)?;
        let names = number(start, 26, 2).unwrap_or(0) + number(start, 28, 2).unwrap_or(0);
        let content = field(archive, local + LOCAL + names, size).ok_or_else(cut)?;
        if number(header, 10, 2) != Some(0) || checksum(CrcAlgorithm::Crc32IsoHdlc, content) != crc as u64 {
            return Err(format!("entry {name} of the zip archive does not have its checksum"));
        }
        entries.push((name.to_string(), content));
        at += CENTRAL + length + extra + comment;
    }
    Ok(entries)
}

fn field(bytes: &[u8], at: usize, length: usize) -> Option<&[u8]> {
    bytes.get(at..at.checked_add(length)?)
}

/// A little-endian number of `length` bytes.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<usize> {
    Some(field(bytes, at, length)?.iter().rev().fold(0, |number, &byte| (number << 8) | usize::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let entries = [("a/data.pkl", &b"hello"[..]), ("a/empty", b""), ("a/data/0", &[7; 100])];
        let entries = entries.map(|(name, content)| (name.to_string(), content));
        let mut archive = Vec::new();
        write(&entries, &mut archive).unwrap();
        assert_eq!(read(&archive).unwrap(), entries);
        archive
    }

    #[test]
    fn entries_are_read_back_and_aligned() {
        let archive = sample();
        for content in [&b"hello"[..], &[7; 100]] {
            let at = archive.windows(content.len()).position(|window| window == content).unwrap();
            assert!(at.is_multiple_of(ALIGNMENT), "{at}");
        }
        // CRC-32 of "hello", by Python's zlib.crc32.
        assert_eq!(archive[14..18], 0x3610_a686_u32.to_le_bytes());
    }

    #[test]
    fn cuts_and_damaged_content_are_noticed() {
        let archive = sample();
        for cut in 0..archive.len() {
            assert!(read(&archive[..cut]).is_err(), "cut at {cut}");
        }
        let at = archive.windows(5).position(|window| window == b"hello").unwrap();
        for at in at..at + 5 {
            let mut damaged = archive.clone();
            damaged[at] ^= 4;
            assert!(read(&damaged).unwrap_err().contains("a/data.pkl"), "{at}");
        }
    }
}
