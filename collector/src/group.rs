//! Groups: what a handful of deliveries say, decoded and ready for one transaction.
//!
//! Pure. Nothing is refused here: what cannot be read becomes a dead letter, for a delivery that is
//! neither stored nor acknowledged would stop the collector for good.

use garenne_common::batch_key::Memberships;
use garenne_common::outcome::DeadReason;
use garenne_common::wire::report::{self, BUNDLE_KIND, REPLY_KIND};
use garenne_common::wire::{DeadLetter, Lease, Message, Report, RetryNote, bundle};
use garenne_common::{QueueName, TaskResult, Timestamp};

/// A group also closes at so many bytes, so that a few huge outputs do not pile up in memory.
const MAX_GROUP_BYTES: usize = 8 * 1024 * 1024;

/// What goes into one transaction.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// When it was gathered, by this machine's clock.
    pub at: Timestamp,
    /// Reports in the order of their arrival.
    pub reports: Vec<Report>,
    /// Leases that began. They come before the reports: a note without its lease says nothing.
    pub leases: Vec<Lease>,
    /// Dead letters in the order of their arrival.
    pub letters: Vec<Letter>,
    bytes: usize,
}

/// A dead letter and what it says of its task.
#[derive(Debug, Clone, PartialEq)]
pub struct Letter {
    /// The letter.
    pub letter: DeadLetter,
    /// The task's final record; `None` if the task has not ended, or if the letter is no task's.
    pub result: Option<TaskResult>,
}

/// Which queue a delivery came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Reports of workers and producers.
    Results,
    /// Tasks that were given up.
    Dead,
    /// Whatever found no queue.
    Unrouted,
}

impl Group {
    /// An empty group.
    pub fn new(at: Timestamp) -> Self {
        Self { at, reports: vec![], leases: vec![], letters: vec![], bytes: 0 }
    }

    /// How many records it holds.
    pub fn len(&self) -> usize {
        self.reports.len() + self.leases.len() + self.letters.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it should take no more.
    pub fn is_full(&self, size: usize) -> bool {
        self.len() >= size || self.bytes >= MAX_GROUP_BYTES
    }

    /// Adds what one message says. `by` signs letters that are made here.
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
            // Somebody named this queue in a reply_to. It must not count as the end of that task.
            return self.take_stray("dead", message, "a reply, and no dead letter", by);
        }
        // Given up by the broker, as a whole; a worker gives up the tasks of a bundle one by one.
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
                self.take_stray(routing_key, message, &error, by);
            }
        }
    }

    /// Keeps what is no task's, under an id of its own: it may name any task's, and must not be kept
    /// in the place of that task's letter.
    fn take_stray(&mut self, routing_key: &str, message: &Message, error: &str, by: &str) {
        let mut message = message.clone();
        let error = match message.properties.message_id.take() {
            Some(id) => format!("{error} (it came as {id:?})"),
            None => error.to_owned(),
        };
        let reason = DeadReason::Malformed;
        let letter = DeadLetter::new(&message, routing_key, reason, &error, by);
        self.letters.push(Letter { letter, result: None });
    }

    /// Tasks, results and dead letters all share this last resort.
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

/// The tasks of a bundle as messages of their own, each with what the broker noted on the bundle;
/// `None` if it is none, or none that can be read.
fn tasks_of(message: &Message, queue: &str) -> Option<Vec<Message>> {
    if !bundle::is_one(message) {
        return None;
    }
    let queue = QueueName::new(queue).unwrap_or_default();
    let mut tasks = bundle::singles(message, &queue).ok()?;
    for task in &mut tasks {
        task.headers.extend(message.headers.iter().filter(|(name, _)| is_brokers(name)).cloned());
    }
    Some(tasks)
}

/// A report with the id of its batch in the place of the key. A word about a batch from somebody who does
/// not have its key comes to nothing; a result without the right key is that of a task in no batch.
fn admitted(mut report: Report, memberships: &mut Memberships) -> Option<Report> {
    match &mut report {
        Report::Finished(TaskResult { batch, .. })
        | Report::FinishedUnderLease { result: TaskResult { batch, .. }, .. }
        | Report::Retrying(RetryNote { batch, .. }) => {
            *batch = batch.take().and_then(|sent| memberships.of(&sent));
        }
        Report::BatchOpened { batch, .. } | Report::BatchSealed { batch, .. } => {
            let Some(id) = memberships.of(batch) else {
                tracing::debug!(%batch, "a report about a batch without its key is ignored");
                return None;
            };
            *batch = id;
        }
        Report::Lease(_) => {}
    }
    Some(report)
}

fn is_brokers(header: &str) -> bool {
    header.starts_with("x-last-death-")
}

impl Letter {
    /// A letter that is a task's.
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
    fn a_bundle_that_does_not_decode_becomes_a_dead_letter_without_a_record() {
        let group = taken(Source::Results, &task());
        assert_eq!(group.reports, []);
        assert_eq!(group.letters[0].letter.reason, DeadReason::Malformed);
        assert_eq!(group.letters[0].result, None);
        // It says t-1, but is not what became of that task.
        assert_ne!(group.letters[0].letter.id.as_str(), "t-1");
        assert!(group.letters[0].letter.error.contains("t-1"));
    }

    #[test]
    fn a_reply_among_the_dead_letters_ends_no_task() {
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
    fn every_task_of_a_bundle_ends_by_itself() {
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
    fn a_bundle_that_cannot_be_read_is_one_letter() {
        let mut bundle = task();
        bundle.properties.kind = Some(bundle::BUNDLE_KIND.to_owned());
        for source in [Source::Dead, Source::Unrouted] {
            assert_eq!(taken(source, &bundle).letters.len(), 1);
        }
    }

    #[test]
    fn reports_and_dead_letters_that_found_no_queue_stay_what_they_are() {
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
    fn huge_bodies_fill_a_group() {
        let mut message = task();
        message.body = vec![0; MAX_GROUP_BYTES].into();
        assert!(taken(Source::Dead, &message).is_full(1_000));
    }
}
