//! Intake: receives the deliveries of one queue and starts attempts when permits are free.
//!
//! Deliveries come in, and attempts go to the pipeline. A permit that is free takes the next waiting task,
//! and keeps taking tasks for a short turn, so that many short tasks share one start. Tasks that were
//! delivered before wait for permits by themselves, and bundles that were delivered before are split. Tasks
//! of bundles that wait too long are rebalanced if other workers may be idle
//! (docs/decisions/0017-bundles-are-only-a-way-to-a-worker.md).

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{self, Either};
use garenne_common::broker::{BrokerError, Consumer, Delivery, QueueStatus};
use garenne_common::bundling::Limits;
use garenne_common::failpoints::Protection;
use garenne_common::{TaskMessage, wire};
use tokio::time::MissedTickBehavior;

pub(crate) mod local_queue;
pub(crate) mod queue;
pub(crate) mod source;
pub(crate) mod unacked;

use local_queue::{Overdue, OverdueTasks};
use queue::{QueueIndex, ServedQueue};
use source::Arrival;

use crate::run::Pipeline;
use crate::run::concurrency::Permit;
use crate::run::history;
use crate::run::start_backoff::Requirement;
use crate::run::validate::{must_be_split, split_bundle};
use crate::settle::Subject;

/// How long a permit takes one task after another before it is released: suspects and other queues wait
/// for permits too.
const TURN: Duration = Duration::from_millis(5);
/// Maximum number of deliveries that are received in a row.
const RECEIVE_BATCH: usize = 64;
/// How long a task of a bundle waits before it is rebalanced.
const REBALANCE_AFTER: Duration = Duration::from_millis(100);
/// Bundle size of rebalanced tasks.
const REBALANCED_BUNDLE: Limits =
    Limits { tasks: wire::bundle::MAX_TASKS, work: Duration::from_millis(10) };
const OVERDUE: Overdue = Overdue { longer_than: Some(REBALANCE_AFTER), once: true };

/// Receives the deliveries of one queue until the worker stops, then returns those that have not started.
pub(crate) async fn intake(pipeline: Arc<Pipeline>, index: QueueIndex, mut consumer: Consumer) {
    let queue = &pipeline.queues[index.0];
    let mut cancel_requests = pipeline.cancel_requests.changes();
    let mut tick = tokio::time::interval(REBALANCE_AFTER);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut status = Either::Left(future::pending());
    loop {
        tokio::select! {
            biased;
            () = pipeline.stop.cancelled() => break,
            Ok(()) = cancel_requests.changed() => pipeline.end_cancelled(index),
            Some(permit) = pipeline.gate.concurrency.one(),
                if !queue.waiting.is_empty() && pipeline.backoff.may_start() =>
            {
                pipeline.start_turn(index, permit);
            }
            _ = tick.tick() => {
                queue.follow(&consumer);
                pipeline.maintain(index);
                let requested = matches!(status, Either::Right(_));
                if !requested && queue.waiting.has_overdue(OVERDUE) {
                    status = Either::Right(Box::pin(consumer.status()));
                }
            }
            answer = &mut status => {
                status = Either::Left(future::pending());
                queue.follow(&consumer);
                pipeline.rebalance(index, answer);
            }
            delivery = consumer.next() => match delivery {
                Some(delivery) => {
                    pipeline.receive(index, delivery);
                    let more = std::iter::from_fn(|| consumer.try_next()).take(RECEIVE_BATCH);
                    more.for_each(|delivery| pipeline.receive(index, delivery));
                }
                None => break,
            },
        }
    }
    // It may hold the lock of the connection, which the consumer needs, and it is no longer polled.
    drop(status);
    pipeline.drain_queue(queue, consumer).await;
}

impl ServedQueue {
    /// Discards the waiting tasks of a channel that is closed. They are delivered again and must not be
    /// published from here.
    fn follow(&self, consumer: &Consumer) {
        match consumer.epoch() {
            Some(epoch) => self.waiting.enter_epoch(epoch),
            None => self.waiting.clear(),
        }
    }
}

