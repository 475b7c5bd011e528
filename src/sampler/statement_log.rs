//! The statements that a transaction has sent so far, kept for reports.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio_postgres::Statement;

use crate::call_site::CallSite;
use crate::connection::{Beginning, Observed, Sent, StatementEnd};
use crate::error::Failure;
use crate::key::LockKey;
use crate::mode::AdvisoryMode;
use crate::postgres::text::beginning;

/// How many statements of one transaction are kept: the first and the last half.
const MAX_STATEMENTS: usize = 64;
/// How many bytes of one statement's text are kept.
const MAX_STATEMENT_BYTES: usize = 4096;
/// How many prepared statements' texts are kept.
const MAX_PREPARED: usize = 64;

/// The log of one transaction, or of one session guard.
#[derive(Debug)]
pub(super) struct StatementLog {
    /// Unique within the keeper.
    pub(super) number: u64,
    pub(super) call_site: Option<CallSite>,
    pub(super) application_name: Option<Arc<str>>,
    pub(super) began: Instant,
    pub(super) began_at: SystemTime,
    /// The limit of each of its lock waits, if known.
    pub(super) lock_timeout: Option<Duration>,
    pub(super) conflict_group: OnceLock<LockKey>,
    /// The number of the attempt, and the maximum number, if there may be several.
    pub(super) attempt: OnceLock<(u32, u32)>,
    /// Whether it belongs to a session guard, which holds locks between its statements.
    pub(super) is_guard: bool,
    log: Mutex<LogState>,
}

#[derive(Debug, Default)]
struct LogState {
    pid: Option<i32>,
    next: u64,
    statements: VecDeque<LoggedStatement>,
    dropped: usize,
    prepared: Vec<(Statement, Arc<str>)>,
    failure: Option<FailedStatement>,
    ended: Option<Instant>,
}

impl LogState {
    /// Drops statements after the first half until at most `max` are left. Statements that run or are about to run
    /// stay, however many were sent together, and so does the statement that failed.
    fn trim(&mut self, max: usize) {
        let failed = self.failure.map(|failing| failing.number);
        while self.statements.len() > max {
            let mut later = self.statements.iter().skip(MAX_STATEMENTS / 2);
            let Some(at) = later
                .position(|statement| statement.end.is_some() && Some(statement.number) != failed)
            else {
                return;
            };
            drop(self.statements.remove(MAX_STATEMENTS / 2 + at));
            self.dropped += 1;
        }
    }
}

/// A statement that failed by itself, not because an earlier one had failed.
#[derive(Clone, Copy, Debug)]
pub(super) struct FailedStatement {
    pub(super) number: u64,
    /// When its error arrived.
    pub(super) ended: Instant,
}

/// A statement of the log.
#[derive(Clone, Debug)]
pub(super) struct LoggedStatement {
    number: u64,
    pub(super) at: Instant,
    /// `None` if it was prepared elsewhere.
    pub(super) text: Option<Arc<str>>,
    pub(super) end: Option<StatementOutcome>,
    /// The advisory locks that it has taken.
    pub(super) locks_taken: Vec<(LockKey, AdvisoryMode)>,
}

/// A statement that has not ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunningStatement {
    pub(super) number: u64,
    pub(super) since: Instant,
}

/// How a statement ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct StatementOutcome {
    pub(super) after: Duration,
    /// `None` if its future was dropped.
    pub(super) succeeded: Option<bool>,
}

impl StatementLog {
    /// How many statements come before the dropped ones, if there are any.
    pub(super) const FIRST_KEPT: usize = MAX_STATEMENTS / 2;

    pub(super) fn new(number: u64, beginning: &Beginning<'_>) -> Self {
        Self {
            number,
            call_site: beginning.call_site,
            application_name: beginning.application_name.cloned(),
            began: Instant::now(),
            began_at: SystemTime::now(),
            lock_timeout: beginning.lock_timeout,
            conflict_group: OnceLock::new(),
            attempt: OnceLock::new(),
            is_guard: beginning.is_guard,
            log: Mutex::default(),
        }
    }

    /// The log behind the handle that the core holds, which is always a log.
    pub(super) fn of(observed: &Arc<dyn Observed>) -> Option<Arc<Self>> {
        let observed: Arc<dyn Any + Send + Sync> = Arc::clone(observed) as _;
        observed.downcast().ok()
    }

    /// The backend's pid as the server reports it.
    pub(super) fn pid(&self) -> Option<i32> {
        self.lock().pid
    }

