//! The last step of every submission: which tasks share a message, and its way to their queue.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{BrokerError, Outgoing, Publisher};
use garenne_common::bundling::{DurationEstimates, Limits};
use garenne_common::topology::Topology;
use garenne_common::wire::{self, Message};
use garenne_common::{TaskMessage, TaskName};
use tokio::time::Instant;

use crate::deadline::left;

/// A task that is ready to go, and what its submitter needs to know it by.
pub(crate) struct Parcel<T> {
    pub(crate) task: TaskMessage,
    pub(crate) delay: Duration,
    pub(crate) tag: T,
}

/// Publishes tasks, alone or in bundles.
pub(crate) struct Dispatch {
    pub(crate) publisher: Publisher,
    pub(crate) topology: Topology,
    /// Who sends, the `app_id` of messages.
    pub(crate) app: String,
    /// What bounds a bundle.
    pub(crate) limits: Limits,
    /// How long tasks took whose results came back.
    pub(crate) pace: Arc<DurationEstimates>,
}

impl Dispatch {
    /// Divides tasks into those that share a message. Of tasks whose time nobody knows yet, at most
    /// `unknown` go together.
    pub(crate) fn divide<T>(&self, parcels: Vec<Parcel<T>>, unknown: u32) -> Vec<Vec<Parcel<T>>> {
        let unknown = self.limits.work / unknown;
        let estimate = |name: &TaskName| self.pace.estimate(name).unwrap_or(unknown);
        let divide = |alike| self.limits.divide(alike, |parcel: &Parcel<T>| &parcel.task, estimate);
        alike(parcels).into_iter().flat_map(divide).collect()
    }

    /// Publishes tasks of one queue, priority and due time in one message, and waits for its confirm.
    /// Whoever drops this before it was sent has withdrawn it.
    pub(crate) fn send<'d, T>(
        &'d self,
        parcels: &[Parcel<T>],
        by: Instant,
    ) -> impl Future<Output = Result<(), BrokerError>> + use<'d, T> {
        // Encoded at once, so that what is sent is free to be looked after meanwhile.
        let outgoing = self.outgoing(parcels);
        async move {
            let Some(outgoing) = outgoing? else { return Ok(()) };
            self.publisher.publish_within(outgoing, left(by)).await
        }
    }

    fn outgoing<T>(&self, parcels: &[Parcel<T>]) -> Result<Option<Outgoing>, BrokerError> {
        let Some(first) = parcels.first() else { return Ok(None) };
        let message = if parcels.len() == 1 {
            wire::task::encode(&first.task, &self.app)
        } else {
            let tasks = parcels.iter().map(|parcel| &parcel.task);
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

    /// Publishes a message, and waits for its confirm.
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

/// Parcels that may share a message with each other, in their order. Mostly that is all of them.
fn alike<T>(parcels: Vec<Parcel<T>>) -> Vec<Vec<Parcel<T>>> {
    if parcels.windows(2).all(|pair| go_together(&pair[0], &pair[1])) {
        return vec![parcels];
    }
    let mut alike: Vec<Vec<Parcel<T>>> = vec![];
    for parcel in parcels {
        match alike.iter_mut().rev().find(|others| go_together(&others[0], &parcel)) {
            Some(others) => others.push(parcel),
            None => alike.push(vec![parcel]),
        }
    }
    alike
}

fn go_together<T>(one: &Parcel<T>, other: &Parcel<T>) -> bool {
    one.task.queue == other.task.queue
        && one.delay == other.delay
        && one.task.options.priority == other.task.options.priority
}
