//! Part 2: digests and word counts of a real directory tree, with nodes that die and restart under the
//! job; then every answer is compared with the system's own programs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use garenne_common::wire::{BatchState, BatchSummary, Payload};
use garenne_common::{Status, TaskId, TaskResult};
use garenne_producer::{Batch, Producer, Submission};
use indicatif::{DecimalBytes, HumanCount, ProgressBar, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::files::{self, Tree};
use super::{PATIENCE, Stage, node_name, nodes};
use crate::cli::cluster::{Cluster, WorkerSpec};
use crate::cli::error::{CliError, Exit};
use crate::cli::output::{self, Format, Paint, cell, facts, table};

/// A few per node, so that a node that dies leaves work of others' unharmed and some of its own behind.
const SLOTS: usize = 4;
const LOOKAHEAD: usize = 8;
/// How often the collector is asked how far the job is.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How many results one question asks for; the collector answers up to 1,000.
const RESULTS_PER_QUESTION: usize = 500;

/// What befalls the nodes, and at how many percent of the job. Killed: SIGKILL, so the node says
/// nothing to anybody. Restarted: SIGTERM, so it hands back what it has not begun.
const FATES: [(u64, usize, Fate); 3] =
    [(35, 2, Fate::Killed), (50, 3, Fate::Restarted), (65, 2, Fate::StartedAgain)];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Killed,
    Restarted,
    StartedAgain,
}

impl Fate {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Killed => "killed (SIGKILL)",
            Self::Restarted => "restarted (SIGTERM)",
            Self::StartedAgain => "started again",
        }
    }
}

/// What the job computed.
#[derive(Default)]
struct Account {
    lost: usize,
    failed: usize,
    /// Further attempts after a failed one.
    retries: u64,
    /// Tasks that ran on a delivery that was not the first.
    redelivered: usize,
    shares: BTreeMap<String, u64>,
    /// By position among the submissions.
    outputs: Vec<Option<Payload>>,
    first_problem: Option<String>,
}

/// What the comparison found.
struct Verdict {
    digests: usize,
    counts: usize,
    mismatches: Vec<String>,
}

pub(super) async fn show(stage: &mut Stage<'_>) -> Result<Exit, CliError> {
    stage.heading("2. A real job, with nodes dying under it")?;
    let tree = choose(stage).await?;
    let (count, root) = (tree.files.len() as u64, tree.root.display().to_string());
    let size = DecimalBytes(tree.bytes);
    stage.say(format_args!(
        "file.sha256 and text.count_words over {} files of {root} ({size})",
        HumanCount(count)
    ))?;
    let specs = nodes(SLOTS, LOOKAHEAD);
    stage.cluster.start_workers(&specs).await?;
    let repeats_before = stage.producer.totals().await?.repeats;

    let begin = Instant::now();
    let batch = stage.producer.batch().await?;
    let mut progress = Progress::new(stage, 2 * count, batch.id().clone());
    let producer = stage.producer.clone();
    let (ids, done) = {
        let work = submit_and_wait(batch, &tree.files);
        let watch = watch(stage.cluster, &producer, &specs, &mut progress);
        let both = async { tokio::try_join!(work, watch) };
        let late = || CliError::unusable(format!("the job is not done after {PATIENCE:?}"));
        let ((ids, done), ()) = timeout(PATIENCE, both).await.map_err(|_| late())??;
        (ids, done)
    };
    let took = begin.elapsed();
    progress.finish();

    let account = Account::make(&producer, &ids).await?;
    let repeats = producer.totals().await?.repeats - repeats_before;
    let verdict = compare(tree, account.outputs.clone()).await?;
    report(stage, &account, &verdict, &progress, (took, repeats, &done))
}

async fn choose(stage: &Stage<'_>) -> Result<Tree, CliError> {
    let (dir, limit) = (stage.arguments.dir.clone(), stage.arguments.files);
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    blocking(move || Tree::choose(dir.as_deref(), limit)).await
}

/// Files are read on a thread of their own, so that Ctrl-C is heard meanwhile.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CliError> + Send + 'static,
) -> Result<T, CliError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(CliError::unusable(format!("reading files failed: {error}"))))
}

