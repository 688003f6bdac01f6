//! A line to the broker that a test can cut or hold: a TCP proxy on a free port of this machine.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::soon;

/// What a client sends that can be held.
#[derive(Clone, Copy)]
pub(crate) enum Sends {
    /// Messages to the exchange whose name ends in this word.
    To(&'static str),
    Acknowledgements,
    /// The request to get no more deliveries.
    Cancels,
}

impl Sends {
    /// Whether bytes hold such a frame, told by class and method at the beginning of its payload.
    fn is_in(self, bytes: &[u8]) -> bool {
        let has = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        match self {
            Self::To(exchange) => has(&[0, 60, 0, 40]) && has(format!(".{exchange}").as_bytes()),
            Self::Acknowledgements => has(&[0, 60, 0, 80]),
            Self::Cancels => has(&[0, 60, 0, 30]),
        }
    }
}

/// Forwards connections until they are cut.
pub(crate) struct Proxy {
    address: SocketAddr,
    line: Arc<Line>,
    accepting: AbortHandle,
}

struct Line {
    target: String,
    /// Every change cuts all connections of the moment.
    cuts: watch::Sender<u64>,
    /// What stays here.
    held: Mutex<Option<Sends>>,
    /// How often something stayed here.
    caught: AtomicU64,
    /// Connections with a number up to this one carry nothing any more, and stay open.
    silenced: watch::Sender<u64>,
    /// How many connections there were.
    accepted: AtomicU64,
    /// The numbers of those that are open.
    open: Mutex<HashSet<u64>>,
    /// Whether deliveries are swallowed on their way to the client.
    mute: AtomicBool,
    /// Whether new connections are refused.
    down: AtomicBool,
}

impl Proxy {
    /// A proxy to the broker of `url`.
    pub(crate) async fn to(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let line = Arc::new(Line {
            target: host_and_port(url),
            cuts: watch::Sender::new(0),
            held: Mutex::default(),
            caught: AtomicU64::new(0),
            silenced: watch::Sender::new(0),
            accepted: AtomicU64::new(0),
            open: Mutex::default(),
            mute: AtomicBool::new(false),
            down: AtomicBool::new(false),
        });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&line))).abort_handle();
        Self { address, line, accepting }
    }

    /// The broker's URL with this proxy as host.
    pub(crate) fn url(&self, url: &str) -> String {
        url.replace(&host_and_port(url), &self.address.to_string())
    }

    /// Cuts all connections. New ones are accepted at once, and nothing is held any more.
    pub(crate) fn cut(&self) {
        self.line.hold(None);
        self.line.cuts.send_modify(|count| *count += 1);
    }

    /// [Cuts](Self::cut) all connections, and waits until none of them passes anything any more.
    pub(crate) async fn sever(&self) {
        let last = self.accepted();
        self.cut();
        let gone = async || self.line.open().iter().all(|number| *number > last).then_some(());
        soon("the old connections are gone", gone).await;
    }

    /// Lets nothing pass any more, in neither direction, on the connections of the moment; they stay
    /// open, and new ones work.
    pub(crate) fn silence(&self) {
        self.line.silenced.send_replace(self.line.accepted.load(Ordering::SeqCst));
    }

    /// Swallows deliveries, and nothing else, until told otherwise.
    pub(crate) fn mute_deliveries(&self, mute: bool) {
        self.line.mute.store(mute, Ordering::SeqCst);
    }

    /// Cuts all connections and accepts none, or accepts them again.
    pub(crate) fn down(&self, down: bool) {
        self.line.down.store(down, Ordering::SeqCst);
        if down {
            self.cut();
        }
    }

    /// How many connections were made so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.line.accepted.load(Ordering::SeqCst)
    }

    /// From now on these do not pass, nor does what their connection sends after them.
    pub(crate) fn hold(&self, what: Sends) {
        self.line.hold(Some(what));
    }

    /// Waits until something was held or swallowed.
    pub(crate) async fn caught(&self) {
        let caught = async || (self.line.caught.load(Ordering::SeqCst) > 0).then_some(());
        soon("something is held on the line", caught).await;
    }
}

impl Line {
    fn open(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self, what: Option<Sends>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = what;
    }

