//! What every command gets: the checked configuration, the output, the deadline and the stop
//! signal.
//!
//! Global options come in; a connected [`Producer`] and responses of the collector go out. Knows no
//! command.

use std::io::IsTerminal;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use garenne_common::broker::BrokerError;
use garenne_common::config::{Config, LogFormat, Sources};
use garenne_common::service::telemetry;
use garenne_common::wire::{Query, Response};
use garenne_producer::Producer;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::error::{CliError, Exit};
use crate::globals::Globals;
use crate::output::{Output, Paint};
use crate::screen::Screen;

/// The log filter of commands. A command prints its own errors, so only unexpected log lines
/// appear: lapin logs every refusal as an error, and the publisher what the command then explains
/// in one sentence.
pub const FILTER: &str = "warn,garenne_common::broker::publisher=error,\
                          garenne_common::broker::publish_task=error,lapin=off";

/// How long closing the connections may take.
const CLOSE: Duration = Duration::from_secs(5);

/// What every command gets.
pub struct Context {
    /// All settings; `--deadline` is already applied to the broker timeouts.
    pub config: Config,
    /// Writes results.
    pub output: Output,
    /// Writes log lines; shared with a progress bar.
    pub screen: Screen,
    /// Time limit of one step.
    pub deadline: Duration,
    /// Signals that end the command: Ctrl-C, SIGTERM and SIGHUP.
    pub stop: Stop,
}

impl Context {
    /// Loads the configuration and starts logging and listening for signals. `filter` is the log
    /// filter unless the user sets another.
    pub fn new(globals: &Globals, filter: &str) -> Result<Self, CliError> {
        let config = load(globals, filter)?;
        let (screen, output) = (Screen::default(), Output { format: globals.output });
        let lines = screen.clone();
        telemetry::init_to(&config.log, move || lines.writer());
        Ok(Self { config, output, screen, deadline: globals.deadline, stop: Stop::listen()? })
    }

    /// Connects to the broker; the management UI shows the connection as `garenne <command>`.
    pub async fn producer(&self, command: &str) -> Result<Producer, CliError> {
        self.producer_with(&self.config, command).await
    }

    /// [`producer`](Self::producer) with another configuration.
    pub async fn producer_with(
        &self,
        config: &Config,
        command: &str,
    ) -> Result<Producer, CliError> {
        let name = format!("garenne {command}");
        let connecting = Producer::connect_as(config, &name);
        match tokio::time::timeout(self.deadline, connecting).await {
            Ok(producer) => Ok(producer?),
            Err(_) => Err(self.timed_out().into()),
        }
    }

    /// Closes the producer, unless the command failed: what is unconfirmed then will hardly be
    /// confirmed now, and a person waits.
    pub async fn close<T>(&self, producer: Producer, done: &Result<T, CliError>) {
        if done.is_ok() {
            let limit = if self.stop.is_requested() { Duration::from_secs(1) } else { CLOSE };
            // After the limit the process ends, and with it the connection.
            tokio::time::timeout(limit, producer.close()).await.unwrap_or_default();
        }
    }

    /// Sends a query to the collector and waits for its response, at most
    /// [`deadline`](Self::deadline).
    pub async fn query(&self, producer: &Producer, query: Query) -> Result<Response, CliError> {
        Ok(producer.query_within(query, self.deadline).await?)
    }

    /// The error for a broker that did not answer within the deadline.
    pub fn timed_out(&self) -> BrokerError {
        let urls = self.config.broker.urls.iter().map(ToString::to_string);
        BrokerError::Unreachable {
            url: urls.collect::<Vec<_>>().join(" or "),
            cause: format!("no answer within {:?}", self.deadline),
        }
    }

    /// Runs a command until it ends or a signal arrives; for commands that can be dropped at any
    /// time.
    pub async fn or_interrupt(
        &self,
        command: impl Future<Output = Result<Exit, CliError>>,
    ) -> Result<Exit, CliError> {
        tokio::select! {
            done = command => done,
            exit = self.stop.requested() => Ok(exit),
        }
    }
}

fn load(globals: &Globals, quiet: &str) -> Result<Config, CliError> {
    let deadline = humantime::format_duration(globals.deadline);
    let filter = match globals.verbose {
        0 => None,
        1 => Some("info,lapin=off"),
        2 => Some("debug,lapin=info"),
        _ => Some("trace"),
    };
    let format = globals.log_format.map(|format| match format {
        LogFormat::Human => "human",
        LogFormat::Json => "json",
    });
    let sources = Sources { file: globals.config.clone(), overrides: vec![] }
        .set("broker.url", globals.url.as_deref())
        .set("broker.namespace", globals.namespace.as_deref())
        .set("broker.connect_timeout", Some(&deadline))
        .set("broker.publish_timeout", Some(&deadline))
        .set("log.filter", filter)
        .set("log.format", format);
    Ok(Config::load_over(&[("log.filter", quiet)], &sources)?)
}

/// Signals that ask the command to stop: Ctrl-C, SIGTERM or SIGHUP (the terminal was closed). The
/// second one ends the process at once.
#[derive(Clone)]
pub struct Stop {
    token: CancellationToken,
    exit: Arc<OnceLock<Exit>>,
    /// Owns the task that listens, which lives as long as the process.
    _listener: TaskTracker,
}

impl Stop {
    fn listen() -> Result<Self, CliError> {
        let failed = |error| CliError::unusable(format!("cannot listen for signals: {error}"));
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
        let (token, exit) = (CancellationToken::new(), Arc::new(OnceLock::new()));
        let listener = TaskTracker::new();
        let (told, how) = (token.clone(), Arc::clone(&exit));
        listener.spawn(async move {
            loop {
                let now = tokio::select! {
                    _ = interrupt.recv() => Exit::Interrupted,
                    _ = terminate.recv() => Exit::Terminated,
                    _ = hangup.recv() => Exit::HungUp,
                };
                if how.set(now).is_err() {
                    // The second signal: the person who waits matters more than whatever is being
                    // cleaned up.
                    std::process::exit(i32::from(now.code()));
                }
                told.cancel();
            }
        });
        Ok(Self { token, exit, _listener: listener })
    }

    /// Whether a signal has arrived.
    fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits for a signal and returns the exit code for it.
    pub async fn requested(&self) -> Exit {
        self.token.cancelled().await;
        self.exit.get().copied().unwrap_or(Exit::Interrupted)
    }
}

/// A remark that a task or batch (`what`) is not affected by the end of this command, with the
/// command that shows it.
pub fn remark_still_running(output: Output, what: &str, command: &str) {
    let command = Paint::for_stderr().cyan(command);
    // From the start of the line, over the `^C` that a terminal has echoed.
    let start = if std::io::stderr().is_terminal() { "\r" } else { "" };
    output.remark(format_args!("{start}the {what} continues: {command}"));
}
