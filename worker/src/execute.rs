//! Runs one attempt to its outcome: time limit, panic and interruption end here and nowhere else.

use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::handler::{Fault, Handler, Slot, panic_message};
use crate::outcome::{Outcome, Retryable, Trouble, TroubleKind};

/// How long a process may take to end when its whole worker is giving up waiting.
const SHORT_GRACE: Duration = Duration::from_millis(500);

/// How long an attempt may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// When the handler is asked to come to an end.
    pub(crate) soft: Option<Duration>,
    /// When the attempt is over.
    pub(crate) hard: Duration,
    /// How long after that a process may take to end before it is killed.
    pub(crate) grace: Duration,
}

/// What may end an attempt from outside.
#[derive(Clone, Copy)]
pub(crate) struct Stops<'a> {
    /// The worker waits no longer.
    pub(crate) abort: &'a CancellationToken,
    /// Somebody wants the task cancelled.
    pub(crate) cancel: &'a CancellationToken,
    /// How long it may take to end then.
    pub(crate) cancel_grace: Duration,
}

/// Runs the handler until it ends, for at most its hard limit, or until something stops it.
pub(crate) async fn execute(
    handler: &dyn Handler,
    context: &Context,
    slot: Slot,
    limits: Limits,
    stops: Stops<'_>,
) -> Outcome {
    // The call itself runs user code too (an async function's synchronous beginning), hence the
    // async block. What a panic leaves behind is dropped with the attempt.
    let attempt = async { handler.run(context.clone(), slot).await };
    let mut attempt = std::pin::pin!(AssertUnwindSafe(attempt).catch_unwind());
    // Many tasks end at once; they need no clock, and no room for what only waiting needs.
    let at_once = poll_fn(|now| Poll::Ready(attempt.as_mut().poll(now))).await;
    match at_once {
        Poll::Ready(ended) => {
            // For what an async handler has spawned.
            context.end();
            outcome(ended)
        }
        Poll::Pending => {
            Box::pin(wait(attempt, (handler.is_process(), context), limits, stops)).await
        }
    }
}

/// Waits for an attempt under way.
async fn wait(
    mut attempt: Pin<&mut impl Future<Output = Ended>>,
    (is_process, context): (bool, &Context),
    limits: Limits,
    stops: Stops<'_>,
) -> Outcome {
    let mut hard = std::pin::pin!(tokio::time::sleep(limits.hard));
    let soft = limits.soft.filter(|soft| *soft < limits.hard);
    let warning = async {
        match soft {
            Some(soft) => tokio::time::sleep(soft).await,
            None => std::future::pending().await,
        }
    };
    let mut warning = std::pin::pin!(warning);
    let mut warned = false;
    let abort = stops.abort;
    let mut outlasted = std::pin::pin!(outlasted(context, stops));
    let outcome = loop {
        tokio::select! {
            ended = &mut attempt => {
                context.end();
                return outcome(ended);
            }
            () = &mut warning, if !warned => {
                warned = true;
                context.cancel();
            }
            () = &mut hard => break Outcome::TimedOut(limits.hard),
            () = abort.cancelled() => break Outcome::Interrupted,
            () = &mut outlasted => break Outcome::Cancelled,
        }
    };
    let told = context.is_cancelled();
    // For a blocking handler that goes on, and for what an async one has spawned.
    context.end();
    if is_process {
        // One that was told in time has had its time.
        let grace = if told { Duration::ZERO } else { limits.grace };
        let patience = async {
            abort.cancelled().await;
            tokio::time::sleep(SHORT_GRACE).await;
        };
        // The next attempt must not meet this one, so it is waited for; whatever it still says comes
        // too late. What has not ended then is killed by dropping it.
        tokio::select! {
            _ = attempt => {}
            () = tokio::time::sleep(grace) => {}
            () = patience => {}
        }
    }
    outcome
}

/// Passes a cancellation on to the handler, and completes when its time to heed it is over.
async fn outlasted(context: &Context, stops: Stops<'_>) {
    stops.cancel.cancelled().await;
    context.cancel();
    tokio::time::sleep(stops.cancel_grace).await;
}

type Ended = Result<Result<garenne_common::Payload, Fault>, Box<dyn std::any::Any + Send>>;

