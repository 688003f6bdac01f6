//! The ways out of a collector, with a connection for each kind of destination.
//!
//! A channel that publishes to a quorum queue which does not answer (one without a leader, say) stands
//! still, and after some hundreds of messages RabbitMQ stops reading from its connection altogether
//! (credit flow; seen on 3.10.8). So what goes to queues of others must not share a connection with the
//! rest.

use std::time::Duration;

use garenne_common::broker::{BrokerError, Link, Publisher};
use garenne_common::config::BrokerConfig;

use crate::heartbeat;

/// The publishers of a collector.
#[derive(Clone)]
pub(crate) struct Outlets {
    /// Done notices, to every queue that anybody has bound.
    pub(crate) notices: Publisher,
    /// Tasks that go back to their queues, or into a delay.
    pub(crate) tasks: Publisher,
    /// Answers, replies, and what is said to all workers.
    pub(crate) answers: Publisher,
    /// A channel of its own beside the answers.
    pub(crate) heartbeats: Publisher,
}

impl Outlets {
    /// Starts them; each connects on its own.
    pub(crate) fn start(config: &BrokerConfig, name: &str) -> Self {
        let topology = config.topology();
        let link = |what: &str| Link::new(config, &format!("garenne-collector {name} {what}"));
        let answering = link("answer");
        let mut small = config.clone();
        small.publish_window = heartbeat::WINDOW;
        let declared = |exchange: String| topology.named(&exchange);
        Self {
            notices: Publisher::start(
                link("notify"),
                declared(topology.notices_exchange()),
                config,
            ),
            // All of it, like a producer: tasks go from here to any queue, and through any delay.
            tasks: Publisher::start(link("resend"), topology.core(), config),
            answers: Publisher::start(answering.clone(), declared(topology.control()), config),
            heartbeats: Publisher::start(answering, declared(topology.heartbeats()), &small),
        }
    }

    fn all(&self) -> [&Publisher; 4] {
        [&self.notices, &self.tasks, &self.answers, &self.heartbeats]
    }

    /// How many messages wait to be published.
    pub(crate) fn queued(&self) -> usize {
        self.all().map(Publisher::queued).iter().sum()
    }

    /// Why one of them cannot publish, if that is known.
    pub(crate) fn trouble(&self) -> Option<BrokerError> {
        self.all().into_iter().find_map(Publisher::trouble)
    }

    /// Waits until what was handed over is confirmed, at most `grace`, and closes the connections.
    pub(crate) async fn close(self, grace: Duration) {
        let Self { notices, tasks, answers, heartbeats } = self;
        tokio::join!(notices.close(grace), tasks.close(grace), async {
            answers.close(grace).await;
            heartbeats.close(grace).await;
        });
    }
}