impl Pipeline {
    fn receive(self: &Arc<Self>, index: QueueIndex, delivery: Delivery) {
        let queue = &self.queues[index.0];
        queue.delivered(delivery.tag);
        let before = history::was_delivered_before(&delivery.message, delivery.redelivered);
        let is_bundle = wire::bundle::is_one(&delivery.message);
        if is_bundle && must_be_split(before) {
            self.split(index, delivery);
        } else if before && !is_bundle {
            // Waits for a permit by itself, so that nothing waits behind it.
            self.start(index, queue.waiting.arrival(delivery));
        } else {
            queue.waiting.push(delivery);
        }
    }

    /// Starts waiting tasks with a permit.
    fn start_turn(self: &Arc<Self>, index: QueueIndex, permit: Permit) {
        let pipeline = Arc::clone(self);
        self.attempts.spawn(async move { pipeline.take_turn(index, permit).await });
    }

    async fn take_turn(&self, index: QueueIndex, mut permit: Permit) {
        let queue = &self.queues[index.0];
        let begun = Instant::now();
        while let Some(arrival) = queue.waiting.next() {
            match self.attempt(queue, arrival, Some(permit)).await {
                Some(free) if begun.elapsed() < TURN && self.is_starting() => permit = free,
                Some(_) | None => return,
            }
        }
    }

    /// Whether attempts start at all.
    fn is_starting(&self) -> bool {
        !self.stop.is_cancelled() && !self.backoff.is_paused()
    }

    /// Starts a task that has no permit yet, or needs none.
    fn start(self: &Arc<Self>, index: QueueIndex, arrival: Arrival) {
        let pipeline = Arc::clone(self);
        self.attempts.spawn(async move {
            drop(pipeline.attempt(&pipeline.queues[index.0], arrival, None).await);
        });
    }

    /// Ends waiting tasks that have been cancelled. They need no permit, since they do not run.
    fn end_cancelled(self: &Arc<Self>, index: QueueIndex) {
        let cancelled = |task: &_| self.cancel_requests.reason(task).is_some();
        for arrival in self.queues[index.0].waiting.take(cancelled) {
            self.start(index, arrival);
        }
    }

    /// Splits a bundle that was delivered before, perhaps to a worker that one of its tasks crashed.
    fn split(self: &Arc<Self>, index: QueueIndex, delivery: Delivery) {
        let pipeline = Arc::clone(self);
        self.attempts.spawn(async move {
            // One at a time: each task of a bundle that is being split is a message in memory.
            let Ok(_turn) = pipeline.splits.acquire().await else { return };
            let queue = &pipeline.queues[index.0];
            let Ok(tasks) = wire::bundle::decode(&delivery.message, &queue.name) else {
                let arrival = queue.waiting.arrival(delivery);
                return drop(pipeline.attempt(queue, arrival, None).await);
            };
            tracing::info!(tasks = tasks.len(), "splitting a bundle that was delivered before");
            queue.unacked.is_bundle_of(delivery.tag, tasks.len());
            let bundle = queue.reference(delivery.tag);
            let app_id = delivery.message.properties.app_id.unwrap_or_default();
            let (known, settlements) = (&pipeline.known, &pipeline.settlements);
            for settlement in split_bundle(&tasks, bundle, &app_id, known, settlements) {
                pipeline.settle(settlement).await;
            }
        });
    }

    /// What is due from time to time, besides rebalancing.
    fn maintain(self: &Arc<Self>, index: QueueIndex) {
        self.backoff.recheck(|requirement| self.is_usable(requirement));
        self.return_messages(index);
        self.return_old_bundles(index);
    }

    /// Returns waiting messages to the delay queues if this worker lacks resources, so that other workers
    /// can take them. Bundles are rebalanced anyway.
    fn return_messages(self: &Arc<Self>, index: QueueIndex) {
        let Some(after) = self.backoff.return_due(index) else { return };
        let messages = self.queues[index.0].waiting.take_messages();
        tracing::debug!(tasks = messages.len(), "returned for lack of resources");
        let pipeline = Arc::clone(self);
        self.attempts.spawn(async move {
            for arrival in messages {
                pipeline.postpone(&pipeline.queues[index.0], arrival, after).await;
            }
        });
    }

