//! The path of one task: validate, admit, run, decide, settle.
//!
//! A delivered task comes in, and a settlement goes to the settlement task. Nothing is acknowledged or
//! published here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::bundling::DurationEstimates;
use garenne_common::health::STALL_TIMEOUT;
use garenne_common::wire;
use garenne_common::{Options, ProcessHealth, TaskMessage, Timestamp};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

pub(crate) mod concurrency;
pub(crate) mod decide;
pub(crate) mod execute;
pub(crate) mod gate;
pub(crate) mod history;
pub(crate) mod known_attempts;
pub(crate) mod lease;
pub(crate) mod outcome;
pub(crate) mod retry_limits;
pub(crate) mod running_tasks;
pub(crate) mod start_backoff;
pub(crate) mod validate;

use concurrency::{Permit, released};
use decide::{apply_cancellation, decide};
use execute::{StopSignals, TimeLimits, execute};
use gate::{Admitted, Gate};
use history::DeliveryHistory;
use known_attempts::KnownAttempts;
use lease::LeaseTerms;
use outcome::{Crash, Disposition, Outcome};
use retry_limits::RetryLimits;
use running_tasks::{RunningTask, RunningTasks};
use start_backoff::{Requirement, StartBackoff};
use validate::validate;

use crate::control::cancel_requests::CancelRequests;
use crate::handlers::{Context, ExecutionFacts, Handler, Registry};
use crate::intake::queue::ServedQueue;
use crate::intake::source::{Arrival, TaskSource};
use crate::settle::{Attempt, SettleProgress, Settlement, SettlementBuilder};

/// What all attempts of a worker share.
pub(crate) struct Pipeline {
    /// By their indices.
    pub(crate) queues: Arc<[ServedQueue]>,
    pub(crate) registry: Registry,
    pub(crate) settlements: Arc<SettlementBuilder>,
    pub(crate) known: Arc<KnownAttempts>,
    pub(crate) gate: Gate,
    /// The inbox of the settlement task.
    pub(crate) settle: mpsc::Sender<Settlement>,
    pub(crate) progress: Arc<SettleProgress>,
    pub(crate) estimates: DurationEstimates,
    /// Limits the number of bundles that are split at the same time.
    pub(crate) splits: Semaphore,
    /// The time limit of tasks that have none.
    pub(crate) task_timeout: Duration,
    /// How long a process may take to end after it was asked to.
    pub(crate) kill_grace: Duration,
    /// How long a cancelled attempt may take to end.
    pub(crate) cancel_grace: Duration,
    pub(crate) lease: LeaseTerms,
    pub(crate) retry_limits: RetryLimits,
    /// The worker stops: no more attempts start.
    pub(crate) stop: CancellationToken,
    /// The grace period is over: running attempts are interrupted.
    pub(crate) abort: CancellationToken,
    /// Tasks of the runtime that run attempts.
    pub(crate) attempts: TaskTracker,
    /// Tasks of the runtime that watch handlers which have not returned.
    pub(crate) watchers: TaskTracker,
    pub(crate) running: Arc<RunningTasks>,
    pub(crate) health: ProcessHealth,
    pub(crate) backoff: StartBackoff,
    pub(crate) cancel_requests: Arc<CancelRequests>,
}

/// An attempt on its way through the pipeline.
struct ActiveAttempt {
    attempt: Attempt,
    history: DeliveryHistory,
    requirement: Option<Requirement>,
    running: RunningTask,
}

type Validated = (Arc<TaskMessage>, Arc<dyn Handler>);

impl Pipeline {
    /// Runs the path of one task. Tasks that were delivered before have no permit and wait for one. Returns
    /// the permit if it is free again.
    pub(crate) async fn attempt(
        &self,
        queue: &ServedQueue,
        arrival: Arrival,
        mut permit: Option<Permit>,
    ) -> Option<Permit> {
        if let Err(Some(settlement)) = self.steps(queue, arrival, &mut permit).await {
            self.settle(*settlement).await;
        }
        permit
    }

