//! Precedence of the layers, validation, and refused values.

use super::*;
use crate::names::{QueueName, TaskName};
use std::io::Write;
use std::time::Duration;

fn environment(pairs: &[(&str, &str)]) -> ProcessEnvironment {
    let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let variables = Environment::default().source(Some(pairs.collect()));
    ProcessEnvironment { variables, amqp_url: None }
}

fn file(text: &str) -> (tempfile::NamedTempFile, Sources) {
    let mut file = tempfile::Builder::new().suffix(".conf").tempfile().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    let sources = Sources { file: Some(file.path().to_owned()), overrides: vec![] };
    (file, sources)
}

#[test]
fn later_layers_take_precedence() {
    let (_file, sources) = file("[worker]\nconcurrency = 3\ngrace = \"5s\"\nqueues = [\"a\"]\n");
    let sources = sources.set("worker.grace", Some("7s"));
    let env =
        environment(&[("GARENNE__WORKER__CONCURRENCY", "9"), ("GARENNE__WORKER__QUEUES", "b,c")]);
    let config = RawConfig::read(&sources, env).unwrap().check().unwrap();
    assert_eq!(config.worker.concurrency, 9);
    assert_eq!(config.worker.grace, Duration::from_secs(7));
    let queues: Vec<_> = config.worker.queues.iter().map(QueueName::as_str).collect();
    assert_eq!(queues, ["b", "c"]);
}

#[test]
fn every_layer_takes_precedence_over_other_defaults() {
    let (_file, sources) = file("[worker]\nconcurrency = 3\n");
    let defaults = [("worker.concurrency", "9"), ("log.filter", "warn")];
    let raw = RawConfig::read_over(&defaults, &sources, environment(&[])).unwrap();
    let config = raw.check().unwrap();
    assert_eq!((config.worker.concurrency, config.log.filter.as_str()), (3, "warn"));
}

#[test]
fn every_duration_has_the_human_readable_format() {
    let text = include_str!("raw.rs");
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let durations = lines.windows(2).filter(|pair| pair[1].ends_with(": Duration,"));
    let durations: Vec<_> = durations.collect();
    assert!(durations.len() > 10);
    for pair in durations {
        assert_eq!(pair[0], "#[serde(with = \"humantime_serde\")]", "before {}", pair[1]);
    }
}

#[test]
fn unknown_keys_are_refused_by_name() {
    let (_file, sources) = file("[worker]\nslotz = 3\n");
    let error = RawConfig::read(&sources, environment(&[])).unwrap_err();
    assert!(error.to_string().contains("slotz"), "{error}");
}

#[test]
fn all_problems_are_reported_together() {
    let text = "[broker]\nurl = \"http://x\"\nnamespace = \"a b\"\n[worker]\nconcurrency = 0\n";
    let (_file, sources) = file(text);
    let raw = RawConfig::read(&sources, environment(&[])).unwrap();
    let problems = raw.check().unwrap_err().problems;
    assert_eq!(problems.len(), 3, "{problems:?}");
}

#[test]
fn blank_urls_and_a_zero_consumer_timeout_are_refused() {
    let (_file, sources) = file("[broker]\nurl = \" , \"\nconsumer_timeout = \"0s\"\n");
    let raw = RawConfig::read(&sources, environment(&[])).unwrap();
    let problems = raw.check().unwrap_err().problems;
    assert_eq!(
        problems,
        ["broker.url: no URL is given", "broker.consumer_timeout: must be at least 1s"]
    );
}

#[test]
fn commands_come_from_the_file() {
    let text =
        "[worker.commands.\"image.resize\"]\nargv = [\"convert\", \"{src}\"]\nstdin = true\n";
    let (_file, sources) = file(text);
    let config = RawConfig::read(&sources, environment(&[])).unwrap().check().unwrap();
    let command = &config.worker.commands[&TaskName::new("image.resize").unwrap()];
    assert_eq!(command.argv, ["convert", "{src}"]);
    assert!(command.stdin);
}

