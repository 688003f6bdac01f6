//! The run itself: feeds the producers, lets the nemesis loose, and watches until everything has ended
//! and settled. What it sees is judged elsewhere.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::time::{Duration, Instant};

use garenne_cli::error::CliError;
use garenne_common::broker::Admin;
use garenne_common::wire::{Query, Response, TaskSummary};
use garenne_common::{TaskResult, Timestamp};
use garenne_producer::Producer;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::bounds::Held;
use super::check::{Invariant, Violation};
use super::crew::Crew;
use super::faults::Nemesis;
use super::ledger::Ledger;
use super::listener::{Listener, Told};
use super::liveness::{Depths, Waiting, Watch};
use super::mix::Mix;
use super::plan::{Kind, LeftOut};
use super::producers::{Line, Producers};
use super::progress::Progress;
use super::proxy::Proxy;
use super::vitals::Vitals;
use super::workload::{BatchFate, Said, Workload};
use crate::cluster::Cluster;

/// How often the drive looks around.
const TICK: Duration = Duration::from_millis(20);
/// How often the collector is asked how many tasks have ended.
const PULSE: Duration = Duration::from_millis(100);
/// How often it is judged whether everything goes on.
const LOOK: Duration = Duration::from_secs(1);
/// How long the early look at some records may take. It is a sample; the pulse must go on.
const GLANCE: Duration = Duration::from_secs(1);
/// Records that are remembered as they were during the run.
const EARLY: usize = 2_000;

/// Everything that takes part in a run.
pub(super) struct RunStage {
    pub(super) mix: Mix,
    pub(super) cluster: Cluster,
    pub(super) crew: Crew,
    pub(super) proxy: Option<Proxy>,
    pub(super) ledger: Ledger,
    pub(super) listener: Listener,
    pub(super) vitals: Vitals,
    /// For queries; it connects to the broker directly, past all faults but the broker's own.
    pub(super) producer: Producer,
    pub(super) nemesis: Nemesis,
    pub(super) workload: Workload,
    pub(super) batch_deadline: Duration,
    /// What waits for so long, though nothing is broken, will wait for ever.
    pub(super) patience: Duration,
    pub(super) facts: Facts,
    pub(super) seen: Seen,
}

/// What a run was, for its certificate.
pub(super) struct Facts {
    pub(super) schedule: BTreeMap<Kind, u64>,
    pub(super) left_out: LeftOut,
    pub(super) repeat: String,
    pub(super) started_at: Timestamp,
    /// What the processes held before the first task.
    pub(super) before: Vec<(String, Held)>,
}

/// What the drive notes on its way.
pub(super) struct Seen {
    pub(super) begun: Instant,
    /// From the last repair to the end of the last task.
    pub(super) drained: Duration,
    pub(super) early: Vec<(u64, TaskResult)>,
    pub(super) noted: Vec<Violation>,
    /// The longest that anything waited while nothing was broken.
    pub(super) longest_wait: Duration,
    /// Workers that died of a task, as they should.
    pub(super) poisoned: u64,
}

/// What the collector says from time to time.
#[derive(Clone, Default)]
struct Pulse {
    ended: u64,
    early: Vec<(u64, TaskResult)>,
}

/// Single tasks that are due and of whose end no notice has told, the oldest first; and how many of the
/// confirmed ones were looked at.
#[derive(Default)]
struct Unended(BinaryHeap<Reverse<(Instant, u64)>>);

