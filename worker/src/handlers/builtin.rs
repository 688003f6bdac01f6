//! The built-in tasks, which make the worker usable and testable without writing Rust.

use std::io::{BufRead, BufReader, Read};
use std::sync::Arc;
use std::time::Duration;

use garenne_common::printable::one_line;
use garenne_common::{InvalidName, Task, TaskName};
use nix::time::{ClockId, clock_gettime};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::file_root::FileRoot;
use super::{AsyncHandler, BlockingHandler, Context, Handler, stdout};
use crate::run::outcome::TaskError;

/// A handler and its task name.
pub(crate) type NamedHandler = (TaskName, Arc<dyn Handler>);

/// All built-in handlers. Handlers that read files read below `files` only.
pub(crate) fn handlers(files: FileRoot) -> Result<Vec<NamedHandler>, InvalidName> {
    let others = files.clone();
    let count_words = move |context: &Context, task| count_words(context, &others, task);
    let digest = move |context: &Context, task| digest(context, &files, &task);
    Ok(vec![
        (TaskName::new(Echo::NAME)?, Arc::new(AsyncHandler::<Echo, _>::new(echo))),
        (TaskName::new(Sleep::NAME)?, Arc::new(AsyncHandler::<Sleep, _>::new(sleep))),
        (TaskName::new(Spin::NAME)?, Arc::new(BlockingHandler::<Spin, _>::new(spin))),
        (TaskName::new(Fail::NAME)?, Arc::new(AsyncHandler::<Fail, _>::new(fail))),
        (TaskName::new(Announce::NAME)?, Arc::new(AsyncHandler::<Announce, _>::new(announce_task))),
        (
            TaskName::new(CountWords::NAME)?,
            Arc::new(BlockingHandler::<CountWords, _>::new(count_words)),
        ),
        (TaskName::new(FileDigest::NAME)?, Arc::new(BlockingHandler::<FileDigest, _>::new(digest))),
    ])
}

/// `garenne.echo`: returns its arguments as they were written.
#[derive(Serialize)]
#[serde(transparent)]
struct Echo(Box<RawValue>);

/// Refuses what few readers accept, such as a number outside the range of floats.
impl<'de> Deserialize<'de> for Echo {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let args = Box::<RawValue>::deserialize(from)?;
        serde_json::from_str::<Value>(args.get()).map_err(D::Error::custom)?;
        Ok(Self(args))
    }
}

impl Task for Echo {
    const NAME: &'static str = "garenne.echo";
    type Output = Box<RawValue>;
}

async fn echo(_: Context, Echo(value): Echo) -> Result<Box<RawValue>, TaskError> {
    Ok(value)
}

/// `garenne.sleep`: `{"millis": 250}` waits for this time.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sleep {
    millis: u64,
}

#[derive(Serialize, Deserialize)]
struct Slept {
    slept_millis: u64,
}

impl Task for Sleep {
    const NAME: &'static str = "garenne.sleep";
    type Output = Slept;
}

async fn sleep(context: Context, Sleep { millis }: Sleep) -> Result<Slept, TaskError> {
    pause(&context, millis).await?;
    Ok(Slept { slept_millis: millis })
}

/// Waits until the time has passed or the attempt should end.
async fn pause(context: &Context, millis: u64) -> Result<(), TaskError> {
    tokio::select! {
        () = tokio::time::sleep(Duration::from_millis(millis)) => Ok(()),
        () = context.cancelled() => Err(TaskError::retry("stopped half-way")),
    }
}

/// `garenne.spin`: `{"millis": 1}` uses this much processor time.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Spin {
    millis: u64,
}

#[derive(Serialize, Deserialize)]
struct Spun {
    spun_millis: u64,
}

impl Task for Spin {
    const NAME: &'static str = "garenne.spin";
    type Output = Spun;
}

/// Measures processor time, not elapsed time, so that a lack of cores shows.
fn spin(context: &Context, Spin { millis }: Spin) -> Result<Spun, TaskError> {
    let clock = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from);
    let end = clock().map_err(std::io::Error::from)?.saturating_add(Duration::from_millis(millis));
    while clock().map_err(std::io::Error::from)? < end {
        (0..1_000).for_each(|_| std::hint::spin_loop());
        stop_if_cancelled(context)?;
    }
    Ok(Spun { spun_millis: millis })
}

/// `garenne.fail`: fails as its arguments say, to try out retries and dead letters.
#[derive(Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Fail {
    message: String,
    /// Number of attempts that fail; all of them if absent.
    times: Option<u32>,
    /// The failure is not retried.
    fatal: bool,
    /// The handler panics instead of returning an error.
    panic: bool,
}

impl Default for Fail {
    fn default() -> Self {
        Self { message: "asked to fail".to_owned(), times: None, fatal: false, panic: false }
    }
}

