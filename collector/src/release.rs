//! Lets parked tasks go: back to their queue when a worker that knows them is alive, or to their end
//! when somebody has cancelled them.
//!
//! Slowly enough that a mistake does no harm: a slice at each look. A task that comes back, because
//! another worker of its queue took it and does not know it, waits longer each time (`store::parked`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::broker::Consumer;
use garenne_common::wire::Heartbeat;
use tokio::sync::Notify;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::live::Live;
use crate::replies::Replies;
use crate::store::{Store, StoreError};

/// Heartbeats between the connection and the reader.
pub(crate) const HEARTBEATS_BUFFER: u16 = 256;
/// How often parked tasks are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How many are let go at one look: 500 a second, which no broker minds.
const SLICE: usize = 250;
/// How many kinds of parked tasks are looked at.
const KINDS: usize = 1_000;

pub(crate) struct Releaser<S> {
    pub(crate) store: S,
    pub(crate) heartbeats: Consumer,
    pub(crate) tasks_exchange: String,
    pub(crate) resends_filled: Arc<Notify>,
    pub(crate) outbox_filled: Arc<Notify>,
    pub(crate) replies: Replies,
    /// Somebody has cancelled something.
    pub(crate) cancelled: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

impl<S: Store> Releaser<S> {
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.look_forever()).await;
    }

    async fn look_forever(mut self) {
        let mut live = Live::default();
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                heartbeat = self.heartbeats.next() => {
                    let Some(delivery) = heartbeat else { return };
                    match Heartbeat::decode(&delivery.message) {
                        Ok(heartbeat) => {
                            let sender = delivery.message.properties.user_id.as_deref();
                            live.hear(sender, heartbeat, Instant::now());
                        }
                        Err(error) => tracing::debug!(%error, "a heartbeat cannot be read"),
                    }
                    continue;
                }
                _ = tick.tick() => {}
                () = self.cancelled.notified() => {}
            }
            live.prune(Instant::now());
            if let Err(error) = self.look(&live).await {
                tracing::warn!("parked tasks were not looked at: {error}");
            }
        }
    }

    async fn look(&self, live: &Live) -> Result<(), StoreError> {
        self.end_cancelled().await?;
        let mut room = SLICE;
        for kind in self.store.parked_kinds(KINDS).await? {
            if room == 0 {
                return Ok(());
            }
            if !live.knows(&kind.0, &kind.1) {
                continue;
            }
            let exchange = self.tasks_exchange.clone();
            let (queue, name) = (kind.0.clone(), kind.1.clone());
            let released = self.store.release(kind, exchange, room).await?;
            if released > 0 {
                tracing::info!(released, %queue, %name, "parked tasks go back: a worker knows them");
                self.resends_filled.notify_one();
            }
            room = room.saturating_sub(released);
        }
        Ok(())
    }

    /// Nobody runs a parked task, so nobody else can end it.
    async fn end_cancelled(&self) -> Result<(), StoreError> {
        let ended = self.store.end_cancelled_parked(SLICE).await?;
        if ended.notices > 0 {
            self.outbox_filled.notify_one();
        }
        for letter in &ended.letters {
            self.replies.tell(letter);
        }
        Ok(())
    }
}
