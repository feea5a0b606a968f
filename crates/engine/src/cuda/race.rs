//! Which convolution is the fastest on this card: plans of cuDNN against each other and against our own kernels.
//!
//! Ours are taken only where they say the same as cuDNN's, on random tensors, and the same bits when they are asked
//! again: so they prove themselves on every card that they run on.

use graph::Plane;

use super::cudnn::{self, Bound, Conv, Device, Plan, Product, Tensors};
use super::driver::{Address, Arg, Event, Gpu, SOURCE_WITH_CONVOLUTIONS, THREADS, hash};
use super::own::Launches;
use super::{Call, Convolutions, Options, Precision, libraries};
use crate::{Cache, Error};

/// Who computes a convolution.
pub(crate) enum Choice {
    Plan(Plan),
    Own,
}

/// What a race is run with.
pub(crate) struct Race<'a> {
    pub(crate) options: &'a Options,
    pub(crate) gpu: &'a Gpu,
    pub(crate) device: &'a Device,
    pub(crate) own: Launches,
    pub(crate) cache: &'a dyn Cache,
    /// Parameters as convolutions read them, which stay as they are.
    pub(crate) parameters: std::ops::Range<Address>,
}

/// What the cache keeps where our own have won.
const OWN: &[u8] = b"own";

/// How often each is run for its time.
const RUNS: usize = 3;

/// Pixels at the end of a sum that are compared alone: two stages of the kernels of 16 bits.
const LAST_PIXELS: usize = 64;

/// Blocks of a kernel that compares.
const BLOCKS: usize = 512;

