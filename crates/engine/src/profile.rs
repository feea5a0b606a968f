//! Where the time of steps goes.

use std::collections::BTreeMap;
use std::time::Duration;

/// Time that calls of one kernel took together.
#[derive(Clone, Debug)]
pub struct KernelTime {
    /// What it computes, on which shapes.
    pub name: String,
    /// How often it ran.
    pub calls: usize,
    /// Time on the clock, all threads taking part, or on the card.
    pub time: Duration,
    /// Of the fastest call: what a machine that others use too can do.
    pub fastest: Duration,
    /// Multiply-adds, as if each were done (Winograd does fewer); on a card those of convolutions.
    pub macs: usize,
    /// Bytes of the tensors that it reads and writes, each counted once.
    pub bytes: usize,
}

/// Kernels by name while they are measured; none while they are not.
pub(crate) type Profile = Option<BTreeMap<String, KernelTime>>;

/// What was measured, slowest first; measuring ends.
pub(crate) fn take(profile: &mut Profile) -> Vec<KernelTime> {
    let mut all: Vec<_> = profile.take().unwrap_or_default().into_values().collect();
    all.sort_by_key(|k| std::cmp::Reverse(k.time));
    all
}
