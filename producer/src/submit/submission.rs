//! A task with the options of its submission, before it is sent.
//!
//! Names are checked when they are set, everything else when the submission is sent. A violation is
//! a [`SubmitError`], and nothing leaves this process.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use garenne_common::topology::MAX_DELAY;
use garenne_common::wire::MAX_DEPTH;
use garenne_common::wire::bundle::MAX_TEXT_BYTES;
use garenne_common::wire::codec::CodecError;
use garenne_common::wire::depth::is_too_deep;
use garenne_common::{
    BatchId, Codec, Fingerprint, Options, Payload, QueueName, RetryPolicy, Task, TaskId,
    TaskMessage, TaskName, Timestamp,
};
use serde::Serialize;

use crate::SubmitError;

/// A task and its options; `O` is the output of its handler.
///
/// Every [`Task`] converts into a submission, so [`submit`](crate::Producer::submit) also takes a
/// bare task. Options that are not set keep the defaults of [`Options`].
pub struct Submission<O> {
    name: Result<TaskName, SubmitError>,
    queue: Result<QueueName, SubmitError>,
    args: Args,
    codec: Option<Codec>,
    id: Option<TaskId>,
    delay: Duration,
    expires_in: Option<Duration>,
    options: Options,
    traceparent: Option<Arc<str>>,
    output: PhantomData<fn() -> O>,
}

/// Typed arguments are encoded when the submission is sent, because the producer sets the default
/// codec. Their type is erased here.
enum Args {
    Typed(Box<dyn FnOnce(Codec) -> Result<Payload, CodecError> + Send>),
    Encoded(Payload),
}

/// A checked submission.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) task: TaskMessage,
    /// How long the broker holds the task back.
    pub(crate) delay: Duration,
}

/// Does not overlap with the reflexive `From`: `Submission` is not a [`Task`], and only this crate
/// could make it one.
impl<T: Task> From<T> for Submission<T::Output> {
    fn from(task: T) -> Self {
        let encode = move |codec| Payload::encode(codec, &task);
        Self::with(T::NAME, T::QUEUE, Args::Typed(Box::new(encode)))
    }
}

impl Submission<serde_json::Value> {
    /// A task by name, with any arguments that JSON can hold and a JSON value as output.
    ///
    /// For tasks whose type this program does not know. Always encoded as JSON. Fails if the name
    /// is not valid or the arguments cannot be encoded or are too large.
    pub fn dynamic(name: &str, args: impl Serialize) -> Result<Self, SubmitError> {
        let name = TaskName::new(name)?;
        let args = Args::Encoded(Payload::encode(Codec::Json, &args)?);
        let queue = QueueName::default();
        Ok(Self::with(name.as_str(), queue.as_str(), args))
    }
}

impl<O> Submission<O> {
    /// A typed task with default options.
    pub fn new<T: Task<Output = O>>(task: T) -> Self {
        task.into()
    }

    fn with(name: &str, queue: &str, args: Args) -> Self {
        Self {
            name: TaskName::new(name).map_err(SubmitError::from),
            queue: QueueName::new(queue).map_err(SubmitError::from),
            args,
            codec: None,
            id: None,
            delay: Duration::ZERO,
            expires_in: None,
            options: Options::default(),
            traceparent: None,
            output: PhantomData,
        }
    }

    /// Sends the task to this queue, given by its short name, instead of the queue of the task
    /// type. Fails if the name is not valid.
    pub fn queue(mut self, queue: impl AsRef<str>) -> Result<Self, SubmitError> {
        self.queue = Ok(QueueName::new(queue.as_ref())?);
        Ok(self)
    }

    /// Uses this id instead of a generated one. A task that is submitted twice under one id may run
    /// twice, but only its first result counts.
    pub fn id(mut self, id: TaskId) -> Self {
        self.id = Some(id);
        self
    }

    /// Delays the task: it starts no earlier than this after its submission. At most [`MAX_DELAY`]
    /// (38 days). The broker holds it back, in steps of 100 ms and up to 1/16 longer than given.
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// The number of further attempts after a failed first one, with the default pauses.
    pub fn retries(mut self, retries: u32) -> Self {
        self.options.retry.max_attempts = retries.saturating_add(1);
        self
    }

    /// Sets the retry policy: attempts and the pauses between them.
    pub fn retry_policy(mut self, policy: RetryPolicy) -> Self {
        self.options.retry = policy;
        self
    }

