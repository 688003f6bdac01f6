//! What a worker or collector prints and logs of a sender's text is harmless: one line stays one line,
//! and no terminal obeys it.

use garenne_common::printable::is_printable;
use garenne_common::wire::Message;
use serde_json::{Value, json};

use crate::harness::{Warren, message, soon};

/// Moves a cursor, sets a title, forges a line, turns the direction of writing, in several ways.
const HOSTILE: &str = "a\u{1b}[2J\u{1b}]0;title\u{7}\nforged\rline\u{9b}1A\u{202e}txt\u{2028}b";

fn is_harmless(text: &str) -> bool {
    text.chars().all(|c| is_printable(c) || c == '\n')
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_text_is_spelled_out_in_both_formats() {
    for format in ["human", "json"] {
        let warren = Warren::new().await;
        let amqp = warren.amqp().await;
        let mut worker =
            warren.worker().set("log.format", format).set("log.filter", "debug,lapin=off").spawn();
        worker.logged("ready").await;
        let mut collector = warren
            .collector()
            .set("log.format", format)
            .set("log.filter", "debug,lapin=off")
            .spawn();
        collector.logged("collecting").await;
        amqp.task(message("garenne.announce", "announce", &json!({ "task": HOSTILE }))).await;
        let fail = json!({ "message": HOSTILE, "fatal": true });
        amqp.task(message("garenne.fail", "fail", &fail)).await;
        let mut panic =
            message("garenne.fail", "panic", &json!({ "message": HOSTILE, "panic": true }));
        panic.set_header("x-garenne-max-attempts", garenne_common::wire::HeaderValue::Int(1));
        amqp.task(panic).await;
        let topology = warren.config().broker.topology();
        let mut stray = Message { body: HOSTILE.into(), ..Message::default() };
        stray.properties.app_id = Some(HOSTILE.to_owned());
        stray.properties.message_id = Some(HOSTILE.to_owned());
        amqp.publish(&topology.results(), &topology.results(), stray.clone()).await;
        amqp.task(stray).await;
        worker.logged("missing").await;
        collector.logged("kept as a dead letter").await;
        worker.terminate(std::time::Duration::from_secs(40)).await;
        collector.terminate(std::time::Duration::from_secs(40)).await;
        let stdout = worker.stdout();
        assert!(stdout.contains("is processing task a\\u{1b}"), "{stdout:?}");
        assert_eq!(stdout.lines().count(), 1, "{stdout:?}");
        for text in [stdout, worker.stderr(), collector.stderr()] {
            assert!(is_harmless(&text), "{text:?}");
            assert!(!text.lines().any(|line| line.starts_with("forged")), "{text:?}");
        }
        if format == "json" {
            for line in worker.stderr().lines() {
                serde_json::from_str::<Value>(line).unwrap();
            }
        }
    }
}

/// A float cannot hold any of them.
const NUMBERS: &str = "[18446744073709551616,1.10,-0.0,1E5,0.1000000000000000055511]";
/// The same, and one outside the range of floats, which the built-in handlers refuse.
const ALL_NUMBERS: &str = "[18446744073709551616,1.10,-0.0,1E5,1e400]";

#[tokio::test(flavor = "multi_thread")]
async fn numbers_from_the_store_are_printed_as_they_were_written() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let submit = async |task: &str, id: &str, args: &str| {
        warren.garenne(&["submit", task, args, "--id", id, "--wait"]).await.code
    };
    assert_eq!(submit("garenne.echo", "echo", NUMBERS).await, Some(0));
    // A handler that refuses its arguments: the task becomes a dead letter that contains them.
    let args = format!(r#"{{"message":"no","n":{ALL_NUMBERS}}}"#);
    assert_eq!(submit("garenne.fail", "refused", &args).await, Some(1));
    let replay =
        ["dead", "replay", "refused", "--set", "message=1.50", "--yes", "--output", "json"];
    let replayed = soon("the collector replays the letter", async || {
        let replayed: Value = serde_json::from_str(&warren.garenne(&replay).await.stdout).ok()?;
        Some(replayed["new_id"].as_str()?.to_owned())
    });
    let replayed = replayed.await;
    for (command, numbers) in [
        (&["task", "show", "echo"][..], NUMBERS),
        (&["task", "show", "echo", "-o", "json"], NUMBERS),
        (&["dead", "show", "refused"], ALL_NUMBERS),
        (&["dead", "show", "refused", "-o", "json"], ALL_NUMBERS),
        (&["dead", "list", "--replayed", "-o", "json"], ALL_NUMBERS),
        (&["dead", "export", "--replayed"], ALL_NUMBERS),
        (&["dead", "show", &replayed], ALL_NUMBERS),
        (&["dead", "show", &replayed], "\"message\":1.50"),
    ] {
        soon("the collector shows the numbers", async || {
            warren.garenne(command).await.stdout.contains(numbers).then_some(())
        })
        .await;
    }
}
