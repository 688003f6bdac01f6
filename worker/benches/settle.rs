//! The cost of a task in a worker without its handler and the broker: the pure parts of the path from
//! delivery to acknowledgement.
//!
//! Nothing is published and nothing runs; every result is confirmed at once.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a benchmark fails as a test does")]

use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use garenne_common::broker::DeliveryTag;
use garenne_common::topology::Topology;
use garenne_common::wire::{Codec, Message, Payload, task};
use garenne_common::{
    BatchId, Namespace, Options, QueueName, ReplyGate, ReplyRule, TaskId, TaskMessage, TaskName,
    Timestamp,
};
use garenne_worker::Disposition;
use garenne_worker::protocol::{
    Action, Arrival, Attempt, DeliveryRef, KnownAttempts, QueueIndex, SettleCore,
    SettlementBuilder, TaskSource, UnackedDeliveries, validate,
};

/// About the number of tasks that a worker with a concurrency of 256 holds.
const TASKS: u64 = 500;

/// A worker without IO.
struct Model {
    core: SettleCore,
    known: Arc<KnownAttempts>,
    queue: QueueName,
    unacked: Arc<UnackedDeliveries>,
    settlements: SettlementBuilder,
}

impl Model {
    fn new() -> Self {
        let topology = Topology::new(Namespace::new("bench").unwrap());
        let replies = ReplyGate::new(ReplyRule::new(topology.namespace(), &[]));
        let worker = Arc::from("host:4711");
        let settlements = SettlementBuilder { topology, max_body: 1024 * 1024, replies, worker };
        let unacked = Arc::<UnackedDeliveries>::default();
        let known = Arc::<KnownAttempts>::default();
        let core = SettleCore::new(vec![Arc::clone(&unacked)], Arc::clone(&known), &settlements);
        Self { core, known, queue: QueueName::default(), unacked, settlements }
    }

    /// Validates a delivery.
    fn receive(&self, message: Message, number: u64, at: Timestamp) -> Attempt {
        let tag = DeliveryTag { epoch: 1, number };
        self.unacked.delivered(tag);
        let delivery = DeliveryRef { queue: QueueIndex(0), tag };
        let source = TaskSource::Message(Box::new(message));
        let arrival = Arrival { delivery, redelivered: false, source };
        let find = |_: &_| Some(());
        let valid = validate(&arrival, &self.queue, at, find, &self.known, &self.settlements);
        let Ok((task, ())) = valid else { panic!("a new task is to be run") };
        Attempt::new(task, arrival, at)
    }

    /// Settles attempts. Returns the number of acknowledgements.
    fn settle(&mut self, attempts: Vec<Attempt>) -> usize {
        let mut actions = vec![];
        for attempt in attempts {
            let output = Disposition::Complete(attempt.task.args.clone());
            self.core.settle(self.settlements.build(&attempt, output), &mut actions);
        }
        self.core.flush(&mut actions);
        while let Some(outbound) = self.core.next_message() {
            if let Some(ticket) = outbound.ticket {
                self.core.confirm(ticket, &Ok(()), &mut actions);
            }
        }
        let ack = |action: &&Action| matches!(action, Action::Acknowledge { .. });
        actions.iter().filter(ack).count()
    }
}

fn messages() -> Vec<Message> {
    let batch = BatchId::generate();
    let task = |n: u64| TaskMessage {
        id: TaskId::generate(),
        name: TaskName::new("garenne.echo").unwrap(),
        queue: QueueName::default(),
        args: Payload::encode(Codec::Json, &n).unwrap(),
        attempt: 1,
        batch: Some(batch.clone()),
        reply: None,
        options: Options::default(),
        submitted_at: Some(Timestamp::now()),
        traceparent: None,
        fingerprint: None,
    };
    (0..TASKS).map(|n| task::encode(&task(n), "bench")).collect()
}

fn received(model: &Model, messages: Vec<Message>) -> Vec<Attempt> {
    let at = Timestamp::now();
    (1..).zip(messages).map(|(number, message)| model.receive(message, number, at)).collect()
}

fn worker(c: &mut Criterion) {
    let mut group = c.benchmark_group("worker");
    group.throughput(Throughput::Elements(TASKS));
    let fresh = || (Model::new(), messages());
    group.bench_function("admit", |b| {
        b.iter_batched(
            fresh,
            |(model, messages)| received(&model, messages),
            BatchSize::LargeInput,
        );
    });
    let ready = || {
        let (model, messages) = fresh();
        let attempts = received(&model, messages);
        (model, attempts)
    };
    group.bench_function("settle and acknowledge", |b| {
        b.iter_batched(
            ready,
            |(mut model, attempts)| model.settle(attempts),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

criterion_group!(benches, worker);
criterion_main!(benches);
