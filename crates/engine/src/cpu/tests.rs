//! The kernels against plain loops in f64, on random shapes, for every level that this CPU has.
//!
//! Values come in two kinds. *Whole* numbers are so small that every product and sum is exact in f32 and every operand
//! in bf16: whatever the order of the sums, results must be right to the last bit, which finds any value that is
//! missing, doubled or in the wrong place. *Real* numbers show that nothing is rounded more often than it has to be.
//!
//! Memory is [`Guarded`]: what a kernel reads without having been given it is NaN, what it writes beside its results
//! is noticed.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Mutex;

use graph::{Geometry, NORM_EPSILON, Plane, STATE_ROWS, Window};
use half::bf16;

use super::direct::{self, Arithmetic, Operand};
use super::fuse::{
    Affine, Centred, Epilogue, Grad, Join, Mask, Norm, Out, Partials, Raw, SUMS, Source, Stats,
    Store,
};
use super::memory::{Block, Plain, Scratch, Span};
use super::norm::{self, Row, State};
use super::pool::Pool;
use super::simd::{Element, Isa, Job, Level};
use super::weights::{CHUNK, Panels};
use super::{pixels, wgrad, wgrad_tiles};
use crate::{MEAN, Pixels, STD};

// ---------------------------------------------------------------- numbers

/// A small generator (xorshift).
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 16
    }

    fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 17) as usize % n
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// Whole, from -most to most.
    fn whole(&mut self, most: usize) -> f64 {
        self.below(2 * most + 1) as f64 - most as f64
    }

    /// From -1 to 1.
    fn real(&mut self) -> f64 {
        self.bits() as f64 / (1u64 << 47) as f64 - 1.0
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Values {
    Whole,
    Real,
}

impl Values {
    fn many(self, r: &mut Random, len: usize, most: usize) -> Vec<f64> {
        let one = |_| match self {
            Self::Whole => r.whole(most),
            Self::Real => r.real() * most as f64,
        };
        (0..len).map(one).collect()
    }

    fn tensor<T: Element>(self, r: &mut Random, len: usize) -> Guarded<T> {
        Guarded::of(&self.many(r, len, 4))
    }

    fn constants(self, r: &mut Random, len: usize) -> Guarded<f32> {
        Guarded::of(&self.many(r, len, 2))
    }

    /// Few bits, so that a product and a sum of them are exact: what depends on a sign depends on no rounding. Zero is
    /// among them.
    fn coarse<T: Element>(r: &mut Random, len: usize) -> Guarded<T> {
        let values: Vec<f64> = (0..len).map(|_| r.whole(15) / 8.0).collect();
        Guarded::of(&values)
    }
}

/// Distance of 1 and the next f32.
const EPS: f64 = f32::EPSILON as f64;

/// What one rounding to bf16 changes, relative to the value: half of the distance of neighbours with 8 bits.
const BF16: f64 = 1.0 / 256.0;

/// Rounding error of a sum of n products in f32, in units of [`EPS`] times sqrt(n) times the root of the sum of the
/// squared products. Partial sums are about as large as that root, and each of n additions errs by up to half an EPS of
/// one, at random. Worst of all tests: 1.
const F32_SUM: f64 = 2.0;

/// Products that are added one by one: longer sums are made of several, so that errors grow no more.
const CHAIN: usize = 512;

/// The same for operands that are rounded to bf16, in units of [`BF16`] and whatever n is: each product errs by two
/// roundings, at random and by less than half of their most on average. Worst of all tests: 2.4.
const BF16_SUM: f64 = 4.0;

/// Rounding error of a sum over the pixels of a channel, in units of [`EPS`] times the sum of magnitudes: n additions err
/// by up to half an EPS of a partial sum, at random, and partial sums are about one over sqrt(n) of that sum. Worst of
/// all tests: 1.8. A value that is missing shows as one over the number of pixels, 1e-4 or more.
const F32_PIXELS: f64 = 4.0;

fn is_bf16<T>() -> bool {
    size_of::<T>() == 2
}

/// Rounded as storage rounds.
fn rounded<T: Element>(v: f64) -> f64 {
    f64::from(T::from_f32(v as f32).to_f32())
}

// ---------------------------------------------------------------- memory

/// Values between guards. All bytes are 0xff at first, NaN in every type.
struct Guarded<T> {
    block: Block,
    len: usize,
    of: PhantomData<T>,
}

/// Bytes before and behind.
const GUARD: usize = 256;

impl<T: Plain> Guarded<T> {
    fn unset(len: usize) -> Self {
        let block = Block::new(2 * GUARD + len * size_of::<T>()).unwrap();
        // SAFETY: nobody else knows the block.
        unsafe { block.all::<u8>().get_mut() }.fill(0xff);
        Self {
            block,
            len,
            of: PhantomData,
        }
    }

    fn holding(values: &[T]) -> Self {
        let new = Self::unset(values.len());
        // SAFETY: as above.
        unsafe { new.span().get_mut() }.copy_from_slice(values);
        new
    }

    fn span(&self) -> Span<'_, T> {
        self.block.span(GUARD, self.len * size_of::<T>())
    }

    fn get(&self) -> &[T] {
        // SAFETY: tests look at values only when no kernel runs, or the kernel only reads them.
        unsafe { self.span().get() }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: as above.
        let all = unsafe { self.block.all::<u8>().get() };
        let (before, rest) = all.split_at(GUARD);
        let (values, behind) = rest.split_at(self.len * size_of::<T>());
        assert!(
            before.iter().chain(behind).all(|b| *b == 0xff),
            "something was written beside the values"
        );
        values
    }
}

impl<T: Element> Guarded<T> {
    /// Rounds to T.
    fn of(values: &[f64]) -> Self {
        let values: Vec<T> = values.iter().map(|v| T::from_f32(*v as f32)).collect();
        Self::holding(&values)
    }

    fn to_f64(&self) -> Vec<f64> {
        self.bytes();
        self.get().iter().map(|v| f64::from(v.to_f32())).collect()
    }
}

fn levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|l| l.is_available())
}

/// Scratch of a length for each of the pool's threads.
fn scratch(pool: &Pool, len: usize) -> (Guarded<f32>, usize) {
    let per_worker = len.next_multiple_of(16);
    (Guarded::unset(per_worker * pool.threads()), per_worker)
}

fn check_all(
    what: impl Fn() -> String,
    found: &[f64],
    expected: &[f64],
    tolerance: impl Fn(usize) -> f64,
) {
    assert_eq!(found.len(), expected.len(), "{}", what());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let allowed = tolerance(i);
        // NaN fails.
        assert!(
            (f - e).abs() <= allowed,
            "{}: value {i} of {} is {f}, not {e} (up to {allowed:e})",
            what(),
            found.len()
        );
    }
}

// ---------------------------------------------------------------- operands

#[derive(Clone, Copy, Debug, PartialEq)]
enum Reads {
    Raw,
    Norm { relu: bool },
    Grad,
}

const READS: [Reads; 4] = [
    Reads::Raw,
    Reads::Norm { relu: true },
    Reads::Norm { relu: false },
    Reads::Grad,
];

/// A source, what it means, and how large the terms are that it is computed from.
struct Input<T: Element> {
    reads: Reads,
    z: Guarded<T>,
    g: Guarded<T>,
    /// Scale, shift, mean, a, b, c.
    constants: [Guarded<f32>; 6],
    means: Vec<f64>,
    sizes: Vec<f64>,
}

impl<T: Element> Input<T> {
    fn new(r: &mut Random, values: Values, reads: Reads, pixels: usize, channels: usize) -> Self {
        let len = pixels * channels;
        let (z, g) = (values.tensor::<T>(r, len), values.tensor::<T>(r, len));
        let constants: [Guarded<f32>; 6] = std::array::from_fn(|_| values.constants(r, channels));
        let (zs, gs) = (z.to_f64(), g.to_f64());
        let [scale, shift, mean, a, b, c] = constants.each_ref().map(Guarded::to_f64);
        let (mut means, mut sizes) = (vec![], vec![]);
        for (i, (z, g)) in zs.into_iter().zip(gs).enumerate() {
            let k = i % channels;
            let (value, size) = match reads {
                Reads::Raw => (z, z.abs()),
                Reads::Norm { relu } => {
                    let v = z * scale[k] + shift[k];
                    let size = (z * scale[k]).abs() + shift[k].abs();
                    (if relu { v.max(0.0) } else { v }, size)
                }
                Reads::Grad => {
                    let v = a[k] * g + b[k] * (z - mean[k]) + c[k];
                    let centred = b[k].abs() * (z.abs() + mean[k].abs());
                    (v, (a[k] * g).abs() + centred + c[k].abs())
                }
            };
            means.push(value);
            sizes.push(size);
        }
        Self {
            reads,
            z,
            g,
            constants,
            means,
            sizes,
        }
    }

    fn source(&self) -> Source<'_, T> {
        let [scale, shift, mean, a, b, c] = self.constants.each_ref().map(Guarded::get);
        match self.reads {
            Reads::Raw => Source::Raw(Raw(self.z.span())),
            Reads::Norm { relu } => Source::Norm(Norm {
                z: self.z.span(),
                scale,
                shift,
                floor: floor(relu),
            }),
            Reads::Grad => Source::Grad(Grad {
                g: self.g.span(),
                z: self.z.span(),
                mean,
                a,
                b,
                c,
            }),
        }
    }
}

