//! Why a TLS handshake with the broker failed, and what a person can do about it.
//!
//! Errors of rustls come in, wrapped in `io::Error` by lapin; faults with a remedy go out. Their
//! texts hold no clock, so that a lasting fault keeps its text.

use std::io;

use rustls::{AlertDescription, CertificateError, InvalidMessage, OtherError, PeerIncompatible};

use crate::timestamp::Timestamp;

/// Content type and major version of the TLS record that carries an alert.
const ALERT_RECORD: [u8; 2] = [21, 3];
/// How many names of a certificate a message lists.
const NAMES_SHOWN: usize = 5;

/// Why TLS was not established.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsFault {
    /// No trusted authority has signed the server's certificate.
    #[error("no certificate authority that this machine trusts has signed its certificate")]
    UntrustedIssuer,
    /// The server's certificate has expired; when, if known.
    #[error("its certificate has expired{}", since(*.0))]
    Expired(Option<Timestamp>),
    /// The server's certificate is not valid yet; from when it is, if known.
    #[error("its certificate is not valid yet{}", only_from(*.0))]
    NotYetValid(Option<Timestamp>),
    /// The server's certificate was issued for other names; these, if known.
    #[error("its certificate is not valid for this host name{}", only_for(.0))]
    WrongName(Vec<String>),
    /// The server presents the certificate of an authority as its own.
    #[error("its certificate is one of a certificate authority, not of a server")]
    AuthorityCertificate,
    /// The server's certificate cannot be used for another reason.
    #[error("its certificate is invalid ({0})")]
    InvalidCertificate(String),
    /// The server requires a certificate of its client.
    #[error("it requires a client certificate")]
    ClientCertificateRequired,
    /// Client and server have no version of TLS in common.
    #[error("it supports neither TLS 1.2 nor TLS 1.3")]
    ProtocolVersion,
    /// The server ended the handshake without naming a reason.
    #[error("it refused the handshake")]
    HandshakeRefused,
    /// The server does not speak TLS at all.
    #[error("this port does not speak TLS")]
    NotTls,
    /// The operating system has no certificate authorities.
    #[error("this machine has no trusted certificate authorities ({0})")]
    NoAuthorities(String),
    /// Any other error of the handshake.
    #[error("the handshake failed ({0})")]
    Handshake(String),
}

