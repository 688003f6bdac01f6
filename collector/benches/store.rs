//! What a commit costs: groups of results into a SQLite file, empty or with a million rows in it.
//!
//! The collector's whole write path behind the broker but for decoding, which `common/benches/wire.rs`
//! measures. The files lie in the directory for temporary files, so its disk is measured too.

#![expect(clippy::unwrap_used, reason = "a benchmark fails as a test does")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use garenne_collector::ingest::group::Group;
use garenne_collector::rules::aggregate::Rules;
use garenne_collector::store::{SqliteStore, Store};
use garenne_common::wire::{Codec, Payload, Report};
use garenne_common::{BatchId, QueueName, Status, TaskId, TaskName, TaskResult, Timestamp};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

const SIZES: [usize; 3] = [500, 2_000, 5_000];
const MANY: usize = 1_000_000;

/// A store of its own and what it is asked from.
struct Bench {
    runtime: Runtime,
    store: SqliteStore,
    batch: Option<BatchId>,
    _directory: TempDir,
}

impl Bench {
    fn new(batch: Option<BatchId>, task_notices: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let rules = Rules { batch_deadline: Duration::from_hours(1), task_notices };
        let store = SqliteStore::open(&directory.path().join("bench.sqlite3"), rules).unwrap();
        let runtime = Builder::new_current_thread().build().unwrap();
        Self { runtime, store, batch, _directory: directory }
    }

    fn with_rows(self, rows: usize) -> Self {
        for _ in 0..rows / 5_000 {
            self.commit(5_000);
        }
        self
    }

    /// Ids are UUIDv7, as Garenne makes them: they ascend.
    fn group(&self, size: usize) -> Arc<Group> {
        let (name, at) = (TaskName::new("garenne.echo").unwrap(), Timestamp::now());
        let result = |n: usize| TaskResult {
            id: TaskId::generate(),
            name: name.clone(),
            queue: QueueName::default(),
            batch: self.batch.clone(),
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
        let mut group = Group::new(at);
        group.reports = (0..size).map(|n| Report::Finished(result(n))).collect();
        Arc::new(group)
    }

    /// How long one commit takes.
    fn commit(&self, size: usize) -> Duration {
        let group = self.group(size);
        let start = Instant::now();
        self.runtime.block_on(self.store.commit(group)).unwrap();
        start.elapsed()
    }

    /// How long it takes to forget as many rows, the oldest.
    fn forget(&self, rows: usize) -> Duration {
        let start = Instant::now();
        let forgotten = self.store.delete_old(Timestamp::now().plus(Duration::from_secs(1)), rows);
        self.runtime.block_on(forgotten).unwrap();
        start.elapsed()
    }
}

fn commits(c: &mut Criterion, name: &str, bench: &Bench, once: impl Fn(&Bench, usize) -> Duration) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    for size in SIZES {
        group.throughput(Throughput::Elements(size as u64));
        group.bench_function(BenchmarkId::from_parameter(size), |b| {
            b.iter_custom(|times| (0..times).map(|_| once(bench, size)).sum());
        });
    }
    group.finish();
}

fn store(c: &mut Criterion) {
    let batch = || Some(BatchId::generate());
    let one_batch = Bench::new(batch(), true);
    commits(c, "commit/one batch", &one_batch, Bench::commit);
    let alone = Bench::new(None, false);
    commits(c, "commit/no batch", &alone, Bench::commit);
    let with_notices = Bench::new(None, true);
    commits(c, "commit/no batch, task notices", &with_notices, Bench::commit);
}

/// With retention at work: for each new row an old one goes.
fn full_store(c: &mut Criterion) {
    let full = Bench::new(Some(BatchId::generate()), true).with_rows(MANY);
    commits(c, "commit/a million rows", &full, Bench::commit);
    commits(c, "commit/a million rows, retention", &full, |bench, size| {
        bench.commit(size) + bench.forget(size)
    });
}

criterion_group!(benches, store, full_store);
criterion_main!(benches);