    /// `Err` contains the settlement of a task that does not run, if it needs one.
    async fn steps(
        &self,
        queue: &ServedQueue,
        arrival: Arrival,
        permit: &mut Option<Permit>,
    ) -> Result<(), Option<Box<Settlement>>> {
        let now = Timestamp::now();
        let (task, handler) = self.validate(queue, &arrival, now)?;
        let attempt = Attempt::new(task, arrival, now);
        let mut active = self.activate(attempt, &*handler, permit.is_some());
        let admitted = self.admit(&active, handler, permit).await;
        let admitted = admitted.map_err(|end| Some(self.settle_unstarted(&mut active, end)))?;
        let outcome = self.run(&mut active, admitted, permit).await;
        let disposition = self.decide(&mut active, outcome);
        active.attempt.finished_at = Timestamp::now();
        self.settle(self.settlements.build(&active.attempt, disposition)).await;
        Ok(())
    }

    /// Publishes the attempt that a task requests again with a delay, without starting it.
    pub(crate) async fn postpone(&self, queue: &ServedQueue, arrival: Arrival, after: Duration) {
        let now = Timestamp::now();
        let settlement = match self.validate(queue, &arrival, now) {
            Ok((task, _)) => {
                let attempt = Attempt::new(task, arrival, now);
                self.settlements.build(&attempt, Disposition::Again { after })
            }
            Err(Some(settlement)) => *settlement,
            Err(None) => return,
        };
        self.settle(settlement).await;
    }

    fn validate(
        &self,
        queue: &ServedQueue,
        arrival: &Arrival,
        now: Timestamp,
    ) -> Result<Validated, Option<Box<Settlement>>> {
        let find = |name: &_| self.registry.find(name);
        validate(arrival, &queue.name, now, find, &self.known, &self.settlements)
    }

    fn activate(&self, attempt: Attempt, handler: &dyn Handler, permit: bool) -> ActiveAttempt {
        let task = &attempt.task;
        // Added before cancel requests are checked: a request that arrives meanwhile finds the attempt.
        let running = self.running.add(task);
        if self.cancel_requests.reason(task).is_some() {
            running.cancel.cancel();
        }
        let history = match &attempt.source {
            TaskSource::Message(message) => DeliveryHistory::of(message, attempt.redelivered),
            // Bundles that were delivered before are split.
            TaskSource::Bundle { .. } => DeliveryHistory::default(),
        };
        let requirement = if handler.is_process() {
            Some(Requirement::Command(task.name.clone()))
        } else {
            (!permit && self.gate.isolation().is_some()).then_some(Requirement::Isolation)
        };
        ActiveAttempt { attempt, history, requirement, running }
    }

    /// Waits until the attempt may start. `Err` says what becomes of an attempt that does not.
    async fn admit(
        &self,
        active: &ActiveAttempt,
        handler: Arc<dyn Handler>,
        permit: &mut Option<Permit>,
    ) -> Result<Admitted, Disposition> {
        tokio::select! {
            biased;
            () = active.running.cancel.cancelled() => {
                Err(Disposition::Cancel { reason: self.cancel_reason(&active.attempt) })
            }
            admitted = self.wait_for_turn(active, handler, permit) => admitted,
        }
    }

