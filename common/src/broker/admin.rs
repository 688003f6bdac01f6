//! Declaring, looking at and deleting broker objects.

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

/// How long the broker may take for one answer. A cluster under load is slow; one that has not answered
/// by then will not, though its connection may look well.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// The broker's answer to a request about `what`, within [`ANSWER_TIMEOUT`].
pub(super) async fn answer<T>(
    request: impl Future<Output = lapin::Result<T>>,
    what: &str,
) -> Result<T, BrokerError> {
    match tokio::time::timeout(ANSWER_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(|error| BrokerError::operating(&error, what)),
        Err(_) => Err(BrokerError::Lost(format!("no answer about {what} in {ANSWER_TIMEOUT:?}"))),
    }
}

/// Operations on broker objects over one link.
#[derive(Clone)]
pub struct Admin(Link);

/// What the broker says of a queue without giving any message away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStatus {
    /// Messages that wait to be delivered; those delivered and not yet settled are not counted.
    pub ready: u32,
    /// Consumers on it.
    pub consumers: u32,
}

impl Admin {
    /// Operations over this link.
    pub fn new(link: Link) -> Self {
        Self(link)
    }

    /// Declares everything that is missing. An object with other properties is a
    /// [`BrokerError::Conflict`] that names it.
    pub async fn declare(&self, declarations: &[Declaration]) -> Result<(), BrokerError> {
        declare(&self.0.channel().await?, declarations).await
    }

    /// Whether an object exists, without changing anything. A binding cannot be asked for and
    /// counts as existing with its queue.
    pub async fn exists(&self, declaration: &Declaration) -> Result<bool, BrokerError> {
        // A miss closes the channel (AMQP 0-9-1, 404), so each look has its own.
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

    /// How many messages wait in a queue ready to be delivered; `None` if there is no such queue.
    pub async fn depth(&self, queue: &str) -> Result<Option<u32>, BrokerError> {
        match queue_depth(&self.0.channel().await?, queue).await {
            Ok(depth) => Ok(Some(depth)),
            Err(BrokerError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How many messages wait in a queue ready to be delivered, and how many consumers it has; `None`
    /// if there is no such queue.
    pub async fn queue_status(&self, queue: &str) -> Result<Option<QueueStatus>, BrokerError> {
        match queue_status(&self.0.channel().await?, queue).await {
            Ok(status) => Ok(Some(status)),
            Err(BrokerError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Drops all ready messages of a queue.
    pub async fn purge(&self, queue: &str) -> Result<(), BrokerError> {
        let purged = self.0.channel().await?;
        let purged = purged.queue_purge(short(queue)?, QueuePurgeOptions::default());
        answer(purged, queue).await.map(drop)
    }

    /// Deletes an object with all it holds; a binding goes with its queue. Missing objects are fine.
    pub async fn delete(&self, declaration: &Declaration) -> Result<(), BrokerError> {
        let channel = self.0.channel().await?;
        let name = declaration.name();
        match declaration {
            Declaration::Exchange { .. } => {
                let options = ExchangeDeleteOptions::default();
                answer(channel.exchange_delete(short(name)?, options), name).await
            }
            // No if-empty and no if-unused: on a quorum queue they close the connection (540).
            Declaration::Queue { .. } => {
                let options = QueueDeleteOptions::default();
                answer(channel.queue_delete(short(name)?, options), name).await.map(drop)
            }
            Declaration::Binding { .. } => Ok(()),
        }
    }
}

impl Admin {
    /// Removes a binding alone; anything else is left as it is. A missing one is fine.
    pub async fn unbind(&self, declaration: &Declaration) -> Result<(), BrokerError> {
        let Declaration::Binding { exchange, queue, routing_key, arguments } = declaration else {
            return Ok(());
        };
        let (queue_name, exchange, key) = (short(queue)?, short(exchange)?, short(routing_key)?);
        let arguments = to_table(arguments.iter().map(|(key, value)| (key.as_str(), value)))?;
        let channel = self.0.channel().await?;
        answer(channel.queue_unbind(queue_name, exchange, key, arguments), queue).await
    }
}

async fn exchange_exists(channel: &Channel, name: &str) -> Result<(), BrokerError> {
    let options = ExchangeDeclareOptions { passive: true, ..ExchangeDeclareOptions::default() };
    let found =
        channel.exchange_declare(short(name)?, LapinKind::Direct, options, FieldTable::default());
    answer(found, name).await
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
    let queue = answer(queue, &format!("queue {name}")).await?;
    Ok(QueueStatus { ready: queue.message_count(), consumers: queue.consumer_count() })
}

/// Exchanges first: a queue may name one of them for its dead letters.
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
            answer(declared, &format!("exchange {name}")).await
        }
        Declaration::Queue { name, exclusive, arguments } => {
            let options = QueueDeclareOptions {
                durable: !exclusive,
                exclusive: *exclusive,
                // It would otherwise outlive its consumer on a connection that goes on, and fill up.
                auto_delete: *exclusive,
                ..QueueDeclareOptions::default()
            };
            let arguments = to_table(arguments.iter().map(|(key, value)| (*key, value)))?;
            let declared = channel.queue_declare(short(name)?, options, arguments);
            answer(declared, &format!("queue {name}")).await.map(drop)
        }
        Declaration::Binding { exchange, queue, routing_key, arguments } => {
            let (queue, exchange, key) = (short(queue)?, short(exchange)?, short(routing_key)?);
            let arguments = to_table(arguments.iter().map(|(key, value)| (key.as_str(), value)))?;
            let options = QueueBindOptions::default();
            let bound = channel.queue_bind(queue, exchange, key, options, arguments);
            answer(bound, &format!("binding of queue {name}")).await
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