impl RunStage {
    /// Runs the workload and the faults to their end. What cannot go on is noted as a breach.
    pub(super) async fn run(&mut self, progress: &mut Progress) -> Result<(), CliError> {
        let (told, pulse) = watch::channel(Pulse::default());
        let asking = TaskTracker::new().spawn(ask(self.producer.clone(), self.mix, told));
        let asking = AbortOnDropHandle::new(asking);
        let mut producers = Producers::start(&mut self.cluster, self.mix)?;
        let (known, depths) = watch::channel(Depths::default());
        let measuring = measure(self.cluster.admin().clone(), self.cluster.queues(), known);
        let measuring = AbortOnDropHandle::new(TaskTracker::new().spawn(measuring));
        let (mut watch, mut looked) = (Watch::new(self.patience), Instant::now());
        let mut unended = Unended::default();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut lines = vec![];
        loop {
            tokio::select! {
                () = producers.next(&mut lines) => {}
                _ = tick.tick() => {}
            }
            for line in lines.drain(..) {
                unended.heard(&line, self.mix);
                producers.heard(line, &mut self.cluster, &mut self.workload)?;
            }
            let ended = pulse.borrow().ended;
            let proxy = self.proxy.as_ref();
            self.nemesis.step(ended, &mut self.cluster, &self.crew, proxy).await?;
            producers.feed(&mut self.workload, self.nemesis.allowance()).await;
            self.look_after_strays()?;
            progress.show(ended, self.workload.confirmed_count(), &self.nemesis);
            let done = ended >= self.mix.tasks && producers.all_answered();
            if done && self.workload.is_done() && self.nemesis.is_done() {
                break;
            }
            if looked.elapsed() < LOOK {
                continue;
            }
            looked = Instant::now();
            let mut waiting = self.waiting(&mut unended, &producers);
            waiting.extend(depths.borrow().waiting());
            let broken = !self.nemesis.present().is_empty();
            let breaches = watch.look(looked, broken, waiting);
            if !breaches.is_empty() {
                self.seen.noted.extend(breaches);
                self.note_stuck(ended);
                break;
            }
        }
        self.seen.longest_wait = watch.worst();
        drop(measuring);
        let healed = self.nemesis.healed_at.unwrap_or(self.seen.begun);
        self.seen.drained = healed.elapsed();
        self.seen.early.clone_from(&pulse.borrow().early);
        drop(asking);
        producers.finish().await;
        let crew = self.crew;
        self.cluster.stop(|name| crew.producers().iter().any(|producer| producer == name)).await;
        Ok(())
    }

    /// Everything that is due and has not come, each with who waits for it.
    fn waiting(&self, unended: &mut Unended, producers: &Producers) -> Vec<Waiting> {
        let mut waiting = self.vitals.waiting();
        self.listener.read(|heard| {
            waiting.extend(unended.oldest(&heard.tasks).map(|(due, index)| Waiting {
                subject: self.name(index),
                what: "due, and no notice tells of its end".to_owned(),
                since: due,
            }));
            let untold = |fate: &&BatchFate| {
                fate.id.as_ref().is_some_and(|id| !heard.batches.contains_key(id))
            };
            let fates = self.workload.batches.values().filter(untold);
            waiting.extend(fates.filter_map(|fate| {
                Some(Waiting {
                    subject: format!("batch {}", fate.id.as_ref()?),
                    what: "sealed, and no notice tells of its end".to_owned(),
                    since: fate.sealed?,
                })
            }));
        });
        waiting.extend(producers.oldest().map(|(producer, index, due)| Waiting {
            subject: producer.to_owned(),
            what: format!("it waits for the result of {}", self.name(index)),
            since: due,
        }));
        waiting
    }

    fn name(&self, index: u64) -> String {
        self.mix.id(index).map_or_else(|_| index.to_string(), |id| id.to_string())
    }

    fn note_stuck(&mut self, ended: u64) {
        self.seen.noted.push(Violation {
            invariant: Invariant::Liveness,
            subject: "the run".to_owned(),
            what: format!(
                "{ended} of {} tasks ended, {} confirmed; given up after {:?}",
                self.mix.tasks,
                self.workload.confirmed_count(),
                self.seen.begun.elapsed()
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

impl Unended {
    /// Notes when a confirmed task is due. Members of batches have no notices of their own.
    fn heard(&mut self, line: &Line, mix: Mix) {
        if let Some(Said::Confirmed(index)) = line.said()
            && !mix.is_member(index)
        {
            self.0.push(Reverse((Instant::now() + mix.job(index).delay, index)));
        }
    }

    /// The one that is due for longest.
    fn oldest(&mut self, told: &HashMap<u64, Told<TaskSummary>>) -> Option<(Instant, u64)> {
        while let Some(Reverse((due, index))) = self.0.peek() {
            if !told.contains_key(index) {
                return Some((*due, *index));
            }
            self.0.pop();
        }
        None
    }
}

/// Looks, again and again, how much waits in each queue.
async fn measure(admin: Admin, queues: Vec<String>, known: watch::Sender<Depths>) {
    loop {
        let mut depths = vec![];
        for name in &queues {
            if let Ok(Some(ready)) = admin.depth(name).await {
                depths.push((name.clone(), ready));
            }
        }
        known.send_modify(|known| known.note(&depths, Instant::now()));
        sleep(LOOK).await;
    }
}

/// Asks the collector, again and again, how many tasks have ended, and for some of their records.
async fn ask(producer: Producer, mix: Mix, told: watch::Sender<Pulse>) {
    let mut rng = fastrand::Rng::with_seed(mix.seed);
    let patience = Duration::from_secs(1);
    loop {
        if let Ok(Response::Totals { results, .. }) =
            producer.query_within(Query::Totals, patience).await
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