#[test]
fn text_in_place_of_a_section_is_refused_and_not_replaced_by_a_later_layer() {
    let (_file, sources) = file("broker = \"amqp://me:s3cret@host\"\n");
    let error = RawConfig::read(&sources.set("broker.namespace", Some("x")), environment(&[]));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("broker: ") && !error.contains("s3cret"), "{error}");
}

/// The configuration library alone would convert each of these values.
#[test]
fn values_are_read_as_written_or_refused() {
    let env = environment(&[
        ("GARENNE__BROKER__NAMESPACE", "0042"),
        ("GARENNE__WORKER__NAME", "1.10"),
        ("GARENNE__WORKER__QUEUES", "007, true"),
        ("GARENNE__WORKER__FAULTS", "true"),
        ("GARENNE__WORKER__CRASH_BUDGET", "7"),
    ]);
    let config = RawConfig::read(&Sources::default(), env).unwrap().check().unwrap();
    assert_eq!(config.broker.namespace.as_str(), "0042");
    assert_eq!(config.worker.name.as_deref(), Some("1.10"));
    let queues: Vec<_> = config.worker.queues.iter().map(QueueName::as_str).collect();
    assert_eq!(
        (queues, config.worker.faults, config.worker.crash_budget),
        (vec!["007", "true"], true, 7)
    );
    for (text, key) in [
        ("[broker]\nnamespace = 42\n", "broker.namespace"),
        ("[broker]\npublish_window = true\n", "broker.publish_window"),
        ("[worker]\nconcurrency = 3.7\n", "worker.concurrency"),
        ("[worker]\nconcurrency = -1\n", "worker.concurrency"),
        ("[worker]\nconcurrency = \"3.0\"\n", "worker.concurrency"),
        ("[worker]\ncrash_budget = 4294967299\n", "worker.crash_budget"),
        ("[worker]\nfaults = 1\n", "worker.faults"),
        ("[worker]\nqueues = [7]\n", "worker.queues"),
        ("[collector]\nstore = 7\n", "collector.store"),
        ("[collector]\ntask_notices = \"yes\"\n", "collector.task_notices"),
        ("[worker.commands.run]\nargv = [\"sleep\", 1.10]\n", "argv"),
        ("[worker.commands.run]\nargv = [\"sleep\"]\nenv = { V = 1.10 }\n", "env"),
        ("[worker.commands.run]\nargv = \"sleep\"\n", "argv"),
    ] {
        let (_file, sources) = file(text);
        let error =
            RawConfig::read(&sources, environment(&[])).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(key), "{text}: {error}");
    }
}

#[test]
fn the_heartbeat_is_what_amqp_can_negotiate() {
    for (value, accepted) in
        [("0s", false), ("500ms", false), ("1s", true), ("1500ms", false), ("18h 12m 16s", false)]
    {
        let sources = Sources::default().set("broker.heartbeat", Some(value));
        let raw = RawConfig::read(&sources, environment(&[])).unwrap();
        let refused = raw.check().err().map(|error| error.to_string());
        assert_eq!(refused.is_none(), accepted, "{value}: {refused:?}");
        assert!(refused.is_none_or(|error| error.contains("cannot be disabled")), "{value}");
    }
}

#[test]
fn limits_of_zero_are_refused() {
    for key in [
        "broker.connect_timeout",
        "broker.publish_timeout",
        "broker.consumer_timeout",
        "broker.heartbeat",
        "producer.batch_deadline",
        "producer.bundle_work",
        "worker.task_timeout",
        "worker.max_task_age",
        "worker.lease_term",
        "worker.heartbeat",
        "collector.retention",
    ] {
        let sources = Sources::default().set(key, Some("0s"));
        let raw = RawConfig::read(&sources, environment(&[])).unwrap();
        let problems = raw.check().unwrap_err().problems;
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with(&format!("{key}: must be ")), "{problems:?}");
    }
}
