//! Tasks a second with arguments and outputs of some size, beside the bare client with bodies of that size.

use garenne_cli::error::CliError;

use crate::bench::Scenario;
use crate::bench::load::{Way, Work};
use crate::bench::stage::{Bench, Contest};

impl Bench<'_> {
    /// An echo, so the size counts twice: there and back.
    pub(in super::super) async fn payload(&mut self) -> Result<(), CliError> {
        self.workers(self.tuned(1)).await?;
        for way in [Way::Singles, Way::Bulk] {
            for &bytes in self.extent.payloads {
                let load = self.load(Work::text(bytes), way);
                let id = format!("payload.{}.{bytes}", way.name());
                let title = format!("{} with {}", way.name(), size(bytes));
                let contest = Contest::new(Scenario::Payload, id, title).lasting(0.4);
                let raw = self.raw.with_body(bytes);
                let figure = self
                    .compare(
                        contest,
                        async |bench, count| load.run_batch(&bench.producer, count).await,
                        async |_, count| raw.tasks_with_results(count).await,
                    )
                    .await?;
                let at = u64::try_from(bytes).unwrap_or(u64::MAX);
                self.figures.push(figure.at(way.name(), at));
            }
        }
        Ok(())
    }
}

/// As people say it.
pub(in super::super) fn size(bytes: usize) -> String {
    if bytes < 1_024 { format!("{bytes} B") } else { format!("{} KiB", bytes / 1_024) }
}
