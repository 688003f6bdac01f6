//! A task with the options of its submission, before it is sent.
//!
//! Names are checked where they are given, everything else when the submission is sent; a breach is a
//! [`SubmitError`] and nothing leaves this process.

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

/// A task and how it wants to be treated; `O` is what its handler returns.
///
/// Whatever implements [`Task`] becomes one by `into()`, so [`submit`](crate::Producer::submit) takes
/// a bare task as well. Everything not set keeps the default of [`Options`].
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

/// Typed arguments wait for the codec, which the producer knows; their type is forgotten here.
enum Args {
    Typed(Box<dyn FnOnce(Codec) -> Result<Payload, CodecError> + Send>),
    Encoded(Payload),
}

/// A checked submission: what travels, and how long the broker holds it back.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) task: TaskMessage,
    pub(crate) delay: Duration,
}

/// No clash with the reflexive `From`: a `Submission` is no `Task`, and only this crate could make it one.
impl<T: Task> From<T> for Submission<T::Output> {
    fn from(task: T) -> Self {
        let encode = move |codec| Payload::encode(codec, &task);
        Self::with(T::NAME, T::QUEUE, Args::Typed(Box::new(encode)))
    }
}

impl Submission<serde_json::Value> {
    /// A task by name, with any arguments that JSON can hold and an output that is JSON again.
    ///
    /// For tasks whose type this program does not know. Always travels as JSON.
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

    /// The queue, by its short name, instead of the task type's own.
    pub fn queue(mut self, queue: impl AsRef<str>) -> Result<Self, SubmitError> {
        self.queue = Ok(QueueName::new(queue.as_ref())?);
        Ok(self)
    }

    /// The id, instead of a fresh one. Submitting an id twice may run it twice; it ends once.
    pub fn id(mut self, id: TaskId) -> Self {
        self.id = Some(id);
        self
    }

    /// Not before this has passed, at most [`MAX_DELAY`] (38 days). The broker waits, in steps of
    /// 100 ms and up to 1/16 longer than asked.
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = delay;
        self
    }

    /// So many further attempts after a failed first one, with the usual waits.
    pub fn retries(mut self, retries: u32) -> Self {
        self.options.retry.max_attempts = retries.saturating_add(1);
        self
    }

    /// Attempts and the waits between them, in full.
    pub fn retry_policy(mut self, policy: RetryPolicy) -> Self {
        self.options.retry = policy;
        self
    }

    /// The longest one attempt may run, instead of the worker's own limit.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.options.timeout = Some(timeout);
        self
    }

    /// When a running attempt is told to come to an end: `Context::cancelled` completes, a command
    /// gets SIGTERM. It may still return a result until [`timeout`](Self::timeout).
    pub fn soft_timeout(mut self, timeout: Duration) -> Self {
        self.options.soft_timeout = Some(timeout);
        self
    }

    /// Given up unless it starts within this time, counted from the submission; must be longer than
    /// the delay, by more than the 1/16 that the delay may take longer.
    pub fn expires_in(mut self, span: Duration) -> Self {
        self.expires_in = Some(span);
        self
    }

    /// Higher goes first where the broker knows priorities (quorum queues from RabbitMQ 4.0).
    pub fn priority(mut self, priority: u8) -> Self {
        self.options.priority = Some(priority);
        self
    }

    /// How typed arguments are encoded, instead of the producer's `producer.codec`.
    pub fn codec(mut self, codec: Codec) -> Self {
        self.codec = Some(codec);
        self
    }

    /// The W3C trace context that the task belongs to; passed on as it is.
    pub fn traceparent(mut self, traceparent: impl Into<Arc<str>>) -> Self {
        self.traceparent = Some(traceparent.into());
        self
    }

    /// Whether the caller chose the id, so that it may come twice.
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
            return refuse(format!("a delay of {days} days is longer than {most} days"));
        }
        if retry.max_attempts == 0 {
            return refuse("max_attempts is 0, but the first attempt counts too".to_owned());
        }
        if !retry.factor.is_finite() || retry.factor < 1.0 {
            return refuse(format!("a retry factor of {} is not a number from 1 on", retry.factor));
        }
        if self.options.timeout.is_some_and(|limit| limit < Duration::from_millis(1)) {
            return refuse("a timeout below 1 ms lets no attempt succeed".to_owned());
        }
        if let (Some(soft), Some(hard)) = (self.options.soft_timeout, self.options.timeout)
            && soft >= hard
        {
            return refuse(format!(
                "a soft timeout of {soft:?} comes after the timeout of {hard:?}"
            ));
        }
        if self.traceparent.as_ref().is_some_and(|parent| parent.len() > MAX_TEXT_BYTES) {
            return refuse(format!("a traceparent has at most {MAX_TEXT_BYTES} bytes"));
        }
        match self.expires_in {
            Some(Duration::ZERO) => refuse("it expires before it can start".to_owned()),
            Some(span) if span <= self.delay => refuse(format!(
                "it expires after {span:?}, before its delay of {:?} ends",
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
    fn a_bare_task_brings_its_name_its_queue_and_the_producers_codec() {
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
    fn contradictions_are_refused_by_name() {
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
    fn too_many_bytes_are_counted_before_anything_is_sent() {
        let text = "x".repeat(garenne_common::wire::MAX_BODY_BYTES);
        let bytes = text.len() + 2;
        let error = Submission::dynamic("a.b", text).unwrap_err();
        assert_eq!(error, SubmitError::TooLarge { bytes });
    }

    #[test]
    fn a_task_type_with_a_bad_name_is_the_senders_error() {
        #[derive(Serialize, Deserialize)]
        struct Nameless;
        impl Task for Nameless {
            const NAME: &'static str = "";
            type Output = ();
        }
        assert!(matches!(prepare(Nameless), Err(SubmitError::Invalid(_))));
    }
}
