//! From the run to its certificate: looks at what is left, and puts everything before the judge.

use std::time::{Duration, Instant};

use crate::node::broker_version;
use garenne_cli::error::CliError;
use garenne_common::wire::BatchState;
use garenne_common::{Status, TaskResult};

use super::bounds;
use super::certificate::{Certificate, Counts, Shown, Versions, chosen, tally};
use super::check::{Evidence, Invariant, Violation};
use super::drive::RunStage;
use super::gather;
use super::producers::PRODUCERS;
use super::progress::Progress;
use super::proxy::Proxy;
use super::stall;

/// Lines of history that a breach is shown with.
const HISTORY: usize = 12;

/// Runs everything and judges it.
pub(super) async fn reach(
    stage: &mut RunStage,
    progress: &mut Progress,
) -> Result<Certificate, CliError> {
    stage.run(progress).await?;
    progress.say("all tasks have ended; waiting for batches and queues");
    stage.settle().await;
    progress.say("asking the collector for every record");
    let records = gather::records(&stage.producer, stage.mix).await?;
    let letters = gather::letters(&stage.producer, stage.mix, &records).await?;
    let totals = gather::totals(&stage.producer).await?;
    let after = bounds::measure(&mut stage.cluster);
    let processes = bounds::compare(std::mem::take(&mut stage.facts.before), &after);
    stage.seen.noted.extend(bounds::breaches(&processes));
    note_connections(stage);
    // What was delivered and not settled is ready again once nobody consumes.
    let crew = stage.crew;
    stage.cluster.stop(|name| crew.workers().iter().any(|worker| worker == name)).await;
    stage.cluster.stop(|_| true).await;
    let queues = stage.queues().await;
    let disturbances = disturbances(stage);
    let fates = &stage.workload;
    let violations = stage.ledger.read(|book| {
        stage.listener.read(|heard| {
            let evidence = Evidence {
                mix: stage.mix,
                confirmed: &fates.confirmed,
                handed: &fates.handed,
                records: &records,
                early: &stage.seen.early,
                book,
                heard,
                batches: &fates.batches,
                batch_deadline: stage.batch_deadline,
                totals,
                letters: &letters,
                queues: &queues,
                disturbances: &disturbances,
                begun: stage.seen.begun,
                noted: &stage.seen.noted,
            };
            evidence.violations()
        })
    });
    let counts = counts(stage, &records, totals.repeats);
    Ok(certify(stage, violations, counts, processes, &records))
}

/// Each process has two connections at most, and those of the dead are gone.
fn note_connections(stage: &mut RunStage) {
    let Some(open) = stage.proxy.as_ref().map(Proxy::open) else { return };
    let most = 3 * (stage.crew.workers + stage.crew.collectors);
    if open > most {
        stage.seen.noted.push(Violation {
            invariant: Invariant::Bounds,
            subject: "connections".to_owned(),
            what: format!("{open} are open at the end, at most {most} are needed"),
        });
    }
}

/// Moments at which a message may have come twice, in order.
fn disturbances(stage: &RunStage) -> Vec<Instant> {
    let mut all = stage.proxy.as_ref().map_or_else(Vec::new, Proxy::made);
    for injected in &stage.nemesis.injected {
        all.push(injected.from);
        all.extend(injected.until);
    }
    all.sort_unstable();
    all
}

fn counts(stage: &RunStage, records: &[Option<TaskResult>], repeated_results: u64) -> Counts {
    let ended =
        |status| records.iter().flatten().filter(|record| record.status == status).count() as u64;
    let mut counts = Counts {
        confirmed: stage.workload.confirmed_count(),
        bundled: stage.workload.bundled,
        resubmitted: stage.workload.resubmitted(),
        succeeded: ended(Status::Succeeded),
        failed: ended(Status::Failed),
        cancelled: ended(Status::Cancelled),
        answered: stage.workload.answered,
        repeated_results,
        poisoned_workers: stage.seen.poisoned,
        connections: stage.proxy.as_ref().map_or(0, |proxy| proxy.made().len() as u64),
        ..Counts::default()
    };
    stage.ledger.read(|book| {
        counts.executions = book.executions();
        counts.duplicate_executions = book.duplicates();
        counts.refused_effects = book.refused;
        counts.unkeyed_repeats = book.unkeyed_repeats();
    });
    stage.listener.read(|heard| {
        let batches = |state| {
            heard.batches.values().filter(|told| told.summary.state == state).count() as u64
        };
        counts.batches_done = batches(BatchState::Done);
        counts.batches_abandoned = batches(BatchState::Abandoned);
        counts.repeated_notices = heard.repeats();
    });
    let executions = u32::try_from(counts.executions).unwrap_or(u32::MAX).max(1);
    let duplicates = u32::try_from(counts.duplicate_executions).unwrap_or(u32::MAX);
    counts.duplicate_rate = f64::from(duplicates) / f64::from(executions);
    counts
}

