//! Validates the raw configuration. All problems are reported together, in sentences that quote no
//! value that may be a secret.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::problem::{ConfigError, without_logins};
use super::raw::{RawBroker, RawCollector, RawCommand, RawConfig, RawLog, RawProducer, RawWorker};
use super::settings::{
    BrokerConfig, CollectorConfig, CommandConfig, Config, LogConfig, ProducerConfig, WorkerConfig,
};
use super::strict::Word;
use super::url::BrokerUrl;
use crate::bundling::Limits;
use crate::names::{Namespace, QueueName, TaskName};
use crate::reply_gate::QueuePattern;
use crate::topology::MAX_DELAY;
use crate::wire::bundle::MAX_TASKS;
use crate::wire::{MAX_BODY_BYTES, heartbeat};

impl RawConfig {
    pub(super) fn check(self) -> Result<Config, ConfigError> {
        let mut problems = Problems::default();
        let config = Config {
            broker: self.broker.check(&mut problems),
            producer: self.producer.check(&mut problems),
            worker: self.worker.check(&mut problems),
            collector: self.collector.check(&mut problems),
            log: self.log.check(&mut problems),
        };
        // Problems quote refused names, and one may be a URL in the wrong place.
        let problems: Vec<_> = problems.0.iter().map(|text| without_logins(text)).collect();
        if problems.is_empty() { Ok(config) } else { Err(ConfigError { problems }) }
    }
}

/// The problems found so far. A check that fails adds one, and goes on with a substitute value.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    /// The value of a result, or `substitute` and a problem.
    fn note<T, E: fmt::Display>(&mut self, key: &str, result: Result<T, E>, substitute: T) -> T {
        result.unwrap_or_else(|error| {
            self.0.push(format!("{key}: {error}"));
            substitute
        })
    }

    /// Adds a problem unless `valid`.
    fn ensure(&mut self, valid: bool, problem: &str) {
        if !valid {
            self.0.push(problem.to_owned());
        }
    }

    /// Refuses zero for a limit, with which nothing could be done in time.
    fn ensure_positive(&mut self, key: &str, limit: Duration) {
        self.ensure(!limit.is_zero(), &format!("{key}: must be longer than 0s"));
    }
}

/// The items of a list that are not blank, without the space around them.
fn items<'a>(list: impl Iterator<Item = &'a str>) -> impl Iterator<Item = &'a str> {
    list.map(str::trim).filter(|item| !item.is_empty())
}

impl RawBroker {
    fn check(self, problems: &mut Problems) -> BrokerConfig {
        let urls = self.check_urls(problems);
        // AMQP has whole seconds, 16 bits of them. Zero would disable heartbeats, which lapin cannot do.
        let valid = (Duration::from_secs(1)..=Duration::from_secs(65_535))
            .contains(&self.heartbeat)
            && self.heartbeat.subsec_nanos() == 0;
        problems.ensure(
            valid,
            "broker.heartbeat: must be whole seconds from 1s to 65535s; they cannot be disabled",
        );
        // With zero every task would need a lease.
        let valid = self.consumer_timeout >= Duration::from_secs(1);
        problems.ensure(valid, "broker.consumer_timeout: must be at least 1s");
        problems.ensure_positive("broker.connect_timeout", self.connect_timeout);
        problems.ensure_positive("broker.publish_timeout", self.publish_timeout);
        let valid = (1..=65_535).contains(&self.publish_window);
        problems.ensure(valid, "broker.publish_window: must be between 1 and 65535");
        BrokerConfig {
            urls,
            namespace: self.check_namespace(problems),
            heartbeat: self.heartbeat,
            connect_timeout: self.connect_timeout,
            publish_timeout: self.publish_timeout,
            publish_window: self.publish_window,
            consumer_timeout: self.consumer_timeout,
        }
    }

    fn check_urls(&self, problems: &mut Problems) -> Vec<BrokerUrl> {
        let mut urls = vec![];
        for url in items(self.url.split(',')) {
            match BrokerUrl::parse(url) {
                Ok(url) => urls.push(url),
                Err(problem) => problems.0.push(format!("broker.url: {problem}")),
            }
        }
        let given = items(self.url.split(',')).next().is_some();
        problems.ensure(given, "broker.url: no URL is given");
        urls
    }

    fn check_namespace(&self, problems: &mut Problems) -> Namespace {
        match Namespace::new(&self.namespace) {
            Ok(namespace) => namespace,
            Err(error) => {
                problems.0.push(format!("broker.namespace: {error}"));
                // Never used, since there is a problem. Queue names are valid namespaces.
                let substitute = QueueName::default();
                Namespace::new(substitute.as_str()).unwrap_or_else(|_| unreachable!())
            }
        }
    }
}

