//! Cancelling (P22): a cancel request is kept until it took effect, wherever its task is; a success that was
//! faster stands, and every cancelled task ends once, as cancelled.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use garenne_common::wire::CancelState;
use garenne_common::{RetryPolicy, Status, Task, TaskId, TaskResult};
use garenne_producer::{Handle, OutputError, Producer, Submission};
use garenne_worker::{Context, TaskError, Worker};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::harness::effects::{self, Gate};
use crate::harness::{SOON, Soon, Warren, message, soon};

const AT_ONCE: Duration = Duration::ZERO;

fn task(name: &str, args: Value) -> Submission<Value> {
    Submission::dynamic(name, args).unwrap()
}

fn sleep(millis: u64) -> Submission<Value> {
    task("garenne.sleep", json!({ "millis": millis }))
}

async fn submit(producer: &Producer, submission: Submission<Value>) -> Handle<Value> {
    producer.submit(submission).await.unwrap()
}

/// Asks once and does not wait.
async fn cancel(producer: &Producer, id: &TaskId) -> CancelState {
    let ids = std::slice::from_ref(id);
    let mut answers = producer.cancel_tasks(ids, Some("enough"), AT_ONCE).await.unwrap();
    answers.pop().unwrap().state
}

async fn ended(handle: Handle<Value>) -> TaskResult {
    handle.result().soon("the task ends").await.unwrap()
}

#[track_caller]
fn assert_cancelled(result: &TaskResult, attempt: u32) {
    let found = (result.status, result.error.as_deref(), result.attempt);
    assert_eq!(found, (Status::Cancelled, Some("enough"), attempt), "{result:?}");
    assert_eq!((result.reason, &result.output), (None, &None), "{result:?}");
}

/// Waits until every worker has taken what it can.
async fn waiting(warren: &Warren, count: u32) {
    let amqp = warren.amqp().await;
    soon("the queue has so many", async || (amqp.waiting().await == count).then_some(())).await;
}

#[derive(Serialize, Deserialize)]
struct Polite {
    heeds: bool,
    succeeds: bool,
}

impl Task for Polite {
    const NAME: &'static str = "test.polite";
    type Output = Value;
}

async fn polite(context: Context, Polite { heeds, succeeds }: Polite) -> Result<Value, TaskError> {
    context.cancelled().await;
    match (heeds, succeeds) {
        (false, _) => std::future::pending().await,
        (true, true) => Ok(json!("cleaned up")),
        (true, false) => Err(TaskError::retry("cleaned up")),
    }
}

#[derive(Serialize, Deserialize)]
struct Stubborn;

impl Task for Stubborn {
    const NAME: &'static str = "test.stubborn";
    type Output = Value;
}

