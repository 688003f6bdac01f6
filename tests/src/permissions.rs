//! Permissions that are revoked while everything runs: one sentence, typed errors, no hot loop, and
//! everything goes on when they are granted again (promise 7).

use std::time::Duration;

use garenne_common::broker::BrokerError;
use garenne_common::config::BrokerUrl;
use garenne_producer::{Producer, Submission, SubmitError};
use serde_json::Value;

use crate::harness::{PrivateNode, Proxy, Soon, Warren, eventually, time_passes};

const USER: &str = "hase";
const COMES_BACK: Duration = Duration::from_mins(2);
/// How long the permission stays revoked while refusals are counted.
const REVOKED: Duration = Duration::from_secs(8);

fn echo(args: impl serde::Serialize) -> Submission<Value> {
    Submission::dynamic("garenne.echo", args).unwrap()
}

struct Permissions<'a>(&'a PrivateNode);

impl<'a> Permissions<'a> {
    fn of_a_new_user(node: &'a PrivateNode) -> Self {
        // A failed test may have left one.
        if node.ctl(&["list_users"]).contains(USER) {
            node.ctl(&["delete_user", USER]);
        }
        node.ctl(&["add_user", USER, "geheim"]);
        let permissions = Self(node);
        permissions.set(".*", ".*", ".*");
        permissions
    }

    fn set(&self, configure: &str, write: &str, read: &str) {
        self.0.ctl(&["set_permissions", USER, configure, write, read]);
    }

    fn refusals(&self) -> usize {
        self.0.log().matches("ACCESS_REFUSED").count()
            + self.0.log().matches("access_refused").count()
    }
}

/// Counts refusals for a while, beyond those before; there is at least one.
async fn refusals_while_revoked(permissions: &Permissions<'_>, before: usize) -> usize {
    time_passes(REVOKED).await;
    eventually(COMES_BACK, "something is refused", async || {
        let refused = permissions.refusals() - before;
        (refused > 0).then_some(refused)
    })
    .await
}

/// Submits until an error says what is forbidden; each submission fails. The first ones may hear no more
/// than that the line was cut: who was refused for a while tries again only after a pause.
async fn submissions_until_told(producer: &Producer, what: &str) {
    eventually(COMES_BACK, "the caller is told", async || {
        let submitted = producer.submit(echo(1)).soon("an answer").await;
        let error = submitted.err().unwrap_or_else(|| panic!("{what} is forbidden"));
        let source = match &error {
            SubmitError::Unconfirmed { source, .. } | SubmitError::Broker(source) => source,
            other => panic!("{what}: {other:?}"),
        };
        matches!(source, BrokerError::Forbidden(_)).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_merely_informs_may_be_forbidden() {
    let node = PrivateNode::take().await;
    let permissions = Permissions::of_a_new_user(&node);
    let warren = Warren::on(&node.url()).await;
    let url = node.url().replace("guest:guest@", &format!("{USER}:geheim@"));
    // The exchanges are there already, so that only writing and reading them is forbidden.
    let _collector = warren.collector().start().await;
    permissions.set(".*", r"^(?!.*\.heartbeats$).*", r"^(?!.*\.control$).*");
    let worker = warren.worker().url(&url).set("worker.heartbeat", "100ms").start().await;
    let refused = async || worker.stderr().contains("heartbeats").then_some(());
    eventually(COMES_BACK, "a heartbeat is refused", refused).await;
    let producer = warren.producer().await;
    for number in 0..20 {
        let handle = producer.submit(echo(number)).await.unwrap();
        let result = handle.result().within(COMES_BACK, "it ends").await.unwrap();
        assert!(!result.redelivered);
    }
    permissions.set(".*", ".*", ".*");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_permission_makes_no_hot_loop_and_may_come_back() {
    let node = PrivateNode::take().await;
    let permissions = Permissions::of_a_new_user(&node);
    let warren = Warren::on(&node.url()).await;
    let line = Proxy::to(&node.url()).await;
    let url = line.url(&node.url()).replace("guest:guest@", &format!("{USER}:geheim@"));
    let mut config = warren.config();
    config.broker.urls = vec![BrokerUrl::parse(&url).unwrap()];
    config.broker.publish_timeout = Duration::from_secs(3);
    let (worker, collector) = (warren.worker().url(&url), warren.collector().url(&url));
    let (worker, _collector) = tokio::join!(worker.start(), collector.start());
    let producer = Producer::connect(&config).await.unwrap();
    let works = async || {
        let handle = eventually(COMES_BACK, "a task is taken", async || {
            producer.submit(echo("hello")).await.ok()
        });
        handle.await.output().within(COMES_BACK, "its output comes").await.unwrap();
    };
    works().await;

    for (what, [configure, write, read]) in
        [("write", [".*", "", ".*"]), ("read", [".*", ".*", ""]), ("configure", ["", ".*", ".*"])]
    {
        let before = permissions.refusals();
        permissions.set(configure, write, read);
        // So that no channel remembers what was allowed.
        line.sever().await;
        let (refused, ()) = tokio::join!(
            refusals_while_revoked(&permissions, before),
            submissions_until_told(&producer, what)
        );
        // Three processes with two connections and up to four consumers each.
        assert!(refused < 150, "{what}: {refused} refusals");
        permissions.set(".*", ".*", ".*");
        works().await;
    }
    let said = worker.stderr().matches("ACCESS_REFUSED").count();
    assert!(said < 40, "the log is no flood: {said}");
}
