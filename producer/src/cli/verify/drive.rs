//! The run itself: feeds the producers, lets the nemesis loose, and watches until everything has ended
//! and settled. What it sees is judged elsewhere.

use std::time::{Duration, Instant};

use garenne_common::TaskResult;
use garenne_common::wire::{Answer, Question};
use garenne_producer::Producer;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::check::{Invariant, Violation};
use super::crew::Crew;
use super::faults::Nemesis;
use super::ledger::Ledger;
use super::listener::Listener;
use super::mix::Mix;
use super::producers::Producers;
use super::progress::Progress;
use super::proxy::Proxy;
use super::stage::Facts;
use super::workload::{BatchFate, Workload};
use crate::cli::cluster::Cluster;
use crate::cli::error::CliError;

/// How often the drive looks around.
const TICK: Duration = Duration::from_millis(20);
/// How often the collector is asked how many tasks have ended.
const PULSE: Duration = Duration::from_millis(100);
/// How long the early look at some records may take. It is a sample; the pulse must go on.
const GLANCE: Duration = Duration::from_secs(1);
/// Records that are remembered as they were during the run.
const EARLY: usize = 2_000;

/// Everything that takes part in a run.
pub(super) struct Stage {
    pub(super) mix: Mix,
    pub(super) cluster: Cluster,
    pub(super) crew: Crew,
    pub(super) proxy: Option<Proxy>,
    pub(super) ledger: Ledger,
    pub(super) listener: Listener,
    /// For questions; it goes to the broker directly, past all faults but the broker's own.
    pub(super) producer: Producer,
    pub(super) nemesis: Nemesis,
    pub(super) workload: Workload,
    pub(super) batch_deadline: Duration,
    /// Nothing has ended for so long, though nothing is broken: it never will.
    pub(super) patience: Duration,
    pub(super) facts: Facts,
    pub(super) seen: Seen,
}

/// What the drive notes on its way.
pub(super) struct Seen {
    pub(super) begun: Instant,
    /// From the last repair to the end of the last task.
    pub(super) drained: Duration,
    pub(super) early: Vec<(u64, TaskResult)>,
    pub(super) noted: Vec<Violation>,
    /// Workers that died of a task, as they should.
    pub(super) poisoned: u64,
}

/// What the collector says from time to time.
#[derive(Clone, Default)]
struct Pulse {
    ended: u64,
    early: Vec<(u64, TaskResult)>,
}

/// Since when nothing has ended although something could.
struct Backlog {
    ended: u64,
    since: Instant,
}

impl Stage {
    /// Runs the workload and the faults to their end. What cannot go on is noted as a breach.
    pub(super) async fn run(&mut self, progress: &mut Progress) -> Result<(), CliError> {
        let (told, pulse) = watch::channel(Pulse::default());
        let asking = TaskTracker::new().spawn(ask(self.producer.clone(), self.mix, told));
        let asking = AbortOnDropHandle::new(asking);
        let mut producers = Producers::start(&mut self.cluster, self.mix)?;
        let mut backlog = Backlog { ended: 0, since: Instant::now() };
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut lines = vec![];
        loop {
            tokio::select! {
                () = producers.next(&mut lines) => {}
                _ = tick.tick() => {}
            }
            for line in lines.drain(..) {
                producers.heard(line, &mut self.cluster, &mut self.workload)?;
            }
            let ended = pulse.borrow().ended;
            let proxy = self.proxy.as_ref();
            self.nemesis.step(ended, &mut self.cluster, &self.crew, proxy).await?;
            producers.feed(&mut self.workload, self.nemesis.allowance()).await;
            self.look_after_strays()?;
            let stall = backlog.stall(self.workload.due(Instant::now()), ended);
            progress.show(ended, self.workload.confirmed_count(), &self.nemesis);
            if ended >= self.mix.tasks && self.workload.is_done() && self.nemesis.is_done() {
                break;
            }
            if stall > self.patience && self.nemesis.present().is_empty() {
                self.note_stuck(ended);
                break;
            }
        }
        let healed = self.nemesis.healed_at.unwrap_or(self.seen.begun);
        self.seen.drained = healed.elapsed();
        self.seen.early.clone_from(&pulse.borrow().early);
        drop(asking);
        producers.finish().await;
        let crew = self.crew;
        self.cluster.stop(|name| crew.producers().iter().any(|producer| producer == name)).await;
        Ok(())
    }

