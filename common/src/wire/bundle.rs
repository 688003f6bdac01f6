//! Task bundles: many tasks of one queue, priority and due time in one message.
//!
//! A message costs the broker far more than a task costs the worker, so producers send many tasks
//! together (docs/decisions/0017). A bundle only transports them to a worker: each task has its own
//! id, options and result, and can leave the bundle as a message of its own ([`singles`]). Fields
//! that tasks have in common are written once, in a list of heads. The arguments follow at the end,
//! so that they are sliced and not copied.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::codec::{Codec, CodecError, Payload, append_bincode, from_bincode_prefix};
use super::malformed::{MAX_BODY_BYTES, Malformed, within};
use super::message::{HeaderValue, Message, Properties};
use super::{headers, task};
use crate::names::{BatchId, QueueName, TaskId, TaskName};
use crate::retry::RetryPolicy;
use crate::task::{Options, ReplyFormat, ReplyTo, TaskMessage};
use crate::timestamp::Timestamp;

/// AMQP `type` of a bundle of tasks. No task can have this name.
pub const BUNDLE_KIND: &str = "garenne.tasks";
/// Most tasks in a bundle.
pub const MAX_TASKS: usize = 1_000;
/// Longest text in a head, in bytes; the same limit as for AMQP's short strings.
pub const MAX_TEXT_BYTES: usize = 255;
/// Number of heads that are compared with a task before it gets one of its own.
const COMPARED_HEADS: usize = 8;
const CONTENT_TYPE: &str = "application/x-garenne-tasks";
const VERSION_1: u8 = 1;

/// Encodes tasks as one message. `app_id` is the name of the publishing process.
///
/// The caller passes tasks of one queue, priority and due time, at their first attempt, at most
/// [`MAX_TASKS`], and few enough for a message by their [`weight`].
pub fn encode<'a>(
    tasks: impl IntoIterator<Item = &'a TaskMessage>,
    app_id: &str,
) -> Result<Message, CodecError> {
    let tasks: Vec<&TaskMessage> = tasks.into_iter().collect();
    let mut heads: Vec<&TaskMessage> = vec![];
    let mut members = Vec::with_capacity(tasks.len() * 64);
    let mut args_bytes = 0;
    for task in &tasks {
        // Usually the last one. Only a few are compared, because tasks with a trace context each
        // have a head of their own, and there may be as many heads as tasks.
        let first = heads.len().saturating_sub(COMPARED_HEADS);
        let found = heads[first..].iter().rposition(|head| share_a_head(head, task));
        let head = found.map_or(heads.len(), |place| first + place);
        if head == heads.len() {
            heads.push(task);
        }
        args_bytes += task.args.bytes.len();
        append_bincode(&MemberV1::of(task, head), &mut members)?;
    }
    let mut body = Vec::with_capacity(64 + heads.len() * 128 + members.len() + args_bytes);
    body.push(VERSION_1);
    append_bincode(&(heads.len(), tasks.len()), &mut body)?;
    for head in &heads {
        append_bincode(&HeadV1::from(*head), &mut body)?;
    }
    body.extend(members);
    for task in &tasks {
        body.extend_from_slice(&task.args.bytes);
    }
    let first = tasks.first();
    let properties = Properties {
        content_type: Some(CONTENT_TYPE.to_owned()),
        kind: Some(BUNDLE_KIND.to_owned()),
        app_id: Some(app_id.to_owned()),
        timestamp: first.and_then(|task| task.submitted_at).map(|at| at.as_millis() / 1000),
        priority: first.and_then(|task| task.options.priority),
        ..Properties::default()
    };
    // For people: the management UI counts messages and not tasks.
    let count = HeaderValue::Int(i64::try_from(tasks.len()).unwrap_or(i64::MAX));
    let mut headers = vec![(headers::TASKS.into(), count)];
    if tasks.iter().any(|task| task.fingerprint.is_some()) {
        headers.push((headers::FINGERPRINTS.into(), HeaderValue::Text(fingerprints_of(&tasks))));
    }
    Ok(Message { properties, headers, body: body.into() })
}

/// Whether a message is a bundle of tasks, by its `type`.
pub fn is_one(message: &Message) -> bool {
    message.properties.kind.as_deref() == Some(BUNDLE_KIND)
}

