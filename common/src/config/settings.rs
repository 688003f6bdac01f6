//! The validated configuration: what a process needs, in the types that it uses.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::url::BrokerUrl;
use crate::bundling::Limits;
use crate::names::{Namespace, QueueName, TaskName};
use crate::reply_gate::{QueuePattern, ReplyGate, ReplyRule};
use crate::topology::Topology;
use crate::wire::Codec;

/// The validated configuration of a Garenne process.
#[derive(Debug, Clone)]
pub struct Config {
    /// The section `broker`.
    pub broker: BrokerConfig,
    /// The section `producer`.
    pub producer: ProducerConfig,
    /// The section `worker`.
    pub worker: WorkerConfig,
    /// The section `collector`.
    pub collector: CollectorConfig,
    /// The section `log`.
    pub log: LogConfig,
}

/// The connection to RabbitMQ, and its timeouts.
#[derive(Debug, Clone)]
pub struct BrokerConfig {
    /// The URLs, tried in turn until a connection succeeds.
    pub urls: Vec<BrokerUrl>,
    /// The prefix of all broker objects.
    pub namespace: Namespace,
    /// AMQP heartbeat interval. A connection without traffic for two intervals is closed.
    pub heartbeat: Duration,
    /// Longest time for one attempt to connect to one URL.
    pub connect_timeout: Duration,
    /// Longest time from submitting a message to the broker's confirm.
    pub publish_timeout: Duration,
    /// Most unconfirmed messages of the process.
    pub publish_window: usize,
    /// The broker's `consumer_timeout`, its limit for unacknowledged deliveries.
    pub consumer_timeout: Duration,
}

impl BrokerConfig {
    /// The broker objects of the namespace.
    pub fn topology(&self) -> Topology {
        Topology::new(self.namespace.clone())
    }
}

/// Settings of producers.
#[derive(Debug, Clone)]
pub struct ProducerConfig {
    /// The codec of typed tasks; dynamic tasks are always JSON.
    pub codec: Codec,
    /// How long after its opening an unsealed batch ends as abandoned.
    pub batch_deadline: Duration,
    /// The limits of a bundle of tasks.
    pub bundles: Limits,
}

/// Settings of workers.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// The name of the worker in its results; host and process id if `None`.
    pub name: Option<String>,
    /// The queues that the worker serves.
    pub queues: Vec<QueueName>,
    /// Maximum number of tasks that run at the same time.
    pub concurrency: usize,
    /// Maximum number of unacknowledged messages, over all queues; those beyond `concurrency` wait
    /// in the worker until a task ends.
    pub prefetch: usize,
    /// Time limit of an attempt, for tasks without one of their own.
    pub task_timeout: Duration,
    /// How long after the last renewal a lease lapses, and its task is given to another worker.
    pub lease_term: Duration,
    /// How long a stopping worker waits for running tasks.
    pub grace: Duration,
    /// How long a cancelled attempt may continue before it is stopped.
    pub cancel_grace: Duration,
    /// How long a starting worker waits for the collector's list of cancel requests.
    pub cancel_sync_timeout: Duration,
    /// Interval of the worker's heartbeats.
    pub heartbeat: Duration,
    /// How long a command or an isolated attempt may continue after it is asked to stop.
    pub kill_grace: Duration,
    /// How often the process that runs a task may die before the task is given up.
    pub crash_budget: u32,
    /// Most attempts of any task, whatever its policy.
    pub max_attempts: u32,
    /// Shortest delay after the tenth and later attempts.
    pub min_retry_delay: Duration,
    /// How long after the start of its first attempt a task may be retried.
    pub max_task_age: Duration,
    /// Whether the worker serves `garenne.crash`, by which any producer can kill it.
    pub faults: bool,
    /// Whether the worker serves the built-in tasks `garenne.*`, `text.*` and `file.*`.
    pub builtins: bool,
    /// The directory whose files the built-in tasks may read; none if `None`.
    pub file_root: Option<PathBuf>,
    /// Largest body of a task in bytes. Larger ones are refused before they are parsed.
    pub max_body: usize,
    /// Queues that may receive replies, in addition to the reply queues of the namespace and queues
    /// named by the server. Collectors apply it too.
    pub reply_queues: Vec<QueuePattern>,
    /// Command tasks by name.
    pub commands: BTreeMap<TaskName, CommandConfig>,
}

/// A task whose handler is an external command.
#[derive(Clone)]
pub struct CommandConfig {
    /// Program and arguments; `{key}` is replaced by the task argument of that name.
    pub argv: Vec<String>,
    /// Whether the command receives the arguments as JSON on its standard input.
    pub stdin: bool,
    /// How its standard output is converted to the output of the task.
    pub output: CommandOutput,
    /// Environment variables of the command. It does not inherit those of the worker; `PATH` has
    /// the usual default.
    pub env: BTreeMap<String, String>,
    /// The working directory; that of the worker if `None`.
    pub directory: Option<PathBuf>,
}

/// Omits the arguments and the values of `env`, which may be secrets.
impl fmt::Debug for CommandConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommandConfig")
            .field("program", &self.argv.first())
            .field("env", &self.env.keys())
            .finish_non_exhaustive()
    }
}

/// How the standard output of a command is converted to the output of its task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CommandOutput {
    /// JSON if it is valid JSON, otherwise a string without the last line break.
    #[default]
    Auto,
    /// JSON; anything else is an error.
    Json,
    /// A string, unchanged.
    Text,
}

/// Settings of collectors.
#[derive(Debug, Clone)]
pub struct CollectorConfig {
    /// The name of the collector; host and process id if `None`.
    pub name: Option<String>,
    /// Path of the SQLite file.
    pub store: PathBuf,
    /// How long the records of ended tasks and batches are kept.
    pub retention: Duration,
    /// Whether a done notice is published for every task outside a batch.
    pub task_notices: bool,
    /// Most reports in one transaction.
    pub group_size: usize,
    /// How long a transaction waits for more reports while reports are arriving.
    pub group_linger: Duration,
}

/// Settings of logging, for all processes.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// The format of log lines.
    pub format: LogFormat,
    /// Which events are logged, in tracing's directive syntax.
    pub filter: String,
}

/// The format of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Text for people.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
}

impl Config {
    /// The name of the process in results and heartbeats: `name`, or host and process id.
    pub fn identity(&self, name: Option<&str>) -> String {
        let host = || {
            hostname::get()
                .map_or_else(|_| "host".into(), |host| host.to_string_lossy().into_owned())
        };
        name.map_or_else(|| format!("{}:{}", host(), std::process::id()), str::to_owned)
    }

    /// The gate that decides whether a reply may be published to the queue that a message names.
    pub fn reply_gate(&self) -> ReplyGate {
        ReplyGate::new(ReplyRule::new(&self.broker.namespace, &self.worker.reply_queues))
    }
}
