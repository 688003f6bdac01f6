//! A task that kills the process that runs it ends as a dead letter after its crash budget, and costs
//! nobody else anything (promise 3).

use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use futures_util::StreamExt;
use garenne_common::broker::{Consumer, ConsumerSpec, Link, QueueSource};
use garenne_common::service::lifeline::inode;
use garenne_common::wire::{HeaderValue, TaskState};
use garenne_common::{DeadReason, QueueName, RetryPolicy, Status};
use garenne_producer::Submission;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{Process, Service, Soon, Warren, eventually, message, soon, supervise};

/// Between two crashes.
const QUICK: RetryPolicy =
    RetryPolicy { max_attempts: 2, base: Duration::from_millis(50), ..RetryPolicy::DEFAULT };
/// Processes are started, die and are started again, on a machine that does other things besides.
const PATIENCE: Duration = Duration::from_mins(2);

fn worker<'a>(warren: &'a Warren, name: &str) -> Service<'a> {
    warren.worker().arg("--faults").arg("--name").arg(name)
}

fn crash(args: Value) -> Submission<Value> {
    Submission::dynamic("garenne.crash", args).unwrap().retry_policy(QUICK)
}

/// One in so many tasks aborts its process, under three workers that are started again when they die.
///
/// All of them wait already when the workers start; checks that each ends as it should, and answers how
/// long that took.
pub(crate) async fn measure(
    tasks: u32,
    one_in: Option<u32>,
    millis: u64,
    concurrency: usize,
) -> Duration {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    let is_poison = |number: u32| one_in.is_some_and(|one_in| number % one_in == one_in / 2);
    let submissions = (0..tasks).map(async |number| {
        let task = if is_poison(number) {
            crash(json!({ "how": "abort" }))
        } else {
            Submission::dynamic("garenne.sleep", json!({ "millis": millis })).unwrap()
        };
        batch.submit_detached(task.retry_policy(QUICK)).await.unwrap();
    });
    futures_util::stream::iter(submissions).buffer_unordered(100).collect::<()>().await;
    let sealed = batch.seal().await.unwrap();
    let begun = tokio::time::Instant::now();
    let workers = supervise(3, |number| {
        let name = format!("w{number}");
        worker(&warren, &name)
            .set("worker.concurrency", concurrency)
            .set("worker.prefetch", 2 * concurrency)
    });
    let summary = tokio::select! {
        () = workers => unreachable!("the supervisor never ends"),
        summary = sealed.wait().within(10 * PATIENCE, "all tasks end") => summary.unwrap(),
    };
    let took = begun.elapsed();
    let poison = u64::try_from((0..tasks).filter(|number| is_poison(*number)).count()).unwrap();
    let (total, good) = (u64::from(tasks), u64::from(tasks) - poison);
    assert_eq!((summary.total, summary.succeeded, summary.failed), (Some(total), good, poison));
    let reasons: Vec<String> = warren.rows("SELECT DISTINCT reason FROM dead_letters");
    assert!(reasons.iter().all(|reason| reason == "crashed"), "{reasons:?}");
    took
}

