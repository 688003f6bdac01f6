//! The `garenne-collector` service: flags, signals and exit codes around [`garenne_collector`].

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use garenne_collector::Collector;
use garenne_common::config::{Config, Sources, without_arguments};
use garenne_common::service::signals::Signals;
use garenne_common::service::telemetry;
use garenne_common::wire::Notice;
use tokio::sync::{mpsc, oneshot};

/// See docs/decisions/0021-mimalloc.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const AFTER_HELP: &str = "\
Examples:
  garenne-collector
      Collect for the namespace `garenne` of amqp://localhost into ./garenne.sqlite3.
  garenne-collector --url amqp://me:secret@host/%2f --store /var/lib/garenne/store.sqlite3
      Another broker, another file.
  garenne-collector --notify-stdout | jq 'select(.subject == \"batch\")'
      Print every done notice as a JSON line, and pick those of batches.

Later layers win: defaults, --config file (TOML), AMQP_URL, GARENNE__SECTION__KEY, flags.
For instance GARENNE__COLLECTOR__RETENTION=30days and GARENNE__LOG__FILTER=debug.

The store is a SQLite file of this host; several collectors of one host may share it.
SIGTERM and SIGINT finish what was received and exit with 0; a second one exits at once.
SIGUSR1 logs what is gathered, stored and still to be sent. SIGHUP does not end a collector.

Exit codes: 0 stopped as told; 1 an inner failure; 2 configuration, store or broker cannot be used";

/// Collects results, counts batches, sends done notices and responds to queries.
#[derive(Parser)]
#[command(name = "garenne-collector", version, about, after_help = AFTER_HELP)]
struct Flags {
    /// A configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The broker's AMQP URL, or several, separated by commas
    #[arg(long)]
    url: Option<String>,
    /// What the names of all broker objects start with
    #[arg(long, value_name = "NS")]
    namespace: Option<String>,
    /// The SQLite file; made if it is missing
    #[arg(long, value_name = "FILE")]
    store: Option<PathBuf>,
    /// How this collector signs itself [default: host and process id]
    #[arg(long)]
    name: Option<String>,
    /// What log lines (on stderr) look like
    #[arg(long, value_name = "FORMAT", value_parser = ["human", "json"])]
    log_format: Option<String>,
    /// Print every done notice as a JSON line on stdout once it is published
    #[arg(long)]
    notify_stdout: bool,
    /// End when the process of this id, which has started this one, is gone
    #[arg(long, value_name = "PID", hide = true)]
    die_with: Option<u32>,
}

impl Flags {
    fn sources(&self) -> Sources {
        Sources { file: self.config.clone(), overrides: vec![] }
            .set("broker.url", self.url.as_ref())
            .set("broker.namespace", self.namespace.as_ref())
            .set("collector.store", self.store.as_ref().map(|store| store.display()))
            .set("collector.name", self.name.as_ref())
            .set("log.format", self.log_format.as_ref())
    }
}

fn main() -> ExitCode {
    garenne_common::service::init::run(service)
}

#[tokio::main]
async fn service() -> ExitCode {
    let flags = match Flags::try_parse() {
        Ok(flags) => flags,
        Err(error) => return usage(&error),
    };
    if let Some(Err(error)) = flags.die_with.map(garenne_common::service::lifeline::die_with) {
        return refuse(&error);
    }
    let config = match Config::load(&flags.sources()) {
        Ok(config) => config,
        Err(error) => return refuse(&error),
    };
    let lines = telemetry::init(&config.log);
    let ended = match Signals::catch() {
        Ok(signals) => run(&config, flags.notify_stdout, signals).await,
        Err(error) => Err(error.into()),
    };
    // The last log lines come before a complaint.
    drop(lines);
    ended.unwrap_or_else(|error| refuse(&*error))
}

type Failure = Box<dyn std::error::Error>;

async fn run(
    config: &Config,
    notify_stdout: bool,
    mut signals: Signals,
) -> Result<ExitCode, Failure> {
    let (copies, printed) = if notify_stdout {
        let (copies, printed) = print_notices();
        (Some(copies), Some(printed))
    } else {
        (None, None)
    };
    let mut collector = tokio::select! {
        started = Collector::start(config, copies) => started?,
        () = signals.stop() => return Ok(ExitCode::SUCCESS),
    };
    let state = collector.state();
    signals.on_state(move || {
        let state = state.clone();
        async move { state.log().await }
    });
    let code = tokio::select! {
        () = signals.stop() => ExitCode::SUCCESS,
        () = collector.broken() => {
            tracing::error!("a part of the collector ended by itself; stopping");
            ExitCode::FAILURE
        }
    };
    tracing::info!("stopping");
    tokio::select! {
        () = collector.stop() => {}
        () = signals.stop() => return Ok(ExitCode::FAILURE),
    }
    if let Some(printed) = printed {
        // A reader that has stopped reading must not keep us; its notices were published.
        let finished = tokio::time::timeout(Duration::from_secs(1), printed).await;
        tracing::debug!(finished = finished.is_ok(), "printing notices");
    }
    Ok(code)
}

/// A thread of its own prints: a pipe that nobody reads blocks whoever writes to it.
fn print_notices() -> (mpsc::Sender<Notice>, oneshot::Receiver<()>) {
    let (copies, mut notices) = mpsc::channel::<Notice>(1_000);
    let (done, printed) = oneshot::channel();
    std::thread::spawn(move || {
        while let Some(notice) = notices.blocking_recv() {
            if let Err(error) = print(&notice) {
                // Somebody closed the pipe; the notices themselves went out over the broker.
                tracing::info!(%error, "notices are no longer printed");
                break;
            }
        }
        drop(done);
    });
    (copies, printed)
}

fn print(notice: &Notice) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, notice)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// One sentence, and the exit code of what a person has to mend.
fn refuse(error: &dyn std::error::Error) -> ExitCode {
    telemetry::complain(&error.to_string());
    ExitCode::from(2)
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
