//! Several cards of one host as one engine: each trains its part of every batch, and all keep the same parameters.
//!
//! A rank is a card and, in every call, a thread. A batch's micro-batches are dealt to the ranks in order, as many to
//! each; how gradients become one sum is told in `collective`.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use graph::Graph;

use super::collective::{Collective, inbox_bytes};
use super::nccl::Group;
use super::{Card, Cuda, Memory, Options, libraries, nccl};
use crate::state;
use crate::{Batch, Cache, Engine, Error, Hyper, Metrics, Pixels, Started, State};

/// The engine.
pub struct Ranks {
    engines: Vec<Cuda>,
    links: Vec<Arc<dyn Collective>>,
    /// Whether any of them has failed.
    failed: Arc<AtomicBool>,
    micro_batch: usize,
    ordinals: Vec<usize>,
    /// Steps begun and not finished, oldest first: number and what each rank has started.
    running: VecDeque<(u64, Vec<Started>)>,
    steps: u64,
}

/// What the cards have found out: the first knows it for all, so that they choose the same plans.
#[derive(Clone)]
struct Shared(Arc<Mutex<Found>>);

struct Found {
    known: BTreeMap<String, Vec<u8>>,
    below: Box<dyn Cache>,
}

impl Shared {
    fn found(&self) -> MutexGuard<'_, Found> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cache for Shared {
    fn get(&self, name: &str) -> Option<Vec<u8>> {
        let found = self.found();
        let known = found.known.get(name).cloned();
        known.or_else(|| found.below.get(name))
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        let mut found = self.found();
        found.known.insert(name.into(), bytes.into());
        found.below.put(name, bytes);
    }

    fn put_first(&self, name: &str, bytes: &[u8]) {
        let mut found = self.found();
        found.below.put_first(name, bytes);
        let first = found.below.get(name).unwrap_or_else(|| bytes.into());
        found.known.entry(name.into()).or_insert(first);
    }
}

/// Part `rank` of `ranks` of `images`, in whole micro-batches.
fn part(images: usize, micro_batch: usize, rank: usize, ranks: usize) -> Range<usize> {
    let micro_batches = images.div_ceil(micro_batch);
    let at = |rank: usize| (micro_batches * rank / ranks * micro_batch).min(images);
    at(rank)..at(rank + 1)
}

impl Ranks {
    /// An engine on the cards `ordinals`, each as `options` say but for its number.
    ///
    /// # Errors
    /// As [`Cuda::new`], for any of the cards; if NCCL is missing, or the cards find no way to each other.
    pub fn new(
        graph: &Graph,
        ordinals: &[usize],
        options: &Options,
        state: &State,
        cache: Box<dyn Cache>,
    ) -> Result<Self, Error> {
        let group = Group::new()?;
        let known = BTreeMap::new();
        let cache = Shared(Arc::new(Mutex::new(Found {
            known,
            below: cache,
        })));
        let mut engines = vec![];
        for ordinal in ordinals {
            let options = Options {
                ordinal: *ordinal,
                ..*options
            };
            engines.push(Cuda::new(graph, &options, state, Box::new(cache.clone()))?);
        }
        let mut ranks = Self {
            engines,
            links: vec![],
            failed: Arc::default(),
            micro_batch: options.micro_batch,
            ordinals: ordinals.to_vec(),
            running: VecDeque::new(),
            steps: 0,
        };
        let (count, failed) = (ordinals.len(), ranks.failed.clone());
        ranks.links = ranks.each(|rank, cuda| {
            cuda.gpu.enter()?;
            let link = group.join(rank, count, failed.clone())?;
            cuda.join(link.clone())?;
            Ok(link)
        })?;
        Ok(ranks)
    }

