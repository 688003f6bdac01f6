//! What waits in queues that no worker serves.

use garenne_common::broker::Admin;

use super::super::context::Context;
use super::{Check, Verdict};

/// Queues that the collector empties: what lies there waits for it.
pub(super) async fn backlogs(context: &Context, admin: &Admin) -> Vec<Check> {
    let topology = context.config.broker.topology();
    let mut checks = vec![];
    for (name, queue) in [
        ("results", topology.results()),
        ("dead letters", topology.dead()),
        ("unrouted", topology.unrouted()),
    ] {
        checks.push(match admin.queue_status(&queue).await {
            // The check of the topology has named it already.
            Ok(None) => continue,
            Ok(Some(status)) if status.ready == 0 => {
                Check::good(name, "none wait for the collector")
            }
            Ok(Some(status)) if status.consumers == 0 => {
                let detail = format!("{} wait in {queue}, and no collector consumes", status.ready);
                Check::new(name, Verdict::Bad, detail).advice("start one: garenne-collector")
            }
            Ok(Some(status)) => {
                let detail = format!("{} wait in {queue} for the collector", status.ready);
                Check::new(name, Verdict::Odd, detail)
                    .advice("normal under load; if it does not shrink, look at the collector's log")
            }
            Err(error) => Check::bad(name, error.into()),
        });
    }
    checks.extend(unreadable(admin, &topology.unreadable()).await);
    checks
}

/// Nobody empties this queue; what lies there, somebody should look at.
async fn unreadable(admin: &Admin, queue: &str) -> Option<Check> {
    let ready = admin.queue_status(queue).await.ok()??.ready;
    (ready > 0).then(|| {
        let detail = format!("{ready} in {queue} that the broker gave up");
        Check::new("unreadable", Verdict::Bad, detail)
            .advice("look at them in the management UI, mend their sender, and purge the queue")
    })
}
