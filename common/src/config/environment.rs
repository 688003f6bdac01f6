//! Variables of the environment that are not configuration keys. Programs and scripts set them for
//! their children, and users for all programs (`NO_COLOR`).

/// The variable that a worker sets for its children that run isolated attempts.
pub const ISOLATED_ON: &str = "GARENNE_ISOLATED_ON";

/// The inode of the socket over which a worker controls this process or one of its ancestors.
/// `service::lifeline::is_isolated` distinguishes the two.
pub fn isolated_on() -> Option<u64> {
    std::env::var(ISOLATED_ON).ok()?.parse().ok()
}

/// Whether the user has disabled colours (<https://no-color.org>).
pub fn no_color() -> bool {
    std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
}

/// The URL of the management UI of the broker that `scripts/rabbitmq run` has started.
pub fn management_url() -> Option<String> {
    std::env::var("GARENNE_MANAGEMENT_URL").ok().filter(|url| !url.is_empty())
}

/// The process id of the broker that `scripts/rabbitmq run` has started.
pub fn broker_pid() -> Option<u32> {
    std::env::var("BROKER_PID").ok()?.parse().ok()
}
