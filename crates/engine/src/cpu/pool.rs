//! Threads that wait for work: one region of tasks at a time, handed out by a counter.
//!
//! Which worker runs a task is not defined and must not matter; what a task computes depends on its index only.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// `(worker, task)`; workers are numbered from 0, the caller's thread.
type Job<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// How long a worker looks for the next region before it sleeps: longer than the gaps inside a step, far shorter
/// than the wait for a batch, which needs the core for decoding.
const SPIN: Duration = Duration::from_micros(50);

struct Shared {
    /// The job of the current region; valid while `busy` is above zero.
    job: UnsafeCell<Option<*const Job<'static>>>,
    tasks: AtomicUsize,
    next: AtomicUsize,
    /// Counts regions.
    region: AtomicUsize,
    /// Workers that have not finished the current region.
    busy: AtomicUsize,
    asleep: Vec<AtomicBool>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

// SAFETY: `job` is written by the owner only while `busy` is zero, and read by workers only after they saw the
// `region` that was stored (release) after the write.
unsafe impl Sync for Shared {}
// SAFETY: the pointer is only followed between the two barriers of `run`, while the job it points to is borrowed.
unsafe impl Send for Shared {}

impl Shared {
    fn work(&self, worker: usize, job: &Job<'_>) {
        let tasks = self.tasks.load(Ordering::Relaxed);
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                break;
            }
            job(worker, task);
        }
    }

    fn worker(&self, worker: usize) {
        let mut seen = 0;
        loop {
            self.wait(worker, seen);
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            seen += 1;
            // SAFETY: `wait` saw a new region, so the owner has set the job and waits in `run` until `busy` is zero.
            let job = unsafe { &*(*self.job.get()).expect("a region has a job") };
            if catch_unwind(AssertUnwindSafe(|| self.work(worker, job))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    /// Returns when a region after `seen` has begun or the pool stops.
    fn wait(&self, worker: usize, seen: usize) {
        let is_new =
            || self.region.load(Ordering::SeqCst) != seen || self.stop.load(Ordering::SeqCst);
        let since = Instant::now();
        while !is_new() {
            for _ in 0..64 {
                std::hint::spin_loop();
            }
            if since.elapsed() > SPIN {
                let asleep = &self.asleep[worker - 1];
                asleep.store(true, Ordering::SeqCst);
                while !is_new() {
                    std::thread::park();
                }
                asleep.store(false, Ordering::SeqCst);
            }
        }
    }
}

/// The workers.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
    /// The last task comes first.
    #[cfg(test)]
    pub(crate) is_reversed: bool,
}

impl Pool {
    /// A pool in which `threads` threads work, the caller's among them.
    pub(crate) fn new(threads: usize) -> Self {
        let extra = threads.max(1) - 1;
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            tasks: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            region: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            asleep: (0..extra).map(|_| AtomicBool::new(false)).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let spawn = |i: usize| {
            let shared = Arc::clone(&shared);
            let body = move || shared.worker(i);
            let handle = std::thread::Builder::new()
                .name(format!("engine-{i}"))
                .spawn(body);
            let handle = handle.expect("the system gives a thread at start-up");
            (handle.thread().clone(), Some(handle))
        };
        let workers = (1..=extra).map(spawn).collect();
        Self {
            shared,
            workers,
            #[cfg(test)]
            is_reversed: false,
        }
    }

    /// Number of threads that work.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `job(worker, task)` for every task below `tasks` and returns when all are done.
    pub(crate) fn run(&mut self, tasks: usize, job: impl Fn(usize, usize) + Sync) {
        #[cfg(test)]
        let is_reversed = self.is_reversed;
        #[cfg(test)]
        let job = |worker, task| job(worker, if is_reversed { tasks - 1 - task } else { task });
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| job(0, task));
            return;
        }
        let shared = &*self.shared;
        let job: &Job<'_> = &job;
        // SAFETY: only the lifetime is changed. No worker is in a region (`busy` is zero, `&mut self`), and this
        // function does not return before `busy` is zero again, so nobody follows the pointer after the borrow.
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<*const Job<'_>, *const Job<'static>>(
                job,
            ))
        };
        shared.tasks.store(tasks, Ordering::Relaxed);
        shared.next.store(0, Ordering::Relaxed);
        shared.busy.store(self.workers.len(), Ordering::Relaxed);
        shared.region.fetch_add(1, Ordering::SeqCst);
        for (asleep, (thread, _)) in shared.asleep.iter().zip(&self.workers) {
            if asleep.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let mine = catch_unwind(AssertUnwindSafe(|| shared.work(0, job)));
        let mut spins = 0u32;
        while shared.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < 4096 {
                std::hint::spin_loop()
            } else {
                std::thread::yield_now()
            }
        }
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(
            !shared.panicked.load(Ordering::Relaxed),
            "a task of the engine panicked"
        );
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for (thread, handle) in &mut self.workers {
            thread.unpark();
            if let Some(handle) = handle.take() {
                // A worker catches panics, so joining cannot fail.
                let _ = handle.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 100] {
                let hits: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |worker, task| {
                    assert!(worker < threads);
                    hits[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    hits.iter().all(|h| h.load(Ordering::Relaxed) == 1),
                    "{threads} threads, {tasks} tasks"
                );
            }
        }
    }

    #[test]
    fn workers_wake_after_a_pause() {
        let mut pool = Pool::new(3);
        for _ in 0..20 {
            std::thread::sleep(SPIN * 4);
            let sum = AtomicUsize::new(0);
            pool.run(50, |_, task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 49 * 50 / 2);
        }
    }

    #[test]
    #[should_panic(expected = "panicked")]
    fn a_panic_reaches_the_caller() {
        let mut pool = Pool::new(2);
        pool.run(64, |worker, _| {
            std::thread::sleep(Duration::from_micros(200));
            assert!(worker == 0, "a worker fails");
        });
    }
}
