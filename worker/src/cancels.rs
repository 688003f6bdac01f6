//! What is to be cancelled, as far as this worker knows: the collector's list, kept at hand.
//!
//! The list itself lies with the collector, durable; [`crate::control`] brings it here and keeps it
//! fresh. Bounded: beyond [`MOST`] wishes the oldest are forgotten here, and take effect only in a
//! worker that still knows them.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use garenne_common::wire::{CancelRequest, CancelTarget};
use garenne_common::{BatchId, TaskId, TaskMessage};
use tokio::sync::watch;

use crate::register::Register;

/// Wishes that are kept: some 30 MB with long ids and reasons.
const MOST: usize = 100_000;

/// The wishes known here.
pub(crate) struct Cancels {
    known: Mutex<Known>,
    register: Arc<Register>,
    /// Changes with every new wish, for whoever holds tasks that do not run yet.
    news: watch::Sender<()>,
}

#[derive(Default)]
struct Known {
    tasks: HashMap<TaskId, Arc<str>>,
    batches: HashMap<BatchId, Arc<str>>,
    by_number: BTreeMap<u64, CancelTarget>,
    overflowed: bool,
}

impl Cancels {
    pub(crate) fn new(register: Arc<Register>) -> Self {
        Self { known: Mutex::default(), register, news: watch::Sender::new(()) }
    }

    /// Why this task is to be cancelled, if it is.
    pub(crate) fn wish(&self, task: &TaskMessage) -> Option<Arc<str>> {
        self.lock().wish(task)
    }

    /// Tells of new wishes.
    pub(crate) fn news(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }

    /// Takes wishes in, and passes them on to what runs.
    pub(crate) fn hear(&self, intents: Vec<CancelRequest>) {
        if intents.is_empty() {
            return;
        }
        let mut known = self.lock();
        for intent in intents {
            known.add(intent);
        }
        drop(known);
        // In this order: an attempt that begins meanwhile is either in the register by now, or looks
        // for a wish after this.
        self.register.cancel(|task| self.lock().wish(task).is_some());
        self.news.send_replace(());
    }

    /// Forgets every wish up to number `upto` that is not among `live`: its task or batch is over.
    pub(crate) fn keep_only(&self, live: &[u64], upto: u64) {
        let mut known = self.lock();
        let over: Vec<u64> = known.by_number.range(..=upto).map(|(number, _)| *number).collect();
        for number in over.into_iter().filter(|number| live.binary_search(number).is_err()) {
            known.remove(number);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn wish(&self, task: &TaskMessage) -> Option<Arc<str>> {
        let of_batch = || {
            let batch = task.batch.as_ref().filter(|_| !self.batches.is_empty())?;
            self.batches.get(&*batch.public())
        };
        self.tasks.get(&task.id).or_else(of_batch).cloned()
    }

    fn add(&mut self, intent: CancelRequest) {
        let CancelRequest { seq, target, reason } = intent;
        let reason = Arc::from(reason);
        // A collector with a new store counts from the beginning.
        self.remove(seq);
        match &target {
            CancelTarget::Task(id) => drop(self.tasks.insert(id.clone(), reason)),
            CancelTarget::Batch(id) => drop(self.batches.insert(id.clone(), reason)),
        }
        self.by_number.insert(seq, target);
        if self.by_number.len() > MOST {
            if !std::mem::replace(&mut self.overflowed, true) {
                tracing::warn!(most = MOST, "too many wishes to cancel; forgetting the oldest");
            }
            if let Some((&oldest, _)) = self.by_number.first_key_value() {
                self.remove(oldest);
            }
        }
    }

    fn remove(&mut self, number: u64) {
        match self.by_number.remove(&number) {
            Some(CancelTarget::Task(id)) => drop(self.tasks.remove(&id)),
            Some(CancelTarget::Batch(id)) => drop(self.batches.remove(&id)),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::Context;

    fn task(id: &str, batch: Option<&str>) -> Arc<TaskMessage> {
        let mut task = Context::of_args("null").task().clone();
        task.id = TaskId::new(id).unwrap();
        task.batch = batch.map(|id| BatchId::new(id).unwrap());
        Arc::new(task)
    }

    fn intent(seq: u64, target: CancelTarget) -> CancelRequest {
        CancelRequest { seq, target, reason: format!("no {seq}") }
    }

    fn of_task(seq: u64, id: &str) -> CancelRequest {
        intent(seq, CancelTarget::Task(TaskId::new(id).unwrap()))
    }

    fn cancels() -> (Arc<Register>, Cancels) {
        let register = Arc::<Register>::default();
        (Arc::clone(&register), Cancels::new(register))
    }

    #[test]
    fn a_wish_reaches_what_runs_and_what_will() {
        let (register, cancels) = cancels();
        let (hit, spared) = (task("t-1", None), task("t-2", None));
        let (first, second) = (register.enter(&hit), register.enter(&spared));
        cancels.hear(vec![of_task(1, "t-1")]);
        assert!(first.cancel.is_cancelled() && !second.cancel.is_cancelled());
        assert_eq!(cancels.wish(&hit).as_deref(), Some("no 1"));
        assert_eq!(cancels.wish(&spared), None);
        drop(first);
        assert_eq!(register.oldest(9).0, 1);
    }

    #[test]
    fn a_batch_covers_its_members() {
        let (_, cancels) = cancels();
        cancels.hear(vec![intent(3, CancelTarget::Batch(BatchId::new("b").unwrap()))]);
        assert!(cancels.wish(&task("t-1", Some("b"))).is_some());
        assert!(cancels.wish(&task("t-1", Some("c"))).is_none());
    }

    #[test]
    fn what_is_over_goes_and_what_was_just_heard_stays() {
        let (_, cancels) = cancels();
        cancels.hear((1..=4).map(|n| of_task(n, &format!("t-{n}"))).collect());
        cancels.keep_only(&[2], 3);
        let known = |n: &u32| cancels.wish(&task(&format!("t-{n}"), None)).is_some();
        let left: Vec<u32> = (1..=4).filter(known).collect();
        assert_eq!(left, [2, 4]);
    }

    #[test]
    fn the_memory_is_bounded() {
        let (_, cancels) = cancels();
        let many = 1..=MOST as u64 + 5;
        cancels.hear(many.map(|n| of_task(n, &format!("t-{n}"))).collect());
        assert_eq!(cancels.lock().by_number.len(), MOST);
        assert!(cancels.wish(&task("t-5", None)).is_none());
        assert!(cancels.wish(&task("t-6", None)).is_some());
    }
}
