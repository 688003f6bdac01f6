//! The program `garenne-worker`, and any program like it with handlers of its own: flags, signals, exit
//! codes, process 1 of a container, children for isolated attempts.

use std::process::ExitCode;

use clap::Parser;
use garenne_common::config::{Config, Sources, without_arguments};
use garenne_common::service::lifeline;
use garenne_common::service::signals::Signals;
use garenne_common::service::telemetry;

use crate::builder::{Builder, Worker};

/// Threads for what blocks beside handlers.
const OTHER_BLOCKING: usize = 64;

/// Takes tasks from RabbitMQ and runs them.
///
/// Serves the built-in tasks (`garenne.echo`, `garenne.sleep`, `garenne.spin`, `garenne.fail`,
/// `garenne.announce`, `text.count_words`, `file.sha256`) and the commands of its configuration file.
#[derive(Parser)]
#[command(name = "garenne-worker", version, after_help = EXAMPLES)]
struct Arguments {
    /// Configuration file (TOML); see docs/configuration.md
    #[arg(long, value_name = "FILE")]
    config: Option<std::path::PathBuf>,
    /// RabbitMQ, for instance `amqp://user:password@host:5672/%2f`
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// What all broker objects start with [default: garenne]
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// Queues to serve, separated by commas [default: default]
    #[arg(long, value_name = "LIST")]
    queues: Option<String>,
    /// Maximum number of tasks that run at the same time [default: four per core]
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,
    /// Maximum number of unacknowledged messages [default: twice the concurrency]
    #[arg(long, value_name = "N")]
    prefetch: Option<usize>,
    /// How this worker signs its results [default: host:pid]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// How long a stopping worker lets tasks finish [default: 30s]
    #[arg(long, value_name = "DURATION")]
    grace: Option<String>,
    /// The directory whose files tasks may read (`file.sha256`, `text.count_words`) [default: none]
    #[arg(long, value_name = "DIRECTORY")]
    file_root: Option<String>,
    /// Serve `garenne.crash`, with which anybody who submits tasks can kill this worker
    #[arg(long)]
    faults: bool,
    /// What log lines look like: human or json [default: human]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Which log lines appear, for instance `debug` or `warn,garenne_worker=debug` [default: info,lapin=off]
    #[arg(long, value_name = "FILTER")]
    log: Option<String>,
    /// End when the process of this id, which has started this one, is gone
    #[arg(long, value_name = "PID", hide = true)]
    die_with: Option<u32>,
}

const EXAMPLES: &str = "\
Examples:
  garenne-worker                              serve the queue `default` of a local RabbitMQ
  garenne-worker --queues cpu,default --concurrency 8
  garenne-worker --file-root /srv/data        also lets tasks read the files below it
  garenne-worker --config worker.toml         with command tasks, for instance:

      [worker.commands.\"image.thumbnail\"]
      argv = [\"convert\", \"{src}\", \"-resize\", \"200x200\", \"{dst}\"]

SIGTERM or Ctrl-C drains: running tasks finish, the rest goes back. A second one does not wait.
SIGUSR1 logs what runs and what waits for what. SIGHUP does not end a worker.
Exit codes: 0 after draining, 2 when the configuration or the broker refuses.";

/// Runs a worker until it is told to stop. `extend` registers what it serves beside the built-in tasks and
/// the configured commands.
///
/// Everything is read from the process's arguments, environment and configuration file, as
/// `garenne-worker --help` says. The exit code is 0 after draining and 2 if the configuration or the broker
/// refuses, which is explained on standard error.
pub fn main(extend: fn(Builder) -> Builder) -> ExitCode {
    garenne_common::service::init::run(|| service(extend))
}

fn service(extend: fn(Builder) -> Builder) -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    match run(arguments, extend) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Before logging is set up, and for people: one sentence.
            telemetry::complain(&error.to_string());
            ExitCode::from(2)
        }
    }
}

/// Explains wrong arguments, which may hold a password; help and version go to standard output.
fn usage(error: &clap::Error) -> ExitCode {
    let text = error.render().to_string();
    let shown = without_arguments(&text, std::env::args_os());
    if shown == text || !error.use_stderr() {
        error.exit();
    }
    telemetry::complain(shown.trim_start_matches("error: ").trim_end());
    ExitCode::from(2)
}

fn run(
    arguments: Arguments,
    extend: fn(Builder) -> Builder,
) -> Result<(), Box<dyn std::error::Error>> {
    // A child for isolated attempts has its worker's arguments, but the worker as its parent, and ends
    // with that by itself.
    if let Some(parent) = arguments.die_with.filter(|_| !lifeline::is_isolated()) {
        lifeline::die_with(parent)?;
    }
    let sources = Sources { file: arguments.config, ..Sources::default() }
        .set("broker.url", arguments.url)
        .set("broker.namespace", arguments.namespace)
        .set("worker.queues", arguments.queues)
        .set("worker.concurrency", arguments.concurrency)
        .set("worker.prefetch", arguments.prefetch)
        .set("worker.name", arguments.name)
        .set("worker.grace", arguments.grace)
        .set("worker.file_root", arguments.file_root)
        .set("worker.faults", arguments.faults.then_some(true))
        .set("log.format", arguments.log_format)
        .set("log.filter", arguments.log);
    let config = Config::load(&sources)?;
    // Dropped, it writes the last lines, before a complaint.
    let _lines = telemetry::init(&config.log);
    // Every slot may hold a blocking handler; tokio's own limit of 512 would keep the others waiting.
    let blocking = config.worker.concurrency + OTHER_BLOCKING;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.enable_all().max_blocking_threads(blocking).build()?;
    runtime.block_on(serve(extend(Worker::builder(config))))?;
    // A blocking handler that never returns must not keep the process: its task went back already.
    runtime.shutdown_background();
    Ok(())
}

async fn serve(worker: Builder) -> Result<(), Box<dyn std::error::Error>> {
    // Before anything is begun that a signal should not cut short.
    let mut signals = Signals::catch()?;
    let Some(worker) = worker.build()?.isolate().await else {
        return Ok(());
    };
    let running = tokio::select! {
        running = worker.start() => running?,
        () = signals.stop() => return Ok(()),
    };
    let state = running.state();
    signals.on_state(move || {
        let state = state.clone();
        async move { state.log() }
    });
    signals.stop().await;
    let abort = running.abort_token();
    let mut draining = std::pin::pin!(running.drain());
    tokio::select! {
        () = &mut draining => return Ok(()),
        () = signals.stop() => {}
    }
    abort.cancel();
    draining.await;
    Ok(())
}
