//! `garenne doctor` never says that all is well while anything stands still, whoever is to blame. What
//! ails a collector is in [`ill_collector`](crate::ill_collector), what is refused in
//! [`liveness`](crate::liveness).

use garenne_common::wire::{Message, Properties, Report, TaskState};
use garenne_common::{BatchId, Timestamp};
use garenne_producer::Submission;
use serde_json::{Value, json};

use crate::harness::{PrivateNode, Process, SOON, SilentQueue, Warren, soon};

/// What the doctor says of a namespace, check by check, and that it says in a word what it found.
async fn examined(warren: &Warren, arguments: &[&str], state: &str) -> Vec<Value> {
    let words = warren.garenne(&[&["doctor"], arguments].concat()).await;
    let ended = warren.garenne(&[&["doctor", "--output", "json"], arguments].concat()).await;
    let code = Some(i32::from(state == "bad"));
    assert_eq!((ended.code, words.code), (code, code), "{ended:#?} {words:#?}");
    assert!(!words.stdout.contains("All is well"), "{words:#?}");
    let report = ended.json();
    let checks = report["checks"].as_array().unwrap().iter();
    let found: Vec<_> = checks.filter(|check| check["state"] == state).cloned().collect();
    assert!(found.iter().all(|check| check["advice"].is_string()), "{found:#?}");
    found
}

/// The only thing that is wrong, and what is said of it.
async fn only(warren: &Warren, arguments: &[&str], state: &str, name: &str) -> String {
    let found = examined(warren, arguments, state).await;
    let names: Vec<_> = found.iter().map(|check| check["check"].as_str().unwrap()).collect();
    assert_eq!(names, [name], "{found:#?}");
    found[0]["detail"].as_str().unwrap().to_owned()
}

async fn healthy(warren: &Warren) -> (Process, Process) {
    let crew = warren.crew().await;
    let well = warren.garenne(&["doctor"]).await.ok();
    assert!(well.contains("All is well"), "{well}");
    crew
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_set_aside_is_named_with_what_it_waits_for() {
    let warren = Warren::new().await;
    let _crew = healthy(&warren).await;
    let producer = warren.producer().await;
    for n in 0..3 {
        let task = Submission::dynamic("image.resize", json!(n)).unwrap();
        let handle = producer.submit(task).await.unwrap();
        soon("the task is parked", async || {
            let state = producer.task_state(handle.id()).await.unwrap();
            matches!(state, TaskState::Parked { .. }).then_some(())
        })
        .await;
    }
    let detail = only(&warren, &[], "bad", "parked").await;
    assert!(detail.starts_with("3 tasks wait for a worker of the queue default"), "{detail}");
    assert!(detail.contains("knows image.resize"), "{detail}");
    let mapped = warren.garenne_reading("1\n2\n", &["map", "--detach", "image.resize"]).await;
    let batch = mapped.ok().trim().to_owned();
    let mut waiting = warren.start_garenne(&["batch", "wait", &batch]);
    waiting.logged("2 of them are parked").await;
    let purge = ["dead", "purge", "--task", "image.resize", "--yes"];
    warren.garenne(&purge).await.ok();
    assert_eq!(waiting.ended(SOON).await.code(), Some(1), "purged members have ended");
    let well = warren.garenne(&["doctor"]).await.ok();
    assert!(well.contains("All is well"), "{well}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_can_read_is_named() {
    let warren = Warren::new().await;
    let _crew = healthy(&warren).await;
    let message =
        Message { properties: Properties::default(), headers: vec![], body: b"?".to_vec().into() };
    let unreadable = warren.config().broker.topology().unreadable();
    warren.amqp().await.publish("", &unreadable, message).await;
    let detail = only(&warren, &[], "bad", "unreadable").await;
    assert!(detail.contains(&unreadable), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_ill_is_named_with_its_problem() {
    let warren = Warren::new().await;
    let missing = warren.path("missing");
    let command = format!("[worker.commands.run]\nargv = [{:?}]\n", missing.to_str().unwrap());
    let worker = warren.worker().arg("--name=poorly").toml(&command).start();
    let (mut worker, _collector) = tokio::join!(worker, warren.collector().start());
    warren.garenne(&["submit", "run"]).await.ok();
    worker.logged(r#""problem":"command_unusable""#).await;
    let detail = only(&warren, &[], "bad", "worker").await;
    assert!(detail.starts_with("poorly: command_unusable"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_whose_members_are_gone_deserves_a_look() {
    let warren = Warren::new().await;
    let _crew = healthy(&warren).await;
    let (batch, at) = (BatchId::new("b-1").unwrap(), Timestamp::now());
    warren.amqp().await.reports(&[Report::BatchSealed { batch, count: 3, at }]).await;
    soon("the batch is known", async || {
        warren.garenne(&["batch", "show", "b-1"]).await.code.filter(|code| *code == 0)
    })
    .await;
    let detail = only(&warren, &["--idle", "0s"], "odd", "quiet batch").await;
    assert!(detail.starts_with("b-1: 0 of 3 tasks have ended"), "{detail}");
    let mut waiting = warren.start_garenne(&["batch", "wait", "b-1"]);
    waiting.logged("waiting for 3 of 3 tasks; the last change was").await;
    warren.garenne(&["batch", "abandon", "b-1"]).await.ok();
    assert_eq!(waiting.ended(SOON).await.code(), Some(1));
    let well = warren.garenne(&["doctor", "--idle", "0s"]).await.ok();
    assert!(well.contains("All is well"), "{well}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_does_not_answer_is_named() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let _crew = healthy(&warren).await;
    let silent = SilentQueue::new(&node, &warren.config().broker.topology().results());
    let detail = only(&warren, &[], "bad", "results").await;
    assert!(detail.starts_with("1 collector reports consuming it"), "{detail}");
    drop(silent);
    let well = warren.garenne(&["doctor"]).await.ok();
    assert!(well.contains("All is well"), "{well}");
}
