//! The rules of counting, against a ledger of maps: any order and any repetition, one outcome.

use std::collections::HashMap;
use std::convert::Infallible;

use garenne_common::outcome::DeadReason;
use garenne_common::wire::{BatchState, Message};
use garenne_common::{QueueName, TaskName};
use proptest::prelude::*;

use super::*;

const RULES: Rules = Rules { batch_deadline: Duration::from_hours(1), task_notices: true };

#[derive(Default)]
struct Maps {
    results: HashMap<TaskId, Status>,
    letters: HashMap<TaskId, bool>,
    batches: HashMap<BatchId, Batch>,
    notices: Vec<Notice>,
    leases: HashMap<TaskId, LeaseRecord>,
}

impl Ledger for Maps {
    type Error = Infallible;

    fn insert_result(&mut self, result: &TaskResult) -> Result<Inserted, Infallible> {
        if let Some(status) = self.results.get(&result.id) {
            return Ok(Inserted::Repeat(*status));
        }
        self.results.insert(result.id.clone(), result.status);
        Ok(Inserted::Fresh)
    }

    fn final_status(&mut self, id: &TaskId) -> Result<Option<Status>, Infallible> {
        Ok(self.results.get(id).copied())
    }

    fn insert_attempt(&mut self, _: &RetryNote) -> Result<(), Infallible> {
        Ok(())
    }

    fn keep_letter(&mut self, letter: &DeadLetter, late: bool) -> Result<(), Infallible> {
        self.letters.entry(letter.id.clone()).or_insert(late);
        Ok(())
    }

    fn hide_letter(&mut self, id: &TaskId) -> Result<(), Infallible> {
        if let Some(late) = self.letters.get_mut(id) {
            *late = true;
        }
        Ok(())
    }

    fn load_batch(&mut self, id: &BatchId) -> Result<Option<Batch>, Infallible> {
        Ok(self.batches.get(id).cloned())
    }

    fn save_batch(&mut self, batch: &Batch) -> Result<(), Infallible> {
        self.batches.insert(batch.id.clone(), batch.clone());
        Ok(())
    }

    fn add_notice(&mut self, notice: &Notice) -> Result<(), Infallible> {
        self.notices.push(notice.clone());
        Ok(())
    }

    fn park(&mut self, _: &DeadLetter) -> Result<(), Infallible> {
        Ok(())
    }

    fn task_ended(&mut self, _: &TaskId) -> Result<(), Infallible> {
        Ok(())
    }

    fn batch_ended(&mut self, _: &BatchId) -> Result<(), Infallible> {
        Ok(())
    }

    fn add_resend(&mut self, _: &Resend) -> Result<(), Infallible> {
        Ok(())
    }

    fn lease(&mut self, id: &TaskId) -> Result<Option<LeaseRecord>, Infallible> {
        Ok(self.leases.get(id).cloned())
    }

    fn begin_lease(&mut self, lease: &Lease) -> Result<(), Infallible> {
        let standing = LeaseRecord { fence: lease.fence.clone(), state: LeaseState::Held };
        self.leases.insert(lease.id.clone(), standing);
        Ok(())
    }

    fn mark_lease(&mut self, id: &TaskId, state: LeaseState) -> Result<(), Infallible> {
        if let Some(lease) = self.leases.get_mut(id) {
            lease.state = state;
        }
        Ok(())
    }

    fn drop_lease(&mut self, id: &TaskId) -> Result<(), Infallible> {
        self.leases.remove(id);
        Ok(())
    }
}

