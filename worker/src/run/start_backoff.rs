//! What a worker does while attempts cannot start for reasons of its own.
//!
//! If file descriptors, threads, processes or memory run out, the worker runs fewer tasks at the same time,
//! pauses if nothing else runs, and returns waiting tasks to the delay queues so that other workers can take
//! them. If a command or a child process cannot be started, the tasks that need it are delayed, and one of
//! them at a time probes whether it can be started again. Each problem is reported in the health of the
//! process until it is over.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use garenne_common::{ProcessHealth, TaskName};
use parking_lot::Mutex;

use super::concurrency::Concurrency;
use super::outcome::{StartFailure, StartFailureKind};
use crate::intake::queue::QueueIndex;

/// Duration of the first pause; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Maximum duration of a pause for lack of resources.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// Maximum time between two probes of a program that could not be started. Short, since other workers
/// that have the program may wait for the delayed tasks.
const LONGEST_PROBE: Duration = Duration::from_secs(5);
/// A shortage is over after this time without another failure, not counting pauses.
const RECOVERY: Duration = Duration::from_secs(10);
/// A failed program that looks usable is no longer reported after this time without a task that needs it.
const FORGOTTEN: Duration = Duration::from_mins(2);
/// Time between two delayed tasks that return, so that many of them do not circulate at the speed of the
/// broker.
const SPREAD: Duration = Duration::from_millis(2);
const LONGEST_DELAY: Duration = Duration::from_mins(10);
/// How often a worker that lacks resources returns its waiting tasks to the delay queues.
const RETURN_INTERVAL: Duration = Duration::from_secs(5);
/// How often a task that waits for the end of a shortage checks again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What an attempt needs in order to start, besides a permit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Requirement {
    /// The command of this task.
    Command(TaskName),
    /// A child process.
    Isolation,
}

/// Tracks failures to start attempts.
pub(crate) struct StartBackoff {
    health: ProcessHealth,
    concurrency: Arc<Concurrency>,
    /// Whether there is any failure; healthy workers read nothing else.
    failing: AtomicBool,
    failures: Mutex<Failures>,
}

#[derive(Default)]
struct Failures {
    shortage: Option<Shortage>,
    unusable: HashMap<Requirement, Unusable>,
}

/// A shortage of resources.
struct Shortage {
    /// Maximum number of attempts that run at the same time.
    limit: usize,
    /// Attempts that ended normally since the maximum last changed.
    successes: usize,
    /// No attempt starts before this time.
    pause_until: Instant,
    /// Number of pauses without a success in between.
    pauses: u32,
    last_failure: Instant,
    began: Instant,
    /// When the waiting tasks of each queue were last returned.
    returned: HashMap<QueueIndex, Instant>,
}

/// A program or child process that cannot be started.
struct Unusable {
    detail: String,
    /// Number of consecutive failed probes.
    failures: u32,
    /// When the next task that needs it is tried.
    probe_at: Instant,
    /// Whether a task is being tried.
    probing: bool,
    /// When the last delayed task returns.
    last_due: Instant,
    last_asked: Instant,
}

impl StartBackoff {
    /// No failure yet.
    pub(crate) fn new(health: ProcessHealth, concurrency: Arc<Concurrency>) -> Self {
        Self { health, concurrency, failing: AtomicBool::new(false), failures: Mutex::default() }
    }

    /// Whether an attempt may start now.
    pub(crate) fn may_start(&self) -> bool {
        if !self.is_failing() {
            return true;
        }
        let busy = self.concurrency.busy();
        self.failures
            .lock()
            .shortage
            .as_ref()
            .is_none_or(|shortage| Instant::now() >= shortage.pause_until && busy < shortage.limit)
    }

    /// Whether starts are paused for lack of resources.
    pub(crate) fn is_paused(&self) -> bool {
        self.is_failing()
            && self
                .failures
                .lock()
                .shortage
                .as_ref()
                .is_some_and(|it| Instant::now() < it.pause_until)
    }

