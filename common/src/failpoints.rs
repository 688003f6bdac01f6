//! The protections that a test-only build can switch off, each at the one place where it stands.
//!
//! A test that has never failed proves nothing. So `make test-failpoints` builds everything with the
//! feature `failpoints`, switches off one guard at a time (`GARENNE_FAILPOINTS`, a list of names), and
//! demands that the tests notice (docs/testing.md, decision 0016). Without the feature every guard
//! holds, as a constant: the sabotage beside it is not even compiled in. No crate's manifest switches
//! the feature on, and a build without debug assertions refuses it.

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("the feature `failpoints` can switch protections off; it is for test builds alone");

/// Whether this build can switch protections off at all.
pub const fn can_be_disabled() -> bool {
    cfg!(feature = "failpoints")
}

macro_rules! protections {
    ($($name:ident: $without:literal,)*) => {
        /// A protection; the words say what happens without it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Protection {
            $(#[doc = concat!("Without it: ", $without, ".")] $name,)*
        }

        impl Protection {
            /// All of them, in the order of a task's life.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Its name in the environment and in tables.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// What happens without it.
            pub const fn without(self) -> &'static str {
                match self { $(Self::$name => $without,)* }
            }
        }
    };
}

protections! {
    PublishDeadline: "a caller waits for the broker's confirm without a limit",
    ConfirmWait: "a publisher reports success once a message is written, unconfirmed",
    ResendAfterLoss: "what a lost channel left unconfirmed is not sent again",
    AlternateExchange: "a task for a queue that is gone is dropped by the broker",
    AtLeastOnceDeadLettering: "queues dead-letter by the default strategy, at most once",
    SpentHeaders: "a message is published again with the broker's old notes on it",
    EpochCheck: "an acknowledgement of an old channel goes out over the new one",
    DeliveryWatch: "a consumer that the broker has forgotten is not noticed",
    IdleRenewal: "what went astray on its way to an idle consumer stays there",
    TopologyReconciled: "a binding that somebody deleted stays away",
    Screening: "a message that cannot be parsed ends the connection of whoever gets it",
    IdBeforeRun: "a task without an id runs under an id that nobody has confirmed",
    RunningRecognised: "a redelivery of what runs here runs a second time",
    SettledRecognised: "a redelivery of what was just settled here runs again",
    Isolation: "a task that came back, perhaps from a dead worker, runs inside the next one",
    CrashBudget: "a task may kill its process for ever",
    DeliveryBudget: "a task that nobody ever settles is delivered for ever",
    BundleShares: "a bundle is acknowledged with the first of its tasks that is settled",
    BundleSplit: "a bundle that came before runs here as if it were new",
    SuccessorBeforeAck: "a worker acknowledges before the successor is confirmed",
    RoomAsInput: "a worker that finds no room to publish waits for it in line and may stop for ever",
    DrainHandBack: "a stopping worker keeps what it has not begun",
    FlushBeforeExit: "a stopping worker does not wait for its last confirms",
    CommitBeforeAck: "the collector acknowledges before the commit",
    FirstResultWins: "a later result of a task replaces the first",
    MemberCountedOnce: "a batch counts every result of a member",
    FenceCheck: "an execution whose lease has lapsed may still say how its task ended",
    OutboxInTransaction: "a notice is stored after what it tells of, not with it",
    ForgetAfterConfirm: "the outbox forgets an entry before it is published",
    KeptCancelRequests: "a request to cancel is broadcast and not kept",
    DrainedTwice: "a batch is abandoned at its deadline though its seal may lie unread",
    RecoveryQueries: "nobody asks the collector for a result whose reply was lost",
}

impl Protection {
    /// Whether it is in force.
    #[cfg(not(feature = "failpoints"))]
    #[inline]
    pub const fn is_enabled(self) -> bool {
        true
    }

    /// Whether it is in force.
    #[cfg(feature = "failpoints")]
    pub fn is_enabled(self) -> bool {
        static OFF: std::sync::LazyLock<Vec<String>> = std::sync::LazyLock::new(|| {
            let names = std::env::var("GARENNE_FAILPOINTS").unwrap_or_default();
            names.split(',').map(str::to_owned).collect()
        });
        !OFF.iter().any(|name| name == self.name())
    }
}
