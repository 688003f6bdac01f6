//! A task goes out and its output comes back, typed and by name, in both codecs.

use futures_util::{StreamExt, TryStreamExt, stream};
use garenne_common::wire::TaskState;
use garenne_common::{Codec, Status, Task};
use garenne_producer::{OutputError, Submission};
use garenne_worker::{Context, TaskError, Worker};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::harness::{Soon, Warren, soon};

/// With what bincode and JSON treat differently: nesting, options, bytes, floats, maps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Everything {
    text: String,
    number: i64,
    ratio: f64,
    maybe: Option<Vec<u8>>,
    pairs: std::collections::BTreeMap<String, (u8, bool)>,
}

impl Task for Everything {
    const NAME: &'static str = "test.everything";
    type Output = (Everything, u32);
}

async fn everything(context: Context, task: Everything) -> Result<(Everything, u32), TaskError> {
    Ok((task, context.attempt()))
}

fn sample() -> Everything {
    Everything {
        text: "crème \u{1f407} \"quoted\"\n".to_owned(),
        number: i64::MIN,
        ratio: 0.1,
        maybe: Some(vec![0, 255]),
        pairs: [("a".to_owned(), (1, true))].into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn typed_tasks_travel_in_both_codecs() {
    let warren = Warren::new().await;
    let builder = Worker::builder(warren.config()).register::<Everything, _, _>(everything);
    let running = warren.work(builder).await;
    let producer = warren.producer().await;
    for codec in [Codec::Json, Codec::Bincode] {
        let handle = producer.submit(Submission::new(sample()).codec(codec)).await.unwrap();
        let result = {
            let mut handle = handle;
            handle.ended().soon("the task ends").await.unwrap().clone()
        };
        let output = result.output.unwrap();
        assert_eq!(output.codec, codec, "the output is encoded as the arguments were");
        assert_eq!(output.decode::<(Everything, u32)>().unwrap(), (sample(), 1));
        assert_eq!((result.status, result.redelivered), (Status::Succeeded, false));
    }
    let codec_of_the_configuration = {
        let mut config = warren.config();
        config.producer.codec = Codec::Bincode;
        garenne_producer::Producer::connect(&config).await.unwrap()
    };
    let output = codec_of_the_configuration.submit(sample()).await.unwrap().output();
    assert_eq!(output.soon("the task ends").await.unwrap(), (sample(), 1));
    running.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_by_name_takes_and_returns_json() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let producer = warren.producer().await;
    let args = json!({ "a": [1, 2.5, null], "b": { "c": "d" } });
    let submission = Submission::dynamic("garenne.echo", &args).unwrap();
    let output = producer.submit(submission).await.unwrap().output();
    assert_eq!(output.soon("the echo").await.unwrap(), args);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_output_of_another_type_is_a_typed_error() {
    #[derive(Serialize, Deserialize)]
    struct Misunderstood;
    impl Task for Misunderstood {
        const NAME: &'static str = "garenne.echo";
        type Output = u64;
    }
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let producer = warren.producer().await;
    let output = producer.submit(Misunderstood).await.unwrap().output();
    let error = output.soon("the echo").await.unwrap_err();
    assert!(matches!(error, OutputError::Decode { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_submissions_come_back_in_order() {
    let warren = Warren::new().await;
    let _worker = warren.worker().set("worker.concurrency", 20).start().await;
    let producer = warren.producer().await;
    let submissions = (0..1_000).map(|n| Submission::dynamic("garenne.echo", n).unwrap());
    let handles: Vec<_> =
        producer.submit_all(stream::iter(submissions)).try_collect().await.unwrap();
    let outputs = stream::iter(handles).then(|handle| async { handle.output().await.unwrap() });
    let outputs: Vec<_> = outputs.collect().soon("all echoes").await;
    assert_eq!(outputs, (0..1_000).map(|n| json!(n)).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_task_reports_to_the_collector_alone() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let producer = warren.producer().await;
    let submission = Submission::dynamic("garenne.echo", "kept").unwrap();
    let id = producer.submit_detached(submission).await.unwrap();
    let result = soon("the collector has the result", async || {
        match producer.task_state(&id).await.unwrap() {
            TaskState::Finished { result } => Some(result),
            TaskState::Unknown => None,
            other => panic!("{other:?}"),
        }
    });
    let result = result.await;
    assert_eq!(result.output.unwrap().to_json_value(), json!("kept"));
    let results = producer.results(std::slice::from_ref(&id)).await.unwrap();
    assert_eq!(results.iter().map(|result| &result.id).collect::<Vec<_>>(), [&id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_task_passes_and_a_too_large_one_is_refused_at_once() {
    let warren = Warren::new().await;
    let _worker = warren.worker().set("worker.max_body", 10 * 1024 * 1024).start().await;
    let producer = warren.producer().await;
    let text = "x".repeat(9 * 1024 * 1024);
    let large = Submission::dynamic("garenne.echo", &text).unwrap();
    let output =
        producer.submit(large).await.unwrap().output().soon("the large echo").await.unwrap();
    assert_eq!(output.as_str().map(str::len), Some(text.len()));
    let error = Submission::dynamic("garenne.echo", "x".repeat(17 * 1024 * 1024)).unwrap_err();
    assert!(matches!(error, garenne_producer::SubmitError::TooLarge { .. }), "{error:?}");
}
