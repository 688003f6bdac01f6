//! What a process manager does: starts services again that have died.

use std::time::Duration;

use futures_util::future::join_all;

use super::Service;

/// Longer than any test.
const EVER: Duration = Duration::from_hours(24);

/// Keeps `count` services running, each started again as soon as it has ended; completes never.
///
/// They are killed when this future is dropped.
pub(crate) async fn supervise<'a>(count: usize, service: impl Fn(usize) -> Service<'a>) {
    let keep = async |number: usize| loop {
        service(number).spawn().ended(EVER).await;
    };
    join_all((1..=count).map(keep)).await;
}
