//! A cancel hits nothing but what was given up, although the pooler gives the backend to another client at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use lockkeeper::tokio_postgres::NoTls;
use lockkeeper::{Error, ErrorKind, Keeper, KeeperBuilder};
use lockkeeper_testkit::{
    BouncerScene, Fault, PoolMode, Proxy, Random, eventually, lock_by_sql, sql_key, unlock_by_sql,
    until_pooler_is_known,
};

/// How many calls are made that are not given up: as the environment says, or few.
fn calls() -> u32 {
    let calls = std::env::var("LOCKKEEPER_INNOCENT_CALLS").ok();
    calls.map_or(300, |calls| calls.parse().expect("a number"))
}

/// Innocent clients at a time.
const INNOCENT: u64 = 6;
/// Clients at a time that give up their calls.
const GIVING_UP: u64 = 6;
/// The key that somebody else holds now and then.
const BUSY: &str = "busy";

/// One call of the program. All are at one place, and so the backends of all clients have one name.
#[derive(Clone, Copy, Debug)]
enum Call {
    /// A statement under a lock.
    Statement,
    /// A wait for a lock, and a statement under it.
    Wait,
    /// A wait inside of a transaction that is committed if the wait takes too long.
    WaitInside,
    /// A statement under a session lock.
    SessionStatement,
    /// A wait for a session lock.
    SessionWait,
}

async fn make(call: Call, keeper: &Keeper, own: &str, random: &mut Random) -> Result<(), Error> {
    let key = match call {
        Call::Wait | Call::SessionWait => BUSY,
        _ => own,
    };
    let sleep = format!("SELECT pg_sleep({:.5})", seconds(random, 5));
    let inside = random.duration(Duration::from_millis(5));
    let lock = keeper.advisory_lock(key);
    if let Call::SessionStatement | Call::SessionWait = call {
        let guard = lock.session().acquire().await?;
        guard.batch_execute(&sleep).await?;
        return guard.release().await;
    }
    let mut guard = lock.acquire().await?;
    if let Call::WaitInside = call {
        let wait = guard.advisory_lock(BUSY);
        drop(tokio::time::timeout(inside, wait).await);
        return guard.commit().await;
    }
    guard.batch_execute(&sleep).await?;
    guard.commit().await
}

/// Up to so many milliseconds, in seconds.
fn seconds(random: &mut Random, most: u64) -> f64 {
    random.duration(Duration::from_millis(most)).as_secs_f64()
}

/// Makes calls and gives them up, each at some moment, until the innocent ones are done. How many.
async fn give_up(keeper: Keeper, mode: PoolMode, n: u64, done: Arc<AtomicBool>) -> u32 {
    let mut random = Random::new(n);
    let mut given_up = 0;
    let own = format!("given up {n}");
    while !done.load(Ordering::Relaxed) {
        let calls = [
            Call::Statement,
            Call::Wait,
            Call::WaitInside,
            Call::SessionStatement,
            Call::SessionWait,
        ];
        // Session locks are refused in transaction mode.
        let call = random.one_of(match mode {
            PoolMode::Session => &calls,
            _ => &calls[..3],
        });
        let patience = random.duration(Duration::from_millis(10));
        let call = make(call, &keeper, &own, &mut random);
        given_up += u32::from(tokio::time::timeout(patience, call).await.is_err());
    }
    given_up
}

/// Makes calls that nobody gives up, until there were enough of all clients. How many were cancelled.
async fn stay(behind: Arc<BouncerScene>, mode: PoolMode, n: u64, left: Arc<AtomicU32>) -> u32 {
    let mut random = Random::new(1000 + n);
    let mut cancelled = 0;
    let mut keeper = behind.fresh(1);
    let own = format!("innocent {n}");
    let take = |left: u32| left.checked_sub(1);
    while left
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
        .is_ok()
    {
        // In session mode a client gets another backend only when it connects again.
        if mode == PoolMode::Session {
            keeper = behind.fresh(1);
        }
        match make(Call::Statement, &keeper, &own, &mut random).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Cancelled => cancelled += 1,
            Err(error) => panic!("{error:?}"),
        }
    }
    cancelled
}

