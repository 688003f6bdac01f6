//! Dead letters in the store: every filter, pages, replays, purges, and a million of them.

use garenne_common::wire::{LetterState, ReplayItem, ReplayOutcome, ReplayPlan, Replayed};
use proptest::prelude::*;

use super::*;

/// Twelve letters that differ in everything a filter knows; `l-0` is the oldest.
fn assortment() -> Vec<Letter> {
    let reasons = [DeadReason::Fatal, DeadReason::TimedOut, DeadReason::Malformed];
    let one = |n: u64| {
        let mut letter = letter(&format!("l-{n}"), reasons[usize::try_from(n % 3).unwrap()]).letter;
        letter.message.properties.kind =
            Some(format!("{}.run", ["mail", "image"][usize::from(n.is_multiple_of(2))]));
        letter.queue = ["cpu", "io"][usize::from(n >= 6)].to_owned();
        letter.error = format!("Host {n} REFUSED");
        letter.at = at(1_000 + n / 2 * 100);
        if n.is_multiple_of(4) {
            letter.message.set_header("x-garenne-batch", HeaderValue::Text("b-1".to_owned()));
        }
        Letter::of_task(letter)
    };
    (0..12).map(one).collect()
}

fn names(letters: &[DeadSummary]) -> String {
    let ids = letters.iter().map(|letter| letter.id.as_str().trim_start_matches("l-"));
    ids.collect::<Vec<_>>().join(" ")
}

fn everything() -> DeadFilter {
    DeadFilter::default()
}

fn item(task: &str, new: &str) -> ReplayItem {
    ReplayItem { id: id(task), new_id: Some(id(new)) }
}

impl Fixture {
    async fn replay(&self, items: &[ReplayItem], plan: &ReplayPlan) -> Vec<Replayed> {
        self.store.replay(items.to_vec(), plan.clone(), "ns.tasks".to_owned()).await.unwrap()
    }

    async fn waiting(&self) -> Vec<Resend> {
        let entries = self.store.resends(0, 1_000, 1 << 20).await.unwrap();
        entries.into_iter().map(|entry| entry.resend).collect()
    }

    /// All pages of this size, strung together.
    async fn paged(&self, filter: &DeadFilter, limit: usize) -> (Vec<DeadSummary>, Option<u64>) {
        let (mut letters, mut from, mut total) = (vec![], None, None);
        loop {
            let (filter, count) = (filter.clone(), from.is_none());
            let query = DeadQuery { filter, from, limit, count, whole: false };
            let page = self.store.dead_page(query).await.unwrap();
            assert!(page.letters.len() <= limit);
            total = total.or(page.total);
            letters.extend(page.letters);
            from = page.next;
            if from.is_none() {
                return (letters, total);
            }
        }
    }
}

#[tokio::test]
async fn every_filter_finds_what_it_names_newest_first() {
    let fixture = Fixture::new();
    fixture.commit(&[], &assortment()).await;
    let text = |text: &str| Some(text.to_owned());
    for (filter, expected) in [
        (everything(), "11 10 9 8 7 6 5 4 3 2 1 0"),
        (DeadFilter { name: text("mail.run"), ..everything() }, "11 9 7 5 3 1"),
        (DeadFilter { name: text("im*"), ..everything() }, "10 8 6 4 2 0"),
        (DeadFilter { name: text("????.run"), ..everything() }, "11 9 7 5 3 1"),
        (DeadFilter { queue: text("io"), ..everything() }, "11 10 9 8 7 6"),
        (DeadFilter { reasons: vec![DeadReason::Fatal], ..everything() }, "9 6 3 0"),
        (
            DeadFilter { reasons: vec![DeadReason::Fatal, DeadReason::TimedOut], ..everything() },
            "10 9 7 6 4 3 1 0",
        ),
        (DeadFilter { since: Some(at(1_400)), ..everything() }, "11 10 9 8"),
        (DeadFilter { until: Some(at(1_200)), ..everything() }, "3 2 1 0"),
        (DeadFilter { error: text("1 refused"), ..everything() }, "11 1"),
        (DeadFilter { batch: Some(batch_id()), ..everything() }, "8 4 0"),
        (DeadFilter { ids: vec![id("l-3"), id("nothing"), id("l-7")], ..everything() }, "7 3"),
        (
            DeadFilter { ids: vec![id("l-3"), id("l-7")], since: Some(at(1_200)), ..everything() },
            "7",
        ),
        (
            DeadFilter {
                name: text("mail.run"),
                reasons: vec![DeadReason::Fatal],
                queue: text("cpu"),
                since: Some(at(1_100)),
                ..everything()
            },
            "3",
        ),
        (DeadFilter { batch: Some(batch_id()), name: text("mail*"), ..everything() }, ""),
        (DeadFilter { state: LetterState::Late, ..everything() }, ""),
    ] {
        for limit in [1, 2, 5, 100] {
            let (found, total) = fixture.paged(&filter, limit).await;
            assert_eq!(names(&found), expected, "{filter:?} by {limit}");
            assert_eq!(total, Some(found.len() as u64), "{filter:?} by {limit}");
        }
    }
}

