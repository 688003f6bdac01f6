//! Runs a service as process 1 of a container, which is the parent of every orphan.
//!
//! The kernel reparents every orphaned process to process 1, which must collect its exit status, or
//! the process stays as a zombie. A service cannot do that itself, since it would also collect the
//! exit statuses that other parts of it wait for. So process 1 starts the service as its child,
//! forwards signals and collects exit statuses, like `tini`. It exits with the exit code of the
//! service.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, tcsetpgrp};

/// Signals that process 1 forwards.
const FORWARDED: [Signal; 8] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
    Signal::SIGCONT,
];

/// Runs the service: in a child process if this is process 1, in this process otherwise.
///
/// Call it first of all, before any thread exists.
pub fn run(service: impl FnOnce() -> ExitCode) -> ExitCode {
    let signals = signals();
    if getpid().as_raw() != 1 {
        // A child of process 1 inherits its blocked signals.
        return if signals.thread_unblock().is_ok() { service() } else { ExitCode::FAILURE };
    }
    // Blocked before the child exists, so that no signal is lost.
    match signals.thread_block().map_err(io::Error::from).and_then(|()| start()) {
        Ok(child) => serve(child, &signals),
        Err(error) => {
            super::telemetry::complain(&format!("process 1 cannot start its service: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn signals() -> SigSet {
    let mut signals: SigSet = FORWARDED.into_iter().collect();
    // SIGTTOU, so that process 1 can hand the terminal over; SIGCHLD, to be told of ended children.
    signals.add(Signal::SIGTTOU);
    signals.add(Signal::SIGCHLD);
    signals
}

/// Starts this program again as a child, with the same arguments.
fn start() -> io::Result<Pid> {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| OsString::from("garenne"));
    let mut command = Command::new("/proc/self/exe");
    // In its own process group, so that Ctrl-C reaches it once, from the terminal.
    command.arg0(name).args(arguments).process_group(0);
    let child = command.spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    if io::stdin().is_terminal() {
        // The service also works without the terminal.
        tcsetpgrp(io::stdin(), pid).unwrap_or_default();
    }
    Ok(pid)
}

fn serve(service: Pid, signals: &SigSet) -> ExitCode {
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => {
                if let Some(code) = collect(service) {
                    return code;
                }
            }
            Ok(Signal::SIGTTOU) | Err(_) => {}
            // The service may just have ended.
            Ok(signal) => kill(service, signal).unwrap_or_default(),
        }
    }
}

/// Collects the exit statuses of all ended children. Returns that of the service if it is among
/// them.
fn collect(service: Pid) -> Option<ExitCode> {
    let mut code = None;
    loop {
        let ended = waitpid(None, Some(WaitPidFlag::WNOHANG));
        match ended {
            Ok(WaitStatus::Exited(pid, exit)) if pid == service => {
                code = Some(u8::try_from(exit).map_or(ExitCode::FAILURE, ExitCode::from));
            }
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == service => {
                code = u8::try_from(128 + signal as i32).ok().map(ExitCode::from);
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return code,
            // An orphan of the service or of one of its commands.
            Ok(_) => {}
        }
    }
}
