//! An attempt is asked to end at its soft limit and is over at its hard one, and a handler that hears
//! neither is seen.

use std::time::Duration;

use garenne_common::{DeadReason, Status, Task};
use garenne_producer::Submission;
use garenne_worker::{Context, TaskError, Worker};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::harness::{Soon, Warren, soon};

const COMMANDS: &str = r#"
[worker.commands."polite"]
argv = ["python3", "-S", "-c", "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('asked to end'), sys.exit(0))); open(sys.argv[1], 'w').close(); time.sleep(600)", "{file}"]

[worker.commands."stubborn"]
argv = ["python3", "-S", "-c", "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1], 'a').write('asked ')); open(sys.argv[1], 'a').write('%d ' % os.getpid())\nwhile True: time.sleep(1)", "{file}"]
"#;

/// A limit that is not reached before a command has said how it takes signals.
const COMMAND_STARTS: Duration = Duration::from_secs(8);

fn task(name: &str, args: Value) -> Submission<Value> {
    Submission::dynamic(name, args).unwrap().retries(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_asked_at_its_soft_limit_and_may_still_answer() {
    let warren = Warren::new().await;
    let (_worker, producer) =
        tokio::join!(warren.worker().toml(COMMANDS).start(), warren.producer());
    let polite = task("polite", json!({ "file": warren.path("polite") }));
    let polite = polite.soft_timeout(COMMAND_STARTS).timeout(Duration::from_mins(5));
    let result = producer.submit(polite).await.unwrap().result().soon("it ends").await.unwrap();
    assert_eq!(result.status, Status::Succeeded, "{result:?}");
    assert_eq!(result.output.unwrap().to_json_value(), "asked to end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_ignores_its_limit_is_killed_after_a_grace() {
    let warren = Warren::new().await;
    let worker = warren.worker().toml(COMMANDS).set("worker.kill_grace", "500ms");
    let (_worker, producer) = tokio::join!(worker.start(), warren.producer());
    let file = warren.path("stubborn");
    let stubborn = task("stubborn", json!({ "file": file })).timeout(COMMAND_STARTS);
    let result = producer.submit(stubborn).await.unwrap().result().soon("it ends").await.unwrap();
    assert_eq!(result.reason, Some(DeadReason::TimedOut));
    let said = std::fs::read_to_string(&file).unwrap();
    let words: Vec<_> = said.split_whitespace().collect();
    assert_eq!(words[1..], ["asked"], "first SIGTERM, then SIGKILL");
    soon("what was killed is gone", async || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", words[0])).unwrap_or_default();
        (stat.is_empty() || stat.contains(") Z ")).then_some(())
    })
    .await;
}

#[derive(Serialize, Deserialize)]
struct Wait;

impl Task for Wait {
    const NAME: &'static str = "test.wait";
    type Output = String;
}

#[tokio::test(flavor = "multi_thread")]
async fn async_and_blocking_handlers_hear_of_their_soft_limit() {
    let warren = Warren::new().await;
    let gentle = async |context: Context, Wait| {
        context.cancelled().await;
        Ok::<_, TaskError>("async".to_owned())
    };
    let firm = |context: &Context, Wait| {
        while !context.is_cancelled() {
            std::thread::park_timeout(Duration::from_millis(10));
        }
        Ok::<_, TaskError>("blocking".to_owned())
    };
    for blocking in [false, true] {
        let builder = Worker::builder(warren.config());
        let builder = if blocking {
            builder.register_blocking::<Wait, _>(firm)
        } else {
            builder.register::<Wait, _, _>(gentle)
        };
        let running = warren.work(builder).await;
        let producer = warren.producer().await;
        let wait = Submission::new(Wait).soft_timeout(Duration::from_millis(300));
        let handle = producer.submit(wait.timeout(Duration::from_mins(5))).await.unwrap();
        let output = handle.output().soon("it ends in time").await.unwrap();
        assert_eq!(output, if blocking { "blocking" } else { "async" });
        running.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_handler_is_counted_until_it_returns() {
    let warren = Warren::new().await;
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = std::sync::Mutex::new(held);
    let stuck = move |_: &Context, Wait| {
        // The other end is dropped when it may return.
        Ok::<_, TaskError>(held.lock().unwrap().recv().is_ok().to_string())
    };
    let mut config = warren.config();
    config.worker.concurrency = 2;
    let running = warren.work(Worker::builder(config).register_blocking::<Wait, _>(stuck)).await;
    let producer = warren.producer().await;
    let limited = Submission::new(Wait).retries(0).timeout(Duration::from_millis(200));
    let stuck = producer.submit(limited).await.unwrap();
    let result = stuck.result().soon("its time is up").await.unwrap();
    assert_eq!(result.reason, Some(DeadReason::TimedOut));
    soon("the handler counts as stuck", async || (running.stuck_handlers() == 1).then_some(()))
        .await;
    // The other slot still works.
    let echo = producer.submit(task("garenne.echo", json!(1))).await.unwrap();
    assert_eq!(echo.result().soon("it runs").await.unwrap().status, Status::Succeeded);
    drop(release);
    soon("the handler has returned", async || (running.stuck_handlers() == 0).then_some(())).await;
    running.drain().soon("it stops").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_handler_is_logged_with_its_task() {
    let warren = Warren::new().await;
    let worker = warren.worker().arg("--faults").start();
    let (mut worker, producer) = tokio::join!(worker, warren.producer());
    let hang = task("garenne.crash", json!({ "how": "hang", "millis": 8_000 }));
    let id = producer.submit_detached(hang.timeout(Duration::from_millis(200))).await.unwrap();
    let lost = worker.logged("does not return although its attempt is over").await;
    for part in ["ERROR", "garenne.crash", id.as_str(), r#""stuck":1"#, r#""concurrency":4"#] {
        assert!(lost.contains(part), "{part}: {lost}");
    }
    let back = worker.logged("a stuck handler has returned").await;
    assert!(back.contains(id.as_str()) && back.contains(r#""stuck":0"#), "{back}");
}