#[tokio::test]
async fn a_list_that_has_begun_meets_nothing_newer() {
    let fixture = Fixture::new();
    fixture.commit(&[], &assortment()[..4]).await;
    let query =
        |from| DeadQuery { filter: everything(), from, limit: 2, count: false, whole: false };
    let first = fixture.store.dead_page(query(None)).await.unwrap();
    // By its clock this one would come next.
    let mut old = letter("l-99", DeadReason::Fatal).letter;
    old.at = at(1);
    fixture.commit(&[], &[Letter::of_task(old)]).await;
    let second = fixture.store.dead_page(query(first.next)).await.unwrap();
    assert_eq!((names(&first.letters), names(&second.letters)), ("3 2".into(), "1 0".into()));
    assert_eq!(second.next, None);
}

#[tokio::test]
async fn a_replay_is_marked_and_queued_in_one_step_and_happens_once() {
    let fixture = Fixture::new();
    fixture.commit(&[], &assortment()).await;
    let plan = ReplayPlan::default();
    let rehearsal = ReplayPlan { dry_run: true, ..plan.clone() };
    let items = [item("l-0", "n-0"), item("nothing", "n"), item("l-1", "n-1")];
    let rehearsed = fixture.replay(&items, &rehearsal).await;
    assert_eq!(fixture.waiting().await, []);
    let done = fixture.replay(&items, &plan).await;
    assert_eq!(done, rehearsed);
    assert_eq!(done[1].outcome, ReplayOutcome::NotFound);
    let queue = "cpu".to_owned();
    assert_eq!(done[2].outcome, ReplayOutcome::Replayed { new_id: id("n-1"), queue });

    let fixture = fixture.reopen();
    let waiting = fixture.waiting().await;
    let ids = waiting.iter().map(|resend| resend.message.properties.message_id.as_deref());
    assert_eq!(ids.collect::<Vec<_>>(), [Some("n-0"), Some("n-1")]);
    assert_eq!(
        (waiting[0].exchange.as_str(), waiting[0].routing_key.as_str()),
        ("ns.tasks", "cpu")
    );
    // The same query again, because its response was lost; and the letter, redelivered.
    let again = fixture.replay(&items, &plan).await;
    assert_eq!(again[0].outcome, ReplayOutcome::Already { new_id: id("n-0") });
    fixture.commit(&[], &assortment()).await;
    assert_eq!(fixture.waiting().await.len(), 2);
    assert_eq!(names(&fixture.listed(&everything()).await), "11 10 9 8 7 6 5 4 3 2");
    let replayed = DeadFilter { state: LetterState::Replayed, ..everything() };
    assert_eq!(names(&fixture.listed(&replayed).await), "1 0");
    assert_eq!(fixture.store.totals().await.unwrap().dead, 10);

    let links = fixture.store.replay_links(id("l-0")).await.unwrap();
    assert_eq!((links.replayed_as, links.replay_of), (Some(id("n-0")), None));
    let links = fixture.store.replay_links(id("n-0")).await.unwrap();
    assert_eq!((links.replayed_as, links.replay_of), (None, Some(id("l-0"))));
}

