//! Delays between attempts to connect.

use std::time::Duration;

/// The shortest delay between two attempts.
const SHORTEST: Duration = Duration::from_millis(100);
/// The longest.
const LONGEST: Duration = Duration::from_secs(5);
/// A third of the upper bound of the first delay: clients that lost one broker at the same time
/// return over most of a second.
const FIRST: Duration = Duration::from_millis(300);

/// Exponential back-off with decorrelated jitter: each delay is drawn between 0.1 s and three times
/// the previous one, at most 5 s, so that clients that were disconnected together do not return
/// together.
pub(super) struct Backoff(Duration);

impl Backoff {
    pub(super) fn new() -> Self {
        Self(FIRST)
    }

    /// The delay before the next attempt.
    pub(super) fn next_delay(&mut self) -> Duration {
        let most = (self.0 * 3).min(LONGEST);
        self.0 = SHORTEST + most.saturating_sub(SHORTEST).mul_f64(fastrand::f64());
        self.0
    }

    /// Begins again with a short delay, after a success.
    pub(super) fn reset(&mut self) {
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_stay_within_their_bounds_and_grow() {
        let mut backoff = Backoff::new();
        let delays: Vec<_> = (0..1_000).map(|_| backoff.next_delay()).collect();
        assert!(delays.iter().all(|delay| (SHORTEST..=LONGEST).contains(delay)));
        assert!(delays[0] <= FIRST * 3);
        assert!(delays.iter().skip(20).sum::<Duration>() > Duration::from_secs(980));
        backoff.reset();
        assert!(backoff.next_delay() <= FIRST * 3);
    }

    #[test]
    fn a_thousand_clients_that_lost_the_broker_together_do_not_return_together() {
        // A broker that is away for 15 s; attempts counted in windows of a tenth of a second.
        let mut windows = vec![0_u32; 300];
        for _ in 0..1_000 {
            let (mut backoff, mut now) = (Backoff::new(), Duration::ZERO);
            loop {
                now += backoff.next_delay();
                let Some(window) = windows.get_mut((now.as_millis() / 100) as usize) else { break };
                *window += 1;
                if now > Duration::from_secs(15) {
                    break;
                }
            }
        }
        // Typical are 220 and 75; a fixed delay would bring all thousand into one window.
        assert!(windows.iter().all(|attempts| *attempts < 400), "{windows:?}");
        let returned: u32 = windows.iter().skip(150).sum();
        assert_eq!(returned, 1_000, "all have returned 5 s after the broker");
        assert!(windows.iter().skip(150).all(|attempts| *attempts < 200), "{windows:?}");
    }
}
