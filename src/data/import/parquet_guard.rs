//! A first look at the headers of a Parquet file, so that no number in a damaged one becomes memory: the `parquet` crate
//! believes what they say about sizes. Headers are structures of Thrift's compact protocol.

/// The most columns a file may have; the schema is read by recursion.
const MAX_COLUMNS: u64 = 4096;
/// Pages that unpack to no more than this are let through, whatever they are packed to.
const SMALL_PAGE: i64 = 16 << 20;
/// What a larger page may unpack to, for a byte: images are packed already.
const MAX_INFLATION: i64 = 1100;
/// The most values of a page.
const MAX_VALUES: i64 = 1 << 24;
const MAX_DEPTH: u32 = 24;

const I32: u8 = 5;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// Checks the metadata at the end of a file.
///
/// # Errors
/// What is wrong.
pub fn check_footer(bytes: &[u8]) -> Result<(), String> {
    let mut wrong = None;
    let mut reader = Compact { bytes, at: 0 };
    let read = reader.structure(0, &mut |reader, id, kind| {
        if (id, kind) != (2, LIST) {
            return reader.skip(kind, 1);
        }
        let (count, kind) = reader.list()?;
        if count > MAX_COLUMNS {
            wrong = Some(format!("a schema of {count} columns, more than {MAX_COLUMNS}"));
            return None;
        }
        for _ in 0..count {
            let mut children = 0;
            if kind != STRUCT {
                return None;
            }
            reader.structure(1, &mut |reader, id, kind| match (id, kind) {
                (5, I32) => reader.int().map(|value| children = value),
                _ => reader.skip(kind, 2),
            })?;
            if children < 0 || children as u64 > count {
                wrong = Some(format!("a column of {children} columns in a schema of {count}"));
                return None;
            }
        }
        Some(())
    });
    match (read, wrong) {
        (Some(()), _) => Ok(()),
        (None, Some(what)) => Err(what),
        (None, None) => Err(format!("its metadata break off or are damaged at their byte {}", reader.at)),
    }
}

/// Checks the header of a page that `bytes` start with.
///
/// # Errors
/// What is wrong.
pub fn check_page(bytes: &[u8]) -> Result<(), String> {
    let (mut packed, mut unpacked, mut values, mut dictionary) = (0, 0, 0, 0);
    let mut reader = Compact { bytes, at: 0 };
    let read = reader.structure(0, &mut |reader, id, kind| match (id, kind) {
        (2, I32) => reader.int().map(|value| unpacked = value),
        (3, I32) => reader.int().map(|value| packed = value),
        (5 | 7 | 8, STRUCT) => reader.structure(1, &mut |reader, inner, kind| match (inner, kind) {
            (1, I32) if id == 7 => reader.int().map(|value| dictionary = value),
            (1, I32) => reader.int().map(|value| values = value),
            _ => reader.skip(kind, 2),
        }),
        _ => reader.skip(kind, 1),
    });
    read.ok_or_else(|| format!("the header of a page breaks off or is damaged at its byte {}", reader.at))?;
    if unpacked < 0 || packed < 0 || (unpacked > SMALL_PAGE && unpacked / MAX_INFLATION > packed) {
        return Err(format!("a page of {packed} bytes that would unpack to {unpacked}"));
    }
    // Every entry of a dictionary takes its length, or itself, of 4 bytes.
    if !(0..=MAX_VALUES).contains(&values) || !(0..=unpacked / 4).contains(&dictionary) {
        return Err(format!("a page of {unpacked} bytes with {} values", values.max(dictionary)));
    }
    Ok(())
}

/// Number of values that a block in the DELTA_BINARY_PACKED encoding announces.
pub fn delta_count(bytes: &[u8]) -> Option<u64> {
    let mut reader = Compact { bytes, at: 0 };
    reader.varint()?;
    reader.varint()?;
    reader.varint()
}

/// Reads the compact protocol. `None` is for bytes that break off or make no sense.
struct Compact<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// Reads, or skips, a field of a number and kind.
type Visit<'v, 'a> = &'v mut dyn FnMut(&mut Compact<'a>, i64, u8) -> Option<()>;

