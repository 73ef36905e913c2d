//! What nodes cost, in bytes, operations and seconds: what `profile` and `plan --ledger` share.

use crate::graph::Phase;

/// What a device can do at best, which bounds the time of whatever runs on it.
#[derive(Debug, Clone, Copy)]
pub struct Roofline {
    /// GB/s through memory, read and written together, as a copy reaches it.
    pub copy: f64,
    /// TFLOP/s.
    pub product: f64,
}

impl Roofline {
    /// The least time, in seconds, for so many bytes and floating-point operations.
    pub fn seconds(&self, bytes: u64, flops: u64) -> f64 {
        self.of_bytes(bytes).max(self.of_flops(flops))
    }

    /// Whether that is the time of the bytes.
    pub fn bound_by_bytes(&self, bytes: u64, flops: u64) -> bool {
        self.of_bytes(bytes) >= self.of_flops(flops)
    }

    fn of_bytes(&self, bytes: u64) -> f64 {
        bytes as f64 / (self.copy * 1e9)
    }

    fn of_flops(&self, flops: u64) -> f64 {
        flops as f64 / (self.product * 1e12)
    }
}

/// Sums over the nodes of each kind of op and phase, in the order in which the first of each stands on the tape.
pub fn by_kind<C: Copy>(
    nodes: impl Iterator<Item = (&'static str, Phase, C)>,
    add: impl Fn(C, C) -> C,
) -> Vec<(&'static str, Phase, C)> {
    let mut kinds: Vec<(&'static str, Phase, C)> = vec![];
    for (op, phase, cost) in nodes {
        match kinds.iter_mut().find(|kind| (kind.0, kind.1) == (op, phase)) {
            Some((_, _, sum)) => *sum = add(*sum, cost),
            None => kinds.push((op, phase, cost)),
        }
    }
    kinds
}

/// Seconds as people read them.
pub fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} us", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}

/// A share of 1 as people read it.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roof_is_where_bytes_and_operations_take_as_long() {
        let roofline = Roofline { copy: 2000.0, product: 500.0 }; // 250 operations a byte
        assert_eq!(roofline.seconds(2_000_000_000, 1), 1e-3);
        assert_eq!(roofline.seconds(1, 1_000_000_000_000), 2e-3);
        assert!(roofline.bound_by_bytes(4, 1000) && !roofline.bound_by_bytes(4, 1001) && roofline.bound_by_bytes(0, 0));
    }

    #[test]
    fn kinds_are_sums_in_order_of_appearance() {
        let (forward, backward) = (Phase::Forward, Phase::Backward);
        let nodes = [("b", forward, 1), ("a", forward, 2), ("b", backward, 4), ("b", forward, 8)];
        let kinds = by_kind(nodes.into_iter(), |a, b| a + b);
        assert_eq!(kinds, [("b", forward, 9), ("a", forward, 2), ("b", backward, 4)]);
    }
}
