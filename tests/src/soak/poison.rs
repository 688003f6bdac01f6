//! Poison at scale: one aborting task per 1,000 among tasks of 200 ms, three workers, prefetch 50
//! (promise 3).

use super::{figure, size};
use crate::poison::measure;

const TASKS: usize = 10_000;
const MILLIS: u64 = 200;
/// And as many ahead: a prefetch of 50.
const CONCURRENCY: usize = 25;

#[tokio::test(flavor = "multi_thread")]
async fn poison_costs_at_most_a_fifth_of_the_throughput() {
    let tasks = u32::try_from(size(TASKS)).unwrap();
    let undisturbed = measure(tasks, None, MILLIS, CONCURRENCY).await.as_secs_f64();
    let poisoned = measure(tasks, Some(1_000), MILLIS, CONCURRENCY).await.as_secs_f64();
    let share = undisturbed / poisoned;
    figure(
        "poison",
        &[
            ("tasks", tasks.to_string()),
            ("undisturbed_seconds", format!("{undisturbed:.1}")),
            ("poisoned_seconds", format!("{poisoned:.1}")),
            ("throughput_percent", format!("{:.0}", share * 100.0)),
        ],
    );
    assert!(share >= 0.8, "{share:.2}");
}
