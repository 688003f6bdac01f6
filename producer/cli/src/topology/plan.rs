//! What the topology wants, compared with the broker; and what is missing, declared.

use garenne_common::broker::{Admin, BrokerError};
use garenne_common::topology::Declaration;
use serde::Serialize;

use crate::difference::Difference;
use crate::error::CliError;

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
}
