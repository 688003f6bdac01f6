//! Intake: from a delivery to a settled attempt. The pipeline of the crate's documentation, in code.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{Consumer, Delivery};
use garenne_common::wire::Fence;
use garenne_common::{DeadReason, Options, TaskMessage, Timestamp};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::admit::{Admission, admit};
use crate::context::{Context, Facts};
use crate::decide::decide;
use crate::doors::{Doors, Entered, Entry};
use crate::execute::{Limits, execute};
use crate::handler::{Registry, Slot};
use crate::inflight::{DeliveryRef, Inflight};
use crate::lease::LeaseTerms;
use crate::outcome::{Crash, Disposition, Outcome};
use crate::settle::{Arrival, Ended, Lane, Settlement, Signature, Subject};
use crate::slots::freed;
use crate::suspect::{self, Standing};

/// What all attempts of a worker share.
pub(crate) struct Pipeline {
    pub(crate) registry: Registry,
    pub(crate) signature: Arc<Signature>,
    pub(crate) lanes: Arc<Vec<Lane>>,
    pub(crate) inflight: Arc<Inflight>,
    pub(crate) doors: Doors,
    pub(crate) settle: mpsc::Sender<Settlement>,
    /// The limit for tasks that bring none.
    pub(crate) task_timeout: Duration,
    /// How long a process may take to end after it was told to.
    pub(crate) kill_grace: Duration,
    pub(crate) lease: LeaseTerms,
    /// No more tasks are begun.
    pub(crate) stop: CancellationToken,
    /// Running tasks are given up.
    pub(crate) abort: CancellationToken,
    pub(crate) attempts: TaskTracker,
    /// Wait for handlers that go on after their attempts have ended.
    pub(crate) watchers: TaskTracker,
}

/// Takes deliveries of one queue until the consumer ends.
pub(crate) async fn intake(pipeline: Arc<Pipeline>, queue: usize, mut consumer: Consumer) {
    loop {
        tokio::select! {
            delivery = consumer.next() => match delivery {
                Some(delivery) => Pipeline::take(&pipeline, queue, delivery).await,
                None => return,
            },
            // What is on its way still comes and is handed back by `take`.
            () = pipeline.stop.cancelled(), if !consumer.is_stopping() => consumer.stop(),
        }
    }
}

impl Pipeline {
    /// Begins an attempt as soon as a slot is free; a stopping worker hands the delivery back.
    ///
    /// What is conspicuous waits for its turn by itself, so that nothing else has to wait behind it.
    async fn take(this: &Arc<Self>, queue: usize, delivery: Delivery) {
        let delivery_ref = DeliveryRef { queue, tag: delivery.tag };
        this.lanes[queue].delivered(delivery.tag);
        let mut slot = None;
        if !suspect::is_conspicuous(&delivery.message, delivery.redelivered) {
            slot = tokio::select! {
                biased;
                () = this.stop.cancelled() => None,
                slot = this.doors.slots.one() => slot,
            };
            if slot.is_none() {
                let (subject, queue) = (Subject::Delivery(delivery_ref), &this.lanes[queue].queue);
                let back = this.signature.hand_back(subject, &delivery.message, queue);
                return this.settle(back).await;
            }
        }
        let pipeline = Arc::clone(this);
        this.attempts.spawn(async move { pipeline.attempt(delivery_ref, delivery, slot).await });
    }

    /// A task's life: guard, execute, decide, settle.
    async fn attempt(&self, at: DeliveryRef, delivery: Delivery, slot: Option<Slot>) {
        let Delivery { message, redelivered, .. } = delivery;
        let queue = &self.lanes[at.queue].queue;
        let arrival = Arrival { delivery: at, message: &message, queue, at: Timestamp::now() };
        let find = |name: &_| self.registry.find(name);
        let (task, handler) = match admit(arrival, find, &self.inflight, &self.signature) {
            Admission::Run(task, handler) => (task, handler),
            Admission::Adopted => return,
            Admission::Settle(settlement) => return self.settle(*settlement).await,
        };
        let standing = Standing::of(&message, redelivered);
        let entry = match slot {
            Some(slot) => Entry::Run(Entered { handler, slot, trial: None }),
            None => self.doors.enter(&standing, handler, &self.stop).await,
        };
        let started_at = Timestamp::now();
        let mut ended =
            Ended { task, message, redelivered, started_at, finished_at: started_at, lease: None };
        let disposition = match entry {
            Entry::Run(entered) => self.run(&mut ended, &standing, entered).await,
            Entry::Renew(after) => Disposition::Again { after },
            Entry::HandBack => Disposition::Requeue,
            Entry::GiveUp(error) => {
                tracing::error!(id = %ended.task.id, name = %ended.task.name, error, "given up");
                Disposition::DeadLetter { reason: DeadReason::Crashed, error }
            }
        };
        ended.finished_at = Timestamp::now();
        self.settle(self.signature.settlement(&ended, disposition)).await;
    }