#[tokio::test(flavor = "multi_thread")]
async fn poison_among_many_ends_alone() {
    measure(300, Some(150), 20, 6).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aborting_task_is_a_dead_letter_with_evidence_after_exactly_its_budget() {
    let warren = Warren::new().await;
    let mut first = worker(&warren, "first").start().await;
    let amqp = warren.amqp().await;
    let mut poison = message("garenne.crash", "poison", &json!({ "how": "abort" }));
    poison.set_header("x-garenne-retry-base-ms", HeaderValue::Int(50));
    poison.set_header("x-garenne-attempt", HeaderValue::Int(2));
    amqp.task(poison).await;
    // Nobody suspected it, so it takes the worker with it; that is not charged.
    let end = first.ended(PATIENCE).await;
    assert!(!end.success());
    let second = worker(&warren, "second").set("worker.crash_budget", 2).start().await;
    let letter = amqp.dead().await.letter().within(PATIENCE, "it is given up").await;
    assert_eq!((letter.id.as_str(), letter.reason), ("poison", DeadReason::Crashed));
    assert!(
        letter.error.contains("died 2 times") && letter.error.contains("SIGABRT"),
        "{letter:?}"
    );
    assert_eq!(letter.message.header("x-garenne-crashes"), Some(&HeaderValue::Int(2)));
    let Some(HeaderValue::Text(log)) = letter.message.header("x-garenne-crash-log") else {
        panic!("{letter:?}")
    };
    let lines: Vec<_> = log.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(lines.iter().all(|line| line.contains(" second: signal SIGABRT (6)")), "{log}");
    // Crashes cost no attempt.
    assert_eq!(letter.to_result().unwrap().attempt, 2);
    assert_eq!(second.stderr().matches(r#""message":"its process died""#).count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_evidence_is_shown_and_other_ends_have_their_names() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let producer = warren.producer().await;
    // Known to have crashed: no worker has to die first.
    let amqp = warren.amqp().await;
    for (id, how) in [("killed", "kill"), ("exited", "exit")] {
        let mut task = message("garenne.crash", id, &json!({ "how": how }));
        task.set_header("x-garenne-crashes", HeaderValue::Int(2));
        task.set_header("x-garenne-crash-log", HeaderValue::Text("earlier".to_owned()));
        amqp.task(task).await;
    }
    let _worker = worker(&warren, "w").start().await;
    for (id, how) in [("killed", "signal SIGKILL (9)"), ("exited", "exit code 3")] {
        let id = garenne_common::TaskId::new(id).unwrap();
        let shown = eventually(PATIENCE, "the letter is stored", async || {
            let shown = warren.garenne(&["dead", "show", id.as_str()]).await;
            (shown.code == Some(0)).then_some(shown.stdout)
        })
        .await;
        for part in ["crashed", "died 3 times", "earlier", how] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        let state = producer.task_state(&id).await.unwrap();
        assert!(matches!(state, TaskState::Finished { .. }), "{state:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_recovers_from_its_crashes_succeeds() {
    let warren = Warren::new().await;
    let amqp = warren.amqp().await;
    let mut task = message("garenne.crash", "t-1", &json!({ "how": "kill", "times": 2 }));
    task.set_header("x-garenne-crashes", HeaderValue::Int(1));
    task.set_header("x-garenne-retry-base-ms", HeaderValue::Int(50));
    amqp.task(task).await;
    let _worker = worker(&warren, "w").start().await;
    let result = amqp.results().await.result().within(PATIENCE, "it recovers").await;
    assert_eq!((result.status, result.attempt), (Status::Succeeded, 1));
    assert_eq!(result.output.unwrap().to_json_value(), json!({ "crashes": 2 }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_under_a_lease_is_charged_like_any_other() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    for (id, times) in [("recovers", 2), ("never", 99)] {
        let args = json!({ "how": "abort", "times": times });
        let mut task = message("garenne.crash", id, &args);
        task.set_header("x-garenne-crashes", HeaderValue::Int(1));
        task.set_header("x-garenne-retry-base-ms", HeaderValue::Int(50));
        amqp.task(task).await;
    }
    // Any time limit is too long for that.
    let _worker = worker(&warren, "w").set("broker.consumer_timeout", "1s").start().await;
    let producer = warren.producer().await;
    for (id, expected) in [("recovers", None), ("never", Some(DeadReason::Crashed))] {
        let id = garenne_common::TaskId::new(id).unwrap();
        let result = eventually(PATIENCE, "it has ended", async || {
            match producer.task_state(&id).await.unwrap() {
                TaskState::Finished { result } => Some(result),
                _ => None,
            }
        })
        .await;
        assert_eq!((result.reason, result.attempt), (expected, 1), "{result:?}");
    }
    let leases: Vec<String> = warren.rows("SELECT id FROM leases WHERE state = 'held'");
    assert!(leases.is_empty(), "{leases:?}");
}

/// The processes that a process has started, by their parent in `/proc`.
fn children(of: Pid) -> Vec<Pid> {
    let mut found = vec![];
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(id) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1));
        if parent.and_then(|parent| parent.parse().ok()) == Some(of.as_raw()) {
            found.push(Pid::from_raw(id));
        }
    }
    found
}

/// A second worker at work on a suspect in a child process, after the first one was killed over it.
async fn isolated(warren: &Warren, task: Submission<Value>) -> (Process, Pid) {
    let first = worker(warren, "first").set("worker.concurrency", 1).start().await;
    // So that it gets the task and cannot run it.
    first.freeze();
    warren.producer().await.submit_detached(task).await.unwrap();
    let amqp = warren.amqp().await;
    soon("it is delivered", async || (amqp.waiting().await == 0).then_some(())).await;
    first.kill().await;
    let second = worker(warren, "second").start().await;
    let child = eventually(PATIENCE, "it runs in a child process", async || {
        children(second.id()).first().copied()
    })
    .await;
    (second, child)
}

async fn gone(process: Pid) {
    soon("the child process is gone", async || {
        nix::sys::signal::kill(process, None).is_err().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspect_runs_in_a_child_and_costs_nothing() {
    let warren = Warren::new().await;
    let announce =
        Submission::dynamic("garenne.announce", json!({ "task": "me", "millis": 1_500 })).unwrap();
    let (second, child) = isolated(&warren, announce.retries(0)).await;
    let result = warren.amqp().await.results().await.result().soon("it ends").await;
    assert_eq!((result.status, result.attempt), (Status::Succeeded, 1));
    assert_eq!((&*result.worker, result.redelivered), ("second", true));
    assert_eq!(second.stdout(), "second is processing task me\n");
    // Kept for a while, for further suspects, and then ended.
    gone(child).await;
    assert!(!second.stderr().contains("died"), "{}", second.stderr());
}

#[tokio::test(flavor = "multi_thread")]
async fn no_child_outlives_its_worker() {
    let warren = Warren::new().await;
    // It blocks its thread and listens to nobody.
    let hang = crash(json!({ "how": "hang", "millis": 600_000 }));
    let (second, child) = isolated(&warren, hang).await;
    second.kill().await;
    gone(child).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_whose_worker_died_before_it_looked_is_no_worker() {
    let warren = Warren::new().await;
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut command = warren.command("garenne-worker");
    command.env("GARENNE_ISOLATED_ON", inode(&theirs).unwrap().to_string());
    drop(ours);
    let mut child = command.stdin(OwnedFd::from(theirs)).stderr(Stdio::piped()).spawn().unwrap();
    drop(command);
    // With which code depends on whether it reads or writes first.
    soon("it ends", async || child.try_wait().unwrap()).await;
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(!said.contains("starting"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_ends_its_children_and_hands_their_tasks_back() {
    let warren = Warren::new().await;
    let hang = crash(json!({ "how": "hang", "millis": 600_000 }));
    let (mut second, child) = isolated(&warren, hang).await;
    second.signal(Signal::SIGTERM);
    // Two at once would be one to the kernel.
    second.logged("draining").await;
    second.signal(Signal::SIGTERM);
    // The handler would take five times as long as this waits.
    assert_eq!(second.ended(PATIENCE).await.code(), Some(0));
    gone(child).await;
    let amqp = warren.amqp().await;
    soon("the task is back", async || (amqp.waiting().await == 1).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_suspect_is_killed_at_its_limit() {
    let warren = Warren::new().await;
    let hang = crash(json!({ "how": "hang", "millis": 600_000 })).retries(0);
    let (second, child) = isolated(&warren, hang.timeout(Duration::from_secs(5))).await;
    let letter = warren.amqp().await.dead().await.letter().soon("its time is up").await;
    assert_eq!(letter.reason, DeadReason::TimedOut);
    gone(child).await;
    assert!(!second.stderr().contains("does not return although its attempt is over"));
}

/// Takes a message and loses the connection, as a worker does that is killed together with all it has
/// started; so many times.
async fn lose(warren: &Warren, times: u32) {
    let config = warren.config();
    let queue = config.broker.topology().task_queue(&QueueName::default());
    for _ in 0..times {
        let link = Link::new(&config.broker, "garenne-tests lossy");
        let spec = ConsumerSpec {
            declarations: vec![],
            queue: QueueSource::Named(queue.clone()),
            prefetch: 1,
            tag: "lossy".to_owned(),
            no_ack: false,
        };
        let mut consumer = Consumer::start(link.clone(), spec);
        consumer.next().soon("it is delivered").await.expect("open");
        link.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_is_never_settled_is_given_up_in_the_end() {
    let warren = Warren::new().await;
    let amqp = warren.amqp().await;
    // Ten more than the budget of 3, and one innocent that comes behind it.
    amqp.task(message("garenne.echo", "t-1", &json!(1))).await;
    lose(&warren, 13).await;
    amqp.task(message("garenne.echo", "t-2", &json!(2))).await;
    let mut dead = amqp.dead().await;
    let mut results = amqp.results().await;
    let _worker = worker(&warren, "w").start().await;
    let letter = dead.letter().soon("it is given up").await;
    assert_eq!((letter.id.as_str(), letter.reason), ("t-1", DeadReason::Crashed));
    assert!(letter.error.contains("delivered 14 times"), "{}", letter.error);
    assert_eq!(results.result().soon("the other one runs").await.id.as_str(), "t-2");
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_workers_never_make_a_task_look_guilty() {
    let warren = Warren::new().await;
    let amqp = warren.amqp().await;
    amqp.task(message("garenne.sleep", "t-1", &json!({ "millis": 600_000 }))).await;
    lose(&warren, 6).await;
    let mut worker = worker(&warren, "w").arg("--grace=200ms").start().await;
    soon("it runs", async || (amqp.waiting().await == 0).then_some(())).await;
    assert!(worker.terminate(PATIENCE).await.success());
    let queue = warren.config().broker.topology().task_queue(&QueueName::default());
    let back = amqp.tap(&queue).await.next().soon("it comes back").await;
    assert_eq!(back.properties.message_id.as_deref(), Some("t-1"));
    let count = back.header("x-delivery-count");
    assert!(matches!(count, None | Some(HeaderValue::Int(0))), "{back:?}");
}
