//! The `garenne` command does what its help says: results on standard output, remarks on standard error,
//! exit codes that a script can rely on.

use std::process::Stdio;

use garenne_common::topology::Declaration;
use garenne_common::wire::HeaderValue;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{SOON, Soon, Warren, finish, soon};

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("JSON Lines")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn submit_prints_an_id_or_with_wait_the_output() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let id = warren.garenne(&["submit", "garenne.echo", "[1, 2.50]"]).await.ok();
    assert_eq!(id.trim().len(), 36, "{id:?}");
    let output =
        warren.garenne(&["submit", "garenne.echo", "{\"b\":1, \"a\":\"é\"}", "--wait"]).await.ok();
    assert_eq!(serde_json::from_str::<Value>(&output).unwrap(), json!({ "a": "é", "b": 1 }));

    let stdin =
        warren.garenne_reading("\"from stdin\"", &["submit", "garenne.echo", "-", "--wait"]).await;
    assert!(stdin.ok().contains("from stdin"));
    let file = format!("@{}", warren.file("args.json", "\"from a file\"").display());
    let file = warren.garenne(&["submit", "garenne.echo", &file, "--wait"]).await;
    assert!(file.ok().contains("from a file"));

    let all = warren
        .garenne(&[
            "submit",
            "garenne.echo",
            "7",
            "--id",
            "order-17",
            "--queue",
            "default",
            "--delay",
            "100ms",
            "--retries",
            "0",
            "--timeout",
            "1m",
            "--expires",
            "1h",
            "--priority",
            "3",
            "--wait=30s",
            "--output",
            "json",
        ])
        .await;
    let result = all.json();
    assert_eq!((&result["id"], &result["output"]), (&json!("order-17"), &json!(7)));
    assert_eq!((&result["status"], &result["attempt"]), (&json!("succeeded"), &json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn submit_says_by_its_exit_code_how_the_task_ended() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let fatal = r#"{"fatal": true, "message": "as asked"}"#;
    let failed = warren.garenne(&["submit", "garenne.fail", fatal, "--wait"]).await;
    assert_eq!(failed.code, Some(1), "{failed:#?}");
    assert!(failed.stderr.contains("as asked") && failed.stderr.contains("fatal"), "{failed:#?}");
    assert_eq!(failed.stdout, "");
    let failed = warren.garenne(&["submit", "garenne.fail", fatal, "--wait", "-o", "json"]).await;
    assert_eq!((failed.code, &failed.json()["reason"]), (Some(1), &json!("fatal")), "{failed:#?}");
    let endless = r#"{"millis": 600000}"#;
    let late = warren.garenne(&["submit", "garenne.sleep", endless, "--wait=300ms"]).await;
    assert_eq!(late.code, Some(3), "{late:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn task_and_dead_show_what_the_collector_knows() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    warren.garenne(&["submit", "garenne.echo", "\"hello\"", "--id", "good", "--wait"]).await.ok();
    let fatal = r#"{"fatal": true, "message": "as asked"}"#;
    warren.garenne(&["submit", "garenne.fail", fatal, "--id", "bad", "--wait"]).await;
    for (id, words) in [("good", ["succeeded", "hello"]), ("bad", ["failed", "as asked"])] {
        let text = soon("the collector knows it", async || {
            let shown = warren.garenne(&["task", "show", id]).await;
            assert!(matches!(shown.code, Some(0 | 3)), "{shown:#?}");
            (shown.code == Some(0)).then_some(shown.stdout)
        });
        let text = text.await;
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        let json = warren.garenne(&["task", "show", id, "--output", "json"]).await.json();
        assert_eq!(
            (&json["state"], &json["result"]["status"]),
            (&json!("finished"), &json!(words[0]))
        );
    }
    let unknown = warren.garenne(&["task", "show", "nobody"]).await;
    assert_eq!(unknown.code, Some(3), "{unknown:#?}");
    let unknown = warren.garenne(&["batch", "show", "nobody"]).await;
    assert_eq!(unknown.code, Some(3), "{unknown:#?}");
    let unknown = warren.garenne(&["dead", "show", "nobody"]).await;
    assert_ne!(unknown.code, Some(0), "{unknown:#?}");
    let listed = warren.garenne(&["dead", "list"]).await.ok();
    assert!(listed.contains("bad") && !listed.contains("good"), "{listed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn map_keeps_the_order_of_its_lines() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    // The first is the slowest.
    let sleeps: String = (0..20).map(|n| format!("{{\"millis\": {}}}\n\n", 200 - n * 10)).collect();
    let rows = lines(&warren.garenne_reading(&sleeps, &["map", "garenne.sleep"]).await.ok());
    let numbers: Vec<_> = rows.iter().map(|row| row["line"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..20).map(|n| 2 * n + 1).collect::<Vec<_>>(), "blank lines are counted");
    assert_eq!(rows[3]["output"]["slept_millis"], 170);

    let file = warren.file("lines.txt", "to be or not to be\n\nthat is\n");
    let map = ["map", "text.count_words", file.to_str().unwrap(), "--arg", "text"];
    let rows = lines(&warren.garenne(&map).await.ok());
    let words: Vec<_> = rows.iter().map(|row| &row["output"]["words"]).collect();
    assert_eq!(words, [&json!(6), &json!(2)]);

    let names = ["map", "garenne.echo", "--arg", "name", "--null"];
    let rows = lines(&warren.garenne_reading("a\nb\0 \0c\r\0", &names).await.ok());
    let echoed: Vec<_> = rows.iter().map(|row| &row["output"]["name"]).collect();
    assert_eq!(echoed, [&json!("a\nb"), &json!(" "), &json!("c\r")]);

    let unordered = warren.garenne_reading(&sleeps, &["map", "garenne.sleep", "--unordered"]).await;
    assert_eq!(lines(&unordered.ok()).len(), 20);
    let nothing = warren.garenne_reading("\n", &["map", "garenne.echo"]).await;
    assert_eq!(nothing.ok(), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn numbers_come_out_as_they_went_in() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    for written in ["-5", "[18446744073709551616, 1.10, 1E5]", "0.1000000000000000055511"] {
        let echoed = warren.garenne(&["submit", "garenne.echo", written, "--wait"]).await.ok();
        assert_eq!(echoed.trim(), written);
    }
    let mapped = warren.garenne_reading("{\"n\": 1.10}\n", &["map", "garenne.echo"]).await.ok();
    assert!(mapped.contains("\"output\":{\"n\": 1.10}"), "{mapped}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_collector_shows_numbers_as_they_were_written() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let numbers = r#"{"message":"no","n":[18446744073709551616,1.10]}"#;
    let echo = ["submit", "garenne.echo", numbers, "--id", "echo", "--wait"];
    warren.garenne(&echo).await.ok();
    // A handler that refuses its arguments: the task becomes a dead letter that contains them.
    let refused = ["submit", "garenne.fail", numbers, "--id", "refused", "--wait"];
    assert_eq!(warren.garenne(&refused).await.code, Some(1));
    for command in [
        &["task", "show", "echo"][..],
        &["task", "show", "echo", "-o", "json"],
        &["dead", "show", "refused"],
        &["dead", "show", "refused", "-o", "json"],
        &["dead", "list", "-o", "json"],
    ] {
        soon("the collector shows the numbers", async || {
            let shown = warren.garenne(command).await.stdout;
            shown.contains("[18446744073709551616,1.10]").then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_task_with_the_id_of_another_gets_no_output_of_it() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let submit = async |args: &str| {
        warren.garenne(&["submit", "garenne.echo", args, "--id", "taken", "--wait=60s"]).await
    };
    assert_eq!(submit("\"first\"").await.ok().trim(), "\"first\"");
    assert_eq!(submit("\"first\"").await.ok().trim(), "\"first\"", "the same task again");
    let other = submit("\"second\"").await;
    assert_eq!((other.code, other.stdout.as_str()), (Some(2), ""), "{other:#?}");
    assert!(other.stderr.contains("another task with the id taken"), "{other:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_of_a_map_share_messages_and_each_is_a_task() {
    let warren = Warren::new().await;
    let amqp = warren.amqp().await;
    let input: String = (0..2_000).map(|n| format!("{n}\n")).collect();
    let map = ["map", "garenne.echo", "--detach"];
    let id = warren.garenne_reading(&input, &map).await.ok();
    assert!((1..400).contains(&amqp.waiting().await), "{} messages", amqp.waiting().await);
    let before = amqp.waiting().await;
    let mut command = warren.command("garenne");
    command.args(map).env("GARENNE__PRODUCER__BUNDLE_TASKS", "1");
    finish(command, "1\n2\n3\n", SOON).await.ok();
    assert_eq!(amqp.waiting().await - before, 3, "if it is told to, each has its own");
    let _crew = warren.crew().await;
    let wait = ["batch", "wait", id.trim(), "--timeout", "50s", "--output", "json"];
    let waited = warren.garenne(&wait).await.json();
    assert_eq!((&waited["state"], &waited["succeeded"]), (&json!("done"), &json!(2_000)));
}

/// `tail -f | garenne map`: a line that comes alone is not kept back until others come.
#[tokio::test(flavor = "multi_thread")]
async fn a_line_of_a_map_waits_for_no_other() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let mut map = warren.start_garenne(&["map", "garenne.echo"]);
    for number in 1..=3 {
        map.write(&format!("{number}\n")).await;
        let row = async || map.stdout().lines().nth(number - 1).map(drop);
        soon("its row is there, with the input still open", row).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn map_says_by_its_exit_code_whether_all_succeeded() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let mixed = "{\"times\": 0}\n{\"fatal\": true, \"message\": \"as asked\"}\n";
    let ended = warren.garenne_reading(mixed, &["map", "garenne.fail"]).await;
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    let rows = lines(&ended.stdout);
    assert_eq!((&rows[0]["status"], &rows[1]["status"]), (&json!("succeeded"), &json!("failed")));
    assert_eq!((&rows[1]["reason"], &rows[1]["error"]), (&json!("fatal"), &json!("as asked")));
    let only = warren.garenne_reading(mixed, &["map", "garenne.fail", "--failures-only"]).await;
    assert_eq!((only.code, lines(&only.stdout).len()), (Some(1), 1), "{only:#?}");
    // Standard input is not checked before: what came before the mistake is finished.
    let broken = warren.garenne_reading("1\n2\n{\n4\n", &["map", "garenne.echo"]).await;
    assert_eq!((broken.code, lines(&broken.stdout).len()), (Some(2), 2), "{broken:#?}");
    assert!(broken.stderr.contains("line 3"), "{broken:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_map_is_waited_for_by_its_batch() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let detached = warren.garenne_reading("1\n2\n3\n", &["map", "garenne.echo", "--detach"]).await;
    let id = detached.ok().trim().to_owned();
    let waited = warren.garenne(&["batch", "wait", &id, "--timeout", "50s"]).await.ok();
    assert!(waited.contains("done"), "{waited}");
    let shown = warren.garenne(&["batch", "show", &id, "--output", "json"]).await.json();
    assert_eq!((&shown["state"], &shown["succeeded"]), (&json!("done"), &json!(3)));
    let failing = "{\"fatal\":true}\n";
    let detached = warren.garenne_reading(failing, &["map", "garenne.fail", "--detach"]).await.ok();
    let waited = warren.garenne(&["batch", "wait", detached.trim()]).await;
    assert_eq!(waited.code, Some(1), "one member failed: {waited:#?}");
    let slow = "{\"millis\": 60000}\n";
    let detached = warren.garenne_reading(slow, &["map", "garenne.sleep", "--detach"]).await.ok();
    let waited = warren.garenne(&["batch", "wait", detached.trim(), "--timeout", "300ms"]).await;
    assert_eq!(waited.code, Some(3), "it takes longer than the time given: {waited:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupted_map_leaves_a_sealed_batch() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let mut map = warren.start_garenne(&["map", "garenne.echo"]);
    map.write("1\n2\n").await;
    soon("both have run", async || map.stdout().lines().nth(1).map(drop)).await;
    map.signal(Signal::SIGINT);
    assert_eq!(map.ended(SOON).await.code(), Some(130));
    let said = map.stderr();
    let id =
        said.split("garenne batch show ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let id = id.unwrap_or_else(|| panic!("how to look at it: {said}"));
    let waited = warren.garenne(&["batch", "wait", id, "--output", "json"]).await;
    assert_eq!((waited.code, &waited.json()["total"]), (Some(0), &json!(2)), "{waited:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_are_json_lines_from_now_on() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let mut listening = warren.start_garenne(&["notices", "--count", "2"]);
    listening.logged("listening").await;
    let detached = warren.garenne_reading("1\n", &["map", "garenne.echo", "--detach"]).await.ok();
    warren.garenne(&["submit", "garenne.echo", "1", "--id", "t-1"]).await.ok();
    assert_eq!(listening.ended(SOON).await.code(), Some(0));
    let mut notices = lines(&listening.stdout());
    notices.sort_by_key(|notice| notice["subject"].to_string());
    assert_eq!(
        (&notices[0]["batch"], &notices[0]["state"]),
        (&json!(detached.trim()), &json!("done"))
    );
    assert_eq!((&notices[1]["task"], &notices[1]["status"]), (&json!("t-1"), &json!("succeeded")));
}

#[tokio::test(flavor = "multi_thread")]
async fn topology_is_planned_applied_and_compared() {
    let warren = Warren::new().await;
    let plan = warren.garenne(&["topology", "plan", "--output", "json"]).await;
    assert_eq!(plan.code, Some(1), "nothing exists yet: {plan:#?}");
    let all = |plan: Value, state: &str| {
        plan["objects"].as_array().unwrap().iter().all(|object| object["state"] == state)
    };
    assert!(all(plan.json(), "missing"));
    warren.has_queue("cpu");
    let applied = warren.garenne(&["topology", "apply", "--queue", "cpu", "-o", "json"]).await;
    assert_eq!(applied.code, Some(0), "{applied:#?}");
    let plan = warren.garenne(&["topology", "plan", "--queue", "cpu", "-o", "json"]).await;
    assert!(plan.code == Some(0) && all(plan.json(), "exists"), "{plan:#?}");
    assert!(warren.garenne(&["topology", "plan"]).await.ok().contains("reject-publish"));

    // An object with other properties, as an older version or a person may have left it.
    let amqp = warren.amqp().await;
    let name = warren.config().broker.topology().queries();
    let other = Declaration::Queue {
        name: name.clone(),
        exclusive: false,
        arguments: vec![("x-queue-type", HeaderValue::Text("quorum".to_owned()))],
    };
    amqp.admin.delete(&other).await.unwrap();
    amqp.admin.declare(&[other]).await.unwrap();
    for command in [["topology", "plan"], ["topology", "apply"], ["submit", "garenne.echo"]] {
        let ended = warren.garenne(&command).await;
        assert!(ended.code == Some(2) && ended.stderr.contains(&name), "{ended:#?}");
    }
    let worker = warren.worker().fail(SOON).await;
    assert!(worker.code == Some(2) && worker.stderr.contains(&name), "{worker:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn doctor_follows_the_way_from_here_to_a_finished_task() {
    let warren = Warren::new().await;
    let ill = warren.garenne(&["doctor", "--deadline", "5s", "--output", "json"]).await;
    assert_eq!(ill.code, Some(1), "{ill:#?}");
    let report = ill.json();
    let checks = report["checks"].as_array().unwrap();
    let bad: Vec<_> = checks.iter().filter(|check| check["state"] == "bad").collect();
    assert!(bad.iter().any(|check| check["advice"] == "garenne topology apply"), "{report}");
    assert!(bad.iter().all(|check| check["advice"].is_string()), "{report}");
    let _crew = warren.crew().await;
    let well = warren.garenne(&["doctor"]).await.ok();
    assert!(well.contains("All is well") && !well.contains('✗'), "{well}");
}

#[tokio::test(flavor = "multi_thread")]
async fn help_and_completions_need_no_broker() {
    let warren = Warren::new().await;
    let nowhere = |arguments: &[&str]| {
        let mut command = warren.command("garenne");
        command.env("AMQP_URL", "amqp://127.0.0.1:1").args(arguments);
        finish(command, "", SOON)
    };
    for shell in ["bash", "zsh", "fish"] {
        let script = nowhere(&["completions", shell]).await.ok();
        assert!(script.contains("submit") && script.contains("garenne"), "{shell}");
    }
    for arguments in
        [&["--help"][..], &["--version"], &["map", "--help"], &["batch", "wait", "--help"]]
    {
        assert!(!nowhere(arguments).await.ok().is_empty(), "{arguments:?}");
    }
    // Another program serves these, by the name that was typed.
    for arguments in [&["demo", "--help"][..], &["bench", "-h"], &["help", "verify"]] {
        let help = nowhere(arguments).await.ok();
        assert!(help.contains("Usage: garenne ") && help.contains("--url"), "{help}");
    }
    assert_eq!(nowhere(&["verify", "--nonsense"]).await.code, Some(2));
    assert_eq!(nowhere(&[]).await.code, Some(2), "no command is a mistake");
    for service in ["garenne-worker", "garenne-collector"] {
        let mut command = warren.command(service);
        command.arg("--help");
        let help = finish(command, "", SOON).await.ok();
        assert!(help.contains("Exit codes"), "{service}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_leaves_ends_the_command_quietly() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let input: String = (0..2_000).map(|n| format!("{n}\n")).collect();
    let input = warren.file("many", &input);
    for arguments in
        [&["completions", "bash"][..], &["map", "garenne.echo", input.to_str().unwrap()]]
    {
        let mut command = tokio::process::Command::from(warren.command("garenne"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        drop(child.stdout.take());
        let ended = child.wait_with_output().soon("the command notices").await.unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(141), "{arguments:?}: {said}");
        assert!(!said.contains("panic") && !said.contains("error"), "{arguments:?}: {said}");
    }
}
