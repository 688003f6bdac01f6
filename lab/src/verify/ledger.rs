//! The ledger: what handlers did, written down outside the system.
//!
//! One line a request: `run INDEX ATTEMPT ID WORKER` when an execution begins, and
//! `effect INDEX ATTEMPT ID WORKER KEY` for its effect, with `-` for a handler that uses no key. Each is
//! answered by a line: `ok`, or `repeat` for an effect whose key is there already. The other end is
//! `worker/src/verify.rs`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::mix::Mix;

/// How many strangers are remembered by name.
const NAMED_STRANGERS: usize = 20;

/// The ledger's service.
pub(super) struct Ledger {
    address: String,
    book: Arc<Mutex<Book>>,
    _serving: AbortOnDropHandle<()>,
}

/// What is written there.
#[derive(Debug)]
pub(super) struct Book {
    mix: Mix,
    /// Executions by task.
    pub(super) runs: HashMap<u64, Vec<Run>>,
    /// Effects by task: the key of each, or nothing.
    pub(super) effects: HashMap<u64, Vec<Option<String>>>,
    /// To which task a key belongs.
    keys: HashMap<String, u64>,
    /// Effects that were refused because their key was there.
    pub(super) refused: u64,
    /// Executions and effects of what nobody submitted, or under somebody else's key.
    pub(super) strangers: Vec<String>,
}

/// One execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) attempt: u32,
    pub(super) worker: String,
    pub(super) at: Instant,
}

impl Ledger {
    pub(super) async fn start(mix: Mix) -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?.to_string();
        let book = Arc::new(Mutex::new(Book::new(mix)));
        let serving = TaskTracker::new().spawn(accept(listener, Arc::clone(&book)));
        Ok(Self { address, book, _serving: AbortOnDropHandle::new(serving) })
    }

    /// Where workers reach it.
    pub(super) fn address(&self) -> &str {
        &self.address
    }

    /// What is written in it.
    pub(super) fn read<R>(&self, read: impl FnOnce(&Book) -> R) -> R {
        read(&self.book.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn accept(listener: TcpListener, book: Arc<Mutex<Book>>) {
    // Aborted together with this task.
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        connections.spawn(serve(stream, Arc::clone(&book)));
    }
}

async fn serve(mut stream: TcpStream, book: Arc<Mutex<Book>>) {
    drop(stream.set_nodelay(true));
    let (from, mut to) = stream.split();
    let mut from = BufReader::new(from);
    let mut line = String::new();
    // A line without its end is that of a worker which was killed: it does not count.
    while matches!(from.read_line(&mut line).await, Ok(1..)) && line.ends_with('\n') {
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = book.lock().unwrap_or_else(PoisonError::into_inner).enter(&words);
        if to.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
        line.clear();
    }
}

impl Book {
    pub(super) fn new(mix: Mix) -> Self {
        Self {
            mix,
            runs: HashMap::new(),
            effects: HashMap::new(),
            keys: HashMap::new(),
            refused: 0,
            strangers: vec![],
        }
    }

    /// Enters a request, and says what to answer.
    pub(super) fn enter(&mut self, words: &[&str]) -> &'static str {
        let (index, attempt, id) = match words {
            ["run" | "effect", index, attempt, id, ..] => (index.parse(), attempt.parse(), *id),
            _ => return self.stranger(words),
        };
        let (Ok(index), Ok(attempt)) = (index, attempt) else { return self.stranger(words) };
        if self.mix.index_of(id) != Some(index) {
            return self.stranger(words);
        }
        match words[4..] {
            [worker] => {
                let run = Run { attempt, worker: worker.to_owned(), at: Instant::now() };
                self.runs.entry(index).or_default().push(run);
                "ok\n"
            }
            [_, "-"] => {
                self.effects.entry(index).or_default().push(None);
                "ok\n"
            }
            [_, key] => self.effect(index, key, words),
            _ => self.stranger(words),
        }
    }

    fn effect(&mut self, index: u64, key: &str, words: &[&str]) -> &'static str {
        match self.keys.entry(key.to_owned()) {
            Entry::Vacant(place) => {
                place.insert(index);
                self.effects.entry(index).or_default().push(Some(key.to_owned()));
                "ok\n"
            }
            Entry::Occupied(owner) if *owner.get() == index => {
                self.refused += 1;
                "repeat\n"
            }
            Entry::Occupied(_) => self.stranger(words),
        }
    }

    fn stranger(&mut self, words: &[&str]) -> &'static str {
        if self.strangers.len() < NAMED_STRANGERS {
            self.strangers.push(words.join(" "));
        }
        "ok\n"
    }

    /// How many executions there were.
    pub(super) fn executions(&self) -> u64 {
        self.runs.values().map(|runs| runs.len() as u64).sum()
    }

    /// How many of them repeated an attempt that had begun before.
    pub(super) fn duplicates(&self) -> u64 {
        let distinct = |runs: &Vec<Run>| {
            let mut attempts: Vec<_> = runs.iter().map(|run| run.attempt).collect();
            attempts.sort_unstable();
            attempts.dedup();
            attempts.len()
        };
        self.runs.values().map(|runs| (runs.len() - distinct(runs)) as u64).sum()
    }

    /// How many effects without a key came a second time.
    pub(super) fn unkeyed_repeats(&self) -> u64 {
        let repeats = |effects: &Vec<Option<String>>| {
            (effects.iter().filter(|key| key.is_none()).count() as u64).saturating_sub(1)
        };
        self.effects.values().map(repeats).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(lines: &[&str]) -> (Book, Vec<&'static str>) {
        let mut book = Book::new(Mix { seed: 1, tasks: 10 });
        let answers = lines.iter().map(|line| book.enter(&line.split(' ').collect::<Vec<_>>()));
        let answers = answers.collect();
        (book, answers)
    }

    #[test]
    fn a_key_has_one_effect_and_the_second_is_told() {
        let (book, answers) = book(&["effect 3 1 v-1-3 w k", "effect 3 2 v-1-3 x k"]);
        assert_eq!(answers, ["ok\n", "repeat\n"]);
        assert_eq!((book.effects[&3].len(), book.refused), (1, 1));
    }

    #[test]
    fn two_keys_are_two_effects_and_no_key_is_counted() {
        let (book, _) = book(&["effect 3 1 v-1-3 w k", "effect 3 1 v-1-3 w l"]);
        assert_eq!(book.effects[&3].len(), 2);
        let lines = ["effect 4 1 v-1-4 w -", "effect 4 1 v-1-4 w -"];
        assert_eq!(super::tests::book(&lines).0.unkeyed_repeats(), 1);
    }

    #[test]
    fn what_nobody_submitted_is_a_stranger_and_so_is_a_borrowed_key() {
        let lines = [
            "run 3 1 v-2-3 w",
            "run 3 1 v-1-4 w",
            "nonsense",
            "effect 3 1 v-1-3 w k",
            "effect 4 1 v-1-4 w k",
        ];
        let (book, _) = book(&lines);
        assert_eq!(book.strangers.len(), 4, "{:?}", book.strangers);
    }

    #[test]
    fn only_repeated_attempts_are_duplicates() {
        let (book, _) = book(&["run 3 1 v-1-3 w", "run 3 2 v-1-3 w", "run 3 1 v-1-3 x"]);
        assert_eq!((book.executions(), book.duplicates()), (3, 1));
    }
}
