//! How a command ends: exit codes, and errors that say in one sentence what is wrong and in another
//! what to do. How they look is [`output`](super::output)'s business, which arises where the commands'.

use std::process::ExitCode;

use garenne_common::broker::BrokerError;
use garenne_common::config::ConfigError;
use garenne_producer::{OutputError, QueryError, SubmitError};

use super::difference::Difference;

/// What the exit code says. `garenne --help` lists them for users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
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
    pub const fn code(self) -> u8 {
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
pub struct CliError {
    /// What is wrong: one sentence, without a full stop.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// What the shell hears.
    pub exit: Exit,
}

impl CliError {
    /// It cannot be done (exit code 2).
    pub fn unusable(message: impl Into<String>) -> Self {
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
    pub fn unexpected_answer() -> Self {
        Self::unusable("the collector answered another question")
            .help("are garenne and garenne-collector of the same version?")
    }

    /// With what to do about it.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// With another exit code.
    pub const fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
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
            OutputError::Decode { .. }
            | OutputError::Conflict { .. }
            | OutputError::Closed { .. } => Exit::Unusable,
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
