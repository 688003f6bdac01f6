//! The child's side: runs one task at a time for the worker that started it, and dies with it.
//!
//! It has no connection to the broker and settles nothing. Its standard input is a socket to the worker,
//! which handlers do not see; its standard output is the worker's.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use garenne_common::wire;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{dup2_stdin, getpgrp, getpid};
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::frame::{self, ChildCommand, ChildMessage, ChildTask, truncate};
use super::warden::WatchedRuns;
use crate::handlers::{Context, ExecutionFacts, Registry};
use crate::run::concurrency::Concurrency;
use crate::run::execute::{StopSignals, TimeLimits, execute};
use crate::run::outcome::{Outcome, Retryable};

/// The worker enforces the time limit.
const NO_LIMIT: Duration = Duration::from_hours(24 * 365);

/// A task to run, and the signals that end it.
struct Assignment {
    task: Box<ChildTask>,
    args: Vec<u8>,
    cancel: CancellationToken,
    stop: CancellationToken,
}

/// Runs tasks until the worker is gone. In practice it ends the process and never returns.
pub(super) async fn serve(registry: Registry) -> io::Result<()> {
    // A service manager may signal all processes of the service. The worker decides when this one ends;
    // otherwise its end would count as a crash of the task.
    let _ignored = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()]
        .map(|kind| signal(kind));
    let socket = take_socket()?;
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || run_tasks(&registry, socket, &runtime)).await?
}

/// If memory runs out, the kernel should kill this process, whose loss affects one suspect only.
fn prefer_as_oom_victim() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "1000") {
        tracing::debug!(%error, "cannot raise oom_score_adj");
    }
}

/// Takes the socket from standard input; handlers get an empty one instead.
fn take_socket() -> io::Result<UnixStream> {
    let socket = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let nothing = std::fs::File::open("/dev/null")?;
    dup2_stdin(&nothing)?;
    Ok(socket)
}

fn run_tasks(registry: &Registry, mut socket: UnixStream, runtime: &Handle) -> io::Result<()> {
    let (assign, assignments) = mpsc::sync_channel(1);
    let incoming = socket.try_clone()?;
    let listener = std::thread::Builder::new().name("worker commands".to_owned());
    listener.spawn(move || listen(incoming, &assign))?;
    frame::write(&mut socket, &ChildMessage::Ready, &[])?;
    for assignment in assignments {
        prefer_as_oom_victim();
        frame::write(&mut socket, &ChildMessage::Started, &[])?;
        let (message, output) = runtime.block_on(run(registry, assignment));
        frame::write(&mut socket, &message, &output)?;
    }
    Ok(())
}

/// Receives commands. Has a thread of its own, so that it notices the end of the worker even if a handler
/// occupies all others.
fn listen(mut socket: UnixStream, assign: &mpsc::SyncSender<Assignment>) {
    let (mut cancel, mut stop) = (CancellationToken::new(), CancellationToken::new());
    let mut runs = WatchedRuns::default();
    loop {
        match frame::read(&mut socket) {
            Ok((ChildCommand::Run(task), args)) => {
                (cancel, stop) = (CancellationToken::new(), CancellationToken::new());
                let (cancel, stop) = (cancel.clone(), stop.clone());
                if assign.send(Assignment { task, args, cancel, stop }).is_err() {
                    return die();
                }
            }
            Ok((ChildCommand::Cancel, _)) => cancel.cancel(),
            Ok((ChildCommand::Stop, _)) => stop.cancel(),
            Ok((ChildCommand::Watch(run), _)) => runs.watch(run),
            Ok((ChildCommand::Group(run, group), _)) => runs.group(run, group),
            Ok((ChildCommand::Unwatch(run), _)) => runs.unwatch(&run),
            // The worker closes the socket when it no longer needs this process, and when it dies.
            Err(_) => {
                runs.end();
                return die();
            }
        }
    }
}

/// Ends this process and all processes that its handlers have started.
fn die() {
    if getpgrp() == getpid() && killpg(getpgrp(), Signal::SIGKILL).is_ok() {
        return;
    }
    std::process::exit(1);
}

async fn run(registry: &Registry, assignment: Assignment) -> (ChildMessage, Vec<u8>) {
    let Assignment { task: assigned, args, cancel, stop } = assignment;
    let message = assigned.message(args);
    let task = match wire::task::decode(&message, &assigned.queue) {
        Ok(Some(task)) => Arc::new(task),
        // The worker has decoded the same message.
        Ok(None) => return (ChildMessage::BadArguments("a task without an id".to_owned()), vec![]),
        Err(malformed) => return (ChildMessage::BadArguments(malformed.to_string()), vec![]),
    };
    let Some(handler) = registry.find(&task.name) else {
        // This is the same program with the same arguments, but its configuration file may have changed.
        let message = format!("no handler for {} in the isolated process", task.name);
        return (ChildMessage::Failed { message, retryable: Retryable::ByPolicy }, vec![]);
    };
    let concurrency = Concurrency::new(1);
    let Some(permit) = concurrency.one().await else { return (ChildMessage::Stopped, vec![]) };
    let over = CancellationToken::new();
    let worker = Arc::from(assigned.worker.as_str());
    let ChildTask { redelivered, crashes, fence, .. } = *assigned;
    let facts = ExecutionFacts { redelivered, crashes, fence };
    let context = Context::new(task, worker, facts, over);
    let limits = TimeLimits { soft: None, hard: NO_LIMIT, kill_grace: Duration::ZERO };
    // The worker decides how long the attempt may take to end.
    let signals = StopSignals { abort: &stop, cancel: &cancel, cancel_grace: NO_LIMIT };
    let outcome = execute(&*handler, &context, permit, limits, signals).await;
    // A blocking handler may still be running; the next task must not run beside it.
    drop(concurrency.all().await);
    encode_outcome(outcome)
}

fn encode_outcome(outcome: Outcome) -> (ChildMessage, Vec<u8>) {
    let message = match outcome {
        Outcome::Succeeded(output) => {
            return (ChildMessage::Output(output.codec), output.bytes.to_vec());
        }
        Outcome::Failed(error) => ChildMessage::Failed {
            message: truncate(error.message()),
            retryable: error.retryable(),
        },
        Outcome::BadArguments(error) => ChildMessage::BadArguments(truncate(&error)),
        Outcome::Panicked(message) => ChildMessage::Panicked(truncate(&message)),
        Outcome::NotStarted(failure) => ChildMessage::Failed {
            message: truncate(&failure.detail),
            retryable: Retryable::OutOfResources,
        },
        Outcome::TimedOut(_) | Outcome::Crashed(_) | Outcome::Interrupted | Outcome::Cancelled => {
            ChildMessage::Stopped
        }
    };
    (message, vec![])
}
