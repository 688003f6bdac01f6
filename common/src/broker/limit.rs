//! Limits that an operator sets on the broker, recognised by the text of its refusal.

/// A limit that is configured on the broker or negotiated with it.
///
/// Reaching one is transient: connections, channels and queues of others end by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BrokerLimit {
    /// `max-connections` of the virtual host.
    VhostConnections,
    /// `max-queues` of the virtual host.
    VhostQueues,
    /// `max-connections` of the user.
    UserConnections,
    /// `max-channels` of the user.
    UserChannels,
    /// Connections to one node.
    NodeConnections,
    /// Channels on one node.
    NodeChannels,
    /// `channel_max`, negotiated for the connection.
    ConnectionChannels,
    /// Queues in the cluster.
    ClusterQueues,
    /// Exchanges in the cluster.
    ClusterExchanges,
}

impl BrokerLimit {
    /// The limit that a text of the broker names. RabbitMQ has no reply code of its own for limits.
    pub(super) fn named_in(text: &str) -> Option<Self> {
        // The more specific phrase comes first.
        let phrases = [
            ("user connection limit (", Self::UserConnections),
            ("node connection limit (", Self::NodeConnections),
            ("connection limit (", Self::VhostConnections),
            ("maximum allowed user limit of (", Self::UserChannels),
            ("maximum allowed limit of (", Self::NodeChannels),
            ("has reached the negotiated channel_max (", Self::ConnectionChannels),
            ("queue limit in vhost '", Self::VhostQueues),
            ("queue limit in cluster (", Self::ClusterQueues),
            ("exchange limit of ", Self::ClusterExchanges),
        ];
        phrases.iter().find(|(phrase, _)| text.contains(phrase)).map(|(_, limit)| *limit)
    }

    /// What a person can do about it.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::VhostConnections => {
                "close other connections to the virtual host, or raise its limit (rabbitmqctl \
                 set_vhost_limits)"
            }
            Self::VhostQueues => {
                "delete unused queues of the virtual host, or raise its limit (rabbitmqctl \
                 set_vhost_limits)"
            }
            Self::UserConnections => {
                "close other connections of the user, or raise the limit (rabbitmqctl \
                 set_user_limits)"
            }
            Self::UserChannels => {
                "close other connections of the user, or raise the limit of channels (rabbitmqctl \
                 set_user_limits)"
            }
            Self::NodeConnections | Self::NodeChannels => {
                "close other connections to the node, or raise the limit in its rabbitmq.conf"
            }
            Self::ConnectionChannels => {
                "raise channel_max in the URL and in the broker's rabbitmq.conf"
            }
            Self::ClusterQueues => {
                "delete unused queues, or raise cluster_queue_limit in rabbitmq.conf"
            }
            Self::ClusterExchanges => {
                "delete unused exchanges, or raise cluster_exchange_limit in rabbitmq.conf"
            }
        }
    }

    /// A stable name.
    pub(super) const fn code(self) -> &'static str {
        match self {
            Self::VhostConnections => "vhost_connection_limit",
            Self::VhostQueues => "vhost_queue_limit",
            Self::UserConnections => "user_connection_limit",
            Self::UserChannels => "user_channel_limit",
            Self::NodeConnections => "node_connection_limit",
            Self::NodeChannels => "node_channel_limit",
            Self::ConnectionChannels => "connection_channel_limit",
            Self::ClusterQueues => "cluster_queue_limit",
            Self::ClusterExchanges => "cluster_exchange_limit",
        }
    }
}
