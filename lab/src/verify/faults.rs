//! Breaks things when their time has come, and mends them: kills, cuts, silence, freezing.
//!
//! One place does all of it, step by step, so that no two faults harm the same process at once and
//! everything that was broken is known.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use garenne_cli::error::CliError;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tokio::process::Child;

use super::crew::Crew;
use super::node::{Node, is_gone};
use super::plan::{Fault, Kind, Schedule, Victim};
use super::proxy::Proxy;
use crate::cluster::Cluster;

/// So many things are broken at the same time at most.
const AT_ONCE: usize = 3;
/// How old a queue is before its broker is killed. RabbitMQ (3.10 to 4.x) writes the name of a new quorum
/// queue to disk within half a second of declaring it; killed before, it comes back with a queue that
/// never has a leader, and nothing that its clients do changes that (rabbitmq-server issue 15725).
const WRITTEN_AFTER: Duration = Duration::from_secs(2);
/// How long a killed broker may take until it serves again.
const RESTART_WITHIN: Duration = Duration::from_mins(3);

/// Who breaks things.
pub(super) struct Nemesis {
    schedule: Schedule,
    next: usize,
    broken: Vec<Broken>,
    node: Option<Node>,
    /// When every queue was there.
    begun: Instant,
    pub(super) injected: Vec<Injected>,
    /// When the last thing was mended.
    pub(super) healed_at: Option<Instant>,
}

/// A fault that was injected.
#[derive(Debug, Clone)]
pub(super) struct Injected {
    pub(super) kind: Kind,
    /// For people: "Worker 2 killed".
    pub(super) what: String,
    pub(super) from: Instant,
    /// When it was mended.
    pub(super) until: Option<Instant>,
}

struct Broken {
    due: Instant,
    repair: Repair,
    /// Its number among the injected.
    number: usize,
}

enum Repair {
    Worker(String),
    Collector(String),
    /// Its successor starts when the last word of the dead one is heard; nothing to do here.
    Producer(String),
    Thaw(String),
    Speak,
    ThawBroker,
    AwaitDeath(Pid),
    AwaitBroker(Child),
}

impl Nemesis {
    pub(super) fn new(schedule: Schedule, node: Option<Node>) -> Self {
        let begun = Instant::now();
        Self { schedule, next: 0, broken: vec![], node, begun, injected: vec![], healed_at: None }
    }

    /// How many tasks may have been submitted by now.
    pub(super) fn allowance(&self) -> u64 {
        self.schedule.allowance(self.next)
    }

    /// Whether all faults have come and everything is mended.
    pub(super) fn is_done(&self) -> bool {
        self.next == self.schedule.faults.len() && self.broken.is_empty()
    }