impl RawProducer {
    fn check(self, problems: &mut Problems) -> ProducerConfig {
        let valid = (1..=MAX_TASKS).contains(&self.bundle_tasks);
        problems.ensure(valid, "producer.bundle_tasks: must be between 1 and 1000");
        let valid = self.bundle_work >= Duration::from_millis(1);
        problems.ensure(valid, "producer.bundle_work: must be at least 1ms");
        problems.ensure_positive("producer.batch_deadline", self.batch_deadline);
        ProducerConfig {
            codec: self.codec,
            batch_deadline: self.batch_deadline,
            bundles: Limits { tasks: self.bundle_tasks.max(1), work: self.bundle_work },
        }
    }
}

impl RawWorker {
    fn check(self, problems: &mut Problems) -> WorkerConfig {
        let queues = self.check_queues(problems);
        let (concurrency, prefetch) = self.check_concurrency(problems);
        self.check_times(problems);
        self.check_limits(problems);
        let file_root = self.file_root.filter(|root| !root.as_os_str().is_empty());
        let valid = file_root.as_ref().is_none_or(|root| root.is_absolute());
        problems.ensure(valid, "worker.file_root: must be an absolute path");
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
            reply_queues: check_reply_queues(&self.reply_queues, problems),
            commands: check_commands(self.commands, problems),
        }
    }

    fn check_queues(&self, problems: &mut Problems) -> Vec<QueueName> {
        let mut queues = vec![];
        for name in items(self.queues.iter().map(String::as_str)) {
            let queue = problems.note("worker.queues", QueueName::new(name), QueueName::default());
            if !queues.contains(&queue) {
                queues.push(queue);
            }
        }
        problems.ensure(!queues.is_empty(), "worker.queues: at least one queue is needed");
        queues
    }

    /// The concurrency, and the prefetch over all queues.
    fn check_concurrency(&self, problems: &mut Problems) -> (usize, usize) {
        let concurrency = self.concurrency.unwrap_or_else(default_concurrency);
        let valid = (1..=10_000).contains(&concurrency);
        problems.ensure(valid, "worker.concurrency: must be between 1 and 10000");
        let prefetch = self.prefetch.unwrap_or(2 * concurrency);
        let valid = (concurrency..=60_000).contains(&prefetch);
        problems.ensure(valid, "worker.prefetch: must be between worker.concurrency and 60000");
        (concurrency, prefetch)
    }

    fn check_times(&self, problems: &mut Problems) {
        let valid = (heartbeat::SHORTEST..=heartbeat::LONGEST).contains(&self.heartbeat);
        problems.ensure(valid, "worker.heartbeat: must be between 100ms and 1m");
        problems.ensure_positive("worker.task_timeout", self.task_timeout);
        problems.ensure_positive("worker.max_task_age", self.max_task_age);
        let valid = self.lease_term >= Duration::from_secs(3);
        problems.ensure(valid, "worker.lease_term: must be at least 3s");
        let valid = self.min_retry_delay <= MAX_DELAY;
        problems.ensure(valid, "worker.min_retry_delay: must be at most 38 days");
    }

    fn check_limits(&self, problems: &mut Problems) {
        let valid = (1..=100).contains(&self.crash_budget);
        problems.ensure(valid, "worker.crash_budget: must be between 1 and 100");
        problems.ensure(self.max_attempts >= 1, "worker.max_attempts: must be at least 1");
        let valid = (1024..=MAX_BODY_BYTES).contains(&self.max_body);
        problems.ensure(valid, "worker.max_body: must be between 1024 and 16777216 bytes");
    }
}

fn check_reply_queues(patterns: &[String], problems: &mut Problems) -> Vec<QueuePattern> {
    let mut parsed = vec![];
    for pattern in items(patterns.iter().map(String::as_str)) {
        match QueuePattern::parse(pattern) {
            Ok(pattern) => parsed.push(pattern),
            Err(error) => problems.0.push(format!("worker.reply_queues: {error}")),
        }
    }
    parsed
}

fn check_commands(
    raw: BTreeMap<String, RawCommand>,
    problems: &mut Problems,
) -> BTreeMap<TaskName, CommandConfig> {
    let mut commands = BTreeMap::new();
    for (name, command) in raw {
        let key = format!("worker.commands.{name:?}");
        problems.ensure(!command.argv.is_empty(), &format!("{key}.argv: is empty"));
        match TaskName::new(&name) {
            Ok(name) => drop(commands.insert(name, command.into())),
            Err(error) => problems.0.push(format!("{key}: {error}")),
        }
    }
    commands
}

/// Four tasks per core, since most tasks wait for disks or other services.
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
        let valid = (1..=60_000).contains(&self.group_size);
        problems.ensure(valid, "collector.group_size: must be between 1 and 60000");
        let valid = !self.store.as_os_str().is_empty();
        problems.ensure(valid, "collector.store: no file is given");
        problems.ensure_positive("collector.retention", self.retention);
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
