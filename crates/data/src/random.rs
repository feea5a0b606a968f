//! Random numbers that are a function of what they are for, so that no order of work can change them.

/// Odd, and near 2^64 divided by the golden ratio (Steele, Lea and Flood, "Fast splittable pseudorandom number
/// generators", 2014).
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64 ("variant 13" of Stafford's).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What a stream of numbers is for; streams with different answers are independent.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    /// The order of an epoch's shards.
    Shards,
    /// The order inside the window that starts with this record.
    Window { shard: usize, record: u64 },
    /// Crop and flip of this record.
    Augment { shard: usize, record: u64 },
    /// What is done to this record after crop and flip.
    Change { shard: usize, record: u64 },
    /// Label and pixels of this made-up example, for training or for evaluation.
    Fake { index: u64, is_eval: bool },
    /// How the batch of an update is mixed; in place of the epoch, the number of that update.
    Mix,
}

/// SplitMix64 from a start that is a hash of seed, epoch and purpose: draw number n mixes start + n * [`STEP`].
#[derive(Clone)]
pub(crate) struct Random {
    state: u64,
}

impl Random {
    pub(crate) fn new(seed: u64, epoch: u64, purpose: Purpose) -> Self {
        let (kind, a, b) = match purpose {
            Purpose::Shards => (0, 0, 0),
            Purpose::Window { shard, record } => (1, shard as u64, record),
            Purpose::Augment { shard, record } => (2, shard as u64, record),
            Purpose::Fake { index, is_eval } => (3, index, u64::from(is_eval)),
            Purpose::Mix => (5, 0, 0),
            Purpose::Change { shard, record } => (4, shard as u64, record),
        };
        let state = [seed, epoch, kind, a, b]
            .iter()
            .fold(0, |state, word| mix(state ^ word).wrapping_add(STEP));
        Self { state }
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(STEP);
        mix(self.state)
    }

    /// Uniform in 0..n, and 0 for n = 0. The bias is n / 2^64.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.bits()) * u128::from(n)) >> 64) as u64
    }

    /// Uniform in [0, 1), a multiple of 2^-24.
    pub(crate) fn unit_f32(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// Uniform in [low, high).
    pub(crate) fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * ((self.bits() >> 11) as f64 / (1u64 << 53) as f64)
    }

    /// Fisher-Yates.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.bits().to_le_bytes()[..chunk.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// The first outputs of the published SplitMix64 from state 1234567.
    #[test]
    fn draws_are_splitmix64() {
        let mut random = Random { state: 1_234_567 };
        for expected in [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
        ] {
            assert_eq!(random.bits(), expected);
        }
    }

    #[test]
    fn every_part_of_the_purpose_matters() {
        let (shard, record) = (1, 2);
        let firsts: HashSet<u64> = [
            (0, 0, Purpose::Shards),
            (1, 0, Purpose::Shards),
            (0, 1, Purpose::Shards),
            (0, 0, Purpose::Mix),
            (0, 0, Purpose::Window { shard, record }),
            (0, 0, Purpose::Augment { shard, record }),
            (0, 0, Purpose::Augment { shard: 2, record }),
            (0, 0, Purpose::Augment { shard, record: 1 }),
            (0, 0, Purpose::Change { shard, record }),
            (
                0,
                0,
                Purpose::Fake {
                    index: 1,
                    is_eval: false,
                },
            ),
            (
                0,
                0,
                Purpose::Fake {
                    index: 1,
                    is_eval: true,
                },
            ),
        ]
        .into_iter()
        .map(|(seed, epoch, purpose)| Random::new(seed, epoch, purpose).bits())
        .collect();
        assert_eq!(firsts.len(), 11);
    }

    #[test]
    fn below_is_uniform_and_shuffle_reaches_every_order() {
        let mut random = Random::new(7, 0, Purpose::Shards);
        let mut seen = [0; 6];
        for _ in 0..60_000 {
            seen[random.below(6) as usize] += 1;
        }
        // Five standard deviations of a binomial with n = 60,000 and p = 1/6.
        assert!(
            seen.iter().all(|n: &i32| (n - 10_000).abs() < 460),
            "{seen:?}"
        );
        assert_eq!(random.below(0), 0);
        let orders: HashSet<[u8; 3]> = (0..1000)
            .map(|_| {
                let mut items = [0, 1, 2];
                random.shuffle(&mut items);
                items
            })
            .collect();
        assert_eq!(orders.len(), 6);
    }
}