/// Two tasks a file, as one batch; the ids in the order of submission and the done notice.
async fn submit_and_wait(
    batch: Batch,
    files: &[String],
) -> Result<(Vec<TaskId>, BatchSummary), CliError> {
    let tasks =
        files.iter().flat_map(|path| ["file.sha256", "text.count_words"].map(|name| (name, path)));
    let submissions =
        tasks.map(|(name, path)| Submission::<Value>::dynamic(name, json!({ "path": path })));
    let submissions: Vec<_> = submissions.collect::<Result<_, _>>()?;
    let mut ids = Vec::with_capacity(submissions.len());
    {
        let submitted =
            batch.submit_all_detached::<Value, _>(futures_util::stream::iter(submissions));
        let mut submitted = std::pin::pin!(submitted);
        while let Some(id) = submitted.next().await {
            ids.push(id?);
        }
    }
    let done = batch.seal().await?.wait().await?;
    Ok((ids, done))
}

/// Follows the batch and lets the nodes meet their fates, until it is done.
async fn watch(
    cluster: &mut Cluster,
    producer: &Producer,
    specs: &[WorkerSpec],
    progress: &mut Progress,
) -> Result<(), CliError> {
    let mut fates = FATES.iter().peekable();
    loop {
        let status = producer.batch_status(&progress.batch).await?;
        if let Some(status) = status.map(|status| status.summary) {
            progress.set(status.succeeded + status.failed + status.cancelled)?;
            if matches!(status.state, BatchState::Done | BatchState::Abandoned) {
                return Ok(());
            }
        }
        if let Some((_, number, fate)) =
            fates.next_if(|(percent, ..)| progress.percent() >= *percent)
        {
            meet(cluster, &specs[number - 1], *fate).await?;
            progress.note(*number, *fate)?;
        }
        sleep(LOOK_EVERY).await;
    }
}

async fn meet(cluster: &mut Cluster, spec: &WorkerSpec, fate: Fate) -> Result<(), CliError> {
    match fate {
        Fate::Killed => {
            if let Some(process) = cluster.process(&spec.name) {
                process.kill().await;
            }
            Ok(())
        }
        Fate::Restarted => {
            cluster.stop(|name| name == spec.name).await;
            cluster.spawn_worker(spec)
        }
        Fate::StartedAgain => cluster.spawn_worker(spec),
    }
}

/// How far the job is: a bar on a terminal, a line now and then elsewhere.
struct Progress {
    batch: garenne_common::BatchId,
    total: u64,
    done: u64,
    bar: Option<ProgressBar>,
    /// Where the next line is due, without a bar.
    next_line: u64,
    text: bool,
    met: Vec<(usize, Fate, u64)>,
}

impl Progress {
    fn new(stage: &Stage<'_>, total: u64, batch: garenne_common::BatchId) -> Self {
        let text = stage.context.output.format == Format::Text;
        let bar = ProgressBar::new(total);
        let style = "{bar:30.cyan} {human_pos}/{human_len} tasks  {per_sec}  {elapsed}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("━╸─"));
        }
        let bar = Some(bar).filter(|bar| text && !bar.is_hidden());
        Self { batch, total, done: 0, bar, next_line: total / 4, text, met: vec![] }
    }

    fn percent(&self) -> u64 {
        self.done * 100 / self.total.max(1)
    }

    fn set(&mut self, done: u64) -> Result<(), CliError> {
        self.done = done;
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if done >= self.next_line => {
                self.next_line = (done * 4 / self.total.max(1) + 1) * self.total.div_ceil(4);
                let (done, total) = (HumanCount(done), HumanCount(self.total));
                self.line(&format!("{done} of {total} tasks are done"))?;
            }
            None => {}
        }
        Ok(())
    }

    fn note(&mut self, number: usize, fate: Fate) -> Result<(), CliError> {
        let percent = self.percent();
        self.met.push((number, fate, percent));
        self.line(&format!("{} {} at {percent} %", node_name(number), fate.as_str()))
    }

    fn line(&self, line: &str) -> Result<(), CliError> {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::line(line)),
            None if self.text => output::line(line),
            None => Ok(()),
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// What a node went through.
    fn story(&self, name: &str) -> String {
        let own = self.met.iter().filter(|(number, ..)| node_name(*number) == name);
        let parts: Vec<_> =
            own.map(|(_, fate, percent)| format!("{} at {percent} %", fate.as_str())).collect();
        parts.join(", ")
    }
}

