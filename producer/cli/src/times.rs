//! How commands print durations and ages.

use std::time::Duration;

use garenne_common::Timestamp;

/// A duration with at most two units: `1m 3s`, `250ms`.
pub(crate) fn span(time: Duration) -> String {
    let millis = Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let text = humantime::format_duration(millis).to_string();
    text.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

/// The time from `then` to `now` in whole seconds.
pub(crate) fn age(then: Timestamp, now: Timestamp) -> String {
    span(Duration::from_secs(now.since(then).as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_two_units_at_most() {
        assert_eq!(span(Duration::from_millis(250)), "250ms");
        assert_eq!(span(Duration::from_secs(3_723)), "1h 2m");
        assert_eq!(span(Duration::ZERO), "0s");
    }
}
