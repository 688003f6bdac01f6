//! A TCP line between the processes of a run and the broker, which can be cut or fall silent.
//!
//! It understands nothing of AMQP. It also remembers when connections were made, since every one after the
//! first of a process means that one was lost.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

/// The line. Everything on it ends with it.
pub(super) struct Proxy {
    port: u16,
    line: Arc<CutLine>,
    _accepting: AbortOnDropHandle<()>,
}

struct CutLine {
    target: (String, u16),
    open: Mutex<Open>,
    /// While it is true nothing passes.
    silent: watch::Sender<bool>,
}

#[derive(Default)]
struct Open {
    next: u64,
    connections: BTreeMap<u64, CancellationToken>,
    made: Vec<Instant>,
}

impl Proxy {
    /// Listens on a free port of this machine, on behalf of `target`.
    pub(super) async fn start(target: (String, u16)) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let port = listener.local_addr()?.port();
        let silent = watch::Sender::new(false);
        let line = Arc::new(CutLine { target, open: Mutex::default(), silent });
        let accepting = TaskTracker::new().spawn(accept(listener, Arc::clone(&line)));
        Ok(Self { port, line, _accepting: AbortOnDropHandle::new(accepting) })
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Cuts one connection; `false` if there is none.
    pub(super) fn cut_one(&self, pick: usize) -> bool {
        let open = self.line.lock();
        let count = open.connections.len().max(1);
        let chosen = open.connections.values().nth(pick % count);
        chosen.inspect(|connection| connection.cancel()).is_some()
    }

    /// Cuts all connections. New ones are accepted at once.
    pub(super) fn cut_all(&self) {
        self.line.lock().connections.values().for_each(CancellationToken::cancel);
    }

    /// Whether anything passes from now on. Connections stay open either way.
    pub(super) fn silence(&self, silent: bool) {
        self.line.silent.send_replace(silent);
    }

    /// How many connections are open.
    pub(super) fn open(&self) -> usize {
        self.line.lock().connections.len()
    }

    /// When connections reached the broker, the first ones included.
    pub(super) fn made(&self) -> Vec<Instant> {
        self.line.lock().made.clone()
    }
}

impl CutLine {
    fn lock(&self) -> std::sync::MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) -> (u64, CancellationToken) {
        let (mut open, cut) = (self.lock(), CancellationToken::new());
        open.next += 1;
        let number = open.next;
        open.connections.insert(number, cut.clone());
        (number, cut)
    }
}

async fn accept(listener: TcpListener, line: Arc<CutLine>) {
    // Aborted together with this task.
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        let line = Arc::clone(&line);
        let (number, cut) = line.enter();
        connections.spawn(async move {
            tokio::select! {
                () = forward(client, &line) => {}
                () = cut.cancelled() => {}
            }
            line.lock().connections.remove(&number);
        });
    }
}

async fn forward(client: TcpStream, line: &CutLine) {
    let (host, port) = &line.target;
    let Ok(server) = TcpStream::connect((host.as_str(), *port)).await else { return };
    line.lock().made.push(Instant::now());
    // The bytes are small and somebody waits for each.
    drop((client.set_nodelay(true), server.set_nodelay(true)));
    let ((from_client, to_client), (from_server, to_server)) =
        (client.into_split(), server.into_split());
    tokio::select! {
        () = pass(from_client, to_server, line.silent.subscribe()) => {}
        () = pass(from_server, to_client, line.silent.subscribe()) => {}
    }
}

/// Until one side is gone.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut silent: watch::Receiver<bool>) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        // What was read before the silence is held back too: a half-open line, as seen from both ends.
        if silent.wait_for(|silent| !silent).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
