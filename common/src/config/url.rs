//! The URL of a broker, whose password never shows.

use std::fmt;

/// An AMQP URL whose password never shows.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUrl(url::Url);

impl BrokerUrl {
    /// Checks an `amqp://` or `amqps://` URL.
    pub fn parse(text: &str) -> Result<Self, String> {
        let url = url::Url::parse(text).map_err(|error| {
            // The text may hold a password, so it is not repeated.
            format!("not a URL ({error}); expected amqp://user:password@host:5672/vhost")
        })?;
        if !["amqp", "amqps"].contains(&url.scheme()) {
            // Not repeated: in what was meant as `user:password@host` it is the user.
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
            return Err("an @ or # stands behind the host; percent-encode / as %2F, ? as %3F, \
                        # as %23 and @ as %40 in the user name, the password and the vhost"
                .to_owned());
        }
        check_parameters(&url)?;
        Ok(Self(url))
    }

    /// The URL with its password, for the client library alone.
    ///
    /// A URL without a path means the vhost `/`; lapin reads a lone slash as the vhost with an empty
    /// name, which hardly anybody has and everybody types, so that is mended here.
    pub fn expose(&self) -> String {
        let mut url = self.0.clone();
        if matches!(url.path(), "" | "/") {
            url.set_path("/%2f");
        }
        url.to_string()
    }

    /// Host and port, to connect to.
    pub fn address(&self) -> (String, u16) {
        let host = self.0.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        (host, self.0.port().unwrap_or(if self.is_encrypted() { 5671 } else { 5672 }))
    }

    /// Whether it speaks TLS, which checks the host's name.
    pub fn is_encrypted(&self) -> bool {
        self.0.scheme() == "amqps"
    }

    /// The same broker by way of something that listens on this port of this machine.
    #[must_use]
    pub fn by_way_of(&self, port: u16) -> Self {
        let mut url = self.0.clone();
        // Neither can fail: the URL has a host, and its scheme is one that knows ports.
        let changed = url.set_host(Some("127.0.0.1")).is_ok() && url.set_port(Some(port)).is_ok();
        debug_assert!(changed, "an AMQP URL has a host");
        Self(url)
    }

    /// The user name, for messages.
    pub fn user(&self) -> &str {
        if self.0.username().is_empty() { "guest" } else { self.0.username() }
    }

    /// The vhost as written, for messages.
    pub fn vhost(&self) -> String {
        let path = self.0.path().trim_start_matches('/');
        if path.is_empty() { "/".to_owned() } else { path.replace("%2f", "/").replace("%2F", "/") }
    }
}

/// What may stand behind the `?`. The client library ignores what it does not know, and a setting that is
/// ignored is one that somebody relies on.
fn check_parameters(url: &url::Url) -> Result<(), String> {
    let mut seen = vec![];
    for (name, value) in url.query_pairs() {
        let within = |least: u32, most: u32| match value.parse::<u32>() {
            Ok(number) if (least..=most).contains(&number) => Ok(()),
            Ok(_) | Err(_) => Err(format!("{name} must be a whole number from {least} to {most}")),
        };
        match &*name {
            "heartbeat" | "channel_max" => within(0, 65_535)?,
            // Larger frames are not screened, and RabbitMQ sends none.
            "frame_max" => within(4_096, 131_072)?,
            "connection_timeout" => {
                return Err(
                    "connection_timeout is not supported; set broker.connect_timeout".to_owned()
                );
            }
            "auth_mechanism" => {
                if !["plain", "amqplain", "external", "anonymous"].contains(&&*value.to_lowercase())
                {
                    return Err(
                        "auth_mechanism must be plain, amqplain, external or anonymous".to_owned()
                    );
                }
            }
            "cacertfile" | "certfile" | "keyfile" | "verify" | "server_name_indication" => {
                return Err(format!(
                    "{name} is not supported: certificates are checked with the authorities of the \
                     operating system"
                ));
            }
            // Not quoted: it may be a part of a password.
            _ => {
                return Err("an unknown parameter stands behind the ?; known are heartbeat, \
                            channel_max, frame_max and auth_mechanism"
                    .to_owned());
            }
        }
        if seen.contains(&name) {
            return Err(format!("{name} is given twice"));
        }
        seen.push(name);
    }
    Ok(())
}

/// Without user name, password and query: what logs and messages show.
impl fmt::Display for BrokerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = if self.0.scheme() == "amqps" { 5671 } else { 5672 };
        let host = self.0.host_str().unwrap_or_default();
        write!(f, "{}://{host}:{}", self.0.scheme(), self.0.port().unwrap_or(port))?;
        f.write_str(self.0.path())
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
    fn passwords_never_show() {
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
    fn another_way_leads_to_the_same_vhost() {
        let url = BrokerUrl::parse("amqp://me:s3cret@host/v").unwrap();
        assert_eq!(url.address(), ("host".to_owned(), 5672));
        assert_eq!(url.by_way_of(77).expose(), "amqp://me:s3cret@127.0.0.1:77/v");
    }

    #[test]
    fn parameters_are_known_and_within_their_bounds() {
        let parse = |query: &str| BrokerUrl::parse(&format!("amqp://me:pw@host/v?{query}"));
        for fine in ["heartbeat=30", "heartbeat=0&frame_max=4096", "auth_mechanism=EXTERNAL"] {
            assert!(parse(fine).is_ok(), "{fine}");
        }
        for (wrong, named) in [
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
    fn an_address_of_version_6_stays_one() {
        let url = BrokerUrl::parse("amqp://guest:guest@[2001:db8::1]:5672/%2f").unwrap();
        assert_eq!(url.address(), ("2001:db8::1".to_owned(), 5672));
        assert_eq!(url.to_string(), "amqp://[2001:db8::1]:5672/%2f");
    }

    #[test]
    fn a_bare_host_means_the_default_vhost() {
        for url in ["amqp://host", "amqp://host/"] {
            assert!(BrokerUrl::parse(url).unwrap().expose().ends_with("/%2f"), "{url}");
        }
    }
}
