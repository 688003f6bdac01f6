//! One connection, opened on demand and again after it was lost.
//!
//! There is no supervising task: whoever needs a channel requests one, and the first request after
//! a loss reconnects for all. How long to wait between attempts is decided by the caller
//! ([`Backoff`](super::backoff::Backoff)).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use lapin::uri::AMQPUri;
use lapin::{Channel, Connection, ConnectionProperties, ConnectionStatus};
use parking_lot::RwLock;
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

use super::{BrokerError, transport};
use crate::config::{BrokerConfig, BrokerUrl};

/// One connection to the broker, under a name that the management UI shows. Clones share it.
#[derive(Clone)]
pub struct Link(Arc<LinkState>);

struct LinkState {
    config: BrokerConfig,
    name: String,
    /// Index of the URL to try first. It starts at random, so that many processes spread over a
    /// cluster, and moves on when a URL does not answer and when its connection is lost.
    next_url: AtomicUsize,
    closed: AtomicBool,
    /// The status of the present connection, readable while another task connects; see
    /// [`Link::is_blocked`].
    status: RwLock<Option<ConnectionStatus>>,
    /// Milliseconds, 0 if unknown; see [`Link::observed_consumer_timeout`].
    consumer_timeout: AtomicU64,
    /// Locked while connecting, so that concurrent requests make one connection.
    connection: Mutex<Option<Connection>>,
}

/// RabbitMQ's own limit. With a smaller one it would still send the long headers of a foreign
/// client in one frame, which ends the connection. lapin allocates two buffers of 32 frames: if it
/// knows the size before the broker names it they are untouched memory, else 8 MiB are written with
/// zeros.
const FRAME_BYTES: u32 = 128 * 1024;

/// How long the broker may take to confirm the end of a connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

impl Link {
    /// A link that has not connected yet. The management UI shows `name`.
    pub fn new(config: &BrokerConfig, name: &str) -> Self {
        Self(Arc::new(LinkState {
            config: config.clone(),
            name: name.to_owned(),
            next_url: AtomicUsize::new(fastrand::usize(..config.urls.len().max(1))),
            closed: AtomicBool::new(false),
            status: RwLock::new(None),
            consumer_timeout: AtomicU64::new(0),
            connection: Mutex::new(None),
        }))
    }

    /// Connects now, trying each URL once.
    ///
    /// Fails with the error of the last URL.
    pub async fn open(&self) -> Result<(), BrokerError> {
        self.channel().await.map(drop)
    }

    /// Opens a channel, on a new connection if the old one was lost.
    ///
    /// A task of its own does so: a caller that is not polled for a while must not hold the lock
    /// that all users of the connection need.
    pub(super) async fn channel(&self) -> Result<Channel, BrokerError> {
        let link = self.clone();
        let opening = tokio::spawn(async move { link.open_channel().await });
        match AbortOnDropHandle::new(opening).await {
            Ok(channel) => channel,
            Err(error) => Err(BrokerError::Lost(format!("opening a channel failed: {error}"))),
        }
    }

    async fn open_channel(&self) -> Result<Channel, BrokerError> {
        let mut current = self.0.connection.lock().await;
        if self.is_closed() {
            return Err(BrokerError::Closed);
        }
        if let Some(connection) = &*current {
            match self.within_timeout(connection.create_channel()).await {
                Ok(channel) => return Ok(channel),
                // A new connection would end the channels in use on this one, and their owners
                // would soon end those on the new one.
                Err(error @ BrokerError::LimitReached { .. }) => return Err(error),
                Err(_) => {}
            }
            *current = None;
            // Another connection to the same node is likely to fail as well.
            self.0.next_url.fetch_add(1, Ordering::Relaxed);
        }
        let connection = self.connect().await?;
        *self.0.status.write() = Some(connection.status().clone());
        let channel = self.within_timeout(connection.create_channel()).await;
        *current = Some(connection);
        channel
    }

    /// Whether the broker has stopped reading what this connection publishes
    /// (`connection.blocked`).
    pub(super) fn is_blocked(&self) -> bool {
        let status = self.0.status.read();
        status.as_ref().is_some_and(|status| status.connected() && status.blocked())
    }

    /// The broker's consumer timeout, if it has ever named it in an error.
    pub fn observed_consumer_timeout(&self) -> Option<Duration> {
        let millis = self.0.consumer_timeout.load(Ordering::Relaxed);
        (millis > 0).then(|| Duration::from_millis(millis))
    }

