//! The task behind a [`Publisher`](super::Publisher): owns the channel, keeps a window of publishes
//! under way, and sends again, under the same id, what a lost channel left unconfirmed.
//!
//! Messages come in over a queue and leave over one channel at a time; each confirm is reported to
//! the sender of its message. A message is given up only if the broker rejects it, AMQP cannot
//! carry it, or channels end repeatedly while it is alone on them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::StreamExt;
use lapin::Channel;
use lapin::options::ConfirmSelectOptions;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::backoff::Backoff;
use super::outage::OutageLog;
use super::window::{NumberedResult, PendingMessage, Window};
use super::{BrokerError, Link, Outgoing, admin};
use crate::failpoints::Protection;
use crate::topology::Declaration;

/// How often an idle publisher checks its channel.
const HEALTH_CHECK: Duration = Duration::from_millis(500);

/// A channel that lasted this long resets the back-off, whatever ended it.
const STABLE: Duration = Duration::from_secs(5);

/// A confirm that is missing after this many publish timeouts will not come: the messages are sent
/// over another channel, under their old ids.
const CONFIRM_TIMEOUTS: u32 = 2;
/// A lower bound of that time: a caller's short timeout is no reason to publish everything twice.
const MIN_CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a channel is used on which the broker has rejected a message. RabbitMQ 3.10.8 continues
/// to reject over a channel that has met a full quorum queue although the limit that a policy set
/// is gone; over a new channel it accepts the messages.
const REJECTING: Duration = Duration::from_secs(10);

/// A message is given up after this many channels ended while it was alone on them.
const MAX_LONE_FAILURES: u32 = 3;

/// What a [`Publisher`](super::Publisher) shares with its task.
pub(super) struct PublisherState {
    pub(super) link: Link,
    /// The configured `publish_timeout`.
    pub(super) timeout: Duration,
    pub(super) status: watch::Sender<PublisherStatus>,
    alarm: Mutex<AlarmState>,
    pub(super) stop: CancellationToken,
    pub(super) task: TaskTracker,
}

/// The state of the channel.
#[derive(Default)]
pub(super) struct PublisherStatus {
    /// Whether a channel was opened and everything declared at least once.
    pub(super) opened: bool,
    /// Why there is no channel at the moment; the error of callers whose timeout passes meanwhile.
    pub(super) error: Option<BrokerError>,
}

/// Alarms of the broker, during which it accepts no messages.
struct AlarmState {
    /// Whether there was one at the last check.
    blocked: bool,
    /// When there last was one; the start of the publisher if never.
    last_blocked: Instant,
}

impl PublisherState {
    pub(super) fn new(link: Link, timeout: Duration) -> Self {
        Self {
            link,
            timeout,
            status: watch::Sender::default(),
            alarm: Mutex::new(AlarmState { blocked: false, last_blocked: Instant::now() }),
            stop: CancellationToken::new(),
            task: TaskTracker::new(),
        }
    }

    /// Logs the begin and the end of an alarm. Returns since when confirms are due, if they are.
    fn watch_alarm(&self) -> Instant {
        let blocked = self.link.is_blocked();
        let mut alarm = self.alarm.lock();
        let before = std::mem::replace(&mut alarm.blocked, blocked);
        match (before, blocked) {
            (false, true) => tracing::warn!(
                "RabbitMQ takes no messages now (memory or disk alarm); publishing waits"
            ),
            (true, false) => tracing::info!("RabbitMQ takes messages again"),
            (false, false) | (true, true) => {}
        }
        if before || blocked {
            alarm.last_blocked = Instant::now();
        }
        alarm.last_blocked
    }

    /// How long a confirm may take.
    pub(super) fn confirm_timeout(&self) -> Duration {
        self.timeout.saturating_mul(CONFIRM_TIMEOUTS).max(MIN_CONFIRM_TIMEOUT)
    }
}