    fn is_usable(&self, requirement: &Requirement) -> bool {
        match requirement {
            Requirement::Command(name) => self.registry.find(name).is_none_or(|it| it.is_usable()),
            Requirement::Isolation => true,
        }
    }

    /// Returns tasks of bundles that have waited so long that the consumer timeout is near: the broker
    /// would close the channel and deliver everything on it again.
    fn return_old_bundles(self: &Arc<Self>, index: QueueIndex) {
        let limit = self.lease.consumer_timeout() / 4;
        let old = Overdue { longer_than: Some(limit), once: false };
        if self.queues[index.0].waiting.has_overdue(old) {
            self.return_overdue(index, old);
        }
    }

    /// Returns overdue tasks if another worker may be idle: the queue is empty and has other consumers.
    fn rebalance(self: &Arc<Self>, index: QueueIndex, status: Result<QueueStatus, BrokerError>) {
        if status.is_ok_and(|status| status.ready == 0 && status.consumers > 1) {
            self.return_overdue(index, OVERDUE);
        }
    }

    fn return_overdue(self: &Arc<Self>, index: QueueIndex, overdue: Overdue) {
        let tasks = self.queues[index.0].waiting.take_overdue(overdue);
        let pipeline = Arc::clone(self);
        self.attempts
            .spawn(async move { pipeline.return_tasks(&pipeline.queues[index.0], tasks).await });
    }

    /// Publishes tasks of bundles again, in smaller bundles.
    async fn return_tasks(&self, queue: &ServedQueue, bundles: Vec<OverdueTasks>) {
        // Tasks whose duration is not known are published alone.
        let estimate = |name: &_| self.estimates.estimate(name).unwrap_or(REBALANCED_BUNDLE.work);
        for OverdueTasks { bundle, app_id, tasks } in bundles {
            tracing::debug!(tasks = tasks.len(), queue = %queue.name, "rebalanced");
            for part in REBALANCED_BUNDLE.divide(tasks, |task| task, estimate) {
                let part: Vec<&TaskMessage> = part.iter().map(|task| &**task).collect();
                let settlement = self.settlements.rebalance(bundle, &part, &app_id, &queue.name);
                self.settle(settlement).await;
            }
        }
    }

    /// Stops the consumer, and returns everything that has not started.
    async fn drain_queue(&self, queue: &ServedQueue, mut consumer: Consumer) {
        consumer.stop();
        // Receives everything first: while the broker still sends, returned messages would be delivered
        // here again, and marked as redelivered.
        let mut suspects = vec![];
        while let Some(delivery) = consumer.next().await {
            queue.delivered(delivery.tag);
            if history::was_delivered_before(&delivery.message, delivery.redelivered) {
                suspects.push(delivery);
            } else {
                queue.waiting.push(delivery);
            }
        }
        queue.follow(&consumer);
        self.return_waiting(queue).await;
        for suspect in &suspects {
            self.requeue(queue, suspect).await;
        }
    }

    /// Returns all waiting tasks. A bundle returns as a new one, since it would have to be split otherwise.
    pub(crate) async fn return_waiting(&self, queue: &ServedQueue) {
        if !Protection::DrainHandBack.is_enabled() {
            return;
        }
        let bundles = queue.waiting.take_overdue(Overdue::default());
        self.return_tasks(queue, bundles).await;
        for delivery in queue.waiting.drain() {
            self.requeue(queue, &delivery).await;
        }
    }

    async fn requeue(&self, queue: &ServedQueue, delivery: &Delivery) {
        if !Protection::DrainHandBack.is_enabled() {
            return;
        }
        let subject = Subject::task(queue.reference(delivery.tag));
        let settlement = self.settlements.requeue_message(subject, &delivery.message, &queue.name);
        self.settle(settlement).await;
    }
}
