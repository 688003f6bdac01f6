//! The queues that no worker consumes: results, dead letters, unrouted tasks, and messages that the
//! broker gave up.

use garenne_common::broker::Admin;

use super::check::{Check, Verdict};
use crate::context::Context;

/// Checks the queues that the collector consumes: messages there wait for it.
pub(super) async fn backlogs(context: &Context, admin: &Admin) -> Vec<Check> {
    let topology = context.config.broker.topology();
    let mut checks = vec![];
    for (name, queue) in [
        ("results", topology.results()),
        ("dead letters", topology.dead()),
        ("unrouted", topology.unrouted()),
    ] {
        checks.push(match admin.queue_status(&queue).await {
            // Reported by the check of the topology.
            Ok(None) => continue,
            Ok(Some(status)) if status.ready == 0 => {
                Check::good(name, "none wait for the collector")
            }
            Ok(Some(status)) if status.consumers == 0 => {
                let detail =
                    format!("{} wait in {queue}, and no collector consumes it", status.ready);
                Check::new(name, Verdict::Bad, detail).advice("start one: garenne-collector")
            }
            Ok(Some(status)) => {
                let detail = format!("{} wait in {queue} for the collector", status.ready);
                Check::new(name, Verdict::Odd, detail).advice(
                    "normal under load; if the number does not fall, look at the collector's log",
                )
            }
            Err(error) => Check::bad(name, error.into()),
        });
    }
    checks.extend(unreadable(admin, &topology.unreadable()).await);
    checks
}

/// Nothing consumes this queue: messages in it need a person.
async fn unreadable(admin: &Admin, queue: &str) -> Option<Check> {
    let ready = admin.queue_status(queue).await.ok()??.ready;
    (ready > 0).then(|| {
        let detail = format!("{ready} messages in {queue} that the broker gave up");
        Check::new("unreadable", Verdict::Bad, detail)
            .advice("look at them in the management UI, correct their sender, and purge the queue")
    })
}