fn certify(
    stage: &RunStage,
    violations: Vec<Violation>,
    counts: Counts,
    processes: Vec<bounds::BoundedProcess>,
    records: &[Option<TaskResult>],
) -> Certificate {
    let breaches = tally(&violations);
    let holds = violations.is_empty();
    let shown = chosen(violations).into_iter().map(|violation| {
        let history = stage.mix.index_of(&violation.subject);
        let history = history.map_or_else(Vec::new, |index| history_of(stage, index, records));
        Shown { violation, history }
    });
    Certificate {
        schema: 1,
        holds,
        repeat: stage.facts.repeat.clone(),
        seed: stage.mix.seed,
        tasks: stage.mix.tasks,
        workers: stage.crew.workers,
        collectors: stage.crew.collectors,
        producers: PRODUCERS,
        started_at: stage.facts.started_at,
        seconds: stage.seen.begun.elapsed().as_secs_f64(),
        versions: Versions {
            garenne: garenne_common::VERSION,
            profile: if cfg!(debug_assertions) { "debug" } else { "release" },
            rabbitmq: broker_version(),
        },
        injected: stage.nemesis.counts(),
        planned: stage.facts.schedule.clone(),
        left_out: stage.facts.left_out.clone(),
        counts,
        breaches,
        worst_stall_seconds: worst_stall(stage, records).as_secs_f64(),
        longest_wait_seconds: stage.seen.longest_wait.as_secs_f64(),
        drained_seconds: stage.seen.drained.as_secs_f64(),
        processes,
        violations: shown.collect(),
    }
}

/// By the times at which handlers ended, which are this machine's as well as all others here.
fn worst_stall(stage: &RunStage, records: &[Option<TaskResult>]) -> Duration {
    let confirmed = (0..).zip(&stage.workload.confirmed);
    let due = confirmed.filter_map(|(n, at)| {
        Some((*at)?.saturating_duration_since(stage.seen.begun) + stage.mix.job(n).delay)
    });
    let ended = records.iter().flatten();
    let ended = ended.map(|record| record.finished_at.since(stage.facts.started_at));
    stall::worst(due.collect(), ended.collect())
}

/// What is known of a task, in order.
fn history_of(stage: &RunStage, index: u64, records: &[Option<TaskResult>]) -> Vec<String> {
    let at = |moment: Instant| (moment - stage.seen.begun).as_secs_f64();
    let place = usize::try_from(index).unwrap_or(usize::MAX);
    let mut lines = vec![format!("asked: {}", stage.mix.job(index).arguments())];
    let times = stage.workload.handed.get(place).copied().unwrap_or_default();
    if let Some(Some(confirmed)) = stage.workload.confirmed.get(place) {
        lines.push(format!("{:.2} s: confirmed; submitted {times} times", at(*confirmed)));
    }
    stage.ledger.read(|book| {
        for run in book.runs.get(&index).into_iter().flatten() {
            lines.push(format!("{:.2} s: attempt {} on {}", at(run.at), run.attempt, run.worker));
        }
    });
    stage.listener.read(|heard| {
        if let Some(told) = heard.tasks.get(&index) {
            let status = told.summary.status.as_str();
            lines.push(format!("{:.2} s: a notice says {status}", at(told.at)));
        }
    });
    if let Some(Some(record)) = records.get(place) {
        let (status, attempt, worker) = (record.status.as_str(), record.attempt, &record.worker);
        lines.push(format!("record: {status}, attempt {attempt}, {worker}"));
    }
    if let Some(first) = lines.len().checked_sub(HISTORY) {
        lines.drain(1..=first.min(lines.len() - 1));
    }
    lines
}
