//! The URL of a broker, validated, and shown without its login.

use std::borrow::Cow;
use std::fmt;

use percent_encoding::percent_decode_str;

/// An `amqp://` or `amqps://` URL. `Display` and `Debug` show neither login nor query.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUrl(url::Url);

impl BrokerUrl {
    /// Validates a URL. The error is a sentence that quotes no part of it, since any part may be a
    /// piece of a password.
    pub fn parse(text: &str) -> Result<Self, String> {
        let url = url::Url::parse(text).map_err(|error| {
            format!("not a URL ({error}); expected amqp://user:password@host:5672/vhost")
        })?;
        if !["amqp", "amqps"].contains(&url.scheme()) {
            // Not quoted: in what was meant as `user:password@host` it is the user.
            return Err("the scheme must be amqp or amqps".to_owned());
        }
        if url.host_str().is_none_or(str::is_empty) {
            return Err(
                "the host is missing; expected amqp://user:password@host:5672/vhost".to_owned()
            );
        }
        // Then a part of the password was read as host, path or query, and would be shown.
        let tail = [Some(url.path()), url.query()];
        if url.fragment().is_some() || tail.into_iter().flatten().any(|part| part.contains('@')) {
            return Err("an @ or # follows the host; percent-encode / as %2F, ? as %3F, # as %23 \
                        and @ as %40 in the user name, the password and the vhost"
                .to_owned());
        }
        check_encoding(&url)?;
        check_parameters(&url)?;
        Ok(Self(url))
    }

    /// The URL with its password, for the client library.
    ///
    /// A URL without a path means the vhost `/`. lapin reads a lone slash as the vhost with the
    /// empty name, which hardly exists anywhere, while a lone slash is a common way to write the
    /// default; so this returns `/%2f` for both.
    pub fn expose(&self) -> String {
        let mut url = self.0.clone();
        if matches!(url.path(), "" | "/") {
            url.set_path("/%2f");
        }
        url.to_string()
    }

    /// Host and port to connect to.
    pub fn address(&self) -> (String, u16) {
        let host = self.0.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        (host, self.port())
    }

    /// Whether connections use TLS, which verifies the host's name.
    pub fn is_encrypted(&self) -> bool {
        self.0.scheme() == "amqps"
    }

    /// The same URL with this port of the local machine as its address, for a proxy to the broker.
    #[must_use]
    pub fn via_local_port(&self, port: u16) -> Self {
        let mut url = self.0.clone();
        // Neither can fail: the URL has a host, and its scheme is one that has ports.
        let changed = url.set_host(Some("127.0.0.1")).is_ok() && url.set_port(Some(port)).is_ok();
        debug_assert!(changed, "an AMQP URL has a host");
        Self(url)
    }

    /// The user name, decoded.
    pub fn user(&self) -> String {
        match self.0.username() {
            "" => "guest".to_owned(),
            user => decoded(user).into_owned(),
        }
    }

    /// The name of the vhost, decoded.
    pub fn vhost(&self) -> String {
        match self.0.path().trim_start_matches('/') {
            "" => "/".to_owned(),
            path => decoded(path).into_owned(),
        }
    }

    fn port(&self) -> u16 {
        self.0.port().unwrap_or(if self.is_encrypted() { 5671 } else { 5672 })
    }
}

/// Decodes a part of a URL that [`check_encoding`] has accepted.
fn decoded(part: &str) -> Cow<'_, str> {
    percent_decode_str(part).decode_utf8_lossy()
}

/// Checks the parts that lapin decodes; it would fail at every attempt to connect.
fn check_encoding(url: &url::Url) -> Result<(), String> {
    for (name, part) in [
        ("user name", url.username()),
        ("password", url.password().unwrap_or_default()),
        ("vhost", url.path()),
    ] {
        if percent_decode_str(part).decode_utf8().is_err() {
            return Err(format!("the {name} is not UTF-8 after percent-decoding"));
        }
    }
    Ok(())
}

/// Checks the parameters of the query. The client library ignores unknown ones, and users would
/// rely on a setting without effect.
fn check_parameters(url: &url::Url) -> Result<(), String> {
    let mut seen = vec![];
    for (name, value) in url.query_pairs() {
        check_parameter(&name, &value)?;
        if seen.contains(&name) {
            return Err(format!("{name} is given twice"));
        }
        seen.push(name);
    }
    Ok(())
}