/// Decodes a bundle that was delivered from `queue`.
///
/// A bundle is malformed as a whole, since the boundaries of tasks cannot be found in invalid
/// bytes. JSON arguments are not checked here; see [`task::check_args`].
pub fn decode(message: &Message, queue: &QueueName) -> Result<Vec<TaskMessage>, Malformed> {
    within("a bundle of tasks", &message.body, MAX_BODY_BYTES)?;
    headers::check(message)?;
    let mut from = Cursor { rest: &message.body };
    match from.byte() {
        Some(VERSION_1) => {}
        Some(version) => {
            return Err(Malformed::new(format_args!(
                "bundle of tasks of unknown version {version}"
            )));
        }
        None => return Err(Malformed::new("an empty bundle of tasks")),
    }
    let (heads, count): (usize, usize) = from.next()?;
    // Checked before memory is reserved. Every head belongs to at least one task.
    if !(1..=MAX_TASKS).contains(&count) || !(1..=count).contains(&heads) {
        return Err(Malformed::new(format_args!(
            "a bundle of {count} tasks with {heads} heads; 1 to {MAX_TASKS} tasks are allowed"
        )));
    }
    let priority = message.properties.priority;
    let heads = (0..heads).map(|_| from.next::<HeadV1<'_>>()?.read(priority));
    let heads = heads.collect::<Result<Vec<TaskHead>, Malformed>>()?;
    let members = (0..count).map(|_| from.next()).collect::<Result<Vec<MemberV1<'_>>, _>>()?;
    let mut args = message.body.slice_ref(from.rest);
    let tasks = members.into_iter().map(|member| member.read(&heads, queue, &mut args));
    let mut tasks = tasks.collect::<Result<Vec<_>, _>>()?;
    if args.is_empty() {
        read_fingerprints(message, &mut tasks)?;
        return Ok(tasks);
    }
    Err(Malformed::new(format_args!("a bundle of tasks with {} trailing bytes", args.len())))
}

/// The fingerprints as the text of a header, since the layout of the body has no field for them.
fn fingerprints_of(tasks: &[&TaskMessage]) -> String {
    let text = |task: &&TaskMessage| task.fingerprint.map_or(String::new(), |it| it.to_string());
    tasks.iter().map(text).collect::<Vec<_>>().join(",")
}

fn read_fingerprints(message: &Message, tasks: &mut [TaskMessage]) -> Result<(), Malformed> {
    let Some(text) = headers::text(message, headers::FINGERPRINTS)? else { return Ok(()) };
    let mut texts = text.split(',');
    for task in tasks {
        let text = texts.next().ok_or_else(|| Malformed::new("a task without a fingerprint"))?;
        let fingerprint = Some(text).filter(|text| !text.is_empty()).map(str::parse);
        task.fingerprint = fingerprint.transpose().map_err(Malformed::new)?;
    }
    match texts.next() {
        None => Ok(()),
        Some(_) => Err(Malformed::new("more fingerprints than tasks")),
    }
}

/// The tasks of a bundle as messages of their own, under the same ids.
pub fn singles(message: &Message, queue: &QueueName) -> Result<Vec<Message>, Malformed> {
    let app_id = message.properties.app_id.as_deref().unwrap_or_default();
    Ok(decode(message, queue)?.iter().map(|member| task::encode(member, app_id)).collect())
}

/// Marks a bundle that a worker gives back because it cannot start it soon, so that the next worker
/// keeps it.
pub fn mark_handed_on(message: &mut Message) {
    message.set_header(headers::HANDED_ON, HeaderValue::Bool(true));
}

/// Whether a bundle, or a part of it, was given back by a worker before.
pub fn is_handed_on(message: &Message) -> bool {
    message.header(headers::HANDED_ON) == Some(&HeaderValue::Bool(true))
}

/// Size of a task in a bundle, in bytes: approximate. Its head is counted only if it has a trace
/// context, with which it shares its head with no other task.
pub fn weight(task: &TaskMessage) -> usize {
    let head = task.traceparent.as_ref().map_or(0, |parent| {
        let batch = task.batch.as_ref().map_or(0, |batch| batch.as_str().len());
        let reply = task.reply.as_ref().map_or(0, |reply| reply.queue.len());
        parent.len() + task.name.as_str().len() + batch + reply + 32
    });
    task.args.bytes.len() + task.id.as_str().len() + head + 32
}

/// The fields that similar tasks have in common. The queue is the routing key of the bundle, and
/// the priority is a property of it.
#[derive(Serialize, Deserialize)]
struct HeadV1<'a> {
    name: &'a str,
    bincode: bool,
    batch: Option<&'a str>,
    reply: Option<ReplyV1<'a>>,
    retry: Option<RetryV1>,
    timeout_ms: Option<u64>,
    soft_timeout_ms: Option<u64>,
    traceparent: Option<&'a str>,
}

#[derive(Serialize, Deserialize)]
struct ReplyV1<'a> {
    queue: &'a str,
    correlation_id: Option<&'a str>,
    bundle: bool,
}

#[derive(Serialize, Deserialize)]
struct RetryV1 {
    max_attempts: u32,
    base_ms: u64,
    factor: f64,
    max_ms: u64,
}

/// The fields that each task has of its own.
#[derive(Serialize, Deserialize)]
struct MemberV1<'a> {
    head: usize,
    id: &'a str,
    /// Length of its arguments, in bytes.
    args: usize,
    submitted_at: Option<u64>,
    expires_at: Option<u64>,
}

fn share_a_head(one: &TaskMessage, other: &TaskMessage) -> bool {
    let (a, b) = (&one.options, &other.options);
    one.name == other.name
        && one.args.codec == other.args.codec
        && one.batch == other.batch
        && one.reply == other.reply
        && a.retry == b.retry
        && (a.timeout, a.soft_timeout) == (b.timeout, b.soft_timeout)
        && one.traceparent == other.traceparent
}

