//! Configuration: as written (`RawConfig`, private), then as needed ([`Config`]).
//!
//! Layers, later ones win: defaults < file < `AMQP_URL` < `GARENNE__SECTION__KEY` < flags. Unknown keys
//! are refused, and all problems are reported together. This is the only place that reads the
//! environment. docs/configuration.md lists every key; a test holds the two together.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::bundling::Limits;
use crate::names::{Namespace, QueueName, TaskName};
use crate::reply_gate::{QueuePattern, ReplyGate, ReplyRule};
use crate::topology::Topology;
use crate::wire::Codec;

mod problem;
mod raw;
mod strict;
mod url;

pub use problem::{without_arguments, without_logins};
pub use url::BrokerUrl;

use raw::{RawConfig, Surroundings};

/// Everything a Garenne process may need to know, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// How to reach RabbitMQ.
    pub broker: BrokerConfig,
    /// For programs that submit.
    pub producer: ProducerConfig,
    /// For workers.
    pub worker: WorkerConfig,
    /// For collectors.
    pub collector: CollectorConfig,
    /// For all of them.
    pub log: LogConfig,
}

/// How to reach RabbitMQ, and how long to wait for it.
#[derive(Debug, Clone)]
pub struct BrokerConfig {
    /// Tried in turn until one answers.
    pub urls: Vec<BrokerUrl>,
    /// What all broker objects start with.
    pub namespace: Namespace,
    /// AMQP heartbeat: a silent connection is given up after two of them.
    pub heartbeat: Duration,
    /// For one attempt to connect to one URL.
    pub connect_timeout: Duration,
    /// From handing a message over to the broker's confirm.
    pub publish_timeout: Duration,
    /// Publishes under way at once, per process.
    pub publish_window: usize,
    /// The broker's own limit for an unacknowledged delivery (its `consumer_timeout`).
    pub consumer_timeout: Duration,
}

impl BrokerConfig {
    /// The names of this namespace.
    pub fn topology(&self) -> Topology {
        Topology::new(self.namespace.clone())
    }
}

/// For programs that submit.
#[derive(Debug, Clone)]
pub struct ProducerConfig {
    /// How typed tasks are encoded; dynamic ones are always JSON.
    pub codec: Codec,
    /// A batch that is not sealed by then ends as abandoned.
    pub batch_deadline: Duration,
    /// What bounds bundles of tasks that are submitted together.
    pub bundles: Limits,
}

/// For workers.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// How it signs its results; host and process id if not set.
    pub name: Option<String>,
    /// The queues it serves.
    pub queues: Vec<QueueName>,
    /// Maximum number of tasks that run at the same time.
    pub concurrency: usize,
    /// Maximum number of unacknowledged messages, over all queues; those beyond `concurrency` wait in
    /// the worker until a task ends.
    pub prefetch: usize,
    /// The limit for tasks that bring none.
    pub task_timeout: Duration,
    /// How long it may be silent before a task that it runs under a lease is given to another one.
    pub lease_term: Duration,
    /// How long a stopping worker lets tasks finish.
    pub grace: Duration,
    /// How long a cancelled task may take to end in its own way.
    pub cancel_grace: Duration,
    /// How long a starting worker waits for the collector's list of what is cancelled.
    pub cancel_sync_timeout: Duration,
    /// How often it says that it is alive.
    pub heartbeat: Duration,
    /// How long a command or an isolated attempt may take to end after it was told to.
    pub kill_grace: Duration,
    /// How often the process that runs a task may die before the task is given up.
    pub crash_budget: u32,
    /// No task is retried after this attempt, whatever its policy says.
    pub max_attempts: u32,
    /// The least pause after the tenth attempt and later ones.
    pub min_retry_delay: Duration,
    /// How long after the beginning of its first attempt a task may be retried.
    pub max_task_age: Duration,
    /// Whether `garenne.crash` is served, with which anybody who submits can kill this worker.
    pub faults: bool,
    /// Whether `garenne.*`, `text.*` and `file.*` are served.
    pub builtins: bool,
    /// The directory whose files the built-in tasks may read; without one they read none.
    pub file_root: Option<PathBuf>,
    /// The most bytes that the body of a task may have; larger ones are refused unread.
    pub max_body: usize,
    /// Queues that replies may go to, besides the reply queues of the namespace and those named by the
    /// server. Collectors apply it too.
    pub reply_queues: Vec<QueuePattern>,
    /// Command tasks by name.
    pub commands: BTreeMap<TaskName, CommandConfig>,
}