impl TlsFault {
    /// The fault in an error of the client library, if it comes from TLS.
    pub(super) fn in_error(error: &io::Error) -> Option<Self> {
        let inner = error.get_ref()?;
        if let Some(error) = inner.downcast_ref::<rustls::Error>() {
            return Some(Self::of(error));
        }
        // The loader of the operating system's certificates has an error type of its own.
        let text = inner.to_string();
        text.contains("certificates").then_some(Self::NoAuthorities(text))
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum; its own text serves for the rest"
    )]
    fn of(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(error) => Self::of_certificate(error),
            rustls::Error::AlertReceived(AlertDescription::CertificateRequired) => {
                Self::ClientCertificateRequired
            }
            rustls::Error::AlertReceived(AlertDescription::ProtocolVersion)
            | rustls::Error::PeerIncompatible(
                PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
            ) => Self::ProtocolVersion,
            rustls::Error::AlertReceived(
                AlertDescription::HandshakeFailure | AlertDescription::InsufficientSecurity,
            ) => Self::HandshakeRefused,
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => Self::NotTls,
            other => Self::Handshake(other.to_string()),
        }
    }

    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum; its own text serves for the rest"
    )]
    fn of_certificate(error: &CertificateError) -> Self {
        let at = |time: &rustls::pki_types::UnixTime| {
            Some(Timestamp::from_millis(time.as_secs().saturating_mul(1_000)))
        };
        match error {
            // A bad signature is that of another authority of the same name.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                Self::UntrustedIssuer
            }
            CertificateError::Expired => Self::Expired(None),
            CertificateError::ExpiredContext { not_after, .. } => Self::Expired(at(not_after)),
            CertificateError::NotValidYet => Self::NotYetValid(None),
            CertificateError::NotValidYetContext { not_before, .. } => {
                Self::NotYetValid(at(not_before))
            }
            CertificateError::NotValidForName => Self::WrongName(vec![]),
            CertificateError::NotValidForNameContext { presented, .. } => {
                Self::WrongName(presented.iter().map(|name| bare_name(name)).collect())
            }
            // webpki's error; its type is not exported by rustls.
            CertificateError::Other(OtherError(cause))
                if format!("{cause:?}").contains("CaUsedAsEndEntity") =>
            {
                Self::AuthorityCertificate
            }
            other => Self::InvalidCertificate(other.to_string()),
        }
    }

    /// What a person can do about it.
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::UntrustedIssuer | Self::NoAuthorities(_) => {
                "add the authority to the operating system's trust store (package \
                 ca-certificates), or name its file in SSL_CERT_FILE"
            }
            Self::Expired(_) => "renew it, or correct the clock of this machine",
            Self::NotYetValid(_) => "replace it, or correct the clock of this machine",
            Self::WrongName(_) => {
                "use a name of the certificate in the URL, or issue one for this host name"
            }
            Self::AuthorityCertificate => {
                "issue a certificate for the server, signed by that authority"
            }
            Self::InvalidCertificate(_) => "replace the certificate of the broker",
            Self::ClientCertificateRequired => {
                "Garenne has none: set ssl_options.fail_if_no_peer_cert = false on the broker"
            }
            Self::ProtocolVersion => {
                "enable one of them on the broker (ssl_options.versions in rabbitmq.conf)"
            }
            Self::HandshakeRefused => {
                "the broker's log has the reason: it may require a client certificate, which \
                 Garenne does not have, or other cipher suites"
            }
            Self::NotTls => "use an amqp:// URL, or the port for TLS (5671)",
            Self::Handshake(_) => "the broker's log may have more",
        }
    }

    /// Whether a later attempt can succeed without a change on either side.
    pub(super) const fn is_transient(&self) -> bool {
        match self {
            Self::Handshake(_) => true,
            Self::UntrustedIssuer
            | Self::Expired(_)
            | Self::NotYetValid(_)
            | Self::WrongName(_)
            | Self::AuthorityCertificate
            | Self::InvalidCertificate(_)
            | Self::ClientCertificateRequired
            | Self::ProtocolVersion
            | Self::HandshakeRefused
            | Self::NotTls
            | Self::NoAuthorities(_) => false,
        }
    }

    /// A stable name.
    pub(super) const fn code(&self) -> &'static str {
        match self {
            Self::UntrustedIssuer => "tls_untrusted_issuer",
            Self::Expired(_) => "tls_certificate_expired",
            Self::NotYetValid(_) => "tls_certificate_not_yet_valid",
            Self::WrongName(_) => "tls_wrong_name",
            Self::AuthorityCertificate => "tls_authority_certificate",
            Self::InvalidCertificate(_) => "tls_invalid_certificate",
            Self::ClientCertificateRequired => "tls_client_certificate_required",
            Self::ProtocolVersion => "tls_protocol_version",
            Self::HandshakeRefused => "tls_handshake_refused",
            Self::NotTls => "tls_not_spoken",
            Self::NoAuthorities(_) => "tls_no_authorities",
            Self::Handshake(_) => "tls_handshake_failed",
        }
    }
}

/// The name in `DnsName("rabbit.example")`.
fn bare_name(presented: &str) -> String {
    let inner = presented.split_once('(').map_or(presented, |(_, inner)| inner);
    inner.trim_end_matches(')').trim_matches('"').to_owned()
}

fn since(at: Option<Timestamp>) -> String {
    at.map_or_else(String::new, |at| format!(" on {at}"))
}

fn only_from(at: Option<Timestamp>) -> String {
    at.map_or_else(String::new, |at| format!(", only from {at} on"))
}

fn only_for(names: &[String]) -> String {
    if names.is_empty() {
        return String::new();
    }
    let more = if names.len() > NAMES_SHOWN { ", …" } else { "" };
    let shown: Vec<_> = names.iter().take(NAMES_SHOWN).map(String::as_str).collect();
    format!(", only for {}{more}", shown.join(", "))
}

/// A TLS alert arrived on a connection that does not use TLS.
#[derive(Debug, thiserror::Error)]
#[error("the port expects TLS")]
struct AlertToPlainClient;

/// Fails if the first bytes of a connection are a TLS alert: RabbitMQ responds to AMQP on its TLS
/// port with one and resets the connection.
pub(super) fn refuse_alert(first: &[u8]) -> io::Result<()> {
    if first.starts_with(&ALERT_RECORD) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, AlertToPlainClient));
    }
    Ok(())
}

/// Whether an error comes from [`refuse_alert`].
pub(super) fn is_alert_to_plain_client(error: &io::Error) -> bool {
    error.get_ref().and_then(|inner| inner.downcast_ref::<AlertToPlainClient>()).is_some()
}
