//! Releases parked tasks: to their queue when a worker with a handler is alive, or to their end when they are
//! cancelled.
//!
//! At a limited rate, so that a mistake does no harm. A task that is parked again, since another worker of its
//! queue received it and has no handler, waits longer each time (`store::parked`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::broker::Consumer;
use garenne_common::wire::Heartbeat;
use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::control::worker_registry::WorkerRegistry;
use crate::ingest::unrouted_replies::UnroutedReplies;
use crate::store::{Store, StoreError};

/// Number of heartbeats that wait for this task.
pub(crate) const HEARTBEATS_BUFFER: u16 = 256;
/// How often parked tasks are checked.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Maximum number of tasks released per check: 500 per second.
const SLICE: usize = 250;
/// Maximum number of pairs of queue and task name per check.
const MAX_KINDS: usize = 1_000;

/// The task that releases parked tasks.
pub(crate) struct Releaser<S> {
    pub(crate) store: S,
    pub(crate) heartbeats: Consumer,
    pub(crate) tasks_exchange: String,
    pub(crate) resends_filled: Arc<Notify>,
    pub(crate) outbox_filled: Arc<Notify>,
    pub(crate) replies: UnroutedReplies,
    /// Fires after a cancel request.
    pub(crate) cancelled: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

impl<S: Store> Releaser<S> {
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.check_forever()).await;
    }

    async fn check_forever(mut self) {
        let mut workers = WorkerRegistry::default();
        let mut tick = tokio::time::interval(POLL_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                heartbeat = self.heartbeats.next() => {
                    let Some(delivery) = heartbeat else { return };
                    match Heartbeat::decode(&delivery.message) {
                        Ok(heartbeat) => {
                            let sender = delivery.message.properties.user_id.as_deref();
                            workers.record(sender, heartbeat, Instant::now());
                        }
                        Err(error) => tracing::debug!(%error, "invalid heartbeat"),
                    }
                    continue;
                }
                _ = tick.tick() => {}
                () = self.cancelled.notified() => {}
            }
            workers.prune(Instant::now());
            if let Err(error) = self.check(&workers).await {
                tracing::warn!("parked tasks were not checked: {error}");
            }
        }
    }

    async fn check(&self, workers: &WorkerRegistry) -> Result<(), StoreError> {
        self.end_cancelled().await?;
        let mut left = SLICE;
        for kind in self.store.parked_kinds(MAX_KINDS).await? {
            if left == 0 {
                return Ok(());
            }
            if !workers.has_handler(&kind.0, &kind.1) {
                continue;
            }
            let exchange = self.tasks_exchange.clone();
            let (queue, name) = (kind.0.clone(), kind.1.clone());
            let released = self.store.release(kind, exchange, left).await?;
            if released > 0 {
                tracing::info!(released, %queue, %name, "parked tasks released: a worker has a handler");
                self.resends_filled.notify_one();
            }
            left = left.saturating_sub(released);
        }
        Ok(())
    }

    /// Ends cancelled parked tasks: no worker has them.
    async fn end_cancelled(&self) -> Result<(), StoreError> {
        let ended = self.store.end_cancelled_parked(SLICE).await?;
        if ended.notices > 0 {
            self.outbox_filled.notify_one();
        }
        for letter in &ended.letters {
            self.replies.reply(letter);
        }
        Ok(())
    }
}
