//! Whether this worker is fit to run tasks: what it does while its own trouble keeps attempts from
//! beginning.
//!
//! A worker without free files or threads would fail every task within milliseconds, and one without
//! the program of a command would fail all tasks of that command, while other workers could run them.
//! So such trouble is never charged to a task. Too few resources lower the number of attempts that run
//! at once, down to a pause if nothing runs; a program or child process that cannot be started delays
//! the tasks that need it. One attempt after a while shows whether the trouble is over.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use garenne_common::{ProcessHealth, TaskName};

use crate::outcome::{Trouble, TroubleKind};
use crate::slots::Slots;

/// How long the first pause lasts; each further one twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause for lack of resources.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// The longest time between two attempts to start a program that could not be started. No longer, since
/// a worker that has the program waits for the delayed tasks.
const LONGEST_PROBE: Duration = Duration::from_secs(5);
/// After so long without another failure for lack of resources, pauses not counted, a worker is fit.
const RECOVERY: Duration = Duration::from_secs(10);
/// After so long without a task that needs it, a program that could be started is not a problem.
const FORGOTTEN: Duration = Duration::from_mins(2);
/// Delayed tasks come back spread over time, so that a long queue of them does not circle at the speed
/// of the broker.
const SPREAD: Duration = Duration::from_millis(2);
const LONGEST_DELAY: Duration = Duration::from_mins(10);
/// How often a worker that lacks resources gives away what waits in it.
const GIVE_AWAY_INTERVAL: Duration = Duration::from_secs(5);
/// How often a waiting suspect looks again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What a trouble concerns, if it is not the whole worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Concern {
    /// The command of this task.
    Command(TaskName),
    /// Child processes for isolated attempts.
    Isolation,
}

/// The fitness of one worker.
pub(crate) struct Fitness {
    health: ProcessHealth,
    slots: Arc<Slots>,
    /// Whether there is any trouble; all that a healthy worker ever looks at.
    troubled: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    shortage: Option<Shortage>,
    unusable: HashMap<Concern, Unusable>,
}

/// Too few resources.
struct Shortage {
    /// How many attempts may run at once.
    ceiling: usize,
    /// Attempts that ended normally since the ceiling last changed.
    successes: usize,
    /// Nothing begins before.
    pause_until: Instant,
    /// Pauses in a row.
    pauses: u32,
    last_failure: Instant,
    began: Instant,
    /// When the waiting tasks of a queue of this worker, by position, were last given away.
    given_away: HashMap<usize, Instant>,
}

/// Something that cannot be started.
struct Unusable {
    detail: String,
    /// Probes that failed in a row.
    failures: u32,
    /// The next task that needs it is tried at this time.
    probe_at: Instant,
    /// A task is being tried.
    probing: bool,
    /// When the last delayed task comes back.
    last_due: Instant,
    last_asked: Instant,
}

impl Fitness {
    /// Of a worker with these slots.
    pub(crate) fn new(health: ProcessHealth, slots: Arc<Slots>) -> Self {
        Self { health, slots, troubled: AtomicBool::new(false), state: Mutex::default() }
    }

    /// Whether an attempt may begin now.
    pub(crate) fn may_begin(&self) -> bool {
        if !self.is_troubled() {
            return true;
        }
        let busy = self.slots.busy();
        self.lock().shortage.as_ref().is_none_or(|shortage| {
            Instant::now() >= shortage.pause_until && busy < shortage.ceiling
        })
    }

    /// Whether nothing may begin for lack of resources.
    pub(crate) fn is_paused(&self) -> bool {
        self.is_troubled()
            && self.lock().shortage.as_ref().is_some_and(|it| Instant::now() < it.pause_until)
    }

