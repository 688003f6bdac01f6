//! One attempt, from its delivery to its settlement. The pipeline of the crate's documentation, in code.

use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::broker::Delivery;
use garenne_common::bundling::DurationEstimates;
use garenne_common::health::STALL_TIMEOUT;
use garenne_common::wire::{self, Fence};
use garenne_common::{DeadReason, Options, ProcessHealth, TaskMessage, Timestamp};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::admit::{Admission, admit, admit_member};
use crate::cancels::Cancels;
use crate::ceilings::Ceilings;
use crate::context::{Context, Facts};
use crate::decide::{decide, heed};
use crate::doors::{Doors, Entered, Entry};
use crate::execute::{Limits, Stops, execute};
use crate::fitness::{Concern, Fitness};
use crate::handler::{Handler, Registry, Slot};
use crate::inflight::{DeliveryRef, Inflight};
use crate::lease::LeaseTerms;
use crate::line::{Line, Member, Work};
use crate::outcome::{Crash, Disposition, Outcome};
use crate::register::{Place, Register};
use crate::settle::{Arrival, Carrier, Ended, Lane, SettleGauge, Settlement, Signature};
use crate::slots::freed;
use crate::suspect::Standing;

/// What all attempts of a worker share.
pub(crate) struct Pipeline {
    pub(crate) registry: Registry,
    pub(crate) signature: Arc<Signature>,
    pub(crate) lanes: Arc<Vec<Lane>>,
    /// What waits for a slot, queue by queue.
    pub(crate) lines: Vec<Line>,
    pub(crate) inflight: Arc<Inflight>,
    pub(crate) doors: Doors,
    pub(crate) settle: mpsc::Sender<Settlement>,
    pub(crate) gauge: Arc<SettleGauge>,
    /// How long tasks take, by name.
    pub(crate) pace: DurationEstimates,
    /// The right to split a bundle.
    pub(crate) splits: Semaphore,
    /// The limit for tasks that bring none.
    pub(crate) task_timeout: Duration,
    /// How long a process may take to end after it was told to.
    pub(crate) kill_grace: Duration,
    pub(crate) lease: LeaseTerms,
    pub(crate) ceilings: Ceilings,
    /// No more tasks are begun.
    pub(crate) stop: CancellationToken,
    /// Running tasks are given up.
    pub(crate) abort: CancellationToken,
    pub(crate) attempts: TaskTracker,
    /// Wait for handlers that go on after their attempts have ended.
    pub(crate) watchers: TaskTracker,
    pub(crate) register: Arc<Register>,
    /// What is wrong with this worker now.
    pub(crate) health: ProcessHealth,
    /// Whether trouble of its own keeps it from running tasks.
    pub(crate) fitness: Fitness,
    pub(crate) cancels: Arc<Cancels>,
    /// How long a cancelled attempt may take to end.
    pub(crate) cancel_grace: Duration,
}

impl Pipeline {
    /// A task's life: guard, execute, decide, settle. Gives the slot back if it is free again.
    pub(crate) async fn attempt(
        &self,
        queue: usize,
        work: Work,
        slot: Option<Slot>,
    ) -> Option<Slot> {
        let (admission, carrier, redelivered) = self.admit(queue, work);
        let (task, handler) = match admission {
            Admission::Run(task, handler) => (task, handler),
            Admission::Adopted => return slot,
            Admission::Settle(settlement) => {
                self.settle(*settlement).await;
                return slot;
            }
        };
        // Entered first and looked up then, so that a wish that comes now is missed by neither.
        let place = self.register.enter(&task);
        if self.cancels.wish(&task).is_some() {
            place.cancel.cancel();
        }
        let standing = match &carrier {
            Carrier::Alone(message) => Standing::of(message, redelivered),
            // A bundle that came before does not get here.
            Carrier::Bundle { .. } => Standing::default(),
        };
        let concern = self.concern(&task, slot.as_ref(), &*handler);
        let entry = tokio::select! {
            biased;
            () = place.cancel.cancelled() => None,
            entry = self.enter(slot, (&standing, concern.as_ref()), handler) => Some(entry),
        };
        let started_at = Timestamp::now();
        let mut ended =
            Ended { task, carrier, redelivered, started_at, finished_at: started_at, lease: None };
        let Some(entry) = entry else {
            let wish = self.cancels.wish(&ended.task);
            let reason = wish.as_deref().unwrap_or("cancelled");
            tracing::info!(id = %ended.task.id, reason, "cancelled before it began");
            self.settle(self.signature.unbegun(&ended, reason)).await;
            return None;
        };
        let mut free = None;
        let disposition = match entry {
            Entry::Run(entered) => {
                place.begin();
                let disposition;
                let concern = concern.as_ref();
                (disposition, free) =
                    self.run(&mut ended, (&standing, concern), entered, &place).await;
                disposition
            }
            Entry::Renew(after) => {
                ended.keep_suspect(&standing);
                Disposition::Again { after }
            }
            Entry::Refused(after, slot) => {
                free = slot;
                ended.keep_suspect(&standing);
                Disposition::Again { after }
            }
            Entry::HandBack => Disposition::Requeue,
            Entry::GiveUp(error) => {
                tracing::error!(id = %ended.task.id, name = %ended.task.name, error, "given up");
                Disposition::DeadLetter { reason: DeadReason::Crashed, error }
            }
        };
        ended.finished_at = Timestamp::now();
        self.settle(self.signature.settlement(&ended, disposition)).await;
        free
    }

