//! Compares declarations with the broker and, if asked to, declares what is missing.

use garenne_common::broker::{Admin, BrokerError};
use garenne_common::topology::Declaration;
use serde::Serialize;

use crate::difference::Difference;
use crate::error::CliError;

/// The state of an object on the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ObjectState {
    /// It exists as declared.
    Exists,
    /// It was missing and has been declared.
    Created,
    /// It is missing.
    Missing,
    /// It exists with other properties.
    Conflict(Difference),
}

/// Declarations and their states. AMQP cannot check a binding, so it has the state of its queue.
pub(crate) struct Plan(pub(super) Vec<(Declaration, ObjectState)>);

impl Plan {
    /// Compares each declaration with the broker and, with `apply`, declares what is missing. Fails
    /// if the broker cannot be used; a conflict is a state and not an error.
    pub(crate) async fn make(
        admin: &Admin,
        wanted: Vec<Declaration>,
        apply: bool,
    ) -> Result<Self, BrokerError> {
        let mut plan = vec![];
        // Exchanges first, because queues refer to them.
        let (exchanges, others): (Vec<_>, Vec<_>) =
            wanted.into_iter().partition(|d| matches!(d, Declaration::Exchange { .. }));
        for declaration in exchanges.into_iter().chain(others) {
            let state = state_of(admin, &declaration, apply).await?;
            plan.push((declaration, state));
        }
        Ok(Self(plan))
    }

    /// The number of objects in this state.
    pub(crate) fn count(&self, state: &ObjectState) -> usize {
        self.0.iter().filter(|(_, found)| found == state).count()
    }

    /// The number of objects.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The first conflict, as an error of the command.
    pub(crate) fn first_conflict(&self) -> Option<CliError> {
        let conflict = |(declaration, state): &(Declaration, ObjectState)| match state {
            ObjectState::Conflict(difference) => Some(conflict(declaration, difference)),
            ObjectState::Exists | ObjectState::Created | ObjectState::Missing => None,
        };
        self.0.iter().find_map(conflict)
    }
}

async fn state_of(
    admin: &Admin,
    declaration: &Declaration,
    apply: bool,
) -> Result<ObjectState, BrokerError> {
    let exists = admin.exists(declaration).await?;
    let binding = matches!(declaration, Declaration::Binding { .. });
    if !apply && (!exists || binding) {
        return Ok(if exists { ObjectState::Exists } else { ObjectState::Missing });
    }
    // Declaring an object that exists changes nothing, and is the only way to learn that it
    // differs.
    match admin.declare(std::slice::from_ref(declaration)).await {
        Ok(()) => Ok(if exists { ObjectState::Exists } else { ObjectState::Created }),
        Err(BrokerError::Conflict { cause, .. }) => {
            Ok(ObjectState::Conflict(Difference::read(&cause)))
        }
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
    fn a_conflict_names_the_actual_and_the_wanted_value() {
        let cause = "PRECONDITION_FAILED - inequivalent arg 'x-message-ttl' for queue \
                     'g.delay.00' in vhost '/': received the value '100' of type 'signedint' but \
                     current is none";
        let difference = Difference::read(cause);
        assert_eq!(difference.argument.as_deref(), Some("x-message-ttl"));
        let queue = Declaration::exclusive_queue("g.delay.00".to_owned());
        let message = conflict(&queue, &difference).message;
        let wanted = "the queue g.delay.00 exists, but x-message-ttl is none, wanted is '100'";
        assert_eq!(message, wanted);
    }
}