impl<'a> Compact<'a> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn int(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    fn pass(&mut self, bytes: u64) -> Option<()> {
        let end = (self.at as u64).checked_add(bytes).filter(|end| *end <= self.bytes.len() as u64)?;
        self.at = end as usize;
        Some(())
    }

    /// Length and kind of the elements of a list, each of which takes a byte at least.
    fn list(&mut self) -> Option<(u64, u8)> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        (count <= (self.bytes.len() - self.at) as u64).then_some((count, head & 15))
    }

    fn structure(&mut self, depth: u32, visit: Visit<'_, 'a>) -> Option<()> {
        let mut id = 0;
        loop {
            let head = self.byte()?;
            if head & 15 == 0 {
                return Some(());
            }
            id = if head >> 4 == 0 { self.int()? } else { id + i64::from(head >> 4) };
            if depth > MAX_DEPTH {
                return None;
            }
            visit(self, id, head & 15)?;
        }
    }

    fn skip(&mut self, kind: u8, depth: u32) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        match kind {
            // The value of a field that is a truth value lies in its kind.
            1 | 2 => Some(()),
            3 => self.pass(1),
            4..=6 => self.varint().map(drop),
            7 => self.pass(8),
            8 => self.varint().and_then(|len| self.pass(len)),
            LIST | 10 => {
                let (count, kind) = self.list()?;
                (0..count).try_for_each(|_| self.skip_element(kind, depth + 1))
            }
            11 => {
                let count = self.varint()?;
                let kinds = if count > 0 { self.byte()? } else { 0 };
                (0..count).try_for_each(|_| {
                    self.skip_element(kinds >> 4, depth + 1)?;
                    self.skip_element(kinds & 15, depth + 1)
                })
            }
            STRUCT => self.structure(depth, &mut |reader, _, kind| reader.skip(kind, depth + 1)),
            13 => self.pass(16),
            _ => None,
        }
    }

    fn skip_element(&mut self, kind: u8, depth: u32) -> Option<()> {
        if matches!(kind, 1 | 2) { self.pass(1) } else { self.skip(kind, depth) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A data page: its sizes, and the number of its values in the structure of field 5.
    fn page(unpacked: i64, packed: i64, values: i64) -> Vec<u8> {
        let mut bytes = vec![0x15, 0];
        for (head, value) in [(0x15, unpacked), (0x15, packed), (0x2c, i64::MIN), (0x15, values)] {
            bytes.push(head);
            if value != i64::MIN {
                let mut zigzag = ((value << 1) ^ (value >> 63)) as u64;
                while zigzag > 0x7f {
                    bytes.push(zigzag as u8 | 0x80);
                    zigzag >>= 7;
                }
                bytes.push(zigzag as u8);
            }
        }
        bytes.extend([0, 0]);
        bytes
    }

    #[test]
    fn pages_that_would_take_much_memory_are_refused() {
        assert_eq!(check_page(&page(70_000, 60_000, 64)), Ok(()));
        assert_eq!(check_page(&page(1 << 30, 1 << 29, 64)), Ok(()));
        assert!(
            check_page(&page(1 << 30, 1000, 64)).unwrap_err().contains("a page of 1000 bytes that would unpack to")
        );
        assert!(check_page(&page(-1, 10, 1)).unwrap_err().contains("unpack to -1"));
        assert!(check_page(&page(100, 100, 1 << 30)).unwrap_err().contains("with 1073741824 values"));
        let whole = page(70_000, 60_000, 64);
        for len in 0..whole.len() {
            assert!(check_page(&whole[..len]).unwrap_err().contains("breaks off"));
        }
    }

    #[test]
    fn a_schema_is_not_larger_than_it_is() {
        // Field 2, a list of one structure, whose field 5 says that it has so many columns.
        let footer = |children: u8| [0x29, 0x1c, 0x55, children, 0, 0];
        assert_eq!(check_footer(&footer(2)), Ok(()));
        assert_eq!(check_footer(&footer(4)).unwrap_err(), "a column of 2 columns in a schema of 1");
        assert_eq!(check_footer(&footer(3)).unwrap_err(), "a column of -2 columns in a schema of 1");
        assert!(check_footer(&[0x29, 0xfc, 0xff, 0xff, 0x03]).unwrap_err().contains("break off"));
        // Structures in structures, without end.
        assert!(check_footer(&[0x3c; 4000]).is_err());
    }
}
