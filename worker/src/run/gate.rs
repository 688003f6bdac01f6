//! The gate for tasks that have no permit yet: tasks that were delivered before.
//!
//! Such a task first waits for a child process and then for a permit, so that waiting tasks occupy
//! nothing. Both queues are fair: suspects and other tasks cannot starve each other.

use std::sync::Arc;

use garenne_common::DeadReason;
use garenne_common::failpoints::Protection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::concurrency::{Concurrency, Permit};
use super::history::{DeliveryHistory, RETURN_DELAY, RunMode};
use super::outcome::Disposition;
use crate::handlers::Handler;
use crate::isolate::{Isolated, Isolation};

/// Decides when and where tasks with a delivery history run.
pub(crate) struct Gate {
    pub(crate) concurrency: Arc<Concurrency>,
    /// Child processes; `None` in a worker inside another program.
    isolation: Option<Arc<Isolation>>,
    /// At most one task runs exclusively.
    exclusive: Arc<Semaphore>,
    crash_budget: u32,
}

/// An attempt that may start.
pub(crate) struct Admitted {
    pub(crate) handler: Arc<dyn Handler>,
    pub(crate) permit: Permit,
    /// Held while an exclusive task runs.
    pub(crate) exclusive: Option<OwnedSemaphorePermit>,
}

impl Gate {
    pub(crate) fn new(
        concurrency: Arc<Concurrency>,
        isolation: Option<Arc<Isolation>>,
        crash_budget: u32,
    ) -> Self {
        let exclusive = Arc::new(Semaphore::new(1));
        Self { concurrency, isolation, exclusive, crash_budget }
    }

    /// The child processes, if suspects run in those.
    pub(crate) fn isolation(&self) -> Option<&Arc<Isolation>> {
        self.isolation.as_ref()
    }

    /// Waits until a task with this history may run. `Err` says what becomes of it if it does not run
    /// here: it is given up, another exclusive task is running, or the worker stops.
    pub(crate) async fn admit(
        &self,
        history: &DeliveryHistory,
        handler: Arc<dyn Handler>,
        stop: &CancellationToken,
    ) -> Result<Admitted, Disposition> {
        let isolating = self.isolation.is_some() || handler.is_process();
        let mode = history.run_mode(self.crash_budget, isolating);
        let exclusive = match mode {
            RunMode::GiveUp => {
                let (reason, error) = (DeadReason::Crashed, history.evidence());
                return Err(Disposition::DeadLetter { reason, error });
            }
            RunMode::Normal | RunMode::Isolated => None,
            // A task that is published again gets a new count. So a task that merely waits beside one
            // that kills whole workers is never counted up to the limit.
            RunMode::Exclusive => match Arc::clone(&self.exclusive).try_acquire_owned() {
                Ok(exclusive) => Some(exclusive),
                Err(_) => return Err(Disposition::Again { after: RETURN_DELAY }),
            },
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => Err(Disposition::Requeue),
            place = self.place(history, handler, mode) => {
                let (handler, permit) = place.ok_or(Disposition::Requeue)?;
                Ok(Admitted { handler, permit, exclusive })
            }
        }
    }

    /// A permit, and the handler to run: in a child process if there are any.
    async fn place(
        &self,
        history: &DeliveryHistory,
        handler: Arc<dyn Handler>,
        mode: RunMode,
    ) -> Option<(Arc<dyn Handler>, Permit)> {
        if handler.is_process() {
            return Some((handler, self.concurrency.one().await?));
        }
        let isolation = self.isolation.as_ref().filter(|_| Protection::Isolation.is_enabled());
        let Some(isolation) = isolation else {
            let permit = match mode {
                RunMode::Exclusive => self.concurrency.all().await?,
                RunMode::Normal | RunMode::Isolated | RunMode::GiveUp => {
                    self.concurrency.one().await?
                }
            };
            return Some((handler, permit));
        };
        let child = isolation.reserve().await?;
        let permit = self.concurrency.one().await?;
        let crashes = history.crashes.clone();
        let isolated = Isolated::new(Arc::clone(isolation), child, crashes, self.crash_budget);
        Some((Arc::new(isolated), permit))
    }
}
