//! The members of an open batch, counted when the broker confirms them.
//!
//! Ids of confirmed members come in; the count that seals the batch comes out. Sends nothing
//! itself.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};

use garenne_common::{BatchId, TaskId};
use parking_lot::Mutex;

/// The key of a batch and the number of its confirmed members.
pub(crate) struct Members {
    /// What members and the seal carry instead of the batch's id; never shown.
    key: BatchId,
    /// Members with generated ids, which are all different.
    generated: AtomicU64,
    /// Members with ids that the caller has chosen; an id that comes again is the same member.
    chosen: Mutex<HashSet<TaskId>>,
}

impl Members {
    pub(crate) fn new(key: BatchId) -> Self {
        Self { key, generated: AtomicU64::new(0), chosen: Mutex::default() }
    }

    pub(crate) fn key(&self) -> &BatchId {
        &self.key
    }

    /// The key, to seal the batch with.
    pub(crate) fn into_key(self) -> BatchId {
        self.key
    }

    /// Confirmed members so far.
    pub(crate) fn count(&self) -> u64 {
        let chosen = u64::try_from(self.chosen.lock().len()).unwrap_or(u64::MAX);
        self.generated.load(Ordering::Relaxed) + chosen
    }

    /// Counts a confirmed member; `chosen` says that the caller has chosen its id.
    pub(crate) fn count_in(&self, id: &TaskId, chosen: bool) {
        if chosen {
            self.chosen.lock().insert(id.clone());
        } else {
            self.generated.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chosen_id_counts_once_and_generated_ids_count_each_time() {
        let members = Members::new(BatchId::generate_key());
        for (id, chosen) in [("a", true), ("a", true), ("b", false), ("c", false)] {
            members.count_in(&TaskId::new(id).unwrap(), chosen);
        }
        assert_eq!(members.count(), 3);
    }
}
