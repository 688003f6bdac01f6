//! The way to the broker that lapin gets: its own, TLS included, with every frame screened on arrival.
//!
//! [`frames`] says why. lapin takes the type of its stream from the runtime it is given, hence the
//! reactor here, which is Tokio's but for that type.

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
use lapin::tcp::{AMQPUriTcpExt, AsyncTcpStream};
use lapin::uri::AMQPUri;
use lapin::{Connection, ConnectionProperties};

use crate::failpoints::Protection;
use crate::wire::frames;

/// What is asked of the socket at once.
const READ_BYTES: usize = 64 * 1024;
/// A frame that claims to be larger is passed on as it is. RabbitMQ's have at most 128 KiB.
const MAX_FRAME_BYTES: usize = 1024 * 1024;
/// Type, channel and size; one more byte ends a frame.
const FRAME_HEAD: usize = 7;

type Socket = AsyncTcpStream<<Tokio as Reactor>::TcpStream>;

/// [`Connection::connect_uri`] over a screened stream.
pub(super) async fn connect(
    uri: AMQPUri,
    properties: ConnectionProperties,
) -> lapin::Result<Connection> {
    let tokio = TokioRuntime::tokio_current();
    let kit = RuntimeParts::new(Tokio::current(), ScreenedTokio(Tokio::current()));
    let connect = async move |uri: AMQPUri, _: Runtime<_>| {
        let socket = uri.connect_async(&tokio).await?;
        Ok(AsyncTcpStream::Plain(Screened::new(socket)))
    };
    // Boxed: whoever connects would else carry ten thousand bytes of future along.
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

/// A stream whose frames are screened before anybody reads them.
struct Screened<S> {
    stream: S,
    buffer: Vec<u8>,
    /// What was read from the stream so far ends here,
    filled: usize,
    /// what may be given out ends here,
    ready: usize,
    /// and what was given out ends here.
    given: usize,
    /// So many bytes of a frame that needs no screening are still to come.
    passing: usize,
}

impl<S> Screened<S> {
    fn new(stream: S) -> Self {
        let buffer = vec![0; READ_BYTES];
        Self { stream, buffer, filled: 0, ready: 0, given: 0, passing: 0 }
    }

    /// Moves `ready` on, over every frame that is here as a whole.
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
                self.passing = size.saturating_add(FRAME_HEAD + 1);
                continue;
            }
            let kind = *kind;
            let Some(payload) = frame.get_mut(FRAME_HEAD..FRAME_HEAD + size) else { return };
            frames::screen(kind, payload);
            // The byte at the end may come later; it holds nothing.
            self.ready += FRAME_HEAD + size;
            self.passing = 1;
        }
    }

    /// Makes room behind what is unfinished, which moves to the front.
    fn make_room(&mut self) {
        self.buffer.copy_within(self.given..self.filled, 0);
        self.ready -= self.given;
        self.filled -= self.given;
        self.given = 0;
        // Grown for a large frame, and only so long.
        let wanted = self.filled + READ_BYTES;
        if self.buffer.len() != wanted.max(READ_BYTES) {
            self.buffer.resize(wanted, 0);
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
            this.make_room();
            let room = &mut this.buffer[this.filled..];
            let read = ready!(Pin::new(&mut this.stream).poll_read(context, room))?;
            if read == 0 {
                return Poll::Ready(Ok(0));
            }
            this.filled += read;
            this.advance();
        }
        let count = into.len().min(this.ready - this.given);
        into[..count].copy_from_slice(&this.buffer[this.given..this.given + count]);
        this.given += count;
        Poll::Ready(Ok(count))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Screened<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_close(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_close(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::task::noop_waker;

    /// Gives out a few bytes at a time.
    struct Drip(Vec<u8>, usize);

    impl AsyncRead for Drip {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            into: &mut [u8],
        ) -> Poll<io::Result<usize>> {
            let count = self.1.min(self.0.len()).min(into.len());
            into[..count].copy_from_slice(&self.0[..count]);
            self.0.drain(..count);
            Poll::Ready(Ok(count))
        }
    }

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let size = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&[kind, 0, 1], &size[..], payload, &[0xce]].concat()
    }

    fn read_all(bytes: &[u8], at_once: usize) -> Vec<u8> {
        let mut screened = Screened::new(Drip(bytes.to_vec(), at_once));
        let waker = noop_waker();
        let (mut all, mut part) = (vec![], vec![0; 1_000]);
        loop {
            let polled =
                Pin::new(&mut screened).poll_read(&mut Context::from_waker(&waker), &mut part);
            let Poll::Ready(Ok(count)) = polled else { panic!("{polled:?}") };
            if count == 0 {
                return all;
            }
            all.extend_from_slice(&part[..count]);
        }
    }

    #[test]
    fn every_frame_comes_out_screened_however_it_was_cut() {
        let deliver = b"\0\x3c\0\x3c\x01c\0\0\0\0\0\0\0\x01\0\x01e\x02\xff\xff";
        let screened = b"\0\x3c\0\x3c\x01c\0\0\0\0\0\0\0\x01\0\x01e\x02\x1a\x1a";
        let body = vec![0xff; 100_000];
        let huge = vec![b'x'; 300_000];
        let given = |method: &[u8]| {
            [frame(1, method), frame(3, &body), frame(1, &huge), frame(8, &[]), frame(1, method)]
                .concat()
        };
        for at_once in [1, 7, 8, 1_000, 1 << 20] {
            assert!(read_all(&given(deliver), at_once) == given(screened), "{at_once} at once");
        }
    }
}
