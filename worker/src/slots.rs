//! Slots: how many attempts run at once, and which slots are lost to handlers that never return.
//!
//! A thread cannot be stopped from outside. A blocking handler that goes on after its attempt has ended
//! keeps its slot, so that a worker whose handlers hang shows fewer slots instead of more and more
//! threads; here that becomes visible.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::TaskMessage;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long a handler may take to notice that its attempt is over.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often a lost slot is spoken of again.
const REMINDER: Duration = Duration::from_mins(10);

/// The slot that an attempt occupies. Whoever still computes holds it.
pub(crate) type Slot = Arc<Held>;

/// One slot, or all of them; free again when dropped.
#[derive(Debug)]
pub(crate) struct Held {
    _permit: OwnedSemaphorePermit,
    free: DropGuard,
}

/// All slots of a worker.
#[derive(Debug)]
pub(crate) struct Slots {
    semaphore: Arc<Semaphore>,
    count: u32,
    lost: watch::Sender<u32>,
    patience: Duration,
}

impl Slots {
    pub(crate) fn new(count: usize) -> Self {
        let lost = watch::Sender::new(0);
        let bounded = u32::try_from(count).unwrap_or(u32::MAX);
        let semaphore = Arc::new(Semaphore::new(count));
        Self { semaphore, count: bounded, lost, patience: PATIENCE }
    }

    /// The next free slot; whoever asked first gets it first. `None` never happens while this lives.
    pub(crate) async fn one(&self) -> Option<Slot> {
        self.several(1).await
    }

    /// All slots together that are not lost: whoever holds them runs alone.
    ///
    /// Asked for anew when another one is lost, which would never come: everybody who wants a slot
    /// stands behind this.
    pub(crate) async fn all(&self) -> Option<Slot> {
        let mut lost = self.lost.subscribe();
        loop {
            let count = self.count.saturating_sub(*lost.borrow_and_update()).max(1);
            tokio::select! {
                slots = self.several(count) => return slots,
                Ok(()) = lost.changed() => {}
            }
        }
    }

    async fn several(&self, count: u32) -> Option<Slot> {
        let permit = Arc::clone(&self.semaphore).acquire_many_owned(count).await.ok()?;
        Some(Arc::new(Held { _permit: permit, free: CancellationToken::new().drop_guard() }))
    }

    /// Slots that nobody occupies.
    pub(crate) fn free(&self) -> usize {
        self.semaphore.available_permits()
    }

    pub(crate) fn count(&self) -> usize {
        usize::try_from(self.count).unwrap_or(usize::MAX)
    }

    /// Slots of attempts that are under way.
    pub(crate) fn busy(&self) -> usize {
        let held = self.count().saturating_sub(self.semaphore.available_permits());
        held.saturating_sub(self.lost())
    }

    /// Slots whose handlers go on although their attempts have ended.
    pub(crate) fn lost(&self) -> usize {
        usize::try_from(*self.lost.borrow()).unwrap_or(usize::MAX)
    }

    /// Watches the slot of an attempt that was given up, until it is free or `stop`.
    ///
    /// `free` is of that slot ([`freed`]). Says nothing if it is free soon, as it should be.
    pub(crate) async fn watch(
        &self,
        task: &TaskMessage,
        free: CancellationToken,
        stop: &CancellationToken,
    ) {
        if quiet(&free, stop, self.patience).await.is_some() {
            return;
        }
        let since = Instant::now();
        let (id, name) = (&task.id, &task.name);
        self.lost.send_modify(|lost| *lost += 1);
        let freed = loop {
            let (lost, of) = (self.lost(), self.count);
            tracing::error!(
                %id, %name, lost, of, stuck_for = ?since.elapsed() + self.patience,
                "a blocking handler does not return although its attempt is over; its slot is lost \
                 until it does"
            );
            if let Some(freed) = quiet(&free, stop, REMINDER).await {
                break freed;
            }
        };
        self.lost.send_modify(|lost| *lost -= 1);
        if freed {
            let (lost, of) = (self.lost(), self.count);
            tracing::warn!(%id, %name, lost, of, "a stuck handler has returned; its slot is free again");
        }
    }
}

/// What completes when a slot is free, without holding it.
pub(crate) fn freed(slot: &Slot) -> CancellationToken {
    slot.free.token().clone()
}

/// Waits for the slot (`Some(true)`), the stop (`Some(false)`) or the time (`None`).
async fn quiet(free: &CancellationToken, stop: &CancellationToken, time: Duration) -> Option<bool> {
    tokio::select! {
        () = free.cancelled() => Some(true),
        () = stop.cancelled() => Some(false),
        () = tokio::time::sleep(time) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::context::Context;

    #[tokio::test]
    async fn a_slot_is_lost_after_a_while_and_found_again() {
        let slots = Arc::new(Slots { patience: Duration::from_millis(50), ..Slots::new(2) });
        let slot = slots.one().await.unwrap();
        let free = freed(&slot);
        let watcher = tokio::spawn({
            let slots = Arc::clone(&slots);
            async move {
                let context = Context::of_args("null");
                slots.watch(context.task(), free, &CancellationToken::new()).await;
            }
        });
        assert_eq!(slots.lost(), 0, "a handler may take a moment to notice");
        while slots.lost() == 0 {
            tokio::task::yield_now().await;
        }
        drop(slot);
        watcher.await.unwrap();
        assert_eq!(slots.lost(), 0);
        drop(slots.all().await.unwrap());
    }

    #[tokio::test]
    async fn whoever_holds_all_is_alone() {
        let slots = Slots::new(3);
        let all = slots.all().await.unwrap();
        let second = Duration::from_millis(20);
        assert!(tokio::time::timeout(second, slots.one()).await.is_err());
        drop(all);
        assert!(tokio::time::timeout(second, slots.one()).await.is_ok());
    }

    #[tokio::test]
    async fn who_wants_all_does_not_wait_for_lost_ones_and_keeps_nobody_waiting() {
        let slots = Arc::new(Slots { patience: Duration::from_millis(20), ..Slots::new(2) });
        let stuck = slots.one().await.unwrap();
        let (all, stop) = (slots.all(), CancellationToken::new());
        let context = Context::of_args("null");
        let watching = slots.watch(context.task(), freed(&stuck), &stop);
        tokio::select! {
            all = all => drop(all.unwrap()),
            () = watching => unreachable!("nobody frees it"),
        }
        drop(slots.one().await.unwrap());
        assert_eq!(slots.lost(), 1);
    }
}
