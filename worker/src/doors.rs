//! The doors: what a suspect waits for before it runs, and where it then runs.
//!
//! A suspect waits for a place in a child process first and for a slot only then, so that waiting ones
//! occupy nothing, and both lines are fair: suspects and other work cannot starve each other.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use garenne_common::failpoints::Protection;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::handler::{Handler, Slot};
use crate::isolate::{Isolated, Isolation};
use crate::slots::Slots;
use crate::suspect::{Course, RENEWAL, Standing};

/// What attempts of a worker share that have to wait for their turn.
pub(crate) struct Doors {
    pub(crate) slots: Arc<Slots>,
    /// Child processes; a worker inside another program has none.
    isolation: Option<Arc<Isolation>>,
    trial: Arc<Semaphore>,
    crash_budget: u32,
}

/// What becomes of a suspect.
pub(crate) enum Entry {
    Run(Entered),
    /// It comes again, after this time and without a count of deliveries.
    Renew(Duration),
    /// What it needs cannot be started here now; it comes again after this time. The slot is free.
    Refused(Duration, Option<Slot>),
    /// The worker stops.
    HandBack,
    /// It was delivered too often.
    GiveUp(String),
}

/// An attempt that may begin.
pub(crate) struct Entered {
    pub(crate) handler: Arc<dyn Handler>,
    pub(crate) slot: Slot,
    /// Held while it runs.
    pub(crate) trial: Option<OwnedSemaphorePermit>,
}

impl Doors {
    pub(crate) fn new(slots: usize, isolation: Option<Arc<Isolation>>, crash_budget: u32) -> Self {
        let (slots, trial) = (Arc::new(Slots::new(slots)), Arc::new(Semaphore::new(1)));
        Self { slots, isolation, trial, crash_budget }
    }

    /// Whether suspects run in child processes.
    pub(crate) fn isolates(&self) -> bool {
        self.isolation.is_some()
    }

    /// Waits until this suspect may run, or until `stop`.
    pub(crate) async fn enter(
        &self,
        standing: &Standing,
        handler: Arc<dyn Handler>,
        stop: &CancellationToken,
    ) -> Entry {
        let isolating = self.isolation.is_some() || handler.is_process();
        let course = standing.course(self.crash_budget, isolating);
        let trial = match course {
            Course::GiveUp => return Entry::GiveUp(standing.evidence()),
            Course::Usual | Course::Suspect => None,
            // Only the one that runs keeps its count, so whoever merely waits beside a task that
            // kills whole workers is never counted up to the end.
            Course::Trial => match Arc::clone(&self.trial).try_acquire_owned() {
                Ok(trial) => Some(trial),
                Err(_) => return Entry::Renew(RENEWAL),
            },
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => Entry::HandBack,
            place = self.place(standing, handler, course) => match place {
                Some((handler, slot)) => Entry::Run(Entered { handler, slot, trial }),
                None => Entry::HandBack,
            },
        }
    }

    async fn place(
        &self,
        standing: &Standing,
        handler: Arc<dyn Handler>,
        course: Course,
    ) -> Option<(Arc<dyn Handler>, Slot)> {
        if handler.is_process() {
            return Some((handler, self.slots.one().await?));
        }
        let isolation = self.isolation.as_ref().filter(|_| Protection::Isolation.is_enabled());
        let Some(isolation) = isolation else {
            let alone = course == Course::Trial;
            let slot = if alone { self.slots.all().await? } else { self.slots.one().await? };
            return Some((handler, slot));
        };
        let place = isolation.place().await?;
        let slot = self.slots.one().await?;
        let isolated = Isolated {
            isolation: Arc::clone(isolation),
            record: standing.crashes.clone(),
            budget: self.crash_budget,
            place: Mutex::new(Some(place)),
        };
        Some((Arc::new(isolated), slot))
    }
}
