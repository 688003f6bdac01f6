//! One sibling binary as a child process: found, started, listened to, ended.
//!
//! Children stay in this process's group on purpose: a second Ctrl-C ends this process at once, and
//! then the terminal's signal ends them. Whatever else ends this process, they are told by the kernel
//! (`--die-with`), which watches the thread that starts them: so that is done on the main thread.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use garenne_cli::error::CliError;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

/// Where the sibling binaries are.
pub(crate) struct Programs {
    pub(crate) worker: PathBuf,
    pub(crate) collector: PathBuf,
    /// This program.
    pub(crate) garenne: PathBuf,
}

impl Programs {
    /// They are built and installed together with this one.
    pub(crate) fn beside_this_one(worker: &str) -> Result<Self, CliError> {
        let here = std::env::current_exe()
            .map_err(|error| CliError::unusable(format!("cannot find this program: {error}")))?;
        let sibling = |name: &str| {
            let path = here.with_file_name(name);
            if path.is_file() {
                return Ok(path);
            }
            Err(CliError::unusable(format!("{} does not exist", path.display())).help(
                "this command starts the programs that lie beside it: build all with \
                 `cargo build --release --bins`, or copy them there",
            ))
        };
        Ok(Self {
            worker: sibling(worker)?,
            collector: sibling("garenne-collector")?,
            garenne: here.clone(),
        })
    }
}

/// A process about to start.
pub(crate) struct Spawning {
    name: String,
    log: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
}

impl Spawning {
    pub(crate) fn new(name: &str, directory: &Path) -> Self {
        let file = name.to_lowercase().replace(' ', "-");
        let log = directory.join(format!("{file}.log"));
        Self { name: name.to_owned(), log, arguments: vec![], environment: vec![] }
    }

    pub(crate) fn argument(&mut self, key: &str, value: &str) -> &mut Self {
        self.arguments.extend([key.into(), value.into()]);
        self
    }

    pub(crate) fn environment(&mut self, key: &'static str, value: impl Into<OsString>) {
        self.environment.push((key, value.into()));
    }

    pub(crate) fn word(&mut self, word: &str) -> &mut Self {
        self.arguments.push(word.into());
        self
    }

    /// Standard error goes to the log file, the rest where `pipes` says.
    pub(crate) fn start(self, program: &Path, pipes: Pipes) -> Result<Process, CliError> {
        let failed = |error: std::io::Error| {
            CliError::unusable(format!("cannot start {}: {error}", program.display()))
        };
        let log = File::options().create(true).append(true).open(&self.log).map_err(failed)?;
        let stream = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
        let child = Command::new(program)
            .args(self.arguments)
            .arg("--die-with")
            .arg(std::process::id().to_string())
            .envs(self.environment)
            .stdin(stream(pipes == Pipes::Both))
            .stdout(stream(pipes != Pipes::None))
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        Ok(Process { name: self.name, child, log: self.log })
    }
}

/// What of a child is connected to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pipes {
    /// Nothing.
    None,
    /// Its standard output.
    Heard,
    /// Its standard input too.
    Both,
}

/// A running child.
pub(crate) struct Process {
    /// What people call it.
    pub(crate) name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Its process id; `None` once it has ended.
    pub(crate) fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Its standard input and output, once, if they are connected.
    pub(crate) fn take_pipes(&mut self) -> Option<(ChildStdin, ChildStdout)> {
        self.child.stdin.take().zip(self.child.stdout.take())
    }

    /// Sends it a signal; nothing happens if it has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        if let Some(id) = self.id().and_then(|id| i32::try_from(id).ok())
            && let Err(error) = kill(Pid::from_raw(id), signal)
        {
            tracing::debug!(%error, process = self.name, %signal, "cannot signal");
        }
    }

    /// SIGKILL, and the end of it.
    pub(crate) async fn kill(&mut self) {
        if let Err(error) = self.child.kill().await {
            tracing::debug!(%error, process = self.name, "cannot kill");
        }
    }

    /// SIGTERM, and the end of it; SIGKILL after `patience`.
    pub(crate) async fn end(mut self, patience: Duration) {
        self.signal(Signal::SIGTERM);
        if timeout(patience, self.child.wait()).await.is_err() {
            self.kill().await;
        }
    }

    /// Sends what it prints, line by line, to `lines`.
    pub(crate) fn forward_lines(&mut self, readers: &TaskTracker, lines: mpsc::Sender<String>) {
        let Some(stdout) = self.child.stdout.take() else { return };
        readers.spawn(async move {
            let mut from = BufReader::new(stdout).lines();
            while let Ok(Some(line)) = from.next_line().await {
                if lines.send(line).await.is_err() {
                    return;
                }
            }
        });
    }

    /// What to say if it has ended by itself.
    pub(crate) fn complaint(&mut self) -> Option<CliError> {
        let status = self.child.try_wait().ok().flatten()?;
        Some(self.describe(status))
    }

    fn describe(&self, status: ExitStatus) -> CliError {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rev().find(|line| !line.trim().is_empty());
        let error = CliError::unusable(format!("the process {} ended early ({status})", self.name));
        match last {
            Some(line) => error.help(format!("its last words: {}", line.trim())),
            None => error,
        }
    }
}