fn check_parameter(name: &str, value: &str) -> Result<(), String> {
    let within = |least: u32, most: u32| match value.parse::<u32>() {
        Ok(number) if (least..=most).contains(&number) => Ok(()),
        Ok(_) | Err(_) => Err(format!("{name} must be a whole number from {least} to {most}")),
    };
    match name {
        // In AMQP 0-9-1 zero disables heartbeats. lapin 4 takes over the broker's interval instead,
        // and without heartbeats a dead connection would be noticed late or never.
        "heartbeat" if value.parse() == Ok(0) => Err(
            "heartbeat=0 is not supported, heartbeats cannot be disabled; give a number of seconds \
             from 1 to 65535, or remove it and set broker.heartbeat"
                .to_owned(),
        ),
        "heartbeat" => within(1, 65_535),
        "channel_max" => within(0, 65_535),
        // Larger frames are not screened, and RabbitMQ sends none.
        "frame_max" => within(4_096, 131_072),
        "connection_timeout" => {
            Err("connection_timeout is not supported; set broker.connect_timeout".to_owned())
        }
        "auth_mechanism" => {
            let known = ["plain", "amqplain", "external", "anonymous"];
            if known.contains(&value.to_lowercase().as_str()) {
                Ok(())
            } else {
                Err("auth_mechanism must be plain, amqplain, external or anonymous".to_owned())
            }
        }
        "cacertfile" | "certfile" | "keyfile" | "verify" | "server_name_indication" => {
            Err(format!(
                "{name} is not supported: certificates are checked with the authorities of the \
                 operating system"
            ))
        }
        // Not quoted: it may be a part of a password.
        _ => Err("an unknown parameter follows the ?; known are heartbeat, channel_max, frame_max \
                  and auth_mechanism"
            .to_owned()),
    }
}

/// Without user name, password and query, for logs and messages.
impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.0.host_str().unwrap_or_default();
        write!(f, "{}://{host}:{}{}", self.0.scheme(), self.port(), self.0.path())
    }
}

impl fmt::Debug for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_never_shown() {
        let url = BrokerUrl::parse("amqp://me:s3cret@host/v").unwrap();
        assert_eq!(format!("{url} {url:?}"), "amqp://host:5672/v amqp://host:5672/v");
        assert!(url.expose().contains("s3cret"));
        assert!(!BrokerUrl::parse("amqp//me:s3cret@host").unwrap_err().contains("s3cret"));
    }

    #[test]
    fn a_password_that_would_be_read_as_host_and_path_is_refused() {
        for separator in ["/", "?", "#"] {
            let url = format!("amqp://me:12{separator}s3cret@host");
            let refused = BrokerUrl::parse(&url).unwrap_err();
            assert!(refused.contains("percent-encode") && !refused.contains("s3cret"), "{refused}");
        }
        assert!(!BrokerUrl::parse("s3cret:pw@host").unwrap_err().contains("s3cret"));
        assert!(BrokerUrl::parse("amqp://me:12%2Fs3%40cret@host").is_ok());
    }

    #[test]
    fn user_and_vhost_are_decoded() {
        let url = BrokerUrl::parse("amqp://m%C3%A9%40home:pw@host/a%20b%2fc").unwrap();
        assert_eq!((url.user().as_str(), url.vhost().as_str()), ("mé@home", "a b/c"));
        for (url, part) in [
            ("amqp://m%ff:s3cret@host", "user name"),
            ("amqp://me:s3cret%ff@host", "password"),
            ("amqp://me:s3cret@host/%ff", "vhost"),
        ] {
            let refused = BrokerUrl::parse(url).unwrap_err();
            assert!(refused.contains(part) && !refused.contains("s3cret"), "{refused}");
        }
    }

    #[test]
    fn a_proxy_leads_to_the_same_vhost() {
        let url = BrokerUrl::parse("amqp://me:s3cret@host/v").unwrap();
        assert_eq!(url.address(), ("host".to_owned(), 5672));
        assert_eq!(url.via_local_port(77).expose(), "amqp://me:s3cret@127.0.0.1:77/v");
    }

    #[test]
    fn parameters_are_known_and_within_their_bounds() {
        let parse = |query: &str| BrokerUrl::parse(&format!("amqp://me:pw@host/v?{query}"));
        for fine in ["heartbeat=30", "heartbeat=1&frame_max=4096", "auth_mechanism=EXTERNAL"] {
            assert!(parse(fine).is_ok(), "{fine}");
        }
        for (wrong, named) in [
            ("heartbeat=0", "heartbeats cannot be disabled; give a number of seconds"),
            ("heartbeat=00", "heartbeats cannot be disabled"),
            ("heartbeat=70000", "heartbeat must be"),
            ("heartbeat=fast", "heartbeat must be"),
            ("heartbeat=1&heartbeat=2", "heartbeat is given twice"),
            ("frame_max=1", "frame_max must be"),
            ("cacertfile=/etc/ca.pem", "cacertfile is not supported"),
            ("connection_timeout=5", "connection_timeout is not supported"),
            ("auth_mechanism=magic", "auth_mechanism must be"),
            ("s3cret=1", "an unknown parameter"),
        ] {
            let refused = parse(wrong).unwrap_err();
            assert!(refused.contains(named) && !refused.contains("s3cret"), "{wrong}: {refused}");
        }
    }

    #[test]
    fn an_ipv6_address_is_kept() {
        let url = BrokerUrl::parse("amqp://guest:guest@[2001:db8::1]:5672/%2f").unwrap();
        assert_eq!(url.address(), ("2001:db8::1".to_owned(), 5672));
        assert_eq!(url.to_string(), "amqp://[2001:db8::1]:5672/%2f");
    }

    #[test]
    fn a_url_without_path_means_the_default_vhost() {
        for url in ["amqp://host", "amqp://host/"] {
            assert!(BrokerUrl::parse(url).unwrap().expose().ends_with("/%2f"), "{url}");
        }
    }
}
