//! One test's world: a namespace of its own on a broker, a directory, and the processes in it.
//!
//! Everything that it declared on the broker is deleted at the end, passed or failed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use garenne_common::broker::{Admin, Link};
use garenne_common::config::Config;
use garenne_common::{QueueName, TaskId};
use garenne_producer::Producer;
use garenne_worker::{Builder, Running};
use rusqlite::types::FromSql;
use rusqlite::{Connection, OpenFlags};
use tempfile::TempDir;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::process::{Ended, Process, binary, command, finish};
use super::{Amqp, SOON, Soon, broker};

/// A namespace is some 30 queues, and one broker serves all tests at once.
const AT_ONCE: usize = 4;

/// A namespace with its processes.
pub(crate) struct Warren {
    url: String,
    config: Config,
    directory: TempDir,
    /// Queues beside `default`, to delete at the end.
    queues: Mutex<Vec<QueueName>>,
    started: Mutex<usize>,
    _turn: SemaphorePermit<'static>,
}

impl Warren {
    /// On the broker that tests share.
    pub(crate) async fn new() -> Self {
        Self::on(broker::shared_url()).await
    }

    /// On this broker.
    pub(crate) async fn on(url: &str) -> Self {
        static TURNS: Semaphore = Semaphore::const_new(AT_ONCE);
        let turn = TURNS.acquire().await.expect("never closed");
        // The end of a UUIDv7 is random, its beginning the time.
        let id = TaskId::generate().to_string();
        let namespace = format!("test-{}", &id[id.len() - 12..]);
        let mut config = Config::with_broker(url, &namespace).expect("the broker's URL is valid");
        // Most tests have no collector to wait for.
        config.worker.cancel_sync_timeout = Duration::from_millis(300);
        Self {
            url: url.to_owned(),
            config,
            directory: TempDir::with_prefix("garenne-test-").expect("a directory can be made"),
            queues: Mutex::default(),
            started: Mutex::default(),
            _turn: turn,
        }
    }

    /// The configuration of a process in here; a test may change its copy.
    pub(crate) fn config(&self) -> Config {
        self.config.clone()
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// A path in the test's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file into the test's directory.
    pub(crate) fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).expect("the test's directory is writable");
        path
    }

    /// A producer in this process.
    pub(crate) async fn producer(&self) -> Producer {
        Producer::connect(&self.config)
            .soon("the producer connects")
            .await
            .expect("the broker is there")
    }

    /// Plain messages.
    pub(crate) async fn amqp(&self) -> Amqp {
        Amqp::connect(&self.config).await
    }

    /// A worker process, to be started.
    pub(crate) fn worker(&self) -> Service<'_> {
        self.service("garenne-worker")
            .set("worker.concurrency", 4)
            .set("worker.cancel_sync_timeout", "300ms")
    }

    /// The collector process, to be started. All of a test's collectors have the same store.
    pub(crate) fn collector(&self) -> Service<'_> {
        self.service("garenne-collector")
            .set("collector.store", self.path("store.sqlite3").display())
    }

    /// A worker and a collector, both at work.
    pub(crate) async fn crew(&self) -> (Process, Process) {
        tokio::join!(self.worker().start(), self.collector().start())
    }

    /// A worker in this process, at work.
    pub(crate) async fn work(&self, builder: Builder) -> Running {
        let worker = builder.build().expect("sound handlers");
        worker.start().soon("the worker starts").await.expect("the broker is there")
    }

    /// The first column of a query of the collector's store, read while the collector works.
    pub(crate) fn rows<T: FromSql>(&self, query: &str) -> Vec<T> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY;
        let store = Connection::open_with_flags(self.path("store.sqlite3"), flags);
        let store = store.expect("the collector has made its store");
        let mut query = store.prepare(query).expect("the schema is known");
        let rows = query.query_map([], |row| row.get(0)).expect("the store can be read");
        rows.collect::<Result<_, _>>().expect("values of that type")
    }

    /// Notes a queue that a test declares by other means, so that it is deleted too.
    pub(crate) fn has_queue(&self, name: &str) {
        let queue = QueueName::new(name).expect("tests name queues well");
        self.queues.lock().expect("nobody panics with it").push(queue);
    }

    fn service(&self, program: &'static str) -> Service<'_> {
        Service { warren: self, program, command: self.command(program) }.set("log.format", "json")
    }

    /// A program of this workspace that knows broker and namespace.
    pub(crate) fn command(&self, program: &str) -> Command {
        self.command_at(&binary(program))
    }

    /// Any program, told of broker and namespace.
    pub(crate) fn command_at(&self, program: &Path) -> Command {
        let mut command = command(program);
        let namespace = self.config.broker.namespace.as_str();
        command.env("AMQP_URL", &self.url).env("GARENNE__BROKER__NAMESPACE", namespace);
        command
    }

    /// Runs the `garenne` command to its end.
    pub(crate) async fn garenne(&self, arguments: &[&str]) -> Ended {
        self.garenne_reading("", arguments).await
    }

    /// Runs the `garenne` command with something on its standard input.
    pub(crate) async fn garenne_reading(&self, stdin: &str, arguments: &[&str]) -> Ended {
        let mut command = self.command("garenne");
        command.args(arguments);
        finish(command, stdin, SOON).await
    }

    /// Starts the `garenne` command and leaves it running.
    pub(crate) fn start_garenne(&self, arguments: &[&str]) -> Process {
        let mut command = self.command("garenne");
        command.args(arguments);
        self.start("garenne", command)
    }

    /// Starts a program and leaves it running.
    pub(crate) fn start(&self, program: &str, command: Command) -> Process {
        let mut started = self.started.lock().expect("nobody panics with it");
        *started += 1;
        let name = format!("{program}-{started}");
        Process::start(&name, command, &self.path(&name))
    }

    async fn delete_all(config: Config, queues: Vec<QueueName>) {
        let topology = config.broker.topology();
        let link = Link::new(&config.broker, "garenne-tests clean-up");
        let admin = Admin::new(link.clone());
        let extra = queues.iter().flat_map(|queue| topology.task_queue_declarations(queue));
        for declaration in topology.core().into_iter().chain(extra) {
            // A broker that a test has killed keeps its leftovers; it is the private one.
            if admin.delete(&declaration).await.is_err() {
                break;
            }
        }
        link.close().await;
    }
}

