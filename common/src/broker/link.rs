//! One connection, opened when needed and again when it is gone.
//!
//! There is no supervising task: whoever needs a channel asks for one, and the first to ask after a
//! loss reconnects for all. Who waits how long between attempts is the asker's business ([`Pause`]).

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use lapin::uri::AMQPUri;
use lapin::{Channel, Connection, ConnectionProperties, ConnectionStatus};
use tokio::sync::Mutex;
use tokio_util::task::AbortOnDropHandle;

use super::{BrokerError, transport};
use crate::config::{BrokerConfig, BrokerUrl};

/// One connection to the broker under a name that the management UI shows. Clones share it.
#[derive(Clone)]
pub struct Link(Arc<LinkState>);

struct LinkState {
    config: BrokerConfig,
    name: String,
    /// Which URL to try first: any, so that a fleet spreads over a cluster. Moves on when one does not
    /// answer, and when its connection is lost.
    turn: AtomicUsize,
    closed: AtomicBool,
    /// The present connection's, to be asked while somebody else connects; see [`Link::is_blocked`].
    status: RwLock<Option<ConnectionStatus>>,
    /// Milliseconds, 0 if not known; see [`Link::learnt_consumer_timeout`].
    consumer_timeout: AtomicU64,
    /// Locked while connecting, so that a hundred askers make one connection.
    current: Mutex<State>,
}

enum State {
    Down,
    Up(Arc<Connection>),
}

/// RabbitMQ's own limit. With less it would still send a stranger's long headers in one frame, which
/// ends the connection. lapin makes its buffers of 32 frames twice: when it is told the size before
/// the broker says it, they are memory that nobody has touched, else 8 MiB are written with zeros.
const FRAME_BYTES: u32 = 128 * 1024;

impl Link {
    /// A link that has not connected yet. `name` is what people see in the management UI.
    pub fn new(config: &BrokerConfig, name: &str) -> Self {
        Self(Arc::new(LinkState {
            config: config.clone(),
            name: name.to_owned(),
            turn: AtomicUsize::new(fastrand::usize(..config.urls.len().max(1))),
            closed: AtomicBool::new(false),
            status: RwLock::new(None),
            consumer_timeout: AtomicU64::new(0),
            current: Mutex::new(State::Down),
        }))
    }

    /// Connects now, trying each URL once; for whoever wants to know before going on.
    pub async fn open(&self) -> Result<(), BrokerError> {
        self.channel().await.map(drop)
    }

    /// A new channel, on a new connection if the old one is gone.
    ///
    /// Worked at in a task of its own: a caller that is not polled for a while must not hold the lock
    /// that all users of the connection need.
    pub(super) async fn channel(&self) -> Result<Channel, BrokerError> {
        let link = self.clone();
        let opening = tokio::spawn(async move { link.open_channel().await });
        match AbortOnDropHandle::new(opening).await {
            Ok(channel) => channel,
            Err(error) => Err(BrokerError::Lost(format!("a channel was not opened: {error}"))),
        }
    }

    async fn open_channel(&self) -> Result<Channel, BrokerError> {
        let mut state = self.0.current.lock().await;
        if self.is_closed() {
            return Err(BrokerError::Closed);
        }
        if let State::Up(connection) = &*state {
            if let Ok(channel) = self.within(connection.create_channel()).await {
                return Ok(channel);
            }
            *state = State::Down;
            // Where a connection was just lost, the next one is likely to fail too.
            self.0.turn.fetch_add(1, Ordering::Relaxed);
        }
        let connection = self.connect().await?;
        *self.0.status.write().unwrap_or_else(PoisonError::into_inner) =
            Some(connection.status().clone());
        let channel = self.within(connection.create_channel()).await;
        *state = State::Up(Arc::new(connection));
        channel
    }

    /// Whether the broker has stopped taking what this connection publishes.
    pub(super) fn is_blocked(&self) -> bool {
        let status = self.0.status.read().unwrap_or_else(PoisonError::into_inner);
        status.as_ref().is_some_and(|status| status.connected() && status.blocked())
    }

    /// How long the broker waits for an acknowledgement, if it has ever said so by taking a delivery
    /// back.
    pub fn learnt_consumer_timeout(&self) -> Option<Duration> {
        let millis = self.0.consumer_timeout.load(Ordering::Relaxed);
        (millis > 0).then(|| Duration::from_millis(millis))
    }

    /// Keeps what an error says of the broker's consumer timeout.
    pub(super) fn learn_from(&self, error: &BrokerError) {
        if let BrokerError::TookBack(Some(timeout)) = error {
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
        // Its parser takes an IPv6 address for no host at all, and the client would connect to this machine.
        let (host, _) = url.address();
        if host.contains(':') {
            uri.authority.host = host;
        }
        let heartbeat = u16::try_from(config.heartbeat.as_secs()).unwrap_or(u16::MAX);
        uri.query.heartbeat.get_or_insert(heartbeat);
        uri.query.frame_max.get_or_insert(FRAME_BYTES);
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

/// The shortest pause between two attempts.
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest.
const LONGEST: Duration = Duration::from_secs(5);
/// What the first pause is drawn up to, after tripling: a fleet that lost one broker comes back over
/// most of a second, not at once.
const FIRST: Duration = Duration::from_millis(300);

/// The pauses between attempts, with decorrelated jitter: each is drawn between 0.1 s and three times
/// the one before, at most 5 s, so that a fleet that was cut off together does not stay in step.
pub(super) struct Pause(Duration);

impl Pause {
    pub(super) fn new() -> Self {
        Self(FIRST)
    }

    /// How long to wait now.
    pub(super) fn next(&mut self) -> Duration {
        let most = (self.0 * 3).min(LONGEST);
        self.0 = SHORTEST + most.saturating_sub(SHORTEST).mul_f64(fastrand::f64());
        self.0
    }

    /// Success: the next pause is short again.
    pub(super) fn reset(&mut self) {
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_stay_between_their_bounds_and_grow() {
        let mut pause = Pause::new();
        let pauses: Vec<_> = (0..1_000).map(|_| pause.next()).collect();
        assert!(pauses.iter().all(|pause| (SHORTEST..=LONGEST).contains(pause)));
        assert!(pauses[0] <= FIRST * 3);
        assert!(pauses.iter().skip(20).sum::<Duration>() > Duration::from_secs(980));
        pause.reset();
        assert!(pause.next() <= FIRST * 3);
    }

    #[test]
    fn a_thousand_that_were_cut_off_together_do_not_come_back_together() {
        // A broker that is away for 15 s; attempts counted in windows of a tenth of a second.
        let mut windows = vec![0_u32; 300];
        for _ in 0..1_000 {
            let (mut pause, mut now) = (Pause::new(), Duration::ZERO);
            loop {
                now += pause.next();
                let Some(window) = windows.get_mut((now.as_millis() / 100) as usize) else { break };
                *window += 1;
                if now > Duration::from_secs(15) {
                    break;
                }
            }
        }
        // Typical are 220 and 75; a fixed pause would bring all thousand into one window.
        assert!(windows.iter().all(|attempts| *attempts < 400), "{windows:?}");
        let returned: u32 = windows.iter().skip(150).sum();
        assert_eq!(returned, 1_000, "all are back within 5 s of the broker's return");
        assert!(windows.iter().skip(150).all(|attempts| *attempts < 200), "{windows:?}");
    }
}
