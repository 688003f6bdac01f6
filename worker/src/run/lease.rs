//! Leases of attempts that may run longer than the broker waits for an acknowledgement.
//!
//! RabbitMQ takes a delivery back that is not acknowledged within its consumer timeout. An attempt that
//! may run longer is handed over to the collector first (`SettlementBuilder::lease`). Its delivery is
//! acknowledged, and this worker renews the lease while the attempt runs.

use std::time::Duration;

use garenne_common::broker::Link;
use garenne_common::wire::Fence;
use tokio::sync::mpsc;

use crate::intake::source::TaskSource;
use crate::settle::{SettleProgress, Settlement};

/// The share of the consumer timeout that a task may run without a lease.
const SAFE_SHARE: f64 = 0.8;
/// Number of renewals per term, so that one or two may be late.
const RENEWALS: u32 = 3;

/// Which attempts run under a lease, and the terms of it.
pub(crate) struct LeaseTerms {
    /// How long a worker may be silent before its task is given to another one.
    pub(crate) term: Duration,
    /// The consumer timeout in the configuration.
    pub(crate) consumer_timeout: Duration,
    /// Learns the consumer timeout of the broker when that closes a channel because of it.
    pub(crate) link: Option<Link>,
}

impl LeaseTerms {
    /// The execution that begins with this delivery, if its time limit requires a lease.
    pub(crate) fn begin(&self, limit: Duration, source: &TaskSource) -> Option<Fence> {
        let required = limit > self.consumer_timeout().mul_f64(SAFE_SHARE);
        required.then(|| Fence::begin(source.next_fence()))
    }

    /// How long the broker waits for an acknowledgement, as far as known.
    pub(crate) fn consumer_timeout(&self) -> Duration {
        let learnt = self.link.as_ref().and_then(Link::observed_consumer_timeout);
        learnt.map_or(self.consumer_timeout, |learnt| learnt.min(self.consumer_timeout))
    }

    /// Runs an attempt, and renews its lease while it runs.
    pub(crate) async fn renew_during<T>(
        &self,
        attempt: impl Future<Output = T>,
        (settle, progress): (&mpsc::Sender<Settlement>, &SettleProgress),
        renewal: impl Fn() -> Settlement,
    ) -> T {
        let mut attempt = std::pin::pin!(attempt);
        loop {
            tokio::select! {
                ended = &mut attempt => return ended,
                // Does not wait for room: while this waits, the attempt is not polled and cannot be
                // stopped. A broker that takes nothing takes no renewal either.
                () = tokio::time::sleep(self.term / RENEWALS) => {
                    match settle.try_send(renewal()) {
                        Ok(()) => progress.submitted(),
                        Err(error) => tracing::warn!(%error, "lease not renewed"),
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
    fn only_attempts_that_may_exceed_the_consumer_timeout_need_a_lease() {
        let terms = LeaseTerms {
            term: Duration::from_mins(1),
            consumer_timeout: Duration::from_mins(30),
            link: None,
        };
        let source = TaskSource::Message(Box::default());
        let fence = |minutes| terms.begin(Duration::from_mins(minutes), &source);
        assert_eq!(fence(24), None);
        assert_eq!(fence(25).map(|fence| fence.number), Some(1));
    }

    #[tokio::test]
    async fn an_attempt_continues_while_nothing_can_be_settled() {
        let term = Duration::from_millis(30);
        let terms = LeaseTerms { term, consumer_timeout: Duration::ZERO, link: None };
        let renewal = || Settlement::new(Subject::None, Successor::Confirmed);
        // Nothing is received.
        let (settle, _inbox) = mpsc::channel(1);
        let attempt = tokio::time::sleep(term * 3);
        let progress = SettleProgress::default();
        let renewing = terms.renew_during(attempt, (&settle, &progress), renewal);
        tokio::time::timeout(Duration::from_secs(20), renewing).await.unwrap();
        assert_eq!((settle.capacity(), progress.open()), (0, 1), "there was room for one");
    }
}
