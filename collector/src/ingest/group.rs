//! Groups: the decoded contents of several deliveries, to be stored in one transaction.
//!
//! Pure. Nothing is refused: an invalid message becomes a dead letter, since a delivery that is neither
//! stored nor acknowledged would block the collector.

use garenne_common::batch_key::Memberships;
use garenne_common::outcome::DeadReason;
use garenne_common::wire::report::{self, BUNDLE_KIND, REPLY_KIND};
use garenne_common::wire::{DeadLetter, Lease, Message, Report, RetryNote, bundle};
use garenne_common::{QueueName, TaskResult, Timestamp};

/// A group is also full at this size, which bounds the memory that large outputs take.
const MAX_GROUP_BYTES: usize = 8 * 1024 * 1024;

/// What is stored in one transaction.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// When it was started, by the clock of this machine.
    pub at: Timestamp,
    /// Reports in the order of their arrival.
    pub reports: Vec<Report>,
    /// Leases that begin. They are applied before the reports, which may contain notes about them.
    pub leases: Vec<Lease>,
    /// Dead letters in the order of their arrival.
    pub letters: Vec<Letter>,
    bytes: usize,
}

/// A dead letter and the final record of its task.
#[derive(Debug, Clone, PartialEq)]
pub struct Letter {
    /// The letter.
    pub letter: DeadLetter,
    /// The final record; `None` if the task has not ended or the letter does not belong to a task.
    pub result: Option<TaskResult>,
}

/// Which queue a delivery came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Reports of workers and producers.
    Results,
    /// Dead letters.
    Dead,
    /// Messages without a queue.
    Unrouted,
}

impl Group {
    /// An empty group.
    pub fn new(at: Timestamp) -> Self {
        Self { at, reports: vec![], leases: vec![], letters: vec![], bytes: 0 }
    }

    /// The number of records.
    pub fn len(&self) -> usize {
        self.reports.len() + self.leases.len() + self.letters.len()
    }

    /// Whether it contains no record.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it should not get any more records.
    pub fn is_full(&self, size: usize) -> bool {
        self.len() >= size || self.bytes >= MAX_GROUP_BYTES
    }

    /// Adds the contents of one message. `by` is the origin of dead letters that are created here.
    pub fn take(&mut self, source: Source, routing_key: &str, message: &Message, by: &str) {
        self.bytes += message.body.len();
        match source {
            Source::Results => self.take_reports(routing_key, message, by),
            Source::Dead => self.take_dead(message, by),
            Source::Unrouted => self.take_unrouted(routing_key, message, by),
        }
    }

    fn take_dead(&mut self, message: &Message, by: &str) {
        if message.properties.kind.as_deref() == Some(REPLY_KIND) {
            // The reply_to of a task names this queue. The reply must not count as the end of that task.
            return self.take_invalid("dead", message, "a reply instead of a dead letter", by);
        }
        // The broker dead-letters a bundle as a whole; workers do so with single tasks.
        if !DeadLetter::is_one(message)
            && let Some(tasks) = tasks_of(message, &DeadLetter::decode(message).queue)
        {
            let letters = tasks.iter().map(|task| Letter::of_task(DeadLetter::decode(task)));
            return self.letters.extend(letters);
        }
        self.letters.push(Letter::of_task(DeadLetter::decode(message)));
    }

    fn take_reports(&mut self, routing_key: &str, message: &Message, by: &str) {
        let taken = if Lease::is_one(message) {
            Lease::decode(message).map(|lease| self.leases.push(lease))
        } else {
            report::decode(message).map(|reports| {
                let mut memberships = Memberships::default();
                let admitted =
                    reports.into_iter().filter_map(|report| admitted(report, &mut memberships));
                self.reports.extend(admitted);
            })
        };
        match taken {
            Ok(()) => {}
            Err(error) => {
                let error = format!("not a bundle of reports: {error}");
                tracing::warn!(
                    app_id = message.properties.app_id,
                    "{error}; kept as a dead letter"
                );
                self.take_invalid(routing_key, message, &error, by);
            }
        }
    }

    /// Keeps a message that does not belong to a task. It gets an id of its own: the id in the message may
    /// be that of a task, whose letter it must not replace.
    fn take_invalid(&mut self, routing_key: &str, message: &Message, error: &str, by: &str) {
        let mut message = message.clone();
        let error = match message.properties.message_id.take() {
            Some(id) => format!("{error} (its message_id was {id:?})"),
            None => error.to_owned(),
        };
        let reason = DeadReason::Malformed;
        let letter = DeadLetter::new(&message, routing_key, reason, &error, by);
        self.letters.push(Letter { letter, result: None });
    }

    /// Tasks, results and dead letters can all be unrouted.
    fn take_unrouted(&mut self, routing_key: &str, message: &Message, by: &str) {
        if DeadLetter::is_one(message) {
            self.letters.push(Letter::of_task(DeadLetter::decode(message)));
        } else if message.properties.kind.as_deref() == Some(BUNDLE_KIND) || Lease::is_one(message)
        {
            self.take_reports(routing_key, message, by);
        } else {
            let error = format!("no queue {routing_key:?} existed when the broker took the task");
            let letter = |task: &Message| {
                let reason = DeadReason::Unrouted;
                Letter::of_task(DeadLetter::new(task, routing_key, reason, &error, by))
            };
            match tasks_of(message, routing_key) {
                Some(tasks) => self.letters.extend(tasks.iter().map(letter)),
                None => self.letters.push(letter(message)),
            }
        }
    }
}

