//! Command tasks: an external program as a handler.
//!
//! The program gets an argument vector and never passes through a shell. Task arguments fill `{key}`
//! placeholders, checked, or arrive on standard input as JSON. Exit code 0 is success, 75
//! (`EX_TEMPFAIL`) asks for another attempt, anything else is final.

use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use garenne_common::config::{CommandConfig, CommandOutput};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::context::Context;
use crate::handler::{Fault, Handler, Running, Slot, encode};
use crate::isolate::Warden;
use crate::outcome::TaskError;

mod start;

use start::{Group, signal};

/// What a program may write to standard output.
const MAX_STDOUT_BYTES: u64 = 8 * 1024 * 1024;
/// What is kept of standard error for the error text.
const MAX_STDERR_BYTES: usize = 2_000;
const EX_TEMPFAIL: i32 = 75;
/// How long a program that has ended may still be heard through its pipes.
const LAST_WORDS: Duration = Duration::from_millis(500);

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
    fn run(&self, context: Context, slot: Slot) -> Running {
        let (config, warden) = (Arc::clone(&self.config), Arc::clone(&self.warden));
        Box::pin(async move {
            let _slot = slot;
            run(&config, &warden, &context).await
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
) -> Result<garenne_common::Payload, Fault> {
    let args: Value =
        context.task().args.decode().map_err(|error| {
            Fault::BadArguments(format!("a command takes JSON arguments: {error}"))
        })?;
    let filled = config.argv.iter().map(|part| fill(part, &args));
    let filled = filled.collect::<Result<Vec<_>, _>>().map_err(Fault::BadArguments)?;
    let group = start::start(config, &filled, warden, context).await?;
    let id = group.id;
    let mut talk = std::pin::pin!(talk(group, config.stdin.then(|| args.to_string())));
    let output = tokio::select! {
        output = &mut talk => output,
        () = context.cancelled() => {
            signal(id, Signal::SIGTERM);
            talk.await.map_err(told_to_end)
        }
    }?;
    output_value(config.output, output).and_then(|value| encode(context.task().args.codec, &value))
}

/// Fills the placeholders of one part of the argument vector.
///
/// Braces around anything but a plain name are text, so that programs of awk or Python pass. A value
/// that would be the whole beginning of the part must not begin with `-`: it would become an option.
fn fill(part: &str, args: &Value) -> Result<String, String> {
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
    first && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn placeholder(key: &str, args: &Value) -> Result<String, String> {
    match args.get(key) {
        Some(Value::String(text)) if text.contains('\0') => {
            Err(format!("argument {key:?} contains a zero byte"))
        }
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(number)) => Ok(number.to_string()),
        Some(Value::Bool(truth)) => Ok(truth.to_string()),
        Some(Value::Null | Value::Array(_) | Value::Object(_)) => {
            Err(format!("argument {key:?} must be a string, a number or a boolean"))
        }
        None => Err(format!("argument {key:?} is missing")),
    }
}

/// What a program says that was told to end is no word on the task itself.
fn told_to_end(fault: Fault) -> Fault {
    match fault {
        Fault::Failed(error) => {
            Fault::Failed(TaskError::retry(format!("told to end: {}", error.message())))
        }
        other @ (Fault::BadArguments(_)
        | Fault::Panicked(_)
        | Fault::Interrupted
        | Fault::Crashed(_)
        | Fault::Unable(_)) => other,
    }
}

/// Feeds the program, collects what it says and waits for its end.
async fn talk(mut group: Group, input: Option<String>) -> Result<Vec<u8>, Fault> {
    let child = &mut group.child;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feed = async {
        if let (Some(mut stdin), Some(input)) = (stdin, input)
            && let Err(error) = stdin.write_all(input.as_bytes()).await
        {
            // A program may exit without reading; its exit code is what counts.
            tracing::debug!(%error, "the command did not read its input");
        }
    };
    // Outside the future that fills them, which may have to be given up.
    let (mut output, mut tail) = (vec![], vec![]);
    let (status, heard) = {
        let mut talk = std::pin::pin!(async {
            let (read, tail) = (read_capped(stdout, &mut output), read_tail(stderr, &mut tail));
            tokio::join!(feed, read, tail).1
        });
        let (status, heard) = tokio::select! {
            heard = &mut talk => (child.wait().await, Some(heard)),
            status = child.wait() => (status, None),
        };
        let heard = match heard {
            Some(heard) => heard,
            None => last_words(&mut talk, &mut group).await,
        };
        (status, heard)
    };
    let failed = |error: std::io::Error| Fault::Failed(TaskError::retry(error.to_string()));
    let status = status.map_err(failed)?;
    heard.map_err(failed)?;
    match verdict(status, String::from_utf8_lossy(&tail).trim()) {
        Ok(()) if output.len() as u64 > MAX_STDOUT_BYTES => Err(Fault::Failed(TaskError::fatal(
            format!("the command wrote more than {MAX_STDOUT_BYTES} bytes"),
        ))),
        Ok(()) => Ok(output),
        Err(error) => Err(Fault::Failed(error)),
    }
}

/// Hears a program out that has ended. A process that it left behind may hold its pipes open: one of its
/// group ends with the task, and one in a session of its own is not waited for.
async fn last_words(
    mut talk: impl Future<Output = std::io::Result<()>> + Unpin,
    group: &mut Group,
) -> std::io::Result<()> {
    if let Ok(heard) = timeout(LAST_WORDS, &mut talk).await {
        return heard;
    }
    group.kill();
    timeout(LAST_WORDS, talk).await.unwrap_or(Ok(()))
}

fn verdict(status: ExitStatus, stderr: &str) -> Result<(), TaskError> {
    let said = if stderr.is_empty() { String::new() } else { format!(": {stderr}") };
    match status.code() {
        Some(0) => Ok(()),
        Some(EX_TEMPFAIL) => Err(TaskError::retry(format!("exit code 75 (try again){said}"))),
        Some(code) => Err(TaskError::fatal(format!("exit code {code}{said}"))),
        // A signal is hardly the program's own word: out of memory, an operator, a shutdown.
        None => Err(TaskError::retry(format!("ended by {status}{said}"))),
    }
}

async fn read_capped(
    from: Option<impl AsyncRead + Unpin>,
    bytes: &mut Vec<u8>,
) -> std::io::Result<()> {
    if let Some(mut from) = from {
        (&mut from).take(MAX_STDOUT_BYTES + 1).read_to_end(bytes).await?;
        // The rest is read and dropped, or the program would hang on a full pipe.
        tokio::io::copy(&mut from, &mut tokio::io::sink()).await?;
    }
    Ok(())
}

/// The end of what was written: errors say last what went wrong.
async fn read_tail(from: Option<impl AsyncRead + Unpin>, tail: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        tail.extend_from_slice(&buffer[..count]);
        let excess = tail.len().saturating_sub(MAX_STDERR_BYTES);
        tail.drain(..excess);
    }
}

fn output_value(mode: CommandOutput, stdout: Vec<u8>) -> Result<Value, Fault> {
    let json = |error| TaskError::fatal(format!("the command's output is not JSON: {error}"));
    let text = |stdout: Vec<u8>| String::from_utf8_lossy(&stdout).into_owned();
    match mode {
        CommandOutput::Json => serde_json::from_slice(&stdout).map_err(json).map_err(Fault::Failed),
        CommandOutput::Text => Ok(Value::String(text(stdout))),
        CommandOutput::Auto => Ok(serde_json::from_slice(&stdout).unwrap_or_else(|_| {
            let text = text(stdout);
            Value::String(text.strip_suffix('\n').unwrap_or(&text).to_owned())
        })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn placeholders_are_filled_and_checked() {
        let args = json!({"src": "a b.png", "n": 3, "deep": {}, "evil": "--output=/etc/passwd"});
        assert_eq!(fill("{src}", &args), Ok("a b.png".to_owned()));
        assert_eq!(fill("--size={n}x{n}", &args), Ok("--size=3x3".to_owned()));
        assert_eq!(fill("--name={evil}", &args), Ok("--name=--output=/etc/passwd".to_owned()));
        for text in ["plain {", "{print $1}", "f'{os.getpid()}'", "{}", "}{"] {
            assert_eq!(fill(text, &args), Ok(text.to_owned()));
        }
        assert_eq!(fill("{{n}}", &args), Ok("{3}".to_owned()));
        assert!(fill("{evil}", &args).unwrap_err().contains("option"));
        assert!(fill("{deep}", &args).unwrap_err().contains("must be a string"));
        assert!(fill("{none}", &args).unwrap_err().contains("missing"));
    }

    #[test]
    fn a_value_is_not_filled_a_second_time() {
        let args = json!({"a": "{b}", "b": "no"});
        assert_eq!(fill("{a}", &args), Ok("{b}".to_owned()));
    }

    #[test]
    fn output_is_json_where_it_can_be() {
        let auto =
            |text: &str| output_value(CommandOutput::Auto, text.as_bytes().to_vec()).unwrap();
        assert_eq!(auto("{\"a\":1}\n"), json!({"a": 1}));
        assert_eq!(auto("hello\n"), json!("hello"));
        assert!(output_value(CommandOutput::Json, b"hello".to_vec()).is_err());
    }
}
