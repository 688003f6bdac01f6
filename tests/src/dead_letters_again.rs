//! What people do with dead letters, by the command line and the library: find, replay, purge, export
//! (promises 2 and 3). A letter is either as it was or wholly dealt with, whatever is killed.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures_util::TryStreamExt;
use garenne_common::wire::{
    DeadFilter, DeadLetter, HeaderValue, Message, Query, ReplayItem, ReplayOutcome, ReplayPlan,
    TaskState, replay,
};
use garenne_common::{DeadReason, QueueName, Status, TaskId, Timestamp};
use garenne_producer::{Producer, QueryError};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Amqp, Warren, eventually, message, soon};

/// Room for a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(90);

fn id(text: &str) -> TaskId {
    TaskId::new(text).unwrap()
}

/// A letter as a worker writes it.
fn letter(task: &str, name: &str, reason: DeadReason, body: &Value) -> DeadLetter {
    DeadLetter::new(&message(name, task, body), "default", reason, "asked to fail", "w:1")
}

/// Hands letters to the collector the way workers do, and waits until it has them all.
async fn bury(warren: &Warren, amqp: &Amqp, letters: &[DeadLetter]) {
    let dead = warren.config().broker.topology().dead();
    for letter in letters {
        amqp.publish(&dead, "", letter.encode()).await;
    }
    let producer = warren.producer().await;
    eventually(PATIENCE, "the collector has all letters", async || {
        let buried = producer.totals().await.ok()?.dead;
        (buried >= letters.len() as u64).then_some(())
    })
    .await;
    producer.close().await;
}

async fn finished(producer: &Producer, task: &TaskId) -> garenne_common::TaskResult {
    soon("the task has ended", async || match producer.task_state(task).await.unwrap() {
        TaskState::Finished { result } => Some(result),
        TaskState::Retrying { .. } | TaskState::Parked { .. } | TaskState::Unknown => None,
    })
    .await
}

/// The ids in a JSON list.
fn listed(list: &str) -> String {
    let letters: Vec<Value> = serde_json::from_str(list).unwrap();
    let ids = letters.iter().map(|letter| letter["id"].as_str().unwrap());
    ids.collect::<Vec<_>>().join(" ")
}

