//! One child process, as its worker sees it: started, given orders, listened to, killed.

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

use super::frame::{self, Answer, Order};

/// How long a child may take until it serves; it does again whatever the program does first.
const START: Duration = Duration::from_secs(30);
/// How long a process may take to be dead whose line is.
const LAST_BREATH: Duration = Duration::from_secs(2);

/// A child process. Dropped, it is killed with its process group.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    /// The process group that the child leads; none once it is known to be gone.
    group: Option<Pid>,
    line: UnixStream,
    /// Since when it has nothing to do.
    pub(super) idle_since: Instant,
}

impl Process {
    /// Starts this very program again and waits until it serves.
    pub(super) async fn start() -> io::Result<Self> {
        let mut process = Self::spawn()?;
        match timeout(START, frame::read_async(&mut process.line)).await {
            Ok(Ok((Answer::Ready, _))) => Ok(process),
            Ok(Ok((other, _))) => Err(io::Error::other(format!("it began with {other:?}"))),
            Ok(Err(_)) => Err(io::Error::other(format!("it ended: {}", process.death().await))),
            Err(_) => Err(io::Error::other(format!("it did not serve within {START:?}"))),
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
        // Standard output and error are shared, so what handlers print and log goes the usual way.
        command
            .args(arguments)
            .env(ISOLATED_ON, inode(&theirs)?.to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .process_group(0)
            .kill_on_drop(true);
        let child = command.spawn()?;
        // The command holds the other end of the line, and the child's death must end it.
        drop(command);
        let group = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        let line = UnixStream::from_std(ours)?;
        Ok(Self { child, group, line, idle_since: Instant::now() })
    }

    /// Gives an order.
    pub(super) async fn tell(&mut self, order: &impl Serialize, body: &[u8]) -> io::Result<()> {
        self.line.write_all(&frame::encode(order, body)?).await
    }

    /// Gives an order without waiting; `false` if it does not take it. Such a child is of no more use.
    pub(super) fn tell_at_once(&self, order: &Order) -> bool {
        let Ok(bytes) = frame::encode(order, &[]) else { return false };
        self.line.try_write(&bytes).is_ok_and(|written| written == bytes.len())
    }

    /// Listens for the next answer.
    pub(super) async fn next(&mut self) -> io::Result<(Answer, Vec<u8>)> {
        frame::read_async(&mut self.line).await
    }

    /// The two ends of the line, to listen and give orders at once.
    pub(super) fn halves(&mut self) -> (tokio::net::unix::ReadHalf<'_>, Orders<'_>) {
        let (answers, orders) = self.line.split();
        (answers, Orders(orders))
    }

    /// Whether it is still there; one that waits can be killed too.
    pub(super) fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// How it ended, in words; makes sure that it has.
    pub(super) async fn death(&mut self) -> String {
        let Ok(status) = timeout(LAST_BREATH, self.child.wait()).await else {
            self.kill();
            drop(self.child.wait().await);
            return "it closed its line to the worker and was killed".to_owned();
        };
        status.map_or_else(|error| format!("unknown ({error})"), describe)
    }

    fn kill(&mut self) {
        if let Some(group) = self.group.take()
            && let Err(error) = killpg(group, Signal::SIGKILL)
        {
            tracing::trace!(%error, "no isolated process to kill");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The end of the line that gives orders.
pub(super) struct Orders<'a>(tokio::net::unix::WriteHalf<'a>);

impl Orders<'_> {
    /// Gives an order; a child that is gone is noticed by its silence.
    pub(super) async fn tell(&mut self, order: &impl Serialize) {
        if let Ok(bytes) = frame::encode(order, &[])
            && let Err(error) = self.0.write_all(&bytes).await
        {
            tracing::debug!(%error, "an isolated process takes no orders any more");
        }
    }
}

/// This very program, even if its file was replaced since.
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
    fn an_end_has_a_name() {
        assert_eq!(describe(ExitStatus::from_raw(6)), "signal SIGABRT (6)");
        assert_eq!(describe(ExitStatus::from_raw(9)), "signal SIGKILL (9)");
        assert_eq!(describe(ExitStatus::from_raw(3 << 8)), "exit code 3");
    }
}
