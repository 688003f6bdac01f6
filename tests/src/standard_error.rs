//! A standard error that is full, closed or never read costs log lines and nothing else; a standard output
//! that takes nothing costs what would have been printed.

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Write};
use std::process::Stdio;
use std::time::Duration;

use garenne_common::{DeadReason, QueueName};
use garenne_producer::{NoticeFilter, Submission};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::process::{Child, Command};

use crate::harness::{Service, Soon, Warren, soon};

/// More than a stopping process waits for the broker and for standard error together.
const PROMPT: Duration = Duration::from_secs(20);

/// What the smallest pipe holds.
const PAGE: usize = 4_096;

/// What nothing can be written to.
fn full() -> Stdio {
    File::options().write(true).open("/dev/full").unwrap().into()
}

/// What nobody reads any more.
fn broken_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// What nobody reads yet; it holds one page.
fn unread() -> (PipeReader, PipeWriter) {
    let (reader, writer) = std::io::pipe().unwrap();
    let size = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(PAGE.try_into().unwrap())).unwrap();
    assert_eq!(usize::try_from(size).unwrap(), PAGE);
    (reader, writer)
}

fn start(service: Service<'_>, standard_error: Stdio) -> Child {
    let mut command = Command::from(service.set("log.filter", "trace").into_command());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(standard_error);
    command.kill_on_drop(true).spawn().unwrap()
}

/// Started by a shell that closes its standard error first.
fn start_closed(service: Service<'_>) -> Child {
    let inner = service.into_command();
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg("exec \"$0\" \"$@\" 2>&-").arg(inner.get_program());
    command.args(inner.get_args()).env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.kill_on_drop(true).spawn().unwrap()
}

async fn terminate(mut child: Child) {
    let id = Pid::from_raw(child.id().expect("it runs").try_into().unwrap());
    kill(id, Signal::SIGTERM).unwrap();
    let status = child.wait().within(PROMPT, "it drains").await.unwrap();
    assert_eq!(status.code(), Some(0), "{status:?}");
}

/// Waits until worker and collector are at work, which no log line tells.
async fn started(warren: &Warren) {
    let (amqp, topology) = (warren.amqp().await, warren.config().broker.topology());
    let queue = topology.task_queue(&QueueName::default());
    soon("the worker is there", async || amqp.admin.depth(&queue).await.unwrap()).await;
    let store = warren.path("store.sqlite3");
    soon("the store is there", async || store.exists().then_some(())).await;
}