    /// Asks every rank, each on a thread of its own. When one fails, the others no longer wait for it.
    fn each<R: Send>(
        &mut self,
        ask: impl Fn(usize, &mut Cuda) -> Result<R, Error> + Sync,
    ) -> Result<Vec<R>, Error> {
        let first: Mutex<Option<Error>> = Mutex::new(None);
        let failed = &*self.failed;
        let ask = |rank: usize, cuda: &mut Cuda| {
            let panic = match catch_unwind(AssertUnwindSafe(|| ask(rank, cuda))) {
                Ok(Ok(found)) => return Some(found),
                Ok(Err(error)) => {
                    // The others fail because this one has.
                    let mut first = first.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert(error);
                    None
                }
                Err(panic) => Some(panic),
            };
            failed.store(true, Ordering::Release);
            panic.and_then(|panic| resume_unwind(panic))
        };
        let found: Vec<Option<R>> = thread::scope(|scope| {
            let ask = &ask;
            let threads: Vec<_> = self
                .engines
                .iter_mut()
                .enumerate()
                .map(|(rank, cuda)| scope.spawn(move || ask(rank, cuda)))
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, Option<R>>| {
                thread.join().unwrap_or_else(|panic| resume_unwind(panic))
            };
            threads.into_iter().map(join).collect()
        });
        match first.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(found.into_iter().flatten().collect()),
        }
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        // What hangs ends before the engines wait for it.
        let links = std::mem::take(&mut self.links);
        self.each(|rank, cuda| {
            cuda.gpu.enter()?;
            if let Some(link) = links.get(rank) {
                link.leave();
            }
            Ok(())
        })
        .ok();
    }
}

/// [`probe`](super::probe) of several cards, or of all where none are named; also whether they can be joined.
///
/// # Errors
/// Names what is missing.
pub fn probe_all(ordinals: Option<&[usize]>) -> Result<Vec<Card>, Error> {
    let all: Vec<usize>;
    let ordinals = match ordinals {
        Some(ordinals) => ordinals,
        None => {
            // One at least, whose absence is told.
            all = (0..super::cards()?.len().max(1)).collect();
            &all
        }
    };
    let cards = ordinals.iter().map(|ordinal| super::probe(*ordinal));
    let cards = cards.collect::<Result<Vec<Card>, Error>>()?;
    if cards.len() > 1 {
        nccl::probe()?;
    }
    Ok(cards)
}

/// What NCCL keeps on each card for its channels to the others, about.
const CHANNELS: usize = 512 << 20;

impl Memory {
    /// The memory of each of `ranks` cards that train together by global batches of `batch` images.
    pub fn plan_rank(
        graph: &Graph,
        options: &Options,
        card: &Card,
        batch: usize,
        ranks: usize,
    ) -> Self {
        let mut memory = Self::plan(graph, options, card, batch.div_ceil(ranks));
        if ranks > 1 {
            memory.exchange = inbox_bytes(&super::calls::Layout::new(graph), ranks) + CHANNELS;
        }
        memory
    }
}

/// `0`, `0 to 3` or `0, 2, 3`.
fn numbers(ordinals: &[usize]) -> String {
    match ordinals {
        [first, .., last] if last - first + 1 == ordinals.len() => format!("{first} to {last}"),
        _ => {
            let all: Vec<String> = ordinals.iter().map(usize::to_string).collect();
            all.join(", ")
        }
    }
}

impl Engine for Ranks {
    fn describe(&self) -> String {
        let version = nccl_version(libraries().nccl.unwrap_or_default());
        let first = self.engines[0].describe();
        let first = first.split_once(": ").map_or(&*first, |(_, what)| what);
        format!(
            "cuda:{}: {} x {first}, NCCL {version}",
            numbers(&self.ordinals),
            self.engines.len()
        )
    }

    fn load(&mut self, state: &State) -> Result<(), Error> {
        state::check(&self.engines[0].graph, state)?;
        self.each(|_, cuda| cuda.load(state)).map(drop)
    }

    fn state(&self) -> Result<State, Error> {
        self.engines[0].state()
    }

    fn swap_average(&mut self) -> Result<(), Error> {
        self.engines.iter_mut().try_for_each(Cuda::swap_average)
    }

    fn train_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Metrics, Error> {
        let step = self.start_step(batch, hyper)?;
        self.finish_step(step)
    }

