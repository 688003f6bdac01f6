//! The attempts that are under way in this worker: cancel requests reach them here, and a stopping worker
//! waits for them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::TaskMessage;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// Attempts under way, ordered by age.
#[derive(Default)]
pub(crate) struct RunningTasks(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    next: u64,
    by_number: BTreeMap<u64, Entry>,
}

struct Entry {
    task: Arc<TaskMessage>,
    since: Instant,
    /// When its handler started; `None` while it waits for admission.
    started: Option<Instant>,
    cancel: CancellationToken,
}

/// The entry of one attempt; removed when this is dropped.
pub(crate) struct RunningTask {
    tasks: Arc<RunningTasks>,
    number: u64,
    /// Fires when a cancel request for the task arrives.
    pub(crate) cancel: CancellationToken,
}

impl RunningTasks {
    /// Adds an attempt.
    pub(crate) fn add(self: &Arc<Self>, task: &Arc<TaskMessage>) -> RunningTask {
        let cancel = CancellationToken::new();
        let mut entries = self.0.lock();
        let number = entries.next;
        entries.next += 1;
        let (task, since) = (Arc::clone(task), Instant::now());
        let entry = Entry { task, since, started: None, cancel: cancel.clone() };
        entries.by_number.insert(number, entry);
        RunningTask { tasks: Arc::clone(self), number, cancel }
    }

    /// Asks all attempts that `wanted` selects to end.
    pub(crate) fn cancel(&self, wanted: impl Fn(&TaskMessage) -> bool) {
        for entry in self.0.lock().by_number.values() {
            if !entry.cancel.is_cancelled() && wanted(&entry.task) {
                tracing::info!(id = %entry.task.id, name = %entry.task.name, "cancelling");
                entry.cancel.cancel();
            }
        }
    }

    /// The number of attempts, and a description of the oldest ones: `name id (1m 5s)`.
    pub(crate) fn oldest(&self, most: usize) -> (usize, Vec<String>) {
        let entries = self.0.lock();
        let describe = |entry: &Entry| {
            // Whole seconds are precise enough for people.
            let ran = Duration::from_secs(entry.since.elapsed().as_secs());
            format!("{} {} ({ran:?})", entry.task.name, entry.task.id)
        };
        (entries.by_number.len(), entries.by_number.values().take(most).map(describe).collect())
    }

    /// The number of attempts since the start of the worker.
    pub(crate) fn total(&self) -> u64 {
        self.0.lock().next
    }

    /// Describes an attempt that still runs `limit` after its start.
    pub(crate) fn overdue(&self, limit: impl Fn(&TaskMessage) -> Duration) -> Option<String> {
        let entries = self.0.lock();
        let ran = |entry: &Entry| entry.started.map(|started| started.elapsed());
        let late = |entry: &&Entry| ran(entry).is_some_and(|ran| ran > limit(&entry.task));
        let entry = entries.by_number.values().find(late)?;
        let seconds = ran(entry).unwrap_or_default().as_secs();
        let Entry { task, .. } = entry;
        Some(format!(
            "the attempt of {} {} has run for {seconds} s, longer than its limit allows",
            task.name, task.id
        ))
    }
}

impl RunningTask {
    /// Records that the handler starts.
    pub(crate) fn start(&self) {
        if let Some(entry) = self.tasks.0.lock().by_number.get_mut(&self.number) {
            entry.started = Some(Instant::now());
        }
    }
}

impl Drop for RunningTask {
    fn drop(&mut self) {
        self.tasks.0.lock().by_number.remove(&self.number);
    }
}
