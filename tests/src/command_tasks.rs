//! An external program as a handler: its arguments, its input, its exit code, its end.

use std::time::Duration;

use garenne_common::{DeadReason, RetryPolicy, Status, TaskResult};
use garenne_producer::{Producer, Submission};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{Process, SOON, Soon, Warren, soon};
use crate::process_one::children;

const COMMANDS: &str = r#"
[worker.commands."say"]
argv = ["printf", "%s|", "{text}", "--size={n}", "literal {"]
output = "text"

[worker.commands."sort"]
argv = ["python3", "-S", "-c", "import json, sys; print(json.dumps(sorted(json.load(sys.stdin))))"]
stdin = true

[worker.commands."json.only"]
argv = ["printf", "{text}"]
output = "json"

[worker.commands."exit"]
argv = ["python3", "-S", "-c", "import os, sys; sys.stderr.write('it says why\\n'); sys.exit(75 if int(os.environ['GARENNE_ATTEMPT']) < int(sys.argv[1]) else int(sys.argv[2]))", "{fails_until}", "{code}"]

[worker.commands."environment"]
argv = ["env"]
env = { MINE = "1" }
output = "text"

[worker.commands."linger"]
argv = ["python3", "-S", "-c", "import os, subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); open(sys.argv[1], 'w').write('%d %d ' % (os.getpid(), child.pid)); time.sleep(600)", "{file}"]

[worker.commands."desert"]
argv = ["python3", "-S", "-c", "import os, subprocess, sys, time; child = subprocess.Popen(['sleep', '600'], start_new_session=True); open(sys.argv[1], 'w').write('%d %d ' % (os.getpid(), child.pid)); time.sleep(600)", "{file}"]

[worker.commands."daemon"]
argv = ["python3", "-S", "-c", "import subprocess, sys; child = subprocess.Popen(['sleep', '600'], start_new_session=True); open(sys.argv[1], 'w').write('%d %d ' % (child.pid, child.pid)); print('started'); sys.exit(int(sys.argv[2]))", "{file}", "{code}"]

[worker.commands."chatter"]
argv = ["python3", "-S", "-c", "import sys; sys.stdout.write('x' * 9_000_000)"]

[worker.commands."deaf"]
argv = ["true"]
stdin = true
"#;

/// A time limit that ends what would run for ever, and not before it has written what it is.
const COMMAND_STARTS: Duration = Duration::from_secs(8);

async fn start(warren: &Warren) -> (Process, Producer) {
    tokio::join!(warren.worker().toml(COMMANDS).start(), warren.producer())
}

fn task(name: &str, args: Value) -> Submission<Value> {
    Submission::dynamic(name, args).unwrap().retries(0)
}

async fn run(producer: &Producer, submission: Submission<Value>) -> TaskResult {
    producer.submit(submission).await.unwrap().result().soon("the command ends").await.unwrap()
}

