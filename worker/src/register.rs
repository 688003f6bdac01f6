//! The attempts that run here: how a wish to cancel reaches them, and what a stopping worker waits for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use garenne_common::TaskMessage;
use tokio_util::sync::CancellationToken;

/// The running attempts, the oldest first.
#[derive(Default)]
pub(crate) struct Register(Mutex<State>);

#[derive(Default)]
struct State {
    next: u64,
    running: BTreeMap<u64, Entry>,
}

struct Entry {
    task: Arc<TaskMessage>,
    since: Instant,
    /// When it began to run; until then it waits for its turn.
    began: Option<Instant>,
    cancel: CancellationToken,
}

/// An attempt's place in the register; dropping it strikes the attempt out.
pub(crate) struct Place {
    register: Arc<Register>,
    number: u64,
    /// Fires when somebody wants the task cancelled.
    pub(crate) cancel: CancellationToken,
}

impl Register {
    /// Enters an attempt that begins now.
    pub(crate) fn enter(self: &Arc<Self>, task: &Arc<TaskMessage>) -> Place {
        let cancel = CancellationToken::new();
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        let (task, since) = (Arc::clone(task), Instant::now());
        let entry = Entry { task, since, began: None, cancel: cancel.clone() };
        state.running.insert(number, entry);
        Place { register: Arc::clone(self), number, cancel }
    }

    /// Tells every attempt of such a task to end.
    pub(crate) fn cancel(&self, wanted: impl Fn(&TaskMessage) -> bool) {
        for entry in self.lock().running.values() {
            if !entry.cancel.is_cancelled() && wanted(&entry.task) {
                tracing::info!(id = %entry.task.id, name = %entry.task.name, "told to cancel");
                entry.cancel.cancel();
            }
        }
    }

    /// How many attempts run, and the longest-running ones in words: `name id (1m 5s)`.
    pub(crate) fn oldest(&self, most: usize) -> (usize, Vec<String>) {
        let state = self.lock();
        let describe = |entry: &Entry| {
            // Whole seconds are all that a person wants to know.
            let ran = Duration::from_secs(entry.since.elapsed().as_secs());
            format!("{} {} ({ran:?})", entry.task.name, entry.task.id)
        };
        (state.running.len(), state.running.values().take(most).map(describe).collect())
    }

    /// How many attempts were ever entered.
    pub(crate) fn entered(&self) -> u64 {
        self.lock().next
    }

    /// Names an attempt that runs although it should have ended `limit` after it began.
    pub(crate) fn overdue(&self, limit: impl Fn(&TaskMessage) -> Duration) -> Option<String> {
        let state = self.lock();
        let ran = |entry: &Entry| entry.began.map(|began| began.elapsed());
        let late = |entry: &&Entry| ran(entry).is_some_and(|ran| ran > limit(&entry.task));
        let entry = state.running.values().find(late)?;
        let seconds = ran(entry).unwrap_or_default().as_secs();
        let Entry { task, .. } = entry;
        Some(format!(
            "the attempt of {} {} has run for {seconds} s, longer than its limit allows",
            task.name, task.id
        ))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// The attempt begins to run.
    pub(crate) fn begin(&self) {
        if let Some(entry) = self.register.lock().running.get_mut(&self.number) {
            entry.began = Some(Instant::now());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.register.lock().running.remove(&self.number);
    }
}
