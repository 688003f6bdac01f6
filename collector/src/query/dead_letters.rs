//! Queries about dead letters: lists, replays, purges.
//!
//! Checks the limits and wakes the relays after changes; the store does the work.

use std::sync::Arc;

use garenne_common::wire::letters::MOST_LETTERS;
use garenne_common::wire::{DeadPage, ReplayItem, ReplayOutcome, ReplayPlan, Response};
use garenne_common::{TaskId, wire};
use tokio::sync::Notify;

use crate::ingest::unrouted_replies::UnroutedReplies;
use crate::query::refusal::Refusal;
use crate::store::{DeadQuery, Store};

pub(crate) struct DeadLetterQueries<S> {
    pub(crate) store: S,
    pub(crate) tasks_exchange: String,
    pub(crate) outbox_filled: Arc<Notify>,
    pub(crate) resends_filled: Arc<Notify>,
    /// For the senders of tasks that a purge ends.
    pub(crate) replies: UnroutedReplies,
}

impl<S: Store> DeadLetterQueries<S> {
    pub(crate) async fn list(&self, query: DeadQuery) -> Result<Response, Refusal> {
        check_count(query.filter.ids.len())?;
        let limit = query.limit.clamp(1, MOST_LETTERS);
        let page = self.store.dead_page(DeadQuery { limit, ..query }).await?;
        let DeadPage { letters, total, more_than_total, next } = page;
        Ok(Response::DeadList { letters, total, more_than_total, next })
    }

    pub(crate) async fn body(&self, id: TaskId, offset: u64) -> Result<Response, Refusal> {
        Ok(Response::DeadBody { base64: self.store.dead_body(id, offset).await? })
    }

    pub(crate) async fn replay(
        &self,
        letters: Vec<ReplayItem>,
        plan: ReplayPlan,
    ) -> Result<Response, Refusal> {
        check_count(letters.len())?;
        let dry_run = plan.dry_run;
        let exchange = self.tasks_exchange.clone();
        let letters = self.store.replay(letters, plan, exchange).await?;
        let goes =
            |letter: &&wire::Replayed| matches!(letter.outcome, ReplayOutcome::Replayed { .. });
        let replayed = letters.iter().filter(goes).count();
        if replayed > 0 && !dry_run {
            tracing::info!(replayed, of = letters.len(), "dead letters replayed");
            self.resends_filled.notify_one();
        }
        Ok(Response::DeadReplay { letters })
    }

    pub(crate) async fn purge(&self, ids: Vec<TaskId>) -> Result<Response, Refusal> {
        check_count(ids.len())?;
        let (purged, ended) = self.store.purge(ids).await?;
        if purged.purged > 0 {
            tracing::info!(purged = purged.purged, ended = purged.ended, "dead letters purged");
            self.outbox_filled.notify_one();
        }
        for letter in &ended.letters {
            self.replies.reply(letter);
        }
        Ok(Response::DeadPurge { purged })
    }
}

fn check_count(ids: usize) -> Result<(), Refusal> {
    if ids > MOST_LETTERS { Err(Refusal::TooMany(ids)) } else { Ok(()) }
}