fn floor(relu: bool) -> f32 {
    if relu { 0.0 } else { f32::NEG_INFINITY }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ends {
    Store { add: bool },
    Stats,
    Affine { residual: bool, relu: bool },
    Mask { relu: bool },
    Join { add: bool, y: bool, norms: usize },
}

fn all_ends() -> Vec<Ends> {
    let mut all = vec![Ends::Stats];
    for one in [false, true] {
        all.extend([Ends::Store { add: one }, Ends::Mask { relu: one }]);
        for two in [false, true] {
            all.push(Ends::Affine {
                residual: one,
                relu: two,
            });
            all.extend((0..=2).map(|norms| Ends::Join {
                add: one,
                y: two,
                norms,
            }));
        }
    }
    all
}

/// An epilogue and what it reads.
struct Closing<T: Element> {
    ends: Ends,
    channels: usize,
    /// What is added: also the residual.
    add: Guarded<T>,
    y: Guarded<T>,
    z: [Guarded<T>; 2],
    mean: [Guarded<f32>; 2],
    scale: Guarded<f32>,
    shift: Guarded<f32>,
}

/// What an epilogue stores and sums up.
struct Closed {
    values: Vec<f64>,
    /// Before they are stored.
    tolerances: Vec<f64>,
    /// Of v, v (z - mean) for each normalisation; per channel.
    sums: [Vec<f64>; SUMS],
    sum_tolerances: [Vec<f64>; SUMS],
}

impl<T: Element> Closing<T> {
    fn new(r: &mut Random, values: Values, ends: Ends, pixels: usize, channels: usize) -> Self {
        let len = pixels * channels;
        let mask: Vec<f64> = (0..len)
            .map(|_| r.pick(&[-1.0, 0.0, 0.0, 1.0, 2.0, 0.5, f64::NAN]))
            .collect();
        Self {
            ends,
            channels,
            add: values.tensor(r, len),
            y: Guarded::of(&mask),
            z: std::array::from_fn(|_| Values::coarse(r, len)),
            mean: std::array::from_fn(|_| values.constants(r, channels)),
            scale: Values::coarse(r, channels),
            shift: Values::coarse(r, channels),
        }
    }

    /// Whether something is added to results that may lie where they go.
    fn adds(&self) -> bool {
        matches!(
            self.ends,
            Ends::Store { add: true } | Ends::Join { add: true, .. }
        )
    }

    /// Where results go: `in_place`, onto what is added.
    fn out(&self, in_place: bool) -> Guarded<T> {
        if in_place {
            Guarded::holding(self.add.get())
        } else {
            Guarded::unset(self.add.len)
        }
    }

    fn epilogue<'a>(&'a self, out: &'a Guarded<T>, in_place: bool) -> Epilogue<'a, T> {
        let added = if in_place {
            out.span()
        } else {
            self.add.span()
        };
        match self.ends {
            Ends::Store { add } => Epilogue::Store(Store {
                add: add.then_some(added),
            }),
            Ends::Stats => Epilogue::Stats(Stats),
            Ends::Affine { residual, relu } => Epilogue::Affine(Affine {
                shift: self.shift.get(),
                residual: residual.then_some(added),
                floor: floor(relu),
            }),
            Ends::Mask { relu } => Epilogue::Mask(Mask {
                z: self.z[0].span(),
                scale: self.scale.get(),
                shift: self.shift.get(),
                mean: self.mean[0].get(),
                relu,
            }),
            Ends::Join { add, y, norms } => {
                let norm = |i: usize| {
                    (i < norms).then(|| Centred {
                        z: self.z[i].span(),
                        mean: self.mean[i].get(),
                    })
                };
                Epilogue::Join(Join {
                    add: add.then_some(added),
                    y: y.then(|| self.y.span()),
                    norms: [norm(0), norm(1)],
                })
            }
        }
    }

    /// Normalisations whose gradients are summed up.
    fn norms(&self) -> usize {
        match self.ends {
            Ends::Mask { .. } => 1,
            Ends::Join { norms, .. } => norms,
            _ => 0,
        }
    }

    /// The ends of `v`, whose sums over pixels err by `drift` EPS of the sums of magnitudes.
    fn close(&self, values: Values, v: &[f64], tolerances: &[f64], drift: f64) -> Closed {
        let (add, y) = (self.add.to_f64(), self.y.to_f64());
        let z = self.z.each_ref().map(Guarded::to_f64);
        let mean = self.mean.each_ref().map(Guarded::to_f64);
        let (scale, shift) = (self.scale.to_f64(), self.shift.to_f64());
        let zeros = || std::array::from_fn(|_| vec![0.0; self.channels]);
        let mut closed = Closed {
            values: vec![],
            tolerances: vec![],
            sums: zeros(),
            sum_tolerances: zeros(),
        };
        for (i, (&v, &tolerance)) in v.iter().zip(tolerances).enumerate() {
            let c = i % self.channels;
            // The value, and the terms that are added up in f32.
            let (v, terms) = match self.ends {
                Ends::Store { add: true } => (v + add[i], v.abs() + add[i].abs()),
                Ends::Store { add: false } | Ends::Stats => (v, 0.0),
                Ends::Affine { residual, relu } => {
                    let more = if residual { add[i] } else { 0.0 };
                    let sum = v + shift[c] + more;
                    let terms = 2.0 * (v.abs() + shift[c].abs() + more.abs());
                    (if relu { sum.max(0.0) } else { sum }, terms)
                }
                Ends::Mask { relu } => {
                    let is_off = relu && z[0][i] * scale[c] + shift[c] <= 0.0;
                    (if is_off { 0.0 } else { v }, 0.0)
                }
                Ends::Join {
                    add: adds,
                    y: masks,
                    ..
                } => {
                    let more = if adds { add[i] } else { 0.0 };
                    let is_off = masks && y[i] <= 0.0;
                    (if is_off { 0.0 } else { v + more }, v.abs() + more.abs())
                }
            };
            let tolerance = match values {
                Values::Whole => 0.0,
                Values::Real => tolerance + EPS * terms,
            };
            closed.values.push(v);
            closed.tolerances.push(tolerance);
            let factors = [1.0, z[0][i] - mean[0][c], z[1][i] - mean[1][c]];
            for (row, factor) in factors.into_iter().enumerate().take(1 + self.norms()) {
                closed.sums[row][c] += v * factor;
                let error = drift * EPS * (v * factor).abs() + tolerance * factor.abs();
                closed.sum_tolerances[row][c] += error;
            }
        }
        closed
    }

    /// Checks what the records of `tasks` say, directly and through what reads them.
    fn check_partials(
        &self,
        pool: &mut Pool,
        what: &dyn Fn() -> String,
        all: &Guarded<f32>,
        columns: usize,
        closed: &Closed,
    ) {
        let channels = self.channels;
        let pixels = closed.values.len() / channels;
        let partials = Partials {
            all: all.span(),
            columns,
        };
        let len = Partials::record_len(columns);
        let records: Vec<&[f32]> = all.get().chunks_exact(len).collect();
        let counted: f64 = records.iter().map(|r| f64::from(r[0])).sum();
        assert_eq!(counted, pixels as f64, "{}: results in the records", what());
        match self.ends {
            Ends::Store { .. } | Ends::Affine { .. } => {}
            Ends::Stats => {
                let found = Mutex::new(vec![None; channels]);
                norm::statistics(pool, partials, channels, |c, mean, var, count| {
                    let before = found.lock().unwrap()[c].replace((mean, var, count));
                    assert_eq!(before, None, "each channel once");
                });
                for (c, found) in found.into_inner().unwrap().into_iter().enumerate() {
                    let (mean, var, count) = found.expect("every channel");
                    let of = |all: &[f64]| -> Vec<f64> {
                        all.iter().skip(c).step_by(channels).copied().collect()
                    };
                    let (values, errors) = (of(&closed.values), of(&closed.tolerances));
                    let average = |v: &mut dyn Iterator<Item = f64>| v.sum::<f64>() / pixels as f64;
                    let true_mean = average(&mut values.iter().copied());
                    let true_var = average(&mut values.iter().map(|v| (v - true_mean).powi(2)));
                    let error = average(&mut errors.iter().copied());
                    let size = average(&mut values.iter().map(|v| v.abs()));
                    // The sums are of deviations from a value of the channel: of squares, and of themselves, twice.
                    let farthest = values
                        .iter()
                        .map(|v| (v - true_mean).powi(2))
                        .fold(0.0, f64::max);
                    let square = average(&mut errors.iter().map(|e| e * e));
                    let var_error = 3.0 * F32_PIXELS * EPS * (true_var + farthest)
                        + 2.0 * (true_var * square).sqrt()
                        + square;
                    let mean_error = F32_PIXELS * EPS * (size + farthest.sqrt()) + error;
                    let what = || format!("{}: channel {c}", what());
                    assert_eq!(count, pixels as f64, "{}", what());
                    check_all(|| what() + ", mean", &[mean], &[true_mean], |_| mean_error);
                    // Values may differ by less than they are rounded by.
                    let rounding = (EPS * size).powi(2);
                    check_all(
                        || what() + ", variance",
                        &[var],
                        &[true_var],
                        |_| var_error + rounding,
                    );
                }
            }
            Ends::Mask { .. } | Ends::Join { .. } => {
                for row in 0..1 + self.norms() {
                    let of = |c| {
                        records
                            .iter()
                            .map(|r| f64::from(r[partials.at(row, c)]))
                            .sum()
                    };
                    let found: Vec<f64> = (0..channels).map(of).collect();
                    let tolerances = &closed.sum_tolerances[row];
                    let what = || format!("{}: row {row} of the sums", what());
                    check_all(what, &found, &closed.sums[row], |c| tolerances[c]);
                }
                for i in 0..self.norms() {
                    check_gradient(pool, what, partials, i, pixels, channels, closed);
                }
            }
        }
    }
}

/// The constants of a normalisation's gradient, and those of its parameters, from the sums of a record.
fn check_gradient(
    pool: &mut Pool,
    what: &dyn Fn() -> String,
    partials: Partials<'_>,
    norm: usize,
    pixels: usize,
    channels: usize,
    closed: &Closed,
) {
    let rows = Guarded::<f32>::unset(STATE_ROWS * channels);
    let state = State::new(rows.span());
    let (gamma, var) = (|c: usize| 0.5 + c as f32 / 8.0, |c: usize| 0.25 + c as f64);
    for c in 0..channels {
        // SAFETY: nobody else knows the state.
        unsafe { state.set_statistics(c, 1.0, var(c), gamma(c), 2.0) };
    }
    let found = Mutex::new(vec![[f64::NAN; 2]; channels]);
    norm::gradient(
        pool,
        partials,
        1 + norm,
        pixels,
        state,
        |c, dgamma, dbeta| {
            found.lock().unwrap()[c] = [dgamma, dbeta];
        },
    );
    let found = found.into_inner().unwrap();
    let m = pixels as f64;
    for c in 0..channels {
        let std = (var(c) + f64::from(NORM_EPSILON)).sqrt();
        let scale = f64::from(gamma(c)) / std;
        let (sum_g, sum_gz) = (closed.sums[0][c], closed.sums[1 + norm][c]);
        let (error_g, error_gz) = (
            closed.sum_tolerances[0][c],
            closed.sum_tolerances[1 + norm][c],
        );
        // gamma / std (g - sum(g) / m - xhat sum(g xhat) / m), ordered by g and z - mean.
        let expected = [
            1.0,
            1.0 / std,
            scale,
            2.0 - scale,
            scale,
            -scale * sum_gz / (std * std * m),
            -scale * sum_g / m,
            sum_gz / std,
            sum_g,
        ];
        let errors = [
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            scale * error_gz / (std * std * m),
            scale * error_g / m,
            error_gz / std,
            error_g,
        ];
        let rows = [
            Row::Mean,
            Row::InvStd,
            Row::Scale,
            Row::Shift,
            Row::A,
            Row::B,
            Row::C,
        ];
        // SAFETY: the regions are over.
        let row = |row: Row| f64::from(unsafe { state.get(row) }[c]);
        let found: Vec<f64> = rows.into_iter().map(row).chain(found[c]).collect();
        // The state is f32, rounded from f64; inv_std and scale are rounded before b is made of them.
        let tolerance = |i: usize| errors[i] + 4.0 * EPS * expected[i].abs().max(scale);
        let what = || format!("{}: gradient of normalisation {norm}, channel {c}", what());
        check_all(what, &found, &expected, tolerance);
    }
}

// ---------------------------------------------------------------- the truth of convolutions

/// Calls `f(pixel of x, pixel of y, tap)` wherever a window meets a pixel.
fn each_meeting(g: &Geometry, batch: usize, mut f: impl FnMut(usize, usize, usize)) {
    let (k, pad) = (g.kernel as isize, ((g.kernel - 1) / 2) as isize);
    for image in 0..batch {
        for oy in 0..g.output.h {
            for ox in 0..g.output.w {
                for ky in 0..k {
                    for kx in 0..k {
                        let y = (oy * g.stride) as isize + ky - pad;
                        let x = (ox * g.stride) as isize + kx - pad;
                        if (0..g.input.h as isize).contains(&y)
                            && (0..g.input.w as isize).contains(&x)
                        {
                            let from = (image * g.input.h + y as usize) * g.input.w + x as usize;
                            let to = (image * g.output.h + oy) * g.output.w + ox;
                            f(from, to, (ky * k + kx) as usize);
                        }
                    }
                }
            }
        }
    }
}

/// Sums of products, and the roots of the sums of their squares.
struct Products {
    sums: Vec<f64>,
    norms: Vec<f64>,
}

impl Products {
    fn of(values: Values, len: usize, mut add_up: impl FnMut(&mut [f64], bool)) -> Self {
        let (mut sums, mut norms) = (vec![0.0; len], vec![0.0; len]);
        add_up(&mut sums, false);
        if values == Values::Real {
            add_up(&mut norms, true);
            norms.iter_mut().for_each(|v| *v = v.sqrt());
        }
        Self { sums, norms }
    }

    /// For sums of `n` products.
    fn tolerances<P>(&self, values: Values, n: usize) -> Vec<f64> {
        let chain = (n.min(CHAIN) + n / CHAIN) as f64;
        let factor = match values {
            Values::Whole => 0.0,
            Values::Real if is_bf16::<P>() => BF16_SUM * BF16,
            Values::Real => F32_SUM * EPS * chain.sqrt(),
        };
        // Where the products have a mean, the sum outgrows the root.
        let sizes = self
            .norms
            .iter()
            .zip(&self.sums)
            .map(|(n, s)| n.max(s.abs()));
        sizes.map(|size| size * factor).collect()
    }
}

fn squares(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| v * v).collect()
}

