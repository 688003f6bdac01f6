//! Why a query is refused.

use garenne_common::wire::{CodecError, Malformed};

use crate::store::StoreError;

/// Maximum number of items in a query or response.
pub(crate) const MAX_ITEMS: usize = 1_000;
/// The query is invalid or too large, or the store fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("{0} ids are more than the {MAX_ITEMS} that one query may name")]
    TooMany(usize),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Encode(#[from] CodecError),
}
