//! What a seed decides before anything happens: tasks and how they behave, processes, faults.

use std::time::Duration;

use garenne_common::outcome::{DeadReason, Status};
use garenne_common::wire::{self, HeaderValue, Message, Properties};
use garenne_common::{
    BatchId, Codec, Options, Payload, QueueName, ReplyFormat, ReplyTo, RetryPolicy, TaskId,
    TaskMessage, TaskName, Timestamp,
};
use garenne_worker::{Outcome, TaskError};

/// The moment at which every schedule begins.
pub(super) const BEGIN: u64 = 1_700_000_000_000;

pub(super) const MAX_ATTEMPTS: u32 = 4;
/// One task in so many runs under a lease.
const LEASED_IN: u8 = 4;

/// How a task behaves, whoever runs it and however often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Behaviour {
    Succeeds,
    /// So many attempts fail.
    FailsFirst(u32),
    FailsAlways,
    TimesOut,
    Panics,
    Fatal,
    BadArguments,
    /// Its `expires` has passed.
    Expired,
    /// No worker has a handler of its name.
    Unknown,
    /// It breaks the protocol.
    Malformed,
    /// Its queue does not exist.
    Unrouted,
    /// A foreign producer gave it no id.
    Nameless,
    /// A foreign producer gave it a short life in its queue.
    ShortLived,
}

use Behaviour as B;

/// A task of a script.
#[derive(Debug, Clone)]
pub(super) struct Work {
    pub(super) number: u32,
    pub(super) behaviour: Behaviour,
    pub(super) max_attempts: u32,
    pub(super) batch: Option<BatchId>,
    pub(super) queue: &'static str,
    /// Whether it may run longer than the broker waits.
    pub(super) leased: bool,
    /// Whether its sender wants a reply of its own.
    pub(super) replied: bool,
}

/// What a producer does, in this order.
#[derive(Debug, Clone)]
pub(super) enum Item {
    Open(BatchId),
    Submit(Work),
    /// When all its tasks are confirmed.
    Seal(BatchId, u64),
}

/// A whole schedule, but for the order of its steps.
pub(super) struct Script {
    pub(super) producers: Vec<Vec<Item>>,
    pub(super) workers: usize,
    pub(super) collectors: usize,
    pub(super) concurrency: usize,
    pub(super) prefetch: usize,
    /// Messages that a worker's publisher holds unconfirmed.
    pub(super) window: usize,
    pub(super) group_size: usize,
    /// Faults in 1,000 steps, while there are any left.
    pub(super) fault_rate: u32,
    pub(super) faults: u32,
    /// After so many steps there are no more faults.
    pub(super) chaos_steps: u32,
}

impl Script {
    pub(super) fn new(random: &mut fastrand::Rng) -> Self {
        let mut number = 0;
        let producers = (0..random.usize(1..=2)).map(|_| producer(random, &mut number)).collect();
        // One schedule in eight is quiet: then everything must happen exactly once.
        let faults = if random.u8(..8) == 0 { 0 } else { random.u32(1..=14) };
        Self {
            producers,
            workers: random.usize(1..=3),
            collectors: random.usize(1..=2),
            concurrency: random.usize(1..=3),
            prefetch: random.usize(1..=6),
            window: random.usize(1..=4),
            group_size: random.usize(1..=6),
            fault_rate: random.u32(5..=60),
            faults,
            chaos_steps: random.u32(100..=900),
        }
    }

    /// All tasks.
    pub(super) fn work(&self) -> impl Iterator<Item = &Work> {
        self.producers.iter().flatten().filter_map(|item| match item {
            Item::Submit(work) => Some(work),
            Item::Open(_) | Item::Seal(..) => None,
        })
    }
}

fn producer(random: &mut fastrand::Rng, number: &mut u32) -> Vec<Item> {
    let mut items = vec![];
    for _ in 0..random.usize(1..=2) {
        let batch = random.bool().then(|| BatchId::new(&format!("b-{number}")).unwrap());
        items.extend(batch.clone().map(Item::Open));
        let count = random.u32(0..=6);
        for _ in 0..count {
            items.push(Item::Submit(work(random, *number, batch.clone())));
            *number += 1;
        }
        items.extend(batch.map(|batch| Item::Seal(batch, count.into())));
        *number += 1;
    }
    items
}