/// OIHW as [tap][O][I].
fn by_taps(g: &Geometry, w: &[f64]) -> Vec<f64> {
    let (taps, inputs, outputs) = (g.kernel * g.kernel, g.input.c, g.output.c);
    let mut to = vec![0.0; w.len()];
    for (at, v) in w.iter().enumerate() {
        let (o, i, tap) = (at / taps / inputs, at / taps % inputs, at % taps);
        to[(tap * outputs + o) * inputs + i] = *v;
    }
    to
}

fn forward<T: Element>(
    g: &Geometry,
    batch: usize,
    values: Values,
    x: &Input<T>,
    w: &[f64],
) -> Products {
    let (inputs, outputs) = (g.input.c, g.output.c);
    Products::of(values, batch * g.output.elements(), |y, squared| {
        let (x, w) = if squared {
            (squares(&x.sizes), by_taps(g, &squares(w)))
        } else {
            (x.means.clone(), by_taps(g, w))
        };
        each_meeting(g, batch, |from, to, tap| {
            let x = &x[from * inputs..][..inputs];
            for o in 0..outputs {
                let w = &w[(tap * outputs + o) * inputs..][..inputs];
                y[to * outputs + o] += x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
            }
        });
    })
}

fn backward<T: Element>(
    g: &Geometry,
    batch: usize,
    values: Values,
    d: &Input<T>,
    w: &[f64],
) -> Products {
    let (inputs, outputs) = (g.input.c, g.output.c);
    Products::of(values, batch * g.input.elements(), |dx, squared| {
        let (d, w) = if squared {
            (squares(&d.sizes), by_taps(g, &squares(w)))
        } else {
            (d.means.clone(), by_taps(g, w))
        };
        each_meeting(g, batch, |from, to, tap| {
            let dx = &mut dx[from * inputs..][..inputs];
            for o in 0..outputs {
                let (d, w) = (
                    d[to * outputs + o],
                    &w[(tap * outputs + o) * inputs..][..inputs],
                );
                dx.iter_mut().zip(w).for_each(|(dx, w)| *dx += d * w);
            }
        });
    })
}

/// As OIHW.
fn weight_gradient<T: Element>(
    g: &Geometry,
    batch: usize,
    values: Values,
    x: &Input<T>,
    d: &Input<T>,
) -> Products {
    let (taps, inputs, outputs) = (g.kernel * g.kernel, g.input.c, g.output.c);
    Products::of(values, taps * inputs * outputs, |dw, squared| {
        let (x, d) = if squared {
            (squares(&x.sizes), squares(&d.sizes))
        } else {
            (x.means.clone(), d.means.clone())
        };
        let mut all = vec![0.0; dw.len()];
        each_meeting(g, batch, |from, to, tap| {
            let x = &x[from * inputs..][..inputs];
            for o in 0..outputs {
                let d = d[to * outputs + o];
                let dw = &mut all[(tap * outputs + o) * inputs..][..inputs];
                dw.iter_mut().zip(x).for_each(|(dw, x)| *dw += x * d);
            }
        });
        for (at, v) in dw.iter_mut().enumerate() {
            let (o, i, tap) = (at / taps / inputs, at / taps % inputs, at % taps);
            *v = all[(tap * outputs + o) * inputs + i];
        }
    })
}

/// OIHW in the order that [`Panels`] documents: `[outputs / nr][inputs / CHUNK][taps][CHUNK][nr]`.
fn in_panels(g: &Geometry, nr: usize, w: &[f64]) -> Vec<f64> {
    let (taps, inputs, outputs) = (g.kernel * g.kernel, g.input.c, g.output.c);
    let mut all = vec![];
    for panel in 0..outputs.div_ceil(nr) {
        for chunk in (0..inputs).step_by(CHUNK) {
            for tap in 0..taps {
                for i in chunk..inputs.min(chunk + CHUNK) {
                    for o in panel * nr..(panel + 1) * nr {
                        all.push(if o < outputs {
                            w[(o * inputs + i) * taps + tap]
                        } else {
                            0.0
                        });
                    }
                }
            }
        }
    }
    all
}

// ---------------------------------------------------------------- shapes

fn geometry(
    kernel: usize,
    stride: usize,
    (h, w): (usize, usize),
    inputs: usize,
    outputs: usize,
) -> Geometry {
    Geometry {
        input: Plane { h, w, c: inputs },
        output: Plane {
            h: h.div_ceil(stride),
            w: w.div_ceil(stride),
            c: outputs,
        },
        kernel,
        stride,
    }
}

/// A shape and a batch that plain loops compute in milliseconds.
fn random_shape(r: &mut Random) -> (Geometry, usize) {
    const CHANNELS: [usize; 20] = [
        1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 40, 64, 65, 96, 128, 130,
    ];
    loop {
        let side = (1 + r.below(16), 1 + r.below(16));
        let plane = r.pick(&[
            (1, 1),
            (2, 2),
            (3, 5),
            (7, 7),
            (14, 14),
            (28, 28),
            side,
            side,
            side,
        ]);
        let (kernel, stride) = (r.pick(&[1, 3, 5, 7]), 1 + r.below(2));
        let g = geometry(kernel, stride, plane, r.pick(&CHANNELS), r.pick(&CHANNELS));
        let batch = 1 + r.below(5);
        if batch * g.macs() < 1 << 20 {
            return (g, batch);
        }
    }
}

// ---------------------------------------------------------------- convolutions

#[derive(Clone, Copy, Debug, PartialEq)]
enum Direction {
    Forward,
    Backward,
}

const ARITHMETICS: [Arithmetic; 3] = [Arithmetic::F32, Arithmetic::Bf16, Arithmetic::Split];

trait Multiplied: Operand {
    /// Masters as [`direct::Plan::forward`] reads them.
    fn pack_forward(pool: &mut Pool, plan: &direct::Plan, masters: &Guarded<f32>) -> Guarded<Self>;
}

impl Multiplied for f32 {
    fn pack_forward(_: &mut Pool, plan: &direct::Plan, masters: &Guarded<f32>) -> Guarded<f32> {
        assert_eq!(plan.weights_len(), masters.len, "masters have the order");
        Guarded::holding(masters.get())
    }
}

impl Multiplied for bf16 {
    fn pack_forward(pool: &mut Pool, plan: &direct::Plan, masters: &Guarded<f32>) -> Guarded<bf16> {
        let packed = Guarded::unset(plan.weights_len());
        direct::pack_forward(pool, plan, masters.span(), packed.span());
        packed
    }
}

/// A convolution to be checked.
#[derive(Clone, Copy, Debug)]
struct Case {
    direction: Direction,
    g: Geometry,
    batch: usize,
    reads: Reads,
    ends: Ends,
    values: Values,
    seed: u64,
}

/// What a convolution has left.
struct Ran<T> {
    out: Guarded<T>,
    partials: Guarded<f32>,
    columns: usize,
}

impl Case {
    fn plan(&self, level: Level, arithmetic: Arithmetic) -> direct::Plan {
        match self.direction {
            Direction::Forward => direct::Plan::forward(level, arithmetic, &self.g, self.batch),
            Direction::Backward => direct::Plan::backward(level, arithmetic, &self.g, self.batch),
        }
    }

    fn planes(&self) -> (Plane, Plane) {
        match self.direction {
            Direction::Forward => (self.g.input, self.g.output),
            Direction::Backward => (self.g.output, self.g.input),
        }
    }

    fn operands<T: Element>(&self) -> (Input<T>, Vec<f64>, Closing<T>) {
        let r = &mut Random::new(self.seed);
        let (from, to) = self.planes();
        let input = Input::new(
            r,
            self.values,
            self.reads,
            self.batch * from.pixels(),
            from.c,
        );
        let w = self.values.many(r, self.g.depth() * self.g.output.c, 3);
        let w = w.into_iter().map(rounded::<f32>).collect();
        (
            input,
            w,
            Closing::new(r, self.values, self.ends, self.batch * to.pixels(), to.c),
        )
    }

    fn run<T: Element>(
        &self,
        pool: &mut Pool,
        level: Level,
        arithmetic: Arithmetic,
        input: &Input<T>,
        w: &[f64],
        closing: &Closing<T>,
    ) -> Ran<T> {
        let plan = self.plan(level, arithmetic);
        match plan.pairs() {
            1 => self.run_plan::<T, f32>(pool, level, plan, input, w, closing),
            _ => self.run_plan::<T, bf16>(pool, level, plan, input, w, closing),
        }
    }

    fn run_plan<T: Element, P: Multiplied>(
        &self,
        pool: &mut Pool,
        level: Level,
        plan: direct::Plan,
        input: &Input<T>,
        w: &[f64],
        closing: &Closing<T>,
    ) -> Ran<T> {
        let nr = 2 * level.lanes();
        let masters = Guarded::<f32>::of(&in_panels(&self.g, nr, w));
        let weights = match self.direction {
            Direction::Forward => P::pack_forward(pool, &plan, &masters),
            Direction::Backward => {
                let packed = Guarded::<P>::unset(plan.weights_len());
                direct::pack_backward::<P>(pool, &plan, &self.g, masters.span(), packed.span());
                packed
            }
        };
        weights.bytes();
        let in_place = closing.adds() && self.seed.is_multiple_of(2);
        let out = closing.out(in_place);
        let columns = plan.columns();
        let partials = Guarded::<f32>::unset(plan.tasks() * Partials::record_len(columns));
        let (memory, per_worker) = scratch(pool, plan.worker_len());
        let channels = closing.channels;
        direct::convolve::<T, P>(
            pool,
            Scratch {
                all: memory.span(),
                per_worker,
            },
            &direct::Convolution {
                plan: &plan,
                source: input.source(),
                weights: weights.span(),
                out: Out {
                    y: out.span(),
                    channels,
                    stream: channels.is_multiple_of(32) && !in_place,
                },
                epilogue: closing.epilogue(&out, in_place),
                // Inference keeps none.
                partials: (!matches!(self.ends, Ends::Affine { .. })).then_some(Partials {
                    all: partials.span(),
                    columns,
                }),
            },
        );
        memory.bytes();
        Ran {
            out,
            partials,
            columns,
        }
    }

