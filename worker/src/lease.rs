//! Leases, for attempts that may outlast the broker's patience.
//!
//! RabbitMQ takes a delivery back that is not acknowledged within its consumer timeout. An attempt
//! that may run longer is handed over to the collector first (`Signature::lease`), its delivery is
//! acknowledged, and this worker says from time to time that it goes on.

use std::time::Duration;

use garenne_common::broker::Link;
use garenne_common::wire::Fence;
use tokio::sync::mpsc;

use crate::settle::{Carrier, SettleGauge, Settlement};

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
    pub(crate) fn fence(&self, limit: Duration, carrier: &Carrier) -> Option<Fence> {
        let needed = limit > self.patience().mul_f64(SAFE_SHARE);
        needed.then(|| Fence::begin(carrier.next_fence()))
    }

    pub(crate) fn patience(&self) -> Duration {
        let learnt = self.link.as_ref().and_then(Link::learnt_consumer_timeout);
        learnt.map_or(self.patience, |learnt| learnt.min(self.patience))
    }

    /// Waits for an attempt, and sends a renewal from time to time while it runs.
    pub(crate) async fn renewing<T>(
        &self,
        attempt: impl Future<Output = T>,
        (settle, gauge): (&mpsc::Sender<Settlement>, &SettleGauge),
        renewal: impl Fn() -> Settlement,
    ) -> T {
        let mut attempt = std::pin::pin!(attempt);
        loop {
            tokio::select! {
                ended = &mut attempt => return ended,
                // Without waiting for room: whoever waits here keeps the attempt from going on, and
                // from being stopped. A broker that takes nothing takes no renewal either.
                () = tokio::time::sleep(self.term / RENEWALS) => {
                    match settle.try_send(renewal()) {
                        Ok(()) => gauge.submit(),
                        Err(error) => tracing::warn!(%error, "a lease is not renewed"),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settle::{Subject, Successor};

    #[test]
    fn only_what_may_outlast_the_broker_needs_a_lease() {
        let terms = LeaseTerms {
            term: Duration::from_mins(1),
            patience: Duration::from_mins(30),
            link: None,
        };
        let carrier = Carrier::Bundle { app_id: "test".into() };
        let fence = |minutes| terms.fence(Duration::from_mins(minutes), &carrier);
        assert_eq!(fence(24), None);
        assert_eq!(fence(25).map(|fence| fence.number), Some(1));
    }

    #[tokio::test]
    async fn an_attempt_goes_on_while_nothing_can_be_settled() {
        let term = Duration::from_millis(30);
        let terms = LeaseTerms { term, patience: Duration::ZERO, link: None };
        let renewal = || Settlement::bare(Subject::Nothing, Successor::Confirmed);
        // Nobody takes anything out.
        let (settle, _inbox) = mpsc::channel(1);
        let attempt = tokio::time::sleep(term * 3);
        let gauge = SettleGauge::default();
        let renewing = terms.renewing(attempt, (&settle, &gauge), renewal);
        tokio::time::timeout(Duration::from_secs(20), renewing).await.unwrap();
        assert_eq!((settle.capacity(), gauge.open()), (0, 1), "one had room");
    }
}
