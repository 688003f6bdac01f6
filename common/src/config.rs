//! Configuration: as written (`RawConfig`, private), then as needed ([`Config`]).
//!
//! Layers, later ones win: defaults < file < `AMQP_URL` < `GARENNE__SECTION__KEY` < flags. Unknown keys
//! are refused, and all problems are reported together. This is the only place that reads the
//! environment. docs/configuration.md lists every key; a test holds the two together.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use config::{Environment, File, FileFormat};
use serde::Deserialize;

use crate::names::{Namespace, QueueName, TaskName};
use crate::topology::Topology;
use crate::wire::Codec;

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

/// An AMQP URL whose password never shows.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUrl(url::Url);

/// For programs that submit.
#[derive(Debug, Clone)]
pub struct ProducerConfig {
    /// How typed tasks are encoded; dynamic ones are always JSON.
    pub codec: Codec,
    /// A batch that is not sealed by then ends as abandoned.
    pub batch_deadline: Duration,
}

/// For workers.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// How it signs its results; host and process id if not set.
    pub name: Option<String>,
    /// The queues it serves.
    pub queues: Vec<QueueName>,
    /// How many tasks run at once.
    pub slots: usize,
    /// How many deliveries may wait here beside the running ones.
    pub lookahead: usize,
    /// The limit for tasks that bring none.
    pub task_timeout: Duration,
    /// How long a stopping worker lets tasks finish.
    pub grace: Duration,
    /// Whether `garenne.*`, `text.*` and `file.*` are served.
    pub builtins: bool,
    /// Command tasks by name.
    pub commands: BTreeMap<TaskName, CommandConfig>,
}

/// A task that is an external command.
#[derive(Debug, Clone)]
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
        RawConfig::read(sources, Surroundings::of_process())?.check()
    }

    /// [`load`](Self::load) with other defaults for some keys: dotted key and value. They lie below
    /// every other layer.
    pub fn load_over(defaults: &[(&str, &str)], sources: &Sources) -> Result<Self, ConfigError> {
        RawConfig::read_over(defaults, sources, Surroundings::of_process())?.check()
    }

    /// How a process signs: its configured name, else host and process id.
    pub fn identity(&self, name: Option<&str>) -> String {
        let host = || {
            hostname::get()
                .map_or_else(|_| "host".into(), |host| host.to_string_lossy().into_owned())
        };
        name.map_or_else(|| format!("{}:{}", host(), std::process::id()), str::to_owned)
    }

    /// The defaults with this broker URL and namespace: for tests, examples and embedding.
    pub fn with_broker(url: &str, namespace: &str) -> Result<Self, ConfigError> {
        let mut raw = RawConfig::default();
        url.clone_into(&mut raw.broker.url);
        namespace.clone_into(&mut raw.broker.namespace);
        raw.check()
    }
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

/// The version of the broker that `scripts/rabbitmq run` has started.
pub fn broker_version() -> Option<String> {
    std::env::var("BROKER_VERSION").ok().filter(|version| !version.is_empty())
}

/// The value of the keys as written, with their defaults.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawConfig {
    broker: RawBroker,
    producer: RawProducer,
    worker: RawWorker,
    collector: RawCollector,
    log: RawLog,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawBroker {
    url: String,
    namespace: String,
    #[serde(with = "humantime_serde")]
    heartbeat: Duration,
    #[serde(with = "humantime_serde")]
    connect_timeout: Duration,
    #[serde(with = "humantime_serde")]
    publish_timeout: Duration,
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
}

