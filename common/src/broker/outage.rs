//! Which errors of an outage are logged.

use super::BrokerError;

/// Remembers the kinds of errors that were logged since an outage began, so that each is logged
/// once and not at every attempt. Texts are not compared: they may hold numbers and names that
/// change.
#[derive(Default)]
pub(super) struct OutageLog(Vec<&'static str>);

impl OutageLog {
    /// Whether an error is the first of its kind in this outage.
    pub(super) fn is_new(&mut self, error: &BrokerError) -> bool {
        let new = !self.0.contains(&error.code());
        if new {
            self.0.push(error.code());
        }
        new
    }

    /// Ends the outage.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_new_once_per_outage_whatever_its_text() {
        let lost = |waiting: u32| BrokerError::Lost(format!("{waiting} messages wait"));
        let unreachable = BrokerError::Unreachable { url: String::new(), cause: String::new() };
        let mut log = OutageLog::default();
        assert!(log.is_new(&lost(5)));
        assert!(!log.is_new(&lost(6)));
        assert!(log.is_new(&unreachable));
        assert!(!log.is_new(&lost(7)), "two kinds take turns");
        assert!(!log.is_new(&unreachable));
        log.clear();
        assert!(log.is_new(&lost(8)));
    }
}
