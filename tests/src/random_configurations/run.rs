//! Runs what was drawn, with real processes, and watches that something always goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, future, stream};
use garenne_common::{RetryPolicy, TaskId};
use garenne_producer::{Handle, Producer, Submission};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::draw::{Draw, Fault, Way, WorkKind};
use crate::harness::{Process, Proxy, Soon, Warren};

/// Nothing that could go on stands still for so long, however busy the machine.
const STALL: Duration = Duration::from_secs(45);
const LOOK: Duration = Duration::from_millis(50);
const QUICK: Duration = Duration::from_millis(10);

/// Runs it; an error tells what stands still.
pub(super) async fn run(draw: &Draw) -> Result<(), String> {
    let warren = Warren::new().await;
    let system = System::start(&warren, draw).await;
    let ended = Arc::<AtomicUsize>::default();
    let mut config = warren.config();
    config.broker.publish_window = draw.producer.publish_window;
    config.producer.bundles.tasks = draw.producer.bundle_tasks;
    config.producer.bundles.work = draw.producer.bundle_work;
    let producer = Producer::connect(&config).soon("the producer connects").await;
    let producer = Arc::new(producer.expect("the broker is there"));
    let submitting = tokio::spawn(submit(
        Arc::clone(&producer),
        (draw.work.clone(), draw.way),
        Arc::clone(&ended),
    ));
    let result = system.watch(draw, submitting, &ended).await;
    if let Some(producer) = Arc::into_inner(producer) {
        producer.close().soon("the producer closes").await;
    }
    result
}

/// The processes, behind a line that can be cut.
struct System<'w> {
    warren: &'w Warren,
    draw: &'w Draw,
    proxy: Proxy,
    workers: Vec<Process>,
    collector: Process,
}

impl<'w> System<'w> {
    async fn start(warren: &'w Warren, draw: &'w Draw) -> Self {
        let proxy = Proxy::to(warren.url()).await;
        let url = proxy.url(warren.url());
        let collector = collector(warren, draw, &url).await;
        let workers = (0..draw.workers.len()).map(|place| worker(warren, draw, &url, place));
        let workers = future::join_all(workers).await;
        Self { warren, draw, proxy, workers, collector }
    }

    /// Waits until all that was submitted has ended, and breaks what is to break meanwhile.
    async fn watch(
        mut self,
        draw: &Draw,
        mut submitting: JoinHandle<Result<(), String>>,
        ended: &AtomicUsize,
    ) -> Result<(), String> {
        let all = draw.work.len();
        let mut faults = draw.faults.iter().copied();
        let mut next = faults.next();
        let (mut seen, mut moved, mut done) = (0, Instant::now(), false);
        loop {
            tokio::select! {
                submitted = &mut submitting, if !done => {
                    submitted.map_err(|error| error.to_string())??;
                    done = true;
                }
                () = tokio::time::sleep(LOOK) => {}
            }
            let stored = self.stored().min(all);
            let now = stored + ended.load(Ordering::Relaxed);
            if done && stored == all {
                return Ok(());
            }
            if now != seen {
                (seen, moved) = (now, Instant::now());
            }
            if let Some((when, fault)) = next
                && (stored * 100 >= when * all || moved.elapsed() > STALL / 3)
            {
                self.inject(fault).await;
                (next, moved) = (faults.next(), Instant::now());
            }
            if moved.elapsed() > STALL {
                let ended = ended.load(Ordering::Relaxed);
                let doctor = self.warren.garenne(&["doctor"]).await;
                return Err(format!(
                    "{stored} of {all} are stored, {ended} were heard of by who waits; doctor says\n{}",
                    doctor.stdout
                ));
            }
        }
    }

    /// Tasks with a final record.
    fn stored(&self) -> usize {
        let count = self.warren.rows::<u32>("SELECT count(*) FROM results");
        count.first().map_or(0, |count| *count as usize)
    }

    async fn inject(&mut self, fault: Fault) {
        let url = self.proxy.url(self.warren.url());
        match fault {
            Fault::KillWorker => {
                let new = worker(self.warren, self.draw, &url, 0).await;
                std::mem::replace(&mut self.workers[0], new).kill().await;
            }
            Fault::KillCollector => {
                self.collector.signal(Signal::SIGKILL);
                self.collector.ended(STALL).await;
                self.collector = collector(self.warren, self.draw, &url).await;
            }
            Fault::CutLines => self.proxy.cut(),
            Fault::FreezeWorker => {
                self.workers[0].signal(Signal::SIGSTOP);
                let before = self.stored();
                let frozen = Instant::now();
                while self.stored() == before && frozen.elapsed() < STALL / 20 {
                    tokio::time::sleep(LOOK).await;
                }
                self.workers[0].signal(Signal::SIGCONT);
            }
        }
    }
}