impl Default for RawProducer {
    fn default() -> Self {
        Self { codec: Codec::Json, batch_deadline: Duration::from_hours(24) }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawWorker {
    name: Option<String>,
    queues: Vec<String>,
    slots: Option<usize>,
    lookahead: Option<usize>,
    #[serde(with = "humantime_serde")]
    task_timeout: Duration,
    #[serde(with = "humantime_serde")]
    grace: Duration,
    builtins: bool,
    commands: BTreeMap<String, RawCommand>,
}

impl Default for RawWorker {
    fn default() -> Self {
        Self {
            name: None,
            queues: vec![crate::names::DEFAULT_QUEUE.to_owned()],
            slots: None,
            lookahead: None,
            task_timeout: Duration::from_mins(20),
            grace: Duration::from_secs(30),
            builtins: true,
            commands: BTreeMap::new(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCommand {
    argv: Vec<String>,
    #[serde(default)]
    stdin: bool,
    #[serde(default)]
    output: CommandOutput,
    #[serde(default)]
    env: BTreeMap<String, String>,
    directory: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawCollector {
    name: Option<String>,
    store: PathBuf,
    #[serde(with = "humantime_serde")]
    retention: Duration,
    task_notices: bool,
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
    filter: String,
}

impl Default for RawLog {
    fn default() -> Self {
        Self { format: LogFormat::Human, filter: DEFAULT_FILTER.to_owned() }
    }
}

impl RawConfig {
    fn read(sources: &Sources, around: Surroundings) -> Result<Self, ConfigError> {
        Self::read_over(&[], sources, around)
    }

    fn read_over(
        defaults: &[(&str, &str)],
        sources: &Sources,
        around: Surroundings,
    ) -> Result<Self, ConfigError> {
        let mut builder = config::Config::builder();
        for (key, value) in defaults {
            builder =
                builder.set_default(*key, *value).map_err(|error| ConfigError::one(&error))?;
        }
        if let Some(file) = &sources.file {
            builder = builder.add_source(File::from(file.as_path()).format(FileFormat::Toml));
        }
        let all = builder
            .set_override_option("broker.url", around.amqp_url)
            .and_then(config::ConfigBuilder::<config::builder::DefaultState>::build)
            .map_err(|error| ConfigError::one(&error))?;
        // AMQP_URL must lie between file and environment, hence the two steps.
        let mut builder = config::Config::builder().add_source(all).add_source(
            around
                .environment
                .prefix("GARENNE")
                .prefix_separator("__")
                .separator("__")
                .list_separator(",")
                .with_list_parse_key("worker.queues")
                .try_parsing(true),
        );
        for (key, value) in &sources.overrides {
            let queues = key == "worker.queues";
            let value = if queues {
                config::Value::from(value.split(',').map(str::to_owned).collect::<Vec<_>>())
            } else {
                config::Value::from(value.as_str())
            };
            builder = builder.set_override(key, value).map_err(|error| ConfigError::one(&error))?;
        }
        let all = builder.build().map_err(|error| ConfigError::one(&error))?;
        all.try_deserialize().map_err(|error| ConfigError::one(&error))
    }

    fn check(self) -> Result<Config, ConfigError> {
        let mut problems = Problems::default();
        let config = Config {
            broker: self.broker.check(&mut problems),
            producer: ProducerConfig {
                codec: self.producer.codec,
                batch_deadline: self.producer.batch_deadline,
            },
            worker: self.worker.check(&mut problems),
            collector: self.collector.check(&mut problems),
            log: self.log.check(&mut problems),
        };
        if problems.0.is_empty() { Ok(config) } else { Err(ConfigError { problems: problems.0 }) }
    }
}

/// What the process was started with; tests bring their own.
struct Surroundings {
    environment: Environment,
    amqp_url: Option<String>,
}

impl Surroundings {
    fn of_process() -> Self {
        let amqp_url = std::env::var("AMQP_URL").ok().filter(|url| !url.is_empty());
        Self { environment: Environment::default(), amqp_url }
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
        problems.ensure(!self.url.trim().is_empty(), "broker.url: no URL is given");
        let fine = self.heartbeat >= Duration::from_secs(1);
        problems.ensure(fine, "broker.heartbeat: must be at least 1s");
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
        let slots = self.slots.unwrap_or_else(default_slots);
        let fine = (1..=10_000).contains(&slots);
        problems.ensure(fine, "worker.slots: must be between 1 and 10000");
        let lookahead = self.lookahead.unwrap_or(slots);
        problems.ensure(lookahead <= 50_000, "worker.lookahead: must be at most 50000");
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
            slots,
            lookahead,
            task_timeout: self.task_timeout,
            grace: self.grace,
            builtins: self.builtins,
            commands,
        }
    }
}

/// Tasks mostly wait (for disks, for other services), so a few per core keep the cores busy.
fn default_slots() -> usize {
    std::thread::available_parallelism().map_or(4, |cores| cores.get() * 4)
}

impl From<RawCommand> for CommandConfig {
    fn from(raw: RawCommand) -> Self {
        Self {
            argv: raw.argv,
            stdin: raw.stdin,
            output: raw.output,
            env: raw.env,
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

impl ConfigError {
    fn one(problem: &impl fmt::Display) -> Self {
        Self { problems: vec![problem.to_string()] }
    }
}

impl BrokerUrl {
    /// Checks an `amqp://` or `amqps://` URL.
    pub fn parse(text: &str) -> Result<Self, String> {
        let url = url::Url::parse(text).map_err(|error| {
            // The text may hold a password, so it is not repeated.
            format!("not a URL ({error}); expected amqp://user:password@host:5672/vhost")
        })?;
        if !["amqp", "amqps"].contains(&url.scheme()) {
            return Err(format!("the scheme is {:?}, expected amqp or amqps", url.scheme()));
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(
                "the host is missing; expected amqp://user:password@host:5672/vhost".to_owned()
            );
        }
        Ok(Self(url))
    }

    /// The URL with its password, for the client library alone.
    ///
    /// A URL without a path means the vhost `/`; lapin reads a lone slash as the vhost with an empty
    /// name, which hardly anybody has and everybody types, so that is mended here.
    pub fn expose(&self) -> String {
        let mut url = self.0.clone();
        if matches!(url.path(), "" | "/") {
            url.set_path("/%2f");
        }
        url.to_string()
    }

    /// The user name, for messages.
    pub fn user(&self) -> &str {
        if self.0.username().is_empty() { "guest" } else { self.0.username() }
    }

    /// The vhost as written, for messages.
    pub fn vhost(&self) -> String {
        let path = self.0.path().trim_start_matches('/');
        if path.is_empty() { "/".to_owned() } else { path.replace("%2f", "/").replace("%2F", "/") }
    }
}

/// Without user name, password and query: what logs and messages show.
impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = if self.0.scheme() == "amqps" { 5671 } else { 5672 };
        let host = self.0.host_str().unwrap_or_default();
        write!(f, "{}://{host}:{}", self.0.scheme(), self.0.port().unwrap_or(port))?;
        f.write_str(self.0.path())
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn environment(pairs: &[(&str, &str)]) -> Surroundings {
        let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let environment = Environment::default().source(Some(pairs.collect()));
        Surroundings { environment, amqp_url: None }
    }

    fn file(text: &str) -> (tempfile::NamedTempFile, Sources) {
        let mut file = tempfile::Builder::new().suffix(".conf").tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let sources = Sources { file: Some(file.path().to_owned()), overrides: vec![] };
        (file, sources)
    }

    #[test]
    fn later_layers_win() {
        let (_file, sources) = file("[worker]\nslots = 3\ngrace = \"5s\"\nqueues = [\"a\"]\n");
        let sources = sources.set("worker.grace", Some("7s"));
        let env =
            environment(&[("GARENNE__WORKER__SLOTS", "9"), ("GARENNE__WORKER__QUEUES", "b,c")]);
        let config = RawConfig::read(&sources, env).unwrap().check().unwrap();
        assert_eq!(config.worker.slots, 9);
        assert_eq!(config.worker.grace, Duration::from_secs(7));
        let queues: Vec<_> = config.worker.queues.iter().map(QueueName::as_str).collect();
        assert_eq!(queues, ["b", "c"]);
    }

    #[test]
    fn other_defaults_lie_below_every_layer() {
        let (_file, sources) = file("[worker]\nslots = 3\n");
        let defaults = [("worker.slots", "9"), ("log.filter", "warn")];
        let raw = RawConfig::read_over(&defaults, &sources, environment(&[])).unwrap();
        let config = raw.check().unwrap();
        assert_eq!((config.worker.slots, config.log.filter.as_str()), (3, "warn"));
    }

    #[test]
    fn unknown_keys_are_refused_by_name() {
        let (_file, sources) = file("[worker]\nslotz = 3\n");
        let error = RawConfig::read(&sources, environment(&[])).unwrap_err();
        assert!(error.to_string().contains("slotz"), "{error}");
    }

    #[test]
    fn all_problems_come_together() {
        let text = "[broker]\nurl = \"http://x\"\nnamespace = \"a b\"\n[worker]\nslots = 0\n";
        let (_file, sources) = file(text);
        let raw = RawConfig::read(&sources, environment(&[])).unwrap();
        let problems = raw.check().unwrap_err().problems;
        assert_eq!(problems.len(), 3, "{problems:?}");
    }

    #[test]
    fn commands_come_from_the_file() {
        let text =
            "[worker.commands.\"image.resize\"]\nargv = [\"convert\", \"{src}\"]\nstdin = true\n";
        let (_file, sources) = file(text);
        let config = RawConfig::read(&sources, environment(&[])).unwrap().check().unwrap();
        let command = &config.worker.commands[&TaskName::new("image.resize").unwrap()];
        assert_eq!(command.argv, ["convert", "{src}"]);
        assert!(command.stdin);
    }

    #[test]
    fn passwords_never_show() {
        let url = BrokerUrl::parse("amqp://me:s3cret@host/v").unwrap();
        assert_eq!(format!("{url} {url:?}"), "amqp://host:5672/v amqp://host:5672/v");
        assert!(url.expose().contains("s3cret"));
        assert!(!BrokerUrl::parse("amqp//me:s3cret@host").unwrap_err().contains("s3cret"));
    }

    #[test]
    fn a_bare_host_means_the_default_vhost() {
        for url in ["amqp://host", "amqp://host/"] {
            assert!(BrokerUrl::parse(url).unwrap().expose().ends_with("/%2f"), "{url}");
        }
    }
}
