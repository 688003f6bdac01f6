//! A line to the broker that a test can cut: a TCP proxy on a free port of this machine.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

/// Forwards connections until they are cut.
pub(crate) struct Proxy {
    address: SocketAddr,
    /// Every change cuts all connections of the moment.
    cuts: Arc<watch::Sender<u64>>,
    accepting: AbortHandle,
}

impl Proxy {
    /// A proxy to the broker of `url`.
    pub(crate) async fn to(url: &str) -> Self {
        let target = host_and_port(url);
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("it is bound");
        let cuts = Arc::new(watch::Sender::new(0));
        let accepting = tokio::spawn(accept(listener, target, Arc::clone(&cuts))).abort_handle();
        Self { address, cuts, accepting }
    }

    /// The broker's URL with this proxy as host.
    pub(crate) fn url(&self, url: &str) -> String {
        url.replace(&host_and_port(url), &self.address.to_string())
    }

    /// Cuts all connections. New ones are accepted at once.
    pub(crate) fn cut(&self) {
        self.cuts.send_modify(|count| *count += 1);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, target: String, cuts: Arc<watch::Sender<u64>>) {
    // Aborted together with this task.
    let mut lines = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let (target, mut cut) = (target.clone(), cuts.subscribe());
        lines.spawn(async move {
            tokio::select! {
                () = forward(client, target) => {}
                _ = cut.changed() => {}
            }
        });
    }
}

async fn forward(mut client: TcpStream, target: String) {
    if let Ok(mut server) = TcpStream::connect(target).await {
        // A lost line is what this is for.
        drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
    }
}

fn host_and_port(url: &str) -> String {
    let rest = url.split("://").nth(1).expect("an AMQP URL");
    let host = rest.split('/').next().unwrap_or_default();
    let host = host.rsplit('@').next().unwrap_or_default();
    if host.contains(':') { host.to_owned() } else { format!("{host}:5672") }
}