    fn check(&self, pool: &mut Pool) {
        self.check_stored::<f32>(pool);
        self.check_stored::<bf16>(pool);
    }

    fn check_stored<T: Element>(&self, pool: &mut Pool) {
        let (input, w, closing) = self.operands::<T>();
        let products = match self.direction {
            Direction::Forward => forward(&self.g, self.batch, self.values, &input, &w),
            Direction::Backward => backward(&self.g, self.batch, self.values, &input, &w),
        };
        for arithmetic in ARITHMETICS {
            self.check_multiplied::<T>(pool, arithmetic, &input, &w, &closing, &products);
        }
    }

    fn check_multiplied<T: Element>(
        &self,
        pool: &mut Pool,
        arithmetic: Arithmetic,
        input: &Input<T>,
        w: &[f64],
        closing: &Closing<T>,
        products: &Products,
    ) {
        let n = self.g.kernel * self.g.kernel * self.planes().0.c;
        let tolerances = match arithmetic {
            Arithmetic::Bf16 => products.tolerances::<bf16>(self.values, n),
            Arithmetic::F32 | Arithmetic::Split => products.tolerances::<f32>(self.values, n),
        };
        let closed = closing.close(self.values, &products.sums, &tolerances, F32_PIXELS);
        let expected: Vec<f64> = match self.values {
            Values::Whole => closed.values.iter().map(|v| rounded::<T>(*v)).collect(),
            Values::Real => closed.values.clone(),
        };
        for level in levels() {
            let ran = self.run(pool, level, arithmetic, input, w, closing);
            let what = || {
                let stored = if is_bf16::<T>() { "bf16" } else { "f32" };
                format!("{self:?}, {level}, stored as {stored}, {arithmetic:?}")
            };
            check_all(what, &ran.out.to_f64(), &expected, |i| match self.values {
                Values::Whole => 0.0,
                Values::Real if is_bf16::<T>() => {
                    closed.tolerances[i] + BF16 * (expected[i].abs() + closed.tolerances[i])
                }
                Values::Real => closed.tolerances[i] + EPS * expected[i].abs(),
            });
            ran.partials.bytes();
            if !matches!(self.ends, Ends::Affine { .. }) {
                closing.check_partials(pool, &what, &ran.partials, ran.columns, &closed);
            }
        }
    }
}

fn check_everything(direction: Direction, first_seed: u64) {
    let pool = &mut Pool::new(1);
    let mut seed = first_seed;
    for reads in READS {
        for ends in all_ends() {
            for values in [Values::Whole, Values::Real] {
                seed += 1;
                let (g, batch) = random_shape(&mut Random::new(seed));
                let case = Case {
                    direction,
                    g,
                    batch,
                    reads,
                    ends,
                    values,
                    seed,
                };
                case.check(pool);
            }
        }
    }
}

#[test]
fn forward_convolutions_with_every_operand_and_every_end() {
    check_everything(Direction::Forward, 0);
}

#[test]
fn gradients_of_inputs_with_every_operand_and_every_end() {
    check_everything(Direction::Backward, 1000);
}

/// Shapes that are cut in ways that small ones are not.
fn large_shapes() -> Vec<(Geometry, usize)> {
    vec![
        // Blocks of rows, the last one shorter.
        (geometry(3, 1, (28, 27), 130, 5), 1),
        (geometry(3, 2, (29, 31), 96, 6), 2),
        (geometry(5, 1, (27, 28), 65, 3), 1),
        (geometry(7, 2, (28, 28), 40, 4), 1),
        // Pixels over several images, the last task shorter.
        (geometry(1, 1, (28, 28), 33, 70), 2),
        (geometry(1, 2, (29, 27), 130, 9), 3),
        // The stem, over several tasks.
        (geometry(7, 2, (56, 55), 3, 24), 1),
        (geometry(3, 1, (28, 28), 7, 33), 2),
        // Groups of panels.
        (geometry(3, 1, (7, 7), 64, 300), 1),
        (geometry(1, 1, (3, 5), 96, 520), 1),
        // Long sums.
        (geometry(3, 1, (3, 5), 600, 9), 1),
        (geometry(1, 1, (2, 2), 2100, 17), 2),
        // Small planes in large batches.
        (geometry(3, 1, (1, 1), 70, 40), 33),
        (geometry(3, 2, (2, 2), 200, 20), 150),
        (geometry(5, 1, (1, 4), 16, 16), 9),
        (geometry(1, 2, (2, 2), 16, 33), 5),
        // Matrix tiles: rows longer than a tile, strides, blocks of the depth.
        (geometry(3, 1, (7, 7), 96, 64), 5),
        (geometry(3, 1, (33, 20), 64, 96), 1),
        (geometry(3, 2, (13, 37), 32, 64), 2),
        (geometry(1, 2, (29, 27), 128, 160), 3),
        (geometry(1, 1, (3, 5), 1056, 32), 3),
    ]
}

fn large_cases() -> Vec<Case> {
    let mut cases = vec![];
    for (i, (g, batch)) in large_shapes().into_iter().enumerate() {
        for direction in [Direction::Forward, Direction::Backward] {
            let (reads, ends) = match direction {
                Direction::Forward => (Reads::Norm { relu: true }, Ends::Stats),
                Direction::Backward => {
                    let (add, y, norms) = (true, true, 2);
                    (Reads::Grad, Ends::Join { add, y, norms })
                }
            };
            cases.push(Case {
                direction,
                g,
                batch,
                reads,
                ends,
                values: if i % 2 == 0 {
                    Values::Whole
                } else {
                    Values::Real
                },
                seed: 2000 + i as u64,
            });
        }
    }
    cases
}

#[test]
fn convolutions_that_are_cut_into_many_tasks() {
    let pool = &mut Pool::new(1);
    let mut packings = BTreeSet::new();
    let mut cuts = BTreeSet::new();
    for case in large_cases() {
        let plan = format!("{:?}", case.plan(Level::Portable, Arithmetic::F32));
        let field = |name: &str| {
            let rest = plan.split(name).nth(1).expect("a field of the plan");
            rest.split([',', ' ']).next().unwrap_or_default().to_owned()
        };
        packings.insert((format!("{:?}", case.direction), field("packing: ")));
        cuts.extend((field("groups: ") != "1").then_some("groups"));
        cuts.extend(
            (case.plan(Level::Portable, Arithmetic::F32).tasks() > case.batch).then_some("rows"),
        );
        cuts.extend((field("images: ") != "1").then_some("images"));
        case.check(pool);
    }
    assert_eq!(packings.len(), 4 + 3, "{packings:?}");
    assert_eq!(cuts.len(), 3, "{cuts:?}");
}

/// A mean of 1000 deviations: sums of squares would leave no digit of the variance in f32.
#[test]
fn variance_is_precise_far_from_zero() {
    let pool = &mut Pool::new(1);
    let (g, batch) = (geometry(1, 1, (28, 28), 1, 5), 3);
    let r = &mut Random::new(7);
    let pixels = batch * g.input.pixels();
    // Exact in f32, and so are the results.
    let values: Vec<f64> = (0..pixels)
        .map(|_| 1000.0 + r.whole(1 << 10) / 1024.0)
        .collect();
    let x = Guarded::<f32>::of(&values);
    let mean = values.iter().sum::<f64>() / pixels as f64;
    let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / pixels as f64;
    for level in levels() {
        let plan = direct::Plan::forward(level, Arithmetic::F32, &g, batch);
        let weights = Guarded::<f32>::of(&in_panels(&g, 2 * level.lanes(), &[1.0; 5]));
        let out = Guarded::<f32>::unset(5 * pixels);
        let columns = plan.columns();
        let all = Guarded::<f32>::unset(plan.tasks() * Partials::record_len(columns));
        let (memory, per_worker) = scratch(pool, plan.worker_len());
        let (y, channels, stream) = (out.span(), 5, false);
        let partials = Partials {
            all: all.span(),
            columns,
        };
        let memory = Scratch {
            all: memory.span(),
            per_worker,
        };
        let (source, epilogue) = (Source::Raw(Raw(x.span())), Epilogue::Stats(Stats));
        let to = Out {
            y,
            channels,
            stream,
        };
        let convolution = direct::Convolution {
            plan: &plan,
            source,
            weights: weights.span(),
            out: to,
            epilogue,
            partials: Some(partials),
        };
        direct::convolve(pool, memory, &convolution);
        norm::statistics(pool, partials, 5, |c, found_mean, found_var, _| {
            // The sum of deviations from the first result is rounded to f32, relative to a few deviations.
            let error = (found_mean - mean).abs() + (found_var - var).abs();
            assert!(
                error < 1e-4,
                "{level}: channel {c}: {found_mean}, {found_var}, not {mean}, {var}"
            );
        });
    }
}

/// NaN of one pixel reaches all that depends on it, through ReLUs too, and nothing else.
#[test]
fn one_nan_reaches_what_depends_on_it() {
    let pool = &mut Pool::new(1);
    for (g, batch) in [
        (geometry(3, 1, (7, 6), 20, 33), 3),
        (geometry(3, 2, (7, 6), 32, 33), 3),
        (geometry(1, 1, (7, 6), 20, 33), 3),
        (geometry(7, 2, (9, 8), 3, 24), 2),
        (geometry(3, 1, (2, 1), 9, 5), 4),
    ] {
        for ends in [
            Ends::Affine {
                residual: false,
                relu: true,
            },
            Ends::Stats,
        ] {
            let case = Case {
                direction: Direction::Forward,
                g,
                batch,
                reads: Reads::Norm { relu: true },
                ends,
                values: Values::Real,
                seed: 5,
            };
            let (input, w, closing) = case.operands::<f32>();
            let nan = (batch * g.input.pixels() / 2, g.input.c - 1);
            // SAFETY: no kernel runs.
            unsafe { input.z.span().get_mut()[nan.0 * g.input.c + nan.1] = f32::NAN };
            let mut expected = vec![false; batch * g.output.pixels()];
            each_meeting(&g, batch, |from, to, _| expected[to] |= from == nan.0);
            for level in levels() {
                let check = |what: &str, found: Vec<f64>| {
                    for (pixel, values) in found.chunks_exact(g.output.c).enumerate() {
                        let all = values.iter().all(|v| v.is_nan() == expected[pixel]);
                        assert!(all, "{case:?}, {level}, {what}: pixel {pixel}");
                    }
                };
                for arithmetic in [Arithmetic::Bf16, Arithmetic::Split] {
                    // Tiles multiply pixels beside a window of three channels by zero. A network's pixels are numbers.
                    if g.input.c == 3 && level == Level::Amx {
                        continue;
                    }
                    let ran = case.run::<f32>(pool, level, arithmetic, &input, &w, &closing);
                    check(&format!("{arithmetic:?}"), ran.out.to_f64());
                }
                let ran = case.run::<f32>(pool, level, Arithmetic::F32, &input, &w, &closing);
                check("f32", ran.out.to_f64());
                if ends == Ends::Stats {
                    let partials = Partials {
                        all: ran.partials.span(),
                        columns: ran.columns,
                    };
                    norm::statistics(pool, partials, g.output.c, |_, mean, var, _| {
                        assert!(mean.is_nan() && var.is_nan(), "{case:?}, {level}");
                    });
                }
            }
        }
    }
}

