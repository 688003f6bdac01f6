//! Leases, for attempts that may outlast the broker's patience.
//!
//! RabbitMQ takes a delivery back that is not acknowledged within its consumer timeout. An attempt
//! that may run longer is handed over to the collector first (`Signature::lease`), its delivery is
//! acknowledged, and this worker says from time to time that it goes on.

use std::time::Duration;

use garenne_common::broker::Link;
use garenne_common::wire::{Fence, Message, lease};
use tokio::sync::mpsc;

use crate::settle::Settlement;

/// A task may use so much of the broker's patience without a lease.
const SAFE_SHARE: f64 = 0.8;
/// Renewals in a term, so that one or two may come late.
const RENEWALS: u32 = 3;

/// Who runs under a lease, and for how long at a time.
pub(crate) struct LeaseTerms {
    /// How long a worker may be silent before its task is given to another one.
    pub(crate) term: Duration,
    /// How long the broker waits for an acknowledgement.
    pub(crate) patience: Duration,
    /// Over which the broker may have said that it waits less long than that.
    pub(crate) link: Option<Link>,
}

impl LeaseTerms {
    /// The execution that this delivery begins, if its time limit asks for a lease.
    pub(crate) fn fence(&self, limit: Duration, message: &Message) -> Option<Fence> {
        let needed = limit > self.patience().mul_f64(SAFE_SHARE);
        // What cannot be read counts as none: a lower fence costs a repeat and loses nothing.
        needed.then(|| Fence::begin(lease::next_fence(message).unwrap_or(1)))
    }

    fn patience(&self) -> Duration {
        let learnt = self.link.as_ref().and_then(Link::learnt_consumer_timeout);
        learnt.map_or(self.patience, |learnt| learnt.min(self.patience))
    }

    /// Waits for an attempt, and sends a renewal from time to time while it runs.
    pub(crate) async fn renewing<T>(
        &self,
        attempt: impl Future<Output = T>,
        settle: &mpsc::Sender<Settlement>,
        renewal: impl Fn() -> Settlement,
    ) -> T {
        let mut attempt = std::pin::pin!(attempt);
        loop {
            tokio::select! {
                ended = &mut attempt => return ended,
                () = tokio::time::sleep(self.term / RENEWALS) => {
                    if settle.send(renewal()).await.is_err() {
                        tracing::error!("nobody settles any more; the lease will lapse");
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_outlast_the_broker_needs_a_lease() {
        let terms = LeaseTerms {
            term: Duration::from_mins(1),
            patience: Duration::from_mins(30),
            link: None,
        };
        let fence = |minutes| terms.fence(Duration::from_mins(minutes), &Message::default());
        assert_eq!(fence(24), None);
        assert_eq!(fence(25).map(|fence| fence.number), Some(1));
    }
}
