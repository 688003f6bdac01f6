//! Deliberately wrong behaviour for the tests of the tests, compiled with the feature `failpoints`
//! only and active only where a [`Protection`] is disabled (decision 0016).

use super::window::Window;
use crate::failpoints::Protection;

/// Without `ConfirmWait`: reports a message as confirmed before the broker has confirmed it.
pub(super) fn report_unconfirmed(window: &mut Window<'_>, number: u64) {
    if !Protection::ConfirmWait.is_enabled()
        && let Some(message) = window.messages.remove(&number)
    {
        message.complete(Ok(()));
    }
}

/// Without `EpochCheck`: every channel has the number of the first, so that settlements of older
/// deliveries are sent over it.
pub(super) fn epoch_number(number: u64) -> u64 {
    if Protection::EpochCheck.is_enabled() { number } else { 1 }
}
