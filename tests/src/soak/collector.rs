//! A collector that finds a backlog of a million results: how fast it stores them, what that costs, and
//! that its memory does not grow with them.

use std::fs;
use std::time::{Duration, Instant};

use garenne_common::wire::{Codec, Payload, Report};
use garenne_common::{BatchId, QueueName, Status, TaskId, TaskName, TaskResult, Timestamp};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::{figure, size};
use crate::harness::{Amqp, Process, Service, Warren};

const RESULTS: usize = 1_000_000;
/// As many as a worker puts into one bundle.
const BUNDLE: usize = 500;
const LOOK: Duration = Duration::from_millis(50);
/// Memory may grow by so much between the first third of the run and its end, in MiB.
const GROWTH: u64 = 16;
/// Ticks a second of the times in `/proc/PID/stat`.
const TICKS: f64 = 100.0;

/// Older records than this are forgotten in the second run.
const RETENTION: &str = "3s";

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_of_results_is_stored_in_flat_memory() {
    let warren = Warren::new().await;
    let (amqp, results) = (warren.amqp().await, size(RESULTS));
    fill(&amqp, results).await;
    let mut collector = drain("collector", &warren, warren.collector(), results, results).await;
    // Once more into a store that holds as many, all of which are old enough to be forgotten now.
    collector.signal(Signal::SIGTERM);
    assert!(collector.ended(Duration::from_mins(1)).await.success());
    fill(&amqp, results).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let service = warren.collector().set("collector.retention", RETENTION);
    drain("collector, retention at work", &warren, service, results, 2 * results).await;
    let left = warren.rows::<u32>("SELECT count(*) FROM results")[0] as usize;
    figure("collector, retention at work", &[("forgotten", (2 * results - left).to_string())]);
    assert!(left < 2 * results, "retention was at work");
}

/// Starts a collector with so many results in front of it, and waits until it has stored them, which
/// makes `rows` in all.
async fn drain(
    what: &str,
    warren: &Warren,
    service: Service<'_>,
    results: usize,
    rows: usize,
) -> Process {
    let start = Instant::now();
    let collector = service.start().await;
    let mut resident = vec![];
    while stored(warren) < rows {
        assert!(start.elapsed() < Duration::from_mins(10), "it stores them: {}", stored(warren));
        resident.push(resident_mib(collector.id()));
        tokio::time::sleep(LOOK).await;
    }
    let (took, cpu) = (start.elapsed(), cpu_seconds(collector.id()));
    let early = resident[..resident.len().div_ceil(3)].iter().max().copied().unwrap_or_default();
    let most = resident.iter().max().copied().unwrap_or_default();
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let count = results as f64;
    figure(
        what,
        &[
            ("results", results.to_string()),
            ("per_second", format!("{:.0}", count / took.as_secs_f64())),
            ("cpu_us_per_result", format!("{:.1}", cpu * 1e6 / count)),
            ("resident_mib_first_third", early.to_string()),
            ("resident_mib_most", most.to_string()),
        ],
    );
    assert!(most <= early + GROWTH, "memory grew from {early} to {most} MiB: {resident:?}");
    collector
}

/// Results of one batch, in bundles as a worker sends them.
async fn fill(amqp: &Amqp, results: usize) {
    let (batch, name) = (BatchId::generate(), TaskName::new("garenne.echo").unwrap());
    let result = |n: usize| TaskResult {
        id: TaskId::generate(),
        name: name.clone(),
        queue: QueueName::default(),
        batch: Some(batch.clone()),
        status: Status::Succeeded,
        output: Some(Payload::encode(Codec::Json, &n).unwrap()),
        error: None,
        reason: None,
        attempt: 1,
        redelivered: false,
        worker: "host:4711".into(),
        started_at: Timestamp::now(),
        finished_at: Timestamp::now(),
        fingerprint: None,
    };
    for first in (0..results).step_by(BUNDLE) {
        let bundle = first..results.min(first + BUNDLE);
        let reports: Vec<_> = bundle.map(|n| Report::Finished(result(n))).collect();
        amqp.reports(&reports).await;
    }
}

/// Rows are numbered from 1 on; to count them would slow down what is measured.
fn stored(warren: &Warren) -> usize {
    warren.rows::<u32>("SELECT COALESCE(MAX(rowid), 0) FROM results")[0] as usize
}

fn cpu_seconds(pid: Pid) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name in parentheses may hold spaces; user and system time are the 12th and 13th behind it.
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = |field: usize| fields[field].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / TICKS
}

fn resident_mib(pid: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().split(' ').next().unwrap().parse::<u64>().unwrap() / 1024
}
