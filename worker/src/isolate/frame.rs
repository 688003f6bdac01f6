//! The protocol between a worker and its child processes: two lengths, JSON, bytes.
//!
//! Both ends are the same build of the same program, so the format has no version. Lengths are bounded
//! nevertheless, since a child runs suspects and may write anything.

use std::io::{self, Read, Write};

use garenne_common::wire::{HeaderValue, MAX_BODY_BYTES, Message, Properties};
use garenne_common::{Codec, QueueName};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::run::outcome::Retryable;

/// Headers of a task and error texts are much smaller.
const MAX_HEAD_BYTES: usize = 1024 * 1024;
/// Error texts are truncated to this number of characters.
const MAX_TEXT_CHARS: usize = 16_000;

/// A command of the worker to a child.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum ChildCommand {
    /// Run this task; the body is its arguments.
    Run(Box<ChildTask>),
    /// The attempt should end.
    Cancel,
    /// The attempt is over.
    Stop,
    /// A command is about to start with this value in its environment.
    Watch(RunId),
    /// The process group of a running command.
    Group(RunId, i32),
    /// A command and its process group have ended.
    Unwatch(RunId),
}

/// Identifies one run of a command.
pub(super) type RunId = String;

/// A task to run.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ChildTask {
    pub(super) queue: QueueName,
    pub(super) properties: Properties,
    pub(super) headers: Vec<(String, HeaderValue)>,
    /// Name of the worker.
    pub(super) worker: String,
    pub(super) redelivered: bool,
    pub(super) crashes: u32,
    /// The fence of an execution under a lease.
    pub(super) fence: Option<u64>,
}

/// A message of a child to its worker.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum ChildMessage {
    /// It accepts commands.
    Ready,
    /// It runs the task: from now on its death counts as a crash of the task.
    Started,
    /// The handler returned; the body is its output.
    Output(Codec),
    /// The arguments do not fit the handler.
    BadArguments(String),
    /// The handler failed.
    Failed { message: String, retryable: Retryable },
    /// The handler panicked.
    Panicked(String),
    /// It was stopped; there is no outcome.
    Stopped,
}

impl ChildTask {
    /// The message of the task, which the child decodes again.
    pub(super) fn message(&self, body: Vec<u8>) -> Message {
        let headers = self.headers.iter();
        let headers = headers.map(|(name, value)| (name.clone().into(), value.clone())).collect();
        Message { properties: self.properties.clone(), headers, body: body.into() }
    }
}

/// Truncates an error text.
pub(super) fn truncate(text: &str) -> String {
    text.chars().take(MAX_TEXT_CHARS).collect()
}

/// Encodes one message with its lengths.
pub(super) fn encode(head: &impl Serialize, body: &[u8]) -> io::Result<Vec<u8>> {
    let head = serde_json::to_vec(head)?;
    check(head.len(), body.len())?;
    let mut bytes = Vec::with_capacity(8 + head.len() + body.len());
    for length in [head.len(), body.len()] {
        // Checked above: both are much smaller.
        bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    }
    bytes.extend(head);
    bytes.extend(body);
    Ok(bytes)
}

pub(super) fn write(to: &mut impl Write, head: &impl Serialize, body: &[u8]) -> io::Result<()> {
    to.write_all(&encode(head, body)?)
}

pub(super) fn read<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<(T, Vec<u8>)> {
    let mut lengths = [0; 8];
    from.read_exact(&mut lengths)?;
    let (head, body) = split(lengths)?;
    let (mut head, mut body) = (vec![0; head], vec![0; body]);
    from.read_exact(&mut head)?;
    from.read_exact(&mut body)?;
    Ok((serde_json::from_slice(&head)?, body))
}

/// [`read`] without blocking. Not cancel-safe: dropping the future loses what it has read.
pub(super) async fn read_async<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
) -> io::Result<(T, Vec<u8>)> {
    let mut lengths = [0; 8];
    from.read_exact(&mut lengths).await?;
    let (head, body) = split(lengths)?;
    let (mut head, mut body) = (vec![0; head], vec![0; body]);
    from.read_exact(&mut head).await?;
    from.read_exact(&mut body).await?;
    Ok((serde_json::from_slice(&head)?, body))
}

fn split(lengths: [u8; 8]) -> io::Result<(usize, usize)> {
    // The first length is the lower half of the little-endian number.
    let both = u64::from_le_bytes(lengths);
    let length = |bits: u64| usize::try_from(bits & u64::from(u32::MAX)).unwrap_or(usize::MAX);
    let (head, body) = (length(both), length(both >> 32));
    check(head, body)?;
    Ok((head, body))
}

fn check(head: usize, body: usize) -> io::Result<()> {
    if head > MAX_HEAD_BYTES || body > MAX_BODY_BYTES {
        return Err(io::Error::other(format!("{head} and {body} bytes are too many")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn messages_are_read_as_written() {
        let message = ChildMessage::Failed {
            message: "no".to_owned(),
            retryable: Retryable::After(Duration::from_millis(7)),
        };
        let bytes = encode(&message, b"body").unwrap();
        assert_eq!(read::<ChildMessage>(&mut &*bytes).unwrap().0, message);
        let (read, body) = read_async::<ChildMessage>(&mut &*bytes).await.unwrap();
        assert_eq!((read, &*body), (message, &b"body"[..]));
    }

    #[test]
    fn excessive_lengths_are_refused_before_allocation() {
        let bytes = [0xff; 64];
        assert!(read::<ChildMessage>(&mut &bytes[..]).is_err());
        assert!(encode(&ChildMessage::Ready, &vec![0; MAX_BODY_BYTES + 1]).is_err());
    }

    #[test]
    fn a_truncated_message_is_an_error() {
        let bytes = encode(&ChildMessage::Started, b"body").unwrap();
        for end in 0..bytes.len() {
            assert!(read::<ChildMessage>(&mut &bytes[..end]).is_err());
        }
    }
}
