//! What can be known of the CUDA kernels without a GPU: that they are in the binary, and that their random numbers are
//! those of the host.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use simsiam_engine::backend::cuda::{Module, NVCC_RELEASE, compiled_modules};
use simsiam_engine::rng::{Stream, below, philox, unit};

/// Whether this run may not pass by skipping.
fn required() -> bool {
    std::env::var("SIMSIAM_REQUIRE_NVCC").is_ok_and(|value| value == "1")
}

#[test]
fn every_kernel_file_is_embedded_for_every_device() {
    if NVCC_RELEASE == "none" {
        assert!(!required(), "SIMSIAM_REQUIRE_NVCC=1, but built without nvcc");
        assert!(compiled_modules().is_empty());
        println!("skipped: built without nvcc");
        return;
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut sources: Vec<PathBuf> = names.filter(|path| path.extension().is_some_and(|x| x == "cu")).collect();
    sources.sort();
    let stems: Vec<&str> = sources.iter().map(|path| path.file_stem().unwrap().to_str().unwrap()).collect();
    assert_eq!(compiled_modules().iter().map(|kernel| kernel.name).collect::<Vec<_>>(), stems);
    for kernel in compiled_modules() {
        assert!(!kernel.archs.is_empty());
        let mut promised: Vec<&str> = kernel.archs.iter().map(|arch| arch.trim_end_matches(['a', 'f'])).collect();
        promised.sort_unstable();
        assert_eq!(contained_code(kernel), promised, "{}", kernel.name);
        assert_eq!(kernel.fatbin.as_ptr() as usize % 16, 0, "{}", kernel.name);
    }
}

/// The entries of a fatbin (`sm_90` for 90a), sorted; read from the container itself: a header of 16 bytes, then entries of header and payload.
fn contained_code(kernel: &Module) -> Vec<String> {
    const MAGIC: u32 = 0xBA55_ED50;
    let bytes = kernel.fatbin;
    let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!(u32_at(0), MAGIC, "{} is no fatbin", kernel.name);
    let (mut at, end) = (usize::from(u16_at(6)), usize::from(u16_at(6)) + u32_at(8) as usize);
    assert_eq!(end, bytes.len(), "{} is cut short", kernel.name);
    let mut code = vec![];
    while at < end {
        let (kind, header, payload, generation) = (u16_at(at), u32_at(at + 4), u32_at(at + 8), u32_at(at + 28));
        code.push(format!("{}_{generation}", ["", "compute", "sm"][usize::from(kind)]));
        at += (header + payload) as usize;
    }
    code.sort_unstable();
    code
}

/// Answers the questions on its input with the functions of kernels/philox.cuh, and runs the kernel of kernels/philox.cu
/// thread after thread (its threads never wait for each other).
const PROGRAM: &str = r#"
#include <cstdio>
#include <cstring>
struct Dimension { unsigned x; };
static Dimension gridDim, blockDim, blockIdx, threadIdx;
#define __global__
#include "philox.cu"

struct Question { PhiloxBlock counter; PhiloxKey key; uint32_t n; };
struct Answer { PhiloxBlock block; uint32_t unit_bits, below; };
struct Run { uint32_t n, grid, block, domain; uint64_t seed, index; };

int main() {
    uint32_t questions, runs;
    if (std::fread(&questions, 4, 1, stdin) != 1 || std::fread(&runs, 4, 1, stdin) != 1) return 1;
    for (uint32_t i = 0; i < questions; ++i) {
        Question q;
        if (std::fread(&q, sizeof q, 1, stdin) != 1) return 2;
        Answer a = {philox(q.counter, q.key), 0, 0};
        const float unit = philox_unit(a.block.word[0]);
        std::memcpy(&a.unit_bits, &unit, 4);
        a.below = philox_below(a.block.word[1], q.n);
        std::fwrite(&a, sizeof a, 1, stdout);
    }
    for (uint32_t i = 0; i < runs; ++i) {
        Run r;
        if (std::fread(&r, sizeof r, 1, stdin) != 1) return 3;
        const uint32_t canary = 0xC0FFEE00u + i;
        uint32_t* words = new uint32_t[r.n + 1];
        words[r.n] = canary;
        gridDim.x = r.grid;
        blockDim.x = r.block;
        for (blockIdx.x = 0; blockIdx.x < r.grid; ++blockIdx.x)
            for (threadIdx.x = 0; threadIdx.x < r.block; ++threadIdx.x)
                philox_stream(words, r.n, r.seed, r.domain, r.index);
        if (words[r.n] != canary) return 4;
        std::fwrite(words, 4, r.n, stdout);
        delete[] words;
    }
}
"#;

struct Question {
    counter: [u32; 4],
    key: [u32; 2],
    n: u32,
}

/// Corners of every word, then counters from everywhere.
fn questions() -> Vec<Question> {
    let corners = [0, 1, 2, 0x7FFF_FFFF, 0x8000_0000, u32::MAX];
    let mut words = Stream::new(20, 11, 10566);
    let mut all: Vec<Question> = (0..20_000)
        .map(|_| Question {
            counter: [words.word(), words.word(), words.word(), words.word()],
            key: [words.word(), words.word()],
            n: words.word(),
        })
        .collect();
    for place in 0..7 {
        for corner in corners {
            let mut q = [3, 5, 7, 11, 13, 17, 19];
            q[place] = corner;
            all.push(Question { counter: [q[0], q[1], q[2], q[3]], key: [q[4], q[5]], n: q[6] });
        }
    }
    all
}

struct Run {
    n: u32,
    grid: u32,
    block: u32,
    domain: u32,
    seed: u64,
    index: u64,
}

#[test]
fn device_random_numbers_are_the_hosts() {
    let Some(compiler) = host_compiler() else {
        assert!(!required(), "SIMSIAM_REQUIRE_NVCC=1, but there is no C++ compiler (tried CXX, c++, g++, clang++)");
        println!("skipped: no C++ compiler");
        return;
    };
    let questions = questions();
    let (seed, index) = (0x0123_4567_89AB_CDEF, 0xFEDC_BA98_7654_3210);
    let runs: Vec<Run> = [(1, 1, 1), (3, 2, 32), (4, 1, 32), (5, 3, 1), (1023, 3, 32), (4096, 2, 64)]
        .map(|(n, grid, block)| Run { n, grid, block, domain: n ^ 0x8000_0001, seed, index: index ^ u64::from(n) })
        .into();
    let output = run_on_host(&compiler, &encode(&questions, &runs));
    let mut answered = output.chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap()));
    let mut next = || answered.next().expect("an answer to every question");

    for q in &questions {
        let block = [next(), next(), next(), next()];
        let (unit_bits, chosen) = (next(), next());
        assert_eq!(block, philox(q.counter, q.key), "counter {:x?}, key {:x?}", q.counter, q.key);
        assert_eq!(f64::from(f32::from_bits(unit_bits)), unit(block[0]), "unit of {:#x}", block[0]);
        assert_eq!(chosen, below(block[1], q.n), "{:#x} below {}", block[1], q.n);
    }
    for run in &runs {
        let mut stream = Stream::new(run.seed, run.domain, run.index);
        for i in 0..run.n {
            assert_eq!(next(), stream.word(), "word {i} of {} by {} blocks of {}", run.n, run.grid, run.block);
        }
    }
    assert!(answered.next().is_none());
}

