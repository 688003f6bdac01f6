//! A private Garenne for `demo`, `bench` and `verify`: the sibling binaries as real processes, in a namespace of
//! their own on the configured broker, with a directory of their own for store and logs.
//!
//! Nothing of it stays: [`Cluster::close`] ends the processes and deletes the broker objects. It never
//! touches another namespace and starts no broker (`scripts/rabbitmq` does that).

mod process;

use std::path::{Path, PathBuf};
use std::time::Duration;

use garenne_cli::context::Context;
use garenne_cli::error::CliError;
use garenne_common::broker::{Admin, BrokerError, Link};
use garenne_common::config::{BrokerUrl, Config};
use garenne_common::topology::Declaration;
use garenne_common::wire::Query;
use garenne_common::{Namespace, QueueName};
use garenne_producer::Producer;
use tempfile::TempDir;
use tokio::process::{ChildStdin, ChildStdout};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::TaskTracker;

pub(crate) use process::Process;
use process::{Pipes, Programs, Spawning};

/// The worker that people run.
pub(crate) const STOCK_WORKER: &str = "garenne-worker";
/// How long a process may take until it serves.
const READY_WITHIN: Duration = Duration::from_secs(20);
/// How long a stopping process may take until it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(3);

/// Processes, broker objects and files that belong to one run of a command.
pub(crate) struct Cluster {
    config: Config,
    /// What the processes get by their environment, beside what they always get.
    environment: Vec<(&'static str, String)>,
    programs: Programs,
    directory: TempDir,
    keeps_directory: bool,
    processes: Vec<Process>,
    declared: Vec<Declaration>,
    link: Link,
    voices: (mpsc::Sender<String>, mpsc::Receiver<String>),
    readers: TaskTracker,
}

/// A worker process to start.
#[derive(Debug, Clone)]
pub(crate) struct WorkerSpec {
    /// How it signs; also what the management UI shows.
    pub(crate) name: String,
    /// The queues it serves.
    pub(crate) queues: Vec<QueueName>,
    /// How many tasks run at once.
    pub(crate) concurrency: usize,
    /// How many more it fetches ahead.
    pub(crate) prefetch: usize,
}

impl Cluster {
    /// Finds the programs, connects and declares everything in a new namespace. `worker` is the program of
    /// its workers.
    pub(crate) async fn start(
        context: &Context,
        purpose: &str,
        worker: &str,
        queues: &[QueueName],
    ) -> Result<Self, CliError> {
        let programs = Programs::beside_this_one(worker)?;
        let directory = tempfile::Builder::new().prefix(&format!("garenne-{purpose}.")).tempdir();
        let directory = directory
            .map_err(|error| CliError::unusable(format!("no temporary directory: {error}")))?;
        let mut config = context.config.clone();
        let name = format!("garenne-{purpose}-{:08x}", fastrand::u32(..));
        config.broker.namespace = Namespace::new(&name)
            .map_err(|error| CliError::unusable(format!("cannot name a namespace: {error}")))?;
        let link = Link::new(&config.broker, &format!("garenne {purpose} admin"));
        link.open().await?;
        let declared = config.broker.topology().with_queues(queues);
        let cluster = Self {
            config,
            environment: vec![],
            programs,
            directory,
            keeps_directory: false,
            processes: vec![],
            declared,
            link,
            // As many lines as a pipe holds anyway; a worker waits when nobody reads.
            voices: mpsc::channel(64),
            readers: TaskTracker::new(),
        };
        match Admin::new(cluster.link.clone()).declare(&cluster.declared).await {
            Ok(()) => Ok(cluster),
            Err(error) => {
                cluster.close(context).await;
                Err(error.into())
            }
        }
    }

    /// The configuration with this cluster's namespace.
    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// The namespace.
    pub(crate) fn namespace(&self) -> &Namespace {
        &self.config.broker.namespace
    }

    /// The SQLite file of the collector.
    pub(crate) fn store(&self) -> PathBuf {
        self.directory.path().join("collector.sqlite3")
    }

    /// What every process started from now on gets by its environment.
    pub(crate) fn set(&mut self, key: &'static str, value: impl Into<String>) {
        self.environment.push((key, value.into()));
    }

