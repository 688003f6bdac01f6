//! The cancel requests that this worker knows: a copy of the collector's list.
//!
//! The collector stores the list durably; [`super::cancel_listener`] keeps this copy up to date. The copy
//! is bounded: beyond [`MAX_REQUESTS`] the oldest are dropped here, and take effect only in workers that
//! still know them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use garenne_common::wire::{CancelRequest, CancelTarget};
use garenne_common::{BatchId, TaskId, TaskMessage};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::run::running_tasks::RunningTasks;

/// About 30 MB with long ids and reasons.
const MAX_REQUESTS: usize = 100_000;

/// The known cancel requests.
pub(crate) struct CancelRequests {
    known: Mutex<KnownRequests>,
    running: Arc<RunningTasks>,
    /// Notifies of new requests, for the queues with waiting tasks.
    changes: watch::Sender<()>,
}

#[derive(Default)]
struct KnownRequests {
    tasks: HashMap<TaskId, Arc<str>>,
    batches: HashMap<BatchId, Arc<str>>,
    by_number: BTreeMap<u64, CancelTarget>,
    overflowed: bool,
}

impl CancelRequests {
    pub(crate) fn new(running: Arc<RunningTasks>) -> Self {
        Self { known: Mutex::default(), running, changes: watch::Sender::new(()) }
    }

    /// The reason of the request to cancel this task, if there is one.
    pub(crate) fn reason(&self, task: &TaskMessage) -> Option<Arc<str>> {
        self.known.lock().reason(task)
    }

    /// Notifies of new requests.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// Adds requests, and cancels running attempts that they apply to.
    pub(crate) fn add(&self, requests: Vec<CancelRequest>) {
        if requests.is_empty() {
            return;
        }
        let mut known = self.known.lock();
        for request in requests {
            known.add(request);
        }
        drop(known);
        // After adding them: an attempt that starts meanwhile is either among the running ones by now, or
        // checks for requests later.
        self.running.cancel(|task| self.known.lock().reason(task).is_some());
        self.changes.send_replace(());
    }

    /// Removes all requests up to number `upto` that are not in `open`, which is sorted: their tasks or
    /// batches have ended.
    pub(crate) fn retain(&self, open: &[u64], upto: u64) {
        let mut known = self.known.lock();
        let listed: Vec<u64> = known.by_number.range(..=upto).map(|(number, _)| *number).collect();
        for number in listed.into_iter().filter(|number| open.binary_search(number).is_err()) {
            known.remove(number);
        }
    }
}

impl KnownRequests {
    fn reason(&self, task: &TaskMessage) -> Option<Arc<str>> {
        let of_batch = || {
            let batch = task.batch.as_ref().filter(|_| !self.batches.is_empty())?;
            self.batches.get(&*batch.public())
        };
        self.tasks.get(&task.id).or_else(of_batch).cloned()
    }

    fn add(&mut self, request: CancelRequest) {
        let CancelRequest { seq, target, reason } = request;
        let reason = Arc::from(reason);
        // A collector with a new store numbers its requests from the start.
        self.remove(seq);
        match &target {
            CancelTarget::Task(id) => drop(self.tasks.insert(id.clone(), reason)),
            CancelTarget::Batch(id) => drop(self.batches.insert(id.clone(), reason)),
        }
        self.by_number.insert(seq, target);
        if self.by_number.len() > MAX_REQUESTS {
            if !std::mem::replace(&mut self.overflowed, true) {
                tracing::warn!(max = MAX_REQUESTS, "too many cancel requests; dropping the oldest");
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
    use crate::handlers::Context;

    fn task(id: &str, batch: Option<&str>) -> Arc<TaskMessage> {
        let mut task = Context::of_args("null").task().clone();
        task.id = TaskId::new(id).unwrap();
        task.batch = batch.map(|id| BatchId::new(id).unwrap());
        Arc::new(task)
    }

    fn request(seq: u64, target: CancelTarget) -> CancelRequest {
        CancelRequest { seq, target, reason: format!("no {seq}") }
    }

    fn of_task(seq: u64, id: &str) -> CancelRequest {
        request(seq, CancelTarget::Task(TaskId::new(id).unwrap()))
    }

    fn requests() -> (Arc<RunningTasks>, CancelRequests) {
        let running = Arc::<RunningTasks>::default();
        (Arc::clone(&running), CancelRequests::new(running))
    }

    #[test]
    fn a_request_reaches_running_and_later_attempts() {
        let (running, requests) = requests();
        let (hit, spared) = (task("t-1", None), task("t-2", None));
        let (first, second) = (running.add(&hit), running.add(&spared));
        requests.add(vec![of_task(1, "t-1")]);
        assert!(first.cancel.is_cancelled() && !second.cancel.is_cancelled());
        assert_eq!(requests.reason(&hit).as_deref(), Some("no 1"));
        assert_eq!(requests.reason(&spared), None);
        drop(first);
        assert_eq!(running.oldest(9).0, 1);
    }

    #[test]
    fn a_request_for_a_batch_applies_to_its_members() {
        let (_, requests) = requests();
        requests.add(vec![request(3, CancelTarget::Batch(BatchId::new("b").unwrap()))]);
        assert!(requests.reason(&task("t-1", Some("b"))).is_some());
        assert!(requests.reason(&task("t-1", Some("c"))).is_none());
    }

    #[test]
    fn ended_requests_are_removed_and_new_ones_kept() {
        let (_, requests) = requests();
        requests.add((1..=4).map(|n| of_task(n, &format!("t-{n}"))).collect());
        requests.retain(&[2], 3);
        let known = |n: &u32| requests.reason(&task(&format!("t-{n}"), None)).is_some();
        let left: Vec<u32> = (1..=4).filter(known).collect();
        assert_eq!(left, [2, 4]);
    }

    #[test]
    fn the_number_of_requests_is_bounded() {
        let (_, requests) = requests();
        let many = 1..=MAX_REQUESTS as u64 + 5;
        requests.add(many.map(|n| of_task(n, &format!("t-{n}"))).collect());
        assert_eq!(requests.known.lock().by_number.len(), MAX_REQUESTS);
        assert!(requests.reason(&task("t-5", None)).is_none());
        assert!(requests.reason(&task("t-6", None)).is_some());
    }
}
