//! A caller that holds a submission and does not poll it keeps nobody else of its process waiting
//! (promise 10): room at the publisher, places among submissions under way and the lock of a
//! connection go to who came first, whether that one is looked after or not.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::poll_immediate;
use futures_util::{StreamExt, stream};
use garenne_common::config::Config;
use garenne_producer::{Producer, Submission};
use serde_json::{Value, json};

use crate::harness::{Proxy, Soon, Warren};

fn echo() -> Submission<Value> {
    Submission::dynamic("garenne.echo", json!(1)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_nobody_polls_keeps_no_other_submission_waiting() {
    let warren = Warren::new().await;
    let mut config = warren.config();
    config.broker.publish_window = 4;
    config.producer.bundles.tasks = 50;
    let producer = Producer::connect(&config).soon("it connects").await.unwrap();
    // With delays of their own they share no messages, so there are many more than there is room for.
    let many = (0..400).map(|n| echo().delay(Duration::from_millis(60_000 + 100 * n)));
    let mut submitted = pin!(producer.submit_all(stream::iter(many)));
    drop(submitted.next().soon("the first ones are confirmed").await.unwrap().unwrap());
    for _ in 0..20 {
        producer.submit_detached(echo()).soon("another one is confirmed").await.unwrap();
    }
    let rest = submitted.map(|outcome| assert!(outcome.is_ok(), "{outcome:?}")).count();
    assert_eq!(rest.soon("the rest is confirmed").await, 399);
}

#[tokio::test(flavor = "multi_thread")]
async fn submissions_that_nobody_polls_keep_no_place_among_those_under_way() {
    let warren = Warren::new().await;
    let producer = warren.producer().await;
    // The first one finds out what all need.
    producer.submit_detached(echo()).soon("the first one is confirmed").await.unwrap();
    let mut held: Vec<_> = (0..8).map(|_| Box::pin(producer.submit_detached(echo()))).collect();
    for submission in &mut held {
        assert!(poll_immediate(submission).await.is_none(), "a confirm takes a while");
    }
    producer.submit_detached(echo()).soon("another one is confirmed").await.unwrap();
    for submission in held {
        submission.soon("those held are confirmed, too").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_producer_closes_although_a_submission_is_held_in_the_middle_of_a_look() {
    let warren = Warren::new().await;
    let proxy = Proxy::to(warren.url()).await;
    let namespace = warren.config().broker.namespace;
    let config = Config::with_broker(&proxy.url(warren.url()), namespace.as_str()).unwrap();
    let producer = Producer::connect(&config).soon("it connects").await.unwrap();
    proxy.silence();
    let elsewhere = echo().queue("elsewhere").unwrap();
    let mut held = Box::pin(producer.submit_detached(elsewhere));
    assert!(poll_immediate(&mut held).await.is_none(), "nobody answers");
    producer.clone().close().within(Duration::from_mins(1), "it closes").await;
    drop(held);
}