fn at(millis: u64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn batch_id() -> BatchId {
    BatchId::new("b-1").unwrap()
}

fn result(id: &str, batch: Option<BatchId>, status: Status, finished: u64) -> TaskResult {
    TaskResult {
        id: TaskId::new(id).unwrap(),
        name: TaskName::new("a.b").unwrap(),
        queue: QueueName::default(),
        batch,
        status,
        output: None,
        error: None,
        reason: None,
        attempt: 1,
        redelivered: false,
        worker: "w".into(),
        started_at: at(finished - 1),
        finished_at: at(finished),
        fingerprint: None,
    }
}

fn group(reports: &[Report], letters: &[Letter]) -> Group {
    let mut group = Group::new(at(50_000));
    group.reports = reports.to_vec();
    group.letters = letters.to_vec();
    group
}

fn letter(id: &str, reason: DeadReason) -> Letter {
    let mut message = Message::default();
    message.properties.message_id = Some(id.to_owned());
    message.properties.kind = Some("a.b".to_owned());
    Letter::of_task(DeadLetter::new(&message, "default", reason, "no", "w"))
}

fn run(ledger: &mut Maps, group: &Group) -> Committed {
    let Ok(committed) = apply(ledger, group, RULES);
    committed
}

#[test]
fn a_success_hides_the_dead_letter_of_a_retry_fork() {
    let success = Report::Finished(result("t", None, Status::Succeeded, 5));
    let mut maps = Maps::default();
    let done = run(&mut maps, &group(&[success], &[letter("t", DeadReason::Fatal)]));
    assert_eq!((done.fresh, done.repeats, done.notices), (1, 1, 1));
    assert_eq!(done.given_up, []);
    assert!(maps.letters.values().all(|late| *late));
}

#[test]
fn a_replayed_dead_letter_stays_listed_and_ends_its_task_once() {
    let mut maps = Maps::default();
    let letters = group(&[], &[letter("t", DeadReason::Fatal)]);
    assert_eq!(run(&mut maps, &letters).given_up.len(), 1);
    let again = run(&mut maps, &letters);
    assert_eq!((again.fresh, again.repeats, again.notices), (0, 1, 0));
    assert!(maps.letters.values().all(|late| !late));
}

#[test]
fn an_unknown_task_has_no_record_until_it_ends_and_leaves_the_list_then() {
    let mut maps = Maps::default();
    run(&mut maps, &group(&[], &[letter("t", DeadReason::UnknownTask)]));
    assert!(maps.results.is_empty() && maps.notices.is_empty());
    let success = Report::Finished(result("t", None, Status::Succeeded, 5));
    run(&mut maps, &group(&[success], &[]));
    assert!(maps.letters.values().all(|late| *late));
}

#[test]
fn task_notices_can_be_disabled() {
    let rules = Rules { task_notices: false, ..RULES };
    let success = Report::Finished(result("t", None, Status::Succeeded, 5));
    let Ok(done) = apply(&mut Maps::default(), &group(&[success], &[]), rules);
    assert_eq!((done.fresh, done.notices), (1, 0));
}

fn lease(number: u64, execution: &str) -> Lease {
    Lease {
        id: TaskId::new("t").unwrap(),
        message: Message::default(),
        queue: QueueName::default(),
        fence: fence(number, execution),
        worker: "w".to_owned(),
        term: Duration::from_mins(1),
    }
}

fn fence(number: u64, execution: &str) -> Fence {
    Fence { number, execution: execution.to_owned() }
}

fn ended_under(number: u64, execution: &str) -> Report {
    let result = result("t", None, Status::Succeeded, 5);
    Report::FinishedUnderLease { fence: fence(number, execution), result }
}

#[test]
fn an_execution_whose_lease_lapsed_ends_nothing() {
    let mut maps = Maps::default();
    let mut begun = group(&[], &[]);
    begun.leases.push(lease(1, "a"));
    run(&mut maps, &begun);
    maps.leases.values_mut().for_each(|lease| lease.state = LeaseState::Lapsed);
    let late = run(&mut maps, &group(&[ended_under(1, "a")], &[]));
    assert_eq!((late.fresh, late.outdated), (0, 1));
    let next = run(&mut maps, &group(&[ended_under(2, "b")], &[]));
    assert_eq!((next.fresh, maps.leases.len()), (1, 0));
    // Its lease comes again with a redelivered group: the task has ended.
    run(&mut maps, &begun);
    assert!(maps.leases.is_empty());
}

/// A batch of `members`, its opening and its seal, each report up to three times, in any order and
/// cut into groups anywhere.
fn any_history() -> impl Strategy<Value = (usize, Vec<Vec<Report>>)> {
    let members = prop::collection::vec(0..3_usize, 0..8);
    (members, prop::collection::vec(1..4_usize, 10)).prop_flat_map(|(members, repeats)| {
        let count = members.len();
        let mut reports = vec![
            Report::BatchOpened { batch: batch_id(), at: at(100), deadline: at(90_000) },
            Report::BatchSealed { batch: batch_id(), count: count as u64, at: at(200) },
        ];
        reports.extend(members.iter().enumerate().map(|(index, status)| {
            let status = Status::ALL[*status];
            let finished = 300 + index as u64;
            Report::Finished(result(&format!("t-{index}"), Some(batch_id()), status, finished))
        }));
        let all: Vec<_> = reports
            .into_iter()
            .zip(repeats)
            .flat_map(|(report, times)| vec![report; times])
            .collect();
        let cuts = prop::collection::vec(any::<bool>(), all.len());
        (Just(count), Just(all).prop_shuffle(), cuts).prop_map(|(count, all, cuts)| {
            let mut groups = vec![vec![]];
            for (report, cut) in all.into_iter().zip(cuts) {
                if cut {
                    groups.push(vec![]);
                }
                groups.last_mut().unwrap().push(report);
            }
            (count, groups)
        })
    })
}

proptest! {
    #[test]
    fn any_order_and_any_repetition_end_a_batch_once_and_alike((count, groups) in any_history()) {
        let mut maps = Maps::default();
        for reports in &groups {
            run(&mut maps, &group(reports, &[]));
        }
        let batch = &maps.batches[&batch_id()];
        prop_assert_eq!(batch.state, BatchState::Done);
        prop_assert_eq!(batch.summary().ended(), count as u64);
        prop_assert_eq!((batch.opened_at, batch.deadline), (at(100), at(90_000)));
        let last = if count == 0 { 200 } else { 299 + count as u64 };
        prop_assert_eq!(batch.finished_at, Some(at(last)));
        prop_assert_eq!(maps.notices.len(), 1);
        prop_assert_eq!(maps.notices[0].key(), "batch.b-1");
    }
}