    /// Whether the transaction was running at that time.
    pub(super) fn was_alive(&self, at: Instant) -> bool {
        self.began <= at && self.lock().ended.is_none_or(|ended| ended >= at)
    }

    /// When it ended.
    pub(super) fn ended(&self) -> Option<Instant> {
        self.lock().ended
    }

    /// About how much memory it takes.
    pub(super) fn bytes(&self) -> usize {
        let log = self.lock();
        let text = |statement: &LoggedStatement| {
            let text = statement.text.as_deref().map_or(0, str::len);
            text + statement.locks_taken.len() * size_of::<(LockKey, AdvisoryMode)>()
        };
        let texts: usize = log.statements.iter().map(text).sum();
        size_of::<Self>() + log.statements.capacity() * size_of::<LoggedStatement>() + texts
    }

    pub(super) fn end(&self) {
        let mut log = self.lock();
        log.ended = Some(Instant::now());
        // Prepared statements belong to the connection, which others use from now on.
        log.prepared.clear();
        log.trim(MAX_STATEMENTS);
    }

    /// The running statement. A transaction runs one statement at a time. Of several that were sent together this is
    /// the first, although the server may run it later if the driver had to prepare it.
    pub(super) fn running(&self) -> Option<RunningStatement> {
        let log = self.lock();
        if log.ended.is_some() {
            return None;
        }
        let statement = log
            .statements
            .iter()
            .find(|statement| statement.end.is_none())?;
        Some(RunningStatement {
            number: statement.number,
            since: statement.at,
        })
    }

    /// The last statement that failed by itself: the session reports its error as the transaction's failure. Other
    /// statements may have begun since, because they were sent together with it, or by code that handled its error.
    pub(super) fn failure(&self) -> Option<FailedStatement> {
        self.lock().failure
    }

    /// The statements, and how many were dropped after the [first](Self::FIRST_KEPT).
    pub(super) fn statements(&self) -> (Vec<LoggedStatement>, usize) {
        let log = self.lock();
        (log.statements.iter().cloned().collect(), log.dropped)
    }

    /// Adds a statement that is being sent.
    fn begin(&self, text: Option<Arc<str>>) -> u64 {
        let mut log = self.lock();
        log.trim(MAX_STATEMENTS - 1);
        log.next += 1;
        let number = log.next;
        log.statements.push_back(LoggedStatement {
            number,
            at: Instant::now(),
            text,
            end: None,
            locks_taken: Vec::new(),
        });
        number
    }

    /// Notes the end of a statement; `None` if its future was dropped.
    fn finish(&self, number: u64, succeeded: Option<bool>) {
        let mut log = self.lock();
        let mut latest_first = log.statements.iter_mut().rev();
        if let Some(statement) = latest_first.find(|statement| statement.number == number) {
            statement.end = Some(StatementOutcome {
                after: statement.at.elapsed(),
                succeeded,
            });
        }
    }

    fn fail(&self, number: u64) {
        self.lock().failure = Some(FailedStatement {
            number,
            ended: Instant::now(),
        });
    }

    fn discard(&self, number: u64) {
        self.lock()
            .statements
            .retain(|statement| statement.number != number);
    }

