//! The running transactions and session guards of one keeper, and those that ended recently.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
// The runtime's clock: a runtime's task drops what is too old.
use tokio::time::Instant as RuntimeInstant;

use super::lock;
use super::statement_log::StatementLog;
use crate::connection::{Beginning, Observed, Observer, task};

/// How many ended transactions are kept, of how many bytes in all, and for how long. A report about a deadlock may be
/// written after its survivor has ended.
const MAX_RECENT: usize = 256;
const MAX_RECENT_BYTES: usize = 4 * 1024 * 1024;
const RECENT_FOR: Duration = Duration::from_secs(5);
/// How long the reply to BEGIN may take to arrive.
const REPLY_DELAY: Duration = Duration::from_millis(50);

/// How long before a report one of its participants may have ended.
const ENDED_WITHIN: Duration = Duration::from_millis(50);
/// A transaction younger than this can hardly have locked something, waited, and been waited for.
const MIN_AGE: Duration = Duration::from_millis(3);

/// Registers every transaction and session guard of one keeper while it runs.
#[derive(Default)]
pub(crate) struct ActiveTransactions {
    state: Arc<Mutex<RegistryState>>,
    /// Whether the sampler's task waits for a transaction to begin.
    awaited: AtomicBool,
    begun: Notify,
}

#[derive(Default)]
struct RegistryState {
    next: u64,
    live: BTreeMap<u64, Arc<StatementLog>>,
    recent: VecDeque<EndedTransaction>,
    /// The sum over `recent`.
    recent_bytes: usize,
    /// Whether a task drops what is too old.
    expiring: bool,
}

/// A transaction or session guard that ended recently.
struct EndedTransaction {
    log: Arc<StatementLog>,
    bytes: usize,
    expires: RuntimeInstant,
}

impl RegistryState {
    fn push_recent(&mut self, log: Arc<StatementLog>) {
        let bytes = log.bytes();
        self.recent_bytes += bytes;
        self.recent.push_back(EndedTransaction {
            log,
            bytes,
            expires: RuntimeInstant::now() + RECENT_FOR,
        });
        while self.recent.len() > MAX_RECENT || self.recent_bytes > MAX_RECENT_BYTES {
            self.pop_recent();
        }
    }

    fn pop_recent(&mut self) {
        if let Some(oldest) = self.recent.pop_front() {
            self.recent_bytes -= oldest.bytes;
        }
    }

    fn drop_expired(&mut self) {
        let now = RuntimeInstant::now();
        while self
            .recent
            .front()
            .is_some_and(|oldest| oldest.expires <= now)
        {
            self.pop_recent();
        }
    }
}

/// Held by the task that drops what is too old. Where there is no such task, because there is no runtime or it has ended,
/// nothing is kept.
struct ExpiryGuard {
    state: Weak<Mutex<RegistryState>>,
    /// From then on another task may run.
    done: bool,
}

impl ExpiryGuard {
    async fn run(mut self) {
        while let Some(next) = self.drop_expired() {
            tokio::time::sleep_until(next).await;
        }
    }

    /// When to look again; `None` if nothing is left.
    fn drop_expired(&mut self) -> Option<RuntimeInstant> {
        let state = self.state.upgrade()?;
        let mut state = lock(&state);
        state.drop_expired();
        let next = state.recent.front().map(|oldest| oldest.expires);
        self.done = next.is_none();
        state.expiring = !self.done;
        next
    }
}

impl Drop for ExpiryGuard {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Some(state) = self.state.upgrade() {
            let recent = {
                let mut state = lock(&state);
                state.expiring = false;
                state.recent_bytes = 0;
                std::mem::take(&mut state.recent)
            };
            drop(recent);
        }
    }
}

impl ActiveTransactions {
    fn enter(&self, beginning: &Beginning<'_>) -> Arc<StatementLog> {
        let log = {
            let mut state = self.lock();
            state.drop_expired();
            state.next += 1;
            let log = Arc::new(StatementLog::new(state.next, beginning));
            drop(state.live.insert(log.number, Arc::clone(&log)));
            log
        };
        if self.awaited.load(Ordering::Acquire) {
            self.begun.notify_one();
        }
        log
    }

    /// Moves a transaction from the running ones to the recently ended ones.
    fn leave(&self, log: &StatementLog) {
        log.end();
        let expiring = {
            let mut state = self.lock();
            state.drop_expired();
            let Some(log) = state.live.remove(&log.number) else {
                return;
            };
            state.push_recent(log);
            std::mem::replace(&mut state.expiring, true)
        };
        if !expiring {
            // Without a runtime the guard is dropped, and what was kept with it.
            let guard = ExpiryGuard {
                state: Arc::downgrade(&self.state),
                done: false,
            };
            let _ = task::run_in_background(guard.run());
        }
    }