/// The tasks of a bundle as messages of their own, each with the broker's headers of the bundle. `None` if
/// the message is not a bundle or is invalid.
fn tasks_of(message: &Message, queue: &str) -> Option<Vec<Message>> {
    if !bundle::is_one(message) {
        return None;
    }
    let queue = QueueName::new(queue).unwrap_or_default();
    let mut tasks = bundle::singles(message, &queue).ok()?;
    for task in &mut tasks {
        task.headers
            .extend(message.headers.iter().filter(|(name, _)| is_set_by_broker(name)).cloned());
    }
    Some(tasks)
}

/// Replaces the key of a batch in a report by its id. Reports about a batch without its key are dropped; a
/// result without the right key belongs to no batch.
fn admitted(mut report: Report, memberships: &mut Memberships) -> Option<Report> {
    match &mut report {
        Report::Finished(TaskResult { batch, .. })
        | Report::FinishedUnderLease { result: TaskResult { batch, .. }, .. }
        | Report::Retrying(RetryNote { batch, .. }) => {
            *batch = batch.take().and_then(|sent| memberships.of(&sent));
        }
        Report::BatchOpened { batch, .. } | Report::BatchSealed { batch, .. } => {
            let Some(id) = memberships.of(batch) else {
                tracing::debug!(%batch, "report about a batch without its key dropped");
                return None;
            };
            *batch = id;
        }
        Report::Lease(_) => {}
        // Only collectors send it, in responses.
        Report::Conflict { .. } => return None,
    }
    Some(report)
}

fn is_set_by_broker(header: &str) -> bool {
    header.starts_with("x-last-death-")
}

impl Letter {
    /// The letter of a task.
    pub fn of_task(letter: DeadLetter) -> Self {
        let result = letter.to_result();
        Self { letter, result }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::wire::Properties;

    fn task() -> Message {
        let properties = Properties {
            kind: Some("a.b".to_owned()),
            message_id: Some("t-1".to_owned()),
            ..Properties::default()
        };
        Message { properties, headers: vec![], body: b"{}".to_vec().into() }
    }

    fn taken(source: Source, message: &Message) -> Group {
        let mut group = Group::new(Timestamp::from_millis(1));
        group.take(source, "cpu", message, "me");
        group
    }

    #[test]
    fn an_invalid_bundle_becomes_a_dead_letter_without_a_record() {
        let group = taken(Source::Results, &task());
        assert_eq!(group.reports, []);
        assert_eq!(group.letters[0].letter.reason, DeadReason::Malformed);
        assert_eq!(group.letters[0].result, None);
        // It names t-1 but is not the dead letter of that task.
        assert_ne!(group.letters[0].letter.id.as_str(), "t-1");
        assert!(group.letters[0].letter.error.contains("t-1"));
    }

    #[test]
    fn a_reply_in_the_dead_letter_queue_ends_no_task() {
        let mut reply = task();
        reply.properties.kind = Some(REPLY_KIND.to_owned());
        let group = taken(Source::Dead, &reply);
        assert_eq!(group.letters[0].letter.reason, DeadReason::Malformed);
        assert_eq!(group.letters[0].result, None);
    }

    #[test]
    fn an_unrouted_task_ends() {
        let group = taken(Source::Unrouted, &task());
        let result = group.letters[0].result.as_ref().unwrap();
        assert_eq!((result.id.as_str(), result.queue.as_str()), ("t-1", "cpu"));
        assert_eq!(result.reason, Some(DeadReason::Unrouted));
    }

    #[test]
    fn each_task_of_a_bundle_gets_a_dead_letter() {
        let tasks = ["t-1", "t-2"].map(|id| {
            let mut task = task();
            task.properties.message_id = Some(id.to_owned());
            garenne_common::wire::task::decode(&task, &QueueName::default()).unwrap().unwrap()
        });
        let mut bundle = bundle::encode(&tasks, "test").unwrap();
        let ends = |source, bundle: &Message| {
            let results = taken(source, bundle).letters.into_iter().map(|letter| letter.result);
            let ends =
                results.map(Option::unwrap).map(|end| (end.id.to_string(), end.queue, end.reason));
            ends.collect::<Vec<_>>()
        };
        let cpu = QueueName::new("cpu").unwrap();
        let both = |reason| ["t-1", "t-2"].map(|id| (id.to_owned(), cpu.clone(), Some(reason)));
        assert_eq!(ends(Source::Unrouted, &bundle), both(DeadReason::Unrouted));
        let note = |text: &str| garenne_common::wire::HeaderValue::Text(text.to_owned());
        bundle.set_header("x-last-death-reason", note("expired"));
        bundle.set_header("x-last-death-queue", note("g.tasks.cpu"));
        assert_eq!(ends(Source::Dead, &bundle), both(DeadReason::Expired));
    }

    #[test]
    fn an_invalid_bundle_is_one_dead_letter() {
        let mut bundle = task();
        bundle.properties.kind = Some(bundle::BUNDLE_KIND.to_owned());
        for source in [Source::Dead, Source::Unrouted] {
            assert_eq!(taken(source, &bundle).letters.len(), 1);
        }
    }

    #[test]
    fn unrouted_reports_and_dead_letters_are_processed_as_such() {
        let at = Timestamp::from_millis(1);
        let batch = garenne_common::BatchId::new("b").unwrap();
        let reports = [Report::BatchSealed { batch, count: 0, at }];
        let bundle = report::encode(&reports, "test").unwrap();
        assert_eq!(taken(Source::Unrouted, &bundle).reports, reports);

        let letter = DeadLetter::new(&task(), "cpu", DeadReason::Fatal, "no", "w");
        let group = taken(Source::Unrouted, &letter.encode());
        assert_eq!(group.letters[0].letter.reason, DeadReason::Fatal);
    }

    #[test]
    fn large_bodies_fill_a_group() {
        let mut message = task();
        message.body = vec![0; MAX_GROUP_BYTES].into();
        assert!(taken(Source::Dead, &message).is_full(1_000));
    }
}
