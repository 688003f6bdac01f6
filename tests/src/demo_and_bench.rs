//! `garenne demo` and `garenne bench`, in small: they start the shipped services as processes and find
//! fault with themselves.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;

use crate::harness::{Ended, Warren, finish};

async fn garenne(arguments: &[&str]) -> Ended {
    let warren = Warren::new().await;
    let mut command = warren.command("garenne");
    command.args(arguments);
    finish(command, "", Duration::from_mins(5)).await
}

/// Pairs of node and task out of the lines `Node 2 is processing task 4`.
fn runs(text: &str) -> BTreeSet<(u32, u32)> {
    let pairs = text.lines().filter_map(|line| {
        let (node, task) = line.trim().strip_prefix("Node ")?.split_once(" is processing task ")?;
        Some((node.parse().ok()?, task.parse().ok()?))
    });
    pairs.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn five_tasks_run_on_three_nodes() {
    let demo = garenne(&["demo", "--only", "tasks", "--no-wait"]).await.ok();
    let tasks: Vec<_> = runs(&demo)
        .into_iter()
        .map(|(_, task)| task)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    assert_eq!(tasks, [1, 2, 3, 4, 5], "{demo}");
    assert_eq!(runs(&demo).len(), 5, "each once: {demo}");
    assert!(demo.contains("All tasks are done."), "{demo}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broadcast_runs_every_task_on_every_node() {
    let demo = garenne(&["demo", "--only", "tasks", "--broadcast", "--no-wait"]).await.ok();
    let all = (1..=3).flat_map(|node| (1..=5).map(move |task| (node, task)));
    assert_eq!(runs(&demo), all.collect(), "{demo}");
    assert!(demo.contains("All tasks are done."), "{demo}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_job_survives_dying_workers_and_is_checked_against_coreutils() {
    let directory = crate::harness::root().join("common");
    let directory = directory.to_str().unwrap();
    let job = ["demo", "--only", "job", "--no-wait", "--files", "300", "--dir", directory];
    let demo = garenne(&job).await;
    assert_eq!(demo.code, Some(0), "{demo:#?}");
    assert!(format!("{}{}", demo.stdout, demo.stderr).contains("sha256sum"), "{demo:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bench_measures_and_reports() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let small = ["--quick", "--seconds", "0.1", "--output", "json", "--report"];
    let file = tempfile::NamedTempFile::new().unwrap();
    let refused =
        garenne(&[&["bench"], &small[..], &[file.path().to_str().unwrap()]].concat()).await;
    assert_eq!((refused.code, &*refused.stdout), (Some(2), ""), "before anything is measured");
    let bench = [&["bench"], &small[..], &[out.to_str().unwrap()]].concat();
    let bench = garenne(&bench).await;
    assert_eq!(bench.code, Some(0), "{bench:#?}");
    let report = bench.json();
    let figures = report["figures"].as_array().unwrap();
    let measured = |figure: &&Value| figure["garenne"]["median"].as_f64() > Some(0.0);
    let of = |id: &str| figures.iter().find(|figure| figure["id"] == id).filter(measured);
    for id in ["singles", "bulk", "replies", "submit.bulk", "sleep", "spin", "latency.p50", "start"]
    {
        assert!(of(id).is_some(), "{id}: {report:#}");
    }
    for id in ["payload.bulk.10240", "backlog.apart.2000", "workers.2", "producers.2", "queues.2"] {
        assert!(of(id).is_some_and(|figure| figure["point"].is_object()), "{id}: {report:#}");
    }
    assert!(of("singles").unwrap()["ratio"].is_number());
    assert!(of("singles").unwrap()["verdict"].is_string());
    let read = |name: &str| std::fs::read_to_string(out.join(name)).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&read("report.json")).unwrap(), report);
    assert!(read("report.md").contains("| singles, stored |"));
    let picture = read("report.svg");
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
}
