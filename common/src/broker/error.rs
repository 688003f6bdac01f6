//! What can go wrong between us and the broker, in sentences that say what to do.

use std::time::Duration;

use lapin::protocol::{AMQPError, AMQPErrorKind, AMQPHardError, AMQPSoftError};

use crate::config::BrokerUrl;

/// A failure of infrastructure: never a task's, never a message's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// No connection could be made.
    #[error("cannot reach RabbitMQ at {url}: {cause}; is it running, and is the address right?")]
    Unreachable {
        /// Where, without the password.
        url: String,
        /// What the operating system or the client library says.
        cause: String,
    },
    /// The broker refused the user or the password.
    #[error(
        "RabbitMQ at {url} refused the login of user {user:?}; check the user name and password"
    )]
    LoginRefused {
        /// Where.
        url: String,
        /// Who.
        user: String,
    },
    /// The virtual host does not exist, or the user has no access to it.
    #[error(
        "RabbitMQ at {url} has no virtual host {vhost:?} for this user; create it (rabbitmqctl add_vhost) \
         or mend the URL's path (/%2f is the default one)"
    )]
    NoVhost {
        /// Where.
        url: String,
        /// Which.
        vhost: String,
    },
    /// The user may not do this.
    #[error("RabbitMQ forbids it: {0}; grant the permission or use another user")]
    Forbidden(String),
    /// An object exists with other properties.
    #[error(
        "the broker object {object} exists with other properties: {cause}; delete it or use another namespace"
    )]
    Conflict {
        /// Which.
        object: String,
        /// What the broker says.
        cause: String,
    },
    /// An object does not exist.
    #[error("{0} does not exist on the broker")]
    Missing(String),
    /// The broker has an alarm (memory or disk) and takes no messages.
    #[error(
        "RabbitMQ takes no messages now (memory or disk alarm), gave up after {0:?}; free memory or disk \
         on the broker, then try again"
    )]
    Blocked(Duration),
    /// The broker answered that it did not take the message.
    #[error(
        "RabbitMQ did not take the message for {0:?} (the queue is full or has an internal error)"
    )]
    Rejected(String),
    /// No answer in time; the message may or may not have arrived.
    #[error("RabbitMQ did not confirm within {0:?}; whether it has the message is unknown")]
    Unconfirmed(Duration),
    /// A delivery was not acknowledged in time, so the broker took all of its channel back; the limit,
    /// if the broker named it.
    #[error(
        "RabbitMQ took deliveries back because one was not acknowledged within its consumer timeout{}; \
         raise consumer_timeout on the broker and broker.consumer_timeout here, or give tasks a shorter \
         time limit", of(*.0)
    )]
    TookBack(Option<Duration>),
    /// The connection or channel ended.
    #[error("the connection to RabbitMQ was lost: {0}")]
    Lost(String),
    /// Something arrived that is not AMQP.
    #[error("what arrives here is not AMQP 0-9-1, or not all of it")]
    Unreadable,
    /// A name or value does not fit into AMQP.
    #[error("{0:?} does not fit into an AMQP short string (255 bytes)")]
    TooLong(String),
    /// This side is closing.
    #[error("the connection was closed by this process")]
    Closed,
}

