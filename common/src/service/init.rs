//! What a program does as process 1 of a container, where it is the parent of every orphan.
//!
//! The kernel hands each process whose parent is gone to process 1, which must collect its exit status,
//! or a zombie stays. A service cannot do that itself, since it would take away the exit statuses that
//! its own children's owners wait for. So process 1 starts the service as its child and does nothing but
//! pass signals on and collect, like `tini`. It ends with the service and with the same exit code.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, tcsetpgrp};

/// Signals that process 1 passes on.
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

/// Runs the service: as a child of this process if this is process 1, else right here.
///
/// To be called first of all, before there is any thread.
pub fn run(service: impl FnOnce() -> ExitCode) -> ExitCode {
    let signals = signals();
    if getpid().as_raw() != 1 {
        // A child of process 1 inherits what that has blocked.
        return if signals.thread_unblock().is_ok() { service() } else { ExitCode::FAILURE };
    }
    // Blocked before there is a child, so that none gets lost.
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
    // So that process 1 may give the terminal away, and hears of its children.
    signals.add(Signal::SIGTTOU);
    signals.add(Signal::SIGCHLD);
    signals
}

/// This program again, with the same arguments.
fn start() -> io::Result<Pid> {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| OsString::from("garenne"));
    let mut command = Command::new("/proc/self/exe");
    // A group of its own: Ctrl-C reaches it once, from the terminal.
    command.arg0(name).args(arguments).process_group(0);
    let child = command.spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
    if io::stdin().is_terminal() {
        // A service without the terminal works as well.
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
            // It may just have ended.
            Ok(signal) => kill(service, signal).unwrap_or_default(),
        }
    }
}

/// Collects all children that have ended; the exit code of the service if it is one of them.
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
            // Another one, which the service or one of its commands left behind.
            Ok(_) => {}
        }
    }
}
