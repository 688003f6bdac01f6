//! What a worker and its child processes say to each other: length, length, JSON, bytes.
//!
//! Both ends are the same build of the same program, so this format has no versions. Lengths are
//! bounded all the same: a child runs a suspect, and what it writes may be anything.

use std::io::{self, Read, Write};

use garenne_common::wire::{HeaderValue, MAX_BODY_BYTES, Message, Properties};
use garenne_common::{Codec, QueueName};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Headers of a task and error texts are far below.
const MAX_HEAD_BYTES: usize = 1024 * 1024;
/// An error text is cut to this many characters.
const MAX_TEXT_CHARS: usize = 16_000;

/// From the worker to a child.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Run this task; the body is its arguments.
    Run(Box<Job>),
    /// The attempt should end.
    Cancel,
    /// The attempt is over.
    Stop,
    /// A command is about to run, as one that has this in its environment.
    Watch(RunId),
    /// The process group of a command that runs.
    Group(RunId, i32),
    /// A command has ended, and its process group with it.
    Unwatch(RunId),
}

/// One run of a command.
pub(super) type RunId = String;

/// One attempt.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) queue: QueueName,
    pub(super) properties: Properties,
    pub(super) headers: Vec<(String, HeaderValue)>,
    /// How the worker signs.
    pub(super) worker: String,
    pub(super) redelivered: bool,
    pub(super) crashes: u32,
    /// The number of a leased execution.
    pub(super) fence: Option<u64>,
}

/// From a child to its worker.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// It can take its first order.
    Ready,
    /// From here on a death is charged to the task.
    Started,
    /// The handler returned; the body is its output.
    Output(Codec),
    /// The arguments are not what the handler takes.
    BadArguments(String),
    /// The handler failed.
    Failed { message: String, retryable: Retry },
    /// The handler panicked.
    Panicked(String),
    /// It was stopped; what it did counts for nothing.
    Stopped,
}

/// `Retryable`, as it travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Retry {
    ByPolicy,
    AfterMillis(u64),
    Never,
    OutOfResources,
}

impl Job {
    /// The message that the child decodes again.
    pub(super) fn message(&self, body: Vec<u8>) -> Message {
        let headers = self.headers.iter();
        let headers = headers.map(|(name, value)| (name.clone().into(), value.clone())).collect();
        Message { properties: self.properties.clone(), headers, body: body.into() }
    }
}

/// Cuts a text that may be of any length.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(MAX_TEXT_CHARS).collect()
}

/// One message with its lengths, ready to be written.
pub(super) fn encode(head: &impl Serialize, body: &[u8]) -> io::Result<Vec<u8>> {
    let head = serde_json::to_vec(head)?;
    check(head.len(), body.len())?;
    let mut bytes = Vec::with_capacity(8 + head.len() + body.len());
    for length in [head.len(), body.len()] {
        // Checked: both are far below.
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

/// [`read`], without blocking. What was read is lost when it is dropped half-way.
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
    // Both at once: the first length is the lower half of a little-endian number.
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

    #[tokio::test]
    async fn what_was_written_is_read() {
        let answer = Answer::Failed { message: "no".to_owned(), retryable: Retry::AfterMillis(7) };
        let bytes = encode(&answer, b"body").unwrap();
        assert_eq!(read::<Answer>(&mut &*bytes).unwrap().0, answer);
        let (read, body) = read_async::<Answer>(&mut &*bytes).await.unwrap();
        assert_eq!((read, &*body), (answer, &b"body"[..]));
    }

    #[test]
    fn absurd_lengths_are_refused_before_anything_is_allocated() {
        let bytes = [0xff; 64];
        assert!(read::<Answer>(&mut &bytes[..]).is_err());
        assert!(encode(&Answer::Ready, &vec![0; MAX_BODY_BYTES + 1]).is_err());
    }

    #[test]
    fn an_end_half_way_is_an_error() {
        let bytes = encode(&Answer::Started, b"body").unwrap();
        for end in 0..bytes.len() {
            assert!(read::<Answer>(&mut &bytes[..end]).is_err());
        }
    }
}
