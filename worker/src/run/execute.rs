//! Runs one attempt to its outcome. Time limits, panics, cancellations and interruptions end here and
//! nowhere else.

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;

use super::concurrency::Permit;
use super::outcome::Outcome;
use crate::handlers::{Context, Handler, panic_message};

/// Maximum time that a process may take to end when its worker stops waiting.
const ABORT_GRACE: Duration = Duration::from_millis(500);

/// Time limits of an attempt.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TimeLimits {
    /// When the handler is asked to end.
    pub(crate) soft: Option<Duration>,
    /// When the attempt is over.
    pub(crate) hard: Duration,
    /// How long after `hard` a process may take to end before it is killed.
    pub(crate) kill_grace: Duration,
}

/// Signals that end an attempt from outside.
#[derive(Clone, Copy)]
pub(crate) struct StopSignals<'a> {
    /// The worker stops and waits no longer.
    pub(crate) abort: &'a CancellationToken,
    /// The task has a cancel request.
    pub(crate) cancel: &'a CancellationToken,
    /// How long the attempt may take to end after `cancel`.
    pub(crate) cancel_grace: Duration,
}

/// Runs the handler until it ends, its hard time limit passes, or a signal stops it.
pub(crate) async fn execute(
    handler: &dyn Handler,
    context: &Context,
    permit: Permit,
    limits: TimeLimits,
    signals: StopSignals<'_>,
) -> Outcome {
    // The call itself runs user code too (the synchronous start of an async function), hence the async
    // block. State that a panic leaves behind is dropped with the attempt.
    let attempt = async { handler.run(context.clone(), permit).await };
    let mut attempt = std::pin::pin!(AssertUnwindSafe(attempt).catch_unwind());
    // Many tasks end with the first poll; they need neither timers nor the memory for waiting.
    let first = poll_fn(|cx| Poll::Ready(attempt.as_mut().poll(cx))).await;
    match first {
        Poll::Ready(ended) => {
            // Stops what an async handler has spawned.
            context.end();
            unwrap_panic(ended)
        }
        Poll::Pending => {
            Box::pin(wait(attempt, handler.is_process(), context, limits, signals)).await
        }
    }
}

/// Waits for an attempt that did not end with its first poll.
async fn wait(
    mut attempt: Pin<&mut impl Future<Output = Ended>>,
    is_process: bool,
    context: &Context,
    limits: TimeLimits,
    signals: StopSignals<'_>,
) -> Outcome {
    let mut hard = std::pin::pin!(tokio::time::sleep(limits.hard));
    let mut soft = std::pin::pin!(soft_limit(limits));
    let mut asked_to_end = false;
    let mut not_cancelled_in_time = std::pin::pin!(pass_on_cancellation(context, signals));
    let outcome = loop {
        tokio::select! {
            ended = &mut attempt => {
                context.end();
                return unwrap_panic(ended);
            }
            () = &mut soft, if !asked_to_end => {
                asked_to_end = true;
                context.cancel();
            }
            () = &mut hard => break Outcome::TimedOut(limits.hard),
            () = signals.abort.cancelled() => break Outcome::Interrupted,
            () = &mut not_cancelled_in_time => break Outcome::Cancelled,
        }
    };
    // A process that was asked to end before has had its time.
    let grace = if context.is_cancelled() { Duration::ZERO } else { limits.kill_grace };
    // Reaches a blocking handler that continues, and what an async handler has spawned.
    context.end();
    if is_process {
        wait_for_process(attempt, grace, signals.abort).await;
    }
    outcome
}

async fn soft_limit(limits: TimeLimits) {
    match limits.soft.filter(|soft| *soft < limits.hard) {
        Some(soft) => tokio::time::sleep(soft).await,
        None => std::future::pending().await,
    }
}

/// Passes a cancellation on to the handler. Completes when its time to end after that is over.
async fn pass_on_cancellation(context: &Context, signals: StopSignals<'_>) {
    signals.cancel.cancelled().await;
    context.cancel();
    tokio::time::sleep(signals.cancel_grace).await;
}

/// Waits for the end of a process whose attempt is over, since the next attempt must not run beside it.
/// Its output is ignored. The caller kills it by dropping the attempt if it has not ended by then.
async fn wait_for_process(
    attempt: Pin<&mut impl Future<Output = Ended>>,
    grace: Duration,
    abort: &CancellationToken,
) {
    let aborted = async {
        abort.cancelled().await;
        tokio::time::sleep(ABORT_GRACE).await;
    };
    tokio::select! {
        _ = attempt => {}
        () = tokio::time::sleep(grace) => {}
        () = aborted => {}
    }
}

/// The outcome of a handler, or its panic.
type Ended = Result<Outcome, Box<dyn std::any::Any + Send>>;

