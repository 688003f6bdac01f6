//! Errors of the way to RabbitMQ, each one sentence that names the remedy.
//!
//! Errors of lapin come in, [`BrokerError`]s go out, classified as transient or permanent. No
//! message holds a password or query of the URL.

use std::time::Duration;

use lapin::protocol::{AMQPError, AMQPErrorKind, AMQPHardError, AMQPSoftError};

use super::limit::BrokerLimit;
use super::tls::{self, TlsFault};
use crate::config::BrokerUrl;

/// A failure of the infrastructure, never of a task or a message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// No connection could be made.
    #[error("cannot reach RabbitMQ at {url}: {cause}; is it running, and is the address right?")]
    Unreachable {
        /// The URL without login and query.
        url: String,
        /// The cause as reported by the operating system or the client library.
        cause: String,
    },
    /// The TLS handshake failed.
    #[error("cannot establish TLS with RabbitMQ at {url}: {fault}; {}", fault.remedy())]
    Tls {
        /// The URL without login and query.
        url: String,
        /// Why it failed.
        fault: TlsFault,
    },
    /// The URL says `amqp://`, and the port expects TLS.
    #[error(
        "the port of RabbitMQ at {url} expects TLS; use an amqps:// URL, or the port for plain \
         connections (5672)"
    )]
    TlsRequired {
        /// The URL without login and query.
        url: String,
    },
    /// The broker refused the user or the password.
    #[error(
        "RabbitMQ at {url} refused the login of user {user:?}; check the user name and password"
    )]
    LoginRefused {
        /// The URL without login and query.
        url: String,
        /// The user name.
        user: String,
    },
    /// The virtual host does not exist, or the user has no access to it.
    #[error(
        "RabbitMQ at {url} has no virtual host {vhost:?} for this user; create it (rabbitmqctl \
         add_vhost) or correct the URL's path (/%2f is the default one)"
    )]
    NoVhost {
        /// The URL without login and query.
        url: String,
        /// The virtual host.
        vhost: String,
    },
    /// The broker does not accept the connection parameters of the URL.
    #[error(
        "RabbitMQ at {url} refused the connection parameters: {cause}; change frame_max or \
         channel_max in the URL"
    )]
    ParametersRefused {
        /// The URL without login and query.
        url: String,
        /// The text of the broker.
        cause: String,
    },
    /// The broker refused the connection for another reason, for example during its shutdown.
    #[error("RabbitMQ at {url} refused the connection: {cause}; its log has the details")]
    Refused {
        /// The URL without login and query.
        url: String,
        /// The text of the broker.
        cause: String,
    },
    /// A limit that is configured on the broker is reached.
    #[error("a limit of RabbitMQ is reached: {cause}; {}", limit.remedy())]
    LimitReached {
        /// Which limit.
        limit: BrokerLimit,
        /// The text of the broker, with the limit's value.
        cause: String,
    },
    /// The user lacks a permission.
    #[error("RabbitMQ forbids it: {0}; grant the permission or use another user")]
    Forbidden(String),
    /// A broker object exists with other properties.
    #[error(
        "the broker object {object} exists with other properties: {cause}; delete it or use \
         another namespace"
    )]
    Conflict {
        /// Kind and name of the object.
        object: String,
        /// The text of the broker.
        cause: String,
    },
    /// A queue is exclusive to another connection.
    #[error(
        "the {0} is exclusive to another connection; close that connection or use another namespace"
    )]
    Locked(String),
    /// A broker object does not exist.
    #[error("{0} does not exist on the broker")]
    Missing(String),
    /// The broker accepts no messages because of a memory or disk alarm; the time waited.
    #[error(
        "RabbitMQ takes no messages now (memory or disk alarm), gave up after {0:?}; free memory \
         or disk on the broker, then try again"
    )]
    Blocked(Duration),
    /// The broker rejected a message (`basic.nack`); its routing key.
    #[error("RabbitMQ rejected the message for {0:?} (the queue is full or has an internal error)")]
    Rejected(String),
    /// No confirm within this time; the message may or may not have arrived.
    #[error("RabbitMQ did not confirm within {0:?}; whether it has the message is unknown")]
    Unconfirmed(Duration),
    /// A delivery was not acknowledged in time, so the broker closed its channel and requeued all
    /// deliveries of it; the limit, if the broker named it.
    #[error(
        "RabbitMQ requeued deliveries because one was not acknowledged within its consumer \
         timeout{}; raise consumer_timeout on the broker and broker.consumer_timeout here, or give \
         tasks a shorter time limit", of(*.0)
    )]
    ConsumerTimeout(Option<Duration>),
    /// The connection or channel ended.
    #[error("the connection to RabbitMQ was lost: {0}")]
    Lost(String),
    /// Bytes arrived that are no valid AMQP 0-9-1 frame.
    #[error("invalid or truncated AMQP frame; the connection to RabbitMQ was closed")]
    Protocol,
    /// A name or value is longer than AMQP allows.
    #[error("{0:?} does not fit into an AMQP short string (255 bytes)")]
    TooLong(String),
    /// This process is closing the connection.
    #[error("the connection was closed by this process")]
    Closed,
}

