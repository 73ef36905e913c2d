//! Zip archives whose entries are stored as they are, as PyTorch writes them: the data of an entry starts at a multiple of 64
//! bytes, so that a reader may map it.

use std::io::{self, Write};

use crc_fast::{CrcAlgorithm, checksum};

/// Where the data of entries start.
const ALIGNMENT: usize = 64;
/// Length of the header before an entry, without name and extra field.
const LOCAL: usize = 30;
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::import::zip::entries;

    fn sample() -> Vec<u8> {
        let contents = [("a/data.pkl", &b"hello"[..]), ("a/empty", b""), ("a/data/0", &[7; 100])];
        let mut archive = Vec::new();
        write(&contents.map(|(name, content)| (name.to_string(), content)), &mut archive).unwrap();
        let found = entries(Path::new("x"), &archive).unwrap();
        assert_eq!(found.len(), contents.len());
        for (name, content) in contents {
            assert_eq!(&archive[found[name].clone()], content, "{name}");
        }
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
        let read = |archive: &[u8]| entries(Path::new("x"), archive);
        for cut in 0..archive.len() {
            assert!(read(&archive[..cut]).is_err(), "cut at {cut}");
        }
        let at = archive.windows(5).position(|window| window == b"hello").unwrap();
        for at in at..at + 5 {
            let mut damaged = archive.clone();
            damaged[at] ^= 4;
            assert!(read(&damaged).unwrap_err().to_string().contains("a/data.pkl is damaged"), "{at}");
        }
        let mut fewer = archive.clone();
        let count = archive.len() - 12; // of 22 bytes at the end
        fewer[count] = 2;
        assert!(read(&fewer).unwrap_err().to_string().contains("the zip file has 3 entries, expected 2"));
    }
}
