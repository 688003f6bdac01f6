//! Command tasks: an external program as a handler.
//!
//! The program gets an argument vector; no shell is involved. Task arguments are checked and replace
//! `{key}` placeholders, or are written to standard input as JSON. Exit code 0 is success, 75
//! (`EX_TEMPFAIL`) requests another attempt, any other is final.

use std::collections::HashMap;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use garenne_common::Payload;
use garenne_common::config::{CommandConfig, CommandOutput};
use nix::sys::signal::Signal;
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::{Context, Handler, RunningHandler, encode};
use crate::isolate::Warden;
use crate::run::concurrency::Permit;
use crate::run::outcome::{Outcome, TaskError};

mod start;

use start::{Group, signal};

/// Maximum size of standard output.
const MAX_STDOUT_BYTES: u64 = 8 * 1024 * 1024;
/// How much of standard error is kept for the error text.
const MAX_STDERR_BYTES: usize = 2_000;
const EX_TEMPFAIL: i32 = 75;
/// How long the pipes of a program are read after it has ended.
const PIPE_TIMEOUT: Duration = Duration::from_millis(500);

/// Runs one configured command.
pub(crate) struct CommandHandler {
    config: Arc<CommandConfig>,
    warden: Arc<Warden>,
}

impl CommandHandler {
    pub(crate) fn new(config: CommandConfig, warden: Arc<Warden>) -> Self {
        Self { config: Arc::new(config), warden }
    }
}

impl Handler for CommandHandler {
    fn run(&self, context: Context, permit: Permit) -> RunningHandler {
        let (config, warden) = (Arc::clone(&self.config), Arc::clone(&self.warden));
        Box::pin(async move {
            let _permit = permit;
            match run(&config, &warden, &context).await {
                Ok(output) => encode(context.task().args.codec, &output),
                Err(outcome) => outcome,
            }
        })
    }

    fn is_process(&self) -> bool {
        true
    }

    fn is_usable(&self) -> bool {
        start::is_usable(&self.config)
    }
}

async fn run(
    config: &CommandConfig,
    warden: &Arc<Warden>,
    context: &Context,
) -> Result<Box<RawValue>, Outcome> {
    let args = Args::of(&context.task().args).map_err(Outcome::BadArguments)?;
    let filled = config.argv.iter().map(|part| fill(part, &args));
    let filled = filled.collect::<Result<Vec<_>, _>>().map_err(Outcome::BadArguments)?;
    let group = start::start(config, &filled, warden, context).await?;
    let id = group.id;
    let mut communication = std::pin::pin!(communicate(group, config.stdin.then(|| args.line())));
    let output = tokio::select! {
        output = &mut communication => output,
        () = context.cancelled() => {
            signal(id, Signal::SIGTERM);
            communication.await.map_err(asked_to_end)
        }
    }?;
    output_value(config.output, output)
}

/// The arguments of a task as they were written, since numbers change when they are converted to floats.
struct Args<'a> {
    text: &'a str,
    /// By key; the last one of a duplicate key. Empty if the arguments are not an object.
    fields: HashMap<String, &'a RawValue>,
}

impl<'a> Args<'a> {
    fn of(payload: &'a Payload) -> Result<Self, String> {
        let text =
            payload.as_json().ok_or("a command takes JSON arguments, and these are not JSON")?;
        let sound = serde_json::from_str::<&RawValue>(text);
        let text = sound.map_err(|error| format!("a command takes JSON arguments: {error}"))?.get();
        Ok(Self { text, fields: serde_json::from_str(text).unwrap_or_default() })
    }

    /// All arguments in one line. JSON strings contain no line breaks, so each one is whitespace.
    fn line(&self) -> String {
        self.text.replace(['\r', '\n'], " ")
    }
}

/// Fills the placeholders of one part of the argument vector.
///
/// Braces around anything but a key (letters, digits, `_`, `-`, `.`) are text, so that awk or Python code
/// can be passed. A value at the beginning of the part must not begin with `-`: it would be an option.
fn fill(part: &str, args: &Args<'_>) -> Result<String, String> {
    let mut filled = String::new();
    let mut rest = part;
    while let Some((before, after)) = rest.split_once('{') {
        filled.push_str(before);
        let Some((key, behind)) = after.split_once('}').filter(|(key, _)| is_name(key)) else {
            filled.push('{');
            rest = after;
            continue;
        };
        let value = placeholder(key, args)?;
        if filled.is_empty() && value.starts_with('-') {
            return Err(format!(
                "argument {key:?} begins with \"-\" and would be read as an option"
            ));
        }
        filled.push_str(&value);
        rest = behind;
    }
    filled.push_str(rest);
    Ok(filled)
}