    /// Time limit of one attempt, instead of the worker's own limit.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.options.timeout = Some(timeout);
        self
    }

    /// Time after which a running attempt is asked to end: `Context::cancelled` completes, a
    /// command gets SIGTERM. The attempt may still return a result until
    /// [`timeout`](Self::timeout).
    pub fn soft_timeout(mut self, timeout: Duration) -> Self {
        self.options.soft_timeout = Some(timeout);
        self
    }

    /// The task fails unless it starts within this time after its submission. Must be longer than
    /// the delay, by more than the 1/16 that the delay may take longer.
    pub fn expires_in(mut self, span: Duration) -> Self {
        self.expires_in = Some(span);
        self
    }

    /// Priority; a task with a higher one is delivered first (quorum queues from RabbitMQ 4.0;
    /// older brokers ignore it).
    pub fn priority(mut self, priority: u8) -> Self {
        self.options.priority = Some(priority);
        self
    }

    /// Codec of typed arguments, instead of the producer's `producer.codec`.
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = Some(codec);
        self
    }

    /// The W3C trace context of the task, which is passed on unchanged.
    pub fn traceparent(mut self, traceparent: impl Into<Arc<str>>) -> Self {
        self.traceparent = Some(traceparent.into());
        self
    }

    /// Whether the caller has chosen the id, so that it may come twice.
    pub(crate) fn has_own_id(&self) -> bool {
        self.id.is_some()
    }

    /// Checks everything and encodes the arguments.
    pub(crate) fn prepare(
        self,
        codec: Codec,
        batch: Option<&BatchId>,
    ) -> Result<Prepared, SubmitError> {
        self.check()?;
        let now = Timestamp::now();
        let args = match self.args {
            Args::Typed(encode) => encode(self.codec.unwrap_or(codec))?,
            Args::Encoded(payload) => payload,
        };
        if args.codec == Codec::Json && is_too_deep(&args.bytes) {
            let problem = format!("the arguments are nested more than {MAX_DEPTH} levels deep");
            return Err(SubmitError::Invalid(problem));
        }
        let expires_at = self.expires_in.map(|span| now.plus(span));
        let name = self.name?;
        let fingerprint = self.id.is_some().then(|| Fingerprint::of(&name, &args));
        let task = TaskMessage {
            id: self.id.unwrap_or_else(TaskId::generate),
            name,
            queue: self.queue?,
            args,
            attempt: 1,
            batch: batch.cloned(),
            reply: None,
            options: Options { expires_at, ..self.options },
            submitted_at: Some(now),
            traceparent: self.traceparent,
            fingerprint,
        };
        Ok(Prepared { task, delay: self.delay })
    }

    fn check(&self) -> Result<(), SubmitError> {
        let retry = &self.options.retry;
        let refuse = |problem: String| Err(SubmitError::Invalid(problem));
        if self.delay > MAX_DELAY {
            let (days, most) = (self.delay.as_secs() / 86_400, MAX_DELAY.as_secs() / 86_400);
            return refuse(format!(
                "a delay of {days} days is longer than the maximum of {most} days"
            ));
        }
        if retry.max_attempts == 0 {
            return refuse("max_attempts is 0; it includes the first attempt".to_owned());
        }
        if !retry.factor.is_finite() || retry.factor < 1.0 {
            return refuse(format!(
                "the retry factor {} is not a number of at least 1",
                retry.factor
            ));
        }
        if self.options.timeout.is_some_and(|limit| limit < Duration::from_millis(1)) {
            return refuse("a timeout below 1 ms lets no attempt succeed".to_owned());
        }
        if let (Some(soft), Some(hard)) = (self.options.soft_timeout, self.options.timeout)
            && soft >= hard
        {
            return refuse(format!(
                "the soft timeout of {soft:?} is not shorter than the timeout of {hard:?}"
            ));
        }
        if self.traceparent.as_ref().is_some_and(|parent| parent.len() > MAX_TEXT_BYTES) {
            return refuse(format!("the traceparent is longer than {MAX_TEXT_BYTES} bytes"));
        }
        match self.expires_in {
            Some(Duration::ZERO) => {
                refuse("the task expires at once, before it can start".to_owned())
            }
            Some(span) if span <= self.delay => refuse(format!(
                "the task expires after {span:?}, before its delay of {:?} ends",
                self.delay
            )),
            Some(_) | None => Ok(()),
        }
    }
}