fn work(random: &mut fastrand::Rng, number: u32, batch: Option<BatchId>) -> Work {
    let behaviour = match random.u8(..32) {
        12..18 => B::FailsFirst(random.u32(1..=3)),
        18..21 => B::FailsAlways,
        21 => B::TimesOut,
        22 => B::Panics,
        23 => B::Fatal,
        24 => B::BadArguments,
        25 => B::Expired,
        // Parked, so its batch would stay open.
        26 if batch.is_none() => B::Unknown,
        27 => B::Malformed,
        28 => B::Unrouted,
        29 if batch.is_none() => B::Nameless,
        30 => B::ShortLived,
        _ => B::Succeeds,
    };
    let queue = match behaviour {
        B::Unrouted => "ghost",
        _ if random.u8(..3) == 0 => "cpu",
        _ => "default",
    };
    let (max_attempts, leased) = (random.u32(1..=MAX_ATTEMPTS), random.u8(..LEASED_IN) == 0);
    let replied = random.bool();
    Work { number, behaviour, max_attempts, batch, queue, leased, replied }
}

impl Work {
    pub(super) fn id(&self) -> TaskId {
        TaskId::new(&format!("t-{}", self.number)).unwrap()
    }

    /// The message that its producer sends.
    pub(super) fn message(&self) -> Message {
        let retry = RetryPolicy {
            max_attempts: self.max_attempts,
            base: Duration::from_millis(150),
            ..RetryPolicy::DEFAULT
        };
        let expired = self.behaviour == B::Expired;
        let expires_at = expired.then(|| Timestamp::from_millis(BEGIN - 1));
        let name = if self.behaviour == B::Unknown { "sim.unknown" } else { "sim.work" };
        let task = TaskMessage {
            id: self.id(),
            name: TaskName::new(name).unwrap(),
            queue: QueueName::new(self.queue).unwrap(),
            args: Payload {
                codec: Codec::Json,
                bytes: self.number.to_string().into_bytes().into(),
            },
            attempt: 1,
            batch: self.batch.clone(),
            reply: self.replied.then(|| ReplyTo {
                queue: "sim.reply.sender".into(),
                correlation_id: None,
                format: ReplyFormat::Plain,
            }),
            options: Options { retry, expires_at, ..Options::default() },
            submitted_at: Some(Timestamp::from_millis(BEGIN)),
            traceparent: None,
            fingerprint: None,
        };
        let mut message = wire::task::encode(&task, "producer");
        match self.behaviour {
            B::Nameless => message.properties.message_id = None,
            B::Malformed => message.set_header("x-garenne-timeout-ms", HeaderValue::Bool(true)),
            B::ShortLived => message.properties.expiration = Some("100".to_owned()),
            _ => {}
        }
        message
    }

    /// What an attempt comes to.
    pub(super) fn outcome(&self, attempt: u32) -> Outcome {
        let output =
            Payload { codec: Codec::Json, bytes: self.number.to_string().into_bytes().into() };
        let failed = || Outcome::Failed(TaskError::retry("no"));
        match self.behaviour {
            B::FailsFirst(failures) if attempt <= failures => failed(),
            B::FailsAlways => failed(),
            B::TimesOut => Outcome::TimedOut(Duration::from_secs(1)),
            B::Panics => Outcome::Panicked("oh".to_owned()),
            B::Fatal => Outcome::Failed(TaskError::fatal("never")),
            B::BadArguments => Outcome::BadArguments("not those".to_owned()),
            _ => Outcome::Succeeded(output),
        }
    }

    /// Whether a final record may look like this.
    pub(super) fn may_end(&self, status: Status, reason: Option<DeadReason>, attempt: u32) -> bool {
        let used_up = |why| (Status::Failed, Some(why), self.max_attempts);
        let refused = |why| (Status::Failed, Some(why), 0);
        let expected = match self.behaviour {
            B::FailsFirst(n) if n < self.max_attempts => (Status::Succeeded, None, n + 1),
            B::FailsFirst(_) | B::FailsAlways => used_up(DeadReason::RetriesExhausted),
            B::TimesOut => used_up(DeadReason::TimedOut),
            B::Panics => used_up(DeadReason::Panicked),
            B::Fatal => (Status::Failed, Some(DeadReason::Fatal), 1),
            B::BadArguments => (Status::Failed, Some(DeadReason::Malformed), 1),
            B::Expired => refused(DeadReason::Expired),
            B::Malformed => refused(DeadReason::Malformed),
            B::Unrouted => refused(DeadReason::Unrouted),
            B::Unknown => return false,
            B::ShortLived if status == Status::Failed => refused(DeadReason::Expired),
            B::Succeeds | B::Nameless | B::ShortLived => (Status::Succeeded, None, 1),
        };
        expected == (status, reason, attempt)
    }
}

/// The properties of a message alone: what the books go by.
pub(super) fn id_of(message: &Message) -> Option<&str> {
    let Properties { message_id, .. } = &message.properties;
    message_id.as_deref()
}
