//! One child process from the worker's side: starts it, sends commands, receives messages, kills it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use garenne_common::config::ISOLATED_ON;
use garenne_common::service::lifeline::inode;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

use super::frame::{self, ChildCommand, ChildMessage};

/// How long a child may take to become ready: it runs all that the program does before
/// `Worker::isolate`.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a process may take to end after its socket is closed.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// A child process. It is killed with its process group when this is dropped.
#[derive(Debug)]
pub(super) struct ChildProcess {
    child: Child,
    /// The process group that the child leads; `None` after it has been killed.
    group: Option<Pid>,
    socket: UnixStream,
    /// When it last ran a task.
    pub(super) idle_since: Instant,
}

impl ChildProcess {
    /// Starts this program again and waits until it is ready.
    pub(super) async fn start() -> io::Result<Self> {
        let mut process = Self::spawn()?;
        match timeout(START_TIMEOUT, frame::read_async(&mut process.socket)).await {
            Ok(Ok((ChildMessage::Ready, _))) => Ok(process),
            Ok(Ok((other, _))) => {
                Err(io::Error::other(format!("unexpected first message {other:?}")))
            }
            Ok(Err(_)) => {
                Err(io::Error::other(format!("it ended: {}", process.wait_for_exit().await)))
            }
            Err(_) => Err(io::Error::other(format!("it was not ready within {START_TIMEOUT:?}"))),
        }
    }

    fn spawn() -> io::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut arguments = std::env::args_os();
        let mut command = Command::new(program()?);
        if let Some(name) = arguments.next() {
            command.arg0(name);
        }
        // Standard output and error are inherited, so handlers print and log as usual.
        command
            .args(arguments)
            .env(ISOLATED_ON, inode(&theirs)?.to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .process_group(0)
            .kill_on_drop(true);
        let child = command.spawn()?;
        // The command holds the other end of the socket, which must close when the child dies.
        drop(command);
        let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        let socket = UnixStream::from_std(ours)?;
        Ok(Self { child, group, socket, idle_since: Instant::now() })
    }

    /// Sends a command.
    pub(super) async fn send(&mut self, command: &impl Serialize, body: &[u8]) -> io::Result<()> {
        self.socket.write_all(&frame::encode(command, body)?).await
    }

    /// Sends a command without waiting. Returns `false` if that fails; the child is unusable then.
    pub(super) fn try_send(&self, command: &ChildCommand) -> bool {
        let Ok(bytes) = frame::encode(command, &[]) else { return false };
        self.socket.try_write(&bytes).is_ok_and(|written| written == bytes.len())
    }

    /// Receives the next message.
    pub(super) async fn receive(&mut self) -> io::Result<(ChildMessage, Vec<u8>)> {
        frame::read_async(&mut self.socket).await
    }

    /// Splits the socket, to receive and send at the same time.
    pub(super) fn split(&mut self) -> (tokio::net::unix::ReadHalf<'_>, CommandSender<'_>) {
        let (messages, commands) = self.socket.split();
        (messages, CommandSender(commands))
    }

    /// Whether the process is still running.
    pub(super) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end of the process, or kills it, and describes how it ended.
    pub(super) async fn wait_for_exit(&mut self) -> String {
        let Ok(status) = timeout(EXIT_TIMEOUT, self.child.wait()).await else {
            self.kill();
            drop(self.child.wait().await);
            return "it closed its socket to the worker and was killed".to_owned();
        };
        status.map_or_else(|error| format!("unknown ({error})"), describe)
    }

    fn kill(&mut self) {
        if let Some(group) = self.group.take()
            && let Err(error) = killpg(group, Signal::SIGKILL)
        {
            tracing::trace!(%error, "no child process to kill");
        }
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The sending half of the socket.
pub(super) struct CommandSender<'a>(tokio::net::unix::WriteHalf<'a>);

impl CommandSender<'_> {
    /// Sends a command. Errors are ignored: the receiving half reports a dead child.
    pub(super) async fn send(&mut self, command: &impl Serialize) {
        if let Ok(bytes) = frame::encode(command, &[])
            && let Err(error) = self.0.write_all(&bytes).await
        {
            tracing::debug!(%error, "cannot send a command to a child process");
        }
    }
}

/// This program, even if its file has been replaced.
fn program() -> io::Result<PathBuf> {
    let running = PathBuf::from("/proc/self/exe");
    if running.exists() { Ok(running) } else { std::env::current_exe() }
}

/// `signal SIGABRT (6)`, `exit code 3`.
fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(number), _) => {
            let name = Signal::try_from(number).map_or("unknown", Signal::as_str);
            format!("signal {name} ({number})")
        }
        (None, Some(code)) => format!("exit code {code}"),
        (None, None) => status.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_are_described() {
        assert_eq!(describe(ExitStatus::from_raw(6)), "signal SIGABRT (6)");
        assert_eq!(describe(ExitStatus::from_raw(9)), "signal SIGKILL (9)");
        assert_eq!(describe(ExitStatus::from_raw(3 << 8)), "exit code 3");
    }
}
