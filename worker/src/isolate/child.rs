//! The child's side: serves one task at a time for the worker that started it, and dies with it.
//!
//! It has no connection to the broker and settles nothing. Its end of the line is its standard input,
//! which handlers do not get to see; what they write to standard output goes where the worker's goes.

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

use super::frame::{self, Answer, Job, Order, Retry, cut};
use super::warden::Runs;
use crate::context::{Context, Facts};
use crate::execute::{Limits, Stops, execute};
use crate::handler::Registry;
use crate::outcome::{Outcome, Retryable};
use crate::slots::Slots;

/// The worker decides when the time is up.
const NO_LIMIT: Duration = Duration::from_hours(24 * 365);

/// An order to run, with what ends it.
struct Work {
    job: Box<Job>,
    args: Vec<u8>,
    cancel: CancellationToken,
    stop: CancellationToken,
}

/// Serves until the worker is gone; in practice it never returns.
pub(super) async fn serve(registry: Registry) -> io::Result<()> {
    // Whoever stops the service may signal all of its processes; when this one ends is for the worker
    // to say, or a task would be charged with a crash.
    let _deaf = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()]
        .map(|kind| signal(kind));
    let line = take_line()?;
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || work(&registry, line, &runtime)).await?
}

/// If memory gets short, the kernel should choose this process, whose loss harms one suspect only.
fn prefer_as_victim() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "1000") {
        tracing::debug!(%error, "the kernel was not told whom to kill first");
    }
}

/// Standard input is the line; handlers get an empty one instead.
fn take_line() -> io::Result<UnixStream> {
    let line = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let nothing = std::fs::File::open("/dev/null")?;
    dup2_stdin(&nothing)?;
    Ok(line)
}

fn work(registry: &Registry, mut line: UnixStream, runtime: &Handle) -> io::Result<()> {
    let (orders, queue) = mpsc::sync_channel(1);
    let incoming = line.try_clone()?;
    let listener = std::thread::Builder::new().name("worker's orders".to_owned());
    listener.spawn(move || listen(incoming, &orders))?;
    frame::write(&mut line, &Answer::Ready, &[])?;
    for work in queue {
        prefer_as_victim();
        frame::write(&mut line, &Answer::Started, &[])?;
        let (answer, output) = runtime.block_on(run(registry, work));
        frame::write(&mut line, &answer, &output)?;
    }
    Ok(())
}

/// A thread of its own, which even a handler that hogs all others cannot keep from noticing the end.
fn listen(mut line: UnixStream, orders: &mpsc::SyncSender<Work>) {
    let (mut cancel, mut stop) = (CancellationToken::new(), CancellationToken::new());
    let mut runs = Runs::default();
    loop {
        match frame::read(&mut line) {
            Ok((Order::Run(job), args)) => {
                (cancel, stop) = (CancellationToken::new(), CancellationToken::new());
                let work = Work { job, args, cancel: cancel.clone(), stop: stop.clone() };
                if orders.send(work).is_err() {
                    return die();
                }
            }
            Ok((Order::Cancel, _)) => cancel.cancel(),
            Ok((Order::Stop, _)) => stop.cancel(),
            Ok((Order::Watch(run), _)) => runs.watch(run),
            Ok((Order::Group(run, group), _)) => runs.group(run, group),
            Ok((Order::Unwatch(run), _)) => runs.unwatch(&run),
            // The worker closes the line when it needs this process no more, and when it dies.
            Err(_) => {
                runs.end();
                return die();
            }
        }
    }
}

/// Ends this process and what its handlers have started.
fn die() {
    if getpgrp() == getpid() && killpg(getpgrp(), Signal::SIGKILL).is_ok() {
        return;
    }
    std::process::exit(1);
}

async fn run(registry: &Registry, work: Work) -> (Answer, Vec<u8>) {
    let Work { job, args, cancel, stop } = work;
    let message = job.message(args);
    let task = match wire::task::decode(&message, &job.queue) {
        Ok(Some(task)) => Arc::new(task),
        // The worker has decoded the same message.
        Ok(None) => return (Answer::BadArguments("a task without an id".to_owned()), vec![]),
        Err(malformed) => return (Answer::BadArguments(malformed.to_string()), vec![]),
    };
    let Some(handler) = registry.find(&task.name) else {
        // The same program with the same arguments, but its configuration file may have changed.
        let message = format!("no handler for {} in the isolated process", task.name);
        return (Answer::Failed { message, retryable: Retry::ByPolicy }, vec![]);
    };
    let slots = Slots::new(1);
    let Some(slot) = slots.one().await else { return (Answer::Stopped, vec![]) };
    let over = CancellationToken::new();
    let worker = Arc::from(job.worker.as_str());
    let facts = Facts { redelivered: job.redelivered, crashes: job.crashes, fence: job.fence };
    let context = Context::new(task, worker, facts, over);
    let limits = Limits { soft: None, hard: NO_LIMIT, grace: Duration::ZERO };
    // How long it may take after it was told to end is the worker's business.
    let stops = Stops { abort: &stop, cancel: &cancel, cancel_grace: NO_LIMIT };
    let outcome = execute(&*handler, &context, slot, limits, stops).await;
    // A blocking handler may still compute; the next task must not meet it.
    drop(slots.all().await);
    answer(outcome)
}

fn answer(outcome: Outcome) -> (Answer, Vec<u8>) {
    let answer = match outcome {
        Outcome::Succeeded(output) => {
            return (Answer::Output(output.codec), output.bytes.to_vec());
        }
        Outcome::Failed(error) => {
            let retryable = match error.retryable() {
                Retryable::ByPolicy => Retry::ByPolicy,
                Retryable::After(wait) => {
                    Retry::AfterMillis(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX))
                }
                Retryable::Never => Retry::Never,
                Retryable::OutOfResources => Retry::OutOfResources,
            };
            Answer::Failed { message: cut(error.message()), retryable }
        }
        Outcome::BadArguments(error) => Answer::BadArguments(cut(&error)),
        Outcome::Panicked(message) => Answer::Panicked(cut(&message)),
        Outcome::Unable(trouble) => {
            Answer::Failed { message: cut(&trouble.detail), retryable: Retry::OutOfResources }
        }
        Outcome::TimedOut(_) | Outcome::Crashed(_) | Outcome::Interrupted | Outcome::Cancelled => {
            Answer::Stopped
        }
    };
    (answer, vec![])
}