    /// Waits until an attempt may start.
    pub(crate) async fn ready(&self) {
        while !self.may_start() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// The delay of a task with this requirement; `None` if it may be tried now.
    pub(crate) fn delay_for(&self, requirement: &Requirement) -> Option<Duration> {
        if !self.is_failing() {
            return None;
        }
        let now = Instant::now();
        self.failures
            .lock()
            .unusable
            .get_mut(requirement)
            .and_then(|unusable| unusable.delay_unless_due(now))
    }

    /// Records that an attempt could not start. Returns the delay of its task.
    pub(crate) fn note_failure(&self, name: &TaskName, failure: &StartFailure) -> Duration {
        let requirement = match failure.kind {
            StartFailureKind::Resources => return self.note_shortage(&failure.detail),
            StartFailureKind::Command => Requirement::Command(name.clone()),
            StartFailureKind::Isolation => Requirement::Isolation,
        };
        let now = Instant::now();
        let mut failures = self.failures.lock();
        let unusable = failures.unusable.entry(requirement).or_insert_with(|| Unusable::new(now));
        unusable.failed(&failure.detail, now);
        let delay = unusable.delay(now);
        self.publish(&failures);
        delay
    }

    /// Records that an attempt has started and ended, with success or not.
    pub(crate) fn note_started(&self, requirement: Option<&Requirement>) {
        if !self.is_failing() {
            return;
        }
        let mut failures = self.failures.lock();
        if let Some(requirement) = requirement {
            failures.unusable.remove(requirement);
        }
        let count = self.concurrency.limit();
        if failures.shortage.as_mut().is_some_and(|shortage| shortage.succeeded(count)) {
            failures.shortage = None;
        }
        self.publish(&failures);
    }

    /// The delay with which the waiting tasks of a queue are to be returned, if that is due: other workers
    /// may have the resources.
    pub(crate) fn return_due(&self, queue: QueueIndex) -> Option<Duration> {
        if !self.is_failing() {
            return None;
        }
        let now = Instant::now();
        self.failures.lock().shortage.as_mut().and_then(|shortage| shortage.return_due(queue, now))
    }

    /// Ends failures that are over although no task has shown it. `usable` says whether a program seems
    /// usable.
    pub(crate) fn recheck(&self, usable: impl Fn(&Requirement) -> bool) {
        if !self.is_failing() {
            return;
        }
        let now = Instant::now();
        let mut failures = self.failures.lock();
        let calm = failures.shortage.as_ref().is_some_and(|shortage| shortage.is_calm(now));
        if calm && std::fs::File::open("/dev/null").is_ok() {
            failures.shortage = None;
        }
        failures.unusable.retain(|requirement, it| {
            now.duration_since(it.last_asked) < FORGOTTEN || !usable(requirement)
        });
        self.publish(&failures);
    }

    fn note_shortage(&self, detail: &str) -> Duration {
        let (now, busy, count) =
            (Instant::now(), self.concurrency.busy(), self.concurrency.limit());
        let mut failures = self.failures.lock();
        let shortage = failures.shortage.get_or_insert_with(|| Shortage::new(count, now));
        shortage.failed(busy, now);
        let limit = shortage.limit;
        self.health.raise(
            "out_of_resources",
            format!(
                "{detail}; at most {limit} of {count} attempts run at the same time until this ends"
            ),
        );
        self.publish(&failures);
        Shortage::task_delay()
    }

    /// Updates the health of the process.
    fn publish(&self, failures: &Failures) {
        let isolation = failures.unusable.get(&Requirement::Isolation).map(|it| it.detail.clone());
        let mut commands: Vec<_> = failures.unusable.iter().filter_map(command).collect();
        commands.sort_unstable();
        self.health.set("command_unusable", (!commands.is_empty()).then(|| commands.join("; ")));
        self.health.set("isolation_unavailable", isolation);
        if failures.shortage.is_none() {
            self.health.clear("out_of_resources");
        }
        let failing = failures.shortage.is_some() || !failures.unusable.is_empty();
        self.failing.store(failing, Ordering::Relaxed);
    }

    fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }
}

fn command((requirement, unusable): (&Requirement, &Unusable)) -> Option<String> {
    match requirement {
        Requirement::Command(name) => {
            Some(format!("tasks {name} are delayed: {}", unusable.detail))
        }
        Requirement::Isolation => None,
    }
}

impl Shortage {
    fn new(count: usize, now: Instant) -> Self {
        Self {
            limit: count,
            successes: 0,
            pause_until: now,
            pauses: 0,
            last_failure: now,
            began: now,
            returned: HashMap::new(),
        }
    }

    /// `busy` is the number of attempts under way, including the one that failed.
    fn failed(&mut self, busy: usize, now: Instant) {
        (self.last_failure, self.successes) = (now, 0);
        let others = busy.saturating_sub(1);
        self.limit = self.limit.min(others).max(1);
        // The end of other attempts frees resources. Without any, only waiting can help.
        if others == 0 && now >= self.pause_until {
            self.pauses = self.pauses.saturating_add(1);
            self.pause_until = now + backoff(self.pauses, LONGEST_PAUSE);
        }
    }

    /// The delay of a task that could not start, with jitter. It does not grow with the pauses: another
    /// worker may have the resources.
    fn task_delay() -> Duration {
        FIRST_PAUSE.mul_f64(1.0 + fastrand::f64())
    }

    fn is_calm(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last_failure.max(self.pause_until)) > RECOVERY
    }

    fn return_due(&mut self, queue: QueueIndex, now: Instant) -> Option<Duration> {
        let last = self.returned.entry(queue).or_insert(self.began);
        if now.duration_since(*last) < RETURN_INTERVAL {
            return None;
        }
        *last = now;
        Some(Self::task_delay())
    }

    /// Records a success. Returns whether all of `count` attempts may run at the same time again.
    fn succeeded(&mut self, count: usize) -> bool {
        self.pauses = 0;
        self.successes += 1;
        if self.successes >= self.limit {
            (self.limit, self.successes) = (self.limit + 1, 0);
        }
        self.limit >= count
    }
}

impl Unusable {
    fn new(now: Instant) -> Self {
        Self {
            detail: String::new(),
            failures: 0,
            probe_at: now,
            // The attempt that failed first.
            probing: true,
            last_due: now,
            last_asked: now,
        }
    }

