//! The ceiling that kernels are measured against: multiply-adds in registers, nothing else.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::Options;
use super::choose::CpuCaps;
use super::direct::Arithmetic;
use super::pool::Pool;
use super::simd::{Isa, Job, Level};
use super::tiles::{self, Configured};

/// How long the loop runs; the best part of it counts.
const DURATION: Duration = Duration::from_millis(300);
/// Instructions of each chain in a task: some 50 us, so that a worker that starts late costs little.
const LENGTH: usize = 1 << 14;
/// Tasks of each thread in one measured region: some 5 ms.
const TASKS: usize = 100;

/// FLOP/s that a loop of multiply-adds in registers reaches with the level, precision and threads of `options`: what
/// no kernel that does every multiply-add can exceed. Takes 0.3 s.
///
/// It counts f32 fused multiply-adds, or dot products or tiles of bf16 where kernels use them: for f32 by tiles a sixth of
/// theirs. Clocks move with load and heat,
/// so a rate belongs between two measurements of its peak.
///
/// # Panics
/// If the CPU lacks the instructions of the options' level.
pub fn peak(options: &Options) -> f64 {
    measure(options, DURATION)
}

fn measure(options: &Options, duration: Duration) -> f64 {
    let level = options.level;
    assert!(level.is_available(), "this CPU has no {level} instructions");
    let arithmetic = CpuCaps::new(options).arithmetic();
    if level == Level::Amx {
        let products = arithmetic.products() as f64;
        return measure_tiles(options.threads, duration) / products;
    }
    let dots = arithmetic == Arithmetic::Bf16;
    let mut pool = Pool::new(options.threads);
    let tasks = TASKS * pool.threads();
    // A vector of the portable level is two registers of 128 bits, of which x86-64 has 16.
    let chains = if level == Level::Portable { 6 } else { 12 };
    let macs_per_lane = if dots { 2 } else { 1 };
    let flops = (2 * macs_per_lane * level.lanes() * chains * LENGTH * tasks) as f64;
    let mut best = 0.0f64;
    let since = Instant::now();
    while best == 0.0 || since.elapsed() < duration {
        let start = Instant::now();
        pool.run(tasks, |_, _| {
            // SAFETY: the level is available, as checked above; the jobs ask for nothing else.
            unsafe {
                match (chains, dots) {
                    (6, _) => level.call(Fma::<6>),
                    (_, false) => level.call(Fma::<12>),
                    (_, true) => level.call(Dot),
                }
            }
        });
        best = best.max(flops / start.elapsed().as_secs_f64());
    }
    best
}

/// As [`measure`], by matrix tiles.
fn measure_tiles(threads: usize, duration: Duration) -> f64 {
    const TIMES: usize = 1 << 14;
    let mut pool = Pool::new(threads);
    let tasks = 10 * pool.threads();
    let flops = (2 * tiles::SIDE * tiles::SIDE * tiles::DEPTH * TIMES * tasks) as f64;
    let mut best = 0.0f64;
    let since = Instant::now();
    while best == 0.0 || since.elapsed() < duration {
        let start = Instant::now();
        pool.run(tasks, |_, _| {
            // SAFETY: the level is available, and a thread runs one task at a time.
            tiles::spin(&unsafe { Configured::new() }, TIMES);
        });
        best = best.max(flops / start.elapsed().as_secs_f64());
    }
    best
}

/// `CHAINS` independent chains of multiply-adds: enough to hide their latency (4 or 5 cycles, two a cycle).
struct Fma<const CHAINS: usize>;

impl<const CHAINS: usize> Job for Fma<CHAINS> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: the caller has the instructions, and no memory is touched but a local array.
        unsafe {
            // x = x / 2 + 1 / 2: every product depends on the last sum, so no compiler can move it out of the loop,
            // and x stays an ordinary number.
            let half = I::splat(black_box(0.5));
            let mut x = [I::splat(black_box(0.75)); CHAINS];
            for _ in 0..LENGTH {
                for x in &mut x {
                    *x = I::fma(*x, half, half);
                }
            }
            sink::<I, CHAINS>(x);
        }
    }
}

/// As [`Fma`], with dot products of pairs of bf16 (up to 6 cycles, one or two a cycle).
struct Dot;

impl Job for Dot {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: as in `Fma`.
        unsafe {
            let pair = I::splat_pair(black_box([half::bf16::ONE; 2]).as_ptr());
            let mut x = [I::zero(); 12];
            for _ in 0..LENGTH {
                for x in &mut x {
                    *x = I::dot2(*x, pair, pair);
                }
            }
            sink::<I, 12>(x);
        }
    }
}

/// Makes the compiler believe that the sums are needed.
///
/// # Safety
/// The CPU has `I`'s instructions.
#[inline(always)]
unsafe fn sink<I: Isa, const N: usize>(x: [I::V; N]) {
    for x in x {
        // SAFETY: the caller's word.
        black_box(unsafe { I::to_array(x) });
    }
}

#[cfg(test)]
mod tests {
    use super::super::Precision;
    use super::*;

    #[test]
    fn every_level_and_precision_has_a_peak() {
        for level in Level::ALL.into_iter().filter(|l| l.is_available()) {
            for precision in Precision::ALL {
                let options = Options {
                    level,
                    precision,
                    ..Options::new(1, 2)
                };
                let peak = measure(&options, Duration::ZERO);
                assert!(
                    peak.is_finite() && peak > 0.0,
                    "{level}, {precision}: {peak}"
                );
            }
        }
    }
}
