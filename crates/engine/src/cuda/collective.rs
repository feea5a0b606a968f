//! What ranks do together: a rank is one card with its own part of each batch, and all keep the same parameters.
//!
//! Gradients are summed in the order of the ranks, whoever sums them: each rank gets its piece of every other's, adds
//! them up and hands the sum out. So the bits depend neither on the wiring nor on the library, and with as many ranks as
//! micro-batches they are those of one card, which adds up its micro-batches in the same order. It moves as many bytes
//! as a ring does (2 (n - 1) / n of the gradients, each way).

use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys::CUstream;

use super::calls::{self, CHUNK, Layout};
use super::driver::{Address, Arg, Block, Event, Gpu, Stream};
use crate::Error;

/// Moves memory between the cards of ranks. Every rank asks for the same exchanges in the same order.
pub(crate) trait Collective: Send + Sync {
    /// How many there are.
    fn ranks(&self) -> usize;

    /// Which of them this one is.
    fn rank(&self) -> usize;

    /// Puts an exchange on a stream: (peer, memory, bytes) of what leaves and of what arrives.
    ///
    /// # Errors
    /// If the library refuses it.
    fn exchange(
        &self,
        leaves: &[(usize, Address, usize)],
        arrives: &[(usize, Address, usize)],
        stream: CUstream,
    ) -> Result<(), Error>;

    /// What has gone wrong meanwhile, on any rank.
    fn fault(&self) -> Option<String>;

    /// Leaves the others: what hangs because they have failed ends, and nothing can be exchanged any more. Every rank
    /// leaves, each on a thread of its own, for one may wait for another.
    fn leave(&self);
}

/// Values of a bucket at least, 25 MiB: large enough for the wires, small enough that most are summed beside the
/// backward pass.
const BUCKET: usize = 25 << 18;

/// A rank's part in the sums over all ranks.
pub(crate) struct Peers {
    pub(crate) collective: Arc<dyn Collective>,
    pub(crate) buckets: Vec<Range<usize>>,
    stream: Stream,
    /// Pieces of other ranks.
    inbox: Block,
    /// What is summed is complete.
    ready: Event,
    /// All sums are there.
    done: Event,
}

/// Chunks that each of `ranks` sums.
fn pieces(bucket: &Range<usize>, ranks: usize) -> Vec<Range<usize>> {
    let at = |rank: usize| bucket.start + bucket.len() * rank / ranks;
    (0..ranks).map(|rank| at(rank)..at(rank + 1)).collect()
}

/// Bytes that the inbox has to hold: a piece of the largest bucket, or all statistics, from every rank.
pub(crate) fn inbox_bytes(layout: &Layout, ranks: usize) -> usize {
    let piece = |bucket: &Range<usize>| bucket.len().div_ceil(ranks) * CHUNK * size_of::<f32>();
    let buckets = calls::buckets(layout, BUCKET);
    let largest = buckets.iter().map(piece).max().unwrap_or(0);
    ranks * largest.max(2 * layout.channels * size_of::<f64>())
}

impl Peers {
    pub(crate) fn new(
        gpu: &Gpu,
        layout: &Layout,
        collective: Arc<dyn Collective>,
    ) -> Result<Self, Error> {
        Ok(Self {
            buckets: calls::buckets(layout, BUCKET),
            stream: gpu.stream()?,
            inbox: gpu.block(inbox_bytes(layout, collective.ranks()))?,
            ready: Event::new()?,
            done: Event::new()?,
            collective,
        })
    }

    /// The chunks of a bucket, from `gradients` on, become their sums over all ranks, beside what the card does next.
    pub(crate) fn sum(
        &self,
        gpu: &Gpu,
        gradients: Address,
        bucket: &Range<usize>,
    ) -> Result<(), Error> {
        self.begin(gpu)?;
        let collective = &*self.collective;
        let (ranks, me) = (collective.ranks(), collective.rank());
        let pieces = pieces(bucket, ranks);
        let bytes = |rank: usize| pieces[rank].len() * CHUNK * size_of::<f32>();
        let at = |rank: usize| calls::chunk_at(gradients, pieces[rank].start, size_of::<f32>());
        let others = || (0..ranks).filter(|rank| *rank != me);
        let inbox = |rank: usize| self.inbox.address + (rank * bytes(me)) as Address;

        let leaves: Vec<_> = others().map(|r| (r, at(r), bytes(r))).collect();
        let arrives: Vec<_> = others().map(|r| (r, inbox(r), bytes(me))).collect();
        collective.exchange(&leaves, &arrives, self.stream.raw())?;
        if !pieces[me].is_empty() {
            let mut args = [
                Arg::address(at(me)),
                Arg::address(self.inbox.address),
                Arg::int(me),
                Arg::int(ranks),
            ];
            let grid = (pieces[me].len() as u32, 1);
            gpu.launch_on(&self.stream, "sum_ranks", grid, &mut args)?;
        }
        let leaves: Vec<_> = others().map(|r| (r, at(me), bytes(me))).collect();
        let arrives: Vec<_> = others().map(|r| (r, at(r), bytes(r))).collect();
        collective.exchange(&leaves, &arrives, self.stream.raw())
    }

