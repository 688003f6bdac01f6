//! How a command ends: exit codes, and errors that say in one sentence what is wrong and in another
//! what to do. Rendering is here too; which error arises where is the commands' business.

use std::io::Write;
use std::process::ExitCode;

use garenne_common::broker::BrokerError;
use garenne_common::config::{ConfigError, without_logins};
use garenne_producer::{OutputError, QueryError, SubmitError};
use serde_json::json;

use super::output::{self, Format, Paint};
use super::topology::Difference;

/// What the exit code says. `garenne --help` lists them for users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done as asked.
    Success,
    /// It was done, and the answer is no: a task failed, a check found a problem.
    Failed,
    /// It could not be done: wrong usage, bad input, no broker, no collector.
    Unusable,
    /// The time given passed before the end, or the collector does not know the id (yet).
    NotYet,
    /// Ctrl-C.
    Interrupted,
    /// SIGTERM.
    Terminated,
    /// SIGHUP: the terminal was closed.
    HungUp,
    /// Whoever read standard output went away; what a process killed by SIGPIPE would say.
    BrokenPipe,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

impl Exit {
    /// The number that the shell sees.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failed => 1,
            Self::Unusable => 2,
            Self::NotYet => 3,
            Self::HungUp => 129,
            Self::Interrupted => 130,
            Self::BrokenPipe => 141,
            Self::Terminated => 143,
        }
    }
}

/// Why a command ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CliError {
    /// What is wrong: one sentence, without a full stop.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) help: Option<String>,
    /// What the shell hears.
    pub(crate) exit: Exit,
}

impl CliError {
    /// It cannot be done (exit code 2).
    pub(crate) fn unusable(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None, exit: Exit::Unusable }
    }

    /// A library's sentence, whose advice stands after the last semicolon.
    fn from_sentence(sentence: &str) -> Self {
        match sentence.rsplit_once("; ") {
            Some((message, help)) => Self::unusable(message).help(help),
            None => Self::unusable(sentence),
        }
    }

    /// An answer to another question than the one asked.
    pub(crate) fn unexpected_answer() -> Self {
        Self::unusable("the collector answered another question")
            .help("are garenne and garenne-collector of the same version?")
    }

    /// With what to do about it.
    pub(crate) fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// With another exit code.
    pub(crate) const fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// Writes it on standard error. A broken pipe says nothing: its reader has left on purpose.
    pub(crate) fn print(&self, format: Format) {
        if self.exit == Exit::BrokenPipe {
            return;
        }
        let text = match format {
            Format::Text => self.as_text(Paint::for_stderr()),
            Format::Json => self.as_json(),
        };
        // Standard error is the last place to complain; if it is closed there is no other.
        drop(writeln!(std::io::stderr(), "{}", output::harmless(&without_logins(&text))));
    }

    fn as_text(&self, paint: Paint) -> String {
        let error = format!("{} {}", paint.red("error:"), self.message);
        match &self.help {
            Some(help) => format!("{error}\n {} {help}", paint.cyan("help:")),
            None => error,
        }
    }

    fn as_json(&self) -> String {
        let mut value = json!({ "error": self.message, "exit_code": self.exit.code() });
        if let Some(help) = &self.help {
            value["help"] = json!(help);
        }
        value.to_string()
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        Self::unusable(error.to_string())
    }
}

impl From<BrokerError> for CliError {
    fn from(error: BrokerError) -> Self {
        let help = help_for(&error);
        if let BrokerError::Conflict { object, cause } = &error {
            let difference = Difference::read(cause);
            let message = format!("the {object} exists, but {difference}");
            return Self { message, help, exit: Exit::Unusable };
        }
        // The library's sentence ends with its own advice; here advice has a line of its own.
        let message = error.to_string();
        let message = message.split_once("; ").map_or(message.as_str(), |(what, _)| what);
        Self { message: message.to_owned(), help, exit: Exit::Unusable }
    }
}

