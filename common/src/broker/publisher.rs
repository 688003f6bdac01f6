//! Publishing with confirms: one task owns the channel, keeps a window of publishes under way, and
//! sends again, under the same id, what a lost connection left unconfirmed.
//!
//! One task, because lapin may swap the confirms of publishes that different tasks put on one channel.
//! No `mandatory`: its returns attach to the wrong publish when several are under way, so every
//! exchange that carries tasks has an alternate exchange instead.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::stream::StreamExt;
use lapin::Channel;
use lapin::options::ConfirmSelectOptions;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::link::Pause;
use super::window::{Job, Window};
use super::{BrokerError, Link, admin};
use crate::config::BrokerConfig;
use crate::failpoints::Protection;
use crate::topology::Declaration;
use crate::wire::Message;

/// How often an idle publisher looks whether its channel still stands.
const HEALTH_CHECK: Duration = Duration::from_millis(500);

/// A channel that lasted so long was a success, whatever ended it.
const STABLE: Duration = Duration::from_secs(5);

/// A confirm that is not there after so many deadlines will not come: the messages go over another
/// channel, under their old ids.
const PATIENCE: u32 = 2;
/// But a short deadline is a caller's haste and no reason to publish everything twice.
const LEAST_PATIENCE: Duration = Duration::from_secs(10);

/// How long a channel is used on which the broker refused something. RabbitMQ 3.10.8 goes on refusing
/// over a channel that has met a full quorum queue although the limit that a policy set is gone; over
/// a new channel it takes the messages.
const REFUSING: Duration = Duration::from_secs(10);

/// So many channels may end while one message is alone on them.
const STRIKES: u32 = 3;

/// A message and where it goes.
#[derive(Debug, Clone, PartialEq)]
pub struct Outgoing {
    /// The exchange; empty for the default exchange, which routes by queue name.
    pub exchange: String,
    /// The routing key.
    pub routing_key: String,
    /// The message; published persistent.
    pub message: Message,
}

/// Hands messages to the publishing task. Clones share the task.
#[derive(Clone)]
pub struct Publisher {
    jobs: mpsc::Sender<Job>,
    shared: Arc<PublisherState>,
}

struct PublisherState {
    link: Link,
    deadline: Duration,
    standing: watch::Sender<Standing>,
    alarm: Mutex<Alarm>,
    stop: CancellationToken,
    task: TaskTracker,
}

/// How it stands with the channel.
#[derive(Default)]
struct Standing {
    /// Whether there has been one, with everything declared.
    opened: bool,
    /// Why there is none at the moment; what a caller hears whose deadline passes meanwhile.
    trouble: Option<BrokerError>,
}

/// What is known of times in which the broker takes nothing.
struct Alarm {
    /// Whether it was last seen so.
    blocked: bool,
    /// When it was last seen so.
    last: Instant,
}

/// The broker's word on one message, still to come. Dropping it withdraws a message not yet sent.
pub struct Receipt {
    answer: oneshot::Receiver<Result<(), BrokerError>>,
}

impl Receipt {
    /// Waits for the confirm, however long the broker is away; for who holds the message otherwise.
    pub async fn confirmed(self) -> Result<(), BrokerError> {
        self.answer.await.unwrap_or(Err(BrokerError::Closed))
    }
}

/// The right to hand one message over without waiting.
///
/// A task that drives futures of its own selects over them and room together. If it awaited room in
/// line, a publish begun by one of those futures could be first in the queue and would not be polled.
pub struct Room<'p>(mpsc::Permit<'p, Job>);

impl Room<'_> {
    /// Hands a message over.
    pub fn send(self, outgoing: Outgoing) -> Receipt {
        let (tx, answer) = oneshot::channel();
        self.0.send(Job::new(outgoing, Some(tx)));
        Receipt { answer }
    }

    /// Hands over a message that is sent once; what becomes of it is not reported.
    pub fn send_and_forget(self, outgoing: Outgoing) {
        self.0.send(Job::new(outgoing, None));
    }
}

impl Publisher {
    /// Starts the task. It connects on its own and declares `declarations` on every new channel.
    pub fn start(link: Link, declarations: Vec<Declaration>, config: &BrokerConfig) -> Self {
        let (jobs, inbox) = mpsc::channel(config.publish_window);
        let shared = Arc::new(PublisherState {
            link,
            deadline: config.publish_timeout,
            standing: watch::Sender::default(),
            alarm: Mutex::new(Alarm { blocked: false, last: Instant::now() }),
            stop: CancellationToken::new(),
            task: TaskTracker::new(),
        });
        let task = PublishTask {
            shared: Arc::clone(&shared),
            declarations,
            window: config.publish_window,
            inbox,
            to_send: VecDeque::new(),
            careful: 0,
        };
        shared.task.spawn(task.run());
        shared.task.close();
        Self { jobs, shared }
    }