    /// More broker objects that belong to this run.
    pub(crate) async fn declare(&mut self, more: &[Declaration]) -> Result<(), CliError> {
        self.declared.extend_from_slice(more);
        Ok(self.admin().declare(more).await?)
    }

    /// Operations on the broker's objects.
    pub(crate) fn admin(&self) -> Admin {
        Admin::new(self.link.clone())
    }

    /// The names of all queues of this run.
    pub(crate) fn queues(&self) -> Vec<String> {
        let queues = self.declared.iter().filter_map(|declared| match declared {
            Declaration::Queue { name, .. } => Some(name.clone()),
            Declaration::Exchange { .. } | Declaration::Binding { .. } => None,
        });
        queues.collect()
    }

    /// Starts a collector and waits until it answers.
    pub(crate) async fn start_collector(&mut self, producer: &Producer) -> Result<(), CliError> {
        self.spawn_collector("Collector")?;
        let asked = producer.query_within(Query::Totals, READY_WITHIN);
        tokio::select! {
            answer = asked => answer.map(drop).map_err(CliError::from),
            ended = self.ended("Collector") => Err(ended),
        }
    }

    /// Starts a collector and does not wait for it. All of them share one store.
    pub(crate) fn spawn_collector(&mut self, name: &str) -> Result<(), CliError> {
        self.processes.retain(|process| process.name != name);
        let mut spawning = self.spawning(name);
        spawning.argument("--name", name);
        // Through the environment, because that is the same for every program.
        spawning.environment("GARENNE__COLLECTOR__STORE", self.store());
        self.processes.push(spawning.start(&self.programs.collector, Pipes::None)?);
        Ok(())
    }

    /// Starts this very program with a command of its own, and gives its pipes.
    pub(crate) fn spawn_command(
        &mut self,
        name: &str,
        words: &[&str],
    ) -> Result<(ChildStdin, ChildStdout), CliError> {
        self.processes.retain(|process| process.name != name);
        let mut spawning = self.spawning(name);
        for word in words {
            spawning.word(word);
        }
        let mut process = spawning.start(&self.programs.garenne, Pipes::Both)?;
        let pipes = process.take_pipes();
        self.processes.push(process);
        pipes.ok_or_else(|| CliError::unusable(format!("the process {name} has no pipes")))
    }

    /// Starts a worker and does not wait for it. What it prints comes out of [`Self::next_line`].
    pub(crate) fn spawn_worker(&mut self, spec: &WorkerSpec) -> Result<(), CliError> {
        self.processes.retain(|process| process.name != spec.name);
        let mut spawning = self.spawning(&spec.name);
        let queues: Vec<_> = spec.queues.iter().map(QueueName::as_str).collect();
        spawning
            .argument("--name", &spec.name)
            .argument("--queues", &queues.join(","))
            .argument("--concurrency", &spec.concurrency.to_string())
            .argument("--prefetch", &spec.prefetch.to_string())
            // Whatever still runs when the command ends is not worth waiting for.
            .argument("--grace", "1s");
        let mut process = spawning.start(&self.programs.worker, Pipes::Heard)?;
        process.forward_lines(&self.readers, self.voices.0.clone());
        self.processes.push(process);
        Ok(())
    }

    /// Starts workers and waits until each of their queues has that many consumers more.
    pub(crate) async fn start_workers(&mut self, specs: &[WorkerSpec]) -> Result<(), CliError> {
        for spec in specs {
            self.spawn_worker(spec)?;
        }
        for queue in specs.iter().flat_map(|spec| &spec.queues) {
            let wanted = specs.iter().filter(|spec| spec.queues.contains(queue)).count();
            self.await_consumers(queue, u32::try_from(wanted).unwrap_or(u32::MAX)).await?;
        }
        Ok(())
    }

    /// The next line that a worker printed.
    pub(crate) async fn next_line(&mut self) -> String {
        // Never `None`: this struct holds a sender.
        self.voices.1.recv().await.unwrap_or_default()
    }

    /// All processes that were started and not stopped.
    pub(crate) fn processes(&mut self) -> &mut [Process] {
        &mut self.processes
    }

    /// Gives up a process that has ended.
    pub(crate) fn forget(&mut self, name: &str) {
        self.processes.retain(|process| process.name != name);
    }

