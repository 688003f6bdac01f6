//! Tasks of one queue that have been delivered and wait for a permit.
//!
//! Messages come in. Tasks go out, one by one and in the order of arrival; a bundle is decoded when its
//! turn comes. Tasks of bundles can also be taken out together, to be given to other workers. Nothing is
//! acknowledged or published here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::broker::Delivery;
use garenne_common::{QueueName, TaskMessage, wire};
use parking_lot::Mutex;

use super::queue::{DeliveryRef, QueueIndex};
use super::source::{Arrival, TaskSource};
use super::unacked::UnackedDeliveries;

/// Waiting tasks of one queue; the prefetch bounds their number.
#[derive(Debug)]
pub(crate) struct LocalQueue {
    index: QueueIndex,
    name: QueueName,
    unacked: Arc<UnackedDeliveries>,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Tasks of decoded bundles; they are first in the order.
    tasks: VecDeque<BundledTask>,
    /// Messages and undecoded bundles, in the order of their arrival.
    messages: VecDeque<(Box<Delivery>, Received)>,
    epoch: u64,
}

/// A task of a decoded bundle.
#[derive(Debug)]
struct BundledTask {
    task: Arc<TaskMessage>,
    bundle: DeliveryRef,
    app_id: Arc<str>,
    received: Received,
}

/// When a delivery arrived, and whether a worker has rebalanced it before.
#[derive(Debug, Clone, Copy)]
struct Received {
    at: Instant,
    rebalanced: bool,
}

/// Selects tasks of bundles by the time that they have waited.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Overdue {
    /// Only those that have waited longer.
    pub(crate) longer_than: Option<Duration>,
    /// Only those that no worker has rebalanced before.
    pub(crate) once: bool,
}

impl Overdue {
    fn selects(self, received: &Received) -> bool {
        !(self.once && received.rebalanced)
            && self.longer_than.is_none_or(|limit| received.at.elapsed() > limit)
    }
}

/// Overdue tasks of one bundle.
pub(crate) struct OverdueTasks {
    pub(crate) bundle: DeliveryRef,
    pub(crate) app_id: Arc<str>,
    pub(crate) tasks: Vec<Arc<TaskMessage>>,
}

impl LocalQueue {
    pub(super) fn new(index: QueueIndex, name: QueueName, unacked: Arc<UnackedDeliveries>) -> Self {
        Self { index, name, unacked, waiting: Mutex::default() }
    }

    /// Discards what an earlier channel delivered: the broker delivers it again.
    pub(crate) fn enter_epoch(&self, epoch: u64) {
        let mut waiting = self.waiting.lock();
        if waiting.epoch != epoch {
            *waiting = Waiting { epoch, ..Waiting::default() };
        }
    }

    /// Discards all tasks: the channel that delivered them is closed.
    pub(crate) fn clear(&self) {
        *self.waiting.lock() = Waiting::default();
    }

    /// Adds a delivery at the end.
    pub(crate) fn push(&self, delivery: Delivery) {
        let rebalanced = wire::bundle::is_handed_on(&delivery.message);
        let received = Received { at: Instant::now(), rebalanced };
        self.waiting.lock().messages.push_back((Box::new(delivery), received));
    }

    pub(crate) fn is_empty(&self) -> bool {
        let waiting = self.waiting.lock();
        waiting.tasks.is_empty() && waiting.messages.is_empty()
    }

    /// The number of waiting tasks of decoded bundles, and of messages including undecoded bundles.
    pub(crate) fn len(&self) -> (usize, usize) {
        let waiting = self.waiting.lock();
        (waiting.tasks.len(), waiting.messages.len())
    }

    /// Takes the next task.
    pub(crate) fn next(&self) -> Option<Arrival> {
        let (delivery, received) = {
            let mut waiting = self.waiting.lock();
            if let Some(task) = waiting.tasks.pop_front() {
                return Some(task.into());
            }
            waiting.messages.pop_front()?
        };
        // Decoded without the lock, so that others do not wait for it.
        let mut tasks = match self.decode(delivery, received) {
            Ok(tasks) => tasks,
            Err(message) => return Some(self.arrival(*message)),
        };
        let first = tasks.pop_front();
        let mut waiting = self.waiting.lock();
        // The connection may have been lost in between.
        if first.as_ref().is_some_and(|task| task.bundle.tag.epoch == waiting.epoch) {
            waiting.tasks.append(&mut tasks);
        }
        first.map(Arrival::from)
    }

    /// Takes all waiting tasks that `wanted` selects.
    pub(crate) fn take(&self, wanted: impl Fn(&TaskMessage) -> bool) -> Vec<Arrival> {
        let mut waiting = self.waiting.lock();
        let mut taken = vec![];
        for (delivery, received) in std::mem::take(&mut waiting.messages) {
            if wire::bundle::is_one(&delivery.message) {
                self.decode_if_wanted((delivery, received), &wanted, &mut waiting);
            } else if self.is_wanted(&delivery, &wanted) {
                taken.push(self.arrival(*delivery));
            } else {
                waiting.messages.push_back((delivery, received));
            }
        }
        let tasks = std::mem::take(&mut waiting.tasks).into_iter();
        let (found, rest): (VecDeque<_>, _) = tasks.partition(|task| wanted(&task.task));
        waiting.tasks = rest;
        taken.extend(found.into_iter().map(Arrival::from));
        taken
    }