    fn remember(&self, statement: &Statement, text: &str) {
        let mut log = self.lock();
        if log.prepared.len() >= MAX_PREPARED {
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

    fn lock(&self) -> MutexGuard<'_, LogState> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observed for StatementLog {
    fn identify(&self, pid: i32) {
        self.lock().pid = Some(pid);
    }

    fn is_attempt(&self, attempt: u32, of: u32) {
        // The first value stays.
        let _ = self.attempt.set((attempt, of));
    }

    fn is_in_group(&self, key: &LockKey) {
        // The first value stays.
        drop(self.conflict_group.set(key.clone()));
    }

    fn begin_statement(&self, statement: Sent<'_>) -> u64 {
        match statement {
            Sent::Text(text) | Sent::Call(text) => self.begin(Some(cut(text))),
            Sent::Prepared(statement) => {
                let text = self.text_of(statement);
                self.begin(text)
            }
        }
    }

    fn end_statement(&self, number: u64, end: StatementEnd<'_>) {
        match end {
            StatementEnd::Succeeded => self.finish(number, Some(true)),
            StatementEnd::Abandoned => self.finish(number, None),
            StatementEnd::Failed(failure) => {
                self.finish(number, Some(false));
                match failure {
                    // An earlier failure that the session knows remains the transaction's.
                    Failure::Aborted | Failure::Driver | Failure::ConnectionLost => {}
                    _ => self.fail(number),
                }
            }
            // Preparing a statement is not logged.
            StatementEnd::Prepared(text, statement) => {
                self.remember(statement, text);
                self.discard(number);
            }
        }
    }

    fn locks_taken(&self, locks: Vec<(LockKey, AdvisoryMode)>) {
        let mut log = self.lock();
        if let Some(statement) = log.statements.back_mut() {
            statement.locks_taken.extend(locks);
        }
    }
}

/// Whether both are handles of one prepared statement: they share their descriptions. Statements without parameters and
/// columns have none, and are distinguished by the name that the driver gives them.
fn is_same(one: &Statement, other: &Statement) -> bool {
    if one.params().is_empty() && one.columns().is_empty() {
        return other.params().is_empty()
            && other.columns().is_empty()
            && format!("{one:?}") == format!("{other:?}");
    }
    std::ptr::eq(one.params(), other.params()) && std::ptr::eq(one.columns(), other.columns())
}

/// At most [`MAX_STATEMENT_BYTES`] bytes of a text.
fn cut(text: &str) -> Arc<str> {
    Arc::from(beginning(text, MAX_STATEMENT_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> StatementLog {
        StatementLog::new(
            1,
            &Beginning {
                call_site: None,
                application_name: Some(&"test".into()),
                lock_timeout: None,
                is_guard: false,
            },
        )
    }

    #[test]
    fn the_first_and_the_last_half_are_kept() {
        let log = log();
        for n in 0..MAX_STATEMENTS * 2 {
            let number = log.begin(Some(format!("SELECT {n}").into()));
            log.finish(number, Some(true));
        }
        let (statements, dropped) = log.statements();
        assert_eq!(
            (statements.len(), dropped),
            (MAX_STATEMENTS, MAX_STATEMENTS)
        );
        let text = |n: usize| statements[n].text.as_deref().unwrap_or_default();
        assert_eq!(text(0), "SELECT 0");
        assert_eq!(
            text(MAX_STATEMENTS / 2 - 1),
            format!("SELECT {}", MAX_STATEMENTS / 2 - 1)
        );
        assert_eq!(
            text(MAX_STATEMENTS - 1),
            format!("SELECT {}", MAX_STATEMENTS * 2 - 1)
        );
    }

    #[test]
    fn statements_sent_together_are_all_kept() {
        let log = log();
        let numbers: Vec<_> = (0..MAX_STATEMENTS * 2).map(|_| log.begin(None)).collect();
        for number in &numbers {
            let running = log.running().map(|running| running.number);
            assert_eq!(running, Some(*number));
            log.finish(*number, Some(true));
        }
        assert!(log.running().is_none());
        // The statement that failed stays, with the first and the last half.
        let failed = numbers[MAX_STATEMENTS];
        log.fail(failed);
        log.end();
        let (statements, dropped) = log.statements();
        assert_eq!(
            (statements.len(), dropped),
            (MAX_STATEMENTS, MAX_STATEMENTS)
        );
        let kept: Vec<_> = statements
            .iter()
            .map(|statement| statement.number)
            .collect();
        assert_eq!(
            kept[..StatementLog::FIRST_KEPT],
            numbers[..StatementLog::FIRST_KEPT]
        );
        assert_eq!(kept[StatementLog::FIRST_KEPT], failed);
        assert_eq!(kept.last(), numbers.last());
    }

    #[test]
    fn a_failure_is_the_statement_that_failed_by_itself() {
        let log = log();
        let failed = |failure: Option<Failure>| {
            let number = log.begin_statement(Sent::Text("SELECT 1"));
            let end = failure.map_or(StatementEnd::Succeeded, StatementEnd::Failed);
            log.end_statement(number, end);
            (number, log.failure().map(|failed| failed.number))
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
    fn the_running_statement_is_the_first_without_an_end() {
        let log = log();
        assert!(log.running().is_none());
        let first = log.begin(None);
        let second = log.begin(None);
        assert_eq!(log.running().map(|running| running.number), Some(first));
        log.finish(first, None);
        assert_eq!(log.running().map(|running| running.number), Some(second));
        log.end();
        assert!(log.running().is_none());
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let text = "ü".repeat(MAX_STATEMENT_BYTES);
        assert_eq!(cut(&text).len(), MAX_STATEMENT_BYTES);
        let odd = format!("x{text}");
        assert_eq!(cut(&odd).len(), MAX_STATEMENT_BYTES - 1);
    }
}