impl BrokerError {
    /// Whether waiting and trying again can help without a change by a person.
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Blocked(_)
            | Self::Rejected(_)
            | Self::Unconfirmed(_)
            | Self::Unreadable
            | Self::TookBack(_)
            | Self::Lost(_) => true,
            Self::LoginRefused { .. }
            | Self::NoVhost { .. }
            | Self::Forbidden(_)
            | Self::Conflict { .. }
            | Self::Missing(_)
            | Self::TooLong(_)
            | Self::Closed => false,
        }
    }

    /// What an attempt to connect ran into.
    pub(super) fn connecting(error: &lapin::Error, url: &BrokerUrl) -> Self {
        if let lapin::ErrorKind::ProtocolError(amqp) = error.kind() {
            if is_soft(amqp, &AMQPSoftError::ACCESSREFUSED) {
                // Also the answer to a vhost that exists but is closed to this user, in words only.
                if amqp.get_message().as_str().contains("vhost") {
                    return Self::NoVhost { url: url.to_string(), vhost: url.vhost() };
                }
                return Self::LoginRefused { url: url.to_string(), user: url.user().to_owned() };
            }
            if matches!(amqp.kind(), AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)) {
                return Self::NoVhost { url: url.to_string(), vhost: url.vhost() };
            }
        }
        Self::Unreachable { url: url.to_string(), cause: plain(error) }
    }

    /// What an operation on a channel ran into; `object` is what it was about.
    pub(super) fn operating(error: &lapin::Error, object: &str) -> Self {
        if matches!(error.kind(), lapin::ErrorKind::ParsingError(_)) {
            return Self::Unreadable;
        }
        let lapin::ErrorKind::ProtocolError(amqp) = error.kind() else {
            return Self::Lost(plain(error));
        };
        let text = || amqp.get_message().to_string();
        if is_soft(amqp, &AMQPSoftError::NOTFOUND) {
            Self::Missing(object.to_owned())
        } else if is_soft(amqp, &AMQPSoftError::ACCESSREFUSED) {
            Self::Forbidden(text())
        } else if is_acknowledgement_timeout(amqp.get_message().as_str()) {
            Self::TookBack(acknowledgement_timeout(amqp.get_message().as_str()))
        } else if is_soft(amqp, &AMQPSoftError::PRECONDITIONFAILED)
            || is_soft(amqp, &AMQPSoftError::RESOURCELOCKED)
        {
            Self::Conflict { object: object.to_owned(), cause: text() }
        } else {
            Self::Lost(plain(error))
        }
    }
}

fn of(timeout: Option<Duration>) -> String {
    timeout.map_or_else(String::new, |timeout| format!(" of {timeout:?}"))
}

/// Whether a text is `delivery acknowledgement on channel 1 timed out. Timeout value used: 60000 ms. …`.
fn is_acknowledgement_timeout(text: &str) -> bool {
    text.contains("delivery acknowledgement on channel ")
}

/// The number in it; older versions name none.
fn acknowledgement_timeout(text: &str) -> Option<Duration> {
    let (_, rest) = text.split_once("Timeout value used: ")?;
    let (digits, _) = rest.split_once(|c: char| !c.is_ascii_digit())?;
    digits.parse().ok().map(Duration::from_millis)
}

fn is_soft(error: &AMQPError, kind: &AMQPSoftError) -> bool {
    matches!(error.kind(), AMQPErrorKind::Soft(found) if found == kind)
}

/// lapin's words, without what could hold a URL: its errors carry none (verified for 4.12).
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum; its own words serve for the rest"
)]
fn plain(error: &lapin::Error) -> String {
    match error.kind() {
        lapin::ErrorKind::IOError(io) => io.to_string(),
        // Also what a peer causes that hangs up without a word.
        lapin::ErrorKind::ParsingError(_) => {
            "what answers there does not speak AMQP 0-9-1".to_owned()
        }
        lapin::ErrorKind::MissingHeartbeatError => "the broker fell silent (heartbeat)".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_broker_s_words_tell_its_consumer_timeout() {
        let text = "PRECONDITION_FAILED - delivery acknowledgement on channel 2 timed out. Timeout value \
                    used: 60000 ms. This timeout value can be configured, see consumers doc guide";
        assert!(is_acknowledgement_timeout(text));
        assert_eq!(acknowledgement_timeout(text), Some(Duration::from_mins(1)));
        let text = "PRECONDITION_FAILED - delivery acknowledgement on channel 2 timed out";
        assert!(is_acknowledgement_timeout(text));
        assert_eq!(acknowledgement_timeout(text), None);
        assert!(!is_acknowledgement_timeout("PRECONDITION_FAILED - inequivalent arg 'x'"));
    }

    #[test]
    fn a_timeout_and_an_alarm_say_what_to_do() {
        let text = BrokerError::TookBack(Some(Duration::from_mins(30))).to_string();
        assert!(text.contains("of 1800s; raise consumer_timeout on the broker"), "{text}");
        let text = BrokerError::Blocked(Duration::from_secs(5)).to_string();
        assert!(text.contains("5s; free memory or disk"), "{text}");
    }
}