fn outcome(ended: Ended) -> Outcome {
    match ended {
        Ok(Ok(output)) => Outcome::Succeeded(output),
        Ok(Err(Fault::BadArguments(error))) => Outcome::BadArguments(error),
        Ok(Err(Fault::Failed(error))) => match error.retryable() {
            Retryable::OutOfResources => {
                let detail = error.message().to_owned();
                Outcome::Unable(Trouble::new(TroubleKind::Resources, detail))
            }
            Retryable::ByPolicy | Retryable::After(_) | Retryable::Never => Outcome::Failed(error),
        },
        Ok(Err(Fault::Unable(trouble))) => Outcome::Unable(trouble),
        Ok(Err(Fault::Panicked(message))) => Outcome::Panicked(message),
        Ok(Err(Fault::Interrupted)) => Outcome::Interrupted,
        Ok(Err(Fault::Crashed(crash))) => Outcome::Crashed(crash),
        Err(panic) => Outcome::Panicked(panic_message(&*panic)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::{AsyncHandler, BlockingHandler};
    use crate::outcome::TaskError;
    use crate::slots::Slots;
    use garenne_common::{Codec, Payload, Task};
    use serde::{Deserialize, Serialize};

    #[derive(Serialize, Deserialize)]
    struct Number(i64);

    impl Task for Number {
        const NAME: &'static str = "number";
        type Output = i64;
    }

    fn limits(soft: Option<Duration>, hard: Duration) -> Limits {
        Limits { soft, hard, grace: Duration::ZERO }
    }

    /// Everything that could stop an attempt, held still.
    #[derive(Default)]
    struct Quiet {
        abort: CancellationToken,
        cancel: CancellationToken,
        cancel_grace: Duration,
    }

    impl Quiet {
        fn stops(&self) -> Stops<'_> {
            let Self { abort, cancel, cancel_grace } = self;
            Stops { abort, cancel, cancel_grace: *cancel_grace }
        }
    }

    async fn run(handler: &dyn Handler, args: &str) -> Outcome {
        let slots = Slots::new(1);
        let slot = slots.one().await.unwrap();
        let limits = limits(None, Duration::from_secs(2));
        let stops = Quiet::default();
        let outcome = execute(handler, &Context::of_args(args), slot, limits, stops.stops()).await;
        // Whatever the outcome, an async handler leaves its slot free.
        drop(slots.all().await.unwrap());
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
    async fn every_end_is_a_value() {
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
    async fn a_cancelled_attempt_may_end_in_its_own_way_within_the_grace() {
        let polite = |context: Context, Number(number): Number| async move {
            context.cancelled().await;
            if number == 0 { std::future::pending().await } else { Ok(number) }
        };
        let handler = AsyncHandler::<Number, _>::new(polite);
        for (args, grace, succeeds) in [("7", 60_000, true), ("0", 20, false)] {
            let cancel_grace = Duration::from_millis(grace);
            let stops = Quiet { cancel_grace, ..Quiet::default() };
            stops.cancel.cancel();
            let slot = Slots::new(1).one().await.unwrap();
            let (context, limits) = (Context::of_args(args), limits(None, Duration::from_mins(1)));
            let outcome = execute(&handler, &context, slot, limits, stops.stops()).await;
            assert_eq!(matches!(outcome, Outcome::Succeeded(_)), succeeds, "{outcome:?}");
            assert_eq!(outcome == Outcome::Cancelled, !succeeds, "{outcome:?}");
        }
    }

    #[tokio::test]
    async fn an_abort_interrupts() {
        let handler = AsyncHandler::<Number, _>::new(behave);
        let stops = Quiet::default();
        stops.abort.cancel();
        let slot = Slots::new(1).one().await.unwrap();
        let context = Context::of_args("-2");
        let limits = limits(None, Duration::from_secs(9));
        let outcome = execute(&handler, &context, slot, limits, stops.stops()).await;
        assert_eq!(outcome, Outcome::Interrupted);
        assert!(context.is_cancelled());
    }

    #[tokio::test]
    async fn a_soft_limit_asks_and_the_handler_may_still_answer() {
        let asked = AsyncHandler::<Number, _>::new(async |context: Context, Number(number)| {
            context.cancelled().await;
            Ok(number)
        });
        let soft = Duration::from_millis(20);
        let limits = limits(Some(soft), Duration::from_secs(20));
        let slot = Slots::new(1).one().await.unwrap();
        let context = Context::of_args("5");
        let stops = Quiet::default();
        let outcome = execute(&asked, &context, slot, limits, stops.stops()).await;
        assert!(matches!(outcome, Outcome::Succeeded(_)), "{outcome:?}");
    }
}
