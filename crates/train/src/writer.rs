//! A thread that writes checkpoints, so that training does not wait for the disk.
//!
//! The loop hands over a copy of the state and goes on. One snapshot may be in writing and one may wait; a third waits
//! for the disk, unless the disk refuses: then the newest replaces the one that waits, what failed is tried again, and
//! training goes on. `latest` and `best` are moved by the same thread, so never before the file that they name.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use engine::State;

use crate::checkpoint::{Checkpoints, Meta, Progress};
use crate::error::Error;

/// Pause before a failed write is tried again; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// How often the last checkpoint of a run is tried when the run has nothing else to do.
const LAST_TRIES: u32 = 3;

/// The state of a run at one step.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) meta: Meta,
    pub(crate) state: State,
}

/// The thread, and what it is to do.
pub(crate) struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Something in the queue is another.
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    /// To be written next.
    waiting: Option<Arc<Snapshot>>,
    /// Where `latest` and `best` are to point, after that.
    point: Option<Progress>,
    /// The last write was refused.
    is_failing: bool,
    is_closing: bool,
    /// Snapshots that were replaced by newer ones while the disk refused.
    left_out: u64,
    /// What the run's user should hear.
    notes: Vec<String>,
    /// Why the thread gave up at the end.
    error: Option<Error>,
}

impl Shared {
    /// A thread that panics while it holds the lock leaves nothing half done.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the queue is another, at most for so long.
    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>, most: Duration) -> MutexGuard<'a, Queue> {
        match self.changed.wait_timeout(queue, most) {
            Ok((queue, _)) => queue,
            Err(poisoned) => poisoned.into_inner().0,
        }
    }
}

impl Writer {
    /// Starts the thread; `keep` of the latest checkpoints stay.
    pub(crate) fn start(checkpoints: &Checkpoints, keep: usize) -> Result<Self, Error> {
        let shared = Arc::new(Shared::default());
        let (of_thread, checkpoints) = (Arc::clone(&shared), checkpoints.clone());
        let thread = std::thread::Builder::new()
            .name("checkpoints".into())
            .spawn(move || write(&of_thread, &checkpoints, keep))
            .map_err(|source| Error::io("start a thread for", "checkpoints".as_ref(), source))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    fn is_alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|t| !t.is_finished())
    }

    /// Hands a snapshot over. Waits while another waits already and the disk works.
    pub(crate) fn save(&self, snapshot: Arc<Snapshot>) {
        let mut queue = self.shared.lock();
        while queue.waiting.is_some() && !queue.is_failing && self.is_alive() {
            queue = self.shared.wait(queue, Duration::from_secs(1));
        }
        if queue.waiting.replace(snapshot).is_some() {
            queue.left_out += 1;
        }
        drop(queue);
        self.shared.changed.notify_all();
    }

    /// Moves `latest` and `best` to what `at` says, once what was handed over is written.
    pub(crate) fn point_to(&self, at: &Progress) {
        self.shared.lock().point = Some(at.clone());
        self.shared.changed.notify_all();
    }

    /// What happened since the last call, in words.
    pub(crate) fn notes(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.lock().notes)
    }

    /// Waits until everything is written, or has been refused for good; what happened meanwhile, and why not all of it
    /// is written.
    pub(crate) fn finish(mut self) -> (Vec<String>, Result<(), Error>) {
        self.close();
        let mut queue = self.shared.lock();
        let written = queue.error.take().map_or(Ok(()), Err);
        (std::mem::take(&mut queue.notes), written)
    }

    fn close(&mut self) {
        self.shared.lock().is_closing = true;
        self.shared.changed.notify_all();
        if let Some(Err(payload)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(payload);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.close();
        }
    }
}