    /// Attempts that start together fail together and count once.
    fn failed(&mut self, detail: &str, now: Instant) {
        detail.clone_into(&mut self.detail);
        self.last_asked = now;
        if std::mem::take(&mut self.probing) {
            self.failures = self.failures.saturating_add(1);
            self.probe_at = now + backoff(self.failures, LONGEST_PROBE);
        }
    }

    fn delay_unless_due(&mut self, now: Instant) -> Option<Duration> {
        self.last_asked = now;
        if now < self.probe_at {
            return Some(self.delay(now));
        }
        // Another probe follows even if this one never ends.
        self.probing = true;
        self.probe_at = now + backoff(self.failures, LONGEST_PROBE);
        None
    }

    fn delay(&mut self, now: Instant) -> Duration {
        self.last_due = self.last_due.max(self.probe_at) + SPREAD;
        self.last_due.saturating_duration_since(now).clamp(FIRST_PAUSE, LONGEST_DELAY)
    }
}

fn backoff(failures: u32, longest: Duration) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    FIRST_PAUSE.saturating_mul(1 << doublings).min(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(kind: StartFailureKind) -> StartFailure {
        StartFailure::new(kind, "no".to_owned())
    }

    fn name() -> TaskName {
        TaskName::new("some.task").unwrap()
    }

    fn backoff(concurrency: usize) -> (StartBackoff, ProcessHealth, Arc<Concurrency>) {
        let (health, concurrency) =
            (ProcessHealth::default(), Arc::new(Concurrency::new(concurrency)));
        (StartBackoff::new(health.clone(), Arc::clone(&concurrency)), health, concurrency)
    }

    #[tokio::test]
    async fn a_shortage_limits_concurrency_to_what_worked() {
        let (backoff, health, concurrency) = backoff(3);
        let _runs = concurrency.one().await.unwrap();
        let failing = concurrency.one().await.unwrap();
        backoff.note_failure(&name(), &failure(StartFailureKind::Resources));
        assert!(!backoff.is_paused(), "running attempts free resources when they end");
        assert!(!backoff.may_start());
        drop(failing);
        assert!(!backoff.may_start(), "one has worked, and one is running");
        assert_eq!(health.problems()[0].code, "out_of_resources");
        // One success at a limit of one, two at two, then no limit.
        backoff.note_started(None);
        assert!(backoff.may_start());
        assert!(!health.is_healthy());
        backoff.note_started(None);
        backoff.note_started(None);
        assert!(health.is_healthy());
    }

    #[tokio::test]
    async fn a_shortage_pauses_a_worker_without_other_attempts() {
        let (backoff, _health, concurrency) = backoff(3);
        let _failing = concurrency.one().await.unwrap();
        backoff.note_failure(&name(), &failure(StartFailureKind::Resources));
        assert!(backoff.is_paused() && !backoff.may_start());
    }

    #[test]
    fn waiting_tasks_are_returned_at_intervals_during_a_shortage() {
        let begun = Instant::now();
        let mut shortage = Shortage::new(3, begun);
        assert_eq!(
            shortage.return_due(QueueIndex(0), begun),
            None,
            "the shortage may be over at once"
        );
        let later = begun + RETURN_INTERVAL;
        assert!(shortage.return_due(QueueIndex(0), later).is_some_and(|wait| wait >= FIRST_PAUSE));
        assert!(
            shortage.return_due(QueueIndex(0), later).is_none()
                && shortage.return_due(QueueIndex(1), later).is_some()
        );
    }

    #[test]
    fn a_missing_program_affects_its_tasks_only_and_one_of_them_probes() {
        let (backoff, health, _concurrency) = backoff(3);
        let requirement = Requirement::Command(name());
        for _ in 0..2 {
            backoff.note_failure(&name(), &failure(StartFailureKind::Command));
        }
        assert_eq!(
            backoff.failures.lock().unusable[&requirement].failures,
            1,
            "they started together"
        );
        assert!(backoff.may_start());
        assert!(backoff.delay_for(&requirement).is_some_and(|wait| wait >= FIRST_PAUSE));
        assert_eq!(backoff.delay_for(&Requirement::Isolation), None);
        backoff.failures.lock().unusable.get_mut(&requirement).unwrap().probe_at = Instant::now();
        assert_eq!(backoff.delay_for(&requirement), None, "it probes");
        assert!(backoff.delay_for(&requirement).is_some(), "others wait for it");
        assert_eq!(health.problems()[0].code, "command_unusable");
        backoff.note_started(Some(&requirement));
        assert!(health.is_healthy() && backoff.delay_for(&requirement).is_none());
    }

    #[test]
    fn delayed_tasks_return_one_after_another() {
        let now = Instant::now();
        let mut unusable = Unusable::new(now);
        unusable.failed("no", now);
        let delays: Vec<_> = (0..2_000).filter_map(|_| unusable.delay_unless_due(now)).collect();
        assert!(delays.is_sorted() && delays[1_999] >= FIRST_PAUSE + SPREAD * 1_999);
        assert!(delays.iter().all(|delay| *delay <= LONGEST_DELAY));
    }
}
