//! What a task costs a worker beside its handler and the broker: from its delivery to its
//! acknowledgement, as the pure parts of the worker decide it.
//!
//! Nothing is sent and nothing runs: every result is confirmed at once.

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
    Action, Admission, Answer, Arrival, Carrier, DeliveryRef, Ended, Inflight, Lane, Outbound,
    SettleCore, Signature, admit,
};

/// Tasks in a row: what a worker with 64 slots and its default look-ahead holds, more or less.
const TASKS: u64 = 500;

/// A worker without its IO.
struct Desk {
    core: SettleCore,
    inflight: Arc<Inflight>,
    lanes: Arc<Vec<Lane>>,
    signature: Signature,
}

impl Desk {
    fn new() -> Self {
        let topology = Topology::new(Namespace::new("bench").unwrap());
        let replies = ReplyGate::new(ReplyRule::new(topology.namespace(), &[]));
        let signature =
            Signature { topology, max_body: 1024 * 1024, replies, worker: Arc::from("host:4711") };
        let lanes = Arc::new(vec![Lane::new(QueueName::default())]);
        let inflight = Arc::<Inflight>::default();
        let core = SettleCore::new(Arc::clone(&lanes), Arc::clone(&inflight), &signature);
        Self { core, inflight, lanes, signature }
    }

    /// Admits a delivery; the attempt has ended by then.
    fn admit(&self, message: Message, number: u64, at: Timestamp) -> Ended {
        let tag = DeliveryTag { epoch: 1, number };
        self.lanes[0].delivered(tag);
        let (delivery, queue) = (DeliveryRef { queue: 0, tag }, &self.lanes[0].queue);
        let arrival = Arrival { delivery, message: &message, queue, at };
        match admit(arrival, |_| Some(()), &self.inflight, &self.signature) {
            Admission::Run(task, ()) => Ended {
                task,
                carrier: Carrier::Alone(Box::new(message)),
                redelivered: false,
                started_at: at,
                finished_at: at,
                lease: None,
            },
            Admission::Adopted | Admission::Settle(_) => panic!("a new task is to be run"),
        }
    }

    /// Settles attempts; returns how many acknowledgements that took.
    fn settle(&mut self, ended: Vec<Ended>) -> usize {
        let mut actions = vec![];
        for ended in ended {
            let output = Disposition::Complete(ended.task.args.clone());
            self.core.settle(self.signature.settlement(&ended, output), &mut actions);
        }
        self.core.flush(&mut actions);
        while let Some(outbound) = self.core.room() {
            match outbound {
                Outbound::Successor { ticket, .. } => {
                    self.core.answered(ticket, Answer::Confirmed, &mut actions);
                }
                Outbound::Reply(_) => {}
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
    };
    (0..TASKS).map(|n| task::encode(&task(n), "bench")).collect()
}

fn admitted(desk: &Desk, messages: Vec<Message>) -> Vec<Ended> {
    let at = Timestamp::now();
    (1..).zip(messages).map(|(number, message)| desk.admit(message, number, at)).collect()
}

fn worker(c: &mut Criterion) {
    let mut group = c.benchmark_group("worker");
    group.throughput(Throughput::Elements(TASKS));
    let fresh = || (Desk::new(), messages());
    group.bench_function("admit", |b| {
        b.iter_batched(fresh, |(desk, messages)| admitted(&desk, messages), BatchSize::LargeInput);
    });
    let ready = || {
        let (desk, messages) = fresh();
        let ended = admitted(&desk, messages);
        (desk, ended)
    };
    group.bench_function("settle and acknowledge", |b| {
        b.iter_batched(ready, |(mut desk, ended)| desk.settle(ended), BatchSize::LargeInput);
    });
    group.finish();
}

criterion_group!(benches, worker);
criterion_main!(benches);
