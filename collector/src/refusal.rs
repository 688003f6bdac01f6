//! Why a question is not answered.

use garenne_common::wire::{CodecError, Malformed};

use crate::store::StoreError;

/// A question names, and a list shows, at most so many.
pub(crate) const MAX_ITEMS: usize = 1_000;
/// It is wrong, too large, or the store fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("{0} ids are more than the {MAX_ITEMS} that one question may name")]
    TooMany(usize),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Encode(#[from] CodecError),
}
