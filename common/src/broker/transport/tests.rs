//! Frames in pieces, and handshakes with servers that refuse them.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use base64::Engine as _;
use futures_util::task::noop_waker;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};

use super::*;
use crate::broker::BrokerError;
use crate::config::BrokerUrl;

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
        let polled = Pin::new(&mut screened).poll_read(&mut Context::from_waker(&waker), &mut part);
        let Poll::Ready(Ok(count)) = polled else { panic!("{polled:?}") };
        if count == 0 {
            return all;
        }
        all.extend_from_slice(&part[..count]);
    }
}

#[test]
fn frames_are_screened_however_they_are_cut() {
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

/// A certificate authority.
struct Authority(Issuer<'static, KeyPair>, rcgen::Certificate);

/// A certificate and its key, in DER.
#[derive(Clone)]
struct Identity(Vec<u8>, Vec<u8>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        Self(Issuer::new(params, key), certificate)
    }

    /// A certificate for `name` that is valid between these years.
    fn issue(&self, name: &str, years: (i32, i32)) -> Identity {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(years.0, 1, 1);
        params.not_after = rcgen::date_time_ymd(years.1, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Identity(certificate.der().to_vec(), key.serialize_der())
    }

    fn valid(&self) -> Identity {
        self.issue("localhost", (2000, 4000))
    }

    /// The certificate of the authority itself.
    fn own(&self) -> Identity {
        Identity(self.1.der().to_vec(), self.0.key().serialize_der())
    }

    fn trusted(&self) -> OwnedTLSConfig {
        let der = base64::engine::general_purpose::STANDARD.encode(self.1.der());
        let pem = format!("-----BEGIN CERTIFICATE-----\n{der}\n-----END CERTIFICATE-----\n");
        OwnedTLSConfig { cert_chain: Some(pem), ..OwnedTLSConfig::default() }
    }

    fn roots(&self) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(self.1.der().clone()).unwrap();
        roots
    }
}

/// Serves one connection in this way and returns the port.
fn serve(treat: impl FnOnce(TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || treat(listener.accept().unwrap().0));
    port
}

/// A server that sends these bytes, whatever it receives, and closes the connection.
fn respond(response: &'static [u8]) -> u16 {
    serve(move |mut stream| {
        assert!(stream.read(&mut [0; 1_000]).unwrap() > 0);
        stream.write_all(response).unwrap();
    })
}

/// A TLS server that closes the connection after the handshake. It requires a client certificate of
/// the authorities in `clients`, if there are any.
fn tls_server(identity: Identity, clients: Option<RootCertStore>) -> u16 {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let builder = match clients {
        Some(roots) => {
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.unwrap())
        }
        None => builder.with_no_client_auth(),
    };
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(identity.1));
    let config = builder.with_single_cert(vec![identity.0.into()], key).unwrap();
    serve(move |mut stream| {
        let mut connection = ServerConnection::new(Arc::new(config)).unwrap();
        while connection.is_handshaking() && connection.complete_io(&mut stream).is_ok() {}
        // Waits for the client to close the connection.
        while stream.read(&mut [0; 1_000]).is_ok_and(|read| read > 0) {}
    })
}

async fn refusal(scheme: &str, port: u16, trusted: OwnedTLSConfig) -> BrokerError {
    let url = format!("{scheme}://guest:guest@localhost:{port}/%2f");
    let uri = url.parse().unwrap();
    let connecting = connect_with(uri, ConnectionProperties::default(), trusted);
    let connected = tokio::time::timeout(Duration::from_secs(30), connecting).await.unwrap();
    BrokerError::connecting(&connected.unwrap_err(), &BrokerUrl::parse(&url).unwrap())
}

/// Asserts that an error has this code and remedy and is permanent.
#[track_caller]
fn assert_refusal(error: &BrokerError, code: &str, remedy: &str) {
    assert_eq!(error.code(), code, "{error}");
    assert!(error.to_string().contains(remedy), "{error}");
    assert!(!error.is_transient(), "{error}");
}

