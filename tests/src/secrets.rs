//! No message quotes what may be a secret: passwords are planted wherever one can stand, every kind of
//! failure is provoked at the most talkative log level, and everything that is printed is read.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::harness::{Ended, Warren, finish, message};

/// Decoded, with what has a meaning in URLs, in TOML and to shells.
const PASSWORD: &str = "hush/4Kq%9w@Zr3#v";
const ENCODED: &str = "hush%2F4Kq%259w%40Zr3%23v";
/// No piece of it may show either, in whatever way it was cut.
const PIECES: [&str; 4] = ["hush", "4Kq", "9w", "Zr3"];
const LIMIT: Duration = Duration::from_secs(20);
const PROGRAMS: [&str; 3] = ["garenne", "garenne-worker", "garenne-collector"];

/// The program with the most talkative log, about to do something that needs the broker.
fn program(warren: &Warren, name: &str) -> Command {
    let mut command = warren.command(name);
    command.env("GARENNE__LOG__FILTER", "trace");
    command.env("GARENNE__COLLECTOR__STORE", warren.path("store.sqlite3"));
    if name == "garenne" {
        command.args(["-vvv", "--deadline", "1s"]);
    }
    command
}

/// Runs it to its end: it must refuse, and nothing of the secret may be printed.
async fn refused(name: &str, mut command: Command, why: &str) -> Ended {
    if name == "garenne" {
        command.args(["submit", "garenne.echo", "1"]);
    }
    let ended = finish(command, "", LIMIT).await;
    assert_eq!(ended.code, Some(2), "{name}, {why}: {ended:#?}");
    assert!(ended.stderr.contains("error"), "{name}, {why}: {ended:#?}");
    clean(&format!("{}{}", ended.stdout, ended.stderr), &format!("{name}, {why}"));
    ended
}

#[track_caller]
fn clean(printed: &str, what: &str) {
    for line in printed.lines() {
        let found = PIECES.into_iter().find(|piece| line.contains(piece));
        assert_eq!(found, None, "{what}: {line}");
    }
}

/// The test's broker with the secret as the password, decoded or not.
fn login(warren: &Warren, password: &str) -> String {
    let (_, host) = warren.url().split_once('@').unwrap();
    format!("amqp://guest:{password}@{host}")
}

