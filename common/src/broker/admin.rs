//! Declares, queries and deletes broker objects.
//!
//! Declarations of [`topology`](crate::topology) come in; names and arguments are never chosen
//! here.

use std::time::Duration;

use lapin::options::{
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions,
    QueueDeleteOptions, QueuePurgeOptions,
};
use lapin::types::FieldTable;
use lapin::{Channel, ExchangeKind as LapinKind};

use super::convert::{short, to_table};
use super::{BrokerError, Link};
use crate::topology::{Declaration, ExchangeKind};
use crate::wire::HeaderValue;

/// How long the broker may take for one response. A cluster under load is slow; one that has not
/// responded by then will not, although its connection may look healthy.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(30);

/// Waits for the broker's response to a request about `what`, within [`RESPONSE_TIMEOUT`].
pub(super) async fn response<T>(
    request: impl Future<Output = lapin::Result<T>>,
    what: &str,
) -> Result<T, BrokerError> {
    match tokio::time::timeout(RESPONSE_TIMEOUT, request).await {
        Ok(response) => response.map_err(|error| BrokerError::operating(&error, what)),
        Err(_) => {
            Err(BrokerError::Lost(format!("no response about {what} in {RESPONSE_TIMEOUT:?}")))
        }
    }
}

/// Operations on broker objects over one link.
#[derive(Clone)]
pub struct Admin(Link);

/// The status of a queue, as the broker reports it without delivering a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStatus {
    /// Messages ready to be delivered; unacknowledged deliveries are not counted.
    pub ready: u32,
    /// Consumers of the queue.
    pub consumers: u32,
}

impl Admin {
    /// Operations over this link.
    pub fn new(link: Link) -> Self {
        Self(link)
    }

    /// Declares everything that is missing.
    ///
    /// Fails with [`BrokerError::Conflict`] if an object exists with other properties.
    pub async fn declare(&self, declarations: &[Declaration]) -> Result<(), BrokerError> {
        declare(&self.0.channel().await?, declarations).await
    }

