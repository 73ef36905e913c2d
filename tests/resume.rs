//! Unfinished datasets: killed at any point, on a full disk, with a source that vanishes. What was done is kept, and the
//! end is the same to the byte as without the interruption. Also what rests on the same journal: shards and appending.

mod common;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{engine, fail, scratch, succeed};
use flate2::read::GzDecoder;
use simsiam_engine::data::dataset::Dataset;
use simsiam_engine::data::mapped::Access;
use simsiam_engine::rng::{Stream, below};
use tempfile::TempDir;

/// Rounds of killing, per kind of job.
const KILLS: usize = 30;

fn fashion(split: &str) -> String {
    format!("{}/assets/fashion-mnist/{split}-images-idx3-ubyte.gz", env!("CARGO_MANIFEST_DIR"))
}

/// 800 images of 4 KiB, noted every eight.
const SMALL: [&str; 8] = ["--store", "raw:64", "--limit", "800", "--segment", "32KiB", "--seed", "5"];

struct Place(TempDir);

impl Place {
    fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.at(name).to_str().unwrap().to_owned()
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// All files, by name.
    fn files(&self) -> Vec<(String, Vec<u8>)> {
        self.names().into_iter().map(|name| (name.clone(), fs::read(self.at(&name)).unwrap())).collect()
    }