/// Publishes over channel after channel.
pub(super) struct PublishTask {
    state: Arc<PublisherState>,
    declarations: Vec<Declaration>,
    /// The most messages under way at once.
    window: usize,
    inbox: mpsc::Receiver<PendingMessage>,
    /// Messages that wait for a channel, oldest first: those that a lost channel left unconfirmed.
    to_send: VecDeque<PendingMessage>,
    /// The first this many of them are sent one at a time, since one of them may be what ends the
    /// channels.
    one_by_one: usize,
    outage: OutageLog,
}

/// Why a channel is no longer used.
enum ChannelEnd {
    /// Nothing is left to publish.
    Finished,
    /// The channel is to be replaced; no message is under way on it.
    Renew,
    /// The channel was lost; `confirmed_any` unless it never confirmed a message.
    Lost { error: BrokerError, confirmed_any: bool },
}

impl PublishTask {
    pub(super) fn new(
        state: Arc<PublisherState>,
        declarations: Vec<Declaration>,
        window: usize,
        inbox: mpsc::Receiver<PendingMessage>,
    ) -> Self {
        let (to_send, outage) = (VecDeque::new(), OutageLog::default());
        Self { state, declarations, window, inbox, to_send, one_by_one: 0, outage }
    }

    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new();
        loop {
            let error = match self.open().await {
                Ok(channel) => {
                    let opened_at = Instant::now();
                    self.state.status.send_modify(|status| status.opened = true);
                    match self.pump(&channel).await {
                        ChannelEnd::Finished => return close(&channel).await,
                        ChannelEnd::Renew => {
                            close(&channel).await;
                            continue;
                        }
                        ChannelEnd::Lost { error, confirmed_any } => {
                            // A channel that ends because of what is published on it (to a
                            // forbidden exchange, say) opens successfully each time; without a
                            // growing delay this would be a hot loop.
                            if confirmed_any || opened_at.elapsed() >= STABLE {
                                backoff.reset();
                            }
                            error
                        }
                    }
                }
                Err(error) => error,
            };
            if self.state.link.is_closed() {
                return;
            }
            self.report_error(error);
            self.to_send.retain(|message| !message.is_withdrawn());
            if self.state.stop.is_cancelled() && self.to_send.is_empty() && self.inbox.is_empty() {
                return;
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    async fn open(&self) -> Result<Channel, BrokerError> {
        let channel = self.state.link.channel().await?;
        admin::declare(&channel, &self.declarations).await?;
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        admin::response(confirms, "confirm mode").await?;
        Ok(channel)
    }

    /// Publishes over one channel until it is lost or nothing is left to do.
    async fn pump(&mut self, channel: &Channel) -> ChannelEnd {
        let (mut window, opened_at) = (Window::default(), Instant::now());
        // Whether publishers exist that may hand over more.
        let mut open = true;
        let mut health = tokio::time::interval(HEALTH_CHECK);
        health.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let renew = window.rejecting_since.is_some_and(|since| since.elapsed() >= REJECTING);
            if !renew && let Err(error) = self.fill(channel, &mut window) {
                return self.give_back(window, error);
            }
            if window.is_empty() && (renew || !open) {
                let finished = !open && self.to_send.is_empty();
                return if finished { ChannelEnd::Finished } else { ChannelEnd::Renew };
            }
            let room = window.len() < self.limit() && !renew;
            let progress = tokio::select! {
                Some(confirm) = window.confirms.next() => self.conclude(&mut window, confirm),
                message = self.inbox.recv(), if open && room => {
                    open = message.is_some();
                    self.to_send.extend(message);
                    Ok(())
                }
                () = self.state.stop.cancelled(), if window.is_empty() && self.inbox.is_empty() => {
                    return ChannelEnd::Finished;
                }
                _ = health.tick() => self.check(channel, &window, opened_at),
            };
            if let Err(error) = progress {
                return self.give_back(window, error);
            }
        }
    }

    /// Reports a confirm, and all others that have arrived, to the senders of their messages.
    fn conclude(
        &mut self,
        window: &mut Window<'_>,
        confirm: NumberedResult,
    ) -> Result<(), BrokerError> {
        let count = window.conclude_ready(confirm)?;
        self.report_recovery();
        self.one_by_one = self.one_by_one.saturating_sub(count);
        Ok(())
    }

    /// Fails if the channel is closed or does not confirm in time.
    fn check(
        &mut self,
        channel: &Channel,
        window: &Window<'_>,
        opened_at: Instant,
    ) -> Result<(), BrokerError> {
        if !channel.status().connected() {
            return Err(BrokerError::Lost("the channel was closed".to_owned()));
        }
        // A blocked broker owes no confirm. A cluster that lost a node may forget confirms of a
        // channel that looks healthy.
        let due_since = self.state.watch_alarm();
        let limit = self.state.confirm_timeout();
        if let Some((message, age)) = window.oldest(due_since)
            && age > limit
        {
            let Outgoing { exchange, routing_key, .. } = &*message.outgoing;
            tracing::warn!(
                exchange,
                routing_key,
                "RabbitMQ does not confirm a message; its target queue may have no leader"
            );
            return Err(BrokerError::Unconfirmed(limit));
        }
        if opened_at.elapsed() >= STABLE {
            self.report_recovery();
        }
        Ok(())
    }

    /// Puts waiting messages on the channel while the window has room, without awaiting any write:
    /// messages handed to lapin together leave in few writes.
    fn fill<'c>(
        &mut self,
        channel: &'c Channel,
        window: &mut Window<'c>,
    ) -> Result<(), BrokerError> {
        let limit = self.limit();
        while window.len() < limit {
            let message = self.to_send.pop_front().or_else(|| self.inbox.try_recv().ok());
            let Some(message) = message else { break };
            if !message.is_withdrawn() {
                window.publish(channel, message)?;
            }
        }
        Ok(())
    }