impl<O> fmt::Debug for Submission<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Submission")
            .field("name", &self.name)
            .field("queue", &self.queue)
            .field("id", &self.id)
            .field("delay", &self.delay)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Render {
        page: u32,
    }

    impl Task for Render {
        const NAME: &'static str = "doc.render";
        const QUEUE: &'static str = "cpu";
        type Output = String;
    }

    fn prepare<O>(submission: impl Into<Submission<O>>) -> Result<Prepared, SubmitError> {
        submission.into().prepare(Codec::Bincode, None)
    }

    fn refused(submission: Submission<String>) -> String {
        match prepare(submission) {
            Err(error @ SubmitError::Invalid(_)) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_bare_task_has_its_types_name_and_queue_and_the_producers_codec() {
        let task = prepare(Render { page: 7 }).unwrap().task;
        assert_eq!((task.name.as_str(), task.queue.as_str()), ("doc.render", "cpu"));
        assert_eq!((task.attempt, task.args.codec), (1, Codec::Bincode));
        assert_eq!(task.args.decode(), Ok(Render { page: 7 }));
        assert!(task.submitted_at.is_some());
    }

    #[test]
    fn every_option_reaches_the_message() {
        let (id, batch) = (TaskId::generate(), BatchId::generate());
        let submission = Submission::new(Render { page: 7 })
            .queue("gpu")
            .unwrap()
            .id(id.clone())
            .delay(Duration::from_secs(3))
            .retry_policy(RetryPolicy::NONE)
            .retries(5)
            .timeout(Duration::from_secs(9))
            .soft_timeout(Duration::from_secs(8))
            .expires_in(Duration::from_mins(1))
            .priority(3)
            .codec(Codec::Json)
            .traceparent("00-1-2-01");
        assert!(submission.has_own_id());
        let Prepared { task, delay } = submission.prepare(Codec::Bincode, Some(&batch)).unwrap();
        assert_eq!((task.id, task.batch, delay), (id, Some(batch), Duration::from_secs(3)));
        assert_eq!((task.queue.as_str(), task.args.codec), ("gpu", Codec::Json));
        assert_eq!(task.options.retry, RetryPolicy::retries(5));
        assert_eq!(task.options.timeout, Some(Duration::from_secs(9)));
        assert_eq!(task.options.soft_timeout, Some(Duration::from_secs(8)));
        assert_eq!(
            task.options.expires_at,
            Some(task.submitted_at.unwrap().plus(Duration::from_mins(1)))
        );
        assert_eq!(task.options.priority, Some(3));
        assert_eq!(task.traceparent.as_deref(), Some("00-1-2-01"));
    }

    #[test]
    fn a_dynamic_task_is_json_whatever_the_producer_prefers() {
        let submission = Submission::dynamic("a.b", json!({"x": 1})).unwrap();
        let task = prepare(submission.codec(Codec::Bincode)).unwrap().task;
        assert_eq!(task.args.as_json(), Some(r#"{"x":1}"#));
        assert_eq!(task.queue, QueueName::default());
        assert!(matches!(Submission::dynamic("a b", ()), Err(SubmitError::Invalid(_))));
    }

    #[test]
    fn contradictory_options_are_refused_by_name() {
        let task = || Submission::new(Render { page: 7 });
        let second = Duration::from_secs(1);
        assert!(refused(task().delay(MAX_DELAY + second)).contains("delay"));
        assert!(refused(task().delay(second).expires_in(second)).contains("delay"));
        assert!(refused(task().expires_in(Duration::ZERO)).contains("expires"));
        assert!(refused(task().timeout(Duration::ZERO)).contains("timeout"));
        assert!(refused(task().timeout(second).soft_timeout(second)).contains("soft"));
        let policy =
            |max_attempts, factor| RetryPolicy { max_attempts, factor, ..RetryPolicy::DEFAULT };
        assert!(refused(task().retry_policy(policy(0, 2.0))).contains("max_attempts"));
        assert!(refused(task().retry_policy(policy(2, f64::NAN))).contains("factor"));
        assert!(matches!(task().queue("a queue"), Err(SubmitError::Invalid(_))));
        assert!(prepare(task().delay(MAX_DELAY)).is_ok());
    }

    #[test]
    fn arguments_that_are_too_large_are_refused_with_their_size() {
        let text = "x".repeat(garenne_common::wire::MAX_BODY_BYTES);
        let bytes = text.len() + 2;
        let error = Submission::dynamic("a.b", text).unwrap_err();
        assert_eq!(error, SubmitError::TooLarge { bytes });
    }

    #[test]
    fn a_task_type_with_an_invalid_name_is_refused() {
        #[derive(Serialize, Deserialize)]
        struct Nameless;
        impl Task for Nameless {
            const NAME: &'static str = "";
            type Output = ();
        }
        assert!(matches!(prepare(Nameless), Err(SubmitError::Invalid(_))));
    }
}
