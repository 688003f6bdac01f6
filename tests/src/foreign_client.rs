//! A client in another language needs an AMQP library and JSON, and nothing else (promise 6 besides:
//! whatever it sends, the worker goes on).

use serde_json::json;

use crate::harness::{Foreign, Warren};

#[tokio::test(flavor = "multi_thread")]
async fn pika_publishes_a_task_and_reads_its_result() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let tasks = warren.config().broker.topology().tasks_exchange();
    let message = json!({
        "exchange": tasks, "key": "default", "body": r#"{"text": "to be or not"}"#, "reply": true,
        "properties": { "type": "text.count_words", "correlation_id": "mine-7" },
    });
    let replies = Foreign::new(warren.url()).publish(json!([message]), 1).await;
    let [reply] = &replies[..] else { panic!("one reply: {replies:?}") };
    assert_eq!(reply["correlation_id"], "mine-7");
    assert_eq!(reply["content_type"], "application/json");
    assert_eq!(reply["body"]["status"], "succeeded");
    assert_eq!(reply["body"]["output"]["words"], 4);
    assert_eq!(reply["message_id"], reply["body"]["id"], "it got an id, and the reply says which");
}
