//! Part 2: digests and word counts of a real directory tree, with nodes that die and restart under the
//! job; then every answer is compared with the system's own programs.

use std::time::Instant;

use futures_util::StreamExt;
use garenne_cli::error::{CliError, Exit};
use garenne_cli::output::Paint;
use garenne_common::TaskId;
use garenne_common::wire::BatchSummary;
use garenne_producer::{Batch, Submission};
use indicatif::{DecimalBytes, HumanCount};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::account::{Account, Summary, compare};
use super::fate::{JobProgress, watch};
use super::files::Tree;
use super::{DemoStage, PATIENCE, nodes};

/// A few per node, so that a node that dies leaves some work of its own behind.
const CONCURRENCY: usize = 4;
const PREFETCH: usize = 8;

pub(super) async fn show(stage: &mut DemoStage<'_>) -> Result<Exit, CliError> {
    stage.heading("2. A real job, with nodes dying under it")?;
    let tree = choose(stage).await?;
    let (count, root) = (tree.files.len() as u64, tree.root.display().to_string());
    stage.say(format_args!(
        "file.sha256 and text.count_words over {} files of {root} ({})",
        HumanCount(count),
        DecimalBytes(tree.bytes)
    ))?;
    stage.cluster.set("GARENNE__WORKER__FILE_ROOT", root.clone());
    stage.cluster.start_workers(&nodes(CONCURRENCY, PREFETCH)).await?;
    let (summary, progress) = work(stage, tree).await?;
    let paint = Paint::for_stdout();
    stage.say(format_args!("\n{}\n\n{}", summary.nodes(&progress, paint), summary.figures()))?;
    stage.report.insert("job".to_owned(), summary.as_json());
    if summary.is_good() {
        stage.say(paint.green("Every task ended once, and every answer is right."))?;
        return Ok(Exit::Success);
    }
    for problem in summary.problems() {
        stage.say(problem)?;
    }
    stage.say(paint.red("The job did not come out right."))?;
    Ok(Exit::Failed)
}

/// The job itself and the comparison after it.
async fn work(stage: &mut DemoStage<'_>, tree: Tree) -> Result<(Summary, JobProgress), CliError> {
    let producer = stage.producer.clone();
    let repeats = producer.totals().await?.repeats;
    let begin = Instant::now();
    let batch = producer.batch().await?;
    let total = 2 * tree.files.len() as u64;
    let mut progress = JobProgress::new(stage.context.output.format, total, batch.id().clone());
    let specs = nodes(CONCURRENCY, PREFETCH);
    let both = async {
        let watch = watch(stage.cluster, &producer, &specs, &mut progress);
        tokio::try_join!(submit_and_wait(batch, &tree.files), watch)
    };
    let late = || CliError::unusable(format!("the job is not done after {PATIENCE:?}"));
    let ((ids, done), ()) = timeout(PATIENCE, both).await.map_err(|_| late())??;
    let took = begin.elapsed();
    progress.finish();

    let mut account = Account::make(&producer, &ids).await?;
    let repeats = producer.totals().await?.repeats - repeats;
    let outputs = std::mem::take(&mut account.outputs);
    let (verdict, outputs) =
        blocking(move || compare(&tree, &outputs).map(|verdict| (verdict, outputs))).await?;
    account.outputs = outputs;
    Ok((Summary { account, verdict, took, repeats, done }, progress))
}

async fn choose(stage: &DemoStage<'_>) -> Result<Tree, CliError> {
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