    /// Runs an attempt, under a lease if it may be long.
    async fn run(&self, ended: &mut Ended, standing: &Standing, entered: Entered) -> Disposition {
        let (task, message) = (Arc::clone(&ended.task), &ended.message);
        let lease = self.lease.fence(self.limit(&task.options), message);
        if let Some(fence) = &lease {
            let lease = self.signature.lease(&task, message, fence, self.lease.term);
            self.settle(lease).await;
        }
        ended.lease = lease;
        let context = self.context(ended, standing);
        let outcome = self.execute(&context, entered, ended.lease.as_ref()).await;
        if let Outcome::Crashed(crash) = &outcome {
            ended.message = crash.record.write(&ended.message);
        }
        decide(outcome, task.attempt, &task.options.retry, fastrand::f64())
    }

    async fn execute(&self, context: &Context, entered: Entered, lease: Option<&Fence>) -> Outcome {
        let (task, begun) = (context.task(), Timestamp::now());
        let span =
            tracing::info_span!("task", id = %task.id, name = %task.name, attempt = task.attempt);
        let Entered { handler, slot, trial: _held } = entered;
        let free = freed(&slot);
        let attempt = execute(&*handler, context, slot, self.limits(&task.options), &self.abort);
        let attempt = attempt.instrument(span.clone());
        let outcome = match lease {
            None => attempt.await,
            Some(fence) => {
                let renewal = || Signature::renewal(task, fence, Timestamp::now());
                self.lease.renewing(attempt, &self.settle, renewal).await
            }
        };
        span.in_scope(|| log(task, &outcome, begun));
        if !free.is_cancelled() {
            let (slots, stop) = (Arc::clone(&self.doors.slots), self.abort.clone());
            let context = context.clone();
            self.watchers.spawn(async move { slots.watch(context.task(), free, &stop).await });
        }
        outcome
    }

    fn context(&self, ended: &Ended, standing: &Standing) -> Context {
        let (task, worker) = (Arc::clone(&ended.task), Arc::clone(&self.signature.worker));
        let facts = Facts {
            redelivered: ended.redelivered,
            crashes: standing.crashes.count,
            fence: ended.lease.as_ref().map(|fence| fence.number),
        };
        Context::new(task, worker, facts, CancellationToken::new())
    }

    fn limit(&self, options: &Options) -> Duration {
        options.timeout.unwrap_or(self.task_timeout)
    }

    fn limits(&self, options: &Options) -> Limits {
        let (hard, grace) = (self.limit(options), self.kill_grace);
        Limits { soft: options.soft_timeout, hard, grace }
    }

    async fn settle(&self, settlement: Settlement) {
        // The settling task outlives every attempt, so this fails only in a panic of that task.
        if self.settle.send(settlement).await.is_err() {
            tracing::error!("nobody settles any more; the broker will deliver the task again");
        }
    }
}

fn log(task: &TaskMessage, outcome: &Outcome, started_at: Timestamp) {
    let took = Timestamp::now().since(started_at);
    let last = !task.options.retry.allows_another(task.attempt);
    match outcome {
        Outcome::Succeeded(_) => tracing::debug!(?took, "succeeded"),
        Outcome::Interrupted => tracing::warn!(?took, "interrupted; it goes back to its queue"),
        Outcome::BadArguments(error) => tracing::warn!(error, "wrong arguments"),
        Outcome::Failed(error) => tracing::warn!(?took, last, error = error.message(), "failed"),
        Outcome::TimedOut(limit) => tracing::warn!(last, ?limit, "timed out"),
        Outcome::Panicked(message) => tracing::error!(last, message, "panicked"),
        Outcome::Crashed(Crash { record, budget, how }) => {
            tracing::error!(?took, crashes = record.count, budget, how, "its process died");
        }
    }
}
