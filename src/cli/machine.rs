//! What the system tells about the machine and this process. Where it does not tell, a figure is left out.

use std::fs::read_to_string;
use std::thread::available_parallelism;

/// Cores that this process may use.
pub fn cores() -> usize {
    available_parallelism().map_or(1, |n| n.get())
}

/// The processor's name.
pub fn cpu_name() -> Option<String> {
    field("/proc/cpuinfo", "model name").map(|name| name.trim_start_matches(':').trim().to_string())
}

/// Bytes of memory that belong to this process alone: mapped files do not count, the system may drop those any time.
pub fn anonymous_memory() -> Option<u64> {
    kilobytes("RssAnon:")
}

/// The most bytes that were in memory for this process at a time, mapped files included.
pub fn peak_memory() -> Option<u64> {
    kilobytes("VmHWM:")
}

/// Bytes that were fetched from storage for this process: what lay in the system's file cache does not count.
pub fn read_from_storage() -> Option<u64> {
    field("/proc/self/io", "read_bytes:")?.trim().parse().ok()
}

fn kilobytes(name: &str) -> Option<u64> {
    let value: u64 = field("/proc/self/status", name)?.trim().strip_suffix("kB")?.trim().parse().ok()?;
    value.checked_mul(1024)
}

/// What follows `name` in its line of the file at `path`.
fn field(path: &str, name: &str) -> Option<String> {
    let text = read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)).map(|rest| rest.trim().to_string())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn memory_counts_what_is_taken() {
        let before = anonymous_memory().unwrap();
        let taken = vec![1u8; 256 << 20];
        let after = anonymous_memory().unwrap();
        assert!(after > before + (128 << 20), "{before} {after}");
        assert!(peak_memory().unwrap() >= after);
        assert_eq!(taken[12_345], 1);
        assert!(cores() >= 1);
    }
}
