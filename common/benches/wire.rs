//! Measures encoding and decoding of messages: one task, bundles of tasks, bundles of reports.
//!
//! Without a broker; `garenne bench` measures the throughput of the whole system.

#![expect(clippy::unwrap_used, reason = "a benchmark fails as a test does")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use garenne_common::wire::{Codec, Message, Payload, Properties, Report, bundle, report, task};
use garenne_common::{
    BatchId, Options, QueueName, Status, TaskId, TaskMessage, TaskName, TaskResult, Timestamp,
};

/// Size of the bundles: as many results as a worker sends in one, and as many tasks for comparison.
const BUNDLE: usize = 500;

fn one_task(batch: &BatchId) -> TaskMessage {
    TaskMessage {
        id: TaskId::generate(),
        name: TaskName::new("garenne.echo").unwrap(),
        queue: QueueName::default(),
        args: Payload::encode(Codec::Json, &12_345).unwrap(),
        attempt: 1,
        batch: Some(batch.clone()),
        reply: None,
        options: Options::default(),
        submitted_at: Some(Timestamp::now()),
        traceparent: None,
        fingerprint: None,
    }
}

fn tasks(c: &mut Criterion) {
    let (task, queue) = (one_task(&BatchId::generate()), QueueName::default());
    let message = task::encode(&task, "bench");
    let mut group = c.benchmark_group("task");
    group.throughput(Throughput::Elements(1));
    group.bench_function("encode", |b| b.iter(|| task::encode(black_box(&task), "bench")));
    group.bench_function("decode", |b| b.iter(|| task::decode(black_box(&message), &queue)));
    group.finish();
}

fn bundles(c: &mut Criterion) {
    let (batch, queue) = (BatchId::generate(), QueueName::default());
    let tasks: Vec<_> = (0..BUNDLE).map(|_| one_task(&batch)).collect();
    let message = bundle::encode(&tasks, "bench").unwrap();
    let mut group = c.benchmark_group("bundle");
    group.throughput(Throughput::Elements(tasks.len() as u64));
    group.bench_function("encode", |b| b.iter(|| bundle::encode(black_box(&tasks), "bench")));
    group.bench_function("decode", |b| b.iter(|| bundle::decode(black_box(&message), &queue)));
    group.finish();
}

fn results() -> Vec<Report> {
    let (batch, at) = (BatchId::generate(), Timestamp::now());
    let result = |n: usize| TaskResult {
        id: TaskId::generate(),
        name: TaskName::new("garenne.echo").unwrap(),
        queue: QueueName::default(),
        batch: Some(batch.clone()),
        status: Status::Succeeded,
        output: Some(Payload::encode(Codec::Json, &n).unwrap()),
        error: None,
        reason: None,
        attempt: 1,
        redelivered: false,
        worker: "host:4711".into(),
        started_at: at,
        finished_at: at,
        fingerprint: None,
    };
    (0..BUNDLE).map(|n| Report::Finished(result(n))).collect()
}

fn reports(c: &mut Criterion) {
    let reports = results();
    let bundle = report::encode(&reports, "bench").unwrap();
    let content_type = Some(Codec::Json.content_type().to_owned());
    let json = Message {
        properties: Properties { content_type, ..bundle.properties.clone() },
        body: serde_json::to_vec(&reports).unwrap().into(),
        ..Message::default()
    };
    let mut group = c.benchmark_group("reports");
    group.throughput(Throughput::Elements(reports.len() as u64));
    group.bench_function("encode", |b| b.iter(|| report::encode(black_box(&reports), "bench")));
    group.bench_function("decode", |b| b.iter(|| report::decode(black_box(&bundle))));
    group.bench_function("decode json", |b| b.iter(|| report::decode(black_box(&json))));
    group.finish();
}

criterion_group!(benches, tasks, bundles, reports);
criterion_main!(benches);
