//! What a person gets wrong is told in one sentence with what to do, exit code 2, within the deadline,
//! and never with a password in it.

use std::time::Duration;

use garenne_common::broker::BrokerError;
use garenne_common::config::BrokerUrl;
use garenne_producer::{Producer, SubmitError};
use serde_json::Value;
use tokio::net::TcpListener;

use crate::harness::{Ended, PrivateNode, SOON, Soon, Warren, time_passes};

const PASSWORD: &str = "s3cr3t-pa55";

/// A port where connections are accepted by the kernel and nobody ever answers.
async fn black_hole() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("amqp://me:{PASSWORD}@{}/%2f", listener.local_addr().unwrap());
    (listener, url)
}

/// A port that nobody listens on.
async fn closed_port() -> String {
    let (listener, url) = black_hole().await;
    drop(listener);
    url
}

/// The test broker with another login or vhost.
fn changed(url: &str, login: &str, vhost: &str) -> String {
    let (_, rest) = url.split_once('@').unwrap();
    let host = rest.split('/').next().unwrap();
    format!("amqp://{login}@{host}/{vhost}")
}

fn own_login(url: &str) -> &str {
    url.trim_start_matches("amqp://").split_once('@').unwrap().0
}

/// Exit code 2 and one error, in words, without the password.
#[track_caller]
fn refused(ended: &Ended, names: &[&str]) {
    assert_eq!(ended.code, Some(2), "{ended:#?}");
    let said = &ended.stderr;
    for name in names {
        assert!(said.contains(name), "{name:?} is missing: {ended:#?}");
    }
    let errors =
        said.lines().filter(|line| line.starts_with("error:") || line.contains("\"error\""));
    assert_eq!(errors.count(), 1, "one sentence: {ended:#?}");
    assert!(
        said.lines().count() <= 2 || !ended.stdout.is_empty(),
        "a sentence and advice: {ended:#?}"
    );
    assert!(!format!("{ended:?}").contains(PASSWORD), "{ended:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_says_which_part_of_the_way_to_the_broker_is_broken() {
    let warren = Warren::new().await;
    let (_hole, unanswered) = black_hole().await;
    let wrong_password = changed(warren.url(), &format!("guest:{PASSWORD}"), "%2f");
    let no_vhost = changed(warren.url(), own_login(warren.url()), "no-such-vhost");
    // A deadline that passes is short, one that must not pass is long.
    for (url, deadline, names) in [
        (closed_port().await, "1s", &["cannot reach RabbitMQ", "refused"][..]),
        (unanswered, "1s", &["cannot reach RabbitMQ", "no answer within 1s"]),
        (wrong_password, "50s", &["login", "guest"]),
        (no_vhost, "50s", &["no-such-vhost", "virtual host"]),
    ] {
        let commands: [&[&str]; 5] = [
            &["submit", "garenne.echo", "1"],
            &["task", "show", "t-1"],
            &["batch", "wait", "b-1"],
            &["topology", "plan"],
            &["notices"],
        ];
        for command in commands {
            let mut all = vec!["--url", &url, "--deadline", deadline];
            all.extend(command);
            let ended = warren.garenne(&all).await;
            refused(&ended, names);
            assert_eq!(ended.stdout, "", "errors are no results");
        }
        let doctor = warren.garenne(&["--url", &url, "--deadline", deadline, "doctor"]).await;
        assert_eq!(doctor.code, Some(2), "{doctor:#?}");
        assert!(doctor.stdout.contains('✗') && !doctor.stdout.contains(PASSWORD), "{doctor:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_explains_wrong_input() {
    let warren = Warren::new().await;
    let echo = "garenne.echo";
    let file = warren.file("bad.toml", "[broker]\nnamespac = \"x\"\n[worker]\nconcurrency = 3\n");
    let (file, missing) = (file.to_str().unwrap(), warren.path("missing"));
    let missing = missing.to_str().unwrap();
    let lines = warren.file("lines", "1\n{\"a\":\n3\n");
    let lines = lines.to_str().unwrap();
    let long = ["submit", echo, "1", "--delay", "60days"];
    let cases: [(&[&str], &[&str]); 15] = [
        (&["submit", echo, "{\"text\":"], &["not JSON"]),
        (&["submit", echo, "{text: 1}"], &["not JSON", "quote"]),
        (&["submit", echo, "@/nowhere/at/all"], &["cannot read /nowhere/at/all"]),
        (&["submit", "no name", "1"], &["task name"]),
        (
            &["submit", echo, "1", "--queue", "nowhere"],
            &["queue nowhere does not exist", "--queues nowhere"],
        ),
        (&["submit", echo, "1", "--delay", "5"], &["5s"]),
        (&["submit", echo, "1", "--dellay", "5s"], &["--dellay"]),
        (&long, &["60 days"]),
        (&["map", echo, lines], &["line 2", "not JSON"]),
        (&["map", echo, missing], &["cannot read"]),
        (&["--config", file, "topology", "plan"], &["namespac"]),
        (&["--config", missing, "topology", "plan"], &["missing"]),
        (&["--url", "http://x", "topology", "plan"], &["scheme", "amqp"]),
        (&["--namespace", "a b", "topology", "plan"], &["broker.namespace"]),
        (
            &["task", "show", "t-1", "--deadline", "5s"],
            &["no collector answered", "garenne-collector"],
        ),
    ];
    for (command, names) in cases {
        let ended = warren.garenne(command).await;
        assert_eq!(ended.code, Some(2), "{command:?}: {ended:#?}");
        for name in names {
            assert!(ended.stderr.contains(name), "{command:?}, {name:?}: {ended:#?}");
        }
        assert_eq!(ended.stdout, "", "{command:?}");
    }
    assert_eq!(warren.amqp().await.waiting().await, 0, "nothing was submitted");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_json_where_results_are() {
    let warren = Warren::new().await;
    let url = closed_port().await;
    for command in [
        &["--url", &url, "submit", "garenne.echo", "1"][..],
        &["submit", "garenne.echo", "{"],
        &["submit", "garenne.echo", "1", "--nonsense"],
        &["submit", "garenne.echo", "1", "--queue", "nowhere"],
    ] {
        let ended = warren.garenne(&[command, &["--output", "json"]].concat()).await;
        let error: Value = serde_json::from_str(&ended.stderr).expect("one JSON object");
        assert_eq!((ended.code, &error["exit_code"]), (Some(2), &2.into()), "{ended:#?}");
        assert!(error["error"].as_str().is_some_and(|error| !error.is_empty()), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn services_refuse_what_waiting_cannot_mend() {
    let warren = Warren::new().await;
    let wrong_password = changed(warren.url(), &format!("guest:{PASSWORD}"), "%2f");
    let no_vhost = changed(warren.url(), own_login(warren.url()), "no-such-vhost");
    let service = |name: &str| if name == "worker" { warren.worker() } else { warren.collector() };
    let limit = SOON;
    for name in ["worker", "collector"] {
        for (ended, names) in [
            (
                service(name).url(&wrong_password).fail(limit).await,
                &["refused the login", "guest"][..],
            ),
            (service(name).url(&no_vhost).fail(limit).await, &["no-such-vhost"]),
            (service(name).set("log.filter", "=oops=").fail(limit).await, &["log.filter"]),
            (service(name).set("worker.slotz", 3).fail(limit).await, &["slotz"]),
            (service(name).set("worker.concurrency", 0).fail(limit).await, &["worker.concurrency"]),
            (service(name).toml("[nonsense]\n").fail(limit).await, &["nonsense"]),
            (service(name).toml("not toml").fail(limit).await, &["config.toml"]),
            (service(name).arg("--config").arg("/nowhere").fail(limit).await, &["/nowhere"]),
            (service(name).arg("--nonsense").fail(limit).await, &["--nonsense"]),
            (
                service(name).url(&format!("amqp//me:{PASSWORD}@x")).fail(limit).await,
                &["broker.url"],
            ),
        ] {
            assert_eq!(ended.code, Some(2), "{name}, {names:?}: {ended:#?}");
            for part in names {
                assert!(ended.stderr.contains(part), "{name}, {part:?}: {ended:#?}");
            }
            assert!(!format!("{ended:?}").contains(PASSWORD), "{ended:#?}");
        }
    }
    for (store, names) in [
        ("/nowhere/at/all/store.sqlite3".to_owned(), "cannot open the store"),
        (warren.file("text", &"no database\n".repeat(200)).display().to_string(), "not a database"),
    ] {
        let ended = warren.collector().set("collector.store", store).fail(limit).await;
        assert!(ended.code == Some(2) && ended.stderr.contains(names), "{ended:#?}");
    }
    let duplicate = "[worker.commands.\"garenne.echo\"]\nargv = []\n";
    let ended = warren.worker().toml(duplicate).fail(limit).await;
    assert!(ended.code == Some(2) && ended.stderr.contains("argv"), "{ended:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn services_wait_for_a_broker_that_is_merely_away_and_still_stop_at_once() {
    let warren = Warren::new().await;
    let (_hole, unanswered) = black_hole().await;
    for url in [closed_port().await, unanswered] {
        let away = |service: crate::harness::Service<'_>| {
            service.url(&url).set("broker.connect_timeout", "300ms").spawn()
        };
        for mut process in [away(warren.worker()), away(warren.collector())] {
            let said = process.logged("cannot reach RabbitMQ").await;
            assert!(!said.contains(PASSWORD), "{said}");
            let ended = process.terminate(SOON).await;
            assert_eq!(ended.code(), Some(0), "{}", process.stderr());
            assert!(!process.stderr().contains(PASSWORD));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn not_even_the_most_talkative_log_holds_the_password() {
    let warren = Warren::new().await;
    let url = changed(warren.url(), &format!("guest:{PASSWORD}"), "%2f");
    let ended = warren.garenne(&["-vvv", "--url", &url, "submit", "garenne.echo", "1"]).await;
    assert!(ended.code == Some(2) && ended.stderr.contains("TRACE"), "{ended:#?}");
    let worker = warren.worker().url(&url).arg("--log").arg("trace");
    let worker = worker.fail(SOON).await;
    assert!(worker.stderr.contains("TRACE"), "{worker:#?}");
    for ended in [ended, worker] {
        let leak = ended.stderr.lines().find(|line| line.contains(PASSWORD));
        assert_eq!(leak, None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_library_has_a_type_for_each_and_keeps_its_deadline() {
    let warren = Warren::new().await;
    let connect = async |url: &str, within: Duration| {
        let mut config = warren.config();
        config.broker.urls = vec![BrokerUrl::parse(url).unwrap()];
        config.broker.connect_timeout = within;
        let connected = Producer::connect(&config).soon("connecting fails").await;
        connected.err().expect("there is no such broker")
    };
    let (_hole, unanswered) = black_hole().await;
    for url in [closed_port().await, unanswered] {
        let error = connect(&url, Duration::from_secs(1)).await;
        assert!(matches!(error, BrokerError::Unreachable { .. }), "{error:?}");
        assert!(error.is_transient() && !format!("{error:?}").contains(PASSWORD), "{error:?}");
    }
    let wrong_password = changed(warren.url(), &format!("guest:{PASSWORD}"), "%2f");
    let error = connect(&wrong_password, SOON).await;
    assert!(matches!(error, BrokerError::LoginRefused { .. }), "{error:?}");
    let no_vhost = changed(warren.url(), own_login(warren.url()), "no-such-vhost");
    let error = connect(&no_vhost, SOON).await;
    assert!(matches!(error, BrokerError::NoVhost { .. }), "{error:?}");
    assert!(!SubmitError::Broker(error).is_transient());
}

/// A limit may be raised, or others may leave: services wait, and log it once.
#[tokio::test(flavor = "multi_thread")]
async fn limits_of_the_broker_are_named_and_waited_out() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let url = changed(&node.url(), own_login(&node.url()), "limited");
    node.ctl(&["add_vhost", "limited"]);
    node.ctl(&["set_permissions", "-p", "limited", "guest", ".*", ".*", ".*"]);
    let limits = |limits: &str| node.ctl(&["set_vhost_limits", "-p", "limited", limits]);
    let garenne = async |command: &str| {
        let arguments = ["--url", &url, "--deadline", "50s", "topology", command];
        warren.garenne(&arguments).await
    };

    limits(r#"{"max-connections": 0}"#);
    let full = "connection limit (0) is reached";
    refused(&garenne("plan").await, &[full, "rabbitmqctl set_vhost_limits"]);
    let mut worker = warren.worker().url(&url).spawn();
    worker.logged(full).await;
    // Some more attempts fail.
    time_passes(Duration::from_secs(5)).await;
    let logged = worker.stderr().matches(full).count();
    assert!(logged <= 8, "not once per attempt, but {logged} times: {}", worker.stderr());

    limits(r#"{"max-connections": -1, "max-queues": 0}"#);
    let full = "queue limit in vhost 'limited' (0) is reached";
    refused(&garenne("apply").await, &[full, "delete unused queues"]);
    worker.logged(full).await;
    node.ctl(&["clear_vhost_limits", "-p", "limited"]);
    worker.logged("consuming again").await;
    let ended = worker.terminate(SOON).await;
    assert_eq!(ended.code(), Some(0), "{}", worker.stderr());
    node.ctl(&["delete_vhost", "limited"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheme_that_does_not_fit_the_port_is_refused() {
    let warren = Warren::new().await;
    let url = warren.url().replacen("amqp://", "amqps://", 1);
    let names = ["this port does not speak TLS", "use an amqp:// URL"];
    let plan = ["--url", &url, "--deadline", "50s", "topology", "plan"];
    refused(&warren.garenne(&plan).await, &names);
    let ended = warren.worker().url(&url).fail(SOON).await;
    assert_eq!(ended.code, Some(2), "{ended:#?}");
    assert!(names.iter().all(|name| ended.stderr.contains(name)), "{ended:#?}");
}

/// The client library takes such an address for none, and this machine for its broker.
#[tokio::test(flavor = "multi_thread")]
async fn an_address_of_version_6_leads_nowhere_else() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let warren = Warren::new().await;
    let url = format!("amqp://guest:guest@[::1]:{port}/%2f");
    let arguments = ["topology", "plan", "--deadline", "2s", "--url", &url];
    let connecting = warren.garenne(&arguments);
    let ended = tokio::select! {
        ended = connecting => ended,
        connected = listener.accept() => panic!("it connected to 127.0.0.1: {connected:?}"),
    };
    assert_eq!(ended.code, Some(2), "{ended:#?}");
    assert!(ended.stderr.contains(&format!("amqp://[::1]:{port}/%2f")), "{ended:#?}");
}