    async fn wait_for_turn(
        &self,
        active: &ActiveAttempt,
        handler: Arc<dyn Handler>,
        permit: &mut Option<Permit>,
    ) -> Result<Admitted, Disposition> {
        let requirement = active.requirement.as_ref();
        if let Some(after) = requirement.and_then(|it| self.backoff.delay_for(it)) {
            return Err(Disposition::Again { after });
        }
        if let Some(permit) = permit.take() {
            return Ok(Admitted { handler, permit, exclusive: None });
        }
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(Disposition::Requeue),
            () = self.backoff.ready() => self.gate.admit(&active.history, handler, &self.stop).await,
        }
    }

    /// The settlement of an attempt that was not admitted.
    fn settle_unstarted(
        &self,
        active: &mut ActiveAttempt,
        disposition: Disposition,
    ) -> Box<Settlement> {
        let now = Timestamp::now();
        (active.attempt.started_at, active.attempt.finished_at) = (now, now);
        let TaskMessage { id, name, .. } = &*active.attempt.task;
        let settlement = match disposition {
            Disposition::Cancel { reason } => {
                tracing::info!(%id, reason, "cancelled before it started");
                self.settlements.cancelled_before_start(&active.attempt, &reason)
            }
            Disposition::DeadLetter { reason, error } => {
                tracing::error!(%id, %name, error, "given up");
                let disposition = Disposition::DeadLetter { reason, error };
                self.settlements.build(&active.attempt, disposition)
            }
            Disposition::Again { after } => {
                active.keep_history();
                self.settlements.build(&active.attempt, Disposition::Again { after })
            }
            Disposition::Requeue | Disposition::Complete(_) | Disposition::Retry { .. } => {
                self.settlements.build(&active.attempt, disposition)
            }
        };
        Box::new(settlement)
    }

    /// Runs the attempt to its outcome, under a lease if it may exceed the consumer timeout.
    async fn run(
        &self,
        active: &mut ActiveAttempt,
        admitted: Admitted,
        permit: &mut Option<Permit>,
    ) -> Outcome {
        active.running.start();
        active.attempt.started_at = Timestamp::now();
        self.begin_lease(&mut active.attempt).await;
        let context = self.context(active);
        let Admitted { handler, permit: held, exclusive: _exclusive } = admitted;
        let (span, started) = (span_of(context.task()), Instant::now());
        let running = self.execute(active, &*handler, &context, Arc::clone(&held));
        let outcome = running.instrument(span.clone()).await;
        span.in_scope(|| self.note_end(context.task(), &outcome, started.elapsed()));
        *permit = self.recover(&context, held);
        outcome
    }

    /// Executes the handler, and renews the lease meanwhile.
    async fn execute(
        &self,
        active: &ActiveAttempt,
        handler: &dyn Handler,
        context: &Context,
        permit: Permit,
    ) -> Outcome {
        let signals = StopSignals {
            abort: &self.abort,
            cancel: &active.running.cancel,
            cancel_grace: self.cancel_grace,
        };
        let limits = self.time_limits(&context.task().options);
        let outcome = execute(handler, context, permit, limits, signals);
        let Some(fence) = &active.attempt.lease else { return outcome.await };
        let renewal = || SettlementBuilder::renewal(context.task(), fence, Timestamp::now());
        self.lease.renew_during(outcome, (&self.settle, &self.progress), renewal).await
    }

    /// Decides what becomes of the message, within the limits of this worker.
    fn decide(&self, active: &mut ActiveAttempt, outcome: Outcome) -> Disposition {
        let outcome = self.account_for(active, outcome);
        let task = &active.attempt.task;
        let disposition = decide(outcome, task.attempt, &task.options.retry, fastrand::f64());
        let age = || active.age();
        let disposition = self.retry_limits.apply(disposition, task.attempt, age);
        match self.cancel_requests.reason(task) {
            Some(reason) => apply_cancellation(disposition, &reason),
            None => disposition,
        }
    }

    /// Records a crash in the message, and a failure to start in the backoff of this worker.
    fn account_for(&self, active: &mut ActiveAttempt, mut outcome: Outcome) -> Outcome {
        if let Outcome::Crashed(crash) = &outcome {
            let message = crash.record.write(&active.attempt.source.message());
            active.attempt.source = TaskSource::Message(Box::new(message));
        }
        if let Outcome::NotStarted(failure) = &mut outcome {
            failure.after = self.backoff.note_failure(&active.attempt.task.name, failure);
            active.keep_history();
        } else {
            self.backoff.note_started(active.requirement.as_ref());
        }
        outcome
    }

    fn note_end(&self, task: &TaskMessage, outcome: &Outcome, took: Duration) {
        log(task, outcome, took);
        if !matches!(outcome, Outcome::NotStarted(_)) {
            self.estimates.note(&task.name, took);
        }
    }

    async fn begin_lease(&self, attempt: &mut Attempt) {
        let limit = self.time_limits(&attempt.task.options).hard;
        let Some(fence) = self.lease.begin(limit, &attempt.source) else { return };
        let (task, source) = (&attempt.task, &attempt.source);
        self.settle(self.settlements.lease(task, source, &fence, self.lease.term)).await;
        attempt.lease = Some(fence);
    }

    fn context(&self, active: &ActiveAttempt) -> Context {
        let ActiveAttempt { attempt, history, .. } = active;
        let facts = ExecutionFacts {
            redelivered: attempt.redelivered,
            crashes: history.crashes.count,
            fence: attempt.lease.as_ref().map(|fence| fence.number),
        };
        let (task, worker) = (Arc::clone(&attempt.task), Arc::clone(&self.settlements.worker));
        Context::new(task, worker, facts, CancellationToken::new())
    }

    /// The permit, unless the handler still holds it: then its release is watched.
    fn recover(&self, context: &Context, permit: Permit) -> Option<Permit> {
        if Arc::strong_count(&permit) == 1 {
            return Some(permit);
        }
        let (concurrency, stop) = (Arc::clone(&self.gate.concurrency), self.abort.clone());
        let (context, released) = (context.clone(), released(&permit));
        self.watchers
            .spawn(async move { concurrency.watch(context.task(), released, &stop).await });
        None
    }

    fn time_limits(&self, options: &Options) -> TimeLimits {
        let hard = options.timeout.unwrap_or(self.task_timeout);
        TimeLimits { soft: options.soft_timeout, hard, kill_grace: self.kill_grace }
    }

    /// The time by which an attempt must have ended, including all grace periods.
    pub(crate) fn overdue_after(&self) -> impl Fn(&TaskMessage) -> Duration {
        let grace = self.kill_grace + self.cancel_grace + STALL_TIMEOUT;
        let default = self.task_timeout;
        move |task| task.options.timeout.unwrap_or(default) + grace
    }

    fn cancel_reason(&self, attempt: &Attempt) -> String {
        let reason = self.cancel_requests.reason(&attempt.task);
        reason.as_deref().unwrap_or("cancelled").to_owned()
    }

    pub(crate) async fn settle(&self, settlement: Settlement) {
        self.progress.submitted();
        // The settlement task outlives all attempts, so this fails only if it has panicked.
        if self.settle.send(settlement).await.is_err() {
            tracing::error!("the settlement task has stopped; the broker will redeliver the task");
        }
    }
}

