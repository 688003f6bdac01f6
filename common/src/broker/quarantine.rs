//! Taking a message out of the way that the client library cannot parse.
//!
//! AMQP's short strings are UTF-8 by the book, RabbitMQ does not check them, and lapin ends the
//! connection over one that is not. Such a message at the head of a queue would end every consumer of
//! it for ever. It cannot be read, but it can be counted off: fetch messages one by one until one ends
//! the connection, then, over a new connection, fetch as many again and reject the last without having
//! seen it. The broker dead-letters it whole.

use std::time::Duration;

use lapin::Channel;
use lapin::options::{BasicGetOptions, BasicNackOptions};

use super::convert::short;
use super::{BrokerError, Link};

/// For one message; a broker that is slower than this is left alone.
const PATIENCE: Duration = Duration::from_secs(5);
/// For the rejection to leave before the connection ends over the message, and for the broker to
/// notice an end.
const LINGER: Duration = Duration::from_millis(300);
/// At most so often the queue is looked at before something is rejected.
const LOOKS: u32 = 4;

/// Looks at the first `depth` messages of a queue and rejects the first that cannot be parsed.
///
/// `true` if one was rejected; `false` if there was none, or if the head of the queue did not keep
/// still. What else was fetched goes back.
///
/// A sound message can be rejected in its stead when another consumer, or another unreadable message,
/// changes the order in the last moment. So whoever reads the dead letters sends back what was rejected
/// and can be parsed after all: nobody else rejects.
pub(super) async fn reject_unreadable(
    link: &Link,
    queue: &str,
    depth: u64,
) -> Result<bool, BrokerError> {
    // What comes back queues up behind what came back before. So the first look changes the order, and
    // after a second one a single culprit is last and keeps its place. Several culprits go round and
    // round; a number of looks by chance keeps them from going round in step with us.
    let mut place = None;
    for _ in 0..fastrand::u32(2..=LOOKS) {
        place = on_own_connection(link, async |channel| find(channel, queue, depth).await).await?;
        if place.is_none() {
            return Ok(false);
        }
        // The broker needs a moment to see that the connection is gone and to take everything back.
        tokio::time::sleep(LINGER).await;
    }
    let Some(place) = place else { return Ok(false) };
    on_own_connection(link, async |channel| reject(channel, queue, place).await).await
}

/// The work may end its connection, and what it fetched goes back when the connection is closed.
async fn on_own_connection<T>(
    link: &Link,
    work: impl AsyncFnOnce(&Channel) -> Result<T, BrokerError>,
) -> Result<T, BrokerError> {
    let link = link.sibling("quarantine");
    let done = match link.channel().await {
        Ok(channel) => work(&channel).await,
        Err(error) => Err(error),
    };
    link.close().await;
    done
}

/// The place, from 1, of the first message that ends the connection; `None` if there is no such one.
async fn find(channel: &Channel, queue: &str, depth: u64) -> Result<Option<u64>, BrokerError> {
    for place in 1..=depth {
        match get(channel, queue).await {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            Err(BrokerError::Unreadable) => return Ok(Some(place)),
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Fetches the messages before `place` and rejects the one there.
///
/// The rejection is written right behind the request for the message: by the time it arrives here and
/// ends the connection, the broker has read both. Delivery numbers count from 1 on each channel.
async fn reject(channel: &Channel, queue: &str, place: u64) -> Result<bool, BrokerError> {
    for _ in 1..place {
        if !get(channel, queue).await? {
            return Ok(false);
        }
    }
    let reject = async {
        let options = BasicNackOptions { multiple: false, requeue: false };
        let rejected = channel.basic_nack(place, options).await;
        tokio::time::sleep(LINGER).await;
        rejected.map_err(|error| BrokerError::operating(&error, queue))
    };
    // In this order: `join` polls the request first, and each writes when it is first polled.
    let (fetched, rejected) = tokio::join!(get(channel, queue), reject);
    tracing::debug!(queue, place, ?fetched, "rejected unseen");
    rejected?;
    Ok(matches!(fetched, Err(BrokerError::Unreadable)))
}

/// Fetches one message and leaves it unsettled; whether there was one.
async fn get(channel: &Channel, queue: &str) -> Result<bool, BrokerError> {
    let fetched = channel.basic_get(short(queue)?, BasicGetOptions { no_ack: false });
    tokio::select! {
        biased;
        fetched = fetched => fetched
            .map(|message| message.is_some())
            .map_err(|error| BrokerError::operating(&error, queue)),
        // The request itself is never answered when its answer cannot be parsed.
        () = until_closed(channel) => Err(BrokerError::Unreadable),
        () = tokio::time::sleep(PATIENCE) => {
            Err(BrokerError::Lost("no answer to a basic.get".to_owned()))
        }
    }
}

async fn until_closed(channel: &Channel) {
    while channel.status().connected() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