fn stubborn(context: &Context, _: Stubborn) -> Result<Value, TaskError> {
    while !context.is_cancelled() {
        std::thread::park_timeout(Duration::from_millis(5));
    }
    Err(TaskError::retry("stopped half-way"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queued_task_never_runs_even_if_its_worker_starts_later() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let producer = warren.producer().await;
    let handle = submit(&producer, sleep(0)).await;
    assert_eq!(cancel(&producer, handle.id()).await, CancelState::Requested);
    assert_eq!(cancel(&producer, handle.id()).await, CancelState::Requested, "asked again");
    let _worker = warren.worker().set("worker.cancel_sync_timeout", "60s").start().await;
    let id = handle.id().clone();
    assert_cancelled(&ended(handle).await, 0);
    let state = soon("the collector has it", async || {
        let state = cancel(&producer, &id).await;
        (state != CancelState::Requested).then_some(state)
    });
    assert_eq!(state.await, CancelState::Cancelled);
    let left = warren.rows::<i64>("SELECT COUNT(*) FROM cancels");
    assert_eq!(left, [0], "a cancel request that took effect is forgotten");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wish_survives_the_collector_and_the_worker() {
    let warren = Warren::new().await;
    let collector = warren.collector().start().await;
    let producer = warren.producer().await;
    let handle = submit(&producer, sleep(600_000)).await;
    let worker = warren.worker().start().await;
    waiting(&warren, 0).await;
    // Killed, so that the task comes back; the cancel request is made while no worker is there.
    worker.kill().await;
    waiting(&warren, 1).await;
    assert_eq!(cancel(&producer, handle.id()).await, CancelState::Requested);
    collector.kill().await;
    let _collector = warren.collector().start().await;
    let _worker = warren.worker().set("worker.cancel_sync_timeout", "60s").start().await;
    assert_cancelled(&ended(handle).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_starts_without_a_collector_works_and_hears_of_wishes_later() {
    let warren = Warren::new().await;
    let producer = warren.producer().await;
    let collector = warren.collector().start().await;
    let gate = Gate::shut(&warren, "first");
    let first = submit(&producer, gate.task()).await;
    let cancelled = submit(&producer, sleep(0)).await;
    assert_eq!(cancel(&producer, cancelled.id()).await, CancelState::Requested);
    collector.kill().await;
    // One slot, which the first task keeps.
    let worker = warren.worker().toml(&effects::command(&warren)).set("worker.concurrency", 1);
    let mut worker = worker.start().await;
    worker.logged("no collector has sent the cancel requests").await;
    effects::begun(&warren, 1).await;
    waiting(&warren, 0).await;
    // The worker's query waits for the collector.
    let _collector = warren.collector().start().await;
    assert_cancelled(&ended(cancelled).await, 0);
    gate.open();
    assert_eq!(ended(first).await.status, Status::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delayed_retry_ends_cancelled_when_it_is_due() {
    let warren = Warren::new().await;
    let (_worker, _collector) = warren.crew().await;
    let producer = warren.producer().await;
    let policy = RetryPolicy { base: Duration::from_secs(8), ..Default::default() };
    let failing = task("garenne.fail", json!({ "message": "once" })).retry_policy(policy);
    let handle = submit(&producer, failing).await;
    soon("the first attempt has failed", async || {
        let state = producer.task_state(handle.id()).await.unwrap();
        matches!(state, garenne_common::wire::TaskState::Retrying { .. }).then_some(())
    })
    .await;
    assert_eq!(cancel(&producer, handle.id()).await, CancelState::Requested);
    assert_cancelled(&ended(handle).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_task_hears_of_it_and_may_end_in_its_own_way() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let producer = warren.producer().await;
    let mut config = warren.config();
    config.worker.cancel_grace = Duration::from_millis(500);
    let builder = Worker::builder(config)
        .register::<Polite, _, _>(polite)
        .register_blocking::<Stubborn, _>(stubborn);
    let worker = warren.work(builder).await;
    let polite =
        |heeds, succeeds| task("test.polite", json!({ "heeds": heeds, "succeeds": succeeds }));
    let tasks = [polite(true, true), polite(true, false), polite(false, false)];
    let mut handles = vec![];
    for task in tasks.into_iter().chain([task("test.stubborn", Value::Null)]) {
        handles.push(submit(&producer, task).await);
    }
    soon("all run", async || (worker.running_tasks() == 4).then_some(())).await;
    let ids: Vec<_> = handles.iter().map(|handle| handle.id().clone()).collect();
    let answers = producer.cancel_tasks(&ids, Some("enough"), SOON).await;
    let states: Vec<_> = answers.unwrap().iter().map(|answer| answer.state).collect();
    let cancelled = CancelState::Cancelled;
    assert_eq!(states, [CancelState::TooLate, cancelled, cancelled, cancelled]);
    let success = ended(handles.remove(0)).await;
    assert_eq!(success.status, Status::Succeeded, "it was faster: {success:?}");
    let typed = handles.remove(0).output().soon("it ends").await.unwrap_err();
    let reason = "enough".to_owned();
    assert_eq!(typed, OutputError::Cancelled { id: ids[1].clone(), reason });
    for handle in handles {
        assert_cancelled(&ended(handle).await, 1);
    }
    worker.drain().soon("the worker stops").await;
}

#[derive(Serialize, Deserialize)]
struct Count;

impl Task for Count {
    const NAME: &'static str = "test.count";
    type Output = ();
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_wait_in_a_busy_worker_end_at_once_and_never_run() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let producer = warren.producer().await;
    let mut config = warren.config();
    (config.worker.concurrency, config.worker.prefetch) = (1, 11);
    let ran = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&ran);
    let builder = Worker::builder(config).register::<Count, _, _>(move |_, Count| {
        counter.fetch_add(1, Ordering::Relaxed);
        std::future::ready(Ok::<_, TaskError>(()))
    });
    let worker = warren.work(builder).await;
    let long = submit(&producer, sleep(600_000)).await;
    soon("it runs", async || (worker.running_tasks() == 1).then_some(())).await;
    let mut ids = vec![];
    for _ in 0..5 {
        ids.push(producer.submit_detached(task("test.count", Value::Null)).await.unwrap());
    }
    waiting(&warren, 0).await;
    let answers = producer.cancel_tasks(&ids, Some("enough"), SOON).await;
    assert!(answers.unwrap().iter().all(|answer| answer.state == CancelState::Cancelled));
    assert_eq!(ran.load(Ordering::Relaxed), 0);
    assert_eq!(worker.running_tasks(), 1, "the long one runs on");
    assert_eq!(cancel(&producer, long.id()).await, CancelState::Requested);
    assert_cancelled(&ended(long).await, 1);
    worker.drain().soon("the worker stops").await;
}

const COMMANDS: &str = r#"
[worker.commands."linger"]
argv = ["python3", "-S", "-c", "import os, subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); open(sys.argv[1], 'w').write('%d %d ' % (os.getpid(), child.pid)); time.sleep(600)", "{file}"]

[worker.commands."deaf"]
argv = ["python3", "-S", "-c", "import os, signal, sys, time; signal.signal(15, signal.SIG_IGN); child = os.fork(); open(sys.argv[1], 'a').write('%d ' % os.getpid()); time.sleep(600)", "{file}"]

[worker.commands."tidy"]
argv = ["python3", "-S", "-c", "import signal, sys, time; signal.signal(15, lambda *_: (print('\"tidied\"', flush=True), sys.exit(0))); open(sys.argv[1], 'w').write('1 1 '); time.sleep(600)", "{file}"]
"#;

async fn pids(warren: &Warren, file: &str) -> Vec<String> {
    soon("the command runs", async || {
        let text = std::fs::read_to_string(warren.path(file)).ok()?;
        let pids: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
        (pids.len() == 2 && text.ends_with(' ')).then_some(pids)
    })
    .await
}

async fn gone(pids: &[String]) {
    let running = |pid: &&String| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    };
    soon("the command and its child are gone", async || {
        pids.iter().find(running).is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_gets_sigterm_and_then_sigkill_with_all_its_children() {
    let warren = Warren::new().await;
    let worker = warren.worker().toml(COMMANDS).set("worker.cancel_grace", "1s");
    let (_worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = warren.producer().await;
    for (name, heeds) in [("linger", true), ("deaf", false), ("tidy", true)] {
        let file = format!("{name}.pids");
        let handle = submit(&producer, task(name, json!({ "file": warren.path(&file) }))).await;
        let pids = pids(&warren, &file).await;
        cancel(&producer, handle.id()).await;
        let result = ended(handle).await;
        if name == "tidy" {
            assert_eq!(result.status, Status::Succeeded, "a clean end stands: {result:?}");
            continue;
        }
        assert_cancelled(&result, 1);
        let took = result.finished_at.since(result.started_at);
        assert!(heeds || took >= Duration::from_secs(1), "it had its grace: {took:?}");
        gone(&pids).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_cancelled_with_what_runs_what_waits_and_what_comes_later() {
    let warren = Warren::new().await;
    let worker = warren.worker().set("worker.concurrency", 2).set("worker.prefetch", 2);
    let (_worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    let quick = batch.submit(sleep(0)).await.unwrap();
    assert_eq!(ended(quick).await.status, Status::Succeeded);
    for _ in 0..6 {
        batch.submit_detached(sleep(600_000)).await.unwrap();
    }
    waiting(&warren, 4).await;
    let id = batch.id().to_string();
    let asked = warren.garenne(&["cancel", "--batch", &id, "--wait", "1s", "-o", "json"]).await;
    assert_eq!(asked.json()["state"], "requested", "{asked:#?}");
    for _ in 0..2 {
        batch.submit_detached(sleep(600_000)).await.unwrap();
    }
    let sealed = batch.seal().await.unwrap();
    let summary = sealed.wait().soon("the batch ends").await.unwrap();
    assert_eq!((summary.succeeded, summary.failed, summary.cancelled), (1, 0, 8));
    let again = warren.garenne(&["cancel", "--batch", &id]).await;
    assert_eq!(again.code, Some(1), "{again:#?}");
    assert!(again.stdout.starts_with("too late"), "{again:#?}");
    assert!(again.stdout.contains("8 cancelled, 1 succeeded"), "{again:#?}");
    assert_eq!(warren.rows::<i64>("SELECT COUNT(*) FROM cancels"), [0]);
    let shown = warren.garenne(&["batch", "show", &id]).await.ok();
    assert!(shown.contains("cancelled"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_says_cancelled_too_late_or_requested() {
    let warren = Warren::new().await;
    let (_worker, _collector) = warren.crew().await;
    let producer = warren.producer().await;
    let done = submit(&producer, sleep(0)).await;
    let (done, running) = (ended(done).await.id, submit(&producer, sleep(600_000)).await);
    waiting(&warren, 0).await;
    soon("the collector has it", async || {
        (!producer.results(std::slice::from_ref(&done)).await.unwrap().is_empty()).then_some(())
    })
    .await;
    let ids = [done.as_str(), running.id().as_str()];
    let mut arguments = vec!["cancel", "--reason", "enough", "--wait", "50s"];
    arguments.extend(ids);
    let said = warren.garenne(&arguments).await;
    assert_eq!(said.code, Some(1), "one was too late: {said:#?}");
    let lines: Vec<_> = said.stdout.lines().collect();
    for ((line, id), word) in lines.iter().zip(ids).zip(["too late ", "cancelled "]) {
        assert!(line.starts_with(word) && line.contains(id), "{said:#?}");
    }
    assert_cancelled(&ended(running).await, 1);
    let said = warren.garenne(&["cancel", "never-heard-of", "--wait", "1s"]).await;
    assert!(said.stdout.starts_with("requested  never-heard-of"), "{said:#?}");
    let asked = warren.garenne(&["cancel", "never-heard-of", "--wait", "0s", "-o", "json"]).await;
    assert_eq!(asked.json()["requested"], 1, "{asked:#?}");
    assert_eq!(asked.code, Some(0));
    let waited = tokio::join!(
        warren.garenne(&["submit", "garenne.sleep", r#"{"millis":600000}"#, "--id=w", "--wait"]),
        async {
            soon("it is cancelled", async || {
                let state = cancel(&producer, &TaskId::new("w").unwrap()).await;
                (state == CancelState::Cancelled).then_some(())
            })
            .await;
        }
    );
    assert_eq!(waited.0.code, Some(1), "{:#?}", waited.0);
    assert!(waited.0.stderr.contains("task w was cancelled: enough"), "{:#?}", waited.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_has_submitted_yet_is_cancelled_when_it_comes() {
    let warren = Warren::new().await;
    let (_worker, _collector) = warren.crew().await;
    let producer = warren.producer().await;
    let id = TaskId::new("t-later").unwrap();
    assert_eq!(cancel(&producer, &id).await, CancelState::Requested);
    let amqp = warren.amqp().await;
    amqp.task(message("garenne.echo", "t-later", &json!(1))).await;
    let ids = std::slice::from_ref(&id);
    let results = soon("it ends", async || {
        let results = producer.results(ids).await.unwrap();
        (!results.is_empty()).then_some(results)
    });
    assert_cancelled(&results.await[0], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_comes_before_everything_else_hears_a_collector_that_comes_later() {
    let warren = Warren::new().await;
    let worker = warren.worker().set("worker.cancel_sync_timeout", "60s");
    let later = async {
        let (amqp, queries) = (warren.amqp().await, warren.config().broker.topology().queries());
        soon("the worker's query waits", async || {
            (amqp.admin.depth(&queries).await.unwrap() > Some(0)).then_some(())
        })
        .await;
        warren.collector().start().await
    };
    let (worker, _collector) = tokio::join!(worker.start(), later);
    assert!(!worker.stderr().contains("no collector has sent"), "{}", worker.stderr());
}