    /// All running transactions, by unique numbers.
    pub(super) fn live(&self) -> Vec<(u64, Arc<StatementLog>)> {
        let state = self.lock();
        let live = state.live.iter();
        live.map(|(number, log)| (*number, Arc::clone(log)))
            .collect()
    }

    /// The transaction that used the backend with this pid at that time. If a session guard and a transaction on it
    /// match, it is the transaction.
    pub(super) fn of_backend(&self, pid: i32, at: Instant) -> Option<Arc<StatementLog>> {
        let mut state = self.lock();
        state.drop_expired();
        let recent = state.recent.iter().map(|ended| &ended.log);
        let on_it: Vec<_> = state
            .live
            .values()
            .chain(recent)
            .filter(|log| log.pid() == Some(pid))
            .collect();
        let then = on_it.iter().filter(|log| log.was_alive(at));
        let alive = then.max_by_key(|log| log.began);
        // The survivor of a deadlock continues before the victim learns of it: it can have committed, and another
        // transaction can have begun.
        let just_ended = || {
            let ended = on_it.iter().filter_map(|log| {
                let ended = log.ended().filter(|ended| *ended < at)?;
                (at - ended < ENDED_WITHIN).then_some((ended, log))
            });
            Some(ended.max_by_key(|(ended, _)| *ended)?.1)
        };
        let settled = alive.filter(|log| at - log.began >= MIN_AGE);
        let found = settled.or_else(just_ended).or(alive).or_else(|| {
            // Locks taken by the message with BEGIN are held before its reply arrives.
            let soon = on_it
                .iter()
                .filter(|log| log.began > at && log.began - at < REPLY_DELAY);
            soon.min_by_key(|log| log.began)
        });
        found.map(|log| Arc::clone(log))
    }

    /// Whether no transaction is alive. Session guards do not count: they idle for long.
    pub(super) fn is_empty(&self) -> bool {
        self.lock().live.values().all(|log| log.is_guard)
    }

    /// Waits until a transaction begins, or for [`wake`](Self::wake). Returns at once if a transaction is running.
    ///
    /// Cancel safety: nothing is lost; running transactions count the next time.
    pub(super) async fn begun(&self) {
        // In this order, so that either side sees a transaction that begins in between.
        self.awaited.store(true, Ordering::Release);
        let not_awaited = scopeguard::guard(&self.awaited, |awaited| {
            awaited.store(false, Ordering::Release);
        });
        if self.is_empty() {
            self.begun.notified().await;
        }
        drop(not_awaited);
    }

    /// Wakes the task that waits in [`begun`](Self::begun), so that it checks for other changes.
    pub(super) fn wake(&self) {
        self.begun.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, RegistryState> {
        lock(&self.state)
    }
}

impl Observer for ActiveTransactions {
    fn begin(&self, beginning: Beginning<'_>) -> Arc<dyn Observed> {
        self.enter(&beginning)
    }