/// Where the value that a ReLU has seen is NaN, its gradient passes: it must not become a zero that looks healthy.
#[test]
fn gradients_pass_a_relu_of_nan() {
    let pool = &mut Pool::new(1);
    let case = Case {
        direction: Direction::Backward,
        g: geometry(3, 1, (5, 4), 20, 9),
        batch: 2,
        reads: Reads::Raw,
        ends: Ends::Mask { relu: true },
        values: Values::Whole,
        seed: 3,
    };
    let (input, w, closing) = case.operands::<f32>();
    let products = backward(&case.g, case.batch, case.values, &input, &w);
    // SAFETY: no kernel runs.
    unsafe { closing.z[0].span().get_mut() }.fill(f32::NAN);
    for level in levels() {
        let ran = case.run::<f32>(pool, level, Arithmetic::F32, &input, &w, &closing);
        check_all(
            || level.to_string(),
            &ran.out.to_f64(),
            &products.sums,
            |_| 0.0,
        );
        let partials = Partials {
            all: ran.partials.span(),
            columns: ran.columns,
        };
        for c in 0..20 {
            assert!(ran.partials.get()[partials.at(1, c)].is_nan(), "{level}");
        }
    }
}

// ---------------------------------------------------------------- gradients of weights

/// A gradient of a weight to be checked.
#[derive(Clone, Copy, Debug)]
struct WeightCase {
    g: Geometry,
    batch: usize,
    reads: [Reads; 2],
    values: Values,
    accumulate: bool,
    seed: u64,
}

impl WeightCase {
    /// x, d, and what is there before.
    fn operands<T: Element>(&self) -> (Input<T>, Input<T>, Vec<f64>) {
        let (r, g) = (&mut Random::new(self.seed), &self.g);
        let x = Input::new(
            r,
            self.values,
            self.reads[0],
            self.batch * g.input.pixels(),
            g.input.c,
        );
        let d = Input::new(
            r,
            self.values,
            self.reads[1],
            self.batch * g.output.pixels(),
            g.output.c,
        );
        let before = self.values.many(r, g.depth() * g.output.c, 9);
        (x, d, before.into_iter().map(rounded::<f32>).collect())
    }

    fn run<T: Element>(
        &self,
        pool: &mut Pool,
        level: Level,
        x: &Input<T>,
        d: &Input<T>,
        before: &[f64],
    ) -> Guarded<f32> {
        let plan = wgrad::Plan::new(level, &self.g, self.batch);
        let tiled = self.tiled::<T>(level);
        let panels = Panels::of(&self.g, 2 * level.lanes());
        let dw = if self.accumulate {
            Guarded::of(&in_panels(&self.g, panels.nr, before))
        } else {
            Guarded::<f32>::unset(panels.len())
        };
        let (shared, worker) = match &tiled {
            Some(plan) => (plan.shared_len(), plan.worker_len()),
            None => (plan.shared_len(), plan.worker_len()),
        };
        let shared = Guarded::<f32>::unset(shared);
        let (memory, per_worker) = scratch(pool, worker);
        let all = memory.span();
        let (scratch, x, d) = (Scratch { all, per_worker }, x.source(), d.source());
        let (to, add) = (dw.span(), self.accumulate);
        match &tiled {
            Some(plan) => {
                wgrad_tiles::backward_weight(pool, scratch, shared.span(), plan, x, d, to, add);
            }
            None => wgrad::backward_weight(pool, scratch, shared.span(), &plan, x, d, to, add),
        }
        shared.bytes();
        memory.bytes();
        dw
    }

    /// How the engine multiplies where there are matrix tiles.
    fn tiled<T: Element>(&self, level: Level) -> Option<wgrad_tiles::Plan> {
        let arithmetic = if is_bf16::<T>() {
            Arithmetic::Bf16
        } else {
            Arithmetic::Split
        };
        wgrad_tiles::Plan::new(level, arithmetic, &self.g, self.batch)
    }

    fn check<T: Element>(&self, pool: &mut Pool) {
        let (x, d, before) = self.operands::<T>();
        let mut products = weight_gradient(&self.g, self.batch, self.values, &x, &d);
        let n = self.batch * self.g.output.pixels();
        let mut tolerances = products.tolerances::<f32>(self.values, n);
        let mut tolerances_of_tiles = products.tolerances::<bf16>(self.values, n);
        if self.accumulate {
            products
                .sums
                .iter_mut()
                .zip(&before)
                .for_each(|(v, b)| *v += b);
            if self.values == Values::Real {
                for tolerances in [&mut tolerances, &mut tolerances_of_tiles] {
                    tolerances
                        .iter_mut()
                        .zip(&before)
                        .for_each(|(t, b)| *t += EPS * b.abs());
                }
            }
        }
        for level in levels() {
            let nr = 2 * level.lanes();
            let tolerances = match self.tiled::<T>(level) {
                Some(_) if is_bf16::<T>() => &tolerances_of_tiles,
                _ => &tolerances,
            };
            let dw = self.run(pool, level, &x, &d, &before);
            // In the order of panels, whose filling is zero.
            let expected = in_panels(&self.g, nr, &products.sums);
            let tolerances = in_panels(&self.g, nr, tolerances);
            let what = || {
                let stored = if is_bf16::<T>() { "bf16" } else { "f32" };
                format!("{self:?}, {level}, stored as {stored}")
            };
            check_all(what, &dw.to_f64(), &expected, |i| tolerances[i]);
        }
    }
}

#[test]
fn gradients_of_weights_with_every_operand() {
    let pool = &mut Pool::new(1);
    let mut seed = 3000;
    for first in READS {
        for second in READS {
            for values in [Values::Whole, Values::Real] {
                for accumulate in [false, true] {
                    seed += 1;
                    let (g, batch) = random_shape(&mut Random::new(seed));
                    let case = WeightCase {
                        g,
                        batch,
                        reads: [first, second],
                        values,
                        accumulate,
                        seed,
                    };
                    case.check::<f32>(pool);
                    case.check::<bf16>(pool);
                }
            }
        }
    }
}

fn weight_cases() -> Vec<WeightCase> {
    let shapes = [
        // Slices: of rows, of pixels, of patches.
        (geometry(3, 1, (16, 15), 12, 20), 3),
        (geometry(5, 2, (33, 31), 9, 8), 2),
        (geometry(3, 1, (3, 224), 8, 5), 1),
        (geometry(1, 1, (28, 28), 65, 33), 2),
        (geometry(1, 2, (31, 30), 40, 7), 3),
        (geometry(7, 2, (35, 37), 3, 24), 2),
        // Groups: blocks of several images, of one, of a part of one.
        (geometry(3, 1, (7, 7), 40, 33), 6),
        (geometry(3, 2, (13, 14), 65, 70), 3),
        (geometry(1, 1, (7, 7), 96, 130), 5),
        (geometry(1, 1, (15, 14), 405, 410), 1),
        (geometry(3, 1, (15, 14), 130, 142), 1),
        (geometry(7, 1, (5, 5), 7, 490), 2),
        // Several groups of images.
        (geometry(1, 1, (14, 14), 4000, 5), 3),
        (geometry(3, 1, (14, 14), 2400, 3), 3),
        // Tasks of two panels, and of sixteen.
        (geometry(1, 1, (3, 5), 600, 500), 1),
        // Small planes.
        (geometry(3, 1, (2, 2), 70, 40), 9),
        (geometry(5, 2, (1, 1), 8, 17), 33),
        // Matrix tiles: slices of rows and pixels, groups of images and pixels, several groups.
        (geometry(3, 1, (33, 15), 64, 40), 2),
        (geometry(3, 2, (29, 31), 32, 33), 3),
        (geometry(1, 1, (28, 28), 64, 96), 2),
        (geometry(1, 2, (31, 30), 32, 48), 3),
        (geometry(3, 1, (14, 13), 96, 64), 5),
        (geometry(3, 2, (13, 14), 64, 31), 3),
        (geometry(1, 1, (7, 7), 160, 224), 9),
        (geometry(1, 2, (9, 7), 64, 32), 7),
        (geometry(3, 1, (14, 14), 2432, 3), 6),
    ];
    let case = |(i, (g, batch)): (usize, (Geometry, usize))| WeightCase {
        g,
        batch,
        reads: [Reads::Norm { relu: true }, Reads::Grad],
        values: if i % 2 == 0 {
            Values::Real
        } else {
            Values::Whole
        },
        accumulate: i % 3 == 0,
        seed: 4000 + i as u64,
    };
    shapes.into_iter().enumerate().map(case).collect()
}

#[test]
fn gradients_of_weights_in_every_cut() {
    let pool = &mut Pool::new(1);
    let mut cuts = BTreeSet::new();
    for case in weight_cases() {
        let plan = format!(
            "{:?}",
            wgrad::Plan::new(Level::Portable, &case.g, case.batch)
        );
        cuts.insert([
            plan.contains("Slices"),
            plan.contains("patches: true"),
            plan.contains("linear: true"),
            plan.contains("by_pixel: true"),
        ]);
        case.check::<f32>(pool);
        if Level::Amx.is_available() {
            case.check::<bf16>(pool);
        }
    }
    assert_eq!(
        cuts.len(),
        7,
        "slices and groups of rows, pixels and patches, and small planes: {cuts:?}"
    );
}

// ---------------------------------------------------------------- pools, input, sums

/// The pools of networks, and others.
fn random_window(r: &mut Random) -> (Window, usize) {
    const CHANNELS: [usize; 10] = [1, 3, 5, 8, 15, 16, 17, 33, 64, 130];
    let (kernel, stride): (usize, usize) =
        r.pick(&[(3, 2), (3, 2), (2, 2), (3, 1), (1, 1), (5, 2)]);
    let pad_before = r.below(kernel.div_ceil(2));
    let side = (1 + r.below(16), 1 + r.below(16));
    let (h, w) = r.pick(&[(1, 1), (2, 2), (3, 5), (7, 7), side, side, (28, 28)]);
    let c = r.pick(&CHANNELS);
    let output = Plane {
        h: h.div_ceil(stride),
        w: w.div_ceil(stride),
        c,
    };
    let window = Window {
        input: Plane { h, w, c },
        output,
        kernel,
        stride,
        pad_before,
    };
    (window, 1 + r.below(3))
}

/// For each result of a pool the pixel (its index in x) that is largest, the first of several, and its tap.
fn winners(window: &Window, images: usize, x: &[f64]) -> Vec<(usize, u8)> {
    let (from, to, pad) = (window.input, window.output, window.pad_before as isize);
    let mut all = vec![];
    for at in 0..images * to.elements() {
        let (pixel, c) = (at / to.c, at % to.c);
        let (image, oy, ox) = (
            pixel / to.pixels(),
            pixel % to.pixels() / to.w,
            pixel % to.w,
        );
        let mut best: Option<(usize, u8)> = None;
        for tap in 0..window.kernel * window.kernel {
            let y = (oy * window.stride + tap / window.kernel) as isize - pad;
            let z = (ox * window.stride + tap % window.kernel) as isize - pad;
            if (0..from.h as isize).contains(&y) && (0..from.w as isize).contains(&z) {
                let i = ((image * from.h + y as usize) * from.w + z as usize) * from.c + c;
                if best.is_none_or(|(b, _)| x[i] > x[b]) {
                    best = Some((i, tap as u8));
                }
            }
        }
        all.push(best.expect("every window covers a pixel"));
    }
    all
}

