//! What a transaction has said so far, kept for reports about it.
//!
//! When a deadlock is reported its evidence is gone: the victim's locks are released, and the survivor has gone on. What
//! both sides of it said is known here, where both are transactions of this process.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio_postgres::Statement;

use crate::call_site::CallSite;
use crate::error::Failure;
use crate::key::LockKey;
use crate::mode::AdvisoryMode;

/// Statements kept of one transaction; of more, the first and the last half.
const MOST: usize = 64;
/// Bytes kept of one statement's text.
const LONGEST: usize = 4096;
/// Prepared statements whose text is remembered.
const MOST_PREPARED: usize = 64;

/// One transaction's, or one session guard's.
#[derive(Debug)]
pub(crate) struct Journal {
    pub(crate) call_site: Option<CallSite>,
    pub(crate) application_name: Option<Arc<str>>,
    pub(crate) began: Instant,
    pub(crate) began_at: SystemTime,
    /// What bounds each of its waits for a lock, where that is known.
    pub(crate) lock_timeout: Option<Duration>,
    pub(crate) conflict_group: OnceLock<LockKey>,
    /// Which attempt of its transaction it is, and of how many, where there may be several.
    pub(crate) attempt: OnceLock<(u32, u32)>,
    /// Whether it is a session guard's: those hold locks between their statements.
    pub(crate) of_guard: bool,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    pid: Option<i32>,
    next: u64,
    statements: VecDeque<Said>,
    dropped: usize,
    prepared: Vec<(Statement, Arc<str>)>,
    failure: Option<Failing>,
    ended: Option<Instant>,
}

impl Log {
    /// Drops statements behind the first half until there are no more than `most`; but not one that runs, or is about to,
    /// however many were sent together, nor the one that failed.
    fn trim(&mut self, most: usize) {
        let failed = self.failure.map(|failing| failing.number);
        while self.statements.len() > most {
            let mut later = self.statements.iter().skip(MOST / 2);
            let Some(at) = later.position(|said| said.end.is_some() && Some(said.number) != failed)
            else {
                return;
            };
            drop(self.statements.remove(MOST / 2 + at));
            self.dropped += 1;
        }
    }
}

/// A statement that the server refused for its own sake, not because one before it had failed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Failing {
    pub(crate) number: u64,
    /// When its error was there.
    pub(crate) ended: Instant,
}

/// A statement.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    number: u64,
    pub(crate) at: Instant,
    /// `None` where it was prepared elsewhere.
    pub(crate) text: Option<Arc<str>>,
    waits_in_slices: bool,
    pub(crate) end: Option<Ended>,
    /// The advisory locks that it has taken.
    pub(crate) took: Vec<(LockKey, AdvisoryMode)>,
}

/// A statement that has not ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    pub(crate) number: u64,
    pub(crate) since: Instant,
    /// Whether it is a call that waits for its lock in several statements, one after another.
    pub(crate) waits_in_slices: bool,
}

/// How a statement ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) after: Duration,
    /// `None` where nobody waited for it.
    pub(crate) succeeded: Option<bool>,
}

impl Journal {
    /// How many statements come before those that are not kept, where there are such.
    pub(crate) const FIRST_KEPT: usize = MOST / 2;

    pub(crate) fn new(
        call_site: Option<CallSite>,
        application_name: Option<&str>,
        lock_timeout: Option<Duration>,
        of_guard: bool,
    ) -> Self {
        Self {
            call_site,
            application_name: application_name.map(Arc::from),
            began: Instant::now(),
            began_at: SystemTime::now(),
            lock_timeout,
            conflict_group: OnceLock::new(),
            attempt: OnceLock::new(),
            of_guard,
            log: Mutex::default(),
        }
    }