    /// Decodes a bundle before its turn if it contains a wanted task.
    fn decode_if_wanted(
        &self,
        (delivery, received): (Box<Delivery>, Received),
        wanted: impl Fn(&TaskMessage) -> bool,
        waiting: &mut Waiting,
    ) {
        let tasks = wire::bundle::decode(&delivery.message, &self.name);
        if !tasks.is_ok_and(|tasks| tasks.iter().any(wanted)) {
            return waiting.messages.push_back((delivery, received));
        }
        match self.decode(delivery, received) {
            Ok(mut tasks) => waiting.tasks.append(&mut tasks),
            Err(message) => waiting.messages.push_back((message, received)),
        }
    }

    fn is_wanted(&self, delivery: &Delivery, wanted: impl Fn(&TaskMessage) -> bool) -> bool {
        match wire::task::decode(&delivery.message, &self.name) {
            Ok(Some(task)) => wanted(&task),
            Ok(None) | Err(_) => false,
        }
    }

    /// Whether [`take_overdue`](Self::take_overdue) would take any task.
    pub(crate) fn has_overdue(&self, overdue: Overdue) -> bool {
        let waiting = self.waiting.lock();
        waiting.tasks.iter().any(|task| overdue.selects(&task.received))
            || waiting.messages.iter().any(|(delivery, received)| {
                overdue.selects(received) && wire::bundle::is_one(&delivery.message)
            })
    }

    /// Takes the overdue tasks of bundles, bundle by bundle.
    pub(crate) fn take_overdue(&self, overdue: Overdue) -> Vec<OverdueTasks> {
        let mut waiting = self.waiting.lock();
        let (mut decoded, mut kept) = (VecDeque::new(), VecDeque::new());
        for (delivery, received) in std::mem::take(&mut waiting.messages) {
            if !(overdue.selects(&received) && wire::bundle::is_one(&delivery.message)) {
                kept.push_back((delivery, received));
                continue;
            }
            match self.decode(delivery, received) {
                Ok(mut tasks) => decoded.append(&mut tasks),
                Err(message) => kept.push_back((message, received)),
            }
        }
        waiting.messages = kept;
        let tasks = std::mem::take(&mut waiting.tasks).into_iter();
        let (taken, rest): (VecDeque<_>, VecDeque<_>) =
            tasks.partition(|task| overdue.selects(&task.received));
        waiting.tasks = rest;
        by_bundle(taken.into_iter().chain(decoded))
    }

    /// Takes all messages that are not bundles.
    pub(crate) fn take_messages(&self) -> Vec<Arrival> {
        let mut waiting = self.waiting.lock();
        let messages = std::mem::take(&mut waiting.messages).into_iter();
        let (bundles, single): (VecDeque<_>, VecDeque<_>) =
            messages.partition(|(delivery, _)| wire::bundle::is_one(&delivery.message));
        waiting.messages = bundles;
        single.into_iter().map(|(delivery, _)| self.arrival(*delivery)).collect()
    }

    /// Takes everything that is not a task of a decoded bundle.
    pub(crate) fn drain(&self) -> Vec<Delivery> {
        self.waiting.lock().messages.drain(..).map(|(delivery, _)| *delivery).collect()
    }

    pub(crate) fn arrival(&self, delivery: Delivery) -> Arrival {
        let Delivery { tag, message, redelivered, .. } = delivery;
        let source = TaskSource::Message(Box::new(message));
        Arrival { delivery: DeliveryRef { queue: self.index, tag }, redelivered, source }
    }

    /// The tasks of a bundle; the delivery itself if it is not a bundle or cannot be decoded.
    fn decode(
        &self,
        delivery: Box<Delivery>,
        received: Received,
    ) -> Result<VecDeque<BundledTask>, Box<Delivery>> {
        if !wire::bundle::is_one(&delivery.message) {
            return Err(delivery);
        }
        let Ok(tasks) = wire::bundle::decode(&delivery.message, &self.name) else {
            return Err(delivery);
        };
        self.unacked.is_bundle_of(delivery.tag, tasks.len());
        let bundle = DeliveryRef { queue: self.index, tag: delivery.tag };
        let app_id: Arc<str> = delivery.message.properties.app_id.unwrap_or_default().into();
        let bundled = |task| BundledTask {
            task: Arc::new(task),
            bundle,
            app_id: Arc::clone(&app_id),
            received,
        };
        Ok(tasks.into_iter().map(bundled).collect())
    }
}

fn by_bundle(tasks: impl Iterator<Item = BundledTask>) -> Vec<OverdueTasks> {
    let mut bundles: Vec<OverdueTasks> = vec![];
    for BundledTask { task, bundle, app_id, .. } in tasks {
        match bundles.last_mut().filter(|last| last.bundle == bundle) {
            Some(last) => last.tasks.push(task),
            None => bundles.push(OverdueTasks { bundle, app_id, tasks: vec![task] }),
        }
    }
    bundles
}

impl From<BundledTask> for Arrival {
    fn from(bundled: BundledTask) -> Self {
        let BundledTask { task, bundle, app_id, received: _ } = bundled;
        // A bundle that has been delivered before is split and does not get here.
        let source = TaskSource::Bundle { task, app_id };
        Self { delivery: bundle, redelivered: false, source }
    }
}
