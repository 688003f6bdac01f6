//! What part 2 computed: read back from the collector, compared with the system's own programs, summed up.

use std::collections::BTreeMap;
use std::time::Duration;

use garenne_cli::error::CliError;
use garenne_cli::output::{Paint, cell, facts, rendered, table};
use garenne_common::wire::{BatchState, BatchSummary, Payload};
use garenne_common::{Status, TaskId, TaskResult};
use garenne_producer::Producer;
use indicatif::HumanCount;
use serde::Deserialize;
use serde_json::{Value, json};

use super::fate::JobProgress;
use super::files::{self, Tree};

/// How many results one query asks for; the collector accepts up to 1,000.
const RESULTS_PER_QUESTION: usize = 500;

/// What the job computed.
#[derive(Default)]
pub(super) struct Account {
    lost: usize,
    failed: usize,
    /// Further attempts after a failed one.
    retries: u64,
    /// Tasks that ran on a delivery that was not the first.
    redelivered: usize,
    shares: BTreeMap<String, u64>,
    /// By position among the submissions.
    pub(super) outputs: Vec<Option<Payload>>,
    first_problem: Option<String>,
}

/// What the comparison found.
pub(super) struct JobVerdict {
    digests: usize,
    counts: usize,
    mismatches: Vec<String>,
}

/// All there is to say of the job.
pub(super) struct Summary {
    pub(super) account: Account,
    pub(super) verdict: JobVerdict,
    /// From opening the batch to its done notice.
    pub(super) took: Duration,
    /// Results that came again and were dropped.
    pub(super) repeats: u64,
    pub(super) done: BatchSummary,
}

impl Account {
    /// Reads every result from the collector.
    pub(super) async fn make(producer: &Producer, ids: &[TaskId]) -> Result<Self, CliError> {
        let places: BTreeMap<_, _> = ids.iter().zip(0..).collect();
        let mut account = Self { outputs: vec![None; ids.len()], ..Self::default() };
        let mut found = 0;
        for chunk in ids.chunks(RESULTS_PER_QUESTION) {
            for result in producer.results(chunk).await? {
                if let Some(place) = places.get(&result.id) {
                    found += 1;
                    account.add(*place, result);
                }
            }
        }
        account.lost = ids.len() - found;
        Ok(account)
    }

    fn add(&mut self, place: usize, result: TaskResult) {
        *self.shares.entry(result.worker.to_string()).or_default() += 1;
        self.retries += u64::from(result.attempt.saturating_sub(1));
        self.redelivered += usize::from(result.redelivered);
        match result.status {
            Status::Succeeded => self.outputs[place] = result.output,
            Status::Failed | Status::Cancelled => {
                self.failed += 1;
                let error = result.error.unwrap_or_default();
                self.first_problem.get_or_insert(format!("{}: {error}", result.name));
            }
        }
    }
}

#[derive(Deserialize)]
struct Digest {
    sha256: String,
}

#[derive(Deserialize)]
struct Words {
    words: u64,
}

/// Lets `sha256sum` and `wc` do the same work and compares answer by answer.
pub(super) fn compare(tree: &Tree, outputs: &[Option<Payload>]) -> Result<JobVerdict, CliError> {
    let mut verdict = JobVerdict { digests: 0, counts: 0, mismatches: vec![] };
    let digests = files::sha256sum(&tree.files)?;
    let counts = files::count_words(&tree.files)?;
    for (number, path) in tree.files.iter().enumerate() {
        let ours = |offset: usize| outputs[2 * number + offset].as_ref();
        if let Some(ours) = ours(0) {
            verdict.digests += 1;
            let same = ours.decode::<Digest>().is_ok_and(|ours| ours.sha256 == digests[number]);
            verdict.note(same, path);
        }
        if let Some(ours) = ours(1).filter(|_| files::is_plain_text(path)) {
            verdict.counts += 1;
            let same = ours.decode::<Words>().is_ok_and(|ours| ours.words == counts[number]);
            verdict.note(same, path);
        }
    }
    Ok(verdict)
}

impl JobVerdict {
    fn note(&mut self, same: bool, path: &str) {
        if !same {
            self.mismatches.push(path.to_owned());
        }
    }
}

impl Summary {
    /// Whether every task ended well and every digest was right.
    pub(super) fn is_good(&self) -> bool {
        let Self { account, verdict, done, .. } = self;
        account.lost == 0
            && account.failed == 0
            && verdict.mismatches.is_empty()
            && 2 * verdict.digests == account.outputs.len()
            && done.state == BatchState::Done
    }

    /// Which node did how much, and what it went through.
    pub(super) fn nodes(&self, progress: &JobProgress, paint: Paint) -> String {
        let mut nodes = table(["NODE", "TASKS", "SHARE", "WHAT HAPPENED"], paint);
        for (name, tasks) in &self.account.shares {
            let share = format!("{} %", (tasks * 100 + progress.total / 2) / progress.total.max(1));
            let cells = [name.clone(), HumanCount(*tasks).to_string(), share, progress.story(name)];
            nodes.add_row(cells.map(|text| cell(text, None, paint)));
        }
        rendered(&nodes)
    }

    /// The figures.
    pub(super) fn figures(&self) -> String {
        let Self { account, verdict, took, repeats, .. } = self;
        let count = |count: usize| HumanCount(count as u64).to_string();
        let (tasks, seconds) = (account.outputs.len(), took.as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "counts of a demo are far below 2^52")]
        let rate = tasks as f64 / seconds;
        let (digests, counts) = (count(verdict.digests), count(verdict.counts));
        let redelivered = count(account.redelivered);
        let rows = [
            ("tasks", format!("{} in {seconds:.2} s, {rate:.0} a second", count(tasks))),
            ("lost", count(account.lost)),
            ("failed", count(account.failed)),
            ("retries", HumanCount(account.retries).to_string()),
            ("redelivered", format!("{redelivered} (taken over from a node that went away)")),
            ("repeats", format!("{} (ran twice, counted once)", HumanCount(*repeats))),
            ("compared", format!("{digests} digests with sha256sum, {counts} word counts with wc")),
            ("mismatches", count(verdict.mismatches.len())),
        ];
        facts(&rows.map(|(key, value)| (key, Some(value))))
    }

    /// What is wrong, a line each and no more than ten.
    pub(super) fn problems(&self) -> Vec<String> {
        let failed =
            self.account.first_problem.iter().map(|problem| format!("a task failed: {problem}"));
        let wrong = self.verdict.mismatches.iter().map(|path| format!("another answer for {path}"));
        failed.chain(wrong).take(10).collect()
    }

    /// The figures for programs.
    pub(super) fn as_json(&self) -> Value {
        let Self { account, verdict, took, repeats, done } = self;
        json!({
            "tasks": account.outputs.len(), "seconds": took.as_secs_f64(), "lost": account.lost,
            "failed": account.failed, "retries": account.retries, "redelivered": account.redelivered,
            "repeats": repeats, "digests_compared": verdict.digests,
            "word_counts_compared": verdict.counts, "mismatches": verdict.mismatches,
            "shares": account.shares, "batch": done,
        })
    }
}