    /// Publishes the attempt that a task asks for again with a delay, without making it.
    pub(crate) async fn put_off(&self, queue: usize, work: Work, after: Duration) {
        let (admission, carrier, redelivered) = self.admit(queue, work);
        let task = match admission {
            Admission::Run(task, _) => task,
            Admission::Adopted => return,
            Admission::Settle(settlement) => return self.settle(*settlement).await,
        };
        let at = Timestamp::now();
        let (started_at, finished_at) = (at, at);
        let ended = Ended { task, carrier, redelivered, started_at, finished_at, lease: None };
        self.settle(self.signature.settlement(&ended, Disposition::Again { after })).await;
    }

    fn admit(&self, queue: usize, work: Work) -> (Admission<Arc<dyn Handler>>, Carrier, bool) {
        let (find, at) = (|name: &_| self.registry.find(name), Timestamp::now());
        match work {
            Work::Alone(delivery) => {
                let Delivery { tag, message, redelivered, .. } = *delivery;
                let (delivery, queue) = (DeliveryRef { queue, tag }, &self.lanes[queue].queue);
                let arrival = Arrival { delivery, message: &message, queue, at };
                let admission = admit(arrival, find, &self.inflight, &self.signature);
                (admission, Carrier::Alone(Box::new(message)), redelivered)
            }
            Work::Member(Member { task, bundle, app_id, .. }) => {
                let sender = (&*app_id, at);
                let (inflight, signature) = (&self.inflight, &self.signature);
                let admission = admit_member((task, bundle), sender, find, inflight, signature);
                (admission, Carrier::Bundle { app_id }, false)
            }
        }
    }

    /// What this attempt needs to begin, beside room in the worker.
    fn concern(
        &self,
        task: &TaskMessage,
        slot: Option<&Slot>,
        handler: &dyn Handler,
    ) -> Option<Concern> {
        if handler.is_process() {
            Some(Concern::Command(task.name.clone()))
        } else if slot.is_none() && self.doors.isolates() {
            Some(Concern::Isolation)
        } else {
            None
        }
    }