#[tokio::test]
async fn a_parked_task_is_sent_again_as_itself_and_may_be_parked_again() {
    let fixture = Fixture::new();
    let mut parked = letter("t-1", DeadReason::UnknownTask).letter;
    parked.at = at(1_000);
    let first = Letter::of_task(parked.clone());
    fixture.commit(&[], std::slice::from_ref(&first)).await;
    let done = fixture.replay(&[item("t-1", "other")], &ReplayPlan::default()).await;
    let queue = "default".to_owned();
    assert_eq!(done[0].outcome, ReplayOutcome::Replayed { new_id: id("t-1"), queue });
    assert_eq!(fixture.store.task(id("t-1")).await.unwrap(), TaskState::Unknown);
    // The broker delivers the letter once more: its acknowledgement was lost.
    fixture.commit(&[], &[first]).await;
    assert_eq!(fixture.listed(&everything()).await, []);
    parked.message = fixture.waiting().await[0].message.clone();
    parked.at = at(2_000);
    fixture.commit(&[], &[Letter::of_task(parked)]).await;
    let listed = fixture.listed(&everything()).await;
    assert_eq!((listed.len(), listed[0].replays, &listed[0].replayed_as), (1, 1, &None));
    let state = fixture.store.task(id("t-1")).await.unwrap();
    assert!(matches!(state, TaskState::Parked { .. }), "{state:?}");
}

#[tokio::test]
async fn late_letters_go_again_only_if_somebody_insists() {
    let fixture = Fixture::new();
    fixture.commit(&[finished("t-1", None)], &[letter("t-1", DeadReason::Fatal)]).await;
    let late = DeadFilter { state: LetterState::Late, ..everything() };
    assert_eq!(fixture.listed(&late).await.len(), 1);
    let done = fixture.replay(&[item("t-1", "n-1")], &ReplayPlan::default()).await;
    assert!(matches!(done[0].outcome, ReplayOutcome::Refused { .. }), "{done:?}");
    let insisting = ReplayPlan { late: true, ..ReplayPlan::default() };
    let done = fixture.replay(&[item("t-1", "n-1")], &insisting).await;
    assert!(matches!(done[0].outcome, ReplayOutcome::Replayed { .. }), "{done:?}");
}

#[tokio::test]
async fn a_purge_leaves_final_records_and_ends_what_was_parked() {
    let fixture = Fixture::new();
    let sealed = Report::BatchSealed { batch: batch_id(), count: 1, at: at(1) };
    let mut parked = letter("parked", DeadReason::UnknownTask).letter;
    let batch = HeaderValue::Text(batch_id().to_string());
    parked.message.set_header("x-garenne-batch", batch);
    let letters = [letter("dead", DeadReason::Fatal), Letter::of_task(parked)];
    fixture.commit(&[sealed], &letters).await;
    let ids = vec![id("dead"), id("parked"), id("nothing")];
    let twice = [ids.clone(), ids.clone()].concat();
    let (purged, ended) = fixture.store.purge(twice).await.unwrap();
    assert_eq!((purged.purged, purged.ended), (2, 1));
    assert_eq!(ended.letters.len(), 1, "whoever waits for it is told");
    assert_eq!(fixture.store.purge(ids).await.unwrap().0.purged, 0);
    let fixture = fixture.reopen();
    assert_eq!(fixture.listed(&everything()).await, []);
    for task in ["dead", "parked"] {
        let state = fixture.store.task(id(task)).await.unwrap();
        assert!(matches!(state, TaskState::Finished { .. }), "{task}: {state:?}");
    }
    let status = fixture.store.batch(batch_id()).await.unwrap().unwrap();
    assert_eq!((status.summary.state, status.summary.failed), (BatchState::Done, 1));
    assert_eq!(fixture.store.totals().await.unwrap().results, 2);
}

