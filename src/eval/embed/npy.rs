//! The header of NumPy's `.npy` files, version 1.0.

/// Header bytes are a multiple of this, so that the data are aligned when the file is mapped.
const ALIGNMENT: usize = 64;
/// Magic, version and the length of the text.
const PREFIX: usize = 10;

/// What comes before the data: row-major, of NumPy's element type `descr`, such as `<f4`.
pub(super) fn header(descr: &str, shape: &[usize]) -> Vec<u8> {
    let dims: String = shape.iter().map(|dim| format!("{dim}, ")).collect();
    // A tuple of one has its comma, longer ones none at the end: as NumPy writes them.
    let dims = if shape.len() == 1 { dims.trim_end() } else { dims.trim_end_matches(", ") };
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({dims}), }}");
    let spaces = (PREFIX + text.len() + 1).next_multiple_of(ALIGNMENT) - PREFIX - text.len() - 1;
    text.extend(std::iter::repeat_n(' ', spaces));
    text.push('\n');
    let length = text.len() as u16;
    [b"\x93NUMPY\x01\x00", &length.to_le_bytes()[..], text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `numpy.save` of NumPy 2 writes before the data of such arrays.
    #[test]
    fn headers_are_numpys() {
        let expected = |text: &str| [b"\x93NUMPY\x01\x00v\x00", text.as_bytes()].concat();
        let padded = |text: &str| format!("{text:<117}\n");
        let text = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 512), }";
        assert_eq!(header("<f4", &[3, 512]), expected(&padded(text)));
        let text = "{'descr': '<i8', 'fortran_order': False, 'shape': (1281167,), }";
        assert_eq!(header("<i8", &[1_281_167]), expected(&padded(text)));
    }
}