    /// Waits until everything was declared, or until a reason is known why that cannot be without a
    /// change by a person.
    pub async fn ready(&self) -> Result<(), BrokerError> {
        let hopeless = |error: &BrokerError| !error.is_transient();
        let known = |standing: &Standing| {
            standing.opened || standing.trouble.as_ref().is_some_and(hopeless)
        };
        let mut standing = self.shared.standing.subscribe();
        match standing.wait_for(known).await {
            Ok(standing) if standing.opened => Ok(()),
            Ok(standing) => Err(standing.trouble.clone().unwrap_or(BrokerError::Closed)),
            Err(_) => Err(BrokerError::Closed),
        }
    }

    /// Publishes and waits for the broker's confirm, at most the configured `publish_timeout`.
    ///
    /// An error leaves open whether the message arrived, unless it is `Rejected` or `TooLong`; so try
    /// again under the same message id.
    pub fn publish(&self, outgoing: Outgoing) -> impl Future<Output = Result<(), BrokerError>> {
        self.publish_within(outgoing, self.shared.deadline)
    }

    /// [`publish`](Self::publish) with a deadline of the caller's.
    pub fn publish_within(
        &self,
        outgoing: Outgoing,
        deadline: Duration,
    ) -> impl Future<Output = Result<(), BrokerError>> {
        // Out of the future, or each that wraps it carries a whole message along and is moved with it.
        let (tx, answer) = oneshot::channel();
        let (job, receipt) = (Job::new(outgoing, Some(tx)), Receipt { answer });
        async move {
            let whole = async {
                self.stand_in_line(job).await?;
                receipt.confirmed().await
            };
            if !Protection::PublishDeadline.is_enabled() {
                return whole.await;
            }
            match timeout(deadline, whole).await {
                Ok(result) => result,
                Err(_) => Err(self.why_late(deadline)),
            }
        }
    }

    /// Hands a message over and returns before it is confirmed; waits only for room in the window.
    ///
    /// For tasks that poll this all the time: see [`publish`](Self::publish) for everybody else.
    pub fn send(&self, outgoing: Outgoing) -> impl Future<Output = Result<Receipt, BrokerError>> {
        let (tx, answer) = oneshot::channel();
        let job = Job::new(outgoing, Some(tx));
        async move {
            self.hand_over(job).await?;
            Ok(Receipt { answer })
        }
    }

    /// Waits for room in the window.
    pub async fn room(&self) -> Result<Room<'_>, BrokerError> {
        self.jobs.reserve().await.map(Room).map_err(|_| BrokerError::Closed)
    }

    /// [`room`](Self::room) if there is some at once.
    pub fn try_room(&self) -> Option<Room<'_>> {
        self.jobs.try_reserve().ok().map(Room)
    }

    /// Sends a message once without caring what becomes of it; waits only for room in the window.
    pub async fn send_and_forget(&self, outgoing: Outgoing) -> Result<(), BrokerError> {
        self.hand_over(Job::new(outgoing, None)).await
    }

    /// [`send_and_forget`](Self::send_and_forget) for what may as well be left out: `false`, and
    /// nothing is sent, when there is no room at once.
    pub fn offer(&self, outgoing: Outgoing) -> bool {
        self.jobs.try_send(Job::new(outgoing, None)).is_ok()
    }

    /// How many messages wait for the publishing task, beside those that wait for their confirms.
    pub fn queued(&self) -> usize {
        self.jobs.max_capacity() - self.jobs.capacity()
    }

    /// How long [`publish`](Self::publish) waits.
    pub fn deadline(&self) -> Duration {
        self.shared.deadline
    }

    /// Why nothing can be published at the moment, if that is known.
    pub fn trouble(&self) -> Option<BrokerError> {
        self.shared.standing.borrow().trouble.clone()
    }

    /// Whether the broker has stopped taking messages (a memory or disk alarm).
    pub fn is_blocked(&self) -> bool {
        self.shared.link.is_blocked()
    }

    /// Whether a broker that is there, and takes messages, has to confirm what it is given: one that
    /// does not by [`patience`](Self::patience) is silent.
    pub fn owes_confirms(&self) -> bool {
        let silent = |trouble| matches!(trouble, BrokerError::Unconfirmed(_));
        !self.is_blocked() && self.trouble().is_none_or(silent)
    }

    /// How long a confirm may take until the message goes over another channel.
    pub fn patience(&self) -> Duration {
        self.shared.patience()
    }

    /// What a caller should hear who waited `deadline` in vain: the trouble known, else silence.
    pub fn why_late(&self, deadline: Duration) -> BrokerError {
        let trouble = self.shared.standing.borrow().trouble.clone();
        match trouble {
            Some(error) => error,
            None if self.shared.link.is_blocked() => BrokerError::Blocked(deadline),
            None => BrokerError::Unconfirmed(deadline),
        }
    }

    /// Waits until everything handed over is confirmed, at most `grace`, then closes the connection.
    pub async fn close(self, grace: Duration) {
        let Self { jobs, shared } = self;
        drop(jobs);
        // Clones may live on in other tasks; the token tells the task to finish what it has.
        shared.stop.cancel();
        if timeout(grace, shared.task.wait()).await.is_err() {
            tracing::warn!("some messages were not confirmed before closing");
        }
        shared.link.close().await;
    }

    /// Hands a message over for a caller whose future others poll, or do not: while there is no room, a
    /// task of ours stands in line. Room goes to who came first, so a future that nobody polls would
    /// keep it from all others of this process.
    async fn stand_in_line(&self, job: Job) -> Result<(), BrokerError> {
        let job = match self.jobs.try_send(job) {
            Ok(()) => return Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(BrokerError::Closed),
            Err(mpsc::error::TrySendError::Full(job)) => job,
        };
        let jobs = self.jobs.clone();
        let standing = self.shared.task.spawn(async move { jobs.send(job).await.is_ok() });
        // Who gives up withdraws the message.
        match AbortOnDropHandle::new(standing).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(BrokerError::Closed),
        }
    }

    async fn hand_over(&self, job: Job) -> Result<(), BrokerError> {
        self.jobs.send(job).await.map_err(|_| BrokerError::Closed)
    }
}