impl ActiveAttempt {
    /// Time since the first attempt of the task started.
    fn age(&self) -> Duration {
        let first = match &self.attempt.source {
            TaskSource::Message(message) => wire::task::first_attempt_at(message),
            // Retries are never in bundles.
            TaskSource::Bundle { .. } => None,
        };
        let started_at = self.attempt.started_at;
        Timestamp::now().since(first.unwrap_or(started_at).min(started_at))
    }

    /// Marks a suspect as one, since the broker's marks are lost when it is published again.
    fn keep_history(&mut self) {
        if self.history.is_suspect() {
            let mut message = self.attempt.source.message().into_owned();
            wire::crash::mark_returned(&mut message);
            self.attempt.source = TaskSource::Message(Box::new(message));
        }
    }
}

fn span_of(task: &TaskMessage) -> tracing::Span {
    tracing::info_span!("task", id = %task.id, name = %task.name, attempt = task.attempt)
}

fn log(task: &TaskMessage, outcome: &Outcome, took: Duration) {
    let last = !task.options.retry.allows_another(task.attempt);
    match outcome {
        Outcome::Succeeded(_) => tracing::debug!(?took, "succeeded"),
        Outcome::Interrupted => tracing::warn!(?took, "interrupted; it returns to its queue"),
        // `ProcessHealth` logs it, once for all tasks.
        Outcome::NotStarted(failure) => tracing::debug!(detail = failure.detail, "not started"),
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