    /// Remembers the consumer timeout that an error names.
    pub(super) fn observe(&self, error: &BrokerError) {
        if let BrokerError::ConsumerTimeout(Some(timeout)) = error {
            let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            self.0.consumer_timeout.store(millis, Ordering::Relaxed);
        }
    }

    pub(super) fn config(&self) -> &BrokerConfig {
        &self.0.config
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }

    /// Closes the connection; later requests for channels fail with [`BrokerError::Closed`]. The
    /// broker requeues unacknowledged deliveries.
    pub async fn close(&self) {
        self.0.closed.store(true, Ordering::Release);
        if let Some(connection) = self.0.connection.lock().await.take() {
            let closing = connection.close(200, "bye".into());
            // A blocked or dead connection would not answer; the broker notices its end anyway.
            if !matches!(tokio::time::timeout(CLOSE_TIMEOUT, closing).await, Ok(Ok(()))) {
                tracing::debug!(link = self.0.name, "the connection was not closed cleanly");
            }
        }
    }

    async fn within_timeout(
        &self,
        channel: impl Future<Output = lapin::Result<Channel>>,
    ) -> Result<Channel, BrokerError> {
        match tokio::time::timeout(self.0.config.connect_timeout, channel).await {
            Ok(channel) => channel.map_err(|error| BrokerError::operating(&error, "a channel")),
            Err(_) => Err(BrokerError::Lost("no response to the opening of a channel".to_owned())),
        }
    }

    async fn connect(&self) -> Result<Connection, BrokerError> {
        let urls = &self.0.config.urls;
        let mut last = BrokerError::Lost("no broker URL is configured".to_owned());
        for _ in urls {
            let next = self.0.next_url.load(Ordering::Relaxed);
            let url = &urls[next % urls.len()];
            match self.connect_to(url).await {
                Ok(connection) => {
                    tracing::debug!(%url, name = self.0.name, "connected");
                    return Ok(connection);
                }
                Err(error) => {
                    self.0.next_url.store(next.wrapping_add(1), Ordering::Relaxed);
                    last = error;
                }
            }
        }
        Err(last)
    }

    async fn connect_to(&self, url: &BrokerUrl) -> Result<Connection, BrokerError> {
        let config = &self.0.config;
        let failed = |cause: String| BrokerError::Unreachable { url: url.to_string(), cause };
        let uri = self.uri(url).map_err(failed)?;
        let properties = ConnectionProperties::default()
            .with_connection_name(self.0.name.as_str().into())
            .with_client_property("product".into(), "Garenne".into())
            .with_client_property("version".into(), crate::VERSION.into());
        let connecting = transport::connect(uri, properties);
        match tokio::time::timeout(config.connect_timeout, connecting).await {
            Ok(connection) => connection.map_err(|error| BrokerError::connecting(&error, url)),
            Err(_) => Err(failed(format!("no answer within {:?}", config.connect_timeout))),
        }
    }

    /// The URL as lapin takes it, with the settings that it does not name.
    fn uri(&self, url: &BrokerUrl) -> Result<AMQPUri, String> {
        let mut uri: AMQPUri = url.expose().parse()?;
        // lapin's parser ignores an IPv6 address, and lapin would connect to this machine.
        let (host, _) = url.address();
        if host.contains(':') {
            uri.authority.host = host;
        }
        // Never 0: lapin would take over the broker's interval instead of disabling heartbeats.
        let heartbeat = u16::try_from(self.0.config.heartbeat.as_secs()).unwrap_or(u16::MAX);
        uri.query.heartbeat.get_or_insert(heartbeat.max(1));
        uri.query.frame_max.get_or_insert(FRAME_BYTES);
        Ok(uri)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn the_heartbeat_is_that_of_the_url_or_of_the_configuration_and_never_zero() {
        for (url, configured, heartbeat) in [
            ("amqp://host?heartbeat=3", Duration::from_secs(10), 3),
            ("amqp://host", Duration::from_secs(10), 10),
            ("amqp://host", Duration::from_millis(500), 1),
        ] {
            let mut config = Config::with_broker(url, "garenne").unwrap().broker;
            config.heartbeat = configured;
            let uri = Link::new(&config, "test").uri(&config.urls[0]).unwrap();
            assert_eq!(uri.query.heartbeat, Some(heartbeat), "{url}");
        }
    }
}