fn check_pool<T: Element>(pool: &mut Pool, seed: u64) {
    let r = &mut Random::new(seed);
    let (window, images) = random_window(r);
    let (from, to) = (window.input, window.output);
    let reads = r.pick(&READS);
    // Results are inputs, so that whole ones are exact, and so are stored ones as they are.
    let values = if reads == Reads::Raw {
        r.pick(&[Values::Whole, Values::Real])
    } else {
        Values::Whole
    };
    let x = Input::<T>::new(r, values, reads, images * from.pixels(), from.c);
    let winners = winners(&window, images, &x.means);
    let expected: Vec<f64> = winners.iter().map(|(i, _)| x.means[*i]).collect();
    let taps: Vec<u8> = winners.iter().map(|(_, tap)| *tap).collect();
    let d = values.tensor::<T>(r, images * to.elements());
    let (mut dx, mut sizes) = (
        vec![0.0; images * from.elements()],
        vec![0.0; images * from.elements()],
    );
    for ((i, _), d) in winners.iter().zip(d.to_f64()) {
        dx[*i] += d;
        sizes[*i] += d.abs();
    }
    for level in levels() {
        let what = || {
            format!("{window:?} of {images} images, {reads:?}, {values:?}, {level}, seed {seed}")
        };
        let (y, argmax) = (
            Guarded::<T>::unset(expected.len()),
            Guarded::<u8>::unset(expected.len()),
        );
        pixels::max_pool(
            pool,
            level,
            window,
            images,
            x.source(),
            y.span(),
            Some(argmax.span()),
        );
        check_all(what, &y.to_f64(), &expected, |_| 0.0);
        assert!(argmax.bytes() == taps, "{}: winners", what());
        let alone = Guarded::<T>::unset(expected.len());
        pixels::max_pool(pool, level, window, images, x.source(), alone.span(), None);
        assert!(alone.bytes() == y.bytes(), "{}: without winners", what());
        let tolerances: Vec<f64> = match values {
            Values::Whole => vec![0.0; dx.len()],
            Values::Real => sizes.iter().map(|s| F32_PIXELS * EPS * s).collect(),
        };
        let gradient = |pool: &mut Pool,
                        out: Out<'_, T>,
                        epilogue: Epilogue<'_, T>,
                        partials: Partials<'_>| {
            let (argmax, d) = (argmax.span(), d.span());
            pixels::max_pool_backward(
                pool, level, window, images, argmax, d, out, epilogue, partials,
            );
        };
        let v = (&*dx, &*tolerances, F32_PIXELS);
        check_visit(
            pool,
            level,
            &what,
            (from, images),
            values,
            v,
            seed,
            gradient,
        );
    }
}

/// Checks a kernel that visits every pixel of a plane, with several ends: its gradients before the end are `v`.
fn check_visit<T: Element>(
    pool: &mut Pool,
    level: Level,
    what: &dyn Fn() -> String,
    (plane, images): (Plane, usize),
    values: Values,
    (v, tolerances, drift): (&[f64], &[f64], f64),
    seed: u64,
    run: impl Fn(&mut Pool, Out<'_, T>, Epilogue<'_, T>, Partials<'_>),
) {
    for ends in all_ends() {
        // These are gradients.
        if matches!(ends, Ends::Stats | Ends::Affine { .. }) {
            continue;
        }
        let r = &mut Random::new(seed);
        let closing = Closing::<T>::new(r, values, ends, images * plane.pixels(), plane.c);
        let closed = closing.close(values, v, tolerances, drift);
        let in_place = closing.adds() && seed.is_multiple_of(2);
        let out = closing.out(in_place);
        let columns = plane.c.next_multiple_of(2 * level.lanes());
        let all =
            Guarded::<f32>::unset(pixels::visits(plane, images) * Partials::record_len(columns));
        let partials = Partials {
            all: all.span(),
            columns,
        };
        let to = Out {
            y: out.span(),
            channels: plane.c,
            stream: plane.c.is_multiple_of(32) && !in_place,
        };
        run(pool, to, closing.epilogue(&out, in_place), partials);
        all.bytes();
        let what = || format!("{}, {ends:?}", what());
        let exact: Vec<f64> = match values {
            Values::Whole => closed.values.iter().map(|v| rounded::<T>(*v)).collect(),
            Values::Real => closed.values.clone(),
        };
        check_all(what, &out.to_f64(), &exact, |i| match values {
            Values::Whole => 0.0,
            Values::Real if is_bf16::<T>() => {
                closed.tolerances[i] + BF16 * (exact[i].abs() + closed.tolerances[i])
            }
            Values::Real => closed.tolerances[i] + EPS * exact[i].abs(),
        });
        closing.check_partials(pool, &what, &all, columns, &closed);
    }
}

#[test]
fn pools_and_their_gradients() {
    let pool = &mut Pool::new(1);
    for seed in 5000..5040 {
        check_pool::<f32>(pool, seed);
        check_pool::<bf16>(pool, seed);
    }
}

/// As in PyTorch: a window with NaN has no other maximum, wherever it is.
#[test]
fn a_nan_is_the_maximum_of_its_windows() {
    let pool = &mut Pool::new(1);
    let (input, output) = (Plane { h: 5, w: 4, c: 20 }, Plane { h: 3, w: 2, c: 20 });
    let window = Window {
        input,
        output,
        kernel: 3,
        stride: 2,
        pad_before: 1,
    };
    let r = &mut Random::new(6);
    for nan in 0..input.pixels() {
        let mut x = Values::Real.many(r, input.elements(), 4);
        x[nan * input.c..(nan + 1) * input.c].fill(f64::NAN);
        let x = Guarded::<f32>::of(&x);
        for level in levels() {
            let y = Guarded::<f32>::unset(output.elements());
            let source = Source::Raw(Raw(x.span()));
            pixels::max_pool(pool, level, window, 1, source, y.span(), None);
            for (pixel, values) in y.get().chunks_exact(output.c).enumerate() {
                // Rows 2 y - 1 to 2 y + 1.
                let near = |result: usize, at: usize| (2 * result).abs_diff(at) <= 1;
                let (oy, ox) = (pixel / output.w, pixel % output.w);
                let sees = near(oy, nan / input.w) && near(ox, nan % input.w);
                let all = values.iter().all(|v| v.is_nan() == sees);
                assert!(
                    all,
                    "{level}: NaN at {nan}, result {pixel} is {}",
                    values[0]
                );
            }
        }
    }
}

fn check_mean<T: Element>(pool: &mut Pool, seed: u64) {
    let r = &mut Random::new(seed);
    let side = (1 + r.below(9), 1 + r.below(9));
    let (h, w) = r.pick(&[(1, 1), (2, 2), (3, 5), (7, 7), side, (28, 28)]);
    let plane = Plane {
        h,
        w,
        c: r.pick(&[1, 5, 8, 16, 33, 64, 130]),
    };
    let (images, pixels) = (1 + r.below(3), plane.pixels() as f64);
    let x = Values::Real.tensor::<T>(r, images * plane.elements());
    let (mut means, mut sizes) = (vec![0.0; images * plane.c], vec![0.0; images * plane.c]);
    for (i, v) in x.to_f64().into_iter().enumerate() {
        let to = i / plane.elements() * plane.c + i % plane.c;
        means[to] += v / pixels;
        sizes[to] += v.abs() / pixels;
    }
    let what = || format!("{plane:?} of {images} images, seed {seed}");
    for level in levels() {
        let y = Guarded::<f32>::unset(images * plane.c);
        let source = Source::Raw(Raw(x.span()));
        pixels::avg_pool(pool, level, plane, images, source, y.span());
        check_all(what, &y.to_f64(), &means, |i| F32_PIXELS * EPS * sizes[i]);
    }

    let d = Values::Real.tensor::<f32>(r, images * plane.c);
    let ds = d.to_f64();
    let spread: Vec<f64> = (0..images * plane.elements())
        .map(|i| ds[i / plane.elements() * plane.c + i % plane.c] / pixels)
        .collect();
    // 1 / pixels and the product are rounded.
    let tolerances: Vec<f64> = spread.iter().map(|v| 2.0 * EPS * v.abs()).collect();
    // Equal values are rounded the same way each time that they are added.
    let drift = pixels / 2.0 + F32_PIXELS;
    for level in levels() {
        let what = || format!("{}, {level}", what());
        let gradient = |pool: &mut Pool,
                        out: Out<'_, T>,
                        epilogue: Epilogue<'_, T>,
                        partials: Partials<'_>| {
            pixels::avg_pool_backward(
                pool,
                level,
                plane,
                images,
                d.span(),
                out,
                epilogue,
                partials,
            );
        };
        let v = (&*spread, &*tolerances, drift);
        check_visit(
            pool,
            level,
            &what,
            (plane, images),
            Values::Real,
            v,
            seed,
            gradient,
        );
    }
}

#[test]
fn means_and_their_gradients() {
    let pool = &mut Pool::new(1);
    for seed in 5100..5112 {
        check_mean::<f32>(pool, seed);
        check_mean::<bf16>(pool, seed);
    }
}

fn check_input<T: Element>(pool: &mut Pool, seed: u64) {
    let r = &mut Random::new(seed);
    let (images, per_image) = (1 + r.below(5), 3 * (1 + r.below(99)));
    let bytes: Vec<u8> = (0..images * per_image)
        .map(|_| r.below(256) as u8)
        .collect();
    let floats: Vec<f32> = bytes
        .iter()
        .map(|b| f32::from(*b) + r.real() as f32)
        .collect();
    let wide: Vec<f32> = bytes.iter().map(|b| f32::from(*b)).collect();
    let sources = [(Pixels::U8(&bytes), &wide), (Pixels::F32(&floats), &floats)];
    for (level, (pixels, values)) in levels().flat_map(|l| sources.map(|s| (l, s))) {
        let y = Guarded::<T>::unset(images * per_image);
        pixels::input(pool, level, pixels, images, y.span());
        let normal = |(i, p): (usize, &f32)| {
            (f64::from(*p) - f64::from(MEAN[i % 3])) / f64::from(STD[i % 3])
        };
        let expected: Vec<f64> = values.iter().enumerate().map(normal).collect();
        // The difference, 1 / std and the product are rounded.
        let rounding = 2.0 * EPS + if is_bf16::<T>() { BF16 } else { 0.0 };
        check_all(
            || format!("seed {seed}, {level:?}"),
            &y.to_f64(),
            &expected,
            |i| rounding * expected[i].abs(),
        );
    }
}

#[test]
fn input_is_normalised() {
    let pool = &mut Pool::new(1);
    for seed in 0..9 {
        check_input::<f32>(pool, seed);
        check_input::<bf16>(pool, seed);
    }
}