fn is_name(key: &str) -> bool {
    let first = key.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    first && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

fn placeholder(key: &str, args: &Args<'_>) -> Result<String, String> {
    let value = args.fields.get(key).ok_or_else(|| format!("argument {key:?} is missing"))?.get();
    let refused = || format!("argument {key:?} must be a string, a number or a boolean");
    match value.bytes().next() {
        Some(b'"') => match serde_json::from_str::<String>(value) {
            Ok(text) if text.contains('\0') => {
                Err(format!("argument {key:?} contains a zero byte"))
            }
            Ok(text) => Ok(text),
            Err(_) => Err(refused()),
        },
        Some(b'-' | b'0'..=b'9' | b't' | b'f') => Ok(value.to_owned()),
        _ => Err(refused()),
    }
}

/// The exit code of a program that was asked to end says nothing about the task.
fn asked_to_end(outcome: Outcome) -> Outcome {
    match outcome {
        Outcome::Failed(error) => {
            Outcome::Failed(TaskError::retry(format!("told to end: {}", error.message())))
        }
        other @ (Outcome::Succeeded(_)
        | Outcome::BadArguments(_)
        | Outcome::TimedOut(_)
        | Outcome::Panicked(_)
        | Outcome::Crashed(_)
        | Outcome::Interrupted
        | Outcome::NotStarted(_)
        | Outcome::Cancelled) => other,
    }
}

/// Writes the input of the program, reads its output and waits for its end.
async fn communicate(mut group: Group, input: Option<String>) -> Result<Vec<u8>, Outcome> {
    let child = &mut group.child;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input)
            && let Err(error) = stdin.write_all(input.as_bytes()).await
        {
            // A program may exit without reading; its exit code decides.
            tracing::debug!(%error, "the command did not read its input");
        }
    };
    // Outside the future that fills them, which may be cancelled.
    let (mut output, mut tail) = (vec![], vec![]);
    let (status, read) = {
        let mut pipes = std::pin::pin!(async {
            let (read, tail) = (read_capped(stdout, &mut output), read_tail(stderr, &mut tail));
            tokio::join!(feed, read, tail).1
        });
        let (status, read) = tokio::select! {
            read = &mut pipes => (child.wait().await, Some(read)),
            status = child.wait() => (status, None),
        };
        let read = match read {
            Some(read) => read,
            None => finish_reading(&mut pipes, &mut group).await,
        };
        (status, read)
    };
    let failed = |error: std::io::Error| Outcome::Failed(TaskError::retry(error.to_string()));
    let status = status.map_err(failed)?;
    read.map_err(failed)?;
    match check_status(status, String::from_utf8_lossy(&tail).trim()) {
        Ok(()) if output.len() as u64 > MAX_STDOUT_BYTES => {
            Err(Outcome::fatal(format!("the command wrote more than {MAX_STDOUT_BYTES} bytes")))
        }
        Ok(()) => Ok(output),
        Err(error) => Err(Outcome::Failed(error)),
    }
}

/// Reads the rest of the output of a program that has ended. A process that it left behind may hold its
/// pipes open: processes of its group end with the task, others are not waited for.
async fn finish_reading(
    mut pipes: impl Future<Output = std::io::Result<()>> + Unpin,
    group: &mut Group,
) -> std::io::Result<()> {
    if let Ok(read) = timeout(PIPE_TIMEOUT, &mut pipes).await {
        return read;
    }
    group.kill();
    timeout(PIPE_TIMEOUT, pipes).await.unwrap_or(Ok(()))
}

fn check_status(status: ExitStatus, stderr: &str) -> Result<(), TaskError> {
    let said = if stderr.is_empty() { String::new() } else { format!(": {stderr}") };
    match status.code() {
        Some(0) => Ok(()),
        Some(EX_TEMPFAIL) => Err(TaskError::retry(format!("exit code 75 (try again){said}"))),
        Some(code) => Err(TaskError::fatal(format!("exit code {code}{said}"))),
        // A signal usually has an external cause: out of memory, an operator, a shutdown.
        None => Err(TaskError::retry(format!("ended by {status}{said}"))),
    }
}

async fn read_capped(
    from: Option<impl AsyncRead + Unpin>,
    bytes: &mut Vec<u8>,
) -> std::io::Result<()> {
    if let Some(mut from) = from {
        (&mut from).take(MAX_STDOUT_BYTES + 1).read_to_end(bytes).await?;
        // The rest is read and discarded, since the program would block on a full pipe.
        tokio::io::copy(&mut from, &mut tokio::io::sink()).await?;
    }
    Ok(())
}

/// Keeps the end of the output: programs usually report their error last.
async fn read_tail(from: Option<impl AsyncRead + Unpin>, tail: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        tail.extend_from_slice(&buffer[..count]);
        let excess = tail.len().saturating_sub(MAX_STDERR_BYTES);
        tail.drain(..excess);
    }
}