#[derive(Serialize, Deserialize)]
struct Recovered {
    attempt: u32,
}

impl Task for Fail {
    const NAME: &'static str = "garenne.fail";
    type Output = Recovered;
}

async fn fail(context: Context, task: Fail) -> Result<Recovered, TaskError> {
    let attempt = context.attempt();
    if task.times.is_some_and(|times| attempt > times) {
        return Ok(Recovered { attempt });
    }
    assert!(!task.panic, "{}", task.message);
    if task.fatal {
        Err(TaskError::fatal(task.message))
    } else {
        Err(TaskError::retry(task.message))
    }
}

/// `garenne.announce`: writes `<worker> is processing task <task>` to standard output.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Announce {
    task: Value,
    #[serde(default)]
    millis: u64,
}

impl Task for Announce {
    const NAME: &'static str = "garenne.announce";
    type Output = String;
}

async fn announce_task(context: Context, task: Announce) -> Result<String, TaskError> {
    // Strings are printed without the quotation marks of JSON.
    let which = task.task.as_str().map_or_else(|| task.task.to_string(), str::to_owned);
    let line = format!("{} is processing task {which}", context.worker());
    // The text may be printed to a terminal.
    stdout::print(one_line(&line).into_owned()).await?;
    pause(&context, task.millis).await?;
    Ok(line)
}

/// `text.count_words`: of `{"text": "…"}`, of the file `{"path": "…"}`, or of a bare string.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum CountWords {
    Text { text: String },
    Path { path: String },
    Bare(String),
}

#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
struct Counts {
    words: u64,
    lines: u64,
    bytes: u64,
}

impl Task for CountWords {
    const NAME: &'static str = "text.count_words";
    type Output = Counts;
}

fn count_words(context: &Context, files: &FileRoot, task: CountWords) -> Result<Counts, TaskError> {
    match task {
        CountWords::Text { text } | CountWords::Bare(text) => count(context, text.as_bytes()),
        CountWords::Path { path } => count(context, BufReader::new(files.open(&path)?)),
    }
}

/// Counts like `wc`: words are runs of bytes without ASCII whitespace, lines are line breaks.
fn count(context: &Context, mut from: impl BufRead) -> Result<Counts, TaskError> {
    let (mut counts, mut in_word) = (Counts::default(), false);
    loop {
        let chunk = from.fill_buf()?;
        if chunk.is_empty() {
            return Ok(counts);
        }
        for byte in chunk {
            counts.lines += u64::from(*byte == b'\n');
            // Unlike `is_ascii_whitespace`, `wc` includes the vertical tab.
            let space = byte.is_ascii_whitespace() || *byte == 0x0b;
            counts.words += u64::from(!space && !in_word);
            in_word = !space;
        }
        let length = chunk.len();
        counts.bytes += length as u64;
        from.consume(length);
        stop_if_cancelled(context)?;
    }
}

/// `file.sha256`: the digest of the file `{"path": "…"}`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileDigest {
    path: String,
}

#[derive(Serialize, Deserialize)]
struct DigestOf {
    sha256: String,
    bytes: u64,
}

impl Task for FileDigest {
    const NAME: &'static str = "file.sha256";
    type Output = DigestOf;
}

fn digest(
    context: &Context,
    files: &FileRoot,
    FileDigest { path }: &FileDigest,
) -> Result<DigestOf, TaskError> {
    let mut file = files.open(path)?;
    let (mut hash, mut buffer, mut bytes) = (Sha256::new(), vec![0; 64 * 1024], 0);
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
        bytes += count as u64;
        stop_if_cancelled(context)?;
    }
    let sha256 = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(DigestOf { sha256, bytes })
}

fn stop_if_cancelled(context: &Context) -> Result<(), TaskError> {
    if context.is_cancelled() { Err(TaskError::retry("stopped half-way")) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> Context {
        Context::of_args("null")
    }

    #[test]
    fn words_are_counted_like_wc() {
        let text = " one two\n\tthree\u{b}four\r\nfünf ";
        let counts = count(&context(), text.as_bytes()).unwrap();
        assert_eq!(counts, Counts { words: 5, lines: 2, bytes: text.len() as u64 });
    }

    #[test]
    fn a_word_may_cross_a_buffer() {
        let reader = BufReader::with_capacity(2, &b"abcde fg"[..]);
        assert_eq!(count(&context(), reader).unwrap().words, 2);
    }

    #[test]
    fn spinning_takes_at_least_the_given_time() {
        let begin = std::time::Instant::now();
        assert_eq!(spin(&context(), Spin { millis: 20 }).unwrap().spun_millis, 20);
        assert!(begin.elapsed() >= Duration::from_millis(20));
    }
}
