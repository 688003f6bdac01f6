//! A line to the broker that a test can cut or hold: a TCP proxy on a free port of this machine.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

/// A client says its connection's name within its first bytes.
const START: usize = 4_096;
/// The last word of a publishing connection's name; with its space, or the client's capability
/// `publisher_confirms` would match too.
const PUBLISHES: &[u8] = b" publish";

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
    /// Whether what publishing connections send stays here.
    held: AtomicBool,
}

impl Proxy {
    /// A proxy to the broker of `url`.
    pub(crate) async fn to(url: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let (cuts, held) = (watch::Sender::new(0), AtomicBool::new(false));
        let line = Arc::new(Line { target: host_and_port(url), cuts, held });
        let accepting = tokio::spawn(accept(listener, Arc::clone(&line))).abort_handle();
        Self { address, line, accepting }
    }

    /// The broker's URL with this proxy as host.
    pub(crate) fn url(&self, url: &str) -> String {
        url.replace(&host_and_port(url), &self.address.to_string())
    }

    /// Cuts all connections. New ones are accepted at once.
    pub(crate) fn cut(&self) {
        self.line.cuts.send_modify(|count| *count += 1);
    }

    /// From now on nothing passes that a connection sends whose name ends in "publish".
    pub(crate) fn hold_publishing(&self) {
        self.line.held.store(true, Ordering::SeqCst);
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
        let (line, mut cut) = (Arc::clone(&line), line.cuts.subscribe());
        connections.spawn(async move {
            tokio::select! {
                () = forward(client, &line) => {}
                _ = cut.changed() => {}
            }
        });
    }
}

async fn forward(client: TcpStream, line: &Line) {
    let Ok(server) = TcpStream::connect(&line.target).await else { return };
    let ((from_client, mut to_client), (mut from_server, to_server)) =
        (client.into_split(), server.into_split());
    tokio::select! {
        () = send(from_client, to_server, line) => {}
        // A lost line is what this is for.
        _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
    }
}

/// From client to broker, as long as it is not held.
async fn send(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, line: &Line) {
    let (mut start, mut buffer) = (Vec::<u8>::new(), vec![0; 64 * 1024]);
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        start.extend(buffer[..count].iter().take(START - start.len()));
        let publishes = start.windows(PUBLISHES.len()).any(|window| window == PUBLISHES);
        if publishes && line.held.load(Ordering::SeqCst) {
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