    /// Where the logs of the processes are.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Leaves the directory where it is when everything else is gone.
    pub(crate) fn keep_directory(&mut self) {
        self.keeps_directory = true;
    }

    /// A process by its name.
    pub(crate) fn process(&mut self, name: &str) -> Option<&mut Process> {
        self.processes.iter_mut().find(|process| process.name == name)
    }

    /// The id of a running process by its name.
    pub(crate) fn process_id(&self, name: &str) -> Option<u32> {
        self.processes.iter().find(|process| process.name == name)?.id()
    }

    /// The ids of the running processes whose name `chosen` accepts.
    pub(crate) fn running(&self, chosen: impl Fn(&str) -> bool) -> Vec<u32> {
        let chosen = self.processes.iter().filter(|process| chosen(&process.name));
        chosen.filter_map(Process::id).collect()
    }

    /// SIGTERM, or SIGKILL for who does not react, to the processes whose name `chosen` accepts.
    pub(crate) async fn stop(&mut self, chosen: impl Fn(&str) -> bool) {
        let (stopping, staying): (Vec<_>, Vec<_>) =
            self.processes.drain(..).partition(|process| chosen(&process.name));
        self.processes = staying;
        let ends = stopping.into_iter().map(|process| process.end(STOP_WITHIN));
        futures_util::future::join_all(ends).await;
    }

    /// Drops what waits in the queue behind a short name.
    pub(crate) async fn purge(&self, queue: &QueueName) -> Result<(), BrokerError> {
        let name = self.config.broker.topology().task_queue(queue);
        Admin::new(self.link.clone()).purge(&name).await
    }

    /// Ends all processes, deletes the namespace's objects and the directory.
    pub(crate) async fn close(mut self, context: &Context) {
        // Workers first: a collector that is still there takes their last results.
        self.stop(|name| !name.starts_with("Collector")).await;
        self.stop(|_| true).await;
        self.readers.close();
        drop(self.voices);
        // Whatever a process has left behind may keep its output open for ever.
        if timeout(STOP_WITHIN, self.readers.wait()).await.is_err() {
            context.output.remark("a process that was started here has left another one behind");
        }
        let admin = Admin::new(self.link.clone());
        let mut failed = None;
        for declaration in &self.declared {
            if let Err(error) = admin.delete(declaration).await {
                failed = Some(error);
            }
        }
        self.link.close().await;
        if let Some(error) = failed {
            let namespace = &self.config.broker.namespace;
            context
                .output
                .remark(format_args!("not all of {namespace}.* could be deleted: {error}"));
        }
        if self.keeps_directory {
            // Asked for; nothing of ours refers to it any more.
            drop(self.directory.keep());
        } else if let Err(error) = self.directory.close() {
            context.output.remark(format_args!("a temporary directory stays: {error}"));
        }
    }

    async fn await_consumers(&mut self, queue: &QueueName, count: u32) -> Result<(), CliError> {
        let admin = Admin::new(self.link.clone());
        let name = self.config.broker.topology().task_queue(queue);
        let deadline = Instant::now() + READY_WITHIN;
        loop {
            let consumers = admin.queue_status(&name).await?.map_or(0, |queue| queue.consumers);
            if consumers >= count {
                return Ok(());
            }
            if let Some(ended) = self.processes.iter_mut().find_map(Process::complaint) {
                return Err(ended);
            }
            if Instant::now() > deadline {
                let what =
                    format!("{consumers} of {count} workers serve {name} after {READY_WITHIN:?}");
                return Err(CliError::unusable(what));
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until a process ends that should not, and says so.
    async fn ended(&mut self, name: &str) -> CliError {
        loop {
            let complaint = self.process(name).and_then(Process::complaint);
            match complaint {
                Some(error) => return error,
                None => sleep(Duration::from_millis(50)).await,
            }
        }
    }

    fn spawning(&self, name: &str) -> Spawning {
        let mut spawning = Spawning::new(name, self.directory.path());
        let urls: Vec<_> = self.config.broker.urls.iter().map(BrokerUrl::expose).collect();
        // Not as an argument: those can be read by every user of the machine.
        spawning.environment("GARENNE__BROKER__URL", urls.join(","));
        for (key, value) in &self.environment {
            spawning.environment(key, value);
        }
        spawning.argument("--namespace", self.namespace().as_str());
        spawning
    }
}
