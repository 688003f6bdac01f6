//! Trouble of a worker costs no task an attempt: too few open files, a program that is missing, busy or
//! not executable, child processes that cannot be started. The worker says so, goes on with what it can
//! run, and recovers by itself.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use garenne_common::wire::crash::mark_returned;
use garenne_common::{Status, TaskResult};
use garenne_producer::{Handle, Producer, Submission};
use serde_json::{Value, json};

use crate::harness::{Process, Service, Soon, Warren, message, soon};

/// Delays grow while a trouble lasts, and a probe comes after the longest of them at the latest.
const PATIENCE: Duration = Duration::from_mins(2);

/// No retries: each attempt that is charged would show as a dead letter.
fn task(name: &str, args: Value) -> Submission<Value> {
    Submission::dynamic(name, args).unwrap().retries(0)
}

async fn submit(producer: &Producer, name: &str, args: Value) -> Handle<Value> {
    producer.submit(task(name, args)).await.unwrap()
}

async fn succeeds(handle: Handle<Value>) -> TaskResult {
    let result = handle.result().within(PATIENCE, "the task ends").await.unwrap();
    assert_eq!((result.status, result.attempt), (Status::Succeeded, 1), "{result:?}");
    result
}

async fn echoes(producer: &Producer) {
    succeeds(submit(producer, "garenne.echo", json!(1)).await).await;
}

fn command(program: &Path) -> String {
    format!("[worker.commands.run]\nargv = [{:?}]\n", program.to_str().unwrap())
}

fn configured<'a>(warren: &'a Warren, file: &str, toml: &str) -> Service<'a> {
    warren.worker().arg("--config").arg(warren.file(file, toml))
}

