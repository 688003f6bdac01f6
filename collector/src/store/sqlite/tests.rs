//! The SQLite store on real files: replays, order, reopening, two collectors, retention.

use std::time::Duration;

use garenne_common::outcome::{DeadReason, Status};
use garenne_common::wire::{
    BatchState, CancelState, Codec, DeadFilter, DeadLetter, HeaderValue, Message, Notice, Payload,
    Report, RetryNote,
};
use garenne_common::{QueueName, TaskName};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::ingest::group::Letter;
use crate::rules::aggregate::Resend;
use crate::store::open_envelope;

mod letters;

const RULES: Rules = Rules { batch_deadline: Duration::from_hours(1), task_notices: true };

struct Fixture {
    store: SqliteStore,
    directory: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&directory.path().join("s.sqlite3"), RULES).unwrap();
        Self { store, directory }
    }

    fn reopen(self) -> Self {
        let Self { store, directory } = self;
        drop(store);
        let store = SqliteStore::open(&directory.path().join("s.sqlite3"), RULES).unwrap();
        Self { store, directory }
    }

    async fn commit(&self, reports: &[Report], letters: &[Letter]) -> Committed {
        self.store.commit(group(reports, letters)).await.unwrap()
    }

    async fn listed(&self, filter: &DeadFilter) -> Vec<DeadSummary> {
        let filter = filter.clone();
        let query = DeadQuery { filter, from: None, limit: 100, count: false, whole: false };
        self.store.dead_page(query).await.unwrap().letters
    }

    async fn keys(&self) -> Vec<String> {
        let entries = self.store.outbox(0, 1_000).await.unwrap();
        entries.iter().map(|entry| entry.notice.key()).collect()
    }
}

fn group(reports: &[Report], letters: &[Letter]) -> Arc<Group> {
    let mut group = Group::new(Timestamp::now());
    group.reports = reports.to_vec();
    group.letters = letters.to_vec();
    Arc::new(group)
}