fn unwrap_panic(ended: Ended) -> Outcome {
    ended.unwrap_or_else(|panic| Outcome::Panicked(panic_message(&*panic)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handlers::{AsyncHandler, BlockingHandler};
    use crate::run::concurrency::Concurrency;
    use crate::run::outcome::TaskError;
    use garenne_common::{Codec, Payload, Task};
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    struct Number(i64);

    impl Task for Number {
        const NAME: &'static str = "number";
        type Output = i64;
    }

    fn limits(soft: Option<Duration>, hard: Duration) -> TimeLimits {
        TimeLimits { soft, hard, kill_grace: Duration::ZERO }
    }

    /// Stop signals, none of which has fired.
    #[derive(Default)]
    struct Quiet {
        abort: CancellationToken,
        cancel: CancellationToken,
        cancel_grace: Duration,
    }

    impl Quiet {
        fn signals(&self) -> StopSignals<'_> {
            let Self { abort, cancel, cancel_grace } = self;
            StopSignals { abort, cancel, cancel_grace: *cancel_grace }
        }
    }

    async fn run(handler: &dyn Handler, args: &str) -> Outcome {
        let concurrency = Concurrency::new(1);
        let permit = concurrency.one().await.unwrap();
        let limits = limits(None, Duration::from_secs(2));
        let quiet = Quiet::default();
        let outcome =
            execute(handler, &Context::of_args(args), permit, limits, quiet.signals()).await;
        // An async handler releases its permit, whatever the outcome.
        drop(concurrency.all().await.unwrap());
        outcome
    }

    async fn behave(_: Context, Number(number): Number) -> Result<i64, TaskError> {
        match number {
            0 => Err(TaskError::retry("zero")),
            -1 => panic!("minus one"),
            -2 => std::future::pending().await,
            more => Ok(more * 2),
        }
    }

    #[tokio::test]
    async fn every_end_is_an_outcome() {
        let handler = AsyncHandler::<Number, _>::new(behave);
        let output = Payload::encode(Codec::Json, &6).unwrap();
        assert_eq!(run(&handler, "3").await, Outcome::Succeeded(output));
        assert_eq!(run(&handler, "0").await, Outcome::Failed(TaskError::retry("zero")));
        assert_eq!(run(&handler, "-1").await, Outcome::Panicked("minus one".to_owned()));
        assert!(matches!(run(&handler, "-2").await, Outcome::TimedOut(_)));
        assert!(matches!(run(&handler, "{}").await, Outcome::BadArguments(_)));
    }

    #[tokio::test]
    async fn a_blocking_panic_is_an_outcome_too() {
        let handler = BlockingHandler::<Number, _>::new(|_: &Context, Number(number)| {
            assert!(number != 1, "one");
            Ok(number)
        });
        assert_eq!(run(&handler, "1").await, Outcome::Panicked("one".to_owned()));
        assert!(matches!(run(&handler, "2").await, Outcome::Succeeded(_)));
    }

    #[tokio::test]
    async fn a_cancelled_attempt_may_end_by_itself_within_the_grace_period() {
        let polite = |context: Context, Number(number): Number| async move {
            context.cancelled().await;
            if number == 0 { std::future::pending().await } else { Ok(number) }
        };
        let handler = AsyncHandler::<Number, _>::new(polite);
        for (args, grace, succeeds) in [("7", 60_000, true), ("0", 20, false)] {
            let cancel_grace = Duration::from_millis(grace);
            let quiet = Quiet { cancel_grace, ..Quiet::default() };
            quiet.cancel.cancel();
            let permit = Concurrency::new(1).one().await.unwrap();
            let (context, limits) = (Context::of_args(args), limits(None, Duration::from_mins(1)));
            let outcome = execute(&handler, &context, permit, limits, quiet.signals()).await;
            assert_eq!(matches!(outcome, Outcome::Succeeded(_)), succeeds, "{outcome:?}");
            assert_eq!(outcome == Outcome::Cancelled, !succeeds, "{outcome:?}");
        }
    }

    #[tokio::test]
    async fn an_abort_interrupts() {
        let handler = AsyncHandler::<Number, _>::new(behave);
        let quiet = Quiet::default();
        quiet.abort.cancel();
        let permit = Concurrency::new(1).one().await.unwrap();
        let context = Context::of_args("-2");
        let limits = limits(None, Duration::from_secs(9));
        let outcome = execute(&handler, &context, permit, limits, quiet.signals()).await;
        assert_eq!(outcome, Outcome::Interrupted);
        assert!(context.is_cancelled());
    }

    #[tokio::test]
    async fn after_a_soft_limit_the_handler_may_still_succeed() {
        let asked = AsyncHandler::<Number, _>::new(async |context: Context, Number(number)| {
            context.cancelled().await;
            Ok(number)
        });
        let soft = Duration::from_millis(20);
        let limits = limits(Some(soft), Duration::from_secs(20));
        let permit = Concurrency::new(1).one().await.unwrap();
        let context = Context::of_args("5");
        let quiet = Quiet::default();
        let outcome = execute(&asked, &context, permit, limits, quiet.signals()).await;
        assert!(matches!(outcome, Outcome::Succeeded(_)), "{outcome:?}");
    }
}
