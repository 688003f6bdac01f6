//! A worker or collector that is process 1 of a container: it leaves no zombies, and it hears signals.

use std::time::Duration;

use garenne_common::Status;
use garenne_producer::Submission;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::harness::{Process, Soon, Warren, soon};

/// It ends before what it has started, of which nobody hears any more.
const COMMANDS: &str = r#"
[worker.commands.abandon]
argv = ["python3", "-S", "-c", "import subprocess; subprocess.Popen(['sleep', '0.1'], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)"]

[worker.commands.fail]
argv = ["false"]
"#;

/// Processes whose parent this is, with their states.
pub(crate) fn children(parent: Pid) -> Vec<(Pid, char)> {
    let stat = |entry: std::fs::DirEntry| {
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let (pid, rest) = stat.split_once(' ')?;
        let mut rest = rest.rsplit_once(") ")?.1.split(' ');
        let (state, of) = (rest.next()?.chars().next()?, rest.next()?.parse().ok()?);
        (Pid::from_raw(of) == parent).then_some((Pid::from_raw(pid.parse().ok()?), state))
    };
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(stat).collect()
}

/// The process that is number 1 in its own eyes.
async fn first(unshare: &Process) -> Pid {
    let unshare = unshare.id();
    soon("it has started", async || Some(children(unshare).first()?.0)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_as_process_one_leaves_no_zombies_and_drains() {
    let warren = Warren::new().await;
    let worker = warren.worker().toml(COMMANDS).in_pid_namespace();
    let (mut worker, producer) = tokio::join!(worker.start(), warren.producer());
    let one = first(&worker).await;
    for _ in 0..10 {
        let task = Submission::dynamic("abandon", json!({})).unwrap();
        let result = producer.submit(task).await.unwrap().result().soon("it ends").await.unwrap();
        assert_eq!(result.status, Status::Succeeded, "{result:?}");
    }
    // It sees the exit codes of its own children all the same.
    let failing = Submission::dynamic("fail", json!({})).unwrap();
    let failed = producer.submit(failing).await.unwrap().result().soon("it ends").await.unwrap();
    assert!(failed.error.as_ref().is_some_and(|it| it.contains("exit code 1")), "{failed:?}");
    soon("only the worker is left", async || {
        let left = children(one);
        (left.len() == 1 && left.iter().all(|(_, state)| *state != 'Z')).then_some(())
    })
    .await;
    kill(one, Signal::SIGTERM).unwrap();
    assert!(worker.ended(Duration::from_secs(20)).await.success());
    assert!(worker.stderr().contains("stopped"), "in order");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_as_process_one_stops_in_order() {
    let warren = Warren::new().await;
    let mut collector = warren.collector().in_pid_namespace().start().await;
    kill(first(&collector).await, Signal::SIGTERM).unwrap();
    assert!(collector.ended(Duration::from_secs(20)).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn process_one_ends_with_the_code_of_its_service() {
    let warren = Warren::new().await;
    let service = warren.worker().arg("--queues=not a name").in_pid_namespace();
    assert_eq!(service.fail(Duration::from_secs(20)).await.code, Some(2));
    let mut worker = warren.worker().in_pid_namespace().start().await;
    let one = first(&worker).await;
    let service = children(one).first().unwrap().0;
    kill(service, Signal::SIGKILL).unwrap();
    assert_eq!(worker.ended(Duration::from_secs(20)).await.code(), Some(128 + 9));
}