    /// How many messages may be under way. One during an alarm: the others wait where their senders
    /// can still withdraw them.
    fn limit(&self) -> usize {
        if self.one_by_one > 0 || self.state.link.is_blocked() { 1 } else { self.window }
    }

    /// Takes back the unconfirmed messages of a lost channel. They are sent first over the next
    /// one, in their old order.
    ///
    /// A channel that confirmed nothing may have ended because of one of its messages (too large
    /// for this broker, say). Then all are sent one at a time, and a message that is alone on a
    /// channel whenever it ends is given up, since it would keep all others from being published.
    fn give_back(&mut self, window: Window<'_>, error: BrokerError) -> ChannelEnd {
        // A missing confirm is a failure of the broker, not of a message.
        let silent = matches!(error, BrokerError::Unconfirmed(_));
        let confirmed_any = window.confirmed_any;
        let suspicious = !confirmed_any && !silent;
        let alone = window.len() == 1;
        for (_, mut message) in window.messages.into_iter().rev() {
            message.lone_failures += u32::from(alone && suspicious);
            if message.lone_failures >= MAX_LONE_FAILURES {
                message.complete(Err(error.clone()));
            } else if message.has_sender() && Protection::ResendAfterLoss.is_enabled() {
                self.to_send.push_front(message);
            }
        }
        if suspicious {
            self.one_by_one = self.to_send.len();
        }
        ChannelEnd::Lost { error, confirmed_any }
    }

    /// Notes that there is a working channel.
    fn report_recovery(&mut self) {
        if self.state.status.send_if_modified(|status| status.error.take().is_some()) {
            tracing::info!("publishing again");
        }
        self.outage.clear();
    }

    /// Notes why there is no channel, and logs each kind of error once per outage.
    fn report_error(&mut self, error: BrokerError) {
        if self.outage.is_new(&error) && !self.state.link.is_closed() {
            tracing::warn!("not publishing, will try again: {error}");
        }
        self.state.status.send_modify(|status| status.error = Some(error));
    }
}

/// Closes a channel before its connection; lapin logs an error if the connection is closed first.
async fn close(channel: &Channel) {
    if let Err(error) = admin::response(channel.close(200, "bye".into()), "closing").await {
        tracing::debug!(%error, "the channel was not closed cleanly");
    }
}
