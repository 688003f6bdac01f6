//! Intake: from a delivery to a settled attempt. The pipeline of the crate's documentation, in code.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{Consumer, Delivery};
use garenne_common::wire::Fence;
use garenne_common::{Options, TaskMessage, Timestamp};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::admit::{Admission, admit};
use crate::context::Context;
use crate::decide::decide;
use crate::execute::execute;
use crate::handler::{Handler, Registry, Slot};
use crate::inflight::{DeliveryRef, Inflight};
use crate::lease::LeaseTerms;
use crate::outcome::{Disposition, Outcome};
use crate::settle::{Arrival, Ended, Lane, Settlement, Signature, Subject, Successor};

/// What all attempts of a worker share.
pub(crate) struct Pipeline {
    pub(crate) registry: Registry,
    pub(crate) signature: Arc<Signature>,
    pub(crate) lanes: Arc<Vec<Lane>>,
    pub(crate) inflight: Arc<Inflight>,
    pub(crate) slots: Arc<Semaphore>,
    pub(crate) settle: mpsc::Sender<Settlement>,
    /// The limit for tasks that bring none.
    pub(crate) task_timeout: Duration,
    pub(crate) lease: LeaseTerms,
    /// No more tasks are begun.
    pub(crate) stop: CancellationToken,
    /// Running tasks are given up.
    pub(crate) abort: CancellationToken,
    pub(crate) attempts: TaskTracker,
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
    async fn take(this: &Arc<Self>, queue: usize, delivery: Delivery) {
        let delivery_ref = DeliveryRef { queue, tag: delivery.tag };
        this.lanes[queue].delivered(delivery.tag);
        let slot = tokio::select! {
            biased;
            () = this.stop.cancelled() => None,
            slot = Arc::clone(&this.slots).acquire_owned() => slot.ok(),
        };
        let Some(slot) = slot else {
            let back = Settlement::bare(Subject::Delivery(delivery_ref), Successor::HandBack);
            return this.settle(back).await;
        };
        let pipeline = Arc::clone(this);
        this.attempts.spawn(async move {
            pipeline.attempt(delivery_ref, delivery, Arc::new(slot)).await;
        });
    }

    /// A task's life: guard, execute, decide, settle.
    async fn attempt(&self, at: DeliveryRef, delivery: Delivery, slot: Slot) {
        let Delivery { message, redelivered, .. } = delivery;
        let queue = &self.lanes[at.queue].queue;
        let arrival = Arrival { delivery: at, message: &message, queue, at: Timestamp::now() };
        let find = |name: &_| self.registry.find(name);
        let (task, handler) = match admit(arrival, find, &self.inflight, &self.signature) {
            Admission::Run(task, handler) => (task, handler),
            Admission::Adopted => return,
            Admission::Settle(settlement) => return self.settle(*settlement).await,
        };
        let started_at = Timestamp::now();
        let lease = self.lease.fence(self.limit(&task.options), &message);
        if let Some(fence) = &lease {
            let lease = self.signature.lease(&task, &message, fence, self.lease.term);
            self.settle(lease).await;
        }
        let context = self.context(&task, redelivered, lease.as_ref());
        let disposition = self.run(context, started_at, &*handler, slot, lease.as_ref()).await;
        let finished_at = Timestamp::now();
        let ended = Ended { task, message, redelivered, started_at, finished_at, lease };
        self.settle(self.signature.settlement(&ended, disposition)).await;
    }

    async fn run(
        &self,
        context: Context,
        started_at: Timestamp,
        handler: &dyn Handler,
        slot: Slot,
        lease: Option<&Fence>,
    ) -> Disposition {
        let task = context.task();
        let span =
            tracing::info_span!("task", id = %task.id, name = %task.name, attempt = task.attempt);
        let limit = self.limit(&task.options);
        let attempt = execute(handler, &context, slot, limit, &self.abort);
        let attempt = attempt.instrument(span.clone());
        let outcome = match lease {
            None => attempt.await,
            Some(fence) => {
                let renewal = || Signature::renewal(task, fence, Timestamp::now());
                self.lease.renewing(attempt, &self.settle, renewal).await
            }
        };
        span.in_scope(|| log(task, &outcome, started_at));
        decide(outcome, task.attempt, &task.options.retry, fastrand::f64())
    }

    fn context(
        &self,
        task: &Arc<TaskMessage>,
        redelivered: bool,
        lease: Option<&Fence>,
    ) -> Context {
        let worker = Arc::clone(&self.signature.worker);
        let fence = lease.map(|fence| fence.number);
        Context::new(Arc::clone(task), worker, redelivered, fence, CancellationToken::new())
    }

    fn limit(&self, options: &Options) -> Duration {
        options.timeout.unwrap_or(self.task_timeout)
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
    }
}