impl PublisherState {
    /// There is a channel again.
    fn mended(&self) {
        if self.standing.send_if_modified(|standing| standing.trouble.take().is_some()) {
            tracing::info!("publishing again");
        }
    }

    /// Said once for each kind of trouble, not at each attempt.
    fn troubled(&self, lost: BrokerError) {
        let known = self.standing.borrow().trouble.as_ref() == Some(&lost);
        if !known && !self.link.is_closed() {
            tracing::warn!("not publishing, will try again: {lost}");
        }
        self.standing.send_modify(|standing| standing.trouble = Some(lost));
    }

    /// Says once when the broker stops taking messages, and once when it takes them again; since when
    /// it takes them, and owes confirms, if it does.
    fn watch_alarm(&self) -> Instant {
        let blocked = self.link.is_blocked();
        let mut alarm = self.alarm.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut alarm.blocked, blocked);
        match (before, blocked) {
            (false, true) => tracing::warn!(
                "RabbitMQ takes no messages now (memory or disk alarm); what is to be published waits"
            ),
            (true, false) => tracing::info!("RabbitMQ takes messages again"),
            (false, false) | (true, true) => {}
        }
        if before || blocked {
            alarm.last = Instant::now();
        }
        alarm.last
    }

    /// How long a confirm may take.
    fn patience(&self) -> Duration {
        self.deadline.saturating_mul(PATIENCE).max(LEAST_PATIENCE)
    }
}

struct PublishTask {
    shared: Arc<PublisherState>,
    declarations: Vec<Declaration>,
    window: usize,
    inbox: mpsc::Receiver<Job>,
    /// What waits for a channel, oldest first: taken over from a lost one.
    to_send: VecDeque<Job>,
    /// So many of them go one at a time: one of them may be what ends the channels.
    careful: usize,
}

enum ChannelEnd {
    Finished,
    /// The channel is to be replaced; nothing is under way on it.
    Renew,
    /// `barren`: it never confirmed anything.
    Lost {
        error: BrokerError,
        barren: bool,
    },
}

impl PublishTask {
    async fn run(mut self) {
        let mut pause = Pause::new();
        loop {
            let lost = match self.open().await {
                Ok(channel) => {
                    let begun = Instant::now();
                    self.shared.standing.send_modify(|standing| standing.opened = true);
                    match self.pump(&channel).await {
                        ChannelEnd::Finished => return close(&channel).await,
                        ChannelEnd::Renew => {
                            close(&channel).await;
                            continue;
                        }
                        ChannelEnd::Lost { error, barren } => {
                            // A channel that ends over what is published on it (a forbidden exchange,
                            // say) opens well each time; to come back at once would be a hot loop.
                            if !barren || begun.elapsed() >= STABLE {
                                pause.reset();
                            }
                            error
                        }
                    }
                }
                Err(error) => error,
            };
            if self.shared.link.is_closed() {
                return;
            }
            self.shared.troubled(lost);
            self.to_send.retain(|job| !job.is_withdrawn());
            if self.shared.stop.is_cancelled() && self.to_send.is_empty() && self.inbox.is_empty() {
                return;
            }
            tokio::time::sleep(pause.next()).await;
        }
    }