impl From<SubmitError> for CliError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Broker(error) => error.into(),
            SubmitError::Unconfirmed { id, source } => {
                let cause = Self::from(source).message;
                Self::unusable(format!("task {id} may or may not be with the broker: {cause}"))
                    .help(format!(
                        "submit it again with --id {id}; an id ends once however often it came"
                    ))
            }
            SubmitError::Invalid(_)
            | SubmitError::UnknownQueue { .. }
            | SubmitError::TooLarge { .. } => Self::from_sentence(&error.to_string()),
        }
    }
}

impl From<QueryError> for CliError {
    fn from(error: QueryError) -> Self {
        match error {
            QueryError::Broker(error) => error.into(),
            QueryError::NoCollector { .. } => Self::from_sentence(&error.to_string())
                .help("start `garenne-collector` on this broker and namespace; `garenne doctor` finds out more"),
            QueryError::NotDone { .. } => {
                Self::from_sentence(&error.to_string()).exit(Exit::NotYet)
            }
            QueryError::Refused(_)
            | QueryError::Malformed(_)
            | QueryError::UnknownQueue { .. } => {
                Self::from_sentence(&error.to_string())
            }
        }
    }
}

impl From<OutputError> for CliError {
    fn from(error: OutputError) -> Self {
        let exit = match error {
            OutputError::NoAnswer { .. } => Exit::NotYet,
            OutputError::Failed { .. } | OutputError::Cancelled { .. } => Exit::Failed,
            OutputError::Decode { .. } | OutputError::Closed { .. } => Exit::Unusable,
        };
        Self::from_sentence(&error.to_string()).exit(exit)
    }
}

fn help_for(error: &BrokerError) -> Option<String> {
    let help = match error {
        BrokerError::Unreachable { .. } => {
            "is RabbitMQ running there? Another one: --url amqp://user:password@host:5672/vhost, or AMQP_URL"
        }
        BrokerError::LoginRefused { .. } => "check the user name and password in --url or AMQP_URL",
        BrokerError::NoVhost { .. } => {
            "create it with `rabbitmqctl add_vhost`, grant the user permissions there, or mend the URL's \
             path (/%2f is the default one)"
        }
        BrokerError::Forbidden(_) => {
            "grant the permission with `rabbitmqctl set_permissions`, or use another user"
        }
        BrokerError::Conflict { .. } => {
            "`garenne topology plan` shows the difference; delete the object, or use another --namespace"
        }
        BrokerError::Missing(_) => "`garenne topology apply` declares what is missing",
        BrokerError::Blocked(_) => {
            "free memory or disk on the broker; its management UI names the alarm"
        }
        BrokerError::Rejected(_) => {
            "the queue may have reached a length that a policy sets; look at it in the management UI"
        }
        BrokerError::Unconfirmed(_) => {
            "trying again with the same --id is safe; more time: --deadline 30s"
        }
        BrokerError::Lost(_) | BrokerError::Unreadable => {
            "try again; `garenne doctor` checks the way to the broker"
        }
        BrokerError::TookBack(_) => {
            "raise consumer_timeout on the broker and broker.consumer_timeout, or give tasks a shorter --timeout"
        }
        BrokerError::TooLong(_) | BrokerError::Closed => return None,
    };
    Some(help.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_has_its_own_line_and_stands_once() {
        let error = CliError::from(BrokerError::Unreachable {
            url: "amqp://h:1/%2f".to_owned(),
            cause: "Connection refused".to_owned(),
        });
        let text = error.as_text(Paint::plain());
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(
            text.starts_with(
                "error: cannot reach RabbitMQ at amqp://h:1/%2f: Connection refused\n"
            )
        );
        assert_eq!(text.matches("running").count(), 1, "{text}");
    }

    #[test]
    fn json_errors_are_one_object() {
        let text = CliError::unusable("no \"x\"").help("do y").as_json();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value, json!({ "error": "no \"x\"", "help": "do y", "exit_code": 2 }));
    }
}
