//! The members of a tar file in order, with their places. The fields of a header are read by the `tar` crate; the walk is our
//! own, because it has to know where every member lies, to bound what a damaged header can make it read, and to tell a file
//! that is cut from one that ends.

use ::tar::{EntryType, Header, PaxExtensions};

use super::blob::Blob;
use crate::error::{Error, Result};

const BLOCK: u64 = 512;
/// The longest name, and the most extensions of a header, that are believed.
const MAX_EXTENSION: u64 = 1 << 16;

/// A plain file in a tar file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Where its first header lies; a walk can begin there.
    pub start: u64,
    /// Where its content lies.
    pub data: u64,
    /// Bytes of its content.
    pub len: u64,
    /// Its name.
    pub path: Vec<u8>,
}

/// A walk over the plain files in a tar file; folders, links and the like are passed over.
pub struct Members<'a> {
    blob: &'a Blob,
    next: u64,
    /// Whether the walk came to the zeros that a tar file ends with.
    marked_end: bool,
}

/// What the headers before a member's own say about it.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    len: Option<u64>,
    sparse: bool,
}

impl<'a> Members<'a> {
    /// A walk from byte `start` on, where a header has to lie.
    pub fn from(blob: &'a Blob, start: u64) -> Members<'a> {
        Members { blob, next: start, marked_end: false }
    }

    /// Whether the file, walked to its end, ends like a whole one.
    pub fn marked_end(&self) -> bool {
        self.marked_end
    }

    /// The next plain file.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Format`] with the byte where the file is cut or damaged.
    pub fn read_next(&mut self) -> Result<Option<Member>> {
        let mut start = self.next;
        let mut extensions = Extensions::default();
        while let Some(header) = self.header()? {
            let kind = header.entry_type();
            let at = self.next;
            let data = at + BLOCK;
            let own = if header.as_ustar().is_some() || header.as_gnu().is_some() || !is_extension(kind) {
                header.entry_size().map_err(|e| self.damaged(at, &e.to_string()))?
            } else {
                return Err(self.damaged(at, "an extension in a header of the oldest form"));
            };
            let len = extensions.len.filter(|_| !is_extension(kind)).unwrap_or(own);
            self.pass(at, len)?;
            if is_extension(kind) {
                self.extend(&mut extensions, kind, data, len)?;
                continue;
            }
            if matches!(kind, EntryType::Regular | EntryType::Continuous) {
                if extensions.sparse {
                    return Err(self.damaged(at, "a file with holes (sparse), which is not supported"));
                }
                let path = extensions.path.unwrap_or_else(|| header.path_bytes().into_owned());
                return Ok(Some(Member { start, data, len, path }));
            }
            if kind == EntryType::GNUSparse {
                return Err(self.damaged(at, "a file with holes (sparse), which is not supported"));
            }
            extensions = Extensions::default();
            start = self.next;
        }
        match start == self.next {
            true => Ok(None),
            false => Err(self.damaged(start, "the tar file ends within the headers of a member")),
        }
    }

    /// The header at the current place, or `None` at the end of the archive.
    fn header(&mut self) -> Result<Option<Header>> {
        if self.next == self.blob.len() {
            return Ok(None);
        }
        if self.blob.len() - self.next < BLOCK {
            let what = format!("the tar file is cut: it ends {} bytes into a header", self.blob.len() - self.next);
            return Err(Error::format(self.blob.path(), Some(self.next), what));
        }
        let mut header = Header::new_old();
        self.blob.read_at(self.next, header.as_mut_bytes())?;
        if header.as_bytes().iter().all(|byte| *byte == 0) {
            self.marked_end = true;
            return Ok(None);
        }
        let bytes = header.as_bytes();
        let sum: u32 = bytes[..148].iter().chain(&bytes[156..]).map(|byte| u32::from(*byte)).sum::<u32>() + 8 * 32;
        match header.cksum() {
            Ok(stored) if stored == sum => Ok(Some(header)),
            _ => Err(self.damaged(self.next, "not a tar header, or a damaged one: its checksum is wrong")),
        }
    }

    /// Moves behind the member at `at`, whose content must all be there.
    fn pass(&mut self, at: u64, len: u64) -> Result<()> {
        let end = (at + BLOCK).checked_add(len).filter(|end| *end <= self.blob.len());
        let end = end.ok_or_else(|| {
            let what = format!("a member of {len} bytes, but the file ends at byte {}", self.blob.len());
            Error::format(self.blob.path(), Some(at), what).with_hint("the tar file is cut or damaged")
        })?;
        // The last member of a file may lack its padding.
        self.next = end.next_multiple_of(BLOCK).min(self.blob.len());
        Ok(())
    }

    fn extend(&self, extensions: &mut Extensions, kind: EntryType, data: u64, len: u64) -> Result<()> {
        if !matches!(kind, EntryType::GNULongName | EntryType::XHeader) {
            return Ok(());
        }
        if len > MAX_EXTENSION {
            let what = format!("an extended header of {len} bytes, more than {MAX_EXTENSION}");
            return Err(self.damaged(data - BLOCK, &what));
        }
        let mut bytes = Vec::new();
        self.blob.read(data, len as usize, &mut bytes)?;
        if kind == EntryType::GNULongName {
            bytes.truncate(memchr::memchr(0, &bytes).unwrap_or(bytes.len()));
            extensions.path = Some(bytes);
            return Ok(());
        }
        for field in PaxExtensions::new(&bytes) {
            let field = field.map_err(|e| self.damaged(data, &e.to_string()))?;
            match field.key_bytes() {
                b"path" => extensions.path = Some(field.value_bytes().to_vec()),
                b"size" => {
                    let len = field.value().ok().and_then(|text| text.parse().ok());
                    extensions.len = Some(len.ok_or_else(|| self.damaged(data, "a size that is no number"))?);
                }
                key if key.starts_with(b"GNU.sparse.") => extensions.sparse = true,
                _ => {}
            }
        }
        Ok(())
    }

    fn damaged(&self, at: u64, what: &str) -> Error {
        Error::format(self.blob.path(), Some(at), what).with_hint("the tar file is cut or damaged")
    }
}

/// Whether a header of this kind speaks about members to come.
fn is_extension(kind: EntryType) -> bool {
    matches!(kind, EntryType::GNULongName | EntryType::GNULongLink | EntryType::XHeader | EntryType::XGlobalHeader)
}
