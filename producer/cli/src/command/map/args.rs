//! The arguments of `garenne map`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use garenne_common::TaskName;

use crate::options::{self, TaskOptions};

const EXAMPLES: &str = "\
Examples:
  garenne map text.count_words --arg text < lines.txt
  find /srv/data -type f -print0 | garenne map file.sha256 --arg path --null
  garenne map job.run jobs.jsonl --retries 5 --timeout 2m --failures-only
  id=$(garenne map job.run jobs.jsonl --detach) && garenne batch wait \"$id\"

Prints one JSON object per line of input, in the order of the input:
  {\"line\":1,\"id\":\"0192…\",\"status\":\"succeeded\",\"output\":4}
  {\"line\":2,\"id\":\"0192…\",\"status\":\"failed\",\"error\":\"…\",\"reason\":\"fatal\",…}

File tasks need workers that may read the files, for example garenne-worker
--file-root /srv/data.

Lines that are read together share messages; producer.bundle_tasks = 1 sends
each in a message of its own.

Empty lines are skipped. Plain text is used unchanged; a line that is not UTF-8
or ends with a carriage return (Windows) is an error. A file is checked as a
whole before anything is submitted. Standard input cannot be: at the first
invalid line submitting stops, the tasks submitted before are waited for, and
the exit code is 2. Otherwise: 0 all succeeded, 1 at least one did not.

Ctrl-C stops submitting. Tasks that were submitted continue, and `garenne batch
show ID` shows their state.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(crate) struct MapArgs {
    /// The name of the tasks, which selects their handler
    #[arg(value_name = "TASK")]
    pub(super) task: TaskName,
    /// One task per line, its arguments as JSON [default: standard input]
    #[arg(value_name = "FILE")]
    pub(super) file: Option<PathBuf>,
    /// Lines are plain text: each becomes the arguments {"NAME": line}
    #[arg(long, value_name = "NAME")]
    pub(super) arg: Option<String>,
    /// Lines end with a zero byte and may contain line breaks, as from `find -print0`
    #[arg(long, short = '0')]
    pub(super) null: bool,
    /// Print results as they arrive, not in the order of the input
    #[arg(long)]
    pub(super) unordered: bool,
    /// Print only tasks that did not succeed
    #[arg(long)]
    pub(super) failures_only: bool,
    /// Do not wait for results; print the batch's id
    #[arg(long, conflicts_with_all = ["unordered", "failures_only"])]
    pub(super) detach: bool,
    /// The most tasks under way at once; bounds memory
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) window: u64,
    /// How long to retry a submission while the broker is not available
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = options::duration)]
    pub(super) patience: Duration,
    #[command(flatten)]
    pub(super) options: TaskOptions,
}