    fn end(&self, observed: &Arc<dyn Observed>) {
        if let Some(log) = StatementLog::of(observed) {
            self.leave(&log);
        }
    }
}

impl fmt::Debug for ActiveTransactions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActiveTransactions")
            .field("live", &self.lock().live.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::{Sent, StatementEnd};

    fn enter(transactions: &ActiveTransactions) -> Arc<StatementLog> {
        transactions.enter(&Beginning {
            call_site: None,
            application_name: None,
            lock_timeout: None,
            is_guard: false,
        })
    }

    #[tokio::test]
    async fn ended_transactions_are_kept_for_a_while() {
        let transactions = Arc::new(ActiveTransactions::default());
        let first = enter(&transactions);
        first.identify(7);
        let second = enter(&transactions);
        second.identify(7);
        let numbers = |transactions: &ActiveTransactions| transactions.live().len();
        assert_eq!(numbers(&transactions), 2);
        transactions.leave(&first);
        assert_eq!(numbers(&transactions), 1);
        let now = Instant::now() + MIN_AGE;
        let found = |at: Instant| {
            let found = transactions.of_backend(7, at);
            found.map(|log| log.ended().is_some())
        };
        assert_eq!(found(now), Some(false));
        assert!(transactions.of_backend(8, now).is_none());
        for _ in 0..MAX_RECENT * 2 {
            transactions.leave(&enter(&transactions));
        }
        assert_eq!(found(now), Some(false));
    }

    #[tokio::test]
    async fn a_backends_transaction_depends_on_the_time() {
        let transactions = Arc::new(ActiveTransactions::default());
        let enter = || {
            std::thread::sleep(Duration::from_millis(1));
            let transaction = enter(&transactions);
            transaction.identify(7);
            std::thread::sleep(Duration::from_millis(1));
            transaction
        };
        let is = |at: Instant, transaction: &Arc<StatementLog>| {
            let found = transactions.of_backend(7, at);
            found.is_some_and(|found| Arc::ptr_eq(&found, transaction))
        };
        let guard = enter();
        let first = enter();
        let inside = first;
        transactions.leave(&inside);
        // By the times in the logs: the machine may have paused between any two of these lines.
        let (began, first_began) = (guard.began, inside.began);
        let first_ended = inside.ended().expect("it has ended");
        let guards = began + (first_began - began) / 2;
        let second = first_began + (first_ended - first_began) / 2;
        let after = first_ended.max(began + MIN_AGE) + Duration::from_millis(1);
        let before = began - REPLY_DELAY / 2;
        assert!(is(before, &guard), "its BEGIN was being answered");
        assert!(is(guards, &guard));
        assert!(is(second, &inside));
        assert!(is(after, &guard));
        let guards = guard;
        transactions.leave(&guards);
        assert!(is(second, &inside));
        // A transaction that ended recently may be involved in the current report.
        let ended = guards.ended().expect("it has ended");
        assert!(
            transactions
                .of_backend(7, ended + ENDED_WITHIN / 2)
                .is_some()
        );
        assert!(transactions.of_backend(7, ended + ENDED_WITHIN).is_none());
    }

    #[tokio::test]
    async fn a_transaction_wakes_the_task_that_waits_for_one() {
        let transactions = Arc::new(ActiveTransactions::default());
        let waiting = tokio::spawn({
            let transactions = Arc::clone(&transactions);
            async move { transactions.begun().await }
        });
        tokio::task::yield_now().await;
        let transaction = enter(&transactions);
        waiting.await.expect("woken");
        transactions.begun().await;
        transactions.leave(&transaction);
    }

    fn recent(transactions: &ActiveTransactions) -> (usize, bool) {
        let state = transactions.lock();
        (state.recent.len(), state.expiring)
    }

    #[tokio::test(start_paused = true)]
    async fn ended_transactions_are_dropped_although_nothing_happens_any_more() {
        let transactions = ActiveTransactions::default();
        for _ in 0..2 {
            transactions.leave(&enter(&transactions));
            tokio::time::sleep(RECENT_FOR / 2).await;
            transactions.leave(&enter(&transactions));
            assert_eq!(recent(&transactions), (2, true));
            tokio::time::sleep(RECENT_FOR * 3 / 4).await;
            assert_eq!(recent(&transactions), (1, true));
            tokio::time::sleep(RECENT_FOR / 2).await;
            assert_eq!(recent(&transactions), (0, false));
            let metrics = tokio::runtime::Handle::current().metrics();
            assert_eq!(metrics.num_alive_tasks(), 0);
        }
    }

    #[test]
    fn without_a_runtime_none_is_kept() {
        let transactions = ActiveTransactions::default();
        transactions.leave(&enter(&transactions));
        assert_eq!(recent(&transactions), (0, false));
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async { transactions.leave(&enter(&transactions)) });
        assert_eq!(recent(&transactions), (1, true));
        drop(runtime);
        assert_eq!(recent(&transactions), (0, false));
    }

    #[tokio::test]
    async fn ended_transactions_are_kept_only_up_to_so_many_bytes() {
        let transactions = ActiveTransactions::default();
        let statement = "x".repeat(4096);
        for _ in 0..MAX_RECENT {
            let log = enter(&transactions);
            for _ in 0..64 {
                let number = log.begin_statement(Sent::Text(&statement));
                log.end_statement(number, StatementEnd::Succeeded);
            }
            transactions.leave(&log);
        }
        let state = transactions.lock();
        let bytes = state.recent.iter().map(|ended| ended.log.bytes());
        assert_eq!(bytes.sum::<usize>(), state.recent_bytes);
        let kept = state.recent_bytes;
        assert!(
            (MAX_RECENT_BYTES / 2..=MAX_RECENT_BYTES).contains(&kept),
            "{kept}"
        );
    }
}