    /// The same of `count` values in f64, few enough that every rank sums all.
    pub(crate) fn sum_all(&self, gpu: &Gpu, values: Address, count: usize) -> Result<(), Error> {
        self.begin(gpu)?;
        let collective = &*self.collective;
        let (ranks, me) = (collective.ranks(), collective.rank());
        let bytes = count * size_of::<f64>();
        let others = || (0..ranks).filter(|rank| *rank != me);
        let inbox = |rank: usize| self.inbox.address + (rank * bytes) as Address;
        let leaves: Vec<_> = others().map(|r| (r, values, bytes)).collect();
        let arrives: Vec<_> = others().map(|r| (r, inbox(r), bytes)).collect();
        collective.exchange(&leaves, &arrives, self.stream.raw())?;
        let mut args = [
            Arg::address(values),
            Arg::address(self.inbox.address),
            Arg::int(count),
            Arg::int(me),
            Arg::int(ranks),
        ];
        let grid = (count.div_ceil(super::driver::THREADS as usize) as u32, 1);
        gpu.launch_on(&self.stream, "sum_ranks_f64", grid, &mut args)
    }

    /// What follows on the card waits for all sums.
    pub(crate) fn join(&self, gpu: &Gpu) -> Result<(), Error> {
        self.done.record(self.stream.raw())?;
        self.done.hold(gpu.stream)
    }

    /// Waits for all sums that were begun.
    pub(crate) fn drain(&self, gpu: &Gpu) -> Result<(), Error> {
        gpu.wait_for(&self.stream)
    }

    /// Sums wait for what has been put on the card so far.
    fn begin(&self, gpu: &Gpu) -> Result<(), Error> {
        self.ready.record(gpu.stream)?;
        self.ready.hold(self.stream.raw())
    }

    /// Waits for a point in a stream, and fails when another rank does.
    pub(crate) fn wait(&self, event: &Event) -> Result<(), Error> {
        while !event.has_passed()? {
            if let Some(fault) = self.collective.fault() {
                return Err(Error::device(
                    format!("the cards have lost each other: {fault}"),
                    "the run goes on from its last checkpoint when it is started again",
                ));
            }
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_bucket() {
        for (bucket, ranks) in [(3..17, 4), (0..2, 3), (5..6, 1), (10..18, 8)] {
            let pieces = pieces(&bucket, ranks);
            assert_eq!(pieces.len(), ranks);
            assert_eq!(pieces[0].start, bucket.start);
            assert_eq!(pieces[ranks - 1].end, bucket.end);
            assert!(pieces.windows(2).all(|two| two[0].end == two[1].start));
            let longest = bucket.len().div_ceil(ranks);
            assert!(pieces.iter().all(|piece| piece.len() <= longest));
        }
    }

    #[test]
    fn buckets_hold_whole_tensors_from_the_last_to_the_first() {
        for depth in nn::DEPTHS {
            let graph = nn::resnet(depth, 224, 1000, nn::Recipe::Tpu2018).unwrap();
            let layout = Layout::new(&graph);
            let buckets = calls::buckets(&layout, BUCKET);
            assert_eq!(buckets[0].end, layout.len / CHUNK);
            assert_eq!(buckets[buckets.len() - 1].start, 0);
            for two in buckets.windows(2) {
                assert_eq!(two[0].start, two[1].end);
                assert!(two[0].len() * CHUNK >= BUCKET);
            }
            let starts: Vec<usize> = layout.slots.iter().map(|s| s.offset / CHUNK).collect();
            assert!(buckets.iter().all(|bucket| starts.contains(&bucket.start)));
        }
    }
}