    async fn open(&self) -> Result<Channel, BrokerError> {
        let channel = self.shared.link.channel().await?;
        admin::declare(&channel, &self.declarations).await?;
        let confirms = channel.confirm_select(ConfirmSelectOptions::default());
        admin::answer(confirms, "confirm mode").await?;
        Ok(channel)
    }

    /// Publishes over one channel until it is lost or there is nothing left to do.
    async fn pump(&mut self, channel: &Channel) -> ChannelEnd {
        let (mut window, begun) = (Window::default(), Instant::now());
        // Whether more may be handed over.
        let mut open = true;
        let mut health = tokio::time::interval(HEALTH_CHECK);
        health.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let renew = window.refused.is_some_and(|refused| refused.elapsed() >= REFUSING);
            if !renew && let Err(lost) = self.fill(channel, &mut window) {
                return self.give_back(window, lost);
            }
            if window.is_empty() && (renew || !open) {
                return if open || !self.to_send.is_empty() {
                    ChannelEnd::Renew
                } else {
                    ChannelEnd::Finished
                };
            }
            let room = window.len() < self.limit() && !renew;
            tokio::select! {
                Some(confirm) = window.confirms.next() => {
                    let count = match window.conclude_ready(confirm) {
                        Ok(count) => count,
                        Err(lost) => return self.give_back(window, lost),
                    };
                    self.shared.mended();
                    self.careful = self.careful.saturating_sub(count);
                }
                job = self.inbox.recv(), if open && room => match job {
                    Some(job) => self.to_send.push_back(job),
                    None => open = false,
                },
                () = self.shared.stop.cancelled(), if window.is_empty() && self.inbox.is_empty() => {
                    return ChannelEnd::Finished;
                }
                _ = health.tick() => {
                    if !channel.status().connected() {
                        let lost = BrokerError::Lost("the channel was closed".to_owned());
                        return self.give_back(window, lost);
                    }
                    // A blocked broker owes no confirm. A cluster that lost a node may forget confirms
                    // on a channel that looks well.
                    let (owed_since, patience) = (self.shared.watch_alarm(), self.shared.patience());
                    if let Some((job, _)) = window.oldest(owed_since).filter(|(_, age)| *age > patience) {
                        let Outgoing { exchange, routing_key, .. } = &*job.outgoing;
                        tracing::warn!(
                            exchange,
                            routing_key,
                            "RabbitMQ does not confirm a message; the queue it goes to may have no leader"
                        );
                        return self.give_back(window, BrokerError::Unconfirmed(patience));
                    }
                    if begun.elapsed() >= STABLE {
                        self.shared.mended();
                    }
                }
            }
        }
    }

    /// Puts waiting jobs on the channel while the window has room, without waiting for any write: what
    /// is handed over in one go leaves in few writes.
    fn fill<'c>(
        &mut self,
        channel: &'c Channel,
        window: &mut Window<'c>,
    ) -> Result<(), BrokerError> {
        let limit = self.limit();
        while window.len() < limit {
            let job = self.to_send.pop_front().or_else(|| self.inbox.try_recv().ok());
            let Some(job) = job else { break };
            if !job.is_withdrawn() {
                window.publish(channel, job)?;
            }
        }
        Ok(())
    }

    /// How many messages may be under way. Under an alarm one: the rest waits where its callers can
    /// still withdraw it.
    fn limit(&self) -> usize {
        if self.careful > 0 || self.shared.link.is_blocked() { 1 } else { self.window }
    }

    /// The channel is gone: what it left unconfirmed goes first over the next one, in its old order.
    ///
    /// A channel that ended before it confirmed anything may have ended over one of its messages (too
    /// large for this broker, say). Then all go one at a time, and the one that is alone on a channel
    /// when it ends, and once more, is given up, or it would keep all others from being published.
    fn give_back(&mut self, window: Window<'_>, lost: BrokerError) -> ChannelEnd {
        // Silence is the broker's fault, not a message's.
        let silent = matches!(lost, BrokerError::Unconfirmed(_));
        let (alone, barren) = (window.len() == 1 && !silent, !window.confirmed_any);
        for (_, mut job) in window.jobs.into_iter().rev() {
            job.strikes += u32::from(alone && barren);
            if job.strikes >= STRIKES {
                job.answer(Err(lost.clone()));
            } else if job.answer.is_some() && Protection::ResendAfterLoss.is_enabled() {
                self.to_send.push_front(job);
            }
        }
        if barren && !silent {
            self.careful = self.to_send.len();
        }
        ChannelEnd::Lost { error: lost, barren }
    }
}

/// In order, or lapin complains of a connection that closes over a channel that does.
async fn close(channel: &Channel) {
    if let Err(error) = admin::answer(channel.close(200, "bye".into()), "closing").await {
        tracing::debug!(%error, "the channel did not close in order");
    }
}
