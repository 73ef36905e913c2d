//! Files that mean harm or are damaged: each gives one error that says where, none executes anything, panics, or takes memory that
//! its length does not justify.

use std::alloc::System;
use std::fs;
use std::path::Path;

use cap::Cap;
use simsiam_engine::error::{Error, Result};
use simsiam_engine::import::{self, foreign};
use simsiam_engine::rng::{Stream, below};

/// Whoever asks for more ends the process. The files have 50 kB at most; the rest is the test's own.
const MEMORY: usize = 256 << 20;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, MEMORY);

/// Mutations of each kind of file.
const ROUNDS: u64 = 12_000;

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/import").join(name)).unwrap()
}

/// Reads a file and takes all that fits.
fn import(bytes: Vec<u8>) -> Result<usize> {
    let foreign = foreign::read(Path::new("x.pth"), bytes)?;
    Ok(import::fit(&foreign, None, false)?.report.matched)
}

/// A zip file as torch.save writes it, of these entries, with fitting checksums.
fn zip(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in entries {
        let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32IsoHdlc, bytes) as u32;
        let mut common = vec![0; 10]; // version, flags, method 0, time, date
        common.extend(crc.to_le_bytes());
        common.extend([(bytes.len() as u32).to_le_bytes(); 2].concat());
        common.extend((name.len() as u16).to_le_bytes());
        common.extend([0, 0]); // extra fields
        directory.extend(b"PK\x01\x02\0\0");
        directory.extend(&common);
        directory.extend([0; 10]); // comment, disk, attributes
        directory.extend((file.len() as u32).to_le_bytes());
        directory.extend(name.as_bytes());
        file.extend(b"PK\x03\x04");
        file.extend(&common);
        file.extend(name.as_bytes());
        file.extend(*bytes);
    }
    let start = file.len() as u32;
    let (count, size) = (entries.len() as u16, directory.len() as u32);
    file.extend(directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend([count.to_le_bytes(); 2].concat());
    file.extend([size.to_le_bytes(), start.to_le_bytes()].concat());
    file.extend([0, 0]);
    file
}

/// The message about a file whose data.pkl is this.
fn refusal(pickle: &[u8]) -> String {
    let error = import(zip(&[("archive/data.pkl", pickle), ("archive/data/0", &[0; 16])])).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error}");
    let message = error.to_string();
    assert!(!message.contains('\n') && message.len() < 500, "{message}");
    message
}

/// A pickle of protocol 2 up to its end.
fn pickle(body: &[u8]) -> Vec<u8> {
    [b"\x80\x02", body, b"."].concat()
}