async fn list(warren: &Warren, filter: &[&str]) -> String {
    let mut command = vec!["dead", "list", "--output", "json"];
    command.extend(filter);
    listed(&warren.garenne(&command).await.ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_filter_finds_what_it_names() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let now = Timestamp::now().as_millis();
    let ago = |hours: u64| Timestamp::from_millis(now - hours * 3_600_000);
    let mut letters = [
        letter("a", "mail.send", DeadReason::Fatal, &json!(1)),
        letter("b", "mail.fetch", DeadReason::TimedOut, &json!(2)),
        letter("c", "image.scale", DeadReason::Fatal, &json!(3)),
        letter("d", "image.scale", DeadReason::Malformed, &json!(4)),
    ];
    for (hours, letter) in letters.iter_mut().rev().enumerate() {
        letter.at = ago(hours as u64);
    }
    letters[1].queue = "cpu".to_owned();
    letters[2].error = "Connection REFUSED by peer".to_owned();
    letters[3].message.set_header("x-garenne-batch", HeaderValue::Text("b-1".to_owned()));
    bury(&warren, &amqp, &letters).await;
    let moment = ago(2).plus(Duration::from_mins(30)).to_string();
    let cases: [(&[&str], &str); 13] = [
        (&[], "d c b a"),
        (&["--limit", "1"], "d"),
        (&["--task", "image.scale"], "d c"),
        (&["--task", "mail.*"], "b a"),
        (&["--queue", "cpu"], "b"),
        (&["--reason", "fatal"], "c a"),
        (&["--reason", "fatal,timed_out"], "c b a"),
        (&["--since", "150m"], "d c b"),
        (&["--until", &moment], "b a"),
        (&["--error", "connection refused"], "c"),
        (&["--batch", "b-1"], "d"),
        (&["--late"], ""),
        (&["a", "d", "nothing", "--reason", "fatal"], "a"),
    ];
    for (filter, expected) in cases {
        assert_eq!(list(&warren, filter).await, expected, "{filter:?}");
    }
    let text = warren.garenne(&["dead", "list", "--limit", "3"]).await;
    assert!(text.stderr.contains("the newest 3 of 4 dead letters"), "{text:#?}");

    let producer = warren.producer().await;
    let filter = DeadFilter { name: Some("mail.*".to_owned()), ..DeadFilter::default() };
    let found: Vec<_> = producer.dead_letters(filter).try_collect().await.unwrap();
    assert_eq!(found.iter().map(|letter| letter.id.as_str()).collect::<Vec<_>>(), ["b", "a"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_task_is_looked_at_mended_and_sent_again() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let mut task = message("text.count_words", "old", &json!({ "txt": "a b" }));
    task.set_header("x-garenne-batch", HeaderValue::Text("b-1".to_owned()));
    task.set_header("x-mine", HeaderValue::Int(7));
    amqp.task(task).await;
    assert_eq!(finished(&producer, &id("old")).await.status, Status::Failed);
    let shown = warren.garenne(&["dead", "show", "old"]).await.ok();
    for part in ["malformed", "x-mine = 7", "b-1", r#""txt":"a b""#, "dead replay old --args"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }

    let args = r#"{"text": "a b c"}"#;
    let command = ["dead", "replay", "old", "--args", args, "--output", "json"];
    let looked = warren.garenne(&[&command[..], &["--dry-run"]].concat()).await.ok();
    assert!(looked.contains("\"replayed\""), "{looked}");
    assert_eq!(list(&warren, &[]).await, "old", "a dry run changes nothing");
    let replayed = warren.garenne(&command).await.json();
    let new = id(replayed["new_id"].as_str().unwrap());
    let result = finished(&producer, &new).await;
    assert_eq!((result.status, result.attempt, result.batch), (Status::Succeeded, 1, None));
    assert_eq!(result.output.unwrap().to_json_value()["words"], 3);

    // The old task has ended and stays so; its batch has counted it and does not count its successor.
    assert_eq!(finished(&producer, &id("old")).await.status, Status::Failed);
    let batch = producer.batch_status(&garenne_common::BatchId::new("b-1").unwrap()).await.unwrap();
    assert_eq!((batch.as_ref().unwrap().summary.failed, batch.unwrap().summary.succeeded), (1, 0));
    let old = warren.garenne(&["task", "show", "old"]).await.ok();
    assert!(old.contains(&format!("replayed as {new}")), "{old}");
    let successor = warren.garenne(&["task", "show", new.as_str(), "-o", "json"]).await.json();
    assert_eq!(successor["replay_of"], "old");
    assert_eq!(list(&warren, &[]).await, "");
    assert_eq!(list(&warren, &["--replayed"]).await, "old");
    let again = warren.garenne(&["dead", "replay", "old"]).await.ok();
    assert!(again.contains(&format!("was replayed before, as {new}")), "{again}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_are_replayed_only_on_purpose() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let letters: Vec<_> = (0..5)
        .map(|n| letter(&format!("l-{n}"), "garenne.echo", DeadReason::Fatal, &json!(n)))
        .collect();
    bury(&warren, &amqp, &letters).await;
    let refused = warren.garenne(&["dead", "replay"]).await;
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(refused.stderr.contains("--all"), "{refused:#?}");
    for verb in ["replay", "purge"] {
        let refused = warren.garenne(&["dead", verb, "--reason", "fatal"]).await;
        assert_eq!(refused.code, Some(2), "{refused:#?}");
        assert!(refused.stderr.contains("5 dead letters") && refused.stderr.contains("--yes"));
    }
    let dry = warren.garenne(&["dead", "replay", "--all", "--dry-run"]).await;
    assert!(dry.stderr.contains("would replay 5 dead letters"), "{dry:#?}");
    let dry = warren.garenne(&["dead", "purge", "--all", "--dry-run"]).await;
    assert!(dry.stdout.contains("5 dead letters would be deleted"), "{dry:#?}");
    assert_eq!(amqp.waiting().await, 0);
    assert_eq!(list(&warren, &[]).await, "l-4 l-3 l-2 l-1 l-0");
    let some = warren.garenne(&["dead", "replay", "--all", "--limit", "2", "--yes"]).await;
    assert_eq!(some.stdout.lines().count(), 2, "{some:#?}");
    assert_eq!(list(&warren, &[]).await, "l-2 l-1 l-0");
    // Named one by one, they need no --yes.
    let named = warren.garenne(&["dead", "replay", "l-0", "l-1", "nothing"]).await;
    assert_eq!(named.code, Some(3), "{named:#?}");
    assert!(named.stdout.contains("nothing is not among the dead letters"), "{named:#?}");
    assert_eq!(list(&warren, &[]).await, "l-2");
    let none = warren.garenne(&["dead", "replay", "--task", "no.such", "--yes"]).await;
    assert_eq!((none.code, none.stdout.as_str()), (Some(0), ""), "{none:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_replays_ends_at_the_limit() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    amqp.task(message("garenne.fail", "t-0", &json!({ "fatal": true }))).await;
    let mut last = id("t-0");
    for round in 1..=3 {
        finished(&producer, &last).await;
        let replayed = warren.garenne(&["dead", "replay", last.as_str(), "-o", "json"]).await;
        last = id(replayed.json()["new_id"].as_str().unwrap());
        finished(&producer, &last).await;
        let letter = producer.dead(&last).await.unwrap().unwrap();
        assert_eq!(letter.replays, round);
    }
    let refused = warren.garenne(&["dead", "replay", last.as_str()]).await;
    assert_eq!(refused.code, Some(1), "{refused:#?}");
    assert!(refused.stdout.contains("replayed 3 times already"), "{refused:#?}");
    assert_eq!(list(&warren, &[]).await, last.as_str());
    warren.garenne(&["dead", "replay", last.as_str(), "--force"]).await.ok();
    assert!(producer.dead(&last).await.unwrap().unwrap().replayed_as.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_task_is_sent_again_as_itself() {
    let warren = Warren::new().await;
    // No worker yet: it would bring the task back without being asked.
    let _collector = warren.collector().start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let mut parked = letter("t-1", "garenne.echo", DeadReason::UnknownTask, &json!("here"));
    parked.message.set_header("x-garenne-batch", HeaderValue::Text("b-1".to_owned()));
    bury(&warren, &amqp, &[parked]).await;
    let replayed = warren.garenne(&["dead", "replay", "t-1", "-o", "json"]).await.json();
    assert_eq!(replayed["new_id"], "t-1");
    let _worker = warren.worker().start().await;
    let result = finished(&producer, &id("t-1")).await;
    assert_eq!(result.status, Status::Succeeded);
    assert_eq!(result.batch.unwrap().as_str(), "b-1");
    assert_eq!(list(&warren, &[]).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_that_cannot_be_made_is_refused_in_words() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let mut bincode = letter("bincode", "garenne.echo", DeadReason::Fatal, &json!(1));
    bincode.message.properties.content_type = Some("application/x-bincode".to_owned());
    let mut nowhere = letter("nowhere", "garenne.echo", DeadReason::Unrouted, &json!(1));
    nowhere.queue = "no such queue\n".to_owned();
    let number = letter("number", "garenne.echo", DeadReason::Fatal, &json!(1));
    bury(&warren, &amqp, &[bincode, nowhere, number]).await;
    let cases: [(&[&str], i32, &str); 9] = [
        (&["bincode", "--args", "1"], 1, "only JSON can be edited"),
        (&["nowhere"], 1, "--to-queue"),
        (&["number", "--set", "a=1"], 1, "not a JSON object"),
        (&["number", "--set", "a=text"], 2, "'a=\"text\"'"),
        (&["number", "--args", "{"], 2, "not JSON"),
        (&["number", "--args", "@/nowhere/at/all"], 2, "/nowhere/at/all"),
        (&["number", "--to-queue", "no-such-queue"], 2, "no-such-queue does not exist"),
        (&["--reason", "timeout"], 2, "timed_out"),
        (&["--all", "--since", "yesterday"], 2, "2026-11-23T09:00:00Z"),
    ];
    for (arguments, code, words) in cases {
        let ended = warren.garenne(&[&["dead", "replay"], arguments].concat()).await;
        assert_eq!(ended.code, Some(code), "{arguments:?}: {ended:#?}");
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(said.contains(words), "{arguments:?}: {ended:#?}");
    }
    assert_eq!(amqp.waiting().await, 0);
    warren.garenne(&["dead", "replay", "nowhere", "--to-queue", "default"]).await.ok();
    soon("it is in the queue", async || (amqp.waiting().await == 1).then_some(())).await;

    let producer = warren.producer().await;
    let item = ReplayItem { id: id("number"), new_id: None };
    let query = Query::DeadReplay { letters: vec![item; 1_001], plan: ReplayPlan::default() };
    let refused = producer.query(query).await;
    assert!(matches!(refused, Err(QueryError::Refused(_))), "{refused:?}");
    let queue = Some(QueueName::new("no-such-queue").unwrap());
    let plan = ReplayPlan { queue, ..ReplayPlan::default() };
    let unknown = producer.replay(&[id("number")], &plan).await;
    assert!(matches!(unknown, Err(QueryError::UnknownQueue { .. })), "{unknown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_collector_replays_every_letter_once() {
    const LETTERS: usize = 1_000;
    let warren = Warren::new().await;
    let mut collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let letters: Vec<_> = (0..LETTERS)
        .map(|n| letter(&format!("l-{n}"), "garenne.echo", DeadReason::Fatal, &json!(n)))
        .collect();
    bury(&warren, &amqp, &letters).await;
    // Nobody serves the queue: what arrives there can be counted.
    let mut command = warren.start_garenne(&[
        "dead",
        "replay",
        "--all",
        "--yes",
        "--rate",
        "500",
        "--deadline",
        "60s",
    ]);
    for printed in [150, 400, 650, 900] {
        eventually(PATIENCE, "the replay goes on", async || {
            (command.stdout().lines().count() >= printed).then_some(())
        })
        .await;
        collector.kill().await;
        collector = warren.collector().start().await;
    }
    assert!(command.ended(PATIENCE).await.success(), "{}", command.stderr());

    let queue = warren.config().broker.topology().task_queue(&QueueName::default());
    eventually(PATIENCE, "the outbox is empty", async || {
        warren.rows::<i64>("SELECT COUNT(*) FROM resends").iter().all(|n| *n == 0).then_some(())
    })
    .await;
    let mut tap = amqp.tap(&queue).await;
    let (mut successors, mut copies) = (HashMap::<TaskId, HashSet<String>>::new(), 0);
    while successors.len() < LETTERS {
        let Message { properties, headers, body } = tap.next().await;
        let new = properties.message_id.clone().unwrap();
        let message = Message { properties, headers, body };
        let old = replay::replay_of(&message).unwrap();
        let news = successors.entry(old).or_default();
        if !news.insert(new) {
            copies += 1;
        }
    }
    // One successor each, however often it was published; and exactly what the command printed.
    assert!(successors.values().all(|news| news.len() == 1), "{successors:?}");
    let printed: HashSet<(TaskId, String)> = command
        .stdout()
        .lines()
        .map(|line| {
            let words: Vec<_> = line.split(' ').collect();
            (id(words[0]), words[3].to_owned())
        })
        .collect();
    let arrived: HashSet<(TaskId, String)> =
        successors.into_iter().map(|(old, news)| (old, news.into_iter().next().unwrap())).collect();
    assert_eq!(printed, arrived);
    assert!(copies <= LETTERS, "at least once is not without end: {copies}");
    assert_eq!(list(&warren, &[]).await, "");
    drop(collector);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_replay_has_done_what_it_printed() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let letters: Vec<_> = (0..50)
        .map(|n| letter(&format!("l-{n}"), "garenne.echo", DeadReason::Fatal, &json!(n)))
        .collect();
    bury(&warren, &amqp, &letters).await;
    let mut command = warren.start_garenne(&["dead", "replay", "--all", "--yes", "--rate", "5"]);
    soon("it has begun", async || (command.stdout().lines().count() >= 3).then_some(())).await;
    command.signal(Signal::SIGINT);
    assert_eq!(command.ended(PATIENCE).await.code(), Some(130));
    let done = command.stdout().lines().count();
    assert!(done < 50, "{done}");
    let said = format!("replayed {done} dead letters; the others are unchanged");
    assert!(command.stderr().contains(&said), "{}", command.stderr());
    let left = list(&warren, &["--limit", "100"]).await.split(' ').count();
    assert_eq!(done + left, 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_keeps_final_records_and_ends_parked_tasks() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let letters = [
        letter("dead", "garenne.echo", DeadReason::Fatal, &json!(1)),
        letter("parked", "no.such", DeadReason::UnknownTask, &json!(2)),
        letter("other", "garenne.echo", DeadReason::TimedOut, &json!(3)),
    ];
    bury(&warren, &amqp, &letters).await;
    let purged =
        warren.garenne(&["dead", "purge", "--reason", "fatal,unknown_task", "--yes"]).await;
    assert!(purged.stderr.contains("deleted 2 dead letters"), "{purged:#?}");
    assert!(purged.stderr.contains("1 of their tasks ended as failed"), "{purged:#?}");
    assert_eq!(list(&warren, &[]).await, "other");
    for task in ["dead", "parked"] {
        assert_eq!(finished(&producer, &id(task)).await.status, Status::Failed, "{task}");
    }
    let missing = warren.garenne(&["dead", "purge", "dead", "other"]).await;
    assert_eq!(missing.code, Some(3), "{missing:#?}");
    assert_eq!(list(&warren, &[]).await, "");
    let outcome = producer.replay(&[id("other")], &ReplayPlan::default()).await.unwrap();
    assert_eq!(outcome[0].outcome, ReplayOutcome::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_holds_every_message_to_the_byte() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let odd = "{ \"n\": 12345678901234567890123,\r\n \"é\": 1.0 }";
    let bodies = [odd.as_bytes().to_vec(), vec![0, 159, 255], vec![], vec![7; 5 << 20]];
    let letters = bodies.iter().enumerate().map(|(n, body)| {
        let mut letter =
            letter(&format!("l-{n}"), "garenne.echo", DeadReason::Malformed, &json!(0));
        letter.message.body = body.clone().into();
        letter.message.set_header("x-mine", HeaderValue::Bool(true));
        letter
    });
    bury(&warren, &amqp, &letters.collect::<Vec<_>>()).await;
    let file = warren.path("export.jsonl");
    let place = file.to_str().unwrap();
    warren.garenne(&["dead", "export", "--file", place]).await.ok();
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(warren.garenne(&["dead", "export"]).await.ok(), text);
    let exported: HashMap<String, Value> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .map(|letter| (letter["id"].as_str().unwrap().to_owned(), letter))
        .collect();
    for (n, body) in bodies.iter().enumerate() {
        let message = &exported[&format!("l-{n}")]["message"];
        assert_eq!(message["headers"]["x-mine"], true);
        assert_eq!(message["properties"]["type"], "garenne.echo");
        let bytes = match (message["body_text"].as_str(), message["body_base64"].as_str()) {
            (Some(text), None) => text.as_bytes().to_vec(),
            (None, Some(base64)) => decode(base64),
            both => panic!("{both:?}"),
        };
        assert!(bytes == *body, "body {n} differs");
    }

    let nowhere = warren.path("nowhere").join("export");
    let failed = warren.garenne(&["dead", "export", "--file", nowhere.to_str().unwrap()]).await;
    assert_eq!(failed.code, Some(2), "{failed:#?}");
    assert!(failed.stderr.contains("does the directory exist?"), "{failed:#?}");
}

/// base64 without a library: four characters are three bytes.
fn decode(text: &str) -> Vec<u8> {
    let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bytes, mut bits, mut held) = (vec![], 0_u32, 0);
    for c in text.bytes().filter(|c| *c != b'=') {
        let digit = digits.iter().position(|digit| *digit == c).unwrap();
        bits = bits << 6 | u32::try_from(digit).unwrap();
        held += 6;
        if held >= 8 {
            held -= 8;
            bytes.push(u8::try_from(bits >> held & 255).unwrap());
        }
    }
    bytes
}