/// Written in one go by a process that holds it open no longer.
fn script(path: &Path, mode: u32) {
    let written = path.with_extension("new");
    fs::write(&written, "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(&written, Permissions::from_mode(mode)).unwrap();
    fs::rename(written, path).unwrap();
}

async fn unhealthy(worker: &mut Process, code: &str) {
    worker.logged(&format!(r#""problem":"{code}""#)).await;
}

async fn healthy(worker: &mut Process) {
    worker.logged("healthy again").within(PATIENCE, "the worker recovers").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_slots_than_open_files_allow_cost_no_task() {
    let warren = Warren::new().await;
    let toml = "[worker.commands.nap]\nargv = [\"sleep\", \"0.1\"]\n";
    let worker =
        configured(&warren, "config.toml", toml).set("worker.concurrency", 200).files_open(64);
    let (mut worker, producer) = tokio::join!(worker.start(), warren.producer());
    let mut handles = vec![];
    for _ in 0..300 {
        handles.push(submit(&producer, "nap", json!({})).await);
    }
    for handle in handles {
        succeeds(handle).await;
    }
    unhealthy(&mut worker, "out_of_resources").await;
    echoes(&producer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_without_free_files_waits_and_recovers() {
    let warren = Warren::new().await;
    let file = warren.file("text", "abc");
    let worker = configured(&warren, "config.toml", &command(Path::new("/bin/true")));
    let worker = worker.set("worker.file_root", warren.path("").display());
    let (mut worker, producer) = tokio::join!(worker.start(), warren.producer());
    worker.open_files_at_most("3");
    let digest = submit(&producer, "file.sha256", json!({ "path": file })).await;
    unhealthy(&mut worker, "out_of_resources").await;
    let run = submit(&producer, "run", json!({})).await;
    let mut suspect = message("garenne.echo", "suspect", &json!(2));
    mark_returned(&mut suspect);
    let amqp = warren.amqp().await;
    let mut results = amqp.results().await;
    amqp.task(suspect).await;
    worker.open_files_at_most("1024");
    for handle in [digest, run] {
        succeeds(handle).await;
    }
    let mut ended = vec![];
    while ended.len() < 3 {
        ended.push(results.result().within(PATIENCE, "the suspect ends").await);
    }
    assert!(ended.iter().all(|it| (it.status, it.attempt) == (Status::Succeeded, 1)), "{ended:?}");
    healthy(&mut worker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_in_a_worker_without_free_files_runs_elsewhere() {
    let warren = Warren::new().await;
    let file = warren.file("text", "abc");
    let worker = || warren.worker().set("worker.file_root", warren.path("").display());
    let sick = worker().set("worker.concurrency", 1).set("worker.prefetch", 101);
    let (mut sick, producer) = tokio::join!(sick.start(), warren.producer());
    sick.open_files_at_most("3");
    let mut handles = vec![];
    for _ in 0..20 {
        handles.push(submit(&producer, "file.sha256", json!({ "path": file })).await);
    }
    unhealthy(&mut sick, "out_of_resources").await;
    let amqp = warren.amqp().await;
    soon("the sick worker holds them all", async || (amqp.waiting().await == 0).then_some(()))
        .await;
    let _able = worker().start().await;
    for handle in handles {
        succeeds(handle).await;
    }
    assert!(!sick.stderr().contains("healthy again"), "it is as sick as before");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_one_worker_lacks_runs_at_another() {
    let warren = Warren::new().await;
    let toml = command(&warren.path("nowhere"));
    let mut lacking = configured(&warren, "lacking.toml", &toml).start().await;
    let producer = warren.producer().await;
    let mut handles = vec![];
    for _ in 0..20 {
        handles.push(submit(&producer, "run", json!({})).await);
    }
    unhealthy(&mut lacking, "command_unusable").await;
    // What it can run it goes on running.
    echoes(&producer).await;
    script(&warren.path("program"), 0o755);
    let toml = command(&warren.path("program"));
    let _able = configured(&warren, "able.toml", &toml).start().await;
    for handle in handles {
        assert_eq!(succeeds(handle).await.output.unwrap().to_json_value(), "ran");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_appears_is_found() {
    let warren = Warren::new().await;
    let program = warren.path("program");
    let (mut worker, producer) = tokio::join!(
        configured(&warren, "config.toml", &command(&program)).start(),
        warren.producer()
    );
    let mut heartbeats = warren.amqp().await.heartbeats().await;
    let run = submit(&producer, "run", json!({})).await;
    unhealthy(&mut worker, "command_unusable").await;
    while !String::from_utf8_lossy(&heartbeats.next().await.body).contains("command_unusable") {}
    script(&program, 0o755);
    succeeds(run).await;
    healthy(&mut worker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_may_not_be_executed_or_is_being_written_waits() {
    let warren = Warren::new().await;
    for (name, mode) in [("forbidden", 0o644), ("busy", 0o755)] {
        let program = warren.path(name);
        // Not a script: that its interpreter could read.
        fs::copy("/bin/true", &program).unwrap();
        fs::set_permissions(&program, Permissions::from_mode(mode)).unwrap();
        let writer = (name == "busy").then(|| File::options().append(true).open(&program).unwrap());
        let worker = configured(&warren, &format!("{name}.toml"), &command(&program));
        let (mut worker, producer) = tokio::join!(worker.start(), warren.producer());
        let run = submit(&producer, "run", json!({})).await;
        unhealthy(&mut worker, "command_unusable").await;
        drop(writer);
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        succeeds(run).await;
        healthy(&mut worker).await;
        worker.kill().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_directory_is_the_worker_s_and_a_program_named_by_a_task_is_the_task_s() {
    let warren = Warren::new().await;
    let directory = warren.path("directory");
    let toml = format!(
        "[worker.commands.run]\nargv = [\"true\"]\ndirectory = {directory:?}\n\
         [worker.commands.any]\nargv = [\"{{program}}\"]\n"
    );
    let worker = configured(&warren, "config.toml", &toml);
    let (mut worker, producer) = tokio::join!(worker.start(), warren.producer());
    let named = submit(&producer, "any", json!({ "program": "/nowhere/at/all" })).await;
    let failed = named.result().soon("it ends").await.unwrap();
    assert_eq!((failed.status, failed.attempt), (Status::Failed, 1), "{failed:?}");
    let run = submit(&producer, "run", json!({})).await;
    unhealthy(&mut worker, "command_unusable").await;
    fs::create_dir(&directory).unwrap();
    succeeds(run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn child_processes_that_do_not_start_cost_a_suspect_nothing() {
    let warren = Warren::new().await;
    let mut worker = configured(&warren, "config.toml", "").start().await;
    let amqp = warren.amqp().await;
    let mut results = amqp.results().await;
    // A child reads it again.
    warren.file("config.toml", "no configuration");
    let mut suspect = message("garenne.echo", "suspect", &json!(2));
    mark_returned(&mut suspect);
    amqp.task(suspect).await;
    unhealthy(&mut worker, "isolation_unavailable").await;
    amqp.task(message("garenne.echo", "other", &json!(1))).await;
    assert_eq!(results.result().soon("others go on").await.id.as_str(), "other");
    warren.file("config.toml", "");
    let result = results.result().within(PATIENCE, "it ends").await;
    assert_eq!(result.id.as_str(), "suspect");
    assert_eq!((result.status, result.attempt), (Status::Succeeded, 1), "{result:?}");
    healthy(&mut worker).await;
}