    /// Whether an object exists, without changing anything. AMQP has no query for bindings, so a
    /// binding counts as existing if its queue does.
    pub async fn exists(&self, declaration: &Declaration) -> Result<bool, BrokerError> {
        // A missing object closes the channel (AMQP 0-9-1, 404), so each query has its own.
        let channel = self.0.channel().await?;
        let found = match declaration {
            Declaration::Exchange { name, .. } => exchange_exists(&channel, name).await,
            Declaration::Queue { name, .. } | Declaration::Binding { queue: name, .. } => {
                queue_depth(&channel, name).await.map(drop)
            }
        };
        match found {
            Ok(()) => Ok(true),
            Err(BrokerError::Missing(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// How many messages are ready in a queue; `None` if the queue does not exist.
    pub async fn depth(&self, queue: &str) -> Result<Option<u32>, BrokerError> {
        match queue_depth(&self.0.channel().await?, queue).await {
            Ok(depth) => Ok(Some(depth)),
            Err(BrokerError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The status of a queue; `None` if it does not exist.
    pub async fn queue_status(&self, queue: &str) -> Result<Option<QueueStatus>, BrokerError> {
        match queue_status(&self.0.channel().await?, queue).await {
            Ok(status) => Ok(Some(status)),
            Err(BrokerError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Deletes all ready messages of a queue.
    pub async fn purge(&self, queue: &str) -> Result<(), BrokerError> {
        let channel = self.0.channel().await?;
        let purged = channel.queue_purge(short(queue)?, QueuePurgeOptions::default());
        response(purged, queue).await.map(drop)
    }

    /// Deletes an object with its contents. Bindings are left alone; they are deleted with their
    /// queue. A missing object is not an error.
    pub async fn delete(&self, declaration: &Declaration) -> Result<(), BrokerError> {
        let channel = self.0.channel().await?;
        let name = declaration.name();
        match declaration {
            Declaration::Exchange { .. } => {
                let options = ExchangeDeleteOptions::default();
                response(channel.exchange_delete(short(name)?, options), name).await
            }
            // Without if-empty and if-unused: on a quorum queue they close the connection (540).
            Declaration::Queue { .. } => {
                let options = QueueDeleteOptions::default();
                response(channel.queue_delete(short(name)?, options), name).await.map(drop)
            }
            Declaration::Binding { .. } => Ok(()),
        }
    }

    /// Deletes a binding; other objects are left alone. A missing binding is not an error.
    pub async fn unbind(&self, declaration: &Declaration) -> Result<(), BrokerError> {
        let Declaration::Binding { exchange, queue, routing_key, arguments } = declaration else {
            return Ok(());
        };
        let (queue_name, exchange, key) = (short(queue)?, short(exchange)?, short(routing_key)?);
        let arguments = to_table(arguments.iter().map(|(key, value)| (key.as_str(), value)))?;
        let channel = self.0.channel().await?;
        response(channel.queue_unbind(queue_name, exchange, key, arguments), queue).await
    }
}

async fn exchange_exists(channel: &Channel, name: &str) -> Result<(), BrokerError> {
    let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
    let found =
        channel.exchange_declare(short(name)?, LapinKind::Direct, options, FieldTable::default());
    response(found, name).await
}

async fn queue_depth(channel: &Channel, name: &str) -> Result<u32, BrokerError> {
    queue_status(channel, name).await.map(|status| status.ready)
}

pub(super) async fn queue_status(
    channel: &Channel,
    name: &str,
) -> Result<QueueStatus, BrokerError> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let queue = channel.queue_declare(short(name)?, options, FieldTable::default());
    let queue = response(queue, &format!("queue {name}")).await?;
    Ok(QueueStatus { ready: queue.message_count(), consumers: queue.consumer_count() })
}

/// Declares exchanges before queues and bindings: a queue may name an exchange for its dead
/// letters.
pub(super) async fn declare(
    channel: &Channel,
    declarations: &[Declaration],
) -> Result<(), BrokerError> {
    let is_exchange = |d: &&Declaration| matches!(d, Declaration::Exchange { .. });
    for declaration in declarations.iter().filter(is_exchange) {
        declare_one(channel, declaration).await?;
    }
    for declaration in declarations.iter().filter(|d| !is_exchange(d)) {
        declare_one(channel, declaration).await?;
    }
    Ok(())
}

async fn declare_one(channel: &Channel, declaration: &Declaration) -> Result<(), BrokerError> {
    let name = declaration.name();
    match declaration {
        Declaration::Exchange { name, kind, alternate } => {
            let alternate = alternate.clone().map(HeaderValue::Text);
            let arguments = alternate.iter().map(|name| ("alternate-exchange", name));
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            let arguments = to_table(arguments)?;
            let declared =
                channel.exchange_declare(short(name)?, lapin_kind(*kind), options, arguments);
            response(declared, &format!("exchange {name}")).await
        }
        Declaration::Queue { name, exclusive, arguments } => {
            let options = QueueDeclareOptions {
                durable: !exclusive,
                exclusive: *exclusive,
                // It would otherwise outlive its consumer on a connection that stays open, and fill
                // up.
                auto_delete: *exclusive,
                ..QueueDeclareOptions::default()
            };
            let arguments = to_table(arguments.iter().map(|(key, value)| (*key, value)))?;
            let declared = channel.queue_declare(short(name)?, options, arguments);
            response(declared, &format!("queue {name}")).await.map(drop)
        }
        Declaration::Binding { exchange, queue, routing_key, arguments } => {
            let (queue, exchange, key) = (short(queue)?, short(exchange)?, short(routing_key)?);
            let arguments = to_table(arguments.iter().map(|(key, value)| (key.as_str(), value)))?;
            let options = QueueBindOptions::default();
            let bound = channel.queue_bind(queue, exchange, key, options, arguments);
            response(bound, &format!("binding of queue {name}")).await
        }
    }
}

fn lapin_kind(kind: ExchangeKind) -> LapinKind {
    match kind {
        ExchangeKind::Direct => LapinKind::Direct,
        ExchangeKind::Fanout => LapinKind::Fanout,
        ExchangeKind::Topic => LapinKind::Topic,
        ExchangeKind::Headers => LapinKind::Headers,
    }
}