fn check_sum<T: Element>(pool: &mut Pool, seed: u64) {
    let r = &mut Random::new(seed);
    let size = (1 + r.below(200), 1 + r.below(70));
    let (pixels, channels) = r.pick(&[(1, 1), (15, 7), (49, 33), (30, 64), size, (1600, 130)]);
    let values = r.pick(&[Values::Whole, Values::Real]);
    let main = Input::<T>::new(r, values, Reads::Norm { relu: false }, pixels, channels);
    let reads = (r.below(5) > 0).then(|| r.pick(&READS));
    let side = reads.map(|reads| Input::<T>::new(r, values, reads, pixels, channels));
    // Images of some pixels each, and the last of fewer.
    let of_image = 1 + r.below(pixels);
    let factors = pixels.div_ceil(of_image) * channels;
    let gate = (r.below(2) > 0).then(|| values.tensor::<f32>(r, factors));
    for relu in [false, true] {
        let (mut expected, mut tolerances) = (main.means.clone(), main.sizes.clone());
        if let Some(gate) = &gate {
            let gate = gate.to_f64();
            for i in 0..expected.len() {
                let factor = gate[i / channels / of_image * channels + i % channels];
                expected[i] *= factor;
                tolerances[i] *= factor.abs();
            }
        }
        if let Some(side) = &side {
            expected
                .iter_mut()
                .zip(&side.means)
                .for_each(|(v, s)| *v += s);
            tolerances
                .iter_mut()
                .zip(&side.sizes)
                .for_each(|(v, s)| *v += s);
        }
        if relu {
            expected.iter_mut().for_each(|v| *v = v.max(0.0));
        }
        for (v, t) in expected.iter_mut().zip(&mut tolerances) {
            match values {
                Values::Whole => (*v, *t) = (rounded::<T>(*v), 0.0),
                // Up to two products and four sums.
                Values::Real => {
                    *t = 3.0 * EPS * *t + if is_bf16::<T>() { BF16 * v.abs() } else { 0.0 }
                }
            }
        }
        for level in levels() {
            for stream in [false, true] {
                if stream && channels % 32 > 0 {
                    continue;
                }
                let y = Guarded::<T>::unset(pixels * channels);
                let source = side.as_ref().map(Input::source);
                norm::sum(
                    pool,
                    level,
                    (pixels, channels),
                    main.source(),
                    gate.as_ref().map(|gate| (gate.span(), of_image)),
                    source,
                    relu,
                    y.span(),
                    stream,
                );
                let what = || {
                    format!("{pixels} x {channels}, {reads:?}, {values:?}, {level}, seed {seed}")
                };
                check_all(what, &y.to_f64(), &expected, |i| tolerances[i]);
            }
        }
    }
}

#[test]
fn sums_of_blocks() {
    let pool = &mut Pool::new(1);
    for seed in 6000..6040 {
        check_sum::<f32>(pool, seed);
        check_sum::<bf16>(pool, seed);
    }
}

// ---------------------------------------------------------------- threads

/// Pools of several sizes and both orders of tasks.
fn pools() -> Vec<Pool> {
    let pool = |(threads, is_reversed)| {
        let mut pool = Pool::new(threads);
        pool.is_reversed = is_reversed;
        pool
    };
    let all = [(1, false), (1, true), (2, false), (3, false), (3, true)];
    all.into_iter().map(pool).collect()
}

/// Whether all pools leave the same bytes.
fn check_threads(what: &dyn Debug, run: impl Fn(&mut Pool) -> Vec<u8>) {
    let mut all = pools().into_iter().map(|mut pool| run(&mut pool));
    let first = all.next().expect("there are pools");
    assert!(all.all(|other| other == first), "{what:?}");
}

#[test]
fn bits_do_not_depend_on_threads_or_on_the_order_of_tasks() {
    let level = Level::detect();
    for case in large_cases() {
        let (input, w, closing) = case.operands::<bf16>();
        check_threads(&case, |pool| {
            let all = ARITHMETICS
                .map(|arithmetic| case.run(pool, level, arithmetic, &input, &w, &closing));
            let bytes = all
                .iter()
                .flat_map(|ran| [ran.out.bytes(), ran.partials.bytes()]);
            bytes.collect::<Vec<_>>().concat()
        });
    }
    for case in weight_cases() {
        let case = WeightCase {
            values: Values::Real,
            ..case
        };
        // The largest only take longer.
        if case.batch * case.g.macs() > 1 << 24 {
            continue;
        }
        let (x, d, before) = case.operands::<bf16>();
        check_threads(&case, |pool| {
            case.run(pool, level, &x, &d, &before).bytes().to_vec()
        });
    }
    // Several tasks for an image.
    let plane = Plane {
        h: 40,
        w: 28,
        c: 130,
    };
    let r = &mut Random::new(8);
    let d = Values::Real.tensor::<f32>(r, 2 * plane.c);
    let ends = Ends::Join {
        add: true,
        y: true,
        norms: 2,
    };
    let closing = Closing::<bf16>::new(r, Values::Real, ends, 2 * plane.pixels(), plane.c);
    assert!(pixels::visits(plane, 2) > 2, "an image has several tasks");
    check_threads(&plane, |pool| {
        let out = closing.out(true);
        let columns = plane.c.next_multiple_of(2 * level.lanes());
        let all = Guarded::<f32>::unset(pixels::visits(plane, 2) * Partials::record_len(columns));
        let partials = Partials {
            all: all.span(),
            columns,
        };
        let to = Out {
            y: out.span(),
            channels: plane.c,
            stream: false,
        };
        let epilogue = closing.epilogue(&out, true);
        pixels::avg_pool_backward(pool, level, plane, 2, d.span(), to, epilogue, partials);
        let (sums, m) = (Mutex::new(vec![[0u8; 16]; plane.c]), 2 * plane.pixels());
        let rows = Guarded::<f32>::of(&vec![1.0; STATE_ROWS * plane.c]);
        norm::gradient(
            pool,
            partials,
            1,
            m,
            State::new(rows.span()),
            |c, dgamma, dbeta| {
                let bytes = [dgamma.to_le_bytes(), dbeta.to_le_bytes()].concat();
                sums.lock().unwrap()[c].copy_from_slice(&bytes);
            },
        );
        let sums = sums.into_inner().unwrap().concat();
        [out.bytes(), all.bytes(), rows.bytes(), &sums].concat()
    });
}

// ---------------------------------------------------------------- layouts, memory

#[test]
fn weights_lie_where_panels_say() {
    for (kernel, inputs, outputs, nr) in [
        (3, 70, 33, 16),
        (1, 5, 1, 32),
        (7, 3, 64, 32),
        (3, 130, 40, 32),
    ] {
        let g = geometry(kernel, 1, (8, 8), inputs, outputs);
        let panels = Panels::of(&g, nr);
        let w: Vec<f64> = (1..=g.depth() * outputs).map(|i| i as f64).collect();
        let all = in_panels(&g, nr, &w);
        assert_eq!(panels.len(), all.len());
        for (at, v) in w.iter().enumerate() {
            let (o, i, tap) = (
                at / panels.taps / inputs,
                at / panels.taps % inputs,
                at % panels.taps,
            );
            assert_eq!(all[panels.at(o, i, tap)], *v, "{panels:?}: {o}, {i}, {tap}");
        }
    }
}

#[test]
fn blocks_are_zeroed_and_aligned() {
    for bytes in [0, 1, 64, 1000, (4 << 20) - 1, 4 << 20, (4 << 20) + 100] {
        let block = Block::new(bytes).unwrap();
        assert_eq!(block.bytes(), bytes);
        let all = block.all::<u8>();
        assert!(
            all.ptr().addr().is_multiple_of(super::ALIGNMENT),
            "{bytes} bytes"
        );
        // SAFETY: nobody else knows the block.
        let values = unsafe { all.get_mut() };
        assert!(
            values.len() == bytes && values.iter().all(|v| *v == 0),
            "{bytes} bytes"
        );
        values.fill(1);
    }
}

// ---------------------------------------------------------------- instructions

/// Values where rounding and comparisons are special, then random ones; a whole number of vectors.
fn special_values() -> Vec<f32> {
    let bits: [u32; 40] = [
        // Zeros, ones, infinities, NaN: quiet, signalling, with the payload in low bits only.
        0x0000_0000,
        0x8000_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0xffc0_0000,
        0x7f80_0001,
        0xff80_0001,
        0x7fff_ffff,
        0xffff_ffff,
        0x7f81_0000,
        0x7fa0_1234,
        // Ties of bf16, to even down and up, and their neighbours.
        0x3f80_8000,
        0x3f81_8000,
        0x3f80_7fff,
        0x3f80_8001,
        0xbf80_8000,
        0xbf81_8000,
        0xbf81_7fff,
        0xbf81_8001,
        // The largest: just below the tie to infinity, at it, above.
        0x7f7f_0000,
        0x7f7f_7fff,
        0x7f7f_8000,
        0x7f7f_ffff,
        0xff7f_7fff,
        0xff7f_8000,
        // Subnormal, ties among them, the smallest normal.
        0x0000_0001,
        0x0000_8000,
        0x0000_8001,
        0x0001_8000,
        0x8000_8000,
        0x807f_ffff,
        0x007f_8000,
        0x0080_0000,
        // A carry into the exponent.
        0x3fff_8000,
        0x3fff_ffff,
        0xbfff_8000,
        0x40ff_7fff,
    ];
    let r = &mut Random::new(1);
    let mut values: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
    values.extend((0..300).map(|_| f32::from_bits(r.bits() as u32)));
    values.extend((0..300).map(|_| r.real() as f32 * 4.0));
    values.truncate(values.len() / 16 * 16);
    values
}

/// The nearest bf16 by distance, of two that are as near the even one.
fn nearest_bf16(v: f32) -> u16 {
    let down = (v.to_bits() >> 16) as u16;
    if v.is_nan() {
        // Quiet; the sign and the upper payload stay.
        return down | 0x40;
    }
    if v.is_infinite() {
        return down;
    }
    let up = down + 1;
    // Infinity counts as the power of two that would be next.
    let size = |b: u16| {
        let v = f32::from_bits(u32::from(b & 0x7fff) << 16);
        if v.is_infinite() {
            2f64.powi(128)
        } else {
            f64::from(v)
        }
    };
    let (below, above) = (
        f64::from(v.abs()) - size(down),
        size(up) - f64::from(v.abs()),
    );
    match below.total_cmp(&above) {
        std::cmp::Ordering::Less => down,
        std::cmp::Ordering::Greater => up,
        std::cmp::Ordering::Equal => [down, up].into_iter().find(|b| b % 2 == 0).unwrap_or(down),
    }
}

/// A function of three vectors.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Add,
    Sub,
    Mul,
    Fma,
    Fnma,
    Max,
    Gt,
    Eq,
    NotLe0,
    Select,
    Dot2,
    Zero,
    Splat,
    ToArray,
}

const OPS: [Op; 14] = [
    Op::Add,
    Op::Sub,
    Op::Mul,
    Op::Fma,
    Op::Fnma,
    Op::Max,
    Op::Gt,
    Op::Eq,
    Op::NotLe0,
    Op::Select,
    Op::Dot2,
    Op::Zero,
    Op::Splat,
    Op::ToArray,
];

/// Applies an operation to arrays of equal length, a multiple of 16.
struct Apply<'a> {
    op: Op,
    a: &'a [f32],
    b: &'a [f32],
    c: &'a [f32],
    to: &'a mut [f32],
}