impl Drop for Warren {
    fn drop(&mut self) {
        let config = self.config.clone();
        let queues = std::mem::take(&mut *self.queues.lock().expect("nobody panics with it"));
        // A drop cannot await, and the test's own runtime is blocked by this very drop.
        let clean_up = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime starts").block_on(Self::delete_all(config, queues));
        });
        drop(clean_up.join());
    }
}

/// A worker or collector about to be started.
pub(crate) struct Service<'a> {
    warren: &'a Warren,
    program: &'static str,
    command: Command,
}

impl Service<'_> {
    /// A configuration key, dotted, by way of the environment.
    pub(crate) fn set(mut self, key: &str, value: impl std::fmt::Display) -> Self {
        let name = format!("GARENNE__{}", key.to_uppercase().replace('.', "__"));
        self.command.env(name, value.to_string());
        self
    }

    /// A flag or its value.
    pub(crate) fn arg(mut self, argument: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// The queues that a worker serves, by way of a flag.
    pub(crate) fn queues(self, list: &str) -> Self {
        list.split(',').for_each(|name| self.warren.has_queue(name));
        self.arg("--queues").arg(list)
    }

    /// A configuration file with this text.
    pub(crate) fn toml(self, text: &str) -> Self {
        let file = self.warren.file("config.toml", text);
        self.arg("--config").arg(file)
    }

    /// No file of it may grow beyond this: for its store as good as a full disk. Flags come before.
    /// Until [`Process::room`].
    pub(crate) fn files_up_to(self, kibibytes: u32) -> Self {
        self.by_shell(&format!("trap '' XFSZ; ulimit -S -f {}", kibibytes * 2))
    }

    /// It may have so many files open. Flags come before.
    pub(crate) fn files_open(self, count: u32) -> Self {
        self.by_shell(&format!("ulimit -S -n {count}"))
    }

    /// As process 1 of a namespace of its own, killed with the process that is started here. Flags come
    /// before.
    pub(crate) fn in_pid_namespace(self) -> Self {
        self.by_shell(
            r#"[ "$(id -u)" = 0 ] || user="--user --map-root-user"
            set -- unshare $user --pid --fork --kill-child --mount-proc "$0" "$@"
            exec "$@""#,
        )
    }

    /// Starts it from a shell that does this first.
    fn by_shell(self, first: &str) -> Self {
        let script = format!("{first}; exec \"$0\" \"$@\"");
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(script).arg(self.command.get_program());
        command.args(self.command.get_args()).env_clear();
        let set = self.command.get_envs().filter_map(|(name, value)| Some((name, value?)));
        command.envs(set);
        Self { command, ..self }
    }

    /// Another way to the broker.
    pub(crate) fn url(self, url: &str) -> Self {
        self.set("broker.url", url)
    }

    /// Starts it without waiting.
    pub(crate) fn spawn(self) -> Process {
        self.warren.start(self.program, self.command)
    }

    /// The command, for a test that starts it with standard streams of its own.
    pub(crate) fn into_command(self) -> Command {
        self.command
    }

    /// Starts it and waits until it is at work.
    pub(crate) async fn start(self) -> Process {
        let at_work = if self.program == "garenne-worker" { "ready" } else { "collecting" };
        let mut process = self.spawn();
        process.logged(&format!(r#""message":"{at_work}""#)).await;
        process
    }

    /// Runs it to its end, for starts that must fail.
    pub(crate) async fn fail(self, deadline: Duration) -> Ended {
        finish(self.command, "", deadline).await
    }
}