/// Has tasks run, some of which fail or panic, and their results stored.
async fn work(warren: &Warren, count: usize) {
    let producer = warren.producer().await;
    let echo = |n| Submission::dynamic("garenne.echo", json!(n)).unwrap();
    let fail = |args: Value| Submission::dynamic("garenne.fail", args).unwrap().retries(0);
    let mut all: Vec<_> = (0..count).map(echo).collect();
    all.extend([fail(json!({ "panic": true })), fail(json!({ "fatal": true }))]);
    let mut handles = vec![];
    for submission in all {
        handles.push(producer.submit(submission).await.unwrap());
    }
    for handle in handles {
        handle.result().soon("every task ends").await.unwrap();
    }
    soon("every result is stored", async || {
        let stored = warren.rows::<u32>("SELECT COUNT(*) FROM results")[0] as usize;
        (stored >= count + 2).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_work_and_stop_in_order_without_a_standard_error() {
    type Start = fn(Service<'_>) -> Child;
    let ways: [Start; 3] =
        [|service| start(service, full()), |service| start(service, broken_pipe()), start_closed];
    for way in ways {
        let warren = Warren::new().await;
        let (collector, worker) = (way(warren.collector()), way(warren.worker()));
        started(&warren).await;
        work(&warren, 5).await;
        terminate(worker).await;
        terminate(collector).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standard_error_that_nobody_reads_blocks_nothing() {
    let warren = Warren::new().await;
    let (from_collector, to) = unread();
    let collector = start(warren.collector(), to.into());
    let (from_worker, to) = unread();
    let worker = start(warren.worker(), to.into());
    started(&warren).await;
    // Enough for more lines than wait for a reader.
    work(&warren, 1_000).await;
    // Once somebody reads, they hear how many lines were lost.
    let heard = tokio::task::spawn_blocking(move || lost(from_worker));
    let lost = heard.soon("the loss is told of").await.unwrap();
    assert!(lost > 0);
    terminate(worker).await;
    // This one stops although nobody ever reads.
    terminate(collector).await;
    drop(from_collector);
}

/// How many lines a service says it has lost; the rest is read and forgotten.
fn lost(from: PipeReader) -> u64 {
    let mut lines = BufReader::new(from).lines().map(Result::unwrap);
    let found = lines.find_map(|line| {
        let line: Value = serde_json::from_str(&line).expect("every line is whole");
        line["lost"].as_u64()
    });
    // Read on, so that the worker is not blocked at its end.
    std::thread::spawn(move || lines.for_each(drop));
    found.expect("it says so before it ends")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_cannot_start_ends_although_nobody_reads_why() {
    let warren = Warren::new().await;
    for service in [warren.worker(), warren.collector()] {
        let url = "amqp://guest:wrong@nowhere.invalid/no-such-vhost";
        let refused = service.url(url).set("broker.heartbeat", "0s");
        let mut command = Command::from(refused.into_command());
        // The pipe is full before it writes anything.
        let (_reader, mut writer) = unread();
        writer.write_all(&[b'.'; PAGE]).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer);
        let status = command.kill_on_drop(true).status().within(PROMPT, "it ends").await.unwrap();
        assert_eq!(status.code(), Some(2));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_do_their_work_without_a_standard_error() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    for standard_error in [full, broken_pipe] {
        for (arguments, code) in [
            (&["-vvv", "submit", "garenne.echo", "1", "--wait"][..], 0),
            (&["-vvv", "submit", "garenne.fail", "{\"fatal\":true}", "--wait"], 1),
            (&["submit", "garenne.echo", "{"], 2),
            (&["submit", "garenne.echo", "1", "--nonsense"], 2),
        ] {
            let mut command = Command::from(warren.command("garenne"));
            command.args(arguments).stdin(Stdio::null()).stderr(standard_error());
            command.stdout(Stdio::piped()).kill_on_drop(true);
            let ended = command
                .spawn()
                .unwrap()
                .wait_with_output()
                .within(PROMPT, "it ends")
                .await
                .unwrap();
            assert_eq!(ended.status.code(), Some(code), "{arguments:?}: {ended:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_standard_output_is_an_error_and_no_crash() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let input = warren.file("input", "1\n2\n");
    for arguments in [
        &["map", "garenne.echo", input.to_str().unwrap()][..],
        &["submit", "garenne.echo", "1", "--wait"],
        &["doctor"],
    ] {
        let mut command = Command::from(warren.command("garenne"));
        command.args(arguments).stdin(Stdio::null()).stdout(full());
        command.stderr(Stdio::piped()).kill_on_drop(true);
        let ended =
            command.spawn().unwrap().wait_with_output().within(PROMPT, "it ends").await.unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains("standard output") && !said.contains("panic"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standard_output_that_nobody_reads_stops_no_worker() {
    let warren = Warren::new().await;
    let (_reader, mut writer) = unread();
    writer.write_all(&[b'.'; PAGE]).unwrap();
    let concurrency = 64;
    let service = warren.worker().set("worker.concurrency", concurrency);
    let mut command = Command::from(service.into_command());
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::null());
    let worker = command.kill_on_drop(true).spawn().unwrap();
    let _collector = warren.collector().start().await;
    started(&warren).await;
    let producer = warren.producer().await;
    // More than the worker has threads.
    let announce = || {
        let task = Submission::dynamic("garenne.announce", json!({ "task": 1 })).unwrap();
        task.retries(0).timeout(Duration::from_millis(500))
    };
    let mut handles = vec![];
    for _ in 0..concurrency {
        handles.push(producer.submit(announce()).await.unwrap());
    }
    for handle in handles {
        let result = handle.result().soon("its time limit ends it").await.unwrap();
        assert_eq!(result.reason, Some(DeadReason::TimedOut), "{result:?}");
    }
    work(&warren, 5).await;
    terminate(worker).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_of_printed_notices_that_reads_none_keeps_them_from_nobody() {
    let warren = Warren::new().await;
    let (_reader, mut writer) = unread();
    writer.write_all(&[b'.'; PAGE]).unwrap();
    let mut command = Command::from(warren.collector().arg("--notify-stdout").into_command());
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::null());
    let collector = command.kill_on_drop(true).spawn().unwrap();
    let _worker = warren.worker().start().await;
    started(&warren).await;
    let producer = warren.producer().await;
    let mut notices = producer.notices(NoticeFilter::All).await.unwrap();
    // More than wait for the reader.
    let count = 1_500;
    let tasks = (0..count).map(|n| Submission::dynamic("garenne.echo", json!(n)).unwrap());
    for submitted in producer.submit_many_detached(tasks).await {
        submitted.unwrap();
    }
    for _ in 0..count {
        notices.next().within(PROMPT * 2, "everybody else hears of every task").await.unwrap();
    }
    terminate(collector).await;
}