    /// Waits until an attempt may begin.
    pub(crate) async fn ready(&self) {
        while !self.may_begin() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// How long a task that needs this has to wait, unless it may be tried now.
    pub(crate) fn refusal(&self, concern: &Concern) -> Option<Duration> {
        if !self.is_troubled() {
            return None;
        }
        let now = Instant::now();
        self.lock().unusable.get_mut(concern).and_then(|unusable| unusable.refusal(now))
    }

    /// An attempt could not begin. Says how long its task waits until it is tried again.
    pub(crate) fn failed(&self, name: &TaskName, trouble: &Trouble) -> Duration {
        let concern = match trouble.kind {
            TroubleKind::Resources => return self.lacks(&trouble.detail),
            TroubleKind::Command => Concern::Command(name.clone()),
            TroubleKind::Isolation => Concern::Isolation,
        };
        let now = Instant::now();
        let mut state = self.lock();
        let unusable = state.unusable.entry(concern).or_insert_with(|| Unusable::new(now));
        unusable.failed(&trouble.detail, now);
        let delay = unusable.delay(now);
        self.publish(&state);
        delay
    }

    /// An attempt began and ended, well or not.
    pub(crate) fn worked(&self, concern: Option<&Concern>) {
        if !self.is_troubled() {
            return;
        }
        let mut state = self.lock();
        if let Some(concern) = concern {
            state.unusable.remove(concern);
        }
        let count = self.slots.count();
        if state.shortage.as_mut().is_some_and(|shortage| shortage.succeeded(count)) {
            state.shortage = None;
        }
        self.publish(&state);
    }

    /// For how long to delay what waits here for room, if it is time to give that away: other workers may
    /// have room.
    pub(crate) fn give_away(&self, queue: usize) -> Option<Duration> {
        if !self.is_troubled() {
            return None;
        }
        let now = Instant::now();
        self.lock().shortage.as_mut().and_then(|shortage| shortage.give_away(queue, now))
    }

    /// Looks whether trouble is over that no task shows to be; `usable` says so of a program.
    pub(crate) fn review(&self, usable: impl Fn(&Concern) -> bool) {
        if !self.is_troubled() {
            return;
        }
        let now = Instant::now();
        let mut state = self.lock();
        let calm = state.shortage.as_ref().is_some_and(|shortage| shortage.is_calm(now));
        if calm && std::fs::File::open("/dev/null").is_ok() {
            state.shortage = None;
        }
        state.unusable.retain(|concern, it| {
            now.duration_since(it.last_asked) < FORGOTTEN || !usable(concern)
        });
        self.publish(&state);
    }

    fn lacks(&self, detail: &str) -> Duration {
        let (now, busy, count) = (Instant::now(), self.slots.busy(), self.slots.count());
        let mut state = self.lock();
        let shortage = state.shortage.get_or_insert_with(|| Shortage::new(count, now));
        shortage.failed(busy, now);
        let ceiling = shortage.ceiling;
        self.health.raise(
            "out_of_resources",
            format!("{detail}; at most {ceiling} of {count} attempts run at once until this ends"),
        );
        self.publish(&state);
        Shortage::wait()
    }

    /// Shows the state to others.
    fn publish(&self, state: &State) {
        let isolation = state.unusable.get(&Concern::Isolation).map(|it| it.detail.clone());
        let mut commands: Vec<_> = state.unusable.iter().filter_map(command).collect();
        commands.sort_unstable();
        self.health.set("command_unusable", (!commands.is_empty()).then(|| commands.join("; ")));
        self.health.set("isolation_unavailable", isolation);
        if state.shortage.is_none() {
            self.health.clear("out_of_resources");
        }
        let troubled = state.shortage.is_some() || !state.unusable.is_empty();
        self.troubled.store(troubled, Ordering::Relaxed);
    }

    fn is_troubled(&self) -> bool {
        self.troubled.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn command((concern, unusable): (&Concern, &Unusable)) -> Option<String> {
    match concern {
        Concern::Command(name) => Some(format!("tasks {name} are delayed: {}", unusable.detail)),
        Concern::Isolation => None,
    }
}

impl Shortage {
    fn new(count: usize, now: Instant) -> Self {
        Self {
            ceiling: count,
            successes: 0,
            pause_until: now,
            pauses: 0,
            last_failure: now,
            began: now,
            given_away: HashMap::new(),
        }
    }

    /// `busy` attempts are under way, the one that failed among them.
    fn failed(&mut self, busy: usize, now: Instant) {
        (self.last_failure, self.successes) = (now, 0);
        let others = busy.saturating_sub(1);
        self.ceiling = self.ceiling.min(others).max(1);
        // If others run, their end makes room. If none does, only time can tell.
        if others == 0 && now >= self.pause_until {
            self.pauses = self.pauses.saturating_add(1);
            self.pause_until = now + backoff(self.pauses, LONGEST_PAUSE);
        }
    }

    /// How long a task waits that cannot begin; not all equally long. Longer pauses do not concern it:
    /// another worker may have room.
    fn wait() -> Duration {
        FIRST_PAUSE.mul_f64(1.0 + fastrand::f64())
    }

    fn is_calm(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last_failure.max(self.pause_until)) > RECOVERY
    }

    fn give_away(&mut self, queue: usize, now: Instant) -> Option<Duration> {
        let last = self.given_away.entry(queue).or_insert(self.began);
        if now.duration_since(*last) < GIVE_AWAY_INTERVAL {
            return None;
        }
        *last = now;
        Some(Self::wait())
    }

    /// Whether all of `count` attempts may run at once again.
    fn succeeded(&mut self, count: usize) -> bool {
        self.pauses = 0;
        self.successes += 1;
        if self.successes >= self.ceiling {
            (self.ceiling, self.successes) = (self.ceiling + 1, 0);
        }
        self.ceiling >= count
    }
}

impl Unusable {
    fn new(now: Instant) -> Self {
        Self {
            detail: String::new(),
            failures: 0,
            probe_at: now,
            // The attempt that found it out.
            probing: true,
            last_due: now,
            last_asked: now,
        }
    }

    /// Attempts that began together fail together and count once.
    fn failed(&mut self, detail: &str, now: Instant) {
        detail.clone_into(&mut self.detail);
        self.last_asked = now;
        if std::mem::take(&mut self.probing) {
            self.failures = self.failures.saturating_add(1);
            self.probe_at = now + backoff(self.failures, LONGEST_PROBE);
        }
    }

    fn refusal(&mut self, now: Instant) -> Option<Duration> {
        self.last_asked = now;
        if now < self.probe_at {
            return Some(self.delay(now));
        }
        // Should this probe never end, another one follows.
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

    fn trouble(kind: TroubleKind) -> Trouble {
        Trouble::new(kind, "no".to_owned())
    }

    fn name() -> TaskName {
        TaskName::new("some.task").unwrap()
    }

    fn fitness(slots: usize) -> (Fitness, ProcessHealth, Arc<Slots>) {
        let (health, slots) = (ProcessHealth::default(), Arc::new(Slots::new(slots)));
        (Fitness::new(health.clone(), Arc::clone(&slots)), health, slots)
    }

    #[tokio::test]
    async fn a_shortage_lowers_what_runs_at_once_to_what_worked() {
        let (fitness, health, slots) = fitness(3);
        let _runs = slots.one().await.unwrap();
        let failing = slots.one().await.unwrap();
        fitness.failed(&name(), &trouble(TroubleKind::Resources));
        assert!(!fitness.is_paused(), "what runs makes room when it ends");
        assert!(!fitness.may_begin());
        drop(failing);
        assert!(!fitness.may_begin(), "one ran well, and one runs");
        assert_eq!(health.problems()[0].code, "out_of_resources");
        // One success at a ceiling of one, two at two, and all may run.
        fitness.worked(None);
        assert!(fitness.may_begin());
        assert!(!health.is_healthy());
        fitness.worked(None);
        fitness.worked(None);
        assert!(health.is_healthy());
    }

    #[tokio::test]
    async fn a_shortage_pauses_a_worker_that_runs_nothing_else() {
        let (fitness, _health, slots) = fitness(3);
        let _failing = slots.one().await.unwrap();
        fitness.failed(&name(), &trouble(TroubleKind::Resources));
        assert!(fitness.is_paused() && !fitness.may_begin());
    }

    #[test]
    fn what_waits_is_given_away_at_intervals_while_a_shortage_lasts() {
        let begun = Instant::now();
        let mut shortage = Shortage::new(3, begun);
        assert_eq!(shortage.give_away(0, begun), None, "it may be over at once");
        let later = begun + GIVE_AWAY_INTERVAL;
        assert!(shortage.give_away(0, later).is_some_and(|wait| wait >= FIRST_PAUSE));
        assert!(shortage.give_away(0, later).is_none() && shortage.give_away(1, later).is_some());
    }

    #[test]
    fn a_missing_program_concerns_its_tasks_only_and_one_of_them_probes() {
        let (fitness, health, _slots) = fitness(3);
        let concern = Concern::Command(name());
        for _ in 0..2 {
            fitness.failed(&name(), &trouble(TroubleKind::Command));
        }
        assert_eq!(fitness.lock().unusable[&concern].failures, 1, "they began together");
        assert!(fitness.may_begin());
        assert!(fitness.refusal(&concern).is_some_and(|wait| wait >= FIRST_PAUSE));
        assert_eq!(fitness.refusal(&Concern::Isolation), None);
        fitness.lock().unusable.get_mut(&concern).unwrap().probe_at = Instant::now();
        assert_eq!(fitness.refusal(&concern), None, "it probes");
        assert!(fitness.refusal(&concern).is_some(), "others wait for it");
        assert_eq!(health.problems()[0].code, "command_unusable");
        fitness.worked(Some(&concern));
        assert!(health.is_healthy() && fitness.refusal(&concern).is_none());
    }

    #[test]
    fn delayed_tasks_come_back_one_after_the_other() {
        let now = Instant::now();
        let mut unusable = Unusable::new(now);
        unusable.failed("no", now);
        let delays: Vec<_> = (0..2_000).filter_map(|_| unusable.refusal(now)).collect();
        assert!(delays.is_sorted() && delays[1_999] >= FIRST_PAUSE + SPREAD * 1_999);
        assert!(delays.iter().all(|delay| *delay <= LONGEST_DELAY));
    }
}
