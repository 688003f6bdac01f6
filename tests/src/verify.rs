//! `garenne verify` in small: it holds under every kind of fault, finds a loss when there is one, and
//! leaves nothing behind, however it ends. `make verify` runs it large.

use std::fs;
use std::process::Command;
use std::time::Duration;

use garenne_common::QueueName;
use garenne_common::broker::{Admin, Link};
use garenne_common::config::Config;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::{Ended, PrivateNode, Process, Warren, eventually, finish, soon};

const PATIENCE: Duration = Duration::from_mins(3);

/// The command, on a broker that it may kill.
fn verify(warren: &Warren, node: &PrivateNode, arguments: &[&str]) -> Command {
    let mut command = warren.command("garenne");
    command.args(["verify", "--seed", "20261123"]).args(arguments).envs(node.environment());
    command
}

async fn certificate(node: &PrivateNode, arguments: &[&str]) -> (Ended, Value) {
    let warren = Warren::on(&node.url()).await;
    let command = verify(&warren, node, &[arguments, &["--output", "json"]].concat());
    let ended = finish(command, "", PATIENCE).await;
    let certificate = ended.json();
    (ended, certificate)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_run_holds_whatever_dies() {
    let node = PrivateNode::take().await;
    let (ended, certificate) = certificate(&node, &["--tasks", "300"]).await;
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    assert_eq!((&certificate["schema"], &certificate["holds"]), (&1.into(), &true.into()));
    for kind in ["worker", "collector", "producer", "connection", "broker", "freeze"] {
        assert_eq!(certificate["injected"][kind], 1, "{kind}: {certificate:#}");
    }
    for breach in ["lost", "phantom", "second_outcome", "second_effect", "notice", "conservation"] {
        assert_eq!(certificate["breaches"][breach], 0, "{breach}: {certificate:#}");
    }
    let counts = &certificate["counts"];
    assert_eq!(counts["confirmed"], 300);
    let number = |key: &str| counts[key].as_u64().unwrap_or_else(|| panic!("{key}: {counts:#}"));
    assert_eq!(number("succeeded") + number("failed"), 300);
    assert!((1..300).contains(&number("bundled")), "both ways are gone: {counts:#}");
    assert!(number("failed") > 0 && number("executions") >= 300, "{counts:#}");
    assert!(number("batches_done") + number("batches_abandoned") > 0, "{counts:#}");
    for key in ["duplicate_executions", "refused_effects", "resubmitted", "repeated_results"] {
        number(key);
    }
    for key in ["seed", "seconds", "worst_stall_seconds", "drained_seconds"] {
        assert!(certificate[key].is_number(), "{key}: {certificate:#}");
    }
    assert!(certificate["repeat"].as_str().unwrap().contains("--seed 20261123"));
    assert_eq!(certificate["processes"].as_array().unwrap().len(), 4, "{certificate:#}");
}

/// What nobody can survive: somebody empties the queues under the run.
#[tokio::test(flavor = "multi_thread")]
async fn a_loss_is_found_and_named() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let arguments = ["--tasks", "1500", "--faults", "none", "--patience", "8s", "--output", "json"];
    let mut command = verify(&warren, &node, &arguments);
    // So that its namespace is said while it runs.
    command.arg("-v");
    let mut run = warren.start("garenne", command);
    let namespace = namespace(&mut run).await;
    let config = Config::with_broker(&node.url(), &namespace).unwrap();
    let topology = config.broker.topology();
    let link = Link::new(&config.broker, "garenne-tests thief");
    let (admin, queue) = (Admin::new(link.clone()), topology.task_queue(&QueueName::default()));
    eventually(PATIENCE, "something is stolen", async || {
        let there = admin.depth(&queue).await.ok().flatten().unwrap_or_default();
        admin.purge(&queue).await.ok()?;
        (there > 0).then_some(())
    })
    .await;
    link.close().await;
    assert_eq!(run.ended(PATIENCE).await.code(), Some(1));
    let certificate: Value = serde_json::from_str(&run.stdout()).unwrap();
    assert_eq!(certificate["holds"], false);
    let lost = certificate["breaches"]["lost"].as_u64().unwrap();
    assert!(lost > 0, "{certificate:#}");
    let violations = certificate["violations"].as_array().unwrap();
    let lost = violations.iter().find(|one| one["invariant"] == "lost").unwrap();
    assert!(lost["subject"].as_str().unwrap().starts_with("v-"), "{lost:#}");
    assert!(!lost["history"].as_array().unwrap().is_empty(), "{lost:#}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_of_others_is_not_killed() {
    let warren = Warren::new().await;
    let refused = warren.garenne(&["verify", "--tasks", "100", "--faults", "worker,broker"]).await;
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(refused.stderr.contains("scripts/rabbitmq run"), "{refused:#?}");
    let wrong = warren.garenne(&["verify", "--faults", "wroker"]).await;
    assert_eq!(wrong.code, Some(2), "{wrong:#?}");
    assert!(wrong.stderr.contains("freeze"), "{wrong:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_run_and_a_killed_one_leave_no_process() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let arguments = ["--tasks", "100000", "--faults", "worker,freeze"];
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let mut run = warren.start("garenne", verify(&warren, &node, &arguments));
        namespace(&mut run).await;
        let parent = run.id().as_raw();
        let children = eventually(PATIENCE, "its processes run", async || {
            let children = children_of(parent);
            (children.len() >= 5).then_some(children)
        })
        .await;
        run.signal(signal);
        let code = run.ended(PATIENCE).await.code();
        assert_eq!(code, (signal == Signal::SIGINT).then_some(130));
        soon("all its processes are gone", async || {
            children.iter().all(|pid| !runs(*pid)).then_some(())
        })
        .await;
    }
}

/// The namespace that a run says it works in.
async fn namespace(run: &mut Process) -> String {
    let line = run.logged("garenne-verify-").await;
    let (_, rest) = line.split_once("garenne-verify-").unwrap();
    let end: String = rest.chars().take_while(char::is_ascii_alphanumeric).collect();
    format!("garenne-verify-{end}")
}

fn children_of(parent: i32) -> Vec<i32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // proc(5): behind the name in brackets come the state and the parent.
    let stat = |pid: i32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let is_child = |pid: &i32| {
        let stat = stat(*pid);
        let parent_of = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1));
        parent_of == Some(&parent.to_string())
    };
    pids.filter(is_child).collect()
}

fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}