impl Account {
    /// Reads every result from the collector.
    async fn make(producer: &Producer, ids: &[TaskId]) -> Result<Self, CliError> {
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
        *self.shares.entry(result.worker).or_default() += 1;
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
async fn compare(tree: Tree, outputs: Vec<Option<Payload>>) -> Result<Verdict, CliError> {
    blocking(move || {
        let mut verdict = Verdict { digests: 0, counts: 0, mismatches: vec![] };
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
    })
    .await
}

impl Verdict {
    fn note(&mut self, same: bool, path: &str) {
        if !same {
            self.mismatches.push(path.to_owned());
        }
    }
}

fn report(
    stage: &mut Stage<'_>,
    account: &Account,
    verdict: &Verdict,
    progress: &Progress,
    (took, repeats, done): (Duration, u64, &BatchSummary),
) -> Result<Exit, CliError> {
    let total = progress.total;
    #[expect(clippy::cast_precision_loss, reason = "counts of a demo are far below 2^52")]
    let rate = total as f64 / took.as_secs_f64();
    let mut nodes_table = table(["NODE", "TASKS", "SHARE", "WHAT HAPPENED"], Paint::for_stdout());
    for (name, tasks) in &account.shares {
        let share = format!("{} %", (tasks * 100 + total / 2) / total.max(1));
        let cells = [name.clone(), HumanCount(*tasks).to_string(), share, progress.story(name)];
        nodes_table.add_row(cells.map(|text| cell(text, None, Paint::for_stdout())));
    }
    stage.say(format_args!("\n{}\n", nodes_table.trim_fmt()))?;
    let count = |count: usize| HumanCount(count as u64).to_string();
    let (digests, counts) = (count(verdict.digests), count(verdict.counts));
    stage.say(facts(&[
        (
            "tasks",
            Some(format!(
                "{} in {:.2} s, {rate:.0} a second",
                HumanCount(total),
                took.as_secs_f64()
            )),
        ),
        ("lost", Some(count(account.lost))),
        ("failed", Some(count(account.failed))),
        ("retries", Some(HumanCount(account.retries).to_string())),
        (
            "redelivered",
            Some(format!("{} (taken over from a node that went away)", count(account.redelivered))),
        ),
        ("repeats", Some(format!("{} (ran twice, counted once)", HumanCount(repeats)))),
        (
            "compared",
            Some(format!("{digests} digests with sha256sum, {counts} word counts with wc")),
        ),
        ("mismatches", Some(count(verdict.mismatches.len()))),
    ]))?;
    stage.report.insert("job".to_owned(), json!({
        "tasks": total, "seconds": took.as_secs_f64(), "lost": account.lost, "failed": account.failed,
        "retries": account.retries, "redelivered": account.redelivered, "repeats": repeats,
        "digests_compared": verdict.digests, "word_counts_compared": verdict.counts,
        "mismatches": verdict.mismatches, "shares": account.shares, "batch": done,
    }));
    let good = account.lost == 0 && account.failed == 0 && verdict.mismatches.is_empty();
    if good && done.state == BatchState::Done {
        let paint = Paint::for_stdout();
        stage.say(paint.green("Every task ended once, and every answer is right."))?;
        return Ok(Exit::Success);
    }
    complain(stage, account, verdict)?;
    Ok(Exit::Failed)
}

fn complain(stage: &Stage<'_>, account: &Account, verdict: &Verdict) -> Result<(), CliError> {
    let paint = Paint::for_stdout();
    if let Some(problem) = &account.first_problem {
        stage.say(format_args!("{} {problem}", paint.red("A task failed:")))?;
    }
    for path in verdict.mismatches.iter().take(10) {
        stage.say(format_args!("{} {path}", paint.red("Another answer for:")))?;
    }
    stage.say(paint.red("The job did not come out right."))
}
