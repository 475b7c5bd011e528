//! Requests to cancel that arrive late.

use std::time::Duration;

use futures::future::join_all;
use lockkeeper::{Error, Tx};
use lockkeeper_testkit::{CLEANED_UP_WITHIN, Proxy, Scene, eventually_within};

use super::{AFTER, KEY, new_keeper};

async fn wait_for_the_busy_key(tx: &mut Tx) -> Result<(), Error> {
    tx.advisory_lock(KEY).await
}

/// Gives up a wait, whose cancel request arrives only after it was granted, and ends the guard it was on.
async fn give_up_and_end(end: &str) {
    let mut scene = Scene::new(1).await;
    let late = Duration::from_millis(400);
    let proxy = Proxy::before(scene.database.server());
    proxy.delay_cancels(late);
    scene.pool = proxy.pool(&scene.database.config(), 1);
    let keeper = new_keeper(&scene.pool, Duration::from_secs(30));
    let holder = scene.holder(KEY).await;
    let waits = async || {
        let waits = async || !scene.waiters(KEY).await.is_empty();
        eventually_within(CLEANED_UP_WITHIN, "no session waits", waits).await;
    };
    let own = keeper.advisory_lock(AFTER);
    if end == "release" {
        let mut guard = own.session().acquire().await.unwrap();
        tokio::select! {
            biased;
            () = waits() => {}
            _ = guard.transaction(wait_for_the_busy_key) => panic!("granted"),
        }
        drop(holder);
        drop(guard.release().await);
    } else {
        let mut guard = own.acquire().await.unwrap();
        tokio::select! {
            biased;
            () = waits() => {}
            _ = guard.advisory_lock(KEY) => panic!("granted"),
        }
        drop(holder);
        match end {
            "drop" => drop(guard),
            "rollback" => guard.rollback().await,
            _ => drop(guard.commit().await),
        }
    }
    let borrower = scene.pool.get().await.unwrap();
    let sleep = borrower.batch_execute("SELECT pg_sleep(0.8)").await;
    assert!(
        sleep.is_ok(),
        "after {end} the next borrower gets {sleep:?}"
    );
    drop(borrower);
    scene.nothing_left().await;
}

/// A cancel request that is late must not hit the task that has the connection by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_cancel_never_hits_the_next_borrower() {
    join_all(["drop", "rollback", "commit", "release"].map(give_up_and_end)).await;
}
