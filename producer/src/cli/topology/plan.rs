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

/// What differs, as far as the broker says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Difference {
    /// Which argument or property.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) argument: Option<String>,
    /// What is wanted and what is there, in words.
    detail: String,
}

impl Difference {
    /// Reads the broker's `inequivalent arg 'A' for queue 'Q' in vhost 'V': received the value 'W' of
    /// type 'T' but current is none`; other words are kept as they are.
    pub(crate) fn read(cause: &str) -> Self {
        let cause = cause.trim_start_matches("PRECONDITION_FAILED - ");
        let parts = cause
            .strip_prefix("inequivalent arg '")
            .and_then(|rest| rest.split_once('\''))
            .and_then(|(argument, rest)| Some((argument, rest.split_once(": received ")?.1)))
            .and_then(|(argument, rest)| Some((argument, rest.split_once(" but current is ")?)));
        match parts {
            Some((argument, (wanted, found))) => Self {
                argument: Some(argument.to_owned()),
                detail: format!("{argument} is {}, wanted is {}", value(found), value(wanted)),
            },
            None => Self { argument: None, detail: cause.to_owned() },
        }
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)
    }
}

/// `the value 'W' of type 'T'` without the words around it.
fn value(text: &str) -> &str {
    let text = text.strip_prefix("the value ").unwrap_or(text);
    text.split_once(" of type ").map_or(text, |(value, _)| value)
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
        Err(BrokerError::Conflict { cause, .. }) => Ok(State::Conflict(Difference::read(&cause))),
        Err(error) => Err(error),
    }
}

fn conflict(declaration: &Declaration, difference: &Difference) -> CliError {
    let name = declaration.name();
    let (what, how) = match declaration {
        Declaration::Exchange { .. } => ("exchange", "in the management UI".to_owned()),
        Declaration::Queue { .. } => {
            ("queue", format!("once it is empty (rabbitmqctl delete_queue {name})"))
        }
        Declaration::Binding { .. } => ("binding of queue", "in the management UI".to_owned()),
    };
    CliError::unusable(format!("the {what} {name} exists, but {difference}"))
        .help(format!("delete it {how}, or use another --namespace"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Namespace;

    #[test]
    fn a_conflict_says_what_is_there_and_what_is_wanted() {
        let cause = "PRECONDITION_FAILED - inequivalent arg 'x-message-ttl' for queue 'g.delay.00' \
                     in vhost '/': received the value '100' of type 'signedint' but current is none";
        let difference = Difference::read(cause);
        assert_eq!(difference.argument.as_deref(), Some("x-message-ttl"));
        let queue = Declaration::exclusive_queue("g.delay.00".to_owned());
        let message = conflict(&queue, &difference).message;
        let wanted = "the queue g.delay.00 exists, but x-message-ttl is none, wanted is '100'";
        assert_eq!(message, wanted);
    }

    #[test]
    fn words_that_are_not_understood_are_kept() {
        let difference = Difference::read("PRECONDITION_FAILED - something new");
        assert_eq!(difference, Difference { argument: None, detail: "something new".to_owned() });
    }

    #[test]
    fn every_declaration_is_wanted_once() {
        let topology = Topology::new(Namespace::new("g").unwrap());
        let queues = ["cpu", "cpu", "default"].map(|name| QueueName::new(name).unwrap());
        assert_eq!(wanted(&topology, &queues).len(), topology.core().len() + 2);
    }
}
