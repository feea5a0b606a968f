//! Initial values from a counter-based generator: element i of a tensor depends on the seed, the tensor's name and
//! i only, so any part can be made anywhere, in any order, in any language.

use graph::{Graph, Init};

use crate::state::{RUNNING_MEAN, RUNNING_VAR, State, Tensor};

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014, figure 16).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// FNV-1a, 64 bits.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3)
    })
}

/// The generator of one tensor.
pub(crate) struct Stream(u64);

impl Stream {
    pub(crate) fn new(seed: u64, name: &str) -> Self {
        Self(mix(
            mix(seed.wrapping_add(0x9e37_79b9_7f4a_7c15)) ^ hash(name)
        ))
    }

    /// What tells it from others.
    pub(crate) fn key(&self) -> u64 {
        self.0
    }

    /// Number `counter` of the stream, uniform in the open interval (0, 1): a multiple of 2^-53 plus 2^-54, rounded to
    /// the nearest f64 below 1.
    pub(crate) fn uniform(&self, counter: u64) -> f64 {
        let bits = mix(self
            .0
            .wrapping_add(counter.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        (((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64).min(1.0 - f64::EPSILON / 2.0)
    }
}

/// Probability that a standard normal lies below -2.
const BELOW_TWO: f64 = 0.022_750_131_948_179_21;

/// The quantile function of the standard normal (Wichura 1988, algorithm AS 241, PPND16; relative error 1e-16).
fn quantile(p: f64) -> f64 {
    fn ratio(r: f64, num: [f64; 8], den: [f64; 8]) -> f64 {
        let horner = |c: [f64; 8]| c.iter().rev().fold(0.0, |sum, c| sum * r + c);
        horner(num) / horner(den)
    }
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        let num = [
            3.387_132_872_796_366_5,
            133.141_667_891_784_38,
            1_971.590_950_306_551_3,
            13_731.693_765_509_46,
            45_921.953_931_549_87,
            67_265.770_927_008_7,
            33_430.575_583_588_13,
            2_509.080_928_730_122_7,
        ];
        let den = [
            1.0,
            42.313_330_701_600_91,
            687.187_007_492_057_9,
            5_394.196_021_424_751,
            21_213.794_301_586_597,
            39_307.895_800_092_71,
            28_729.085_735_721_943,
            5_226.495_278_852_545,
        ];
        return q * ratio(0.180_625 - q * q, num, den);
    }
    let r = (-p.min(1.0 - p).ln()).sqrt();
    let value = if r <= 5.0 {
        let num = [
            1.423_437_110_749_683_5,
            4.630_337_846_156_546,
            5.769_497_221_460_691,
            3.647_848_324_763_204_5,
            1.270_458_252_452_368_4,
            0.241_780_725_177_450_6,
            0.022_723_844_989_269_184,
            7.745_450_142_783_414e-4,
        ];
        let den = [
            1.0,
            2.053_191_626_637_759,
            1.676_384_830_183_803_8,
            0.689_767_334_985_1,
            0.148_103_976_427_480_08,
            0.015_198_666_563_616_457,
            5.475_938_084_995_345e-4,
            1.050_750_071_644_416_9e-9,
        ];
        ratio(r - 1.6, num, den)
    } else {
        let num = [
            6.657_904_643_501_103,
            5.463_784_911_164_114,
            1.784_826_539_917_291_3,
            0.296_560_571_828_504_87,
            0.026_532_189_526_576_124,
            0.001_242_660_947_388_078_4,
            2.711_555_568_743_487_6e-5,
            2.010_334_399_292_288_1e-7,
        ];
        let den = [
            1.0,
            0.599_832_206_555_888,
            0.136_929_880_922_735_8,
            0.014_875_361_290_850_615,
            7.868_691_311_456_133e-4,
            1.846_318_317_510_054_7e-5,
            1.421_511_758_316_446e-7,
            2.044_263_103_389_939_8e-15,
        ];
        ratio(r - 5.0, num, den)
    };
    if q < 0.0 { -value } else { value }
}

fn value(init: Init, stream: &Stream, counter: u64) -> f32 {
    let u = || stream.uniform(counter);
    match init {
        Init::Constant(c) => c,
        Init::Normal { std } => (std * quantile(u())) as f32,
        Init::TruncatedNormal { std } => {
            (std * quantile(BELOW_TWO + u() * (1.0 - 2.0 * BELOW_TWO))) as f32
        }
        Init::Uniform { bound } => (bound * (2.0 * u() - 1.0)) as f32,
    }
}

/// The state of a network before its first step: initial parameters, running mean 0 and variance 1, no momentum.
pub fn initial_state(graph: &Graph, seed: u64) -> State {
    let mut state = State::new();
    for p in graph.params() {
        let stream = Stream::new(seed, &p.name);
        let values = (0..p.elements() as u64)
            .map(|i| value(p.init, &stream, i))
            .collect();
        state.insert(
            p.name.clone(),
            Tensor {
                shape: p.shape.clone(),
                values,
            },
        );
    }
    for n in graph.norms() {
        for (suffix, start) in [(RUNNING_MEAN, 0.0), (RUNNING_VAR, 1.0)] {
            let tensor = Tensor {
                shape: vec![n.channels],
                values: vec![start; n.channels],
            };
            state.insert(format!("{}{suffix}", n.name), tensor);
        }
    }
    state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_the_tables() {
        for (p, z) in [
            (0.5, 0.0),
            (0.975, 1.959963984540054),
            (0.99, 2.3263478740408408),
            (1e-9, -5.997807015007687),
        ] {
            assert!(
                (quantile(p) - z).abs() < 1e-12,
                "{p}: {} is not {z}",
                quantile(p)
            );
        }
        assert!((quantile(BELOW_TWO) + 2.0).abs() < 1e-12);
    }

    fn check_deviation(init: Init, expected: f64) {
        let stream = Stream::new(7, "w");
        let n = 200_000;
        let values: Vec<f64> = (0..n).map(|i| f64::from(value(init, &stream, i))).collect();
        let mean = values.iter().sum::<f64>() / n as f64;
        let std = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
        assert!(
            mean.abs() < 4.0 * expected / (n as f64).sqrt(),
            "{init:?}: mean {mean}"
        );
        assert!(
            (std / expected - 1.0).abs() < 0.01,
            "{init:?}: deviation {std}, not {expected}"
        );
    }

    #[test]
    fn deviations_are_as_asked() {
        check_deviation(Init::Normal { std: 0.01 }, 0.01);
        // docs/reference/spec.md §4.1: cutting at two deviations leaves 0.8796 of one.
        check_deviation(Init::TruncatedNormal { std: 0.5 }, 0.5 * 0.87962566);
        check_deviation(Init::Uniform { bound: 3.0 }, 3.0 / 3f64.sqrt());
    }

    #[test]
    fn tensors_differ_by_name_and_seed() {
        let first = |seed, name| Stream::new(seed, name).uniform(0);
        assert_ne!(first(0, "a"), first(0, "b"));
        assert_ne!(first(0, "a"), first(1, "a"));
    }
}
