//! Configuration as written: every key with its default, and the checks that make a [`Config`] of it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use config::{Environment, File, FileFormat, Source};
use serde::Deserialize;

use super::problem::{self, without_logins};
use super::strict::{self, Word};
use super::{
    BrokerConfig, BrokerUrl, CollectorConfig, CommandConfig, CommandOutput, Config, ConfigError,
    LogConfig, LogFormat, ProducerConfig, Sources, WorkerConfig,
};
use crate::bundling::Limits;
use crate::names::{Namespace, QueueName, TaskName};
use crate::reply_gate::QueuePattern;
use crate::topology::MAX_DELAY;
use crate::wire::bundle::MAX_TASKS;
use crate::wire::{Codec, MAX_BODY_BYTES, heartbeat};

/// The value of the keys as written, with their defaults.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawConfig {
    pub(super) broker: RawBroker,
    producer: RawProducer,
    worker: RawWorker,
    collector: RawCollector,
    log: RawLog,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawBroker {
    #[serde(deserialize_with = "strict::text")]
    pub(super) url: String,
    #[serde(deserialize_with = "strict::text")]
    pub(super) namespace: String,
    #[serde(with = "humantime_serde")]
    heartbeat: Duration,
    #[serde(with = "humantime_serde")]
    connect_timeout: Duration,
    #[serde(with = "humantime_serde")]
    publish_timeout: Duration,
    #[serde(deserialize_with = "strict::whole")]
    publish_window: usize,
    #[serde(with = "humantime_serde")]
    consumer_timeout: Duration,
}