    fn prepare<'a>(&self, source: &'a str, out: &'a str, options: &[&'a str]) -> Vec<String> {
        let arguments = ["prepare", source].into_iter().map(str::to_owned).chain([self.text(out)]);
        arguments.chain(options.iter().map(|option| option.to_string())).collect()
    }

    fn succeed(&self, source: &str, out: &str, options: &[&str]) -> String {
        let arguments = self.prepare(source, out, options);
        succeed(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn fail(&self, source: &str, out: &str, options: &[&str]) -> String {
        let arguments = self.prepare(source, out, options);
        fail(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

/// The engine where no file may be longer than `blocks` KiB: writing fails then as on a full disk.
fn limited(blocks: u32) -> Command {
    let mut shell = Command::new("bash");
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    shell.args(["-c", &script, env!("CARGO_BIN_EXE_simsiam-engine")]);
    shell
}

/// Kills the job again and again, each time a random number of frames further on, until it gets through. `check` looks at
/// the place after every kill. Returns the number of kills.
fn kill_until_done(place: &Place, arguments: &[String], stream: &mut Stream, check: impl Fn()) -> usize {
    let journal = place.at("out.ssds.journal");
    let len = || fs::metadata(&journal).map_or(0, |status| status.len());
    let mut kills = 0;
    loop {
        let target = len() + u64::from(below(stream.word(), 4000));
        let jitter = Duration::from_micros(below(stream.word(), 3000).into());
        let mut child = engine().args(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let done = wait_for(&mut child, || len() >= target);
        if done {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            return kills;
        }
        std::thread::sleep(jitter);
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        check();
        if place.at("out.ssds").exists() && !journal.exists() {
            return kills; // It was through before the blow fell.
        }
    }
}

/// Waits until the process ends (true) or `ready` says so (false).
fn wait_for(child: &mut Child, ready: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        if ready() {
            return false;
        }
        assert!(Instant::now() < deadline, "it neither ends nor goes on");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn killed_anywhere_gives_the_same_bytes() {
    let whole = Place::new();
    let source = fashion("test");
    whole.succeed(&source, "out.ssds", &SMALL);
    let mut stream = Stream::new(11, 77, 0);
    let (mut kills, mut rounds) = (0, 0);
    while kills < KILLS {
        let place = Place::new();
        let threads = ["1", "3"][rounds % 2];
        let arguments = place.prepare(&source, "out.ssds", &[&SMALL[..], &["--threads", threads]].concat());
        kills += kill_until_done(&place, &arguments, &mut stream, || {});
        assert!(place.files() == whole.files(), "round {rounds}: {:?} against {:?}", place.names(), whole.names());
        rounds += 1;
    }
}

#[test]
fn killed_anywhere_gives_the_same_shards() {
    let whole = Place::new();
    let source = fashion("test");
    let options = [&SMALL[..], &["--shard-size", "700KiB"]].concat();
    whole.succeed(&source, "out.ssds", &options);
    assert_eq!(whole.names().len(), 6, "five shards and the manifest: {:?}", whole.names());
    let mut stream = Stream::new(12, 77, 0);
    let mut kills = 0;
    while kills < KILLS {
        let place = Place::new();
        let arguments = place.prepare(&source, "out.ssds", &options);
        kills += kill_until_done(&place, &arguments, &mut stream, || {});
        assert!(place.files() == whole.files(), "{:?} against {:?}", place.names(), whole.names());
    }
}

/// At no time is the dataset that is added to anything but what it was, or complete with the addition.
#[test]
fn killed_while_appending_leaves_what_was_there() {
    let source = fashion("test");
    let start = |place: &Place| {
        place.succeed(&fashion("train"), "out.ssds", &["--store", "raw:64", "--limit", "30"]);
    };
    let options = [&SMALL[..], &["--append"]].concat();
    let whole = Place::new();
    start(&whole);
    whole.succeed(&source, "out.ssds", &options);
    assert_eq!(whole.names(), ["out-00000.ssds", "out-00001.ssds", "out.ssds"]);
    let mut stream = Stream::new(13, 77, 0);
    for _ in 0..2 {
        let place = Place::new();
        start(&place);
        let arguments = place.prepare(&source, "out.ssds", &options);
        kill_until_done(&place, &arguments, &mut stream, || {
            let len = Dataset::open(&place.at("out.ssds")).unwrap().len();
            assert!(len == 30 || len == 830, "{len}");
        });
        assert!(place.files() == whole.files(), "{:?}", place.names());
    }
}

#[test]
fn shards_are_one_dataset() {
    let place = Place::new();
    let source = fashion("test");
    place.succeed(&source, "one.ssds", &SMALL);
    let said = place.succeed(&source, "many.ssds", &[&SMALL[..], &["--shard-size", "1MiB"]].concat());
    assert!(said.contains("800 images in 4 shards"), "{said}");
    let one = Dataset::open(&place.at("one.ssds")).unwrap();
    for access in [Access::Map, Access::Pread, Access::Memory] {
        let many = Dataset::open_with(&place.at("many.ssds"), access).unwrap();
        assert_eq!((many.len(), many.classes()), (800, one.classes()));
        assert_eq!(many.shards().iter().map(|shard| shard.header().first_id).collect::<Vec<_>>(), [0, 255, 510, 765]);
        for i in 0..800 {
            assert_eq!(many.record(i, scratch()).unwrap(), one.record(i, scratch()).unwrap(), "{i}");
        }
        assert!(many.record(800, scratch()).is_err());
    }
    let text = succeed(&["inspect", &place.text("many.ssds"), "--verify"]);
    assert!(text.contains("800 in 4 shards") && text.contains("many-00003.ssds: 35 records from number 765"), "{text}");
    // Every shard is a dataset file of its own.
    assert_eq!(Dataset::open(&place.at("many-00001.ssds")).unwrap().len(), 255);
    // And nothing is written over.
    let again = [&SMALL[..], &["--shard-size", "1MiB", "--force"]].concat();
    assert!(place.fail(&source, "many.ssds", &again).contains("is a dataset of 4 shards; hint: remove it"), "");
    fs::remove_file(place.at("many.ssds")).unwrap();
    let text = place.fail(&source, "many.ssds", &again);
    assert!(text.contains("many-00000.ssds: exists already"), "{text}");
}

#[test]
fn a_manifest_that_lies_is_refused() {
    let place = Place::new();
    place.succeed(&fashion("test"), "out.ssds", &[&SMALL[..], &["--shard-size", "1MiB"]].concat());
    let good = fs::read_to_string(place.at("out.ssds")).unwrap();
    let uuid = good.split("\"uuid\": \"").nth(2).unwrap()[..36].to_owned();
    let lies: [(&str, &str, &str); 9] = [
        ("\"records\": 800", "\"records\": 801", "its shards have another sum"),
        ("\"records\": 800", "\"records\": -1", "it is broken: invalid value"),
        ("out-00001.ssds", "out-00002.ssds", "but the manifest says"),
        ("out-00001.ssds", "../out-00001.ssds", "is not the name of a file beside the manifest"),
        ("out-00001.ssds", "gone.ssds", "gone.ssds: No such file"),
        (&uuid, "00000000-0000-8000-8000-000000000000", "but the manifest says"),
        ("\"version\": 1", "\"version\": 2", "manifest version 2, but this build reads 1"),
        ("simsiam-engine dataset manifest", "something", "its format is \"something\""),
        ("\"0\",", "\"zero\",", "class names are not those of the manifest"),
    ];
    for (from, to, expected) in lies {
        assert!(good.contains(from), "{from} in {good}");
        fs::write(place.at("out.ssds"), good.replacen(from, to, 1)).unwrap();
        let text = fail(&["inspect", &place.text("out.ssds")]);
        assert!(text.contains(expected), "{from} -> {to}: {text}");
    }
    fs::write(place.at("out.ssds"), &good[..good.len() / 2]).unwrap();
    assert!(fail(&["inspect", &place.text("out.ssds")]).contains("as a manifest of dataset files it is broken"));
    // Two shards that have changed places.
    fs::write(place.at("out.ssds"), &good).unwrap();
    let shard = |i: u32| place.at(&format!("out-0000{i}.ssds"));
    fs::rename(shard(0), place.at("x")).unwrap();
    fs::rename(shard(1), shard(0)).unwrap();
    fs::rename(place.at("x"), shard(1)).unwrap();
    assert!(fail(&["inspect", &place.text("out.ssds")]).contains("hint: this file is from another dataset"));
}

/// Classes are matched by name; new ones come behind.
#[test]
fn appending_matches_classes_by_name() {
    let place = Place::new();
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images");
    let put = |set: &str, class: &str, file: &str| {
        fs::create_dir_all(place.at(set).join(class)).unwrap();
        fs::copy(images.join(file), place.at(set).join(class).join(file)).unwrap();
    };
    put("a", "bee", "rgb.png");
    put("a", "wasp", "grey8.png");
    put("b", "ant", "444.jpg");
    put("b", "wasp", "palette.png");
    place.succeed(&place.text("a"), "out.ssds", &["--store", "raw:16"]);
    let text = place.fail(&place.text("b"), "out.ssds", &["--store", "raw:32", "--append"]);
    assert!(text.contains("is stored as raw:16, not as raw:32; hint: --store raw:16"), "{text}");
    place.fail(&place.text("b"), "none.ssds", &["--append"]);
    place.succeed(&place.text("b"), "out.ssds", &["--store", "raw:16", "--append", "--no-shuffle"]);
    let dataset = Dataset::open(&place.at("out.ssds")).unwrap();
    assert_eq!(dataset.classes(), ["bee", "wasp", "ant"]);
    assert_eq!((2..4).map(|i| dataset.label(i).unwrap()).collect::<Vec<_>>(), [Some(2), Some(1)]);
    // Once more, to a manifest.
    place.succeed(&place.text("a"), "out.ssds", &["--store", "raw:16", "--append", "--no-shuffle"]);
    let dataset = Dataset::open(&place.at("out.ssds")).unwrap();
    assert_eq!((dataset.len(), dataset.shards().len()), (6, 3));
    assert_eq!((4..6).map(|i| dataset.label(i).unwrap()).collect::<Vec<_>>(), [Some(0), Some(1)]);
}

/// A disk that takes no more, as a limit on the size of files: an error, nothing lost, and on with more room.
#[test]
fn a_full_disk_is_one_error_and_the_rest_is_kept() {
    let (whole, place) = (Place::new(), Place::new());
    let source = fashion("test");
    whole.succeed(&source, "out.ssds", &SMALL);
    let arguments = place.prepare(&source, "out.ssds", &SMALL);
    let output = limited(1000).args(&arguments).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: cannot write ") && stderr.contains("out.ssds.tmp: File too large"), "{stderr}");
    assert!(stderr.contains("note: what was done is kept"), "{stderr}");
    assert_eq!(place.names(), ["out.ssds.journal", "out.ssds.tmp"]);
    // Another job does not write over it unasked.
    let text = place.fail(&source, "out.ssds", &["--store", "raw:32"]);
    assert!(text.contains("an unfinished dataset from another source or with other options"), "{text}");
    let said = place.succeed(&source, "out.ssds", &SMALL);
    assert!(said.contains("were done by an earlier call"), "{said}");
    assert!(place.files() == whole.files());
}

#[test]
fn restart_throws_away_what_was_left() {
    let place = Place::new();
    let source = fashion("test");
    let options = [&SMALL[..], &["--shard-size", "700KiB"]].concat();
    let arguments = place.prepare(&source, "out.ssds", &options);
    let mut child = engine().args(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert!(!wait_for(&mut child, || place.at("out-00001.ssds").exists()));
    child.kill().unwrap();
    child.wait().unwrap();
    place.succeed(&source, "out.ssds", &["--store", "raw:20", "--limit", "10", "--restart"]);
    assert_eq!(place.names(), ["out.ssds"]);
    assert_eq!(Dataset::open(&place.at("out.ssds")).unwrap().len(), 10);
}

/// A file that vanishes after the listing stops the work; when it is back, the same call goes on.
#[test]
fn a_vanished_source_is_one_error_and_the_rest_is_kept() {
    let place = Place::new();
    let folder = place.at("pics");
    fs::create_dir(&folder).unwrap();
    let image = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/images/rgb.png");
    for i in 0..400 {
        fs::copy(&image, folder.join(format!("{i:03}.png"))).unwrap();
    }
    let options = ["--store", "raw:64", "--segment", "64KiB", "--no-shuffle", "--threads", "1"];
    let whole = Place::new();
    whole.succeed(&place.text("pics"), "out.ssds", &options);
    let arguments = place.prepare(folder.to_str().unwrap(), "out.ssds", &options);
    let mut child = engine().args(&arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let journal = place.at("out.ssds.journal");
    assert!(!wait_for(&mut child, || fs::metadata(&journal).is_ok_and(|status| status.len() > 500)));
    fs::rename(folder.join("399.png"), place.at("399.png")).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: cannot read ") && stderr.contains("399.png: No such file"), "{stderr}");
    fs::rename(place.at("399.png"), folder.join("399.png")).unwrap();
    let said = place.succeed(folder.to_str().unwrap(), "out.ssds", &options);
    assert!(said.contains("were done by an earlier call"), "{said}");
    assert!(fs::read(place.at("out.ssds")).unwrap() == fs::read(whole.at("out.ssds")).unwrap());
}

/// A power failure may leave journal and file in any state of half. Whatever is not as noted is written anew.
#[test]
fn a_damaged_journal_costs_work_but_never_a_byte() {
    let (whole, images) = (Place::new(), Place::new());
    // Not packed: to unpack it takes more room than the limit on files gives.
    let source = images.text("test-images-idx3-ubyte");
    let packed = fs::File::open(fashion("test")).unwrap();
    io::copy(&mut GzDecoder::new(packed), &mut fs::File::create(&source).unwrap()).unwrap();
    let options = ["--store", "raw:64", "--limit", "60", "--segment", "32KiB"];
    whole.succeed(&source, "out.ssds", &options);
    let (journal, tmp) = unfinished(&source, &options);
    for round in 0..40 {
        let mut stream = Stream::new(round, 78, 0);
        let (mut journal, mut tmp) = (journal.clone(), tmp.clone());
        let place = Place::new();
        match round % 4 {
            0 => journal.truncate(below(stream.word(), journal.len() as u32) as usize),
            1 => tmp.truncate(below(stream.word(), tmp.len() as u32) as usize),
            2 => tmp.truncate(0),
            _ => {
                let at = below(stream.word(), journal.len() as u32) as usize;
                journal[at] ^= 1 << (stream.word() % 8);
            }
        }
        fs::write(place.at("out.ssds.journal"), &journal).unwrap();
        fs::write(place.at("out.ssds.tmp"), &tmp).unwrap();
        // Damage to the job's name makes it another job's.
        place.succeed(&source, "out.ssds", &[&options[..], &["--restart"]].concat());
        assert!(place.files() == whole.files(), "round {round}");
    }
}

/// Journal and file of a job that was stopped by a limit on the size of files.
fn unfinished(source: &str, options: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let place = Place::new();
    let output = limited(180).args(place.prepare(source, "out.ssds", options)).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    (fs::read(place.at("out.ssds.journal")).unwrap(), fs::read(place.at("out.ssds.tmp")).unwrap())
}
