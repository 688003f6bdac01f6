//! The publishers of a collector, with a connection for each kind of destination.
//!
//! A channel that publishes to a quorum queue which does not respond (for instance one without a leader)
//! stalls, and after some hundreds of messages RabbitMQ stops reading from its connection (credit flow; seen
//! with 3.10.8). So messages to queues of other programs do not share a connection with the rest.

use std::time::Duration;

use garenne_common::broker::{BrokerError, Link, Publisher};
use garenne_common::config::BrokerConfig;

use crate::control::heartbeat;

/// The publishers of a collector.
#[derive(Clone)]
pub(crate) struct Publishers {
    /// Done notices, to any queue that is bound.
    pub(crate) notices: Publisher,
    /// Tasks that return to their queues, or to the delay queues.
    pub(crate) tasks: Publisher,
    /// Responses, replies, and broadcasts to workers.
    pub(crate) responses: Publisher,
    /// Another channel of the connection of `responses`.
    pub(crate) heartbeats: Publisher,
}

impl Publishers {
    /// Starts them; each connects by itself.
    pub(crate) fn start(config: &BrokerConfig, name: &str) -> Self {
        let topology = config.topology();
        let link = |what: &str| Link::new(config, &format!("garenne-collector {name} {what}"));
        let responding = link("respond");
        let mut small = config.clone();
        small.publish_window = heartbeat::WINDOW;
        let declared = |exchange: String| topology.named(&exchange);
        Self {
            notices: Publisher::start(
                link("notify"),
                declared(topology.notices_exchange()),
                config,
            ),
            // Declares everything, like a producer: tasks go to any queue and through any delay.
            tasks: Publisher::start(link("resend"), topology.core(), config),
            responses: Publisher::start(responding.clone(), declared(topology.control()), config),
            heartbeats: Publisher::start(responding, declared(topology.heartbeats()), &small),
        }
    }

    fn all(&self) -> [&Publisher; 4] {
        [&self.notices, &self.tasks, &self.responses, &self.heartbeats]
    }

    /// Number of messages that wait to be published.
    pub(crate) fn queued(&self) -> usize {
        self.all().map(Publisher::queued).iter().sum()
    }

    /// Why one of them cannot publish, if known.
    pub(crate) fn trouble(&self) -> Option<BrokerError> {
        self.all().into_iter().find_map(Publisher::current_error)
    }

    /// Waits for outstanding confirms, at most `grace`, and closes the connections.
    pub(crate) async fn close(self, grace: Duration) {
        let Self { notices, tasks, responses, heartbeats } = self;
        tokio::join!(notices.close(grace), tasks.close(grace), async {
            responses.close(grace).await;
            heartbeats.close(grace).await;
        });
    }
}