impl Default for RawBroker {
    fn default() -> Self {
        Self {
            url: "amqp://guest:guest@127.0.0.1:5672/%2f".to_owned(),
            namespace: "garenne".to_owned(),
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            publish_timeout: Duration::from_secs(15),
            publish_window: 512,
            consumer_timeout: Duration::from_mins(30),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawProducer {
    codec: Codec,
    #[serde(with = "humantime_serde")]
    batch_deadline: Duration,
    #[serde(deserialize_with = "strict::whole")]
    bundle_tasks: usize,
    #[serde(with = "humantime_serde")]
    bundle_work: Duration,
}

impl Default for RawProducer {
    fn default() -> Self {
        Self {
            codec: Codec::Json,
            batch_deadline: Duration::from_hours(24),
            bundle_tasks: 500,
            bundle_work: Duration::from_millis(20),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawWorker {
    #[serde(deserialize_with = "strict::maybe_text")]
    name: Option<String>,
    #[serde(deserialize_with = "strict::list")]
    queues: Vec<String>,
    #[serde(deserialize_with = "strict::maybe_whole")]
    concurrency: Option<usize>,
    #[serde(deserialize_with = "strict::maybe_whole")]
    prefetch: Option<usize>,
    #[serde(with = "humantime_serde")]
    task_timeout: Duration,
    #[serde(with = "humantime_serde")]
    lease_term: Duration,
    #[serde(with = "humantime_serde")]
    grace: Duration,
    #[serde(with = "humantime_serde")]
    cancel_grace: Duration,
    #[serde(with = "humantime_serde")]
    cancel_sync_timeout: Duration,
    #[serde(with = "humantime_serde")]
    heartbeat: Duration,
    #[serde(with = "humantime_serde")]
    kill_grace: Duration,
    #[serde(deserialize_with = "strict::whole")]
    crash_budget: u32,
    #[serde(deserialize_with = "strict::whole")]
    max_attempts: u32,
    #[serde(with = "humantime_serde")]
    min_retry_delay: Duration,
    #[serde(with = "humantime_serde")]
    max_task_age: Duration,
    #[serde(deserialize_with = "strict::flag")]
    faults: bool,
    #[serde(deserialize_with = "strict::flag")]
    builtins: bool,
    #[serde(deserialize_with = "strict::maybe_text")]
    file_root: Option<PathBuf>,
    #[serde(deserialize_with = "strict::whole")]
    max_body: usize,
    #[serde(deserialize_with = "strict::list")]
    reply_queues: Vec<String>,
    commands: BTreeMap<String, RawCommand>,
}

impl Default for RawWorker {
    fn default() -> Self {
        Self {
            name: None,
            queues: vec![crate::names::DEFAULT_QUEUE.to_owned()],
            concurrency: None,
            prefetch: None,
            task_timeout: Duration::from_mins(20),
            lease_term: Duration::from_mins(1),
            grace: Duration::from_secs(30),
            cancel_grace: Duration::from_secs(5),
            cancel_sync_timeout: Duration::from_secs(3),
            heartbeat: Duration::from_secs(2),
            kill_grace: Duration::from_secs(5),
            crash_budget: 3,
            max_attempts: 1_000,
            min_retry_delay: Duration::from_secs(1),
            max_task_age: Duration::from_hours(7 * 24),
            faults: false,
            builtins: true,
            file_root: None,
            max_body: 1024 * 1024,
            reply_queues: vec![],
            commands: BTreeMap::new(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCommand {
    #[serde(deserialize_with = "strict::words")]
    argv: Vec<String>,
    #[serde(default, deserialize_with = "strict::flag")]
    stdin: bool,
    #[serde(default)]
    output: CommandOutput,
    #[serde(default)]
    env: BTreeMap<String, Word>,
    #[serde(default, deserialize_with = "strict::maybe_text")]
    directory: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawCollector {
    #[serde(deserialize_with = "strict::maybe_text")]
    name: Option<String>,
    #[serde(deserialize_with = "strict::text")]
    store: PathBuf,
    #[serde(with = "humantime_serde")]
    retention: Duration,
    #[serde(deserialize_with = "strict::flag")]
    task_notices: bool,
    #[serde(deserialize_with = "strict::whole")]
    group_size: usize,
    #[serde(with = "humantime_serde")]
    group_linger: Duration,
}

impl Default for RawCollector {
    fn default() -> Self {
        Self {
            name: None,
            store: PathBuf::from("garenne.sqlite3"),
            retention: Duration::from_hours(7 * 24),
            task_notices: true,
            group_size: 2_000,
            group_linger: Duration::from_millis(5),
        }
    }
}

/// lapin reports each lost connection several times over, in words of its own; ours say it once.
const DEFAULT_FILTER: &str = "info,lapin=off";

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawLog {
    format: LogFormat,
    #[serde(deserialize_with = "strict::text")]
    filter: String,
}

impl Default for RawLog {
    fn default() -> Self {
        Self { format: LogFormat::Human, filter: DEFAULT_FILTER.to_owned() }
    }
}

impl RawConfig {
    pub(super) fn read(sources: &Sources, around: Surroundings) -> Result<Self, ConfigError> {
        Self::read_over(&[], sources, around)
    }

    pub(super) fn read_over(
        defaults: &[(&str, &str)],
        sources: &Sources,
        around: Surroundings,
    ) -> Result<Self, ConfigError> {
        let mut builder = config::Config::builder();
        for (key, value) in defaults {
            builder = builder.set_default(*key, *value).map_err(|error| ConfigError::of(&error))?;
        }
        if let Some(file) = &sources.file {
            problem::check_file(file)?;
            let file = File::from(file.as_path()).format(FileFormat::Toml);
            builder = builder.add_source(layer(file)?);
        }
        let all = builder
            .set_override_option("broker.url", around.amqp_url)
            .and_then(config::ConfigBuilder::<config::builder::DefaultState>::build)
            .map_err(|error| ConfigError::of(&error))?;
        // AMQP_URL must lie between file and environment, hence the two steps.
        let environment =
            around.environment.prefix("GARENNE").prefix_separator("__").separator("__");
        let mut builder = config::Config::builder().add_source(all).add_source(layer(environment)?);
        for (key, value) in &sources.overrides {
            builder = builder
                .set_override(key, value.as_str())
                .map_err(|error| ConfigError::of(&error))?;
        }
        let all = builder.build().map_err(|error| ConfigError::of(&error))?;
        all.try_deserialize().map_err(|error| ConfigError::of(&error))
    }

    pub(super) fn check(self) -> Result<Config, ConfigError> {
        let mut problems = Problems::default();
        let config = Config {
            broker: self.broker.check(&mut problems),
            producer: self.producer.check(&mut problems),
            worker: self.worker.check(&mut problems),
            collector: self.collector.check(&mut problems),
            log: self.log.check(&mut problems),
        };
        // Names that are refused are quoted, and one may be a URL in the wrong place.
        let problems: Vec<_> = problems.0.iter().map(|text| without_logins(text)).collect();
        if problems.is_empty() { Ok(config) } else { Err(ConfigError { problems }) }
    }
}

/// A layer that is sound by itself. Where it has text instead of a table, a later layer would replace
/// the text silently, and what it says would be ignored.
fn layer(source: impl Source + Send + Sync + 'static) -> Result<config::Config, ConfigError> {
    let layer = config::Config::builder().add_source(source).build();
    let layer = layer.map_err(|error| ConfigError::of(&error))?;
    layer.clone().try_deserialize::<RawConfig>().map_err(|error| ConfigError::of(&error))?;
    Ok(layer)
}

/// What the process was started with; tests bring their own.
pub(super) struct Surroundings {
    environment: Environment,
    amqp_url: Option<String>,
}

impl Surroundings {
    pub(super) fn of_process() -> Result<Self, ConfigError> {
        // The library would quote the value.
        for (name, value) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.to_ascii_uppercase().starts_with("GARENNE__") {
                problem::text(&name, value)?;
            }
        }
        let amqp_url = std::env::var_os("AMQP_URL").filter(|url| !url.is_empty());
        let amqp_url = amqp_url.map(|url| problem::text("AMQP_URL", url)).transpose()?;
        Ok(Self { environment: Environment::default(), amqp_url })
    }
}

/// Problems found so far; each check notes its own and goes on with a stand-in value.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn note<T, E: fmt::Display>(&mut self, key: &str, result: Result<T, E>, instead: T) -> T {
        result.unwrap_or_else(|error| {
            self.0.push(format!("{key}: {error}"));
            instead
        })
    }

    fn ensure(&mut self, fine: bool, problem: &str) {
        if !fine {
            self.0.push(problem.to_owned());
        }
    }
}

impl RawBroker {
    fn check(self, problems: &mut Problems) -> BrokerConfig {
        let mut urls = vec![];
        for url in self.url.split(',').map(str::trim).filter(|url| !url.is_empty()) {
            match BrokerUrl::parse(url) {
                Ok(url) => urls.push(url),
                Err(problem) => problems.0.push(format!("broker.url: {problem}")),
            }
        }
        let given = self.url.split(',').any(|url| !url.trim().is_empty());
        problems.ensure(given, "broker.url: no URL is given");
        let fine = self.heartbeat >= Duration::from_secs(1);
        problems.ensure(fine, "broker.heartbeat: must be at least 1s");
        // With zero every task would need a lease.
        let fine = self.consumer_timeout >= Duration::from_secs(1);
        problems.ensure(fine, "broker.consumer_timeout: must be at least 1s");
        for (key, limit) in
            [("connect_timeout", self.connect_timeout), ("publish_timeout", self.publish_timeout)]
        {
            problems.ensure(!limit.is_zero(), &format!("broker.{key}: must be longer than 0s"));
        }
        let fine = (1..=65_535).contains(&self.publish_window);
        problems.ensure(fine, "broker.publish_window: must be between 1 and 65535");
        let namespace = Namespace::new(&self.namespace);
        let stand_in = QueueName::default();
        BrokerConfig {
            urls,
            namespace: match namespace {
                Ok(namespace) => namespace,
                Err(error) => {
                    problems.0.push(format!("broker.namespace: {error}"));
                    // Never used: a problem was noted. Queue names are valid namespaces.
                    Namespace::new(stand_in.as_str()).unwrap_or_else(|_| unreachable!())
                }
            },
            heartbeat: self.heartbeat,
            connect_timeout: self.connect_timeout,
            publish_timeout: self.publish_timeout,
            publish_window: self.publish_window,
            consumer_timeout: self.consumer_timeout,
        }
    }
}

impl RawProducer {
    fn check(self, problems: &mut Problems) -> ProducerConfig {
        let fine = (1..=MAX_TASKS).contains(&self.bundle_tasks);
        problems.ensure(fine, "producer.bundle_tasks: must be between 1 and 1000");
        let fine = self.bundle_work >= Duration::from_millis(1);
        problems.ensure(fine, "producer.bundle_work: must be at least 1ms");
        let fine = !self.batch_deadline.is_zero();
        problems.ensure(fine, "producer.batch_deadline: must be longer than 0s");
        ProducerConfig {
            codec: self.codec,
            batch_deadline: self.batch_deadline,
            bundles: Limits { tasks: self.bundle_tasks.max(1), work: self.bundle_work },
        }
    }
}

impl RawWorker {
    fn check(self, problems: &mut Problems) -> WorkerConfig {
        let mut queues = vec![];
        for name in self.queues.iter().map(|name| name.trim()).filter(|name| !name.is_empty()) {
            let queue = problems.note("worker.queues", QueueName::new(name), QueueName::default());
            if !queues.contains(&queue) {
                queues.push(queue);
            }
        }
        problems.ensure(!queues.is_empty(), "worker.queues: at least one queue is needed");
        let concurrency = self.concurrency.unwrap_or_else(default_concurrency);
        let fine = (1..=10_000).contains(&concurrency);
        problems.ensure(fine, "worker.concurrency: must be between 1 and 10000");
        let fine = (heartbeat::SHORTEST..=heartbeat::LONGEST).contains(&self.heartbeat);
        problems.ensure(fine, "worker.heartbeat: must be between 100ms and 1m");
        let prefetch = self.prefetch.unwrap_or(2 * concurrency);
        let fine = (concurrency..=60_000).contains(&prefetch);
        problems.ensure(fine, "worker.prefetch: must be between worker.concurrency and 60000");
        for (key, limit) in
            [("task_timeout", self.task_timeout), ("max_task_age", self.max_task_age)]
        {
            problems.ensure(!limit.is_zero(), &format!("worker.{key}: must be longer than 0s"));
        }
        let fine = self.lease_term >= Duration::from_secs(3);
        problems.ensure(fine, "worker.lease_term: must be at least 3s");
        let fine = (1..=100).contains(&self.crash_budget);
        problems.ensure(fine, "worker.crash_budget: must be between 1 and 100");
        problems.ensure(self.max_attempts >= 1, "worker.max_attempts: must be at least 1");
        let fine = self.min_retry_delay <= MAX_DELAY;
        problems.ensure(fine, "worker.min_retry_delay: must be at most 38 days");
        let file_root = self.file_root.filter(|root| !root.as_os_str().is_empty());
        let fine = file_root.as_ref().is_none_or(|root| root.is_absolute());
        problems.ensure(fine, "worker.file_root: must be an absolute path");
        let fine = (1024..=MAX_BODY_BYTES).contains(&self.max_body);
        problems.ensure(fine, "worker.max_body: must be between 1024 and 16777216 bytes");
        let reply_queues = reply_queues(&self.reply_queues, problems);
        let mut commands = BTreeMap::new();
        for (name, command) in self.commands {
            let key = format!("worker.commands.{name:?}");
            problems.ensure(!command.argv.is_empty(), &format!("{key}.argv: is empty"));
            match TaskName::new(&name) {
                Ok(name) => drop(commands.insert(name, command.into())),
                Err(error) => problems.0.push(format!("{key}: {error}")),
            }
        }
        WorkerConfig {
            name: self.name.filter(|name| !name.is_empty()),
            queues,
            concurrency,
            prefetch,
            task_timeout: self.task_timeout,
            lease_term: self.lease_term,
            grace: self.grace,
            cancel_grace: self.cancel_grace,
            cancel_sync_timeout: self.cancel_sync_timeout,
            heartbeat: self.heartbeat,
            kill_grace: self.kill_grace,
            crash_budget: self.crash_budget,
            max_attempts: self.max_attempts,
            min_retry_delay: self.min_retry_delay,
            max_task_age: self.max_task_age,
            faults: self.faults,
            builtins: self.builtins,
            file_root,
            max_body: self.max_body,
            reply_queues,
            commands,
        }
    }
}

fn reply_queues(patterns: &[String], problems: &mut Problems) -> Vec<QueuePattern> {
    let patterns =
        patterns.iter().map(|pattern| pattern.trim()).filter(|pattern| !pattern.is_empty());
    let mut parsed = vec![];
    for pattern in patterns.map(QueuePattern::parse) {
        match pattern {
            Ok(pattern) => parsed.push(pattern),
            Err(error) => problems.0.push(format!("worker.reply_queues: {error}")),
        }
    }
    parsed
}

/// Tasks mostly wait (for disks, for other services), so a few per core keep the cores busy.
fn default_concurrency() -> usize {
    std::thread::available_parallelism().map_or(4, |cores| cores.get() * 4)
}

impl From<RawCommand> for CommandConfig {
    fn from(raw: RawCommand) -> Self {
        Self {
            argv: raw.argv,
            stdin: raw.stdin,
            output: raw.output,
            env: raw.env.into_iter().map(|(name, Word(value))| (name, value)).collect(),
            directory: raw.directory,
        }
    }
}

impl RawCollector {
    fn check(self, problems: &mut Problems) -> CollectorConfig {
        let fine = (1..=60_000).contains(&self.group_size);
        problems.ensure(fine, "collector.group_size: must be between 1 and 60000");
        let fine = !self.store.as_os_str().is_empty();
        problems.ensure(fine, "collector.store: no file is given");
        let fine = !self.retention.is_zero();
        problems.ensure(fine, "collector.retention: must be longer than 0s");
        CollectorConfig {
            name: self.name.filter(|name| !name.is_empty()),
            store: self.store,
            retention: self.retention,
            task_notices: self.task_notices,
            group_size: self.group_size,
            group_linger: self.group_linger,
        }
    }
}

impl RawLog {
    fn check(self, problems: &mut Problems) -> LogConfig {
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&self.filter) {
            problems.0.push(format!("log.filter: {error}"));
        }
        LogConfig { format: self.format, filter: self.filter }
    }
}

#[cfg(test)]
mod tests;