fn at(millis: u64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn id(text: &str) -> TaskId {
    TaskId::new(text).unwrap()
}

fn batch_id() -> BatchId {
    BatchId::new("b-1").unwrap()
}

fn result(task: &str, batch: Option<BatchId>, status: Status) -> TaskResult {
    let succeeded = status == Status::Succeeded;
    TaskResult {
        id: id(task),
        name: TaskName::new("a.b").unwrap(),
        queue: QueueName::default(),
        batch,
        status,
        output: succeeded.then(|| Payload { codec: Codec::Bincode, bytes: vec![0, 255].into() }),
        error: (!succeeded).then(|| "no\0way".to_owned()),
        reason: (!succeeded).then_some(DeadReason::Fatal),
        attempt: 2,
        redelivered: true,
        worker: "host:1".into(),
        started_at: at(1),
        finished_at: at(u64::MAX / 4),
        fingerprint: None,
    }
}

fn finished(task: &str, batch: Option<BatchId>) -> Report {
    Report::Finished(result(task, batch, Status::Succeeded))
}

fn retry(task: &str, attempt: u32) -> RetryNote {
    RetryNote {
        id: id(task),
        name: TaskName::new("a.b").unwrap(),
        batch: Some(batch_id()),
        attempt,
        error: "not yet".to_owned(),
        next_at: at(2_000),
        worker: "host:1".to_owned(),
        at: at(1_000),
    }
}

fn message(task: &str) -> Message {
    let mut message = Message { body: b"{\"a\":1}".to_vec().into(), ..Message::default() };
    message.properties.message_id = Some(task.to_owned());
    message.properties.kind = Some("a.b".to_owned());
    message.set_header("x-mine", HeaderValue::Float(0.1));
    message
}

fn letter(task: &str, reason: DeadReason) -> Letter {
    Letter::of_task(DeadLetter::new(&message(task), "default", reason, "no", "w"))
}

#[tokio::test]
async fn a_result_comes_back_as_it_was_stored() {
    let fixture = Fixture::new();
    let ended = result("t-1", None, Status::Succeeded);
    let failed = result("t-2", None, Status::Failed);
    let reports = [Report::Finished(ended.clone()), Report::Finished(failed.clone())];
    fixture.commit(&reports, &[]).await;
    let fixture = fixture.reopen();
    let ids = vec![id("t-2"), id("nothing"), id("t-1")];
    let found = fixture.store.results(ids.clone(), 1 << 20).await.unwrap();
    assert_eq!(found, [failed.clone(), ended.clone()]);
    assert_eq!(fixture.store.results(ids, 1).await.unwrap(), [failed]);
    let state = fixture.store.task(id("t-1")).await.unwrap();
    assert_eq!(state, TaskState::Finished { result: ended });
}

#[tokio::test]
async fn a_replayed_group_changes_nothing_but_the_count_of_repeats() {
    let fixture = Fixture::new();
    let reports = [
        Report::BatchOpened { batch: batch_id(), at: at(5), deadline: at(u64::MAX / 4) },
        finished("t-1", Some(batch_id())),
        Report::Retrying(retry("t-2", 1)),
        finished("alone", None),
        Report::BatchSealed { batch: batch_id(), count: 1, at: at(6) },
    ];
    let letters = [letter("t-3", DeadReason::Fatal)];
    let first = fixture.commit(&reports, &letters).await;
    assert_eq!((first.fresh, first.repeats, first.notices), (3, 0, 3));
    let status = fixture.store.batch(batch_id()).await.unwrap().unwrap();
    let totals = fixture.store.totals().await.unwrap();
    let (fixture, keys) = (fixture.reopen(), ["task.alone", "task.t-3", "batch.b-1"]);
    let again = fixture.commit(&reports, &letters).await;
    assert_eq!((again.fresh, again.repeats, again.notices), (0, 3, 0));
    assert_eq!(fixture.keys().await, keys);
    let repeated = fixture.store.batch(batch_id()).await.unwrap().unwrap();
    assert_eq!((repeated.summary, repeated.failures), (status.summary, status.failures));
    let expected = Totals { repeats: 3, ..totals };
    assert_eq!(fixture.store.totals().await.unwrap(), expected);
    assert_eq!(expected, Totals { results: 3, repeats: 3, dead: 1, batches: 1 });
}

#[tokio::test]
async fn the_outbox_survives_a_crash_until_its_notices_are_confirmed() {
    let fixture = Fixture::new();
    fixture.commit(&[finished("t-1", None), finished("t-2", None)], &[]).await;
    let fixture = fixture.reopen();
    let entries = fixture.store.outbox(0, 1).await.unwrap();
    assert!(matches!(&entries[0].notice, Notice::Task(task) if task.task == id("t-1")));
    fixture.store.published(vec![entries[0].seq]).await.unwrap();
    let fixture = fixture.reopen();
    assert_eq!(fixture.keys().await, ["task.t-2"]);
}

#[tokio::test]
async fn tasks_that_go_back_survive_a_crash_until_they_are_confirmed() {
    let fixture = Fixture::new();
    let resend = |task: &str| {
        let (exchange, routing_key) = ("ns.tasks".to_owned(), "default".to_owned());
        Resend { exchange, routing_key, message: message(task) }
    };
    let both = [resend("t-1"), resend("t-2")];
    let added = both.clone();
    let add = move |ledger: &mut SqliteLedger<'_>| {
        added.iter().try_for_each(|resend| ledger.add_resend(resend))
    };
    fixture.store.write(add).await.unwrap();
    let fixture = fixture.reopen();
    let entries = fixture.store.resends(0, 10, 1 << 20).await.unwrap();
    assert_eq!(entries.iter().map(|entry| &entry.resend).collect::<Vec<_>>(), [&both[0], &both[1]]);
    // A slice is bounded, and never empty.
    assert_eq!(fixture.store.resends(0, 10, 1).await.unwrap(), entries[..1]);
    fixture.store.resent(vec![entries[0].seq]).await.unwrap();
    let fixture = fixture.reopen();
    assert_eq!(fixture.store.resends(0, 10, 1 << 20).await.unwrap(), entries[1..]);
}