fn output(result: TaskResult) -> Value {
    result
        .output
        .unwrap_or_else(|| panic!("{:?}: {:?}", result.status, result.error))
        .to_json_value()
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_fill_placeholders_and_never_meet_a_shell() {
    let warren = Warren::new().await;
    let (_worker, producer) = start(&warren).await;
    let evil = "$(reboot); `id` \"quoted\" 'é' {n}";
    let said = run(&producer, task("say", json!({ "text": evil, "n": 3 }))).await;
    assert_eq!(output(said), format!("{evil}|--size=3|literal {{|"));
    for (args, names) in [
        (json!({ "text": "--version", "n": 1 }), "option"),
        (json!({ "text": "x" }), "\"n\" is missing"),
        (json!({ "text": ["x"], "n": 1 }), "must be a string"),
        (json!({ "text": "a\0b", "n": 1 }), "zero byte"),
    ] {
        let refused = run(&producer, task("say", args)).await;
        assert_eq!(refused.reason, Some(DeadReason::Malformed));
        assert!(refused.error.as_ref().unwrap().contains(names), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn input_and_output_are_json_where_asked_for() {
    let warren = Warren::new().await;
    let (_worker, producer) = start(&warren).await;
    let sorted = run(&producer, task("sort", json!(["b", "a"]))).await;
    assert_eq!(output(sorted), json!(["a", "b"]));
    let number = run(&producer, task("json.only", json!({ "text": "7" }))).await;
    assert_eq!(output(number), json!(7));
    let broken = run(&producer, task("json.only", json!({ "text": "seven" }))).await;
    assert_eq!(broken.reason, Some(DeadReason::Fatal));
    assert!(broken.error.unwrap().contains("not JSON"));
    // A megabyte that nobody reads.
    let deaf = run(&producer, task("deaf", json!("x".repeat(1_000_000)))).await;
    assert_eq!(deaf.status, Status::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_exit_code_says_whether_to_try_again() {
    let warren = Warren::new().await;
    let (_worker, producer) = start(&warren).await;
    let quick =
        RetryPolicy { max_attempts: 3, base: Duration::from_millis(20), ..Default::default() };
    let exit = |fails_until: u32, code: u8| {
        let args = json!({ "fails_until": fails_until, "code": code });
        task("exit", args).retry_policy(quick)
    };
    let third = run(&producer, exit(3, 0)).await;
    assert_eq!((third.status, third.attempt), (Status::Succeeded, 3));
    let tired = run(&producer, exit(9, 0)).await;
    assert_eq!((tired.reason, tired.attempt), (Some(DeadReason::RetriesExhausted), 3));
    let failed = run(&producer, exit(0, 1)).await;
    assert_eq!((failed.reason, failed.attempt), (Some(DeadReason::Fatal), 1));
    assert!(failed.error.as_ref().unwrap().contains("it says why"), "{failed:?}");
    let failed = run(&producer, task("chatter", json!({}))).await;
    assert_eq!(failed.reason, Some(DeadReason::Fatal));
    assert!(failed.error.as_ref().unwrap().contains("more than"), "{failed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_leaves_a_daemon_at_its_pipes_ends_with_its_own_exit_code() {
    let warren = Warren::new().await;
    let (_worker, producer) = start(&warren).await;
    for code in [0, 3] {
        let daemon = task("daemon", json!({ "file": warren.path("pids"), "code": code }));
        let result = run(&producer, daemon.timeout(Duration::from_mins(10))).await;
        let pids = lingering(&warren).await;
        let still = std::fs::exists(format!("/proc/{}", pids[0])).unwrap();
        assert!(still, "the daemon holds the pipe all the time");
        kill(Pid::from_raw(pids[0].parse().unwrap()), Signal::SIGKILL).unwrap();
        if code == 0 {
            assert_eq!(output(result), "started");
        } else {
            assert_eq!(result.reason, Some(DeadReason::Fatal), "{result:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_s_own_environment_stays_its_own() {
    let warren = Warren::new().await;
    let (_worker, producer) = start(&warren).await;
    let result = run(&producer, task("environment", json!({}))).await;
    let id = result.id.clone();
    let seen = output(result);
    let seen: Vec<_> = seen.as_str().unwrap().lines().collect();
    for expected in
        ["MINE=1".to_owned(), format!("GARENNE_TASK_ID={id}"), "GARENNE_ATTEMPT=1".to_owned()]
    {
        assert!(seen.contains(&&*expected), "{seen:?}");
    }
    assert!(!seen.iter().any(|line| line.contains("AMQP_URL")), "{seen:?}");
}

/// The processes that `linger` has written down, once there are two.
async fn lingering(warren: &Warren) -> Vec<String> {
    soon("the command has started a child", async || {
        let text = std::fs::read_to_string(warren.path("pids")).ok()?;
        let pids: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
        (pids.len() == 2 && text.ends_with(' ')).then_some(pids)
    })
    .await
}

async fn gone(pids: &[String]) {
    let running = |pid: &&String| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // A killed process that nobody has waited for yet is gone for our purposes.
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    };
    soon("the command and its child are gone", async || {
        pids.iter().find(running).is_none().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_limit_kills_the_command_and_what_it_has_started() {
    let warren = Warren::new().await;
    let (_worker, producer) = start(&warren).await;
    let endless = task("linger", json!({ "file": warren.path("pids") }));
    let endless = producer.submit(endless.timeout(COMMAND_STARTS)).await.unwrap();
    let pids = lingering(&warren).await;
    let result = endless.result().soon("the command ends").await.unwrap();
    assert_eq!(result.reason, Some(DeadReason::TimedOut));
    gone(&pids).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_takes_its_commands_with_it() {
    for name in ["linger", "desert"] {
        let warren = Warren::new().await;
        let (worker, producer) = start(&warren).await;
        let endless = task(name, json!({ "file": warren.path("pids") }));
        producer.submit_detached(endless).await.unwrap();
        let pids = lingering(&warren).await;
        worker.kill().await;
        gone(&pids).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ends_the_commands_of_a_killed_worker_is_started_again() {
    let warren = Warren::new().await;
    let (worker, producer) = start(&warren).await;
    let running = || children(worker.id()).into_iter().filter(|(_, state)| *state != 'Z');
    let (first, _) = running().next().expect("it is started with the worker");
    kill(first, Signal::SIGKILL).unwrap();
    soon("it is gone", async || running().all(|(pid, _)| pid != first).then_some(())).await;
    let endless = task("linger", json!({ "file": warren.path("pids") }));
    producer.submit_detached(endless).await.unwrap();
    let pids = lingering(&warren).await;
    worker.kill().await;
    gone(&pids).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_leaves_the_daemons_of_ended_commands_alone() {
    let warren = Warren::new().await;
    let (worker, producer) = start(&warren).await;
    let daemon = task("daemon", json!({ "file": warren.path("daemon"), "code": 0 }));
    run(&producer, daemon).await;
    let daemon = std::fs::read_to_string(warren.path("daemon")).unwrap();
    let daemon = daemon.split(' ').next().unwrap().to_owned();
    let endless = task("desert", json!({ "file": warren.path("pids") }));
    producer.submit_detached(endless).await.unwrap();
    let pids = lingering(&warren).await;
    worker.kill().await;
    gone(&pids).await;
    kill(Pid::from_raw(daemon.parse().unwrap()), Signal::SIGKILL).expect("it runs on");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_leaves_no_command_behind() {
    let warren = Warren::new().await;
    let worker = warren.worker().toml(COMMANDS).arg("--grace=200ms");
    let (mut worker, producer) = tokio::join!(worker.start(), warren.producer());
    let endless = task("linger", json!({ "file": warren.path("pids") }));
    producer.submit_detached(endless).await.unwrap();
    let pids = lingering(&warren).await;
    assert!(worker.terminate(SOON).await.success());
    gone(&pids).await;
    assert_eq!(warren.amqp().await.waiting().await, 1, "and its task is back in the queue");
}
