//! Signals: what may arrive without meaning that the process should end does not end it (promise 8),
//! and SIGUSR1 tells what it does.

use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Process, Warren, message, soon};

const PROMPT: Duration = Duration::from_secs(10);

/// By default each of them ends a process at once.
const HARMLESS: [Signal; 9] = [
    Signal::SIGHUP,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGSTKFLT,
    Signal::SIGXFSZ,
];

async fn survives(process: &mut Process) {
    for signal in HARMLESS {
        process.signal(signal);
        let line = process.logged(&format!(r#""signal":"{signal}""#)).await;
        assert!(line.contains("the process continues"), "{line}");
    }
}

/// The fields of the first log line that contains `text`.
async fn line(process: &mut Process, text: &str) -> Value {
    serde_json::from_str(&process.logged(text).await).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_during_the_start_end_nothing() {
    let warren = Warren::new().await;
    // Connections are accepted by the kernel, and nobody ever answers.
    let hole = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("amqp://{}/%2f", hole.local_addr().unwrap());
    for service in [warren.worker(), warren.collector()] {
        let mut process = service.url(&url).set("broker.connect_timeout", "10m").spawn();
        process.logged(r#""message":"starting""#).await;
        survives(&mut process).await;
        process.signal(Signal::SIGUSR1);
        process.logged("state: starting").await;
        assert_eq!(process.terminate(PROMPT).await.code(), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_worker_goes_on_and_tells_what_it_does() {
    let warren = Warren::new().await;
    let mut worker = warren.worker().set("worker.concurrency", 1).start().await;
    let amqp = warren.amqp().await;
    for id in ["t-runs", "t-waits"] {
        amqp.task(message("garenne.sleep", id, &json!({ "millis": 600_000 }))).await;
    }
    soon("both are delivered", async || (amqp.waiting().await == 0).then_some(())).await;
    survives(&mut worker).await;
    worker.signal(Signal::SIGUSR1);
    let state = line(&mut worker, "state of the worker").await;
    assert_eq!((&state["running"], &state["draining"]), (&json!(1), &json!(false)), "{state}");
    let queue = line(&mut worker, "state: queue").await;
    assert_eq!((&queue["queue"], &queue["unsettled"]), (&json!("default"), &json!(2)), "{queue}");
    assert_eq!(queue["waiting_messages"], 1, "{queue}");
    assert!(queue["consumer"].as_str().unwrap().starts_with("flowing"), "{queue}");
    worker.logged("garenne.sleep t-runs (").await;

    worker.signal(Signal::SIGTERM);
    worker.logged(r#""message":"draining""#).await;
    worker.signal(Signal::SIGUSR1);
    worker.logged(r#""draining":true"#).await;
    worker.signal(Signal::SIGHUP);
    worker.signal(Signal::SIGTERM);
    assert_eq!(worker.ended(PROMPT).await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_collector_goes_on_and_tells_what_it_does() {
    let warren = Warren::new().await;
    let (_worker, mut collector) = warren.crew().await;
    survives(&mut collector).await;
    warren.garenne(&["submit", "garenne.echo", "1", "--wait"]).await.ok();
    soon("the result is stored", async || {
        warren.rows::<String>("SELECT status FROM results").pop()
    })
    .await;
    collector.signal(Signal::SIGUSR1);
    let state = line(&mut collector, "state of the collector").await;
    assert!(state["groups_committed"].as_u64().unwrap() >= 1, "{state}");
    assert!(state["last_commit"].is_string(), "{state}");
    let results = line(&mut collector, r#""consumer":"results""#).await;
    assert!(results["health"].as_str().unwrap().starts_with("flowing"), "{results}");
    let outboxes = line(&mut collector, "state: outboxes").await;
    assert!(outboxes["notices"].is_u64() && outboxes["resends"] == 0, "{outboxes}");
    assert_eq!(collector.terminate(PROMPT).await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_whose_terminal_closes_ends_as_after_ctrl_c() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let mut map = warren.start_garenne(&["map", "garenne.echo"]);
    map.write("1\n").await;
    soon("it has run", async || map.stdout().lines().next().map(drop)).await;
    map.signal(Signal::SIGHUP);
    assert_eq!(map.ended(PROMPT).await.code(), Some(129));
    let said = map.stderr();
    let id =
        said.split("garenne batch show ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let waited = warren.garenne(&["batch", "wait", id.unwrap(), "--output", "json"]).await;
    assert_eq!((waited.code, &waited.json()["total"]), (Some(0), &json!(1)), "{waited:#?}");
}
