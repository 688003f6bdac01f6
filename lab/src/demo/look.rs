//! Part 3: where to look in RabbitMQ's management UI; on a terminal with tasks that run, wait and are
//! delayed, for as long as the person likes.

use std::io::{BufRead, IsTerminal};
use std::time::Duration;

use futures_util::StreamExt;
use garenne_cli::error::CliError;
use garenne_cli::output::{Format, Paint, facts};
use garenne_common::config::management_url;
use garenne_producer::Submission;
use serde_json::{Value, json};

use super::{DemoStage, nodes};

/// Two tasks at a time per node: six tasks run, six more are with the nodes, the rest waits in the queue.
const CONCURRENCY: usize = 2;
const SLEEPERS: usize = 30;
const DELAYED: u64 = 20;
/// Longer than anybody looks.
const SLEEP: Duration = Duration::from_hours(1);

pub(super) async fn show(stage: &mut DemoStage<'_>) -> Result<(), CliError> {
    let url = management_url();
    stage.report.insert("management_url".to_owned(), json!(url));
    stage.heading("3. A look at the broker")?;
    let Some(url) = url else {
        return stage.say(
            "No management UI is known of this broker. This starts one that has it:\n  \
             scripts/rabbitmq run --management -- garenne demo",
        );
    };
    let waits = !stage.arguments.no_wait
        && stage.context.output.format == Format::Text
        && std::io::stdin().is_terminal()
        && std::io::stdout().is_terminal();
    if waits {
        furnish(stage).await?;
    }
    guide(stage, &url)?;
    if waits {
        stage.say(
            Paint::for_stdout()
                .cyan("\nPress Enter (or Ctrl-C) to end the demo and remove all of it."),
        )?;
        wait(stage).await;
    }
    Ok(())
}

/// Something to look at: the three nodes with running, waiting and delayed tasks.
async fn furnish(stage: &mut DemoStage<'_>) -> Result<(), CliError> {
    stage.cluster.stop(|name| name != "Collector").await;
    stage.cluster.start_workers(&nodes(CONCURRENCY, 2 * CONCURRENCY)).await?;
    let millis = u64::try_from(SLEEP.as_millis()).unwrap_or(u64::MAX);
    let sleeper = || Submission::<Value>::dynamic("garenne.sleep", json!({ "millis": millis }));
    let mut submissions = vec![];
    for _ in 0..SLEEPERS {
        submissions.push(sleeper()?.timeout(2 * SLEEP));
    }
    for number in 1..=DELAYED {
        submissions.push(sleeper()?.delay(Duration::from_mins(number)));
    }
    let submissions = futures_util::stream::iter(submissions);
    let submitted = stage.producer.submit_all_detached::<Value, _>(submissions);
    let mut submitted = std::pin::pin!(submitted);
    while let Some(id) = submitted.next().await {
        id?;
    }
    Ok(())
}

fn guide(stage: &DemoStage<'_>, url: &str) -> Result<(), CliError> {
    let ns = stage.cluster.namespace();
    let paint = Paint::for_stdout();
    stage.say(format_args!("RabbitMQ's management UI: {}  (guest / guest)", paint.green(url)))?;
    stage.say(format_args!("Every name there begins with {}.\n", paint.green(ns.as_str())))?;
    let fact = |key: &'static str, text: &str| (key, Some(text.to_owned()));
    stage.say(facts(&[
        fact(
            "Queues",
            "tasks.default: waiting (Ready) and running (Unacked) tasks\n\
            delay.00 to .24: delayed tasks and retries\n\
            results, dead, unrouted: empty while a collector runs",
        ),
        fact("Connections", "garenne-worker Node 1 [default] consume, and so on"),
        fact("Consumers", "on the page of tasks.default: one consumer tag a node"),
        fact(
            "Messages",
            "\"Get messages\" on that page: a task's `type` is its name,\n\
            `message_id` its id, the payload its arguments",
        ),
    ]))
}

/// Until Enter, the end of standard input or a signal.
async fn wait(stage: &DemoStage<'_>) {
    let enter = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        // An error ends the wait as an end of input does.
        drop(std::io::stdin().lock().read_line(&mut line));
    });
    tokio::select! {
        _ = enter => {}
        _ = stage.context.stop.requested() => {}
    }
}