/// A numpy array of this shape and element type, of the bytes that `bytes` pushes.
fn array(shape: &[u8], dtype: &str, bytes: &[u8]) -> Vec<u8> {
    let empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85C\x01b\x87R(K\x01";
    let dtype = [b"cnumpy\ndtype\nU\x02", dtype.as_bytes(), b"\x85R\x89"].concat();
    [empty, shape, &dtype, bytes, b"tb"].concat()
}

/// A storage of 4 floats, and a tensor of it with this offset, shape and stride.
fn tensor(offset: &str, shape: &[u8], stride: &[u8]) -> Vec<u8> {
    let storage = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ";
    let offset: i64 = offset.parse().unwrap();
    let offset = [b"\x8a\x08", &offset.to_le_bytes()[..]].concat();
    [b"}X\x0c\0\0\0conv1.weight", &storage[..], &offset, shape, stride, b"\x89}tRs"].concat()
}

#[test]
fn malicious_pickles_are_refused_by_name_and_place() {
    // data.pkl begins 46 bytes into the file.
    for (body, expected) in [
        (
            &b"cos\nsystem\nX\x04\0\0\0true\x85R"[..],
            "x.pth, byte 48: the pickle names os.system, which no file of tensors needs; hint: nothing",
        ),
        (b"cposix\nsystem\nX\x04\0\0\0true\x85R", "names posix.system"),
        (b"c__builtin__\neval\nX\x03\0\0\x001+1\x85R", "names __builtin__.eval"),
        (b"cbuiltins\ngetattr\n", "names builtins.getattr"),
        (b"cbuiltins\nexec\n", "names builtins.exec"),
        (b"X\x02\0\0\0osX\x06\0\0\0system\x93", "names os.system"),
        (b"ctorch\nload\n", "names torch.load"),
        (b"ctorch.storage\n_load_from_bytes\n", "names torch.storage._load_from_bytes"),
        (b"ctorch.nn.modules.linear\nLinear\n", "names torch.nn.modules.linear.Linear"),
        (b"ctorch\n__import__Storage\n", "names torch.__import__Storage"),
        (b"cnumpy\nload\n", "names numpy.load"),
        (b"c\x1b[31m\n\x07\n", "names \\u{1b}[31m.\\u{7}"),
        (b"(cos\nsystem\no", "names os.system"),
        (b"(S'true'\nios\nsystem\n", "opcode 0x53 is none that torch.save writes"),
        (b"(ios\nsystem\n", "opcode 0x69 is none"),
        (b"(o", "opcode 0x6f is none"),
        (b"Vtrue\n", "opcode 0x56 is none"),
        (b"\x82\x01", "opcode 0x82 is none"),
        (b"P0\n", "opcode 0x50 is none"),
        (b"}(K\x01K\x02uR", "takes more values than there are"),
        (b"}}R", "the pickle calls a dict with a dict"),
        (b"ccollections\nOrderedDict\n]R", "the pickle calls a function or class with a list"),
        (b"ccollections\nOrderedDict\nK\x07\x85R", "OrderedDict of something else than pairs"),
        (b"cargparse\nNamespace\n)R", "the pickle calls Namespace with ()"),
        (b"K\x01}b", "sets the state of an int"),
        (b"ctorch._utils\n_rebuild_parameter\nK\x01\x85R", "calls RebuildParameter with (an int)"),
        (b"cnumpy\nndarray\n)R", "calls NumpyArray with ()"),
        (
            b"cnumpy._core.multiarray\n_reconstruct\ncbuiltins\nset\n\x85R",
            "calls NumpyReconstruct with (a function or class)",
        ),
        (b"cbuiltins\nbytes\nK\x07\x85R", "calls Bytes with (an int)"),
        (b"cnumpy\ndtype\nX\x03\0\0\0>f4\x85R", "a numpy type that is no little-endian number"),
        (b"K\x01Q", "a reference to a storage that is no tuple of five"),
        (b"h\x05", "recalls value 5, which it has not stored"),
        (b"K\x01K\x02a", "appends to an int"),
        (b"K\x01K\x02K\x03s", "sets an item of an int"),
        (b"}(K\x01u", "a dict's key without its value"),
        (b"u", "up to a mark, and there is none"),
        (b"X\xff\xff\xff\xffa", "4294967295 bytes expected, "),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffa", "18446744073709551615 bytes expected, "),
        (b"\x8b\xff\xff\xff\x7fa", "2147483647 bytes expected, "),
        (b"\x95\0\0\0\0\0\0\0\x7f", "a pickle frame of"),
        (b"X\x02\0\0\0\xff\xfe", "a string that is not UTF-8"),
        (b"\x80\x06", "pickle protocol 6"),
        (b"]q\0h\0a", "holds no state_dict: found a list"),
        (b"}q\0X\x05\0\0\0modelh\0s", "holds no state_dict: found a dict"),
        (b"N", "holds no state_dict: found None"),
    ] {
        let message = refusal(&pickle(body));
        assert!(message.contains(expected), "{:?}: {message}", body.escape_ascii().to_string());
    }
    // Cut before its end.
    assert!(refusal(b"\x80\x02}").contains("the pickle is cut: 1 bytes expected, 0 follow"));
    assert!(refusal(b"\x80\x02cos").contains("cut within a name"));
}

#[test]
fn tensors_stay_in_their_storages() {
    for (offset, shape, stride, expected) in [
        (
            "1",
            &b"K\x04\x85"[..],
            &b"K\x01\x85"[..],
            "tensor [4] with stride [1] from element 1 is not in its storage of 4",
        ),
        ("-1", b"K\x01\x85", b"K\x01\x85", "offset, shape or stride is no number"),
        ("0", b"K\x05\x85", b"K\x00\x85", "tensor [5] with stride [0] from element 0 is not in its storage of 4"),
        ("0", b"K\x02K\x02\x86", b"K\x01\x85", "2 dimensions and 1 strides"),
        ("9223372036854775807", b"K\x02\x85", b"K\x01\x85", "is not in its storage"),
        ("0", b"K\x02\x85", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85", "is not in its storage"),
        (
            "0",
            b"\x8a\x07\0\0\0\0\0\0\x40\x8a\x07\0\0\0\0\0\0\x40K\0\x87",
            b"K\x01K\x01K\x01\x87",
            "is not in its storage",
        ),
        ("0", b"(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t", b"K\x01\x85", "more than 8 dimensions"),
        ("0", b"X\x01\0\0\0x\x85", b"K\x01\x85", "is no number"),
        ("0", b"K\x01K\x03K\x01\x87", b"K\x03K\x01K\x01\x87", "do not make a ResNet"),
    ] {
        let message = refusal(&pickle(&tensor(offset, shape, stride)));
        assert!(message.contains(expected), "{offset} {shape:?} {stride:?}: {message}");
    }
    let longer = zip(&[("a/data.pkl", &pickle(&tensor("0", b"K\x04\x85", b"K\x01\x85"))), ("a/data/0", &[0; 12])]);
    let message = import(longer).unwrap_err().to_string();
    assert!(message.contains("storage 0: expected 4 elements of F32, got 12 bytes"), "{message}");
    let absent = zip(&[("a/data.pkl", &pickle(&tensor("0", b"K\x04\x85", b"K\x01\x85")))]);
    assert!(import(absent).unwrap_err().to_string().contains("got none"));
}

#[test]
fn arrays_are_as_long_as_they_say() {
    let many = b"(K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01K\x01t";
    for (shape, dtype, bytes, expected) in [
        (&b"K\x02K\x01\x86"[..], "f4", &b"C\x08\0\0\0\0\0\0\0\0"[..], "found a numpy array"),
        (b"K\x03K\x01\x86", "f4", b"C\x08\0\0\0\0\0\0\0\0", "a numpy array [3, 1] of F32 with 8 bytes"),
        (b"K\x01\x85", "f8", b"C\x08\0\0\0\0\0\0\0\0N", "state is no tuple of five"),
        (b"K\x01\x85", "u1", b"]", "a numpy array [1] of U8 with a list"),
        (b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7fK\x05\x86", "f4", b"C\0", "of F32 with 0 bytes"),
        (b"J\xff\xff\xff\xff\x85", "f4", b"C\0", "a numpy array without a type or a shape of up to 8 dimensions"),
        (many, "f4", b"C\x04\0\0\0\0", "a shape of up to 8 dimensions"),
        // Of objects nothing is kept.
        (b"K\x03\x85", "O8", b"]", "found a numpy array"),
    ] {
        let message = refusal(&pickle(&array(shape, dtype, bytes)));
        assert!(message.contains(expected), "{shape:?} {dtype}: {message}");
    }
    // The state of an array is set once.
    let twice = [array(b"K\0\x85", "f4", b"C\0"), b"}b".to_vec()].concat();
    assert!(refusal(&pickle(&twice)).contains("sets the state of a numpy array"));
}

#[test]
fn containers_that_are_none_are_named() {
    let tensor = pickle(&tensor("0", b"K\x04\x85", b"K\x01\x85"));
    for (file, expected) in [
        (zip(&[("a/model.json", b"{}")]), "without (or with several) data.pkl"),
        (zip(&[("a/data.pkl", &tensor), ("b/data.pkl", &tensor)]), "without (or with several) data.pkl"),
        (zip(&[("a/data.pkl", &tensor), ("a/constants.pkl", b"")]), "a TorchScript program"),
        (zip(&[("a/data.pkl", &tensor), ("a/byteorder", b"big")]), "big-endian"),
        (zip(&[("a/data.pkl", &tensor), ("a/data.pkl", &tensor)]), "is there twice"),
        (b"PK\x03\x04".to_vec(), "begins as a zip file and does not end as one"),
        (b"\x80\x02N.".to_vec(), "a pickle, but not written by torch.save"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02K\x07.".to_vec(), "expected version 1001"),
        (b"hello world, this is text".to_vec(), "neither a file of torch.save nor a safetensors file"),
        (Vec::new(), "neither a file of torch.save nor a safetensors file"),
        (b"\x89HDF\r\n\x1a\n\0\0".to_vec(), "neither a file of torch.save nor a safetensors file"),
    ] {
        let message = import(file).unwrap_err().to_string();
        assert!(message.contains(expected), "{expected}: {message}");
    }
    let mut compressed = zip(&[("a/data.pkl", &tensor)]);
    let at = compressed.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    compressed[at + 10] = 8;
    assert!(import(compressed).unwrap_err().to_string().contains("is compressed, which torch.save never does"));
}

#[test]
fn nesting_and_cycles_cost_neither_stack_nor_memory() {
    let deep = [&vec![b']'; 900_000][..], &vec![b'a'; 899_999]].concat();
    assert!(refusal(&pickle(&deep)).contains("found a list"));
    assert!(refusal(&pickle(&vec![b')'; 3_000_000])).contains("a pickle of more than 1048576 values"));
    // One long list, copied again and again.
    let pairs = [b"](".to_vec(), b"K\x01K\x02\x86".repeat(100_000), b"eq\0".to_vec()].concat();
    let copies = [pairs, b"ccollections\nOrderedDict\nq\x01".to_vec(), b"h\x01h\0\x85R".repeat(1000)].concat();
    assert!(refusal(&pickle(&copies)).contains("more than 1048576 values"));
}

#[test]
fn every_cut_is_an_error() {
    for name in ["reference.pth.tar", "classifier-legacy.pth", "moco.pth"] {
        let whole = fixture(name);
        assert!(import(whole.clone()).is_ok(), "{name}");
        for cut in (0..whole.len()).step_by(7).chain([whole.len() - 1]) {
            assert!(import(whole[..cut].to_vec()).is_err(), "{name} cut at {cut}");
        }
    }
}

/// In a zip file every byte of an entry is under a checksum: what is read in spite of a flipped bit is what was written.
#[test]
fn flipped_bits_of_a_zip_file_are_noticed() {
    let whole = fixture("reference.pth.tar");
    let tensors = |bytes: Vec<u8>| {
        let foreign = foreign::read(Path::new("x"), bytes)?;
        Ok::<_, Error>(import::fit(&foreign, None, false)?.tensors)
    };
    let expected = tensors(whole.clone()).unwrap();
    for at in (0..whole.len()).step_by(11) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        if let Ok(read) = tensors(bytes) {
            assert!(read == expected, "bit flip at byte {at}");
        }
    }
}

const OPCODES: &[u8] = b"().0NRQbqhjKMJeau}]tsc\x81\x85\x86\x93\x94\x8a\xff\0";

/// Changes, removes and doubles some bytes.
fn mutate(bytes: &mut Vec<u8>, stream: &mut Stream) {
    for _ in 0..=below(stream.word(), 3) {
        let at = below(stream.word(), bytes.len().max(1) as u32) as usize;
        match stream.word() % 10 {
            0 => bytes.truncate(at),
            1 => drop(bytes.splice(at..at, [0xff; 3])),
            2 => drop(bytes.splice(at..bytes.len().min(at + 5), [])),
            3 => {
                let piece = bytes[at..bytes.len().min(at + 40)].to_vec();
                drop(bytes.splice(at..at, piece));
            }
            4 if at < bytes.len() => bytes[at] ^= 1 << (stream.word() % 8),
            _ if at < bytes.len() => {
                let opcode = OPCODES[stream.word() as usize % OPCODES.len()];
                bytes[at] = [opcode, stream.word() as u8][stream.word() as usize % 2];
            }
            _ => {}
        }
    }
}

#[test]
fn no_mutation_panics_or_takes_memory() {
    let (reference, legacy, moco) =
        (fixture("reference.pth.tar"), fixture("classifier-legacy.pth"), fixture("moco.pth"));
    let pickles = [(&reference, "reference"), (&moco, "moco")].map(|(file, _)| entries(file));
    let mut read = [0; 3];
    for round in 0..ROUNDS {
        let mut stream = Stream::new(round, 11, 0);
        // A legacy file has no checksums; neither has one whose checksums were made to fit.
        let mut bytes = legacy.clone();
        let end = if round % 2 == 0 { bytes.len() } else { 4_000 };
        let mut head = bytes[..end].to_vec();
        mutate(&mut head, &mut stream);
        bytes.splice(..end, head);
        read[0] += usize::from(import(bytes).is_ok());

        let mut entries = pickles[round as usize % 2].clone();
        let at = entries.iter().position(|(name, _)| name.ends_with("data.pkl")).unwrap();
        mutate(&mut entries[at].1, &mut stream);
        let refs: Vec<(&str, &[u8])> = entries.iter().map(|(name, bytes)| (name.as_str(), &bytes[..])).collect();
        read[1] += usize::from(import(zip(&refs)).is_ok());

        let mut bytes = if round % 2 == 0 { reference.clone() } else { moco.clone() };
        mutate(&mut bytes, &mut stream);
        read[2] += usize::from(import(bytes).is_ok());
    }
    println!("read in spite of it: {read:?} of {ROUNDS} each; most memory {}", ALLOCATOR.max_allocated());
    assert!(read.iter().all(|count| *count < ROUNDS as usize) && read[0] > 100 && read[1] > 100, "{read:?}");
}

/// Names and bytes of the entries of a zip file of torch.save.
fn entries(file: &[u8]) -> Vec<(String, Vec<u8>)> {
    let entries = import::zip::entries(Path::new("x"), file).unwrap();
    let mut entries: Vec<_> = entries.into_iter().map(|(name, range)| (name, file[range].to_vec())).collect();
    entries.sort();
    entries
}