/// What the thread does.
fn write(shared: &Shared, checkpoints: &Checkpoints, keep: usize) {
    let (mut pause, mut tries) = (FIRST_PAUSE, 0);
    let mut queue = shared.lock();
    loop {
        if queue.waiting.is_none() && queue.point.is_none() {
            if queue.is_closing {
                return;
            }
            queue = shared.wait(queue, LONGEST_PAUSE);
            continue;
        }
        let (snapshot, point) = (queue.waiting.take(), queue.point.take());
        drop(queue);
        shared.changed.notify_all();
        let save = |s: &Arc<Snapshot>| checkpoints.save(&s.meta, &s.state, keep);
        let written = snapshot.as_ref().map_or(Ok(()), save);
        let written =
            written.and_then(|()| point.as_ref().map_or(Ok(()), |at| checkpoints.point_to(at)));
        queue = shared.lock();
        let Err(error) = written else {
            if queue.is_failing {
                let left_out = std::mem::take(&mut queue.left_out);
                queue.notes.push(format!(
                    "checkpoints can be written again; {left_out} were left out meanwhile"
                ));
            }
            (queue.is_failing, pause, tries) = (false, FIRST_PAUSE, 0);
            continue;
        };
        if !queue.is_failing {
            queue.notes.push(format!(
                "{error}\ntraining goes on, and the checkpoint is tried again; a kill now would lose the steps since the last one"
            ));
        }
        queue.is_failing = true;
        if queue.waiting.is_none() {
            queue.waiting = snapshot;
        } else if snapshot.is_some() {
            queue.left_out += 1;
        }
        if queue.point.is_none() {
            queue.point = point;
        }
        shared.changed.notify_all();
        if queue.is_closing {
            tries += 1;
            if tries >= LAST_TRIES {
                queue.error = Some(error);
                return;
            }
            pause = FIRST_PAUSE;
        }
        queue = shared.wait(queue, pause);
        pause = (2 * pause).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::tests::{meta, state};

    fn snapshot(step: u64) -> Arc<Snapshot> {
        Arc::new(Snapshot {
            meta: meta(step, None),
            state: state(),
        })
    }

    fn files(dir: &Path) -> Vec<String> {
        let dir = dir.join("checkpoints");
        let mut names: Vec<String> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_was_handed_over_is_on_the_disk_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let writer = Writer::start(&Checkpoints::of(dir.path()), 3).unwrap();
        for step in 1..=20 {
            writer.save(snapshot(step));
        }
        let (notes, written) = writer.finish();
        written.unwrap();
        assert_eq!(notes, Vec::<String>::new());
        let expected = [18, 19, 20].map(|step| format!("step-{step:010}.safetensors"));
        assert_eq!(
            files(dir.path()),
            [&["latest".to_owned()], &expected[..]].concat()
        );
    }

    /// A file where the directory should be: nothing can be written until it is gone.
    #[test]
    fn a_disk_that_refuses_stops_nobody_and_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let in_the_way = dir.path().join("checkpoints");
        store::write_atomic(&in_the_way, &[b""]).unwrap();
        let writer = Writer::start(&Checkpoints::of(dir.path()), 9).unwrap();
        let mut notes = vec![];
        for step in 1..=5 {
            writer.save(snapshot(step)); // returns, although nothing can be written
            while notes.is_empty() {
                notes = writer.notes();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(notes.len(), 1, "said once: {notes:?}");
        assert!(
            notes[0].contains("checkpoints: cannot ") && notes[0].contains("training goes on"),
            "{notes:?}"
        );
        std::fs::remove_file(&in_the_way).unwrap();
        let (notes, written) = writer.finish();
        written.unwrap();
        assert!(
            notes[0].starts_with("checkpoints can be written again; "),
            "{notes:?}"
        );
        assert_eq!(files(dir.path()), ["latest", "step-0000000005.safetensors"]);
    }

    #[test]
    fn a_last_checkpoint_that_cannot_be_written_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        store::write_atomic(&dir.path().join("checkpoints"), &[b""]).unwrap();
        let writer = Writer::start(&Checkpoints::of(dir.path()), 1).unwrap();
        writer.save(snapshot(1));
        let (_, written) = writer.finish();
        let error = written.unwrap_err().to_string();
        assert!(error.contains("checkpoints: cannot "), "{error}");
    }
}
