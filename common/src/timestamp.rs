//! Points in time as they are transported: whole milliseconds since 1970, in UTC.
//!
//! The wall clocks of different machines disagree. Timestamps are for people, for expiry and for
//! retention; nothing whose correctness matters (delays, the order of attempts) compares two of
//! them.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Milliseconds since 1970-01-01T00:00:00Z.
///
/// Human-readable formats encode it as RFC 3339 text, binary ones as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(u64);

impl Timestamp {
    /// The current time by this machine's wall clock.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }

    /// The point in time this many milliseconds after 1970.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis)
    }

    /// Milliseconds since 1970.
    pub const fn as_millis(self) -> u64 {
        self.0
    }

    /// This time plus `span`, at most the last representable time.
    pub fn plus(self, span: Duration) -> Self {
        let span = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(span))
    }

    /// The time from `earlier` to this time; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = i128::from(self.0)
            .checked_mul(1_000_000)
            .and_then(|nanos| OffsetDateTime::from_unix_timestamp_nanos(nanos).ok())
            .and_then(|at| at.format(&Rfc3339).ok());
        // RFC 3339 ends with the year 9999; the number stands for any later time.
        match text {
            Some(text) => f.write_str(&text),
            None => write!(f, "{}ms", self.0),
        }
    }
}

impl std::str::FromStr for Timestamp {
    type Err = InvalidTimestamp;

    fn from_str(text: &str) -> Result<Self, InvalidTimestamp> {
        let nanos = match OffsetDateTime::parse(text, &Rfc3339) {
            Ok(at) => at.unix_timestamp_nanos(),
            Err(_) => return Self::from_number(text),
        };
        u64::try_from(nanos / 1_000_000).map(Self).map_err(|_| InvalidTimestamp(text.to_owned()))
    }
}

impl Timestamp {
    fn from_number(text: &str) -> Result<Self, InvalidTimestamp> {
        text.strip_suffix("ms")
            .and_then(|number| number.parse().ok())
            .map(Self)
            .ok_or_else(|| InvalidTimestamp(text.chars().take(80).collect()))
    }
}

/// Text that is not an RFC 3339 date and time in or after 1970.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a point in time such as 2026-11-23T09:00:00Z")]
pub struct InvalidTimestamp(String);

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if to.is_human_readable() { to.collect_str(self) } else { to.serialize_u64(self.0) }
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        if from.is_human_readable() {
            String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
        } else {
            u64::deserialize(from).map(Self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn text_is_rfc_3339() {
        let at = Timestamp::from_millis(1_795_424_400_123);
        assert_eq!(at.to_string(), "2026-11-23T09:00:00.123Z");
        assert_eq!(at.to_string().parse(), Ok(at));
    }

    proptest! {
        #[test]
        fn text_survives_a_round_trip(millis in any::<u64>()) {
            let at = Timestamp::from_millis(millis);
            prop_assert_eq!(at.to_string().parse(), Ok(at));
        }
    }
}
