//! `garenne.crash`: harms the process that runs it, for trying out what then happens.
//!
//! Served only with `worker.faults`, since whoever may submit it can kill workers.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::{InvalidName, Task, TaskName};
use nix::sys::signal::{Signal, kill};
use serde::{Deserialize, Serialize};

use crate::builtin::Named;
use crate::context::Context;
use crate::handler::BlockingHandler;
use crate::outcome::TaskError;

/// The handler and the name that finds it.
pub(crate) fn handler() -> Result<Named, InvalidName> {
    Ok((TaskName::new(Crash::NAME)?, Arc::new(BlockingHandler::<Crash, _>::new(crash))))
}

/// `{"how": "abort"}`, and only as long as fewer than `times` crashes are charged to the task.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Crash {
    how: How,
    /// For ever when absent.
    #[serde(default)]
    times: Option<u32>,
    /// How long it works before, or how long it hangs.
    #[serde(default)]
    millis: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum How {
    /// SIGABRT, as of a failed assertion in native code.
    Abort,
    /// The handler ends its process with code 3.
    Exit,
    /// SIGKILL, as of a kernel that needs memory.
    Kill,
    /// No crash: it blocks its thread for `millis` and listens to nobody.
    Hang,
}

#[derive(Serialize, Deserialize)]
struct Survived {
    crashes: u32,
}

impl Task for Crash {
    const NAME: &'static str = "garenne.crash";
    type Output = Survived;
}

fn crash(context: &Context, Crash { how, times, millis }: Crash) -> Result<Survived, TaskError> {
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
