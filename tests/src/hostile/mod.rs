//! Hostile input by the hundred among sound tasks: every message ends in its place with a reason, no
//! process ends, memory stays bounded. The kinds are in `kinds.rs`.

mod kinds;

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use self::kinds::{End, SentMessage, make, sound};
use crate::harness::{Foreign, Process, SOON, Warren, eventually};

/// What the foreign client publishes in one go.
const AT_ONCE: usize = 200;
/// What worker and collector may grow to, each. They start at some 25 MiB; no message here is larger
/// than 0.6 MiB, and the prefetch holds a few of them.
const MOST_KIB: u64 = 96 * 1024;
/// How long the last message may take once all are published.
const PATIENCE: Duration = Duration::from_mins(4);

/// How a run went.
#[derive(Debug)]
#[cfg_attr(not(feature = "soak"), expect(dead_code, reason = "shown when a test fails"))]
pub(crate) struct Figures {
    pub(crate) runs: usize,
    pub(crate) dead: usize,
    pub(crate) publishing: Duration,
    /// After the last publish.
    pub(crate) rest: Duration,
    pub(crate) worker_kib: u64,
    pub(crate) collector_kib: u64,
}

fn seed() -> u64 {
    let given = std::env::var("GARENNE_HOSTILE_SEED").ok();
    given.and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// So many messages, every fourth a sound one.
fn messages(warren: &Warren, count: usize) -> Vec<SentMessage> {
    let topology = warren.config().broker.topology();
    let one = |number| match number % 4 {
        0 => sound(number, &topology),
        _ => make(number, &topology, seed()),
    };
    (0..count).map(one).collect()
}

/// How far a process has grown at most, in KiB.
fn high_water(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().split(' ').next().unwrap().parse().unwrap()
}

/// The dead letters in the store by the number in their header `c`: reason and error.
fn letters(warren: &Warren) -> HashMap<usize, (String, String)> {
    let rows: Vec<String> =
        warren.rows("SELECT json_array(reason, error, json(envelope)) FROM dead_letters");
    let letters = rows.iter().filter_map(|row| {
        let row: Value = serde_json::from_str(row).unwrap();
        let mut headers = row[2]["headers"].as_array()?.iter();
        let number = headers.find(|header| header[0] == "c")?[1]["int"].as_u64()?;
        let text = |place: usize| row[place].as_str().unwrap_or_default().to_owned();
        Some((usize::try_from(number).unwrap(), (text(0), text(1))))
    });
    letters.collect()
}

/// What is not yet, or not at all, where it must be.
fn wrong(warren: &Warren, sent: &[SentMessage]) -> Vec<String> {
    let letters = letters(warren);
    let right = |end, letter: Option<&(String, String)>| match (end, letter) {
        (End::Runs, None) => true,
        (End::Dead(reason, words), Some((code, error))) => {
            code == reason.as_str() && error.contains(words)
        }
        (End::Runs, Some(_)) | (End::Dead(..), None) => false,
    };
    let all = sent.iter().enumerate().map(|(number, sent)| (number, sent, letters.get(&number)));
    let wrong = all.filter(|(_, sent, letter)| !right(sent.end, *letter));
    let line = |(number, sent, letter): (usize, &SentMessage, Option<&(String, String)>)| {
        format!("{number}, {}: {:?}, but {letter:?}", sent.kind, sent.end)
    };
    wrong.map(line).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_strangers_send_ends_in_its_place_and_stops_nobody() {
    let figures = run(384).await;
    assert!(figures.dead >= 200, "{figures:?}");
}

/// Sends so many messages and checks where each one ends.
pub(crate) async fn run(count: usize) -> Figures {
    let warren = Warren::new().await;
    let mut worker = warren.worker().set("log.format", "human").spawn();
    worker.logged("ready").await;
    let mut collector = warren.collector().start().await;
    let sent = messages(&warren, count);
    let begun = Instant::now();
    for part in sent.chunks(AT_ONCE) {
        let orders = part.iter().map(SentMessage::order).collect();
        Foreign::new(warren.url()).publish(orders, 0).await;
    }
    let (publishing, published) = (begun.elapsed(), Instant::now());
    let runs = sent.iter().filter(|sent| sent.end == End::Runs).count();
    let dead = sent.len() - runs;
    all_end(&warren, &sent, runs, published).await;
    let rest = published.elapsed();

    assert_eq!(warren.amqp().await.unreadable().await, 0);
    let [worker_kib, collector_kib] = [high_water(&worker), high_water(&collector)];
    let figures = Figures { runs, dead, publishing, rest, worker_kib, collector_kib };
    assert!(worker_kib.max(collector_kib) <= MOST_KIB, "{figures:?}");
    // Both were at work all the time, and stop in order.
    assert!(worker.terminate(SOON).await.success());
    assert!(collector.terminate(SOON).await.success());
    let log = worker.stderr();
    assert!(!log.contains(['\u{1b}', '\u{7}', '\u{9b}']), "a log commands a terminal");
    figures
}

async fn all_end(warren: &Warren, sent: &[SentMessage], runs: usize, since: Instant) {
    let what = format!("{runs} of {} run, the rest are dead letters", sent.len());
    eventually(PATIENCE, &what, async || {
        let succeeded = "SELECT COUNT(*) FROM results WHERE status = 'succeeded'";
        let succeeded = usize::try_from(warren.rows::<i64>(succeeded)[0]).unwrap();
        let wrong = wrong(warren, sent);
        // A failure names the messages.
        let late = since.elapsed() > PATIENCE / 2;
        let list =
            || format!("seed {}, {} of {}:\n{}", seed(), wrong.len(), sent.len(), wrong.join("\n"));
        assert!(!late || wrong.is_empty(), "{}", list());
        (succeeded == runs && wrong.is_empty()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_word_of_a_stranger_commands_a_terminal() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let topology = warren.config().broker.topology();
    let evil = "\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}8m\u{202e}";
    let letter = json!({ "exchange": topology.dead(), "key": "",
        "properties": { "type": format!("a{evil}"), "message_id": "evil" }, "body": "{}",
        "headers": { "x-garenne-dead-reason": "fatal", "x-garenne-dead-error": evil,
                     "x-garenne-dead-by": evil, "x-garenne-dead-queue": evil } });
    Foreign::new(warren.url()).publish(json!([letter]), 0).await;
    eventually(PATIENCE, "the letter is stored", async || {
        (warren.rows::<i64>("SELECT COUNT(*) FROM dead_letters")[0] == 1).then_some(())
    })
    .await;
    let commands: [&[&str]; 4] = [
        &["dead", "list"],
        &["dead", "show", "evil"],
        &["dead", "show", "evil", "--output", "json"],
        &["task", "show", "evil"],
    ];
    for command in commands {
        let done = warren.garenne(command).await;
        let shown = done.stdout + &done.stderr;
        let obeyed = shown.contains(['\u{1b}', '\u{7}', '\u{9b}', '\u{202e}']);
        assert!(!obeyed && !shown.is_empty(), "{command:?}: {shown:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_unreadable_messages_are_put_aside_at_once() {
    let warren = Warren::new().await;
    let (mut worker, _collector) = warren.crew().await;
    let topology = warren.config().broker.topology();
    let message = |number: usize| {
        let mut properties = json!({ "type": "garenne.echo", "message_id": format!("m-{number}") });
        let unreadable = number % 11 == 5;
        if unreadable {
            properties.as_object_mut().unwrap().remove("type");
        }
        let mut message = json!({ "exchange": topology.tasks_exchange(), "key": "default",
            "properties": properties, "body": "1" });
        if unreadable {
            message["property_bytes"] = json!({ "type": "fffe41" });
        }
        message
    };
    let messages: Vec<_> = (0..110).map(message).collect();
    Foreign::new(warren.url()).publish(json!(messages), 0).await;
    let count = |query: &str| warren.rows::<i64>(query)[0];
    // Without their screening each of them ends a connection, for minutes.
    eventually(PATIENCE / 2, "a hundred run, ten are dead letters", async || {
        let succeeded = count("SELECT COUNT(*) FROM results WHERE status = 'succeeded'");
        let dead = count("SELECT COUNT(*) FROM dead_letters WHERE reason = 'malformed'");
        (succeeded == 100 && dead == 10).then_some(())
    })
    .await;
    assert_eq!(warren.amqp().await.unreadable().await, 0);
    // Nothing was delivered twice: no connection ended over them.
    assert_eq!(count("SELECT COUNT(*) FROM results WHERE redelivered"), 0);
    assert!(worker.terminate(SOON).await.success());
}