#[tokio::test]
async fn dead_letters_are_kept_whole_and_late_ones_are_not_listed() {
    let fixture = Fixture::new();
    fixture.commit(&[finished("late", None)], &[letter("late", DeadReason::Fatal)]).await;
    fixture.commit(&[], &[letter("t-1", DeadReason::Fatal)]).await;
    let listed = fixture.listed(&DeadFilter::default()).await;
    assert_eq!(listed.iter().map(|letter| letter.id.as_str()).collect::<Vec<_>>(), ["t-1"]);
    let args = listed[0].args.as_ref().and_then(|args| args.as_json());
    assert_eq!(args, Some("{\"a\":1}"));
    assert!(fixture.store.dead(id("late")).await.unwrap().is_some());

    let path = fixture.directory.path().join("s.sqlite3");
    let (envelope, body): (String, Vec<u8>) = Connection::open(path)
        .unwrap()
        .query_row("SELECT envelope, body FROM dead_letters WHERE id = 't-1'", [], |row| {
            Ok((row.get(0)?, row.get(1)?))
        })
        .unwrap();
    assert_eq!(open_envelope(&envelope, body.into()).unwrap(), message("t-1"));
}

#[tokio::test]
async fn a_parked_task_may_retry_or_die_later() {
    let fixture = Fixture::new();
    fixture.commit(&[Report::Retrying(retry("t-1", 1))], &[]).await;
    let state = fixture.store.task(id("t-1")).await.unwrap();
    assert_eq!(state, TaskState::Retrying { last: retry("t-1", 1) });
    fixture.commit(&[], &[letter("t-1", DeadReason::UnknownTask)]).await;
    let state = fixture.store.task(id("t-1")).await.unwrap();
    assert!(matches!(state, TaskState::Parked { .. }), "{state:?}");
    fixture.commit(&[], &[letter("t-1", DeadReason::Fatal)]).await;
    let listed = fixture.listed(&DeadFilter::default()).await;
    assert_eq!(listed.iter().map(|letter| letter.reason).collect::<Vec<_>>(), [DeadReason::Fatal]);
    let state = fixture.store.task(id("t-1")).await.unwrap();
    assert!(matches!(state, TaskState::Finished { .. }), "{state:?}");
    assert_eq!(fixture.store.task(id("t-2")).await.unwrap(), TaskState::Unknown);
}

#[tokio::test]
async fn overdue_batches_are_abandoned_once_and_sealed_ones_are_not() {
    let fixture = Fixture::new();
    let sealed = BatchId::new("sealed").unwrap();
    let opened = |batch: BatchId| Report::BatchOpened { batch, at: at(1), deadline: at(100) };
    let seal = Report::BatchSealed { batch: sealed.clone(), count: 1, at: at(2) };
    fixture.commit(&[opened(batch_id()), opened(sealed), seal], &[]).await;
    assert!(!fixture.store.has_overdue_batches(at(99)).await.unwrap());
    assert!(fixture.store.has_overdue_batches(at(100)).await.unwrap());
    assert_eq!(fixture.store.abandon_overdue(at(100), 10).await.unwrap(), 1);
    assert_eq!(fixture.store.abandon_overdue(at(200), 10).await.unwrap(), 0);
    assert_eq!(fixture.keys().await, ["batch.b-1"]);
    // What comes too late is kept, and counted, but reopens nothing.
    let failed = Report::Finished(result("t-1", Some(batch_id()), Status::Failed));
    fixture.commit(&[failed], &[]).await;
    let status = fixture.store.batch(batch_id()).await.unwrap().unwrap();
    assert_eq!((status.summary.state, status.summary.failed), (BatchState::Abandoned, 1));
    assert_eq!(status.failures.len(), 1);
}

