//! Runs one attempt to its outcome: time limit, panic and interruption end here and nowhere else.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::handler::{Fault, Handler, Slot, panic_message};
use crate::outcome::Outcome;

/// Runs the handler until it ends, for at most `limit`, or until `abort`.
pub(crate) async fn execute(
    handler: &dyn Handler,
    context: &Context,
    slot: Slot,
    limit: Duration,
    abort: &CancellationToken,
) -> Outcome {
    // The call itself runs user code too (an async function's synchronous beginning), hence the
    // async block. What a panic leaves behind is dropped with the attempt.
    let attempt = async { handler.run(context.clone(), slot).await };
    let attempt = AssertUnwindSafe(attempt).catch_unwind();
    let outcome = tokio::select! {
        ended = attempt => match ended {
            Ok(Ok(output)) => Outcome::Succeeded(output),
            Ok(Err(Fault::BadArguments(error))) => Outcome::BadArguments(error),
            Ok(Err(Fault::Failed(error))) => Outcome::Failed(error),
            Ok(Err(Fault::Panicked(message))) => Outcome::Panicked(message),
            Err(panic) => Outcome::Panicked(panic_message(&*panic)),
        },
        () = tokio::time::sleep(limit) => Outcome::TimedOut(limit),
        () = abort.cancelled() => Outcome::Interrupted,
    };
    // For a blocking handler that goes on, and for what an async one has spawned.
    context.cancel();
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handler::{AsyncHandler, BlockingHandler};
    use crate::outcome::TaskError;
    use garenne_common::{Codec, Payload, Task};
    use serde::{Deserialize, Serialize};
    use std::sync::Arc;
    use tokio::sync::Semaphore;

    #[derive(Serialize, Deserialize)]
    struct Number(i64);

    impl Task for Number {
        const NAME: &'static str = "number";
        type Output = i64;
    }

    async fn run(handler: &dyn Handler, args: &str) -> Outcome {
        let slots = Arc::new(Semaphore::new(1));
        let slot = Arc::new(Arc::clone(&slots).acquire_owned().await.unwrap());
        let abort = CancellationToken::new();
        let limit = Duration::from_millis(200);
        let outcome = execute(handler, &Context::of_args(args), slot, limit, &abort).await;
        // Whatever the outcome, an async handler leaves its slot free.
        drop(slots.acquire().await.unwrap());
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
    async fn an_abort_interrupts() {
        let handler = AsyncHandler::<Number, _>::new(behave);
        let abort = CancellationToken::new();
        abort.cancel();
        let slot = Arc::new(Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap());
        let context = Context::of_args("-2");
        let outcome = execute(&handler, &context, slot, Duration::from_secs(9), &abort).await;
        assert_eq!(outcome, Outcome::Interrupted);
        assert!(context.is_cancelled());
    }
}