async fn cancels_hit_nobody_else(test: &str, mode: PoolMode, by_side: bool) {
    // Fewer than there are clients.
    let settings = [("default_pool_size", "10")];
    let Some(behind) = BouncerScene::new(test, mode, 2, &settings).await else {
        return;
    };
    let behind = Arc::new(behind);
    let done = Arc::new(AtomicBool::new(false));
    let left = Arc::new(AtomicU32::new(calls()));

    let mut giving_up = Vec::new();
    for n in 0..GIVING_UP {
        let side = behind.scene.database.config();
        let with_side = |builder: KeeperBuilder| {
            if by_side {
                builder.side_connection(side, NoTls)
            } else {
                builder
            }
        };
        // One connection to be given up and one to cancel it with.
        let keeper = behind.fresh_with(2, with_side);
        if mode == PoolMode::Session {
            until_pooler_is_known(&keeper).await;
        }
        giving_up.push(tokio::spawn(give_up(keeper, mode, n, Arc::clone(&done))));
    }
    let holder = behind.scene.session().await;
    let holding = tokio::spawn({
        let done = Arc::clone(&done);
        async move {
            let mut random = Random::new(0);
            while !done.load(Ordering::Relaxed) {
                lock_by_sql(&holder.client, BUSY).await;
                tokio::time::sleep(random.duration(Duration::from_millis(8))).await;
                unlock_by_sql(&holder.client, BUSY).await;
                tokio::time::sleep(random.duration(Duration::from_millis(2))).await;
            }
        }
    });
    let staying: Vec<_> = (0..INNOCENT)
        .map(|n| tokio::spawn(stay(Arc::clone(&behind), mode, n, Arc::clone(&left))))
        .collect();
    let mut cancelled = 0;
    for client in staying {
        cancelled += client.await.unwrap();
    }
    done.store(true, Ordering::Relaxed);
    let mut given_up = 0;
    for client in giving_up {
        given_up += client.await.unwrap();
    }
    holding.await.unwrap();
    let calls = calls();
    assert!(given_up > calls / 20, "only {given_up} calls were given up");
    assert_eq!(
        cancelled, 0,
        "innocent calls of {calls} were cancelled, and {given_up} were given up"
    );
    behind.nothing_left().await;
}

macro_rules! modes {
    ($($test:ident: $mode:ident, $by_side:literal;)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            cancels_hit_nobody_else(stringify!($test), PoolMode::$mode, $by_side).await;
        }
    )*};
}

modes! {
    a_cancel_hits_nobody_else_in_session_mode: Session, false;
    a_cancel_by_a_side_connection_hits_nobody_else_in_session_mode: Session, true;
    a_cancel_hits_nobody_else_in_transaction_mode: Transaction, false;
    a_cancel_by_a_side_connection_hits_nobody_else_in_transaction_mode: Transaction, true;
}

/// In transaction mode the backend is another client's as soon as the transaction has ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_does_not_end_while_its_cancel_is_under_way() {
    let test = "a_transaction_does_not_end_while_its_cancel_is_under_way";
    let Some(behind) = BouncerScene::new(test, PoolMode::Transaction, 2, &[]).await else {
        return;
    };
    let scene = &behind.scene;
    let side = Proxy::before(scene.database.server());
    let config = side.config(&scene.database.config());
    let keeper = behind.fresh_with(2, |builder| builder.side_connection(config, NoTls));
    let wait = format!("SELECT pg_advisory_xact_lock({})", sql_key(&BUSY.into()));
    // The cancel is given up after a second, and the transaction ends then: on a slow machine that may not be seen.
    for _ in 0..10 {
        let holder = scene.holder(BUSY).await;
        let guard = keeper.advisory_lock("k").acquire().await.unwrap();
        let pid = guard.backend_pid().unwrap();
        tokio::select! {
            _ = guard.batch_execute(&wait) => panic!("granted"),
            _ = scene.until_awaited(BUSY) => {}
        }
        // After the question of what the backend is executing.
        side.fault_later(1, Fault::Hold);
        drop(guard);
        eventually("no signal", async || side.faults_left() == 0).await;
        drop(holder);
        let state = async || -> String {
            let sql = "SELECT coalesce(min(state), 'gone') FROM pg_stat_activity WHERE pid = $1";
            let row = scene.observer.query_one(sql, &[&pid]).await;
            row.unwrap().get(0)
        };
        eventually("the wait goes on", async || state().await != "active").await;
        let mut is_open = true;
        for _ in 0..50 {
            is_open &= state().await == "idle in transaction";
        }
        side.deliver();
        behind.nothing_left().await;
        if is_open {
            return;
        }
    }
    panic!("the transaction has ended before its cancel");
}