/// URLs that do not lead anywhere, and why.
fn urls(warren: &Warren) -> Vec<(String, &'static str)> {
    vec![
        (login(warren, ENCODED), "a wrong password"),
        (login(warren, PASSWORD), "a password that is not encoded"),
        (login(warren, ENCODED).replace("amqp:", "http:"), "another scheme"),
        (login(warren, ENCODED).replace("amqp://", ""), "no scheme"),
        (login(warren, ENCODED).replace("://", "//"), "no colon"),
        (login(warren, ENCODED).replace("guest:", "guest:12"), "digits first"),
        (format!("amqp://guest:12/{ENCODED}@localhost"), "a port and a path"),
        (format!("amqp://guest:12?{ENCODED}@localhost"), "a port and a query"),
        (format!("amqp://guest:12#{ENCODED}@localhost"), "a port and a fragment"),
        (format!("amqp://guest:a,{ENCODED}:x@localhost"), "a comma"),
        (format!("amqp://guest:{ENCODED}@local host"), "a space in the host"),
        (format!("amqp://guest:{ENCODED}@:5672"), "no host"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_shows_no_password_whatever_is_wrong_with_it() {
    let warren = Warren::new().await;
    for name in PROGRAMS {
        for (url, why) in urls(&warren) {
            let mut command = program(&warren, name);
            command.env("AMQP_URL", &url);
            refused(name, command, &format!("AMQP_URL, {why}")).await;
        }
        let (url, why) = urls(&warren).swap_remove(2);
        let mut command = program(&warren, name);
        command.env("GARENNE__BROKER__URL", &url);
        refused(name, command, &format!("GARENNE__BROKER__URL, {why}")).await;
        let mut command = program(&warren, name);
        command.arg("--url").arg(&url);
        refused(name, command, &format!("--url, {why}")).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_that_is_not_utf_8_is_refused_by_the_name_of_its_variable() {
    let warren = Warren::new().await;
    let url = [format!("amqp://guest:{ENCODED}").as_bytes(), b"\xff@localhost"].concat();
    let url = OsString::from_vec(url);
    for name in PROGRAMS {
        for variable in ["AMQP_URL", "GARENNE__BROKER__URL", "garenne__worker__name"] {
            let mut command = program(&warren, name);
            command.env(variable, &url);
            let ended = refused(name, command, variable).await;
            assert!(ended.stderr.contains(&format!("{variable}: is not UTF-8")), "{ended:#?}");
        }
        let mut command = program(&warren, name);
        command.arg("--url").arg(&url);
        refused(name, command, "--url").await;
        let file = warren.path("config.toml");
        std::fs::write(&file, [b"[broker]\nurl = \"", url.as_encoded_bytes(), b"\"\n"].concat())
            .unwrap();
        let mut command = program(&warren, name);
        command.arg("--config").arg(&file);
        let ended = refused(name, command, "a file").await;
        assert!(ended.stderr.contains("config.toml"), "{ended:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_file_is_not_quoted() {
    let warren = Warren::new().await;
    let url = login(&warren, ENCODED);
    let command = "[worker.commands.\"a.b\"]\nargv = [\"x\"]\n";
    for (text, names) in [
        (format!("[broker]\nurl = {url}\n"), "line 2"),
        (format!("[broker]\nurl = \"{url}\n"), "line 2"),
        (format!("[broker]\nurl = \"{url}\" 1\n"), "line 2"),
        (format!("[broker]\nurl \"{url}\"\n"), "line 2"),
        (format!("[broker]\nurl = \"\"\nurl = \"{url}\"\n"), "line 3"),
        (format!("{url}\n"), "line 1"),
        (format!("\"{url}\" = 1\n"), "unknown field"),
        (format!("[broker]\nurll = \"{url}\"\n"), "urll"),
        (format!("[broker]\nurl = [\"{url}\"]\n"), "broker.url"),
        (format!("broker = \"{url}\"\n"), "broker"),
        (format!("[worker]\nconcurrency = \"{url}\"\n"), "worker.concurrency"),
        (format!("[worker]\nfaults = \"{PASSWORD}\"\n"), "worker.faults"),
        (format!("[worker]\nqueues = [\"{url}\"]\n"), "worker.queues"),
        (format!("[worker]\ngrace = \"{PASSWORD}\"\n"), "worker.grace"),
        (format!("[log]\nformat = \"{PASSWORD}\"\n"), "log.format"),
        (format!("[log]\nfilter = \"={PASSWORD}=\"\n"), "log.filter"),
        (format!("[broker]\nnamespace = \"{url}\"\n"), "broker.namespace"),
        (format!("{command}env = {{ TOKEN = {PASSWORD} }}\n"), "line 3"),
        (format!("{command}env = \"{PASSWORD}\"\n"), "env"),
        (format!("{command}env = {{ TOKEN = [\"{PASSWORD}\"] }}\n"), "env"),
        (format!("[worker.commands.\"a.b\"]\nargv = \"x {PASSWORD}\"\n"), "argv"),
        (format!("[worker.commands.\"a.b\"]\nargs = [\"x\", \"{PASSWORD}\"]\n"), "arg"),
    ] {
        let file = warren.file("config.toml", &text);
        for name in PROGRAMS {
            // No other layer replaces what the file says.
            let mut command = warren.command(name);
            command.env_remove("AMQP_URL").env_remove("GARENNE__BROKER__NAMESPACE");
            command.arg("--config").arg(&file);
            if name == "garenne" {
                command.args(["--output", "json"]);
            }
            let ended = refused(name, command, &text).await;
            assert!(ended.stderr.contains(names), "{names}: {text}: {ended:#?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_arguments_are_named_without_their_logins() {
    let warren = Warren::new().await;
    let url = login(&warren, ENCODED);
    let spaced = format!("amqp://guest:{PASSWORD} x@localhost");
    for name in PROGRAMS {
        for words in [
            vec![url.clone()],
            vec![format!("--ulr={url}")],
            vec![format!("--ulr={spaced}")],
            vec!["--ulr".to_owned(), spaced.clone()],
            vec!["--log-format".to_owned(), url.clone()],
            vec!["--url".to_owned(), url.clone(), "--url".to_owned(), url.clone()],
            vec!["--namespace".to_owned(), url.clone()],
            vec!["--config".to_owned(), url.clone()],
        ] {
            let mut command = program(&warren, name);
            command.args(&words);
            refused(name, command, &format!("{words:?}")).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_keep_their_environment_and_arguments_to_themselves() {
    let warren = Warren::new().await;
    let (shell, missing) = ("[\"/bin/sh\", \"-c\"", "[\"/no/such/program\"");
    let toml = format!(
        "[worker.commands.\"a.fails\"]\nargv = {shell}, \"exit 1\", \"{PASSWORD}\"]\n\
         env = {{ TOKEN = \"{PASSWORD}\" }}\n\
         [worker.commands.\"a.missing\"]\nargv = {missing}, \"{PASSWORD}\"]\n\
         env = {{ TOKEN = \"{PASSWORD}\" }}\n\
         [worker.commands.\"a.bad\"]\nargv = {shell}, \"{{key}}\", \"{PASSWORD}\"]\n"
    );
    let service = warren.worker().toml(&toml).set("log.filter", "trace");
    let (mut worker, _collector) = (service.start().await, warren.collector().start().await);
    for name in ["a.fails", "a.bad"] {
        let ended = warren.garenne(&["submit", name, "{}", "--wait"]).await;
        assert_eq!(ended.code, Some(1), "{ended:#?}");
        clean(&format!("{}{}", ended.stdout, ended.stderr), name);
    }
    let amqp = warren.amqp().await;
    amqp.task(message("a.missing", "t-2", &json!({}))).await;
    worker.logged("/no/such/program").await;
    let status = worker.terminate(LIMIT).await;
    assert!(status.success());
    clean(&worker.stderr(), "the worker's log");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_succeeds_is_not_logged_either() {
    let warren = Warren::new().await;
    let url = warren.url().to_owned();
    let (user, password) =
        url.trim_start_matches("amqp://").split('@').next().unwrap().split_once(':').unwrap();
    // The harness's broker knows one user. Its password is marked by nothing but where it stands.
    let marks =
        [format!("{user}:{password}"), format!("\\0{password}"), format!("\\u0000{password}")];
    let mut worker = warren.worker().set("log.filter", "trace").start().await;
    let mut collector = warren.collector().set("log.filter", "trace").start().await;
    let command = warren.garenne(&["-vvv", "submit", "garenne.echo", "1", "--wait"]).await;
    for process in [&mut worker, &mut collector] {
        assert!(process.terminate(LIMIT).await.success());
    }
    for log in [worker.stderr(), collector.stderr(), command.stderr] {
        assert!(log.contains("TRACE"));
        let leak = log.lines().find(|line| marks.iter().any(|mark| line.contains(mark)));
        assert_eq!(leak, None);
    }
}
