//! The protections that a test build can disable, one at a time.
//!
//! A test that has never failed proves nothing. `make test-failpoints` builds everything with the
//! feature `failpoints`, disables one protection at a time (`GARENNE_FAILPOINTS`, a comma-separated
//! list of names), and requires a test to fail (docs/testing.md, decision 0016). Without the
//! feature every protection is enabled, as a constant, and the code that replaces it is not
//! compiled. No manifest enables the feature, and a build without debug assertions refuses it.

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("the feature `failpoints` can disable protections; it is for test builds only");

/// Whether this build can disable protections.
pub const fn can_be_disabled() -> bool {
    cfg!(feature = "failpoints")
}

macro_rules! protections {
    ($($name:ident: $without:literal,)*) => {
        /// A protection, described by what happens without it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Protection {
            $(#[doc = concat!("Without it: ", $without, ".")] $name,)*
        }

        impl Protection {
            /// Every protection, in the order of a task's life.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name of the protection, in the environment and in tables.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name),)* }
            }

            /// What happens without the protection.
            pub const fn without(self) -> &'static str {
                match self { $(Self::$name => $without,)* }
            }
        }
    };
}

protections! {
    PublishDeadline: "a caller waits for the broker's confirm without a limit",
    ConfirmWait: "a publisher reports success once a message is written, before it is confirmed",
    ResendAfterLoss: "messages that a lost channel left unconfirmed are not sent again",
    AlternateExchange: "a task for a deleted queue is dropped by the broker",
    AtLeastOnceDeadLettering: "queues dead-letter by the default strategy, at most once",
    SpentHeaders: "a message is published again with the headers that the broker has added",
    EpochCheck: "an acknowledgement for an old channel is sent over the new one",
    DeliveryWatch: "a consumer that the broker has forgotten is not detected",
    IdleRenewal: "a delivery that was lost on its way to an idle consumer is not redelivered",
    TopologyReconciled: "a deleted binding is not declared again",
    Screening: "a message that cannot be parsed ends the connection of its consumer",
    IdBeforeRun: "a task without an id runs under an id that the broker has not confirmed",
    RunningRecognised: "a redelivery of a task that runs here runs a second time",
    SettledRecognised: "a redelivery of a task that was just settled here runs again",
    Isolation: "a redelivered task, which may have killed a worker, runs inside the next one",
    CrashBudget: "a task may kill its process any number of times",
    DeliveryBudget: "a task that is never settled is delivered any number of times",
    BundleShares: "a bundle is acknowledged when the first of its tasks is settled",
    BundleSplit: "a redelivered bundle runs here as if it were new",
    SuccessorBeforeAck: "a worker acknowledges before the successor is confirmed",
    RoomAsInput: "a worker without room to publish waits for it in line and may block for ever",
    DrainHandBack: "a stopping worker keeps deliveries that it has not started",
    FlushBeforeExit: "a stopping worker does not wait for its last confirms",
    CommitBeforeAck: "the collector acknowledges before the commit",
    FirstResultWins: "a later result of a task replaces the first",
    MemberCountedOnce: "a batch counts every result of a member",
    FenceCheck: "an execution whose lease has lapsed may still report the result of its task",
    OutboxInTransaction: "a notice is stored after the record that it is about, not with it",
    ForgetAfterConfirm: "the outbox deletes an entry before it is published",
    KeptCancelRequests: "a cancel request is broadcast and not stored",
    DrainedTwice: "a batch is abandoned at its deadline although its seal may be in the queue",
    RecoveryQueries: "the collector is not queried for a result whose reply was lost",
}

impl Protection {
    /// Whether the protection is enabled.
    #[cfg(not(feature = "failpoints"))]
    #[inline]
    pub const fn is_enabled(self) -> bool {
        true
    }

    /// Whether the protection is enabled.
    #[cfg(feature = "failpoints")]
    pub fn is_enabled(self) -> bool {
        static OFF: std::sync::LazyLock<Vec<String>> = std::sync::LazyLock::new(|| {
            let names = std::env::var("GARENNE_FAILPOINTS").unwrap_or_default();
            names.split(',').map(str::to_owned).collect()
        });
        !OFF.iter().any(|name| name == self.name())
    }
}
