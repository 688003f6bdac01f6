//! The processes that submit, seen from this side: what each was given, and what it reports.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use garenne_cli::error::CliError;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStdin, ChildStdout};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::mix::{Mix, Unit};
use super::workload::{Said, Workload};
use crate::cluster::Cluster;

/// How many processes submit at once.
pub(super) const PRODUCERS: usize = 2;
/// Tasks that one of them has under way at most.
const WINDOW: usize = 400;
/// How long they may take to end by themselves.
const FAREWELL: Duration = Duration::from_secs(5);
/// Lines on their way here.
const LINES: usize = 1_024;

/// All of them.
pub(super) struct Producers {
    mix: Mix,
    seats: Vec<Seat>,
    lines: mpsc::Receiver<Line>,
    sender: mpsc::Sender<Line>,
    readers: TaskTracker,
}

/// A place that is filled again when its process was killed.
struct Seat {
    name: String,
    stdin: Option<ChildStdin>,
    /// Whether its processes wait for the results of what they submit.
    waits: bool,
    /// Confirmed tasks whose results the present process waits for, and since when they are due.
    unanswered: BTreeMap<u64, Instant>,
    /// What was given to the present process and is not done.
    units: BTreeSet<Unit>,
    /// How many processes have sat here.
    generation: u32,
}

/// What came from a seat; nothing when its process has no more to say.
pub(super) struct Line {
    seat: usize,
    generation: u32,
    text: Option<String>,
}

impl Line {
    /// What it says, if it says anything.
    pub(super) fn said(&self) -> Option<Said> {
        self.text.as_deref().and_then(Said::read)
    }
}

impl Producers {
    pub(super) fn start(cluster: &mut Cluster, mix: Mix) -> Result<Self, CliError> {
        let (sender, lines) = mpsc::channel(LINES);
        let seats = (1..=PRODUCERS).map(|number| Seat {
            name: format!("Producer {number}"),
            stdin: None,
            // Half of them.
            waits: number % 2 == 0,
            unanswered: BTreeMap::new(),
            units: BTreeSet::new(),
            generation: 0,
        });
        let readers = TaskTracker::new();
        let mut all = Self { mix, seats: seats.collect(), lines, sender, readers };
        for seat in 0..PRODUCERS {
            all.fill(cluster, seat)?;
        }
        Ok(all)
    }

    /// Starts a process in a seat.
    fn fill(&mut self, cluster: &mut Cluster, number: usize) -> Result<(), CliError> {
        let seat = &mut self.seats[number];
        let (seed, tasks) = (self.mix.seed.to_string(), self.mix.tasks.to_string());
        let mut words = vec!["verify-producer", "--seed", &seed, "--tasks", &tasks];
        words.extend(seat.waits.then_some("--wait"));
        let (stdin, stdout) = cluster.spawn_command(&seat.name, &words)?;
        seat.stdin = Some(stdin);
        seat.generation += 1;
        let lines = self.sender.clone();
        self.readers.spawn(read(stdout, lines, number, seat.generation));
        Ok(())
    }

    /// Hands out what may be submitted now.
    pub(super) async fn feed(&mut self, workload: &mut Workload, allowance: u64) {
        loop {
            let seat = self.seats.iter_mut().filter(|seat| seat.stdin.is_some());
            let Some(seat) = seat.min_by_key(|seat| seat.tasks()) else { return };
            if seat.tasks() >= WINDOW {
                return;
            }
            let Some(unit) = workload.next(allowance, Instant::now()) else { return };
            seat.units.insert(unit);
            seat.order(unit).await;
        }
    }

    /// Waits for what they say next.
    pub(super) async fn next(&mut self, lines: &mut Vec<Line>) {
        // Never the end: this struct holds a sender.
        self.lines.recv_many(lines, LINES).await;
    }

    /// Takes in a line. When a process has said its last, another one takes its seat, and what
    /// the dead one left is submitted again.
    pub(super) fn heard(
        &mut self,
        line: Line,
        cluster: &mut Cluster,
        workload: &mut Workload,
    ) -> Result<(), CliError> {
        let number = line.seat;
        let seat = &mut self.seats[number];
        if seat.generation != line.generation {
            return Ok(());
        }
        let Some(text) = line.text else {
            seat.stdin = None;
            seat.unanswered.clear();
            workload.lost(std::mem::take(&mut seat.units));
            return self.fill(cluster, number);
        };
        let Some(said) = Said::read(&text) else {
            let error = format!("the process {} said {text:?}", seat.name);
            return Err(CliError::unusable(error));
        };
        match said {
            Said::Confirmed(index) => {
                seat.units.remove(&Unit::One(index));
                if seat.waits {
                    seat.unanswered.insert(index, Instant::now() + self.mix.job(index).delay);
                }
            }
            Said::Answered(index) => drop(seat.unanswered.remove(&index)),
            Said::Sealed(at) | Said::Unsealed(at) => {
                seat.units
                    .retain(|unit| !matches!(unit, Unit::Batch { first, .. } if *first == at));
            }
            Said::Bundled(_) | Said::Opened { .. } => {}
        }
        workload.heard(&said, Instant::now());
        Ok(())
    }

    /// For each producer that waits: the task whose result is overdue for longest, and since when.
    pub(super) fn oldest(&self) -> impl Iterator<Item = (&str, u64, Instant)> {
        self.seats.iter().filter_map(|seat| {
            let (index, due) = seat.unanswered.iter().min_by_key(|(_, due)| **due)?;
            Some((seat.name.as_str(), *index, *due))
        })
    }

    /// Whether every result that is waited for is here.
    pub(super) fn all_answered(&self) -> bool {
        self.seats.iter().all(|seat| seat.unanswered.is_empty())
    }

    /// Lets the processes end. One that waits for the result of a lost task does not end by itself; it
    /// is for the caller to stop.
    pub(super) async fn finish(mut self) {
        self.seats.clear();
        self.readers.close();
        drop((self.sender, self.lines));
        if timeout(FAREWELL, self.readers.wait()).await.is_err() {
            tracing::info!("a producer still waits for results");
        }
    }
}

impl Seat {
    fn tasks(&self) -> usize {
        self.units.iter().map(|unit| unit.indices().count()).sum()
    }

    /// Writes an order. It never blocks: all orders under way fit into the pipe. An error means that the
    /// process is gone, which its silence will tell.
    async fn order(&mut self, unit: Unit) {
        let line = match unit {
            Unit::One(index) => format!("task {index}\n"),
            Unit::Batch { first, count } => format!("batch {first} {count}\n"),
        };
        if let Some(stdin) = &mut self.stdin {
            drop(stdin.write_all(line.as_bytes()).await);
        }
    }
}

async fn read(stdout: ChildStdout, to: mpsc::Sender<Line>, seat: usize, generation: u32) {
    let mut lines = BufReader::new(stdout);
    let mut text = String::new();
    loop {
        text.clear();
        // A line without its end is that of a process killed in the middle of it.
        let more = matches!(lines.read_line(&mut text).await, Ok(1..)) && text.ends_with('\n');
        let line = Line { seat, generation, text: more.then(|| text.trim_end().to_owned()) };
        if to.send(line).await.is_err() || !more {
            return;
        }
    }
}