async fn worker(warren: &Warren, draw: &Draw, url: &str, place: usize) -> Process {
    let drawn = &draw.workers[place];
    let worker = warren.worker().url(url).set("worker.concurrency", drawn.concurrency);
    let worker = worker.set("worker.prefetch", drawn.concurrency + drawn.ahead);
    worker.set("broker.publish_window", drawn.publish_window).start().await
}

async fn collector(warren: &Warren, draw: &Draw, url: &str) -> Process {
    let drawn = &draw.collector;
    let collector = warren.collector().url(url).set("broker.publish_window", drawn.publish_window);
    let linger = format!("{}ms", drawn.group_linger.as_millis());
    collector
        .set("collector.group_size", drawn.group_size)
        .set("collector.group_linger", linger)
        .start()
        .await
}

/// Submits everything and waits for what is waited for; counts what has ended.
async fn submit(
    producer: Arc<Producer>,
    (work, way): (Vec<WorkKind>, Way),
    ended: Arc<AtomicUsize>,
) -> Result<(), String> {
    let ids: Vec<_> = work.iter().map(|_| TaskId::generate()).collect();
    let submissions: Vec<_> = work.iter().zip(&ids).map(|(kind, id)| kind.submission(id)).collect();
    let cancelled = work.iter().zip(ids).filter(|(kind, _)| **kind == WorkKind::Cancelled);
    let cancelled: Vec<_> = cancelled.map(|(_, id)| id).collect();
    let cancel = async {
        // A collector that was just killed answers later.
        while !cancelled.is_empty()
            && producer.cancel_tasks(&cancelled, Some("drawn"), STALL / 10).await.is_err()
        {
            tokio::time::sleep(LOOK).await;
        }
        Ok::<_, String>(())
    };
    match way {
        Way::Singly => {
            let submitting = submissions.into_iter().map(|submission| producer.submit(submission));
            let handles = future::try_join_all(submitting).await.map_err(|e| e.to_string())?;
            cancel.await?;
            wait_for(handles, &ended).await
        }
        Way::Together => {
            let handles = all(producer.submit_many(submissions).await)?;
            cancel.await?;
            wait_for(handles, &ended).await
        }
        Way::Batch => {
            let batch = producer.batch().await.map_err(|error| error.to_string())?;
            let handles = all(batch.submit_many(submissions).await)?;
            let sealed = batch.seal().await.map_err(|error| error.to_string())?;
            cancel.await?;
            wait_for(handles, &ended).await?;
            sealed.wait().await.map(drop).map_err(|error| error.to_string())
        }
        Way::Detached => {
            all(producer.submit_many_detached(submissions).await)?;
            cancel.await
        }
    }
}

fn all<T>(outcomes: Vec<Result<T, garenne_producer::SubmitError>>) -> Result<Vec<T>, String> {
    outcomes.into_iter().collect::<Result<_, _>>().map_err(|error| error.to_string())
}

async fn wait_for(handles: Vec<Handle<Value>>, ended: &AtomicUsize) -> Result<(), String> {
    let results = stream::iter(handles.into_iter().map(Handle::result)).buffer_unordered(10_000);
    let counted = results.inspect_ok(|_| {
        ended.fetch_add(1, Ordering::Relaxed);
    });
    counted.try_for_each(|_| future::ok(())).await.map_err(|error| error.to_string())
}

impl WorkKind {
    fn submission(self, id: &TaskId) -> Submission<Value> {
        let quick = |retries| RetryPolicy { base: QUICK, ..RetryPolicy::retries(retries) };
        let (name, args, retry) = match self {
            Self::Echo | Self::Delayed => ("garenne.echo", json!(1), RetryPolicy::NONE),
            Self::Large => ("garenne.echo", json!("x".repeat(20 * 1024)), RetryPolicy::NONE),
            Self::Sleeps => ("garenne.sleep", json!({ "millis": 20 }), RetryPolicy::NONE),
            Self::Fatal => ("garenne.fail", json!({ "fatal": true }), RetryPolicy::NONE),
            Self::FailsOnce => ("garenne.fail", json!({ "times": 1 }), quick(2)),
            Self::RetriesExhausted => ("garenne.fail", json!({ "times": 9 }), quick(1)),
            Self::Panics => ("garenne.fail", json!({ "panic": true }), RetryPolicy::NONE),
            Self::TimesOut | Self::Cancelled => {
                ("garenne.sleep", json!({ "millis": 600_000 }), RetryPolicy::NONE)
            }
        };
        let submission = Submission::dynamic(name, args).expect("plain data");
        let submission = submission.id(id.clone()).retry_policy(retry);
        match self {
            Self::TimesOut => submission.timeout(Duration::from_millis(50)),
            Self::Delayed => submission.delay(Duration::from_millis(200)),
            Self::Echo
            | Self::Large
            | Self::Sleeps
            | Self::Fatal
            | Self::FailsOnce
            | Self::RetriesExhausted
            | Self::Panics
            | Self::Cancelled => submission,
        }
    }
}
