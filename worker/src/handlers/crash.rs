//! `garenne.crash`: crashes the process that runs it, to try out what happens then.
//!
//! Served only with `worker.faults`, since anyone who can submit it can kill workers.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::{InvalidName, Task, TaskName};
use nix::sys::signal::{Signal, kill};
use serde::{Deserialize, Serialize};

use super::builtin::NamedHandler;
use super::{BlockingHandler, Context};
use crate::run::outcome::TaskError;

/// The handler and its task name.
pub(crate) fn handler() -> Result<NamedHandler, InvalidName> {
    Ok((TaskName::new(CrashTask::NAME)?, Arc::new(BlockingHandler::<CrashTask, _>::new(crash))))
}

/// For example `{"how": "abort"}`. Crashes while the task has fewer than `times` crashes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CrashTask {
    how: How,
    /// Without a limit if absent.
    #[serde(default)]
    times: Option<u32>,
    /// How long it runs before the crash, or how long it hangs.
    #[serde(default)]
    millis: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum How {
    /// SIGABRT, like a failed assertion in native code.
    Abort,
    /// The handler ends its process with code 3.
    Exit,
    /// SIGKILL, like the out-of-memory killer.
    Kill,
    /// Not a crash: blocks its thread for `millis` and ignores cancellation.
    Hang,
}

#[derive(Serialize, Deserialize)]
struct Survived {
    crashes: u32,
}

impl Task for CrashTask {
    const NAME: &'static str = "garenne.crash";
    type Output = Survived;
}

fn crash(
    context: &Context,
    CrashTask { how, times, millis }: CrashTask,
) -> Result<Survived, TaskError> {
    let crashes = context.crashes();
    if times.is_some_and(|times| crashes >= times) {
        return Ok(Survived { crashes });
    }
    std::thread::sleep(Duration::from_millis(millis));
    match how {
        How::Abort => std::process::abort(),
        How::Exit => std::process::exit(3),
        How::Kill => kill(nix::unistd::getpid(), Signal::SIGKILL)?,
        How::Hang => return Ok(Survived { crashes }),
    }
    // The signal is on its way.
    std::thread::sleep(Duration::from_secs(10));
    Err(TaskError::fatal("SIGKILL did not come"))
}
