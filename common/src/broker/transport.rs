//! The connection that lapin reads: the socket of its own transport, TLS included, with every frame
//! screened on arrival.
//!
//! Bytes of the broker come in, frames that lapin can parse go out; [`frames`] has the reasons.
//! Nothing that is sent is changed. lapin takes the type of its stream from the runtime it is
//! given, hence the reactor in this module, which is Tokio's except for that type.

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio, TokioRuntime};
use futures_io::{AsyncRead, AsyncWrite};
use futures_util::Stream;
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream, OwnedTLSConfig};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};

use super::tls;
use crate::failpoints::Protection;
use crate::wire::frames;

#[cfg(test)]
mod tests;

/// The size of a read from the socket.
const READ_BYTES: usize = 64 * 1024;
/// Larger frames are passed on unscreened. RabbitMQ sends at most 128 KiB.
const MAX_FRAME_BYTES: usize = 1024 * 1024;
/// The bytes before a frame's payload: type, channel and size. One more byte ends the frame.
const FRAME_HEADER_BYTES: usize = 7;

type Socket = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// [`Connection::connect_uri`] over a screened stream. Certificates are checked with the
/// authorities of the operating system.
pub(super) async fn connect(
    uri: AMQPUri,
    properties: ConnectionProperties,
) -> lapin::Result<Connection> {
    connect_with(uri, properties, OwnedTLSConfig::default()).await
}

/// [`connect`], trusting the authorities in `tls` as well.
async fn connect_with(
    uri: AMQPUri,
    properties: ConnectionProperties,
    tls: OwnedTLSConfig,
) -> lapin::Result<Connection> {
    let tokio = TokioRuntime::tokio_current();
    let kit = RuntimeParts::new(Tokio::current(), ScreenedTokio(Tokio::current()));
    let connect = async move |uri: AMQPUri, _: Runtime<_>| {
        let socket = uri.connect_with_config_async(tls.as_ref(), &tokio).await?;
        Ok(AsyncTcpStream::Plain(Screened::new(socket)))
    };
    // Boxed: the future is ten thousand bytes large and part of every future that connects.
    Box::pin(Connection::connector(uri, Runtime::new(kit), connect, properties)).await
}

#[derive(Debug, Clone)]
struct ScreenedTokio(Tokio);

impl Reactor for ScreenedTokio {
    type TcpStream = Screened<Socket>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, time: Duration) -> Self::Sleep {
        self.0.sleep(time)
    }

    fn interval(&self, time: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(time)
    }

    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let connecting = self.0.tcp_connect_addr(address);
        async move { Ok(Screened::new(AsyncTcpStream::Plain(connecting.await?))) }
    }
}

/// A stream whose frames are screened before they can be read.
struct Screened<S> {
    stream: S,
    buffer: Vec<u8>,
    /// End of the bytes that were read from the stream.
    filled: usize,
    /// End of the bytes that may be given out.
    ready: usize,
    /// End of the bytes that were given out.
    given: usize,
    /// Bytes still to come of a frame that needs no screening.
    passing: usize,
    /// Whether anything was read.
    begun: bool,
}

impl<S> Screened<S> {
    fn new(stream: S) -> Self {
        let buffer = vec![0; READ_BYTES];
        Self { stream, buffer, filled: 0, ready: 0, given: 0, passing: 0, begun: false }
    }

    /// Moves `ready` past every frame that has arrived completely.
    fn advance(&mut self) {
        while self.ready < self.filled {
            if self.passing > 0 {
                let passed = self.passing.min(self.filled - self.ready);
                self.passing -= passed;
                self.ready += passed;
                continue;
            }
            let frame = &mut self.buffer[self.ready..self.filled];
            let [kind, _, _, size @ ..] = frame else { return };
            let Some(size) = size.first_chunk::<4>() else { return };
            let size = usize::try_from(u32::from_be_bytes(*size)).unwrap_or(usize::MAX);
            let screened = frames::is_screened(*kind) && Protection::Screening.is_enabled();
            if !screened || size > MAX_FRAME_BYTES {
                self.passing = size.saturating_add(FRAME_HEADER_BYTES + 1);
                continue;
            }
            let kind = *kind;
            let end = FRAME_HEADER_BYTES + size;
            let Some(payload) = frame.get_mut(FRAME_HEADER_BYTES..end) else { return };
            frames::screen(kind, payload);
            // The byte that ends the frame may come later; it holds nothing.
            self.ready += end;
            self.passing = 1;
        }
    }

    /// Moves an incomplete frame to the front and makes room behind it.
    fn make_room(&mut self) {
        self.buffer.copy_within(self.given..self.filled, 0);
        self.ready -= self.given;
        self.filled -= self.given;
        self.given = 0;
        // The buffer grows for a large frame and shrinks after it.
        let wanted = self.filled + READ_BYTES;
        if self.buffer.len() != wanted.max(READ_BYTES) {
            self.buffer.resize(wanted, 0);
        }
    }
}

impl<S: AsyncRead + Unpin> Screened<S> {
    /// Reads from the stream; 0 at its end.
    fn poll_fill(&mut self, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.make_room();
        let room = &mut self.buffer[self.filled..];
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, room))?;
        if !self.begun && read > 0 {
            tls::refuse_alert(&room[..read])?;
            self.begun = true;
        }
        self.filled += read;
        self.advance();
        Poll::Ready(Ok(read))
    }

    /// The error that the peer sent before it closed the connection, if it has sent nothing else. A
    /// server that requires a client certificate sends an alert and resets the connection, and the
    /// next write may fail before the alert is read.
    fn refusal(&mut self, context: &mut Context<'_>) -> Option<io::Error> {
        if self.begun {
            return None;
        }
        match self.poll_fill(context) {
            Poll::Ready(Err(refusal)) if refusal.get_ref().is_some() => Some(refusal),
            Poll::Ready(Ok(_) | Err(_)) | Poll::Pending => None,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Screened<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        into: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        while this.given == this.ready {
            if ready!(this.poll_fill(context))? == 0 {
                return Poll::Ready(Ok(0));
            }
        }
        let count = into.len().min(this.ready - this.given);
        into[..count].copy_from_slice(&this.buffer[this.given..this.given + count]);
        this.given += count;
        Poll::Ready(Ok(count))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Screened<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        match ready!(Pin::new(&mut this.stream).poll_write(context, bytes)) {
            Err(error) => Poll::Ready(Err(this.refusal(context).unwrap_or(error))),
            written => Poll::Ready(written),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match ready!(Pin::new(&mut this.stream).poll_flush(context)) {
            Err(error) => Poll::Ready(Err(this.refusal(context).unwrap_or(error))),
            flushed => Poll::Ready(flushed),
        }
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_close(context)
    }
}