/// A task that is an external command.
#[derive(Clone)]
pub struct CommandConfig {
    /// Program and arguments; `{key}` stands for the task argument of that name.
    pub argv: Vec<String>,
    /// Whether the arguments go to its standard input as JSON.
    pub stdin: bool,
    /// How its standard output becomes the output.
    pub output: CommandOutput,
    /// More environment variables. The worker's own are not passed on; `PATH` is the usual one.
    pub env: BTreeMap<String, String>,
    /// Where it runs.
    pub directory: Option<PathBuf>,
}

/// Without the values of `env` and the arguments, which may be secrets.
impl fmt::Debug for CommandConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandConfig")
            .field("program", &self.argv.first())
            .field("env", &self.env.keys())
            .finish_non_exhaustive()
    }
}

/// How standard output becomes a task's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommandOutput {
    /// JSON if it parses as JSON, else a string without the last line break.
    #[default]
    Auto,
    /// It must be JSON.
    Json,
    /// A string, as it is.
    Text,
}

/// For collectors.
#[derive(Debug, Clone)]
pub struct CollectorConfig {
    /// How it signs itself; host and process id if not set.
    pub name: Option<String>,
    /// The SQLite file.
    pub store: PathBuf,
    /// How long ended tasks and batches are kept.
    pub retention: Duration,
    /// Whether tasks outside a batch get a done notice each.
    pub task_notices: bool,
    /// The most reports in one transaction.
    pub group_size: usize,
    /// How long a transaction waits for more reports while some are still coming.
    pub group_linger: Duration,
}

/// For all processes.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// What lines look like.
    pub format: LogFormat,
    /// Which lines appear.
    pub filter: String,
}

/// What log lines look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// Where configuration comes from, besides the environment.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// A TOML file.
    pub file: Option<PathBuf>,
    /// From flags: dotted key and value.
    pub overrides: Vec<(String, String)>,
}

impl Sources {
    /// With one more override, if there is a value.
    pub fn set(mut self, key: &str, value: Option<impl fmt::Display>) -> Self {
        self.overrides.extend(value.map(|value| (key.to_owned(), value.to_string())));
        self
    }
}

/// The configuration cannot be used; every problem is listed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the configuration cannot be used: {}", problems.join("; "))]
pub struct ConfigError {
    /// One sentence each.
    pub problems: Vec<String>,
}

impl Config {
    /// Reads all layers and checks the result.
    pub fn load(sources: &Sources) -> Result<Self, ConfigError> {
        RawConfig::read(sources, Surroundings::of_process()?)?.check()
    }

    /// [`load`](Self::load) with other defaults for some keys: dotted key and value. They lie below
    /// every other layer.
    pub fn load_over(defaults: &[(&str, &str)], sources: &Sources) -> Result<Self, ConfigError> {
        RawConfig::read_over(defaults, sources, Surroundings::of_process()?)?.check()
    }

    /// How a process signs: its configured name, else host and process id.
    pub fn identity(&self, name: Option<&str>) -> String {
        let host = || {
            hostname::get()
                .map_or_else(|_| "host".into(), |host| host.to_string_lossy().into_owned())
        };
        name.map_or_else(|| format!("{}:{}", host(), std::process::id()), str::to_owned)
    }

    /// What decides whether a reply may go to the queue that a message names.
    pub fn reply_gate(&self) -> ReplyGate {
        ReplyGate::new(ReplyRule::new(&self.broker.namespace, &self.worker.reply_queues))
    }

    /// The defaults with this broker URL and namespace: for tests, examples and embedding.
    pub fn with_broker(url: &str, namespace: &str) -> Result<Self, ConfigError> {
        let mut raw = RawConfig::default();
        url.clone_into(&mut raw.broker.url);
        namespace.clone_into(&mut raw.broker.namespace);
        raw.check()
    }
}

/// Set by a worker for its children that run isolated attempts.
pub const ISOLATED_ON: &str = "GARENNE_ISOLATED_ON";

/// The inode of the socket over which a worker gives orders to this process, or to one that this
/// process descends from; `is_isolated` tells which.
pub fn isolated_on() -> Option<u64> {
    std::env::var(ISOLATED_ON).ok()?.parse().ok()
}

/// Whether the user asked for no colours (<https://no-color.org>).
pub fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// Where the management UI of the broker is that `scripts/rabbitmq run` has started.
pub fn management_url() -> Option<String> {
    std::env::var("GARENNE_MANAGEMENT_URL").ok().filter(|url| !url.is_empty())
}

/// The process id of the broker that `scripts/rabbitmq run` has started.
pub fn broker_pid() -> Option<u32> {
    std::env::var("BROKER_PID").ok()?.parse().ok()
}

impl ConfigError {
    fn one(problem: &impl fmt::Display) -> Self {
        Self { problems: vec![problem.to_string()] }
    }
}