/// The output of a program as JSON: unchanged if it is JSON, otherwise as a string.
fn output_value(mode: CommandOutput, stdout: Vec<u8>) -> Result<Box<RawValue>, Outcome> {
    let fatal = |problem: String| Outcome::fatal(problem);
    let written = String::from_utf8(stdout).map_err(|error| {
        let place = error.utf8_error().valid_up_to() + 1;
        fatal(format!("the command's output is not UTF-8 at byte {place}; let it write base64"))
    })?;
    // `Value` refuses numbers outside the range of floats, which few readers accept.
    let json = serde_json::from_str::<Value>(&written)
        .and_then(|_| serde_json::from_str::<Box<RawValue>>(&written));
    let text = |text: &str| {
        let quoted = to_raw_value(text);
        quoted.map_err(|error| fatal(format!("the command's output cannot be sent: {error}")))
    };
    match (mode, json) {
        (CommandOutput::Json | CommandOutput::Auto, Ok(json)) => Ok(json),
        (CommandOutput::Json, Err(error)) => {
            Err(fatal(format!("the command's output is not JSON: {error}")))
        }
        (CommandOutput::Text, _) => text(&written),
        (CommandOutput::Auto, Err(_)) => text(written.strip_suffix('\n').unwrap_or(&written)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Codec;

    fn fill_from(part: &str, args: &str) -> Result<String, String> {
        let bytes = args.as_bytes().to_vec().into();
        fill(part, &Args::of(&Payload { codec: Codec::Json, bytes })?)
    }

    #[test]
    fn placeholders_are_filled_and_checked() {
        let args = r#"{"src": "a b.png", "user-id": 7, "a.b": true, "n": 3, "deep": {}, "evil": "--output=/etc/passwd"}"#;
        let fill = |part: &str| fill_from(part, args);
        assert_eq!(fill("{src}"), Ok("a b.png".to_owned()));
        assert_eq!(fill("--size={n}x{n}"), Ok("--size=3x3".to_owned()));
        assert_eq!(fill("{user-id}/{a.b}"), Ok("7/true".to_owned()));
        assert_eq!(fill("--name={evil}"), Ok("--name=--output=/etc/passwd".to_owned()));
        for text in ["plain {", "{print $1}", "f'{os.getpid()}'", "{}", "}{", "a{3}", "{-x}"] {
            assert_eq!(fill(text), Ok(text.to_owned()));
        }
        assert_eq!(fill("{{n}}"), Ok("{3}".to_owned()));
        assert!(fill("{evil}").unwrap_err().contains("option"));
        assert!(fill("{deep}").unwrap_err().contains("must be a string"));
        assert!(fill("{none}").unwrap_err().contains("missing"));
    }

    #[test]
    fn a_value_is_not_filled_a_second_time() {
        assert_eq!(fill_from("{a}", r#"{"a": "{b}", "b": "no"}"#), Ok("{b}".to_owned()));
    }

    #[test]
    fn numbers_stay_as_they_were_written() {
        for number in ["18446744073709551616", "1.10", "1E5", "0.1000000000000000055511", "-0"] {
            let args = format!("{{\"n\":\n {number} }}");
            assert_eq!(fill_from("x{n}", &args), Ok(format!("x{number}")));
            let output = output_value(CommandOutput::Auto, format!("{number}\n").into_bytes());
            assert_eq!(output.unwrap().get(), number);
        }
        let payload = Payload { codec: Codec::Json, bytes: (&b"{\"n\":\n1.10}\n"[..]).into() };
        assert_eq!(Args::of(&payload).unwrap().line(), "{\"n\": 1.10}");
        assert_eq!(fill_from("{n}", r#"{"n": 1, "n": true}"#), Ok("true".to_owned()));
    }

    #[test]
    fn output_is_json_where_it_can_be() {
        let auto = |text: &str| output_value(CommandOutput::Auto, text.as_bytes().to_vec());
        assert_eq!(auto("{\"a\":1}\n").unwrap().get(), "{\"a\":1}");
        assert_eq!(auto("hello\n").unwrap().get(), "\"hello\"");
        assert!(output_value(CommandOutput::Json, b"hello".to_vec()).is_err());
    }

    #[test]
    fn output_that_is_not_text_is_refused_and_not_altered() {
        for mode in [CommandOutput::Auto, CommandOutput::Text, CommandOutput::Json] {
            let refused = output_value(mode, b"ab\xff".to_vec()).unwrap_err();
            assert!(
                matches!(refused, Outcome::Failed(error) if error.message().contains("byte 3"))
            );
        }
    }
}
