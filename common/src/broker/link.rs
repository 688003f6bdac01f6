//! One connection, opened when needed and again when it is gone.
//!
//! There is no supervising task: whoever needs a channel asks for one, and the first to ask after a
//! loss reconnects for all. Who waits how long between attempts is the asker's business ([`Pause`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use backon::BackoffBuilder;
use lapin::uri::AMQPUri;
use lapin::{Channel, Connection, ConnectionProperties};
use tokio::sync::Mutex;

use super::{BrokerError, transport};
use crate::config::{BrokerConfig, BrokerUrl};

/// One connection to the broker under a name that the management UI shows. Clones share it.
#[derive(Clone)]
pub struct Link(Arc<Shared>);

struct Shared {
    config: BrokerConfig,
    name: String,
    /// Which URL to try first; moves on when one does not answer.
    turn: AtomicUsize,
    closed: AtomicBool,
    /// Locked while connecting, so that a hundred askers make one connection.
    current: Mutex<State>,
}

enum State {
    Down,
    Up(Arc<Connection>),
}

impl Link {
    /// A link that has not connected yet. `name` is what people see in the management UI.
    pub fn new(config: &BrokerConfig, name: &str) -> Self {
        Self(Arc::new(Shared {
            config: config.clone(),
            name: name.to_owned(),
            turn: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            current: Mutex::new(State::Down),
        }))
    }

    /// Connects now, trying each URL once; for whoever wants to know before going on.
    pub async fn open(&self) -> Result<(), BrokerError> {
        self.channel().await.map(drop)
    }

    /// A new channel, on a new connection if the old one is gone.
    pub(super) async fn channel(&self) -> Result<Channel, BrokerError> {
        let mut state = self.0.current.lock().await;
        if self.is_closed() {
            return Err(BrokerError::Closed);
        }
        if let State::Up(connection) = &*state {
            if let Ok(channel) = self.within(connection.create_channel()).await {
                return Ok(channel);
            }
            *state = State::Down;
        }
        let connection = self.connect().await?;
        let channel = self.within(connection.create_channel()).await;
        *state = State::Up(Arc::new(connection));
        channel
    }

    /// Whether the broker has stopped taking what this connection publishes.
    pub(super) async fn is_blocked(&self) -> bool {
        match &*self.0.current.lock().await {
            State::Up(connection) => connection.status().blocked(),
            State::Down => false,
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }

    /// Closes the connection for good. The broker takes back what was not acknowledged.
    pub async fn close(&self) {
        self.0.closed.store(true, Ordering::Release);
        let mut state = self.0.current.lock().await;
        if let State::Up(connection) = std::mem::replace(&mut *state, State::Down) {
            let goodbye = connection.close(200, "bye".into());
            // A blocked or dead connection would keep us; the broker notices our absence anyway.
            if !matches!(tokio::time::timeout(Duration::from_secs(2), goodbye).await, Ok(Ok(()))) {
                tracing::debug!(link = self.0.name, "the connection did not close in order");
            }
        }
    }

    async fn within(
        &self,
        channel: impl Future<Output = lapin::Result<Channel>>,
    ) -> Result<Channel, BrokerError> {
        match tokio::time::timeout(self.0.config.connect_timeout, channel).await {
            Ok(channel) => channel.map_err(|error| BrokerError::operating(&error, "a channel")),
            Err(_) => Err(BrokerError::Lost("no answer to the opening of a channel".to_owned())),
        }
    }

    async fn connect(&self) -> Result<Connection, BrokerError> {
        let urls = &self.0.config.urls;
        let mut last = BrokerError::Lost("no broker URL is configured".to_owned());
        for _ in urls {
            let turn = self.0.turn.load(Ordering::Relaxed);
            let url = &urls[turn % urls.len()];
            match self.connect_to(url).await {
                Ok(connection) => {
                    tracing::debug!(%url, name = self.0.name, "connected");
                    return Ok(connection);
                }
                Err(error) => {
                    self.0.turn.store(turn.wrapping_add(1), Ordering::Relaxed);
                    last = error;
                }
            }
        }
        Err(last)
    }

    async fn connect_to(&self, url: &BrokerUrl) -> Result<Connection, BrokerError> {
        let config = &self.0.config;
        let failed = |cause: String| BrokerError::Unreachable { url: url.to_string(), cause };
        let mut uri: AMQPUri = url.expose().parse().map_err(failed)?;
        let heartbeat = u16::try_from(config.heartbeat.as_secs()).unwrap_or(u16::MAX);
        uri.query.heartbeat.get_or_insert(heartbeat);
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
}

/// The pauses between attempts: from 0.1 s up to 5 s, with jitter so that a fleet does not come back
/// in one wave.
pub(super) struct Pause(backon::ExponentialBackoff);

impl Pause {
    pub(super) fn new() -> Self {
        let pauses = backon::ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(Duration::from_secs(5))
            .without_max_times()
            .with_jitter();
        Self(pauses.build())
    }

    /// How long to wait now.
    pub(super) fn next(&mut self) -> Duration {
        self.0.next().unwrap_or(Duration::from_secs(5))
    }

    /// Success: the next pause is short again.
    pub(super) fn reset(&mut self) {
        *self = Self::new();
    }
}