    fn note_stuck(&mut self, ended: u64) {
        self.seen.noted.push(Violation {
            invariant: Invariant::Liveness,
            subject: "the run".to_owned(),
            what: format!(
                "{ended} of {} tasks ended, {} confirmed, then nothing for {:?}",
                self.mix.tasks,
                self.workload.confirmed_count(),
                self.patience
            ),
        });
    }

    /// A process that ended and that nobody killed is a breach; it is replaced, to go on looking.
    fn look_after_strays(&mut self) -> Result<(), CliError> {
        let nemesis = &self.nemesis;
        let ended = self.cluster.processes().iter_mut().filter_map(|process| {
            if nemesis.is_broken(&process.name) {
                return None;
            }
            process.complaint().map(|complaint| (process.name.clone(), complaint))
        });
        for (name, complaint) in ended.collect::<Vec<_>>() {
            if complaint.message.contains("SIGABRT") && self.seen.poisoned < self.poison_runs() {
                self.seen.poisoned += 1;
            } else {
                let help = complaint.help.unwrap_or_default();
                self.seen.noted.push(Violation {
                    invariant: Invariant::Process,
                    subject: name.clone(),
                    what: format!("{}; {help}", complaint.message),
                });
            }
            if self.crew.workers().contains(&name) {
                self.crew.start_worker(&mut self.cluster, &name)?;
            } else if self.crew.collectors().contains(&name) {
                self.cluster.spawn_collector(&name)?;
            } else {
                // A producer is replaced when its last word is heard; until then it is not looked at.
                self.cluster.forget(&name);
            }
        }
        Ok(())
    }

    /// How often a task that kills its process has begun: each time explains one death.
    fn poison_runs(&self) -> u64 {
        self.ledger.read(|book| {
            let poison = book.runs.iter().filter(|(n, _)| self.mix.job(**n).crashes());
            poison.map(|(_, runs)| runs.len() as u64).sum()
        })
    }

    /// Waits until nothing moves any more: queues empty, every batch told of.
    pub(super) async fn settle(&mut self) {
        let fates = self.workload.batches.values();
        let decided = fates.map(|fate| fate.decided_by(self.batch_deadline)).max();
        let patience = decided.unwrap_or_else(Instant::now) + Duration::from_secs(30);
        let mut quiet = 0;
        while quiet < 3 && Instant::now() < patience {
            let empty = self.queues().await.iter().all(|(_, ready)| *ready == 0);
            quiet = if empty && self.all_batches_told() { quiet + 1 } else { 0 };
            sleep(Duration::from_millis(250)).await;
        }
    }

    fn all_batches_told(&self) -> bool {
        self.listener.read(|heard| {
            let told =
                |fate: &BatchFate| fate.id.as_ref().is_none_or(|id| heard.batches.contains_key(id));
            self.workload.batches.values().all(told)
        })
    }

    /// All queues of the run and what waits in them. One that cannot be looked at counts as full.
    pub(super) async fn queues(&self) -> Vec<(String, u32)> {
        let admin = self.cluster.admin();
        let mut all = vec![];
        for name in self.cluster.queues() {
            let ready = admin.depth(&name).await.ok().flatten().unwrap_or(u32::MAX);
            all.push((name, ready));
        }
        all
    }
}

impl Backlog {
    /// How long nothing has ended, with so many tasks confirmed and not delayed any more.
    fn stall(&mut self, due: u64, ended: u64) -> Duration {
        if ended != self.ended || due <= ended {
            (self.ended, self.since) = (ended, Instant::now());
        }
        self.since.elapsed()
    }
}

/// Asks the collector, again and again, how many tasks have ended, and for some of their records.
async fn ask(producer: Producer, mix: Mix, told: watch::Sender<Pulse>) {
    let mut rng = fastrand::Rng::with_seed(mix.seed);
    let patience = Duration::from_secs(1);
    loop {
        if let Ok(Answer::Totals { results, .. }) =
            producer.ask_within(Question::Totals, patience).await
        {
            told.send_modify(|pulse| pulse.ended = results);
            let full = told.borrow().early.len() >= EARLY;
            let ids: Vec<_> = (0..20).filter_map(|_| mix.id(rng.u64(..mix.tasks)).ok()).collect();
            if !full && let Ok(Ok(records)) = timeout(GLANCE, producer.results(&ids)).await {
                let records = records.into_iter();
                let records = records.filter_map(|r| Some((mix.index_of(r.id.as_str())?, r)));
                told.send_modify(|pulse| pulse.early.extend(records));
            }
        }
        sleep(PULSE).await;
    }
}
