//! Starts a command and classifies failures to do so. Does not communicate with it; the parent module does.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use garenne_common::config::CommandConfig;
use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{AccessFlags, Pid, access};
use tokio::process::{Child, Command};

use crate::handlers::Context;
use crate::isolate::{RUN_VARIABLE, Warden, WatchedRun};
use crate::run::outcome::{Outcome, StartFailure, StartFailureKind, TaskError};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A running program. Its process group is killed when this is dropped, since it may have started others.
pub(super) struct Group {
    pub(super) child: Child,
    /// The id of the process group, which the child leads.
    pub(super) id: Option<i32>,
    /// Dropped after the group has been killed.
    _watch: WatchedRun,
}

impl Group {
    fn new(child: Child, watch: WatchedRun) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        if let Some(id) = id {
            watch.group(id);
        }
        Self { child, id, _watch: watch }
    }

    pub(super) fn kill(&mut self) {
        signal(self.id.take(), Signal::SIGKILL);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(super) fn signal(group: Option<i32>, signal: Signal) {
    let Some(id) = group else { return };
    if let Err(error) = killpg(Pid::from_raw(id), signal) {
        // The usual case: the group is empty.
        tracing::trace!(%error, "no process of the command gets the signal");
    }
}

/// Starts the command with this argument vector.
pub(super) async fn start(
    config: &CommandConfig,
    argv: &[String],
    warden: &Arc<Warden>,
    context: &Context,
) -> Result<Group, Outcome> {
    let program = argv.first().map_or("", String::as_str);
    // If the task names the program, a missing program is the fault of the task.
    let of_task = config.argv.first().is_some_and(|configured| configured != program);
    let failed = |error| start_failure(&error, program, of_task);
    let watch = warden.watch().await.map_err(failed)?;
    let mut command = command(config, argv, context).map_err(Outcome::Failed)?;
    command.env(RUN_VARIABLE, &watch.id);
    command.spawn().map(|child| Group::new(child, watch)).map_err(failed)
}

fn command(
    config: &CommandConfig,
    argv: &[String],
    context: &Context,
) -> Result<Command, TaskError> {
    let (program, arguments) =
        argv.split_first().ok_or_else(|| TaskError::fatal("the command's argv is empty"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .env("GARENNE_TASK_ID", context.id().as_str())
        .env("GARENNE_ATTEMPT", context.attempt().to_string())
        .envs(context.fence().map(|fence| ("GARENNE_FENCE", fence.to_string())))
        .envs(&config.env)
        .stdin(if config.stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    if let Some(directory) = &config.directory {
        command.current_dir(directory);
    }
    Ok(command)
}

/// Classifies a failure to start: the arguments belong to the task, the machine to the worker.
fn start_failure(error: &io::Error, program: &str, of_task: bool) -> Outcome {
    let what = format!("cannot start {program}");
    if let Some(shortage) = StartFailure::of_shortage(error, &what) {
        return Outcome::NotStarted(shortage);
    }
    let detail = format!("{what}: {error}");
    let too_long = error.raw_os_error().map(Errno::from_raw) == Some(Errno::E2BIG);
    let invalid = error.kind() == io::ErrorKind::InvalidInput;
    if too_long || invalid || of_task {
        Outcome::fatal(detail)
    } else {
        Outcome::NotStarted(StartFailure::new(StartFailureKind::Command, detail))
    }
}

/// Whether the program exists and may be executed.
///
/// A program that is being written, or whose interpreter is missing, looks usable.
pub(super) fn is_usable(config: &CommandConfig) -> bool {
    let Some(program) = config.argv.first() else { return false };
    let directory = config.directory.as_deref().unwrap_or(Path::new("."));
    let search = config.env.get("PATH").map_or(PATH, String::as_str);
    let candidates: Vec<PathBuf> = if program.contains('/') {
        vec![directory.join(program)]
    } else {
        search.split(':').map(|place| directory.join(place).join(program)).collect()
    };
    let executable = |path: &PathBuf| path.is_file() && access(path, AccessFlags::X_OK).is_ok();
    directory.is_dir() && candidates.iter().any(executable)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(errno: Errno, of_task: bool) -> Option<StartFailureKind> {
        let error = io::Error::from_raw_os_error(errno as i32);
        let outcome = start_failure(&error, "x", of_task);
        if let Outcome::NotStarted(failure) = &outcome {
            return Some(failure.kind);
        }
        assert!(matches!(outcome, Outcome::Failed(_)));
        None
    }

    #[test]
    fn the_machine_belongs_to_the_worker_and_the_arguments_to_the_task() {
        for errno in [Errno::EMFILE, Errno::ENFILE, Errno::EAGAIN, Errno::ENOMEM] {
            assert_eq!(kind(errno, false), Some(StartFailureKind::Resources));
            assert_eq!(kind(errno, true), Some(StartFailureKind::Resources));
        }
        for errno in [Errno::ENOENT, Errno::EACCES, Errno::ETXTBSY, Errno::ENOEXEC] {
            assert_eq!(kind(errno, false), Some(StartFailureKind::Command));
            assert_eq!(kind(errno, true), None);
        }
        assert_eq!(kind(Errno::E2BIG, false), None);
    }
}
