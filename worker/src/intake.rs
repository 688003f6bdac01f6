//! Intake: from a delivery to a settled attempt. The pipeline of the crate's documentation, in code.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{Consumer, Delivery};
use garenne_common::guards::Guard;
use garenne_common::wire::Fence;
use garenne_common::{DeadReason, Options, TaskMessage, Timestamp, wire};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::admit::{Admission, admit};
use crate::cancels::Cancels;
use crate::context::{Context, Facts};
use crate::decide::{decide, heed};
use crate::doors::{Doors, Entered, Entry};
use crate::execute::{Limits, Stops, execute};
use crate::handler::{Handler, Registry, Slot};
use crate::inflight::{DeliveryRef, Inflight};
use crate::lease::LeaseTerms;
use crate::outcome::{Crash, Disposition, Outcome};
use crate::register::{Place, Register};
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
    pub(crate) register: Arc<Register>,
    pub(crate) cancels: Arc<Cancels>,
    /// How long a cancelled attempt may take to end.
    pub(crate) cancel_grace: Duration,
}

/// Deliveries that wait for a slot; as many as the prefetch lets come.
type Waiting = VecDeque<Delivery>;

/// Takes deliveries of one queue until the worker stops, and then hands back what did not begin.
pub(crate) async fn intake(pipeline: Arc<Pipeline>, queue: usize, mut consumer: Consumer) {
    let mut waiting = Waiting::new();
    let mut news = pipeline.cancels.news();
    loop {
        tokio::select! {
            biased;
            () = pipeline.stop.cancelled() => break,
            Ok(()) = news.changed() => Pipeline::end_cancelled(&pipeline, queue, &mut waiting),
            Some(slot) = pipeline.doors.slots.one(), if !waiting.is_empty() => {
                if let Some(delivery) = waiting.pop_front() {
                    Pipeline::begin(&pipeline, queue, delivery, Some(slot));
                }
            }
            delivery = consumer.next() => match delivery {
                Some(delivery) => {
                    pipeline.lanes[queue].delivered(delivery.tag);
                    // What is conspicuous waits for its turn by itself, so that nothing else has to
                    // wait behind it.
                    if suspect::is_conspicuous(&delivery.message, delivery.redelivered) {
                        Pipeline::begin(&pipeline, queue, delivery, None);
                    } else {
                        waiting.push_back(delivery);
                    }
                }
                None => break,
            },
        }
    }
    consumer.stop();
    for delivery in waiting {
        pipeline.hand_back(queue, &delivery).await;
    }
    // What was on its way still comes.
    while let Some(delivery) = consumer.next().await {
        pipeline.lanes[queue].delivered(delivery.tag);
        pipeline.hand_back(queue, &delivery).await;
    }
}

impl Pipeline {
    fn begin(this: &Arc<Self>, queue: usize, delivery: Delivery, slot: Option<Slot>) {
        let pipeline = Arc::clone(this);
        this.attempts.spawn(async move {
            pipeline.attempt(DeliveryRef { queue, tag: delivery.tag }, delivery, slot).await;
        });
    }

    /// Lets what was cancelled while it waited go ahead without a slot, since it will not run.
    fn end_cancelled(this: &Arc<Self>, queue: usize, waiting: &mut Waiting) {
        let name = &this.lanes[queue].queue;
        let is_cancelled = |delivery: &Delivery| match wire::task::decode(&delivery.message, name) {
            Ok(Some(task)) => this.cancels.wish(&task).is_some(),
            Ok(None) | Err(_) => false,
        };
        let (cancelled, rest): (Waiting, Waiting) = waiting.drain(..).partition(is_cancelled);
        *waiting = rest;
        for delivery in cancelled {
            Self::begin(this, queue, delivery, None);
        }
    }

    async fn hand_back(&self, queue: usize, delivery: &Delivery) {
        if !Guard::DrainHandBack.holds() {
            return;
        }
        let subject = Subject::Delivery(DeliveryRef { queue, tag: delivery.tag });
        let queue = &self.lanes[queue].queue;
        self.settle(self.signature.hand_back(subject, &delivery.message, queue)).await;
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
        // Entered first and looked up then, so that a wish that comes now is missed by neither.
        let place = self.register.enter(&task);
        if self.cancels.wish(&task).is_some() {
            place.cancel.cancel();
        }
        let standing = Standing::of(&message, redelivered);
        let entry = tokio::select! {
            biased;
            () = place.cancel.cancelled() => None,
            entry = self.enter(slot, &standing, handler) => Some(entry),
        };
        let started_at = Timestamp::now();
        let mut ended =
            Ended { task, message, redelivered, started_at, finished_at: started_at, lease: None };
        let Some(entry) = entry else {
            let wish = self.cancels.wish(&ended.task);
            let reason = wish.as_deref().unwrap_or("cancelled");
            tracing::info!(id = %ended.task.id, reason, "cancelled before it began");
            return self.settle(self.signature.unbegun(&ended, reason)).await;
        };
        let disposition = match entry {
            Entry::Run(entered) => self.run(&mut ended, &standing, entered, &place).await,
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

    async fn enter(
        &self,
        slot: Option<Slot>,
        standing: &Standing,
        handler: Arc<dyn Handler>,
    ) -> Entry {
        match slot {
            Some(slot) => Entry::Run(Entered { handler, slot, trial: None }),
            None => self.doors.enter(standing, handler, &self.stop).await,
        }
    }

    /// Runs an attempt, under a lease if it may be long.
    async fn run(
        &self,
        ended: &mut Ended,
        standing: &Standing,
        entered: Entered,
        place: &Place,
    ) -> Disposition {
        let (task, message) = (Arc::clone(&ended.task), &ended.message);
        let lease = self.lease.fence(self.limit(&task.options), message);
        if let Some(fence) = &lease {
            let lease = self.signature.lease(&task, message, fence, self.lease.term);
            self.settle(lease).await;
        }
        ended.lease = lease;
        let context = self.context(ended, standing);
        let outcome = self.execute(&context, entered, (place, ended.lease.as_ref())).await;
        if let Outcome::Crashed(crash) = &outcome {
            ended.message = crash.record.write(&ended.message);
        }
        let decided = decide(outcome, task.attempt, &task.options.retry, fastrand::f64());
        match self.cancels.wish(&task) {
            Some(reason) => heed(decided, &reason),
            None => decided,
        }
    }

    async fn execute(
        &self,
        context: &Context,
        entered: Entered,
        (place, lease): (&Place, Option<&Fence>),
    ) -> Outcome {
        let (task, begun) = (context.task(), Timestamp::now());
        let span =
            tracing::info_span!("task", id = %task.id, name = %task.name, attempt = task.attempt);
        let Entered { handler, slot, trial: _held } = entered;
        let free = freed(&slot);
        let (limits, cancel_grace) = (self.limits(&task.options), self.cancel_grace);
        let stops = Stops { abort: &self.abort, cancel: &place.cancel, cancel_grace };
        let attempt = execute(&*handler, context, slot, limits, stops);
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
        Outcome::Cancelled => tracing::warn!(?took, "cancelled, and did not end by itself"),
        Outcome::BadArguments(error) => tracing::warn!(error, "wrong arguments"),
        Outcome::Failed(error) => tracing::warn!(?took, last, error = error.message(), "failed"),
        Outcome::TimedOut(limit) => tracing::warn!(last, ?limit, "timed out"),
        Outcome::Panicked(message) => tracing::error!(last, message, "panicked"),
        Outcome::Crashed(Crash { record, budget, how }) => {
            tracing::error!(?took, crashes = record.count, budget, how, "its process died");
        }
    }
}
