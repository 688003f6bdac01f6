//! The warden: a child process that ends the commands of a worker that was killed.
//!
//! A command does not notice the death of its worker and would continue beside its second run. So a
//! worker with commands tells a child process which of them are running, and the child ends them when
//! its socket to the worker closes. It finds a command by its process group and by an environment
//! variable, which is inherited and announced before the command starts. Not covered: descendants that
//! have left the group and changed their environment, and workers without isolation, which start no
//! child processes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use garenne_common::TaskId;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpid};
use parking_lot::Mutex;

use super::frame::{ChildCommand, RunId};
use super::process::ChildProcess;
use crate::run::outcome::is_shortage;

/// The environment variable that marks the processes of a command.
pub(crate) const RUN_VARIABLE: &str = "GARENNE_RUN";
/// How long after a failed start the warden is not started again.
const RETRY_INTERVAL: Duration = Duration::from_mins(1);
/// How often the warden searches for processes to end: each may be starting another one.
const SCANS: u32 = 20;
const SCAN_INTERVAL: Duration = Duration::from_millis(50);

/// The worker's side.
#[derive(Default)]
pub(crate) struct Warden {
    enabled: AtomicBool,
    state: Mutex<WardenState>,
    starting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct WardenState {
    process: Option<ChildProcess>,
    /// Running commands with their process groups.
    runs: HashMap<RunId, Option<i32>>,
    retry_at: Option<Instant>,
}

/// A command that the warden watches until this is dropped.
pub(crate) struct WatchedRun {
    warden: Arc<Warden>,
    /// The value of [`RUN_VARIABLE`] in its environment.
    pub(crate) id: RunId,
}

impl Warden {
    /// Commands are watched from now on.
    pub(crate) fn enable(&self) {
        self.enabled.store(true, Ordering::Relaxed);
    }

    /// Starts the child process, so that the first command does not wait for it. If that fails, the first
    /// command tries again.
    pub(crate) async fn prepare(&self) {
        if let Err(error) = self.start().await {
            tracing::warn!(%error, "cannot start the child process that ends commands; trying again later");
        }
    }

    /// Must be called before a command starts. Fails only for lack of resources.
    pub(crate) async fn watch(self: &Arc<Self>) -> std::io::Result<WatchedRun> {
        let id = TaskId::generate().to_string();
        self.state.lock().runs.insert(id.clone(), None);
        let watch = WatchedRun { warden: Arc::clone(self), id };
        if !self.send(&ChildCommand::Watch(watch.id.clone())) {
            self.start().await?;
        }
        Ok(watch)
    }

    /// Starts the child process unless it is running.
    async fn start(&self) -> std::io::Result<()> {
        let _turn = self.starting.lock().await;
        if !self.is_missing() {
            return Ok(());
        }
        match ChildProcess::start().await {
            Ok(process) => self.hand_over(process),
            Err(error) if is_shortage(&error) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "cannot start the child process that ends commands if this worker is killed");
                self.state.lock().retry_at = Some(Instant::now() + RETRY_INTERVAL);
            }
        }
        Ok(())
    }

    fn is_missing(&self) -> bool {
        let state = self.state.lock();
        let wait = state.retry_at.is_some_and(|at| Instant::now() < at);
        self.enabled.load(Ordering::Relaxed) && state.process.is_none() && !wait
    }

    /// Tells a new child process about all running commands.
    fn hand_over(&self, process: ChildProcess) {
        let mut state = self.state.lock();
        let watches = state.runs.keys().map(|id| ChildCommand::Watch(id.clone()));
        let groups = state.runs.iter();
        let groups =
            groups.filter_map(|(id, group)| Some(ChildCommand::Group(id.clone(), (*group)?)));
        let commands: Vec<_> = watches.chain(groups).collect();
        if commands.iter().all(|command| process.try_send(command)) {
            state.process = Some(process);
        }
    }

    /// Sends a command to the child process. Returns `false` if there is none.
    fn send(&self, command: &ChildCommand) -> bool {
        let mut state = self.state.lock();
        let sent = state.process.as_ref().is_some_and(|process| process.try_send(command));
        if !sent {
            state.process = None;
        }
        sent
    }
}

impl WatchedRun {
    /// The command has started in this process group.
    pub(crate) fn group(&self, group: i32) {
        self.warden.state.lock().runs.insert(self.id.clone(), Some(group));
        self.warden.send(&ChildCommand::Group(self.id.clone(), group));
    }
}

impl Drop for WatchedRun {
    fn drop(&mut self) {
        self.warden.state.lock().runs.remove(&self.id);
        self.warden.send(&ChildCommand::Unwatch(std::mem::take(&mut self.id)));
    }
}

/// The child's side: the running commands.
#[derive(Default)]
pub(super) struct WatchedRuns(HashMap<RunId, Option<i32>>);

impl WatchedRuns {
    pub(super) fn watch(&mut self, id: RunId) {
        self.0.insert(id, None);
    }

    pub(super) fn group(&mut self, id: RunId, group: i32) {
        self.0.insert(id, Some(group));
    }

    pub(super) fn unwatch(&mut self, id: &RunId) {
        self.0.remove(id);
    }

    /// Ends all running commands.
    pub(super) fn end(&self) {
        if self.0.is_empty() {
            return;
        }
        for group in self.0.values().flatten() {
            end(killpg(Pid::from_raw(*group), Signal::SIGKILL));
        }
        for scan in 0..SCANS {
            if scan > 0 {
                std::thread::sleep(SCAN_INTERVAL);
            }
            for pid in self.marked() {
                end(kill(pid, Signal::SIGKILL));
            }
        }
    }

    /// Processes with one of these runs in their environment.
    fn marked(&self) -> Vec<Pid> {
        let Ok(processes) = std::fs::read_dir("/proc") else { return vec![] };
        let names = processes.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let pids = names.filter_map(|name| name.parse().ok()).map(Pid::from_raw);
        pids.filter(|pid| *pid != getpid() && self.is_marked(*pid)).collect()
    }

    fn is_marked(&self, pid: Pid) -> bool {
        // Not readable if it belongs to another user or has ended.
        let Ok(environment) = std::fs::read(format!("/proc/{pid}/environ")) else { return false };
        environment.split(|byte| *byte == 0).any(|variable| {
            let value =
                variable.strip_prefix(RUN_VARIABLE.as_bytes()).and_then(|it| it.strip_prefix(b"="));
            let id = value.and_then(|value| std::str::from_utf8(value).ok());
            id.is_some_and(|id| self.0.contains_key(id))
        })
    }
}

fn end(sent: nix::Result<()>) {
    if let Err(error) = sent {
        tracing::trace!(%error, "the process has ended already");
    }
}
