//! Batches whose members must present a key.
//!
//! The producer that opens such a batch generates a key. The key replaces the id of the batch in
//! the header of its tasks, in their results, and in the reports that open and seal the batch. The
//! id is a hash of the key and may be public: a client that knows only the id can query the batch
//! and cannot add members. The collector verifies a member by the key in its report alone. Any
//! other id is open: every client that knows it can add members.

use std::borrow::Cow;
use std::fmt::Write as _;

use sha2::{Digest, Sha256};

use crate::names::BatchId;

/// Prefix of a key; 32 hexadecimal digits follow.
const KEY: &str = "key-";
/// Prefix of the id of a batch with a key; 32 hexadecimal digits follow.
const ID: &str = "bk1-";
const BYTES: usize = 16;

impl BatchId {
    /// Generates a key with 128 random bits.
    pub fn generate_key() -> Self {
        // A UUID of version 4 has 122 random bits.
        let (one, other) = (uuid::Uuid::new_v4(), uuid::Uuid::new_v4());
        let digest = Sha256::new().chain_update(one).chain_update(other).finalize();
        Self::tagged(KEY, &digest)
    }

    /// The batch that a report with this id or key belongs to: the batch of the key, or the open
    /// batch with the id. `None` for the id of a batch that requires its key.
    pub fn membership(&self) -> Option<Self> {
        match (self.is_key(), self.has_key()) {
            (true, _) => Some(self.public().into_owned()),
            (false, true) => None,
            (false, false) => Some(self.clone()),
        }
    }

    /// The id of the batch, which may be shown, also if this is a key.
    pub fn public(&self) -> Cow<'_, Self> {
        if !self.is_key() {
            return Cow::Borrowed(self);
        }
        Cow::Owned(Self::tagged(ID, &Sha256::digest(self.as_str())))
    }

    /// Whether this is the id of a batch that requires its key.
    pub fn has_key(&self) -> bool {
        is_tagged(self.as_str(), ID)
    }

    fn is_key(&self) -> bool {
        is_tagged(self.as_str(), KEY)
    }

    fn tagged(tag: &str, digest: &[u8]) -> Self {
        let mut text = String::with_capacity(tag.len() + 2 * BYTES);
        text.push_str(tag);
        for byte in digest.iter().take(BYTES) {
            let written = write!(text, "{byte:02x}");
            debug_assert!(written.is_ok(), "writing into a string does not fail");
        }
        Self::of_text(&text)
    }
}

/// [`BatchId::membership`] with a cache of one entry, since the reports in one message usually
/// belong to the same batch.
#[derive(Debug, Default)]
pub struct Memberships(Option<(BatchId, Option<BatchId>)>);

impl Memberships {
    /// The batch that a report with this id or key belongs to; see [`BatchId::membership`].
    pub fn of(&mut self, sent: &BatchId) -> Option<BatchId> {
        if let Some((known, belongs_to)) = &self.0
            && known == sent
        {
            return belongs_to.clone();
        }
        let belongs_to = sent.membership();
        self.0 = Some((sent.clone(), belongs_to.clone()));
        belongs_to
    }
}

fn is_tagged(text: &str, tag: &str) -> bool {
    text.strip_prefix(tag).is_some_and(|digits| {
        digits.len() == 2 * BYTES
            && digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_follows_from_the_key_and_does_not_grant_membership() {
        let (key, other) = (BatchId::generate_key(), BatchId::generate_key());
        assert_ne!(key, other);
        let id = key.public().into_owned();
        assert!(id.has_key() && !key.has_key());
        assert_eq!(key.membership(), Some(id.clone()));
        assert_eq!(id.membership(), None);
        assert_eq!(*id.public(), id);
        assert_ne!(other.membership(), Some(id));
        assert_eq!(BatchId::new(key.as_str()).unwrap(), key, "a key is a valid id on the wire");
    }

    #[test]
    fn a_key_is_as_long_as_a_uuid() {
        assert_eq!(BatchId::generate_key().as_str().len(), BatchId::generate().as_str().len());
    }

    /// As documented in docs/protocol.md.
    #[test]
    fn the_hash_is_sha_256_of_the_whole_key() {
        let key = BatchId::new("key-000102030405060708090a0b0c0d0e0f").unwrap();
        let digest = Sha256::digest("key-000102030405060708090a0b0c0d0e0f");
        let digits: String = digest[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(key.public().as_str(), format!("bk1-{digits}"));
    }

    #[test]
    fn ids_of_other_clients_are_open() {
        for text in ["b-1", "key-", "key-xyz", "bk1-00", BatchId::generate().as_ref()] {
            let id = BatchId::new(text).unwrap();
            assert_eq!((id.membership(), id.has_key()), (Some(id.clone()), false));
            assert_eq!(*id.public(), id);
        }
    }
}
