//! What the topology wants, compared with the broker; and what is missing, declared.

use garenne_common::QueueName;
use garenne_common::broker::{Admin, BrokerError};
use garenne_common::topology::{Declaration, Topology};
use serde::Serialize;

use crate::cli::error::CliError;

/// All declarations of the namespace and of these queues, each once.
pub(crate) fn wanted(topology: &Topology, queues: &[QueueName]) -> Vec<Declaration> {
    let mut all = topology.core();
    for declaration in queues.iter().flat_map(|queue| topology.task_queue_declarations(queue)) {
        if !all.contains(&declaration) {
            all.push(declaration);
        }
    }
    all
}

/// How an object stands on the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// As it should be.
    Exists,
    /// It was missing and has been declared.
    Created,
    /// It is missing.
    Missing,
    /// It exists with other properties.
    Conflict(Difference),
}

/// What differs, in the broker's terms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Difference {
    /// Which argument or property, where the broker says so.
    pub(super) argument: Option<String>,
    /// What the broker says, whole.
    pub(super) cause: String,
}

/// Declarations and how each stands. A binding cannot be asked for; it stands as its queue does.
pub(crate) struct Plan(pub(super) Vec<(Declaration, State)>);

impl Plan {
    /// Compares each declaration with the broker and, if `apply`, declares what is missing.
    pub(crate) async fn make(
        admin: &Admin,
        wanted: Vec<Declaration>,
        apply: bool,
    ) -> Result<Self, BrokerError> {
        let mut plan = vec![];
        // Exchanges first: queues name them.
        let (exchanges, others): (Vec<_>, Vec<_>) =
            wanted.into_iter().partition(|d| matches!(d, Declaration::Exchange { .. }));
        for declaration in exchanges.into_iter().chain(others) {
            let state = state_of(admin, &declaration, apply).await?;
            plan.push((declaration, state));
        }
        Ok(Self(plan))
    }

    /// How many stand like this.
    pub(crate) fn count(&self, state: &State) -> usize {
        self.0.iter().filter(|(_, found)| found == state).count()
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The first conflict, as the error of a command.
    pub(crate) fn first_conflict(&self) -> Option<CliError> {
        let conflict = |(declaration, state): &(Declaration, State)| match state {
            State::Conflict(difference) => Some(conflict(declaration, difference)),
            State::Exists | State::Created | State::Missing => None,
        };
        self.0.iter().find_map(conflict)
    }
}

async fn state_of(
    admin: &Admin,
    declaration: &Declaration,
    apply: bool,
) -> Result<State, BrokerError> {
    let exists = admin.exists(declaration).await?;
    let binding = matches!(declaration, Declaration::Binding { .. });
    if !apply && (!exists || binding) {
        return Ok(if exists { State::Exists } else { State::Missing });
    }
    // Declaring what exists changes nothing, and is the only way to hear that it differs.
    match admin.declare(std::slice::from_ref(declaration)).await {
        Ok(()) => Ok(if exists { State::Exists } else { State::Created }),
        Err(BrokerError::Conflict { cause, .. }) => Ok(State::Conflict(difference(&cause))),
        Err(error) => Err(error),
    }
}

/// Reads the argument's name out of `inequivalent arg 'x-message-ttl' for queue …`.
fn difference(cause: &str) -> Difference {
    let argument =
        cause.split_once("inequivalent arg '").and_then(|(_, rest)| rest.split_once('\''));
    Difference {
        argument: argument.map(|(name, _)| name.to_owned()),
        cause: cause.trim_start_matches("PRECONDITION_FAILED - ").to_owned(),
    }
}

fn conflict(declaration: &Declaration, difference: &Difference) -> CliError {
    let what = match declaration {
        Declaration::Exchange { .. } => "exchange",
        Declaration::Queue { .. } => "queue",
        Declaration::Binding { .. } => "binding of queue",
    };
    let name = declaration.name();
    let message = match &difference.argument {
        Some(argument) => {
            format!("the {what} {name} exists with another {argument}: {}", difference.cause)
        }
        None => format!("the {what} {name} exists with other properties: {}", difference.cause),
    };
    CliError::unusable(message).help(format!(
        "delete it in the management UI once it is empty (rabbitmqctl delete_queue for queues), or use \
         another --namespace than the one of {name}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Namespace;

    #[test]
    fn a_conflict_names_the_argument_that_differs() {
        let cause = "PRECONDITION_FAILED - inequivalent arg 'x-message-ttl' for queue 'g.delay.00' \
                     in vhost '/': received the value '100' of type 'signedint' but current is '200'";
        let difference = difference(cause);
        assert_eq!(difference.argument.as_deref(), Some("x-message-ttl"));
        let queue = Declaration::exclusive_queue("g.delay.00".to_owned());
        let error = conflict(&queue, &difference);
        let start = "the queue g.delay.00 exists with another x-message-ttl: inequivalent";
        assert!(error.message.starts_with(start), "{}", error.message);
    }

    #[test]
    fn every_declaration_is_wanted_once() {
        let topology = Topology::new(Namespace::new("g").unwrap());
        let queues = ["cpu", "cpu", "default"].map(|name| QueueName::new(name).unwrap());
        assert_eq!(wanted(&topology, &queues).len(), topology.core().len() + 2);
    }
}