impl BrokerError {
    /// Whether a later attempt can succeed without a change of configuration, URL or certificate.
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Refused { .. }
            | Self::LimitReached { .. }
            | Self::Locked(_)
            | Self::Blocked(_)
            | Self::Rejected(_)
            | Self::Unconfirmed(_)
            | Self::Protocol
            | Self::ConsumerTimeout(_)
            | Self::Lost(_) => true,
            Self::Tls { fault, .. } => fault.is_transient(),
            Self::TlsRequired { .. }
            | Self::LoginRefused { .. }
            | Self::NoVhost { .. }
            | Self::ParametersRefused { .. }
            | Self::Forbidden(_)
            | Self::Conflict { .. }
            | Self::Missing(_)
            | Self::TooLong(_)
            | Self::Closed => false,
        }
    }

    /// A stable name for the kind of the error. Unlike the message it holds no text of the broker,
    /// which may change from attempt to attempt.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Tls { fault, .. } => fault.code(),
            Self::TlsRequired { .. } => "tls_required",
            Self::LoginRefused { .. } => "login_refused",
            Self::NoVhost { .. } => "no_vhost",
            Self::ParametersRefused { .. } => "parameters_refused",
            Self::Refused { .. } => "connection_refused",
            Self::LimitReached { limit, .. } => limit.code(),
            Self::Forbidden(_) => "forbidden",
            Self::Conflict { .. } => "conflict",
            Self::Locked(_) => "locked",
            Self::Missing(_) => "missing",
            Self::Blocked(_) => "blocked",
            Self::Rejected(_) => "rejected",
            Self::Unconfirmed(_) => "unconfirmed",
            Self::ConsumerTimeout(_) => "consumer_timeout",
            Self::Lost(_) => "connection_lost",
            Self::Protocol => "protocol_error",
            Self::TooLong(_) => "too_long",
            Self::Closed => "closed",
        }
    }

    /// Translates the error of an attempt to connect.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum; its own text serves for the rest"
    )]
    pub(super) fn connecting(error: &lapin::Error, url: &BrokerUrl) -> Self {
        let shown = url.to_string();
        match error.kind() {
            lapin::ErrorKind::ProtocolError(amqp) => Self::connection_refused(amqp, url),
            lapin::ErrorKind::IOError(io) if tls::is_alert_to_plain_client(io) => {
                Self::TlsRequired { url: shown }
            }
            lapin::ErrorKind::IOError(io) => match TlsFault::in_error(io) {
                Some(fault) => Self::Tls { url: shown, fault },
                None => Self::Unreachable { url: shown, cause: io.to_string() },
            },
            _ => Self::Unreachable { url: shown, cause: describe(error) },
        }
    }

    /// Translates `connection.close` during the opening of a connection.
    fn connection_refused(error: &AMQPError, url: &BrokerUrl) -> Self {
        let (shown, cause) = (url.to_string(), error.get_message().to_string());
        let not_allowed = is_hard(error, &AMQPHardError::NOTALLOWED);
        let access_refused = is_soft(error, &AMQPSoftError::ACCESSREFUSED);
        if let Some(limit) = BrokerLimit::named_in(&cause) {
            Self::LimitReached { limit, cause }
        } else if (not_allowed || access_refused) && cause.contains("vhost") {
            Self::NoVhost { url: shown, vhost: url.vhost() }
        } else if access_refused {
            Self::LoginRefused { url: shown, user: url.user() }
        } else if not_allowed && cause.contains("negotiated") {
            Self::ParametersRefused { url: shown, cause }
        } else {
            Self::Refused { url: shown, cause }
        }
    }

    /// Translates the error of an operation on a channel; `object` is the object of the operation.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "a foreign enum; its own text serves for the rest"
    )]
    pub(super) fn operating(error: &lapin::Error, object: &str) -> Self {
        match error.kind() {
            lapin::ErrorKind::ParsingError(_) => Self::Protocol,
            lapin::ErrorKind::ChannelsLimitReached => Self::LimitReached {
                limit: BrokerLimit::ConnectionChannels,
                cause: "all channels of the connection are in use (channel_max)".to_owned(),
            },
            lapin::ErrorKind::ProtocolError(amqp) => Self::closed_by_broker(amqp, object),
            _ => Self::Lost(describe(error)),
        }
    }

    /// Translates `channel.close` or `connection.close` in reply to an operation.
    fn closed_by_broker(error: &AMQPError, object: &str) -> Self {
        let text = error.get_message().to_string();
        if let Some(limit) = BrokerLimit::named_in(&text) {
            Self::LimitReached { limit, cause: text }
        } else if is_soft(error, &AMQPSoftError::NOTFOUND) {
            Self::Missing(object.to_owned())
        } else if is_soft(error, &AMQPSoftError::ACCESSREFUSED) {
            Self::Forbidden(text)
        } else if is_acknowledgement_timeout(&text) {
            Self::ConsumerTimeout(acknowledgement_timeout(&text))
        } else if is_soft(error, &AMQPSoftError::RESOURCELOCKED) {
            Self::Locked(object.to_owned())
        } else if is_soft(error, &AMQPSoftError::PRECONDITIONFAILED) {
            Self::Conflict { object: object.to_owned(), cause: text }
        } else {
            Self::Lost(text)
        }
    }
}