#[tokio::test]
async fn retention_deletes_what_is_over_in_slices_and_never_a_notice() {
    let fixture = Fixture::new();
    let tasks: Vec<_> = (0..5).map(|task| finished(&format!("t-{task}"), None)).collect();
    fixture.commit(&tasks, &[letter("dead", DeadReason::Fatal)]).await;
    let over = Report::BatchSealed { batch: batch_id(), count: 0, at: at(1) };
    let waiting = BatchId::new("waiting").unwrap();
    let sealed = Report::BatchSealed { batch: waiting, count: 1, at: at(1) };
    fixture.commit(&[over, sealed, Report::Retrying(retry("r", 1))], &[]).await;
    assert_eq!(fixture.store.delete_old(at(1), 2).await.unwrap(), 0);

    let later = Timestamp::now().plus(Duration::from_secs(1));
    let mut slices = vec![];
    while let Some(deleted) = Some(fixture.store.delete_old(later, 2).await.unwrap()) {
        if deleted == 0 {
            break;
        }
        slices.push(deleted);
    }
    // Six results, one attempt, one letter, one batch that is over.
    assert_eq!(slices, [2 + 1 + 1 + 1, 2, 2]);
    let expected = Totals { results: 0, repeats: 0, dead: 0, batches: 1 };
    assert_eq!(fixture.store.totals().await.unwrap(), expected);
    assert_eq!(fixture.keys().await.len(), 7);
}

#[tokio::test]
async fn a_wish_is_kept_once_until_its_task_or_batch_is_over() {
    let fixture = Fixture::new();
    fixture.commit(&[finished("t-0", None)], &[]).await;
    let cancel = async |ids: &[&str]| {
        let ids = ids.iter().map(|text| id(text)).collect();
        fixture.store.cancel(ids, "enough".to_owned()).await.unwrap()
    };
    let done = cancel(&["t-0", "t-1", "t-2"]).await;
    let states: Vec<_> = done.tasks.iter().map(|task| task.state).collect();
    let requested = CancelState::Requested;
    assert_eq!(states, [CancelState::TooLate, requested, requested]);
    assert_eq!(cancel(&["t-1"]).await.requests, done.requests[..1], "the same cancel request");
    let batch = fixture.store.cancel_batch(batch_id(), "all".to_owned()).await.unwrap();
    assert_eq!((batch.state, batch.summary), (requested, None));

    let fixture = fixture.reopen();
    let (first, newest) = fixture.store.cancels(0, 2).await.unwrap();
    assert_eq!(first, done.requests);
    let (rest, _) = fixture.store.cancels(first[1].seq, 2).await.unwrap();
    assert_eq!((rest.len(), rest[0].seq), (1, newest));

    let sealed = Report::BatchSealed { batch: batch_id(), count: 1, at: at(1) };
    fixture.commit(&[finished("t-1", Some(batch_id()))], &[]).await;
    assert_eq!(
        fixture.store.cancels(0, 9).await.unwrap().0.len(),
        2,
        "one cancel request took effect"
    );
    fixture.commit(&[sealed], &[]).await;
    let (left, still) = fixture.store.cancels(0, 9).await.unwrap();
    assert_eq!((left, still >= newest), (done.requests[1..].to_vec(), true));
    let over = fixture.store.cancel_batch(batch_id(), "all".to_owned()).await.unwrap();
    assert_eq!((over.state, over.request), (CancelState::TooLate, None));

    // A delayed task may come after `retention`, but not after that and the longest delay.
    let soon = Timestamp::now().plus(Duration::from_secs(1));
    fixture.store.delete_old(soon, 10).await.unwrap();
    assert_eq!(fixture.store.cancels(0, 9).await.unwrap().0.len(), 1);
    fixture.store.delete_old(soon.plus(garenne_common::topology::MAX_DELAY), 10).await.unwrap();
    assert_eq!(fixture.store.cancels(0, 9).await.unwrap().0, []);
}