fn host_compiler() -> Option<String> {
    let named = std::env::var("CXX").ok().filter(|name| !name.is_empty());
    let answers = |name: &String| Command::new(name).arg("--version").output().is_ok_and(|o| o.status.success());
    named.into_iter().chain(["c++", "g++", "clang++"].map(String::from)).find(answers)
}

fn encode(questions: &[Question], runs: &[Run]) -> Vec<u8> {
    let mut words = vec![questions.len() as u32, runs.len() as u32];
    for q in questions {
        words.extend(q.counter.into_iter().chain(q.key).chain([q.n]));
    }
    for run in runs {
        words.extend([run.n, run.grid, run.block, run.domain]);
        words.extend([run.seed, run.index].into_iter().flat_map(|long| [long as u32, (long >> 32) as u32]));
    }
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Compiles the program, feeds it `input` and returns what it prints.
fn run_on_host(compiler: &str, input: &[u8]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let (source, binary) = (folder.path().join("philox.cpp"), folder.path().join("philox"));
    std::fs::write(&source, PROGRAM).unwrap();
    let compiled = Command::new(compiler)
        .args(["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels"))
        .arg(&source)
        .arg("-o")
        .arg(&binary)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{compiler}: {}", String::from_utf8_lossy(&compiled.stderr));

    let mut child = Command::new(&binary).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{}", output.status);
    output.stdout
}