impl Job for Apply<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        for at in (0..self.to.len()).step_by(I::LANES) {
            // SAFETY: the arrays hold whole vectors.
            unsafe {
                let [a, b, c] = [self.a, self.b, self.c].map(|v| I::load(v[at..].as_ptr()));
                let (zero, one) = (I::zero(), I::splat(1.0));
                let v = match self.op {
                    Op::Add => I::add(a, b),
                    Op::Sub => I::sub(a, b),
                    Op::Mul => I::mul(a, b),
                    Op::Fma => I::fma(a, b, c),
                    Op::Fnma => I::fnma(a, b, c),
                    Op::Max => I::max(a, b),
                    Op::Gt => I::select(I::gt(a, b), one, zero),
                    Op::Eq => I::select(I::eq(a, b), one, zero),
                    Op::NotLe0 => I::select(I::not_le0(a), one, zero),
                    Op::Select => I::select(I::gt(a, zero), b, c),
                    Op::Dot2 => I::dot2(c, a, b),
                    Op::Zero => I::zero(),
                    Op::Splat => I::splat(self.a[0]),
                    Op::ToArray => I::load(I::to_array(a).as_ptr()),
                };
                I::store(self.to[at..].as_mut_ptr(), v);
            }
        }
    }
}

/// What an operation makes of a lane: bits, or a sum of two products and a number.
enum Lane {
    Bits(u32),
    Sum([f64; 3]),
}

impl Lane {
    fn holds(&self, op: Op, found: f32) -> bool {
        match *self {
            Self::Bits(bits) => {
                // What is computed may be any NaN, what is moved is the same.
                let is_moved = matches!(op, Op::Select | Op::Max | Op::Splat | Op::ToArray);
                let is_nan = found.is_nan() && f32::from_bits(bits).is_nan();
                found.to_bits() == bits || is_nan && !is_moved
            }
            Self::Sum(terms) => {
                let [p, q, c] = terms;
                let (sum, found) = (p + q + c, f64::from(found));
                // Where f32 overflows on the way, the order of the roundings decides.
                let overflows = |v: f64| v.is_finite() && v.abs() > f64::from(f32::MAX) * 0.99;
                if [p, q, p + q, p + c, q + c, sum].into_iter().any(overflows) {
                    return true;
                }
                // Each product is rounded or not, and each sum; the dot products of bf16 flush what is subnormal.
                let size: f64 = terms.iter().map(|v| v.abs()).sum();
                let error = 2.0 * EPS * size + 4.0 * f64::from(f32::MIN_POSITIVE);
                found == sum || found.is_nan() && sum.is_nan() || (found - sum).abs() <= error
            }
        }
    }
}

fn lane(level: Level, op: Op, first: f32, [a, b, c]: [f32; 3]) -> Lane {
    let truth = |v: bool| Lane::Bits(if v { 1.0f32 } else { 0.0 }.to_bits());
    let [wide_a, wide_b, wide_c] = [a, b, c].map(f64::from);
    let half = |bits: u32| {
        let v = f32::from_bits(bits << 16);
        let is_flushed = level >= Level::Avx512Bf16 && v.is_subnormal();
        if is_flushed { 0.0 } else { f64::from(v) }
    };
    let halves = |v: f32| [half(v.to_bits()), half(v.to_bits() >> 16)];
    match op {
        Op::Add => Lane::Bits((a + b).to_bits()),
        Op::Sub => Lane::Bits((a - b).to_bits()),
        Op::Mul => Lane::Bits((a * b).to_bits()),
        Op::Fma => Lane::Sum([wide_a * wide_b, 0.0, wide_c]),
        Op::Fnma => Lane::Sum([-wide_a * wide_b, 0.0, wide_c]),
        Op::Max => Lane::Bits(if a > b { a } else { b }.to_bits()),
        Op::Gt => truth(a > b),
        Op::Eq => truth(a == b),
        Op::NotLe0 => truth(a.is_nan() || a > 0.0),
        Op::Select => Lane::Bits(if a > 0.0 { b } else { c }.to_bits()),
        Op::Dot2 => {
            let ([a0, a1], [b0, b1]) = (halves(a), halves(b));
            Lane::Sum([a0 * b0, a1 * b1, wide_c])
        }
        Op::Zero => Lane::Bits(0),
        Op::Splat => Lane::Bits(first.to_bits()),
        Op::ToArray => Lane::Bits(a.to_bits()),
    }
}

#[test]
fn every_instruction_is_that_of_every_other_level() {
    let a = special_values();
    for shift in [0, 1, 7, 101] {
        let rotated =
            |by: usize| -> Vec<f32> { a.iter().cycle().skip(by).take(a.len()).copied().collect() };
        let (b, c) = (rotated(shift), rotated(2 * shift + 3));
        for level in levels() {
            for op in OPS {
                let mut to = vec![0.0f32; a.len()];
                let job = Apply {
                    op,
                    a: &a,
                    b: &b,
                    c: &c,
                    to: &mut to,
                };
                // SAFETY: the level is available.
                unsafe { level.call(job) };
                for i in 0..a.len() {
                    let is_same = lane(level, op, a[0], [a[i], b[i], c[i]]).holds(op, to[i]);
                    assert!(
                        is_same,
                        "{level}: {op:?} of {:e}, {:e}, {:e} is {:e}",
                        a[i], b[i], c[i], to[i]
                    );
                }
            }
        }
    }
}

/// Moves `n` values of each type, or whole vectors.
struct Move<'a, T: Element> {
    /// A vector has at most 16.
    n: Option<usize>,
    from: &'a [T],
    wide: &'a mut [f32],
    values: &'a [f32],
    to: *mut T,
    stream: bool,
    lanes: &'a mut usize,
}

impl<T: Element> Job for Move<'_, T> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        *self.lanes = I::LANES;
        // SAFETY: all hold a vector, or the n values that are asked for.
        unsafe {
            let v = I::load(self.values.as_ptr());
            let from = match self.n {
                Some(n) => T::load_part::<I>(self.from.as_ptr(), n),
                None => T::load::<I>(self.from.as_ptr()),
            };
            I::store(self.wide.as_mut_ptr(), from);
            match self.n {
                Some(n) => T::store_part::<I>(self.to, v, n),
                None if self.stream => T::stream::<I>(self.to, v),
                None => T::store::<I>(self.to, v),
            }
        }
    }
}

fn check_moves<T: Element>() {
    let special = special_values();
    let stored: Vec<f32> = special.iter().filter(|v| !v.is_nan()).copied().collect();
    for level in levels() {
        for at in (0..special.len() - 16).step_by(8) {
            for n in (0..=level.lanes()).map(Some).chain([None]) {
                let count = n.unwrap_or(level.lanes());
                // Exactly as many as may be read; an address that is aligned to nothing.
                let from: Vec<f64> = stored[at % 400..][..1 + count]
                    .iter()
                    .map(|v| f64::from(*v))
                    .collect();
                let from = Guarded::<T>::of(&from);
                let values = &special[at..at + 16];
                for stream in [false, true] {
                    let to = Guarded::<T>::unset(17);
                    let (mut wide, mut lanes) = (vec![f32::NAN; 16], 0);
                    // Streams need an alignment, others none.
                    let first = usize::from(!stream);
                    let job = Move {
                        n,
                        from: &from.get()[1..],
                        wide: &mut wide,
                        values,
                        to: to.span().part(first..17).ptr(),
                        stream,
                        lanes: &mut lanes,
                    };
                    // SAFETY: the level is available; `from` has n values, `to` a vector.
                    unsafe { level.call(job) };
                    assert_eq!(lanes, level.lanes());
                    let what = || format!("{level}, {n:?} of {at}, {} bytes", size_of::<T>());
                    let expected = |i: usize| {
                        if i < count {
                            from.get()[1 + i].to_f32()
                        } else {
                            0.0
                        }
                    };
                    for (i, v) in wide.iter().enumerate().take(lanes) {
                        assert_eq!(v.to_bits(), expected(i).to_bits(), "{}: loaded {i}", what());
                    }
                    let bytes = to.bytes().chunks_exact(size_of::<T>());
                    for (i, bytes) in bytes.enumerate() {
                        let found: Vec<u8> = if i >= first && i < first + count {
                            let v = values[i - first];
                            if is_bf16::<T>() {
                                let bits = nearest_bf16(v);
                                // The conversion of AVX512-BF16 takes subnormals for zero.
                                let is_flushed = v.is_subnormal() && level >= Level::Avx512Bf16;
                                let bits = if is_flushed { bits & 0x8000 } else { bits };
                                bits.to_ne_bytes().to_vec()
                            } else {
                                v.to_ne_bytes().to_vec()
                            }
                        } else {
                            vec![0xff; size_of::<T>()]
                        };
                        assert!(
                            bytes == found,
                            "{}: stored {i}: {bytes:?}, not {found:?}",
                            what()
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn values_are_loaded_and_stored_where_they_belong() {
    check_moves::<f32>();
    check_moves::<bf16>();
}

/// Bytes, halves of a vector far from each other, pairs.
struct Bytes<'a> {
    n: usize,
    from: &'a [u8],
    pair: &'a [bf16],
    wide: &'a mut [f32],
    to: *mut u8,
    far: *mut f32,
    pitch: usize,
    pairs: &'a mut [f32],
}

impl Job for Bytes<'_> {
    #[inline(always)]
    unsafe fn run<I: Isa>(self) {
        // SAFETY: there are 16 bytes, two halves, two bf16, and room for n bytes.
        unsafe {
            let v = I::load_u8(self.from.as_ptr());
            I::store(self.wide.as_mut_ptr(), v);
            I::store_u8(self.to, v, self.n);
            I::scatter8(self.far, self.pitch, v);
            I::store(self.pairs.as_mut_ptr(), I::splat_pair(self.pair.as_ptr()));
        }
    }
}

#[test]
fn bytes_halves_and_pairs_move_as_they_should() {
    for level in levels() {
        let lanes = level.lanes();
        for n in 0..=lanes {
            for first in [0, 100, 240] {
                let from: Vec<u8> = (0..lanes).map(|i| (first + i) as u8).collect();
                let from = Guarded::holding(&from);
                let pair = Guarded::holding(&[
                    bf16::from_f32(9.0),
                    bf16::from_f32(-1.5),
                    bf16::from_f32(0.25),
                ]);
                let (to, far) = (Guarded::<u8>::unset(17), Guarded::<f32>::unset(40));
                let (mut wide, mut pairs) = (vec![f32::NAN; 16], vec![f32::NAN; 16]);
                let pitch = 19;
                let job = Bytes {
                    n,
                    from: from.get(),
                    pair: &pair.get()[1..],
                    wide: &mut wide,
                    to: to.span().part(1..17).ptr(),
                    far: far.span().part(1..40).ptr(),
                    pitch,
                    pairs: &mut pairs,
                };
                // SAFETY: the level is available; `Bytes` has what it says.
                unsafe { level.call(job) };
                let mut bytes = vec![0xffu8; 17];
                bytes[1..1 + n].copy_from_slice(&from.get()[..n]);
                assert_eq!(to.bytes(), bytes, "{level}: {n} bytes");
                far.bytes();
                let mut spread = [f32::NAN; 40];
                for (i, byte) in from.get().iter().enumerate() {
                    assert_eq!(wide[i], f32::from(*byte), "{level}");
                    spread[1 + i / 8 * pitch + i % 8] = f32::from(*byte);
                }
                for (i, (found, expected)) in far.get().iter().zip(spread).enumerate() {
                    let is_same = found == &expected || found.is_nan() && expected.is_nan();
                    assert!(
                        is_same,
                        "{level}: {i} of scattered halves is {found}, not {expected}"
                    );
                }
                let bits =
                    u32::from(pair.get()[1].to_bits()) | u32::from(pair.get()[2].to_bits()) << 16;
                assert!(
                    pairs[..lanes].iter().all(|v| v.to_bits() == bits),
                    "{level}: pairs"
                );
            }
        }
    }
}
