//! What writing and reading of messages costs: one task, and bundles of reports.
//!
//! Without a broker: how many of them travel per second is `garenne bench`'s question.

#![expect(missing_docs, reason = "criterion's macros make functions without any")]
#![expect(clippy::unwrap_used, reason = "a benchmark fails as a test does")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use garenne_common::wire::{Codec, Message, Payload, Report, report, task};
use garenne_common::{
    BatchId, Options, QueueName, Status, TaskId, TaskMessage, TaskName, TaskResult, Timestamp,
};

/// As many results as a worker puts into one bundle.
const BUNDLE: usize = 500;

fn one_task() -> TaskMessage {
    TaskMessage {
        id: TaskId::generate(),
        name: TaskName::new("garenne.echo").unwrap(),
        queue: QueueName::default(),
        args: Payload::encode(Codec::Json, &12_345).unwrap(),
        attempt: 1,
        batch: Some(BatchId::generate()),
        reply: None,
        options: Options::default(),
        submitted_at: Some(Timestamp::now()),
        traceparent: None,
    }
}

fn tasks(c: &mut Criterion) {
    let (task, queue) = (one_task(), QueueName::default());
    let message = task::encode(&task, "bench");
    let mut group = c.benchmark_group("task");
    group.throughput(Throughput::Elements(1));
    group.bench_function("encode", |b| b.iter(|| task::encode(black_box(&task), "bench")));
    group.bench_function("decode", |b| b.iter(|| task::decode(black_box(&message), &queue)));
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
    };
    (0..BUNDLE).map(|n| Report::Finished(result(n))).collect()
}

fn reports(c: &mut Criterion) {
    let reports = results();
    let bundle = report::encode(&reports, "bench").unwrap();
    let as_json = |reports| Message {
        body: serde_json::to_vec(reports).unwrap().into(),
        properties: garenne_common::wire::Properties {
            content_type: Some("application/json".to_owned()),
            ..bundle.properties.clone()
        },
        headers: vec![],
    };
    let json = as_json(&reports);
    let mut group = c.benchmark_group("reports");
    group.throughput(Throughput::Elements(reports.len() as u64));
    group.bench_function("encode", |b| b.iter(|| report::encode(black_box(&reports), "bench")));
    group.bench_function("decode", |b| b.iter(|| report::decode(black_box(&bundle))));
    group.bench_function("decode json", |b| b.iter(|| report::decode(black_box(&json))));
    group.finish();
}

criterion_group!(benches, tasks, reports);
criterion_main!(benches);