    /// The backend's pid, by the server's own word.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.lock().pid
    }

    pub(super) fn identify(&self, pid: i32) {
        self.lock().pid = Some(pid);
    }

    /// Whether the transaction was under way at that time.
    pub(super) fn was_alive(&self, at: Instant) -> bool {
        self.began <= at && self.lock().ended.is_none_or(|ended| ended >= at)
    }

    /// When it ended.
    pub(super) fn ended(&self) -> Option<Instant> {
        self.lock().ended
    }

    pub(super) fn end(&self) {
        let mut log = self.lock();
        log.ended = Some(Instant::now());
        // They belong to a connection that others use from now on.
        log.prepared.clear();
        log.trim(MOST);
    }

    /// The statement that is being run. A transaction runs one at a time; of several that were sent together the first is
    /// taken for it, which the server runs later only where the driver had to have it prepared first.
    pub(crate) fn running(&self) -> Option<Running> {
        let log = self.lock();
        if log.ended.is_some() {
            return None;
        }
        let said = log.statements.iter().find(|said| said.end.is_none())?;
        Some(Running {
            number: said.number,
            since: said.at,
            waits_in_slices: said.waits_in_slices,
        })
    }

    /// The last statement that the server refused for its own sake: what the session passes on as the transaction's
    /// failure. Others may have been begun since: sent together with it, or by who looked into its error.
    pub(crate) fn failure(&self) -> Option<Failing> {
        self.lock().failure
    }

    /// What was said, and how many statements behind the [first](Self::FIRST_KEPT) are not kept.
    pub(crate) fn statements(&self) -> (Vec<Said>, usize) {
        let log = self.lock();
        (log.statements.iter().cloned().collect(), log.dropped)
    }

    /// Notes a statement that is sent now.
    pub(super) fn say(&self, text: Option<Arc<str>>, waits_in_slices: bool) -> u64 {
        let mut log = self.lock();
        log.trim(MOST - 1);
        log.next += 1;
        let number = log.next;
        log.statements.push_back(Said {
            number,
            at: Instant::now(),
            text,
            waits_in_slices,
            end: None,
            took: Vec::new(),
        });
        number
    }

    /// Notes how it ended; `None` where nobody waited for it.
    pub(super) fn heard(&self, number: u64, succeeded: Option<bool>) {
        let mut log = self.lock();
        let mut latest_first = log.statements.iter_mut().rev();
        if let Some(said) = latest_first.find(|said| said.number == number) {
            said.end = Some(Ended {
                after: said.at.elapsed(),
                succeeded,
            });
        }
    }

    fn failed(&self, number: u64) {
        self.lock().failure = Some(Failing {
            number,
            ended: Instant::now(),
        });
    }

    fn unsay(&self, number: u64) {
        self.lock().statements.retain(|said| said.number != number);
    }

    /// Notes that advisory locks were granted, by the last statement.
    pub(crate) fn took(&self, locks: impl Iterator<Item = (LockKey, AdvisoryMode)>) {
        let mut log = self.lock();
        if let Some(said) = log.statements.back_mut() {
            said.took.extend(locks);
        }
    }

    fn remember(&self, statement: &Statement, text: &str) {
        let mut log = self.lock();
        if log.prepared.len() >= MOST_PREPARED {
            drop(log.prepared.remove(0));
        }
        log.prepared.push((statement.clone(), cut(text)));
    }

    fn text_of(&self, statement: &Statement) -> Option<Arc<str>> {
        let log = self.lock();
        let found = log
            .prepared
            .iter()
            .rev()
            .find(|(known, _)| is_same(known, statement))?;
        Some(Arc::clone(&found.1))
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether both are handles of one prepared statement: they share their descriptions. Statements without parameters and
/// columns have none, and are told apart by the name that the driver gives them.
fn is_same(one: &Statement, other: &Statement) -> bool {
    if one.params().is_empty() && one.columns().is_empty() {
        return other.params().is_empty()
            && other.columns().is_empty()
            && format!("{one:?}") == format!("{other:?}");
    }
    std::ptr::eq(one.params(), other.params()) && std::ptr::eq(one.columns(), other.columns())
}

/// At most [`LONGEST`] bytes of a text.
fn cut(text: &str) -> Arc<str> {
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Arc::from(&text[..end])
}

/// What a statement is noted as.
pub(crate) trait Noted {
    fn note(&self, journal: &Journal) -> Option<Arc<str>>;
}

impl Noted for str {
    fn note(&self, _: &Journal) -> Option<Arc<str>> {
        Some(cut(self))
    }
}

impl Noted for String {
    fn note(&self, journal: &Journal) -> Option<Arc<str>> {
        self.as_str().note(journal)
    }
}

impl Noted for Statement {
    fn note(&self, journal: &Journal) -> Option<Arc<str>> {
        journal.text_of(self)
    }
}

/// What a query method can be given: SQL text (`str`, `String`) or a prepared
/// [`Statement`].
///
/// It is the driver's [`ToStatement`](tokio_postgres::ToStatement), which has the same three implementations, with the
/// text of a statement made known for the incident report. Like that one it cannot be implemented elsewhere.
#[expect(private_bounds, reason = "seals the trait, as its docs say")]
pub trait ToStatement: tokio_postgres::ToStatement + Noted {}

impl ToStatement for str {}
impl ToStatement for String {}
impl ToStatement for Statement {}

/// A statement under way, noted.
pub(crate) struct Saying {
    journal: Arc<Journal>,
    number: u64,
    heard: bool,
}

impl Saying {
    pub(super) fn begin<T: ?Sized + Noted>(journal: &Arc<Journal>, statement: &T) -> Self {
        let text = statement.note(journal);
        Self::noted(journal, text, false)
    }

    /// A call that waits for its lock in several statements.
    pub(super) fn begin_in_slices(journal: &Arc<Journal>, call: &str) -> Self {
        Self::noted(journal, Some(cut(call)), true)
    }

    fn noted(journal: &Arc<Journal>, text: Option<Arc<str>>, waits_in_slices: bool) -> Self {
        Self {
            number: journal.say(text, waits_in_slices),
            journal: Arc::clone(journal),
            heard: false,
        }
    }

    /// It has ended, and so; `Aborted` where it failed because another had, `Driver` and `ConnectionLost` where that is
    /// not the server's word.
    pub(crate) fn end(mut self, failure: Option<Failure>) {
        self.heard = true;
        self.journal.heard(self.number, Some(failure.is_none()));
        match failure {
            // What the session knows of an earlier failure stays the transaction's.
            None | Some(Failure::Aborted | Failure::Driver | Failure::ConnectionLost) => {}
            Some(_) => self.journal.failed(self.number),
        }
    }

    /// Ends the preparing of this statement, which is not worth a line.
    pub(super) fn end_prepared(mut self, text: &str, statement: &Statement) {
        self.heard = true;
        self.journal.remember(statement, text);
        self.journal.unsay(self.number);
    }
}

impl Drop for Saying {
    fn drop(&mut self) {
        if !self.heard {
            self.journal.heard(self.number, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Journal {
        Journal::new(None, Some("test"), None, false)
    }

    #[test]
    fn the_first_and_the_last_half_are_kept() {
        let journal = journal();
        for n in 0..MOST * 2 {
            let said = journal.say(Some(format!("SELECT {n}").into()), false);
            journal.heard(said, Some(true));
        }
        let (statements, dropped) = journal.statements();
        assert_eq!((statements.len(), dropped), (MOST, MOST));
        let text = |n: usize| statements[n].text.as_deref().unwrap_or_default();
        assert_eq!(text(0), "SELECT 0");
        assert_eq!(text(MOST / 2 - 1), format!("SELECT {}", MOST / 2 - 1));
        assert_eq!(text(MOST - 1), format!("SELECT {}", MOST * 2 - 1));
    }

    #[test]
    fn of_many_that_were_sent_together_none_is_forgotten() {
        let journal = journal();
        let said: Vec<_> = (0..MOST * 2).map(|_| journal.say(None, false)).collect();
        for number in &said {
            let running = journal.running().map(|running| running.number);
            assert_eq!(running, Some(*number));
            journal.heard(*number, Some(true));
        }
        assert!(journal.running().is_none());
        // The one that failed stays, with the first and the last.
        let failed = said[MOST];
        journal.failed(failed);
        journal.end();
        let (statements, dropped) = journal.statements();
        assert_eq!((statements.len(), dropped), (MOST, MOST));
        let kept: Vec<_> = statements.iter().map(|said| said.number).collect();
        assert_eq!(kept[..Journal::FIRST_KEPT], said[..Journal::FIRST_KEPT]);
        assert_eq!(kept[Journal::FIRST_KEPT], failed);
        assert_eq!(kept.last(), said.last());
    }

    #[test]
    fn a_failure_is_what_the_server_refused() {
        let journal = Arc::new(journal());
        let failed = |failure| {
            let saying = Saying::begin(&journal, "SELECT 1");
            let number = saying.number;
            saying.end(failure);
            (number, journal.failure().map(|failing| failing.number))
        };
        assert_eq!(failed(None).1, None);
        let (first, failing) = failed(Some(Failure::LockTimeout));
        assert_eq!(failing, Some(first));
        for other in [
            None,
            Some(Failure::Aborted),
            Some(Failure::Driver),
            Some(Failure::ConnectionLost),
        ] {
            assert_eq!(failed(other).1, Some(first), "{other:?}");
        }
        let (second, failing) = failed(Some(Failure::Deadlock));
        assert_eq!(failing, Some(second));
    }

    #[test]
    fn the_one_that_runs_is_the_first_without_an_end() {
        let journal = journal();
        assert!(journal.running().is_none());
        let first = journal.say(None, false);
        let second = journal.say(None, false);
        assert_eq!(journal.running().map(|running| running.number), Some(first));
        journal.heard(first, None);
        assert_eq!(
            journal.running().map(|running| running.number),
            Some(second)
        );
        journal.end();
        assert!(journal.running().is_none());
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let text = "ü".repeat(LONGEST);
        assert_eq!(cut(&text).len(), LONGEST);
        let odd = format!("x{text}");
        assert_eq!(cut(&odd).len(), LONGEST - 1);
    }
}
