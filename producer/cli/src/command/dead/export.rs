//! `garenne dead export`: complete letters as JSON Lines.
//!
//! Only one page is in memory at a time. A file is complete or does not exist: it is written under
//! a temporary name beside its place and renamed at the end.

use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use garenne_common::wire::{DeadSummary, LetterState, Query, Response};
use garenne_producer::Producer;
use tempfile::NamedTempFile;

use super::selection::{PageRequest, Selection, letters, page};
use crate::context::Context;
use crate::error::{CliError, Exit};
use crate::output::line;

const EXAMPLES: &str = "\
Examples:
  garenne dead export > dead.jsonl
  garenne dead export --until 7days --file old.jsonl
  garenne dead export --task 'mail.*' | jq -r '.message.body_text | fromjson | .to'

One JSON object per line: what `garenne dead list -o json` prints, and `message`
with all properties and headers. The body is exact to the byte, as `body_text`,
or as `body_base64` if it is not UTF-8.

A file given with --file is complete or does not exist. Exit code 3 if there is
no dead letter with one of the ids.";

/// Letters per query.
const PAGE: u64 = 500;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DeadExportArgs {
    #[command(flatten)]
    selection: Selection,
    /// Instead of the others, letters that were replayed
    #[arg(long, conflicts_with = "late")]
    replayed: bool,
    /// Write to this file [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    file: Option<PathBuf>,
}

/// The destination of the lines.
enum Sink {
    Stdout,
    File { file: BufWriter<NamedTempFile>, place: PathBuf },
}

pub(crate) async fn run(context: &Context, arguments: &DeadExportArgs) -> Result<Exit, CliError> {
    // First, so that a file that cannot be written is reported before anything is fetched.
    let sink = Sink::open(arguments.file.as_deref())?;
    let producer = context.producer("dead export").await?;
    let done = export(context, &producer, arguments, sink).await;
    context.close(producer, &done).await;
    let count = done?;
    if let Some(file) = &arguments.file {
        let file = file.display();
        context.output.remark(format_args!("wrote {} to {file}", letters(count)));
    }
    let missing = arguments.selection.unmatched_ids(count);
    if missing > 0 {
        context.output.remark(format_args!("{missing} of the ids are not among the dead letters"));
        return Ok(Exit::NotYet);
    }
    Ok(Exit::Success)
}

async fn export(
    context: &Context,
    producer: &Producer,
    arguments: &DeadExportArgs,
    mut sink: Sink,
) -> Result<u64, CliError> {
    let mut filter = arguments.selection.filter();
    if arguments.replayed {
        filter.state = LetterState::Replayed;
    }
    let (mut from, mut count) = (None, 0);
    loop {
        let request = PageRequest { filter: &filter, from, limit: PAGE, whole: true };
        let page = page(context, producer, request).await?;
        for letter in page.letters {
            let letter = with_body(context, producer, letter).await?;
            let text = serde_json::to_string(&letter).map_err(|error| {
                CliError::unusable(format!("cannot write {}: {error}", letter.id))
            })?;
            sink.line(&text)?;
            count += 1;
        }
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    sink.finish()?;
    Ok(count)
}

/// Fetches the body in pieces if it was too large for the page.
async fn with_body(
    context: &Context,
    producer: &Producer,
    mut letter: DeadSummary,
) -> Result<DeadSummary, CliError> {
    let Some(message) = &mut letter.message else { return Err(CliError::unexpected_response()) };
    if message.body_text.is_some() || message.body_base64.is_some() {
        return Ok(letter);
    }
    let mut base64 = String::new();
    loop {
        // Every piece but the last consists of whole groups of three bytes, four characters each.
        let offset = base64.len() as u64 / 4 * 3;
        if offset >= letter.body_bytes {
            break;
        }
        let query = Query::DeadBody { id: letter.id.clone(), offset };
        let response = context.query(producer, query).await?;
        let Response::DeadBody { base64: piece } = response else {
            return Err(CliError::unexpected_response());
        };
        if piece.is_empty() {
            // Purged, or deleted by the retention, since the page was fetched.
            let message = format!("dead letter {} was deleted while it was exported", letter.id);
            return Err(CliError::unusable(message).help("export again"));
        }
        base64.push_str(&piece);
    }
    message.body_base64 = Some(base64);
    Ok(letter)
}

impl Sink {
    fn open(place: Option<&Path>) -> Result<Self, CliError> {
        let Some(place) = place else { return Ok(Self::Stdout) };
        let directory = place.parent().filter(|parent| !parent.as_os_str().is_empty());
        let file = NamedTempFile::new_in(directory.unwrap_or(Path::new(".")));
        let file = file.map_err(|error| cannot_write(place, &error))?;
        Ok(Self::File { file: BufWriter::new(file), place: place.to_owned() })
    }

    fn line(&mut self, text: &str) -> Result<(), CliError> {
        match self {
            Self::Stdout => line(text),
            Self::File { file, place } => {
                let written = file.write_all(text.as_bytes()).and_then(|()| file.write_all(b"\n"));
                written.map_err(|error| cannot_write(place, &error))
            }
        }
    }

    /// Syncs the file to disk, then renames it to its place.
    fn finish(self) -> Result<(), CliError> {
        let Self::File { file, place } = self else { return Ok(()) };
        let failed = |error: &std::io::Error| cannot_write(&place, error);
        let file = file.into_inner().map_err(|error| failed(error.error()))?;
        file.as_file().sync_all().map_err(|error| failed(&error))?;
        file.persist(&place).map_err(|error| failed(&error.error))?;
        Ok(())
    }
}

fn cannot_write(place: &Path, error: &std::io::Error) -> CliError {
    let kind = error.kind();
    let help = if matches!(kind, ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
        "free some space, or choose another place; no file was left behind"
    } else if kind == ErrorKind::NotFound {
        "does the directory exist?"
    } else if kind == ErrorKind::PermissionDenied {
        "may you write into that directory?"
    } else {
        "no file was left behind"
    };
    // The message of tempfile ends with the temporary name, which would only confuse.
    let error = error.to_string();
    let error = error.split(" at path \"").next().unwrap_or_default();
    CliError::unusable(format!("cannot write {}: {error}", place.display())).help(help)
}