    fn start_step(&mut self, batch: &Batch<'_>, hyper: &Hyper) -> Result<Started, Error> {
        let (images, ranks) = (batch.images(), self.engines.len());
        if !images.is_multiple_of(self.micro_batch * ranks) {
            return Err(Error::device(
                format!(
                    "a batch of {images} images in micro-batches of {} cannot be dealt to {ranks} cards",
                    self.micro_batch
                ),
                "train.batch_size is a multiple of train.bn_batch times the number of cards",
            ));
        }
        batch.check(&self.engines[0].graph);
        let each = images / ranks;
        let parts: Vec<Batch<'_>> = batch.micro_batches(each).collect();
        let mut engines = self.engines.iter().zip(&parts);
        if !engines.all(|(cuda, part)| cuda.is_prepared(part, hyper)) {
            // The first finds the plans, the others take them. Nobody begins before all are prepared.
            self.engines[0].prepare(&parts[0], hyper)?;
            self.each(|rank, cuda| cuda.prepare(&parts[rank], hyper))?;
        }
        let started =
            self.each(|rank, cuda| cuda.start_part(&parts[rank], hyper, images, rank * each))?;
        self.steps += 1;
        self.running.push_back((self.steps, started));
        Ok(Started::Running(self.steps))
    }

    fn finish_step(&mut self, step: Started) -> Result<Metrics, Error> {
        let (number, started) = self.running.pop_front().expect("a step was begun");
        assert!(
            matches!(step, Started::Running(n) if n == number),
            "steps are finished in their order"
        );
        let started: Vec<Mutex<Option<Started>>> =
            started.into_iter().map(|s| Mutex::new(Some(s))).collect();
        let metrics = self.each(|rank, cuda| {
            let step = started[rank]
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            cuda.finish_step(step.expect("each once"))
        })?;
        Ok(sum(&metrics))
    }

    fn skipped_steps(&self) -> Result<u64, Error> {
        Engine::skipped_steps(&self.engines[0])
    }

    fn score(
        &mut self,
        batch: &Batch<'_>,
        logits: Option<&mut Vec<f32>>,
    ) -> Result<Metrics, Error> {
        batch.check(&self.engines[0].graph);
        let (images, micro_batch, ranks) = (batch.images(), self.micro_batch, self.engines.len());
        self.engines[0].gpu.enter()?;
        self.engines[0].compile(micro_batch, graph::Mode::Infer)?;
        let wants = logits.is_some();
        let found = self.each(|rank, cuda| {
            let mut logits = vec![];
            let part = batch.part(part(images, micro_batch, rank, ranks));
            if part.labels.is_empty() {
                return Ok((Metrics::default(), logits));
            }
            let metrics = cuda.score(&part, wants.then_some(&mut logits))?;
            Ok((metrics, logits))
        })?;
        let (metrics, found): (Vec<Metrics>, Vec<Vec<f32>>) = found.into_iter().unzip();
        if let Some(logits) = logits {
            logits.extend(found.into_iter().flatten());
        }
        Ok(sum(&metrics))
    }

    fn predict(&mut self, pixels: Pixels<'_>) -> Result<Vec<f32>, Error> {
        let graph = &self.engines[0].graph;
        let plane = graph.plane(graph.input());
        crate::predict(self, plane, pixels)
    }
}

/// 22809 as 2.28.9; before 2.9, 2708 as 2.7.8.
pub fn nccl_version(version: usize) -> String {
    let (major, minor) = match version {
        ..10_000 => (version / 1000, version / 100 % 10),
        _ => (version / 10_000, version / 100 % 100),
    };
    format!("{major}.{minor}.{}", version % 100)
}

fn sum(parts: &[Metrics]) -> Metrics {
    let mut sum = Metrics::default();
    parts.iter().for_each(|part| sum.add(part));
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_whole_micro_batches() {
        for (images, micro_batch, ranks) in [(7, 2, 2), (16, 4, 4), (3, 8, 2), (100, 8, 8)] {
            let parts: Vec<_> = (0..ranks)
                .map(|rank| part(images, micro_batch, rank, ranks))
                .collect();
            assert_eq!((parts[0].start, parts[ranks - 1].end), (0, images));
            for two in parts.windows(2) {
                assert_eq!(two[0].end, two[1].start);
                assert!(two[0].end.is_multiple_of(micro_batch) || two[0].end == images);
            }
        }
    }

    #[test]
    fn cards_are_named_shortly() {
        assert_eq!(numbers(&[0, 1, 2, 3]), "0 to 3");
        assert_eq!(numbers(&[0, 2]), "0, 2");
        assert_eq!(nccl_version(22_809), "2.28.9");
        assert_eq!(nccl_version(2_708), "2.7.8");
    }
}