    /// How many were injected, and how many there are.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.injected.len(), self.schedule.faults.len())
    }

    /// How many of each kind were injected.
    pub(super) fn counts(&self) -> BTreeMap<Kind, u64> {
        let mut counts = BTreeMap::new();
        for injected in &self.injected {
            *counts.entry(injected.kind).or_default() += 1;
        }
        counts
    }

    /// What is broken now, for people.
    pub(super) fn present(&self) -> Vec<&str> {
        self.broken.iter().map(|broken| self.injected[broken.number].what.as_str()).collect()
    }

    /// Whether this process is expected to be silent or gone.
    pub(super) fn is_broken(&self, process: &str) -> bool {
        self.broken.iter().any(|broken| broken.repair.concerns(process))
    }

    fn broker_is_broken(&self) -> bool {
        let concerns = |repair: &Repair| {
            matches!(repair, Repair::ThawBroker | Repair::AwaitDeath(_) | Repair::AwaitBroker(_))
        };
        self.broken.iter().any(|broken| concerns(&broken.repair))
    }

    /// Mends what is due, and injects what is due after so many ended tasks.
    pub(super) async fn step(
        &mut self,
        ended: u64,
        cluster: &mut Cluster,
        crew: &Crew,
        proxy: Option<&Proxy>,
    ) -> Result<(), CliError> {
        self.mend(cluster, crew, proxy, false)?;
        while let Some((at, fault)) = self.schedule.faults.get(self.next).copied() {
            if ended < at || self.broken.len() >= AT_ONCE {
                break;
            }
            let Some((what, repair, away)) = self.inject(fault, cluster, crew, proxy).await else {
                // Not now: the victim is broken or too young.
                break;
            };
            let now = Instant::now();
            tracing::info!(what, ended, "fault");
            self.injected.push(Injected { kind: fault.kind(), what, from: now, until: None });
            let number = self.injected.len() - 1;
            match repair {
                Some(repair) => self.broken.push(Broken { due: now + away, repair, number }),
                None => self.injected[number].until = Some(now),
            }
            self.next += 1;
        }
        Ok(())
    }

    /// Mends what is due; everything, if it is `urgent`.
    fn mend(
        &mut self,
        cluster: &mut Cluster,
        crew: &Crew,
        proxy: Option<&Proxy>,
        urgent: bool,
    ) -> Result<(), CliError> {
        let now = Instant::now();
        for mut broken in std::mem::take(&mut self.broken) {
            if broken.due > now && !urgent {
                self.broken.push(broken);
                continue;
            }
            let number = broken.number;
            if let Some(left) = self.repair(broken.repair, number, cluster, crew, proxy)? {
                broken.repair = left;
                self.broken.push(broken);
            } else {
                self.injected[number].until = Some(now);
                self.healed_at = Some(now);
            }
        }
        Ok(())
    }

    /// What is still to be done afterwards.
    fn repair(
        &self,
        repair: Repair,
        number: usize,
        cluster: &mut Cluster,
        crew: &Crew,
        proxy: Option<&Proxy>,
    ) -> Result<Option<Repair>, CliError> {
        match repair {
            Repair::Worker(name) => crew.start_worker(cluster, &name)?,
            Repair::Collector(name) => cluster.spawn_collector(&name)?,
            Repair::Producer(_) => {}
            Repair::Thaw(name) => {
                if let Some(process) = cluster.process(&name) {
                    process.signal(Signal::SIGCONT);
                }
            }
            Repair::Speak => drop(proxy.map(|proxy| proxy.silence(false))),
            Repair::ThawBroker => drop(self.node.as_ref().map(|node| node.signal(Signal::SIGCONT))),
            Repair::AwaitDeath(pid) if !is_gone(pid) => return Ok(Some(Repair::AwaitDeath(pid))),
            Repair::AwaitDeath(_) => {
                let Some(node) = &self.node else { return Ok(None) };
                return Ok(Some(Repair::AwaitBroker(node.start()?)));
            }
            Repair::AwaitBroker(mut child) => match child.try_wait() {
                Ok(Some(status)) if status.success() => {}
                Ok(None) if self.injected[number].from.elapsed() < RESTART_WITHIN => {
                    return Ok(Some(Repair::AwaitBroker(child)));
                }
                _ => return Err(CliError::unusable("the killed broker does not start again")),
            },
        }
        Ok(None)
    }

    /// Breaks something; `None` if there is no victim now. Says what, how to mend it, and after what.
    async fn inject(
        &self,
        fault: Fault,
        cluster: &mut Cluster,
        crew: &Crew,
        proxy: Option<&Proxy>,
    ) -> Option<(String, Option<Repair>, Duration)> {
        match fault {
            Fault::KillWorker { pick, away } => {
                let name = self.victim(crew.workers(), pick)?;
                cluster.process(&name)?.kill().await;
                Some((format!("{name} killed"), Some(Repair::Worker(name)), away))
            }
            Fault::KillCollector { pick, away } => {
                let name = self.victim(crew.collectors(), pick)?;
                cluster.process(&name)?.kill().await;
                Some((format!("{name} killed"), Some(Repair::Collector(name)), away))
            }
            Fault::KillProducer { pick } => {
                let name = self.victim(crew.producers(), pick)?;
                cluster.process(&name)?.kill().await;
                // Longer than it takes to hear its last word and to start another one.
                let away = Duration::from_secs(2);
                Some((format!("{name} killed"), Some(Repair::Producer(name)), away))
            }
            Fault::CutOne { pick } => {
                let cut = proxy?.cut_one(pick);
                cut.then(|| ("one connection cut".to_owned(), None, Duration::ZERO))
            }
            Fault::CutAll => {
                proxy?.cut_all();
                Some(("all connections cut".to_owned(), None, Duration::ZERO))
            }
            Fault::Silence(away) => {
                proxy?.silence(true);
                let what = format!("nothing passes for {away:.1?}");
                Some((what, Some(Repair::Speak), away))
            }
            Fault::KillBroker { .. } if self.begun.elapsed() < WRITTEN_AFTER => None,
            Fault::KillBroker { away } => {
                let pid = self.harm_broker(Signal::SIGKILL)?;
                Some(("broker killed".to_owned(), Some(Repair::AwaitDeath(pid)), away))
            }
            Fault::Freeze { victim, pick, away } => {
                let names = match victim {
                    Victim::Worker => crew.workers(),
                    Victim::Collector => crew.collectors(),
                    Victim::Producer => crew.producers(),
                    Victim::Broker => {
                        self.harm_broker(Signal::SIGSTOP)?;
                        let what = format!("broker frozen for {away:.1?}");
                        return Some((what, Some(Repair::ThawBroker), away));
                    }
                };
                let name = self.victim(names, pick)?;
                cluster.process(&name)?.signal(Signal::SIGSTOP);
                Some((format!("{name} frozen for {away:.1?}"), Some(Repair::Thaw(name)), away))
            }
        }
    }

    fn harm_broker(&self, signal: Signal) -> Option<Pid> {
        if self.broker_is_broken() { None } else { self.node.as_ref()?.signal(signal) }
    }

    fn victim(&self, names: Vec<String>, pick: usize) -> Option<String> {
        let sound: Vec<_> = names.into_iter().filter(|name| !self.is_broken(name)).collect();
        sound.get(pick % sound.len().max(1)).cloned()
    }

    /// Mends everything at once, before the run is cleared away: a frozen broker could not delete its
    /// objects.
    pub(super) async fn mend_all(
        &mut self,
        cluster: &mut Cluster,
        crew: &Crew,
        proxy: Option<&Proxy>,
    ) {
        while !self.broken.is_empty() {
            if let Err(error) = self.mend(cluster, crew, proxy, true) {
                tracing::warn!(message = error.message, "not mended");
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Repair {
    fn concerns(&self, process: &str) -> bool {
        match self {
            Self::Worker(name)
            | Self::Collector(name)
            | Self::Producer(name)
            | Self::Thaw(name) => name == process,
            Self::Speak | Self::ThawBroker | Self::AwaitDeath(_) | Self::AwaitBroker(_) => false,
        }
    }
}
