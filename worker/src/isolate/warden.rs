//! The warden: a child process that ends the commands of a worker that was killed.
//!
//! A command does not notice that its worker is gone, and would go on beside its second run. A worker
//! that is killed cannot end it. So a worker with commands tells a child which of them run, and the
//! child ends those when its line to the worker closes. It finds a command by its process group, and by
//! a variable in the environment, which is inherited and was announced before the command started. Not
//! covered: descendants that have left the group and changed their environment, and a worker without
//! isolation, which starts no child of itself.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use garenne_common::TaskId;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpid};

use super::frame::{Order, RunId};
use super::process::Process;
use crate::outcome::is_shortage;

/// The variable that marks what belongs to a command.
pub(crate) const RUN: &str = "GARENNE_RUN";
/// How long a warden that could not be started is done without.
const RETRY: Duration = Duration::from_mins(1);
/// How often the warden looks for processes to end: one may just be starting another.
const ROUNDS: u32 = 20;
const ROUND_INTERVAL: Duration = Duration::from_millis(50);

/// The worker's side.
#[derive(Default)]
pub(crate) struct Warden {
    enabled: AtomicBool,
    state: Mutex<State>,
    starting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    process: Option<Process>,
    /// Commands that run, with their process groups.
    runs: HashMap<RunId, Option<i32>>,
    retry_at: Option<Instant>,
}

/// A command under the warden's eyes, until this is dropped.
pub(crate) struct Watch {
    warden: Arc<Warden>,
    /// The value of [`RUN`] in its environment.
    pub(crate) id: RunId,
}

impl Warden {
    /// From now on commands are watched.
    pub(crate) fn enable(&self) {
        self.enabled.store(true, Ordering::Relaxed);
    }

    /// Starts the child, so that the first command need not wait for it. Without success that one tries
    /// again.
    pub(crate) async fn begin(&self) {
        if let Err(error) = self.start().await {
            tracing::warn!(%error, "no child process to end the commands yet");
        }
    }

    /// To be called before a command starts. Fails only for lack of resources.
    pub(crate) async fn watch(self: &Arc<Self>) -> std::io::Result<Watch> {
        let id = TaskId::generate().to_string();
        self.lock().runs.insert(id.clone(), None);
        let watch = Watch { warden: Arc::clone(self), id };
        if !self.tell(&Order::Watch(watch.id.clone())) {
            self.start().await?;
        }
        Ok(watch)
    }

    /// Starts the child, unless there is one.
    async fn start(&self) -> std::io::Result<()> {
        let _turn = self.starting.lock().await;
        if !self.is_missing() {
            return Ok(());
        }
        match Process::start().await {
            Ok(process) => self.appoint(process),
            Err(error) if is_shortage(&error) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "no child process can end the commands should this worker be killed");
                self.lock().retry_at = Some(Instant::now() + RETRY);
            }
        }
        Ok(())
    }

    fn is_missing(&self) -> bool {
        let state = self.lock();
        let wait = state.retry_at.is_some_and(|at| Instant::now() < at);
        self.enabled.load(Ordering::Relaxed) && state.process.is_none() && !wait
    }

    /// Tells a new child of everything that runs.
    fn appoint(&self, process: Process) {
        let mut state = self.lock();
        let watches = state.runs.keys().map(|id| Order::Watch(id.clone()));
        let groups = state.runs.iter();
        let groups = groups.filter_map(|(id, group)| Some(Order::Group(id.clone(), (*group)?)));
        let orders: Vec<_> = watches.chain(groups).collect();
        if orders.iter().all(|order| process.tell_at_once(order)) {
            state.process = Some(process);
        }
    }

    /// Whether the child heard it.
    fn tell(&self, order: &Order) -> bool {
        let mut state = self.lock();
        let heard = state.process.as_ref().is_some_and(|process| process.tell_at_once(order));
        if !heard {
            state.process = None;
        }
        heard
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch {
    /// The command runs, in this process group.
    pub(crate) fn group(&self, group: i32) {
        self.warden.lock().runs.insert(self.id.clone(), Some(group));
        self.warden.tell(&Order::Group(self.id.clone(), group));
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.warden.lock().runs.remove(&self.id);
        self.warden.tell(&Order::Unwatch(std::mem::take(&mut self.id)));
    }
}

/// The child's side: what runs.
#[derive(Default)]
pub(super) struct Runs(HashMap<RunId, Option<i32>>);

impl Runs {
    pub(super) fn watch(&mut self, id: RunId) {
        self.0.insert(id, None);
    }

    pub(super) fn group(&mut self, id: RunId, group: i32) {
        self.0.insert(id, Some(group));
    }

    pub(super) fn unwatch(&mut self, id: &RunId) {
        self.0.remove(id);
    }

    /// Ends everything that runs.
    pub(super) fn end(&self) {
        if self.0.is_empty() {
            return;
        }
        for group in self.0.values().flatten() {
            end(killpg(Pid::from_raw(*group), Signal::SIGKILL));
        }
        for round in 0..ROUNDS {
            if round > 0 {
                std::thread::sleep(ROUND_INTERVAL);
            }
            for pid in self.marked() {
                end(kill(pid, Signal::SIGKILL));
            }
        }
    }

    /// Processes that have one of these runs in their environment.
    fn marked(&self) -> Vec<Pid> {
        let Ok(processes) = std::fs::read_dir("/proc") else { return vec![] };
        let names = processes.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let pids = names.filter_map(|name| name.parse().ok()).map(Pid::from_raw);
        pids.filter(|pid| *pid != getpid() && self.is_marked(*pid)).collect()
    }

    fn is_marked(&self, pid: Pid) -> bool {
        // Not readable: another user's, or gone.
        let Ok(environment) = std::fs::read(format!("/proc/{pid}/environ")) else { return false };
        environment.split(|byte| *byte == 0).any(|variable| {
            let value = variable.strip_prefix(RUN.as_bytes()).and_then(|it| it.strip_prefix(b"="));
            let id = value.and_then(|value| std::str::from_utf8(value).ok());
            id.is_some_and(|id| self.0.contains_key(id))
        })
    }
}

fn end(sent: nix::Result<()>) {
    if let Err(error) = sent {
        tracing::trace!(%error, "it is gone already");
    }
}