impl Race<'_> {
    /// The fastest way for a convolution: the one that the cache knows, or the winner of a race on the card. Its tensors
    /// are overwritten.
    pub(crate) fn winner(&self, conv: &Conv, at: Tensors) -> Result<Choice, Error> {
        let key = self.key(conv);
        let known = self.cache.get(&key);
        if let Some(choice) = known.as_deref().and_then(|bytes| self.load(conv, bytes)) {
            return Ok(choice);
        }
        self.fill(conv, at)?;
        let (time, plan) = self.fastest_plan(conv, at)?;
        let is_own = self
            .own_wins(conv, at, &plan, time)
            .and_then(|wins| match wins {
                true => self.own_agrees(conv, at, &plan),
                false => Ok(Some(false)),
            })
            .map_err(|e| {
                let said = e.to_string();
                let what = said.lines().next().unwrap_or_default();
                Error::device(
                    format!("our own convolution {} fails: {what}", conv.name()),
                    "train.convolutions = \"cudnn\" does without; please report it with what runner doctor says",
                )
            })?;
        let choice = match is_own {
            Some(true) => Choice::Own,
            Some(false) => Choice::Plan(plan),
            // Another time there may be room to compare.
            None => return Ok(Choice::Plan(plan)),
        };
        let bytes = match &choice {
            Choice::Own => OWN.to_vec(),
            Choice::Plan(plan) => plan.json(),
        };
        // One that no longer loads is replaced. Else the winner of whoever was first is everybody's, so that runs that share
        // a cache compute the same bits, now and when they are resumed.
        if known.is_some() {
            self.cache.put(&key, &bytes);
            return Ok(choice);
        }
        self.cache.put_first(&key, &bytes);
        let first = self.cache.get(&key).filter(|first| *first != bytes);
        let first = first.and_then(|bytes| self.load(conv, &bytes));
        Ok(first.unwrap_or(choice))
    }

    /// Names the race: whatever may change its winner, or what it computes.
    fn key(&self, conv: &Conv) -> String {
        let Options {
            precision,
            deterministic,
            convolutions,
            ..
        } = self.options;
        let own = match convolutions {
            Convolutions::Fastest => {
                let source = hash(SOURCE_WITH_CONVOLUTIONS.as_bytes());
                let (major, minor) = libraries().nvrtc.unwrap_or_default();
                format!("{}.{source:016x}.{major}.{minor}", Launches::FORM)
            }
            _ => "none".into(),
        };
        format!(
            "cudnn{}-{}-{own}-{}-{precision}{}-{}.json",
            cudnn::FORM,
            cudnn::version(),
            self.gpu.card.name.replace(' ', "_"),
            if *deterministic { "" } else { "-any" },
            conv.name()
        )
    }

    fn load(&self, conv: &Conv, bytes: &[u8]) -> Option<Choice> {
        if bytes == OWN {
            return self.own.fits(conv).then_some(Choice::Own);
        }
        let plan = Plan::load(self.device, bytes)?;
        (plan.workspace <= self.options.workspace).then_some(Choice::Plan(plan))
    }

    /// Milliseconds of what `begin` puts on the stream, as a step does: recorded. None if it does not run here.
    fn time(&self, begin: impl Fn() -> Result<(), Error>) -> Result<Option<f32>, Error> {
        if begin().is_err() {
            return Ok(None);
        }
        self.gpu.wait()?;
        let Ok(captured) = self.gpu.capture(|| (0..RUNS).try_for_each(|_| begin())) else {
            return Ok(None);
        };
        let (start, end) = (Event::new()?, Event::new()?);
        start.record(self.gpu.stream)?;
        self.gpu.replay(&captured)?;
        end.record(self.gpu.stream)?;
        end.wait()?;
        start.milliseconds(&end).map(Some)
    }

    fn fastest_plan(&self, conv: &Conv, at: Tensors) -> Result<(f32, Plan), Error> {
        let fail = |e| {
            Error::device(
                e,
                "another cuDNN may have one; train.precision or train.bn_batch change the question",
            )
        };
        let plans = cudnn::candidates(conv, self.options, self.device, cudnn::TIMED);
        let bound = Bound::new(at, self.own.workspace)?;
        let mut best: Option<(f32, Plan)> = None;
        for plan in plans.map_err(fail)? {
            // A plan that does not run here drops out.
            let Some(time) = self.time(|| bound.run(self.device, &plan))? else {
                continue;
            };
            if best.as_ref().is_none_or(|(fastest, _)| time < *fastest) {
                best = Some((time, plan));
            }
        }
        best.ok_or_else(|| fail(format!("no plan of cuDNN runs {}", conv.name())))
    }

    fn launch(&self, call: &Call) -> Result<(), Error> {
        let Call::Launch {
            name, grid, args, ..
        } = call
        else {
            unreachable!("our own convolutions are launches")
        };
        self.gpu.launch(name, *grid, &mut args.clone())
    }

    fn run_own(&self, conv: &Conv, at: Tensors) -> Result<(), Error> {
        let mut calls = self.own.calls(conv, at).into_iter();
        calls.try_for_each(|call| self.launch(&call))
    }

    /// Whether our own are faster than a plan that has taken `time`; it may run once more, last, when the card is warm.
    fn own_wins(&self, conv: &Conv, at: Tensors, plan: &Plan, time: f32) -> Result<bool, Error> {
        if self.options.convolutions != Convolutions::Fastest || !self.own.fits(conv) {
            return Ok(false);
        }
        let Some(own) = self.time(|| self.run_own(conv, at))? else {
            return Ok(false);
        };
        if own >= time {
            return Ok(false);
        }
        let bound = Bound::new(at, self.own.workspace)?;
        let again = self.time(|| bound.run(self.device, plan))?;
        Ok(again.is_none_or(|again| own < again))
    }

    /// Whether our own say what a plan says, and the same bits again; none without room to compare.
    fn own_agrees(&self, conv: &Conv, at: Tensors, plan: &Plan) -> Result<Option<bool>, Error> {
        let (result, values) = result(conv, at);
        let Ok(second) = self.gpu.block(values * self.options.precision.bytes()) else {
            return Ok(None);
        };
        let (mut ours, to) = (at, second.address);
        match conv.product {
            Product::Forward => ours.y = to,
            Product::Input => ours.x = to,
            Product::Weight => ours.w = to,
        }
        let agree = || {
            Bound::new(at, self.own.workspace)?.run(self.device, plan)?;
            self.run_own(conv, ours)?;
            let (gap, size) = self.compare(to, result, values)?;
            let allowed = tolerance(self.options.precision) * size;
            if !(size > 0.0 && size.is_finite() && gap <= allowed) {
                return Ok(false);
            }
            self.run_own(conv, at)?;
            Ok::<bool, Error>(self.compare(to, result, values)?.0 == 0.0)
        };
        if !agree()? {
            return Ok(Some(false));
        }
        if conv.product != Product::Weight {
            return Ok(Some(true));
        }
        // Of a sum over millions of pixels the last few are less than a rounding: once more with those alone.
        let (pixels, channels) = (
            conv.batch * conv.geometry.output.pixels(),
            conv.geometry.output.c,
        );
        let last = pixels.min(LAST_PIXELS);
        let element = self.options.precision.bytes();
        self.gpu.clear(at.y, pixels * channels * element)?;
        let from = at.y + ((pixels - last) * channels * element) as Address;
        self.random(from, last * channels, 3)?;
        agree().map(Some)
    }

    /// The largest difference of two tensors, and the largest value of the second; infinite where one is not finite.
    fn compare(&self, a: Address, b: Address, values: usize) -> Result<(f32, f32), Error> {
        let found = self.gpu.block(2 * BLOCKS * size_of::<f32>())?;
        let mut args = [
            Arg::address(a),
            Arg::address(b),
            Arg::long(values),
            Arg::address(found.address),
        ];
        self.gpu.launch("compare", (BLOCKS as u32, 1), &mut args)?;
        let found: Vec<f32> = self.gpu.download(found.address, 2 * BLOCKS)?;
        let largest = |which: usize| {
            let values = found.iter().skip(which).step_by(2);
            values.fold(0.0, |a: f32, b| a.max(*b))
        };
        Ok((largest(0), largest(1)))
    }

    /// Random values for what a convolution reads, but for parameters.
    fn fill(&self, conv: &Conv, at: Tensors) -> Result<(), Error> {
        let g = &conv.geometry;
        let plane = |plane: Plane| conv.batch * plane.elements();
        let weights = g.depth() * g.output.c;
        let tensors = [
            (at.x, plane(g.input), Product::Input),
            (at.w, weights, Product::Weight),
            (at.y, plane(g.output), Product::Forward),
        ];
        for (seed, (to, values, written_by)) in tensors.into_iter().enumerate() {
            if conv.product == written_by || self.parameters.contains(&to) {
                continue;
            }
            self.random(to, values, seed)?;
        }
        Ok(())
    }

    fn random(&self, to: Address, values: usize, seed: usize) -> Result<(), Error> {
        let mut args = [Arg::address(to), Arg::long(values), Arg::int(seed)];
        let blocks = values.div_ceil(THREADS as usize).min(4 * BLOCKS);
        self.gpu.launch("fill", (blocks as u32, 1), &mut args)
    }
}

/// What a convolution writes, and how many values.
fn result(conv: &Conv, at: Tensors) -> (Address, usize) {
    let g = &conv.geometry;
    match conv.product {
        Product::Forward => (at.y, conv.batch * g.output.elements()),
        Product::Input => (at.x, conv.batch * g.input.elements()),
        Product::Weight => (at.w, g.depth() * g.output.c),
    }
}

/// By how much two convolutions may differ, as a part of the largest value: a rounding of what is stored, or, of f32,
/// sums of up to some million terms in another order.
fn tolerance(precision: Precision) -> f32 {
    match precision {
        Precision::F32 => 1e-4,
        Precision::Tf32 | Precision::F16 => 4e-3,
        Precision::Bf16 => 1.6e-2,
    }
}