#[tokio::test]
async fn an_unusable_certificate_is_named_with_its_fault_and_without_a_clock() {
    let authority = Authority::new("ours");
    for (identity, code, remedy) in [
        (
            authority.issue("localhost", (2000, 2001)),
            "tls_certificate_expired",
            "expired on 2001-01-01T00:00:00Z; renew it",
        ),
        (
            authority.issue("localhost", (2500, 2501)),
            "tls_certificate_not_yet_valid",
            "only from 2500-01-01T00:00:00Z on; replace it",
        ),
        (
            authority.issue("rabbit.example", (2000, 4000)),
            "tls_wrong_name",
            "only for rabbit.example; use a name of the certificate",
        ),
        (authority.own(), "tls_authority_certificate", "signed by that authority"),
    ] {
        let port = tls_server(identity, None);
        let error = refusal("amqps", port, authority.trusted()).await;
        assert_refusal(&error, code, remedy);
        assert!(!error.to_string().contains("seconds"), "rustls names the present time: {error}");
    }
    for name in ["another", "ours"] {
        let port = tls_server(authority.valid(), None);
        let error = refusal("amqps", port, Authority::new(name).trusted()).await;
        assert_refusal(&error, "tls_untrusted_issuer", "SSL_CERT_FILE");
    }
}

#[tokio::test]
async fn a_server_that_requires_a_client_certificate_is_named() {
    let authority = Authority::new("ours");
    let port = tls_server(authority.valid(), Some(authority.roots()));
    let error = refusal("amqps", port, authority.trusted()).await;
    assert_refusal(&error, "tls_client_certificate_required", "fail_if_no_peer_cert");
}

#[tokio::test]
async fn alerts_of_the_server_are_named_with_a_remedy() {
    // `protocol_version`, as a server sends it that supports TLS 1.1 only.
    let port = respond(&[21, 3, 1, 0, 2, 2, 70]);
    let error = refusal("amqps", port, OwnedTLSConfig::default()).await;
    assert_refusal(&error, "tls_protocol_version", "ssl_options.versions");
    // `handshake_failure`: TLS 1.2 has no other for a missing client certificate.
    let port = respond(&[21, 3, 3, 0, 2, 2, 40]);
    let error = refusal("amqps", port, OwnedTLSConfig::default()).await;
    assert_refusal(&error, "tls_handshake_refused", "cipher suites");
}

#[tokio::test]
async fn the_wrong_scheme_for_a_port_is_named() {
    // RabbitMQ responds to AMQP on its TLS port with the alert `unexpected_message`.
    let port = respond(&[21, 3, 1, 0, 2, 2, 10]);
    let error = refusal("amqp", port, OwnedTLSConfig::default()).await;
    assert_refusal(&error, "tls_required", "use an amqps:// URL");
    // And to TLS on its plain port with the protocol header of AMQP.
    let port = respond(b"AMQP\0\0\x09\x01");
    let error = refusal("amqps", port, OwnedTLSConfig::default()).await;
    assert_refusal(&error, "tls_not_spoken", "use an amqp:// URL");
}

/// A stream whose writes fail although a refusal can be read.
struct Reset;

impl AsyncRead for Reset {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let refusal = rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRequired);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, refusal)))
    }
}

impl AsyncWrite for Reset {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn a_refusal_is_reported_although_a_write_fails_first() {
    let waker = noop_waker();
    let mut context = Context::from_waker(&waker);
    let mut screened = Screened::new(Reset);
    let written = Pin::new(&mut screened).poll_write(&mut context, b"AMQP");
    assert!(matches!(written, Poll::Ready(Err(error)) if error.get_ref().is_some()));
    let flushed = Pin::new(&mut screened).poll_flush(&mut context);
    assert!(matches!(flushed, Poll::Ready(Err(error)) if error.get_ref().is_some()));
}