    async fn enter(
        &self,
        slot: Option<Slot>,
        (standing, concern): (&Standing, Option<&Concern>),
        handler: Arc<dyn Handler>,
    ) -> Entry {
        if let Some(after) = concern.and_then(|concern| self.fitness.refusal(concern)) {
            return Entry::Refused(after, slot);
        }
        if let Some(slot) = slot {
            return Entry::Run(Entered { handler, slot, trial: None });
        }
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Entry::HandBack,
            () = self.fitness.ready() => self.doors.enter(standing, handler, &self.stop).await,
        }
    }

    /// Runs an attempt, under a lease if it may be long.
    async fn run(
        &self,
        ended: &mut Ended,
        (standing, concern): (&Standing, Option<&Concern>),
        entered: Entered,
        place: &Place,
    ) -> (Disposition, Option<Slot>) {
        let task = Arc::clone(&ended.task);
        let lease = self.lease.fence(self.limit(&task.options), &ended.carrier);
        if let Some(fence) = &lease {
            let message = ended.carrier.message(&task);
            let lease = self.signature.lease(&task, &message, fence, self.lease.term);
            self.settle(lease).await;
        }
        ended.lease = lease;
        let context = self.context(ended, standing);
        let lease = ended.lease.as_ref();
        let (mut outcome, free) = self.execute(&context, entered, (place, lease)).await;
        if let Outcome::Crashed(crash) = &outcome {
            let message = crash.record.write(&ended.carrier.message(&task));
            ended.carrier = Carrier::Alone(Box::new(message));
        }
        if let Outcome::Unable(trouble) = &mut outcome {
            trouble.after = self.fitness.failed(&task.name, trouble);
            ended.keep_suspect(standing);
        } else {
            self.fitness.worked(concern);
        }
        let decided = decide(outcome, task.attempt, &task.options.retry, fastrand::f64());
        let decided = self.ceilings.bound(decided, task.attempt, || age(ended));
        let disposition = match self.cancels.wish(&task) {
            Some(reason) => heed(decided, &reason),
            None => decided,
        };
        (disposition, free)
    }

    async fn execute(
        &self,
        context: &Context,
        entered: Entered,
        (place, lease): (&Place, Option<&Fence>),
    ) -> (Outcome, Option<Slot>) {
        let (task, begun) = (context.task(), Instant::now());
        let span =
            tracing::info_span!("task", id = %task.id, name = %task.name, attempt = task.attempt);
        let Entered { handler, slot, trial: _held } = entered;
        let (limits, cancel_grace) = (self.limits(&task.options), self.cancel_grace);
        let stops = Stops { abort: &self.abort, cancel: &place.cancel, cancel_grace };
        let attempt = execute(&*handler, context, Arc::clone(&slot), limits, stops);
        let attempt = attempt.instrument(span.clone());
        let outcome = match lease {
            None => attempt.await,
            Some(fence) => {
                let renewal = || Signature::renewal(task, fence, Timestamp::now());
                self.lease.renewing(attempt, (&self.settle, &self.gauge), renewal).await
            }
        };
        let took = begun.elapsed();
        if !matches!(outcome, Outcome::Unable(_)) {
            self.pace.note(&task.name, took);
        }
        span.in_scope(|| log(task, &outcome, took));
        (outcome, self.regain(context, slot))
    }

    /// The slot, if nobody computes on in it.
    fn regain(&self, context: &Context, slot: Slot) -> Option<Slot> {
        if Arc::strong_count(&slot) == 1 {
            return Some(slot);
        }
        let (slots, stop) = (Arc::clone(&self.doors.slots), self.abort.clone());
        let (context, free) = (context.clone(), freed(&slot));
        self.watchers.spawn(async move { slots.watch(context.task(), free, &stop).await });
        None
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

    /// How long an attempt without a limit of its own takes at most until it has ended, with all
    /// that is granted to it afterwards.
    pub(crate) fn longest_end(&self) -> impl Fn(&TaskMessage) -> Duration {
        let (grace, default) =
            (self.kill_grace + self.cancel_grace + STALL_TIMEOUT, self.task_timeout);
        move |task| task.options.timeout.unwrap_or(default) + grace
    }

    fn limits(&self, options: &Options) -> Limits {
        let (hard, grace) = (self.limit(options), self.kill_grace);
        Limits { soft: options.soft_timeout, hard, grace }
    }

    pub(crate) async fn settle(&self, settlement: Settlement) {
        self.gauge.submit();
        // The settling task outlives every attempt, so this fails only in a panic of that task.
        if self.settle.send(settlement).await.is_err() {
            tracing::error!("nobody settles any more; the broker will deliver the task again");
        }
    }
}

/// How long ago the first attempt began.
fn age(ended: &Ended) -> Duration {
    let first = match &ended.carrier {
        Carrier::Alone(message) => wire::task::first_attempt_at(message),
        // A retry never comes in a bundle.
        Carrier::Bundle { .. } => None,
    };
    Timestamp::now().since(first.unwrap_or(ended.started_at).min(ended.started_at))
}

impl Ended {
    /// A task that is published again arrives without the broker's mark of what it delivers again.
    fn keep_suspect(&mut self, standing: &Standing) {
        if standing.is_suspect() {
            let mut message = self.carrier.message(&self.task).into_owned();
            wire::crash::mark_returned(&mut message);
            self.carrier = Carrier::Alone(Box::new(message));
        }
    }
}

fn log(task: &TaskMessage, outcome: &Outcome, took: Duration) {
    let last = !task.options.retry.allows_another(task.attempt);
    match outcome {
        Outcome::Succeeded(_) => tracing::debug!(?took, "succeeded"),
        Outcome::Interrupted => tracing::warn!(?took, "interrupted; it goes back to its queue"),
        // `ProcessHealth` logs it, once for all tasks.
        Outcome::Unable(trouble) => tracing::debug!(detail = trouble.detail, "could not begin"),
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
