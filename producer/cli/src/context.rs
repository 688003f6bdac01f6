//! What every command gets: checked configuration, output, the deadline and the stop signal.

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

use super::error::{CliError, Exit};
use super::globals::Globals;
use super::output::{Output, Paint};
use super::screen::Screen;

/// A command speaks for itself; log lines are for when something is odd. lapin calls every refusal an
/// error, which our own sentence explains better; why a message could not be published, the command
/// itself says in one sentence.
pub const FILTER: &str = "warn,garenne_common::broker::publisher=error,lapin=off";

/// How long taking leave of the broker may take.
const CLOSE: Duration = Duration::from_secs(5);

/// What every command gets.
pub struct Context {
    /// All settings; `--deadline` is in its broker timeouts already.
    pub config: Config,
    /// Where results go.
    pub output: Output,
    /// Where log lines go; whoever draws a bar shares it.
    pub screen: Screen,
    /// How long one step may take.
    pub deadline: Duration,
    /// Ctrl-C, SIGTERM and SIGHUP.
    pub stop: Stop,
}

impl Context {
    /// Loads the configuration, starts logging and listening to signals. `filter` says which lines
    /// appear unless the user says otherwise.
    pub fn new(globals: &Globals, filter: &str) -> Result<Self, CliError> {
        let config = load(globals, filter)?;
        let (screen, output) = (Screen::default(), Output { format: globals.output });
        let lines = screen.clone();
        telemetry::init_to(&config.log, move || lines.writer());
        Ok(Self { config, output, screen, deadline: globals.deadline, stop: Stop::listen()? })
    }

    /// Connects; the management UI shows the connection as `garenne <command>`.
    pub async fn producer(&self, command: &str) -> Result<Producer, CliError> {
        self.producer_with(&self.config, command).await
    }

    /// [`producer`](Self::producer) with other settings than those of the user.
    pub async fn producer_with(
        &self,
        config: &Config,
        command: &str,
    ) -> Result<Producer, CliError> {
        let name = format!("garenne {command}");
        let connecting = Producer::connect_as(config, &name);
        match tokio::time::timeout(self.deadline, connecting).await {
            Ok(producer) => Ok(producer?),
            Err(_) => Err(self.unreachable().into()),
        }
    }

    /// Takes leave of the broker, unless something failed: what is unconfirmed then will hardly be
    /// confirmed now, and a person waits.
    pub async fn close<T>(&self, producer: Producer, done: &Result<T, CliError>) {
        if done.is_ok() {
            let limit = if self.stop.is_requested() { Duration::from_secs(1) } else { CLOSE };
            // Past the limit the process ends, and with it the connection.
            tokio::time::timeout(limit, producer.close()).await.unwrap_or_default();
        }
    }

    /// Puts a question to the collector and waits for the answer, at most the deadline.
    pub async fn ask(&self, producer: &Producer, question: Query) -> Result<Response, CliError> {
        Ok(producer.ask_within(question, self.deadline).await?)
    }

    /// What to say when the broker did not answer in time.
    pub fn unreachable(&self) -> BrokerError {
        let urls = self.config.broker.urls.iter().map(ToString::to_string);
        BrokerError::Unreachable {
            url: urls.collect::<Vec<_>>().join(" or "),
            cause: format!("no answer within {:?}", self.deadline),
        }
    }

    /// The command, unless a signal ends it first; for commands that leave nothing half done.
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

/// The wish to stop: Ctrl-C, SIGTERM or SIGHUP (a terminal that closes). The second one ends the process at once.
#[derive(Clone)]
pub struct Stop {
    token: CancellationToken,
    exit: Arc<OnceLock<Exit>>,
    /// Owns the listening task; it lives as long as the process.
    _listener: TaskTracker,
}

impl Stop {
    fn listen() -> Result<Self, CliError> {
        let failed = |error| CliError::unusable(format!("cannot listen to signals: {error}"));
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
                    // Asked twice: whatever is being cleaned up matters less than the person waiting.
                    std::process::exit(i32::from(now.code()));
                }
                told.cancel();
            }
        });
        Ok(Self { token, exit, _listener: listener })
    }

    /// Whether there is one.
    fn is_requested(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Waits for the wish to stop, and says how to exit then.
    pub async fn requested(&self) -> Exit {
        self.token.cancelled().await;
        self.exit.get().copied().unwrap_or(Exit::Interrupted)
    }
}

/// A note on standard error that work goes on elsewhere, and how to look at it.
pub fn goes_on(output: Output, what: &str, command: &str) {
    let command = Paint::for_stderr().cyan(command);
    // To the start of the line, over the `^C` that a terminal has echoed.
    let start = if std::io::stderr().is_terminal() { "\r" } else { "" };
    output.remark(format_args!("{start}the {what} goes on: {command}"));
}