fn of(timeout: Option<Duration>) -> String {
    timeout.map_or_else(String::new, |timeout| format!(" of {timeout:?}"))
}

/// Matches `delivery acknowledgement on channel 1 timed out. Timeout value used: 60000 ms. …`.
fn is_acknowledgement_timeout(text: &str) -> bool {
    text.contains("delivery acknowledgement on channel ")
}

/// The timeout in such a text; older versions of RabbitMQ do not name it.
fn acknowledgement_timeout(text: &str) -> Option<Duration> {
    let (_, rest) = text.split_once("Timeout value used: ")?;
    let (digits, _) = rest.split_once(|c: char| !c.is_ascii_digit())?;
    digits.parse().ok().map(Duration::from_millis)
}

fn is_soft(error: &AMQPError, kind: &AMQPSoftError) -> bool {
    matches!(error.kind(), AMQPErrorKind::Soft(found) if found == kind)
}

fn is_hard(error: &AMQPError, kind: &AMQPHardError) -> bool {
    matches!(error.kind(), AMQPErrorKind::Hard(found) if found == kind)
}

/// The text of an error of lapin. None of them contains the URL (verified for 4.12).
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum; its own text serves for the rest"
)]
fn describe(error: &lapin::Error) -> String {
    match error.kind() {
        lapin::ErrorKind::IOError(io) => io.to_string(),
        // A peer that closes the connection at once causes this error, too.
        lapin::ErrorKind::ParsingError(_) => "the peer does not speak AMQP 0-9-1".to_owned(),
        lapin::ErrorKind::MissingHeartbeatError => {
            "no heartbeat from the broker within two intervals".to_owned()
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use lapin::types::ShortString;

    use super::*;

    fn url() -> BrokerUrl {
        BrokerUrl::parse("amqp://me:s3cret@host/v").unwrap()
    }

    fn closed(kind: AMQPErrorKind, text: &str) -> lapin::Error {
        let error = AMQPError::new(kind, ShortString::from(text));
        lapin::ErrorKind::ProtocolError(error).into()
    }

    fn not_allowed(text: &str) -> lapin::Error {
        closed(AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED), text)
    }

    #[test]
    fn consumer_timeouts_are_recognised_by_the_text_of_the_broker() {
        let text = "PRECONDITION_FAILED - delivery acknowledgement on channel 2 timed out. Timeout \
                    value used: 60000 ms. This timeout value can be configured, see consumers doc";
        assert!(is_acknowledgement_timeout(text));
        assert_eq!(acknowledgement_timeout(text), Some(Duration::from_mins(1)));
        let text = "PRECONDITION_FAILED - delivery acknowledgement on channel 2 timed out";
        assert!(is_acknowledgement_timeout(text));
        assert_eq!(acknowledgement_timeout(text), None);
        assert!(!is_acknowledgement_timeout("PRECONDITION_FAILED - inequivalent arg 'x'"));
    }

    #[test]
    fn messages_name_the_remedy() {
        let text = BrokerError::ConsumerTimeout(Some(Duration::from_mins(30))).to_string();
        assert!(text.contains("of 1800s; raise consumer_timeout on the broker"), "{text}");
        let text = BrokerError::Blocked(Duration::from_secs(5)).to_string();
        assert!(text.contains("5s; free memory or disk"), "{text}");
    }

    /// The texts are those of RabbitMQ 3.10.8, except `negotiated`, which is of 4.x.
    #[test]
    fn refused_connections_are_told_apart_by_the_text_of_the_broker() {
        for (text, code, transient) in [
            (
                "NOT_ALLOWED - access to vhost 'v' refused for user 'me': connection limit (0) is \
                 reached",
                "vhost_connection_limit",
                true,
            ),
            (
                "NOT_ALLOWED - connection refused for user 'me': user connection limit (0) is \
                 reached",
                "user_connection_limit",
                true,
            ),
            ("NOT_ALLOWED - vhost v not found", "no_vhost", false),
            ("NOT_ALLOWED - access to vhost 'v' refused for user 'me'", "no_vhost", false),
            (
                "NOT_ALLOWED - negotiated frame_max = 4096 is lower than the minimum allowed value \
                 (8192)",
                "parameters_refused",
                false,
            ),
        ] {
            let error = BrokerError::connecting(&not_allowed(text), &url());
            assert_eq!((error.code(), error.is_transient()), (code, transient), "{error}");
            assert!(error.to_string().contains("; "), "{error}");
        }
        let soft = AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED);
        let error = closed(soft, "ACCESS_REFUSED - Login was refused using authentication …");
        assert_eq!(BrokerError::connecting(&error, &url()).code(), "login_refused");
        let hard = AMQPErrorKind::Hard(AMQPHardError::INTERNALERROR);
        let error = closed(hard, "INTERNAL_ERROR - … refused for user 'me': vhost 'v' is down");
        let error = BrokerError::connecting(&error, &url());
        assert!(matches!(error, BrokerError::Refused { .. }) && error.is_transient(), "{error}");
    }

    /// The texts are those of RabbitMQ 3.10.8.
    #[test]
    fn operations_that_meet_a_limit_are_no_conflicts() {
        let full = closed(
            AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED),
            "PRECONDITION_FAILED - cannot declare queue 'q': queue limit in vhost 'v' (0) is \
             reached",
        );
        let channels = not_allowed(
            "NOT_ALLOWED - number of channels opened for user 'me' has reached the maximum allowed \
             user limit of (1)",
        );
        let local = lapin::ErrorKind::ChannelsLimitReached.into();
        for (error, code) in [
            (full, "vhost_queue_limit"),
            (channels, "user_channel_limit"),
            (local, "connection_channel_limit"),
        ] {
            let error = BrokerError::operating(&error, "queue q");
            assert_eq!((error.code(), error.is_transient()), (code, true), "{error}");
        }
        let locked = closed(
            AMQPErrorKind::Soft(AMQPSoftError::RESOURCELOCKED),
            "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q' in vhost 'v'.",
        );
        let locked = BrokerError::operating(&locked, "queue q");
        assert_eq!(locked, BrokerError::Locked("queue q".to_owned()));
        let other = closed(
            AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED),
            "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q' in vhost 'v'",
        );
        assert_eq!(BrokerError::operating(&other, "queue q").code(), "conflict");
    }
}