impl<'a> From<&'a TaskMessage> for HeadV1<'a> {
    fn from(task: &'a TaskMessage) -> Self {
        let Options { retry, timeout, soft_timeout, .. } = &task.options;
        let reply = task.reply.as_ref().map(|reply| ReplyV1 {
            queue: &reply.queue,
            correlation_id: reply.correlation_id.as_deref(),
            bundle: reply.format == ReplyFormat::Bundle,
        });
        Self {
            name: task.name.as_str(),
            bincode: task.args.codec == Codec::Bincode,
            batch: task.batch.as_ref().map(BatchId::as_str),
            reply,
            retry: (*retry != RetryPolicy::DEFAULT).then(|| RetryV1 {
                max_attempts: retry.max_attempts,
                base_ms: task::as_millis(retry.base),
                factor: retry.factor,
                max_ms: task::as_millis(retry.max),
            }),
            timeout_ms: timeout.map(task::as_millis),
            soft_timeout_ms: soft_timeout.map(task::as_millis),
            traceparent: task.traceparent.as_deref(),
        }
    }
}

/// A decoded head, validated once for all its tasks.
struct TaskHead {
    name: TaskName,
    codec: Codec,
    batch: Option<BatchId>,
    reply: Option<ReplyTo>,
    options: Options,
    traceparent: Option<Arc<str>>,
}

impl HeadV1<'_> {
    fn read(self, priority: Option<u8>) -> Result<TaskHead, Malformed> {
        let retry = match self.retry {
            None => RetryPolicy::DEFAULT,
            Some(retry) if retry.factor.is_finite() => RetryPolicy {
                max_attempts: retry.max_attempts.max(1),
                base: Duration::from_millis(retry.base_ms),
                factor: retry.factor,
                max: Duration::from_millis(retry.max_ms),
            },
            Some(_) => return Err(Malformed::new("a retry factor that is not finite")),
        };
        check_length("traceparent", self.traceparent)?;
        Ok(TaskHead {
            name: TaskName::new(self.name)?,
            codec: if self.bincode { Codec::Bincode } else { Codec::Json },
            batch: self.batch.map(BatchId::new).transpose()?,
            reply: self.reply.map(ReplyV1::read).transpose()?,
            options: Options {
                retry,
                timeout: self.timeout_ms.map(Duration::from_millis),
                soft_timeout: self.soft_timeout_ms.map(Duration::from_millis),
                expires_at: None,
                priority,
            },
            traceparent: self.traceparent.map(Arc::from),
        })
    }
}

impl ReplyV1<'_> {
    fn read(self) -> Result<ReplyTo, Malformed> {
        let Self { queue, correlation_id, bundle } = self;
        for (name, text) in [("reply_to", Some(queue)), ("correlation_id", correlation_id)] {
            task::check_text(name, text)?;
            check_length(name, text)?;
        }
        Ok(ReplyTo {
            queue: queue.into(),
            correlation_id: correlation_id.map(str::to_owned),
            format: if bundle { ReplyFormat::Bundle } else { ReplyFormat::Plain },
        })
    }
}

/// Limits text in a head, of which every task that leaves the bundle gets a copy.
fn check_length(name: &str, text: Option<&str>) -> Result<(), Malformed> {
    match text.filter(|text| text.len() > MAX_TEXT_BYTES) {
        None => Ok(()),
        Some(_) => {
            Err(Malformed::new(format_args!("{name} is longer than {MAX_TEXT_BYTES} bytes")))
        }
    }
}

impl<'a> MemberV1<'a> {
    fn of(task: &'a TaskMessage, head: usize) -> Self {
        Self {
            head,
            id: task.id.as_str(),
            args: task.args.bytes.len(),
            submitted_at: task.submitted_at.map(Timestamp::as_millis),
            expires_at: task.options.expires_at.map(Timestamp::as_millis),
        }
    }

    fn read(
        self,
        heads: &[TaskHead],
        queue: &QueueName,
        args: &mut Bytes,
    ) -> Result<TaskMessage, Malformed> {
        let head = heads.get(self.head).ok_or_else(|| Malformed::new("a task without a head"))?;
        if self.args > args.len() {
            return Err(Malformed::new("a bundle of tasks that ends too early"));
        }
        let expires_at = self.expires_at.map(Timestamp::from_millis);
        Ok(TaskMessage {
            id: TaskId::new(self.id)?,
            name: head.name.clone(),
            queue: queue.clone(),
            args: Payload { codec: head.codec, bytes: args.split_to(self.args) },
            attempt: 1,
            batch: head.batch.clone(),
            reply: head.reply.clone(),
            options: Options { expires_at, ..head.options },
            submitted_at: self.submitted_at.map(Timestamp::from_millis),
            traceparent: head.traceparent.clone(),
            fingerprint: None,
        })
    }
}

/// The part of a body that is not decoded yet.
struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*first)
    }

    fn next<T: Deserialize<'a>>(&mut self) -> Result<T, Malformed> {
        let (value, read) = from_bincode_prefix(self.rest)?;
        self.rest = self.rest.get(read..).unwrap_or_default();
        Ok(value)
    }
}

#[cfg(test)]
mod tests;
