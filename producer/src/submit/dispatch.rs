//! The last step of every submission: dividing tasks into messages, and publishing a message.
//!
//! Checked tasks come in, messages with confirms go out. Decides which tasks share a message, not
//! when they are sent.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{BrokerError, Outgoing, Publisher};
use garenne_common::bundling::{DurationEstimates, Limits};
use garenne_common::topology::Topology;
use garenne_common::wire::{self, Message};
use garenne_common::{TaskMessage, TaskName};
use tokio::time::Instant;

use crate::deadline::left;

/// A checked task, and what its submitter identifies it by.
pub(crate) struct TaggedTask<T> {
    pub(crate) task: TaskMessage,
    /// How long the broker holds the task back.
    pub(crate) delay: Duration,
    pub(crate) tag: T,
}

/// Publishes tasks, alone or in bundles.
pub(crate) struct Dispatch {
    pub(crate) publisher: Publisher,
    pub(crate) topology: Topology,
    /// The `app_id` of messages.
    pub(crate) app: String,
    /// Limits of a bundle.
    pub(crate) limits: Limits,
    /// How long tasks took whose results came back, by name.
    pub(crate) durations: Arc<DurationEstimates>,
}

impl Dispatch {
    /// Divides tasks into groups that share a message each. `unmeasured` limits the number of tasks
    /// in a bundle for names whose duration has not been measured yet.
    pub(crate) fn divide<T>(
        &self,
        tasks: Vec<TaggedTask<T>>,
        unmeasured: u32,
    ) -> Vec<Vec<TaggedTask<T>>> {
        let assumed = self.limits.work / unmeasured;
        let estimate = |name: &TaskName| self.durations.estimate(name).unwrap_or(assumed);
        let divide =
            |group| self.limits.divide(group, |tagged: &TaggedTask<T>| &tagged.task, estimate);
        by_route(tasks).into_iter().flat_map(divide).collect()
    }

    /// Publishes tasks of one queue, priority and delay in one message, and waits for its confirm.
    ///
    /// Cancel safety: dropped before the message was sent, nothing is sent.
    pub(crate) fn send<'d, T>(
        &'d self,
        tasks: &[TaggedTask<T>],
        by: Instant,
    ) -> impl Future<Output = Result<(), BrokerError>> + use<'d, T> {
        // Encoded now, so that the future does not borrow the tasks and their callers can be
        // watched.
        let outgoing = self.outgoing(tasks);
        async move {
            let Some(outgoing) = outgoing? else { return Ok(()) };
            self.publisher.publish_within(outgoing, left(by)).await
        }
    }

    fn outgoing<T>(&self, tasks: &[TaggedTask<T>]) -> Result<Option<Outgoing>, BrokerError> {
        let Some(first) = tasks.first() else { return Ok(None) };
        let message = if tasks.len() == 1 {
            wire::task::encode(&first.task, &self.app)
        } else {
            let tasks = tasks.iter().map(|tagged| &tagged.task);
            // Names, ids and arguments that were checked always encode.
            wire::bundle::encode(tasks, &self.app)
                .map_err(|error| BrokerError::TooLong(error.to_string()))?
        };
        let (exchange, message) = match self.topology.delay_route(first.delay) {
            Some(route) => (route.exchange, wire::task::with_delay_marks(&message, &route.marks)),
            None => (self.topology.tasks_exchange(), message),
        };
        Ok(Some(Outgoing { exchange, routing_key: first.task.queue.to_string(), message }))
    }

    /// Publishes any message and waits for its confirm.
    pub(crate) async fn publish(
        &self,
        exchange: String,
        routing_key: String,
        message: Message,
        by: Instant,
    ) -> Result<(), BrokerError> {
        let outgoing = Outgoing { exchange, routing_key, message };
        self.publisher.publish_within(outgoing, left(by)).await
    }
}

/// Groups tasks that may share a message, in their order. Mostly one group with all of them.
fn by_route<T>(tasks: Vec<TaggedTask<T>>) -> Vec<Vec<TaggedTask<T>>> {
    if tasks.windows(2).all(|pair| same_route(&pair[0], &pair[1])) {
        return vec![tasks];
    }
    let mut groups: Vec<Vec<TaggedTask<T>>> = vec![];
    for task in tasks {
        match groups.iter_mut().rev().find(|group| same_route(&group[0], &task)) {
            Some(group) => group.push(task),
            None => groups.push(vec![task]),
        }
    }
    groups
}

fn same_route<T>(one: &TaggedTask<T>, other: &TaggedTask<T>) -> bool {
    one.task.queue == other.task.queue
        && one.delay == other.delay
        && one.task.options.priority == other.task.options.priority
}