#[tokio::test]
async fn a_whole_letter_is_whole_and_a_huge_body_comes_in_pieces() {
    let fixture = Fixture::new();
    let binary = |task: &str, bytes: usize| {
        let mut message = message(task);
        message.body = vec![255; bytes].into();
        Letter::of_task(DeadLetter::new(&message, "default", DeadReason::Malformed, "no", "w"))
    };
    let letters = [letter("text", DeadReason::Fatal), binary("bin", 3), binary("huge", 5 << 20)];
    fixture.commit(&[], &letters).await;
    let message = |task: &str| {
        let letter = fixture.store.dead(id(task));
        async { letter.await.unwrap().unwrap().message.unwrap() }
    };
    assert_eq!(message("text").await.body_text.as_deref(), Some("{\"a\":1}"));
    assert_eq!(message("text").await.headers["x-mine"], serde_json::json!(0.1));
    assert_eq!(message("bin").await.body_base64.as_deref(), Some("////"));
    let huge = message("huge").await;
    assert_eq!((huge.body_text, huge.body_base64), (None, None));
    let mut pieces = String::new();
    loop {
        let piece = fixture.store.dead_body(id("huge"), pieces.len() as u64 / 4 * 3).await.unwrap();
        if piece.is_empty() {
            break;
        }
        pieces.push_str(&piece);
    }
    // Five MiB are no multiple of three bytes: the last piece is padded.
    assert_eq!(pieces.len(), (5_usize << 20).div_ceil(3) * 4);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn pages_hold_every_letter_once_whatever_their_times(
        times in prop::collection::vec(0..5_u64, 1..30), limit in 1..8_usize,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let found = runtime.block_on(async {
            let fixture = Fixture::new();
            let letters = times.iter().enumerate().map(|(n, time)| {
                let mut letter = letter(&format!("l-{n}"), DeadReason::Fatal).letter;
                letter.at = at(*time);
                Letter::of_task(letter)
            });
            fixture.commit(&[], &letters.collect::<Vec<_>>()).await;
            fixture.paged(&everything(), limit).await.0
        });
        prop_assert!(found.windows(2).all(|pair| pair[0].at >= pair[1].at));
        let ids: std::collections::HashSet<_> = found.iter().map(|letter| &letter.id).collect();
        prop_assert_eq!((ids.len(), found.len()), (times.len(), times.len()));
    }
}

#[tokio::test]
#[ignore = "a measurement: cargo test -p garenne-collector -- --ignored --nocapture a_million"]
#[expect(clippy::print_stderr, reason = "a measurement is for people")]
async fn a_million_letters_are_listed_as_fast_as_a_hundred() {
    let fixture = Fixture::new();
    fixture.commit(&[], &[letter("l-0", DeadReason::Fatal)]).await;
    let path = fixture.directory.path().join("s.sqlite3");
    let fill = Connection::open(path).unwrap();
    fill.execute_batch(
        "INSERT INTO dead_letters (id, kind, queue, reason, error, given_up_by, at, redelivered, \
         late, envelope, body, stored_at) \
         WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < 1000000) \
         SELECT 'task-' || n, CASE WHEN n % 1000 = 0 THEN 'rare.run' ELSE 'mail.run' END, 'cpu', \
         CASE WHEN n % 5000 = 0 THEN 'timed_out' ELSE 'fatal' END, 'host ' || n || ' refused', 'w:1', \
         1000000 + n, 0, 0, (SELECT envelope FROM dead_letters), zeroblob(500), n FROM n",
    )
    .unwrap();
    let text = |text: &str| Some(text.to_owned());
    for (what, filter) in [
        ("nothing", everything()),
        ("--reason timed_out", DeadFilter { reasons: vec![DeadReason::TimedOut], ..everything() }),
        ("--reason fatal", DeadFilter { reasons: vec![DeadReason::Fatal], ..everything() }),
        ("--task rare.run", DeadFilter { name: text("rare.run"), ..everything() }),
        ("--since, a tenth", DeadFilter { since: Some(at(1_900_000)), ..everything() }),
        ("--task 'rare*'", DeadFilter { name: text("rare*"), ..everything() }),
        ("--error, none", DeadFilter { error: text("no such text"), ..everything() }),
    ] {
        let (mut from, mut found, mut pages, mut total, mut slowest) =
            (None, 0, 0, None, Duration::ZERO);
        let started = std::time::Instant::now();
        while found < 100 {
            let (filter, count) = (filter.clone(), pages == 0);
            let query = DeadQuery { filter, from, limit: 100 - found, count, whole: false };
            let asked = std::time::Instant::now();
            let page = fixture.store.dead_page(query).await.unwrap();
            slowest = slowest.max(asked.elapsed());
            pages += 1;
            total = total.or(page.total.map(|total| (total, page.more_than_total)));
            (found, from) = (found + page.letters.len(), page.next);
            if from.is_none() {
                break;
            }
        }
        let took = started.elapsed();
        eprintln!(
            "{what:20} {found:3} letters of {total:?} in {took:?}, {pages} queries, slowest {slowest:?}"
        );
        assert!(slowest < Duration::from_secs(2), "one query keeps all others waiting");
    }
}