#[tokio::test]
async fn a_parked_task_goes_back_whole_and_waits_longer_when_it_returns() {
    let fixture = Fixture::new();
    let parked = || letter("t-1", DeadReason::UnknownTask);
    fixture.commit(&[], &[parked()]).await;
    let kinds = fixture.store.parked_kinds(9).await.unwrap();
    let release =
        async || fixture.store.release(kinds[0].clone(), "g.tasks".to_owned(), 9).await.unwrap();
    let much_later = Timestamp::now().plus(Duration::from_hours(1));
    fixture.store.delete_old(much_later, 9).await.unwrap();
    assert_eq!(fixture.store.totals().await.unwrap().dead, 1, "no age ends what has not ended");
    assert_eq!((release().await, release().await), (1, 0));
    let resends = fixture.store.resends(0, 9, usize::MAX).await.unwrap();
    assert_eq!(resends[0].resend.message, parked().letter.message);
    assert_eq!(fixture.store.parked_kinds(9).await.unwrap(), [], "it is on its way");

    fixture.commit(&[], &[parked()]).await;
    assert_eq!(fixture.store.parked_kinds(9).await.unwrap(), kinds);
    assert_eq!(release().await, 0, "not before its pause is over");
    fixture.store.cancel(vec![id("t-1")], "enough".to_owned()).await.unwrap();
    let ended = fixture.store.end_cancelled_parked(9).await.unwrap();
    let result = ended.letters[0].result.as_ref().unwrap();
    assert_eq!((result.status, result.error.as_deref()), (Status::Cancelled, Some("enough")));
    assert_eq!(fixture.store.parked_kinds(9).await.unwrap(), []);
    assert_eq!(fixture.store.totals().await.unwrap().dead, 0);
}

#[tokio::test]
async fn two_collectors_on_one_file_count_each_task_once() {
    let fixture = Fixture::new();
    let other = SqliteStore::open(&fixture.directory.path().join("s.sqlite3"), RULES).unwrap();
    let reports: Vec<_> = (0..200).map(|n| finished(&format!("t-{n}"), Some(batch_id()))).collect();
    let commit_all = async |store: &SqliteStore, chunk: usize| {
        for part in reports.chunks(chunk) {
            store.commit(group(part, &[])).await.unwrap();
        }
    };
    tokio::join!(commit_all(&fixture.store, 3), commit_all(&other, 7));
    fixture.commit(&[Report::BatchSealed { batch: batch_id(), count: 200, at: at(1) }], &[]).await;
    let status = other.batch(batch_id()).await.unwrap().unwrap();
    assert_eq!((status.summary.state, status.summary.succeeded), (BatchState::Done, 200));
    assert_eq!(fixture.keys().await, ["batch.b-1"]);
}

/// Members, opening and seal of one batch, in any order, some of them several times.
fn any_order() -> impl Strategy<Value = Vec<Report>> {
    let mut reports: Vec<_> =
        (0..4).map(|n| finished(&format!("t-{n}"), Some(batch_id()))).collect();
    reports.push(Report::BatchOpened { batch: batch_id(), at: at(1), deadline: at(u64::MAX / 4) });
    reports.push(Report::BatchSealed { batch: batch_id(), count: 4, at: at(2) });
    prop::collection::vec(0..reports.len(), 0..10).prop_flat_map(move |repeats| {
        let mut all = reports.clone();
        all.extend(repeats.iter().map(|index| reports[*index].clone()));
        Just(all).prop_shuffle()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_order_and_any_crash_between_groups_end_a_batch_once(
        reports in any_order(), size in 1..5_usize, crash in 0..5_usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (status, keys) = runtime.block_on(async {
            let mut fixture = Fixture::new();
            for (index, part) in reports.chunks(size).enumerate() {
                fixture.commit(part, &[]).await;
                if index == crash {
                    // The group was committed and not acknowledged: it comes again.
                    fixture = fixture.reopen();
                    fixture.commit(part, &[]).await;
                }
            }
            (fixture.store.batch(batch_id()).await.unwrap().unwrap(), fixture.keys().await)
        });
        prop_assert_eq!(status.summary.state, BatchState::Done);
        prop_assert_eq!(status.summary.succeeded, 4);
        prop_assert_eq!(status.summary.opened_at, at(1));
        prop_assert_eq!(keys, ["batch.b-1"]);
    }
}