    fn holds(&self, bytes: &[u8]) -> bool {
        let held = *self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.is_some_and(|what| what.is_in(bytes))
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, line: Arc<Line>) {
    // Aborted together with this task.
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        if line.down.load(Ordering::SeqCst) {
            continue;
        }
        let (line, mut cut) = (Arc::clone(&line), line.cuts.subscribe());
        let number = line.accepted.load(Ordering::SeqCst) + 1;
        line.open().insert(number);
        line.accepted.store(number, Ordering::SeqCst);
        connections.spawn(async move {
            tokio::select! {
                () = forward(client, &line, number) => {}
                _ = cut.changed() => {}
            }
            line.open().remove(&number);
        });
    }
}

async fn forward(client: TcpStream, line: &Line, number: u64) {
    let Ok(server) = TcpStream::connect(&line.target).await else { return };
    // Kept open over a silence; only a cut ends them.
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let mut silenced = line.silenced.subscribe();
    let silence = async {
        drop(silenced.wait_for(|last| number <= *last).await);
    };
    tokio::select! {
        () = send(&mut from_client, &mut to_server, line) => {}
        () = receive(&mut from_server, &mut to_client, line) => {}
        () = silence => std::future::pending().await,
    }
}

/// From broker to client, as it comes, unless deliveries are swallowed.
async fn receive(from: &mut OwnedReadHalf, to: &mut OwnedWriteHalf, line: &Line) {
    let (mut frames, mut buffer) = (Frames::default(), vec![0; 64 * 1024]);
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let passed = frames.pass(&buffer[..count], line.mute.load(Ordering::SeqCst));
        line.caught.fetch_add(frames.swallowing.len() as u64, Ordering::SeqCst);
        if to.write_all(&passed).await.is_err() {
            return;
        }
    }
}

/// Whole AMQP frames, put together from what a socket yields.
#[derive(Default)]
struct Frames {
    rest: Vec<u8>,
    /// Channels on which the contents of a swallowed delivery are still to come.
    swallowing: HashSet<[u8; 2]>,
}

impl Frames {
    /// The whole frames of what has come so far, without deliveries if `mute`.
    fn pass(&mut self, bytes: &[u8], mute: bool) -> Vec<u8> {
        self.rest.extend(bytes);
        let (mut passed, mut begin) = (vec![], 0);
        // Type, channel, length; the payload; the end mark.
        while let Some(&[kind, c1, c2, l1, l2, l3, l4]) =
            self.rest.get(begin..begin + 7).and_then(|head| head.first_chunk())
        {
            let length = u32::from_be_bytes([l1, l2, l3, l4]) as usize;
            let Some(frame) = self.rest.get(begin..begin + 7 + length + 1) else { break };
            begin += frame.len();
            if !swallows(&mut self.swallowing, kind, [c1, c2], &frame[7..], mute) {
                passed.extend_from_slice(frame);
            }
        }
        self.rest.drain(..begin);
        passed
    }
}

/// Whether a frame belongs to a delivery that is swallowed.
fn swallows(
    swallowing: &mut HashSet<[u8; 2]>,
    kind: u8,
    channel: [u8; 2],
    payload: &[u8],
    mute: bool,
) -> bool {
    const METHOD: u8 = 1;
    const HEARTBEAT: u8 = 8;
    const BASIC_DELIVER: [u8; 4] = [0, 60, 0, 60];
    if kind != METHOD {
        return kind != HEARTBEAT && swallowing.contains(&channel);
    }
    let is_muted = mute && payload.starts_with(&BASIC_DELIVER);
    if is_muted {
        swallowing.insert(channel)
    } else {
        swallowing.remove(&channel)
    };
    is_muted
}

/// From client to broker, as long as it is not held.
async fn send(from: &mut OwnedReadHalf, to: &mut OwnedWriteHalf, line: &Line) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        if line.holds(&buffer[..count]) {
            line.caught.fetch_add(1, Ordering::SeqCst);
            return std::future::pending().await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

fn host_and_port(url: &str) -> String {
    let rest = url.split("://").nth(1).expect("an AMQP URL");
    let host = rest.split('/').next().unwrap_or_default();
    let host = host.rsplit('@').next().unwrap_or_default();
    if host.contains(':') { host.to_owned() } else { format!("{host}:5672") }
}
