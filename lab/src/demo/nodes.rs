//! Part 1: five tasks on three nodes, each of which says what it does; or, as a broadcast, each task
//! on each node.

use std::time::Duration;

use garenne_cli::error::CliError;
use garenne_common::QueueName;
use garenne_producer::Submission;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{DemoStage, NODES, PATIENCE, nodes, own_queue};

const TASKS: usize = 5;
/// How long a task pretends to work: long enough to be seen and to be shared out.
const WORK_MILLIS: u64 = 300;

pub(super) async fn show(stage: &mut DemoStage<'_>) -> Result<(), CliError> {
    let broadcast = stage.arguments.broadcast;
    stage.heading(if broadcast {
        "1. Five tasks, each on all three nodes"
    } else {
        "1. Five tasks on three nodes"
    })?;
    // Concurrency 1 and no prefetch beyond it: a node takes the next task when it has ended the last.
    let mut specs = nodes(1, 1);
    let mut queues = vec![QueueName::default()];
    if broadcast {
        queues = (1..=NODES).map(own_queue).collect::<Result<_, _>>()?;
        for (spec, own) in specs.iter_mut().zip(&queues) {
            spec.queues.push(own.clone());
        }
    }
    stage.cluster.start_workers(&specs).await?;
    let lines = perform(stage, &submissions(&queues)).await?;
    stage.say("All tasks are done.")?;
    stage.report.insert("announcements".to_owned(), json!(lines));
    stage.cluster.stop(|name| name != "Collector").await;
    Ok(())
}

/// Every task to every one of these queues.
fn submissions(queues: &[QueueName]) -> Vec<(usize, QueueName)> {
    (1..=TASKS).flat_map(|task| queues.iter().map(move |queue| (task, queue.clone()))).collect()
}

/// Submits all as one batch and passes on what the nodes print until the batch's done notice is here.
async fn perform(
    stage: &mut DemoStage<'_>,
    submissions: &[(usize, QueueName)],
) -> Result<Vec<String>, CliError> {
    let batch = stage.producer.batch().await?;
    for (task, queue) in submissions {
        let arguments = json!({ "task": task, "millis": WORK_MILLIS });
        let submission = Submission::<Value>::dynamic("garenne.announce", arguments)?;
        batch.submit_detached(submission.queue(queue)?).await?;
    }
    let batch = batch.seal().await?;
    let mut lines = vec![];
    let mut done = std::pin::pin!(batch.wait_timeout(PATIENCE));
    let summary = loop {
        tokio::select! {
            summary = &mut done => break summary?,
            line = stage.cluster.next_line() => {
                stage.say(&line)?;
                lines.push(line);
            }
        }
    };
    // A line takes another way than the notice and may come after it.
    while lines.len() < submissions.len() {
        match timeout(Duration::from_secs(1), stage.cluster.next_line()).await {
            Ok(line) => {
                stage.say(&line)?;
                lines.push(line);
            }
            Err(_) => break,
        }
    }
    if summary.succeeded == submissions.len() as u64 {
        Ok(lines)
    } else {
        let (good, all) = (summary.succeeded, submissions.len());
        Err(CliError::unusable(format!("only {good} of {all} tasks succeeded")))
    }
}
