//! A message that prepares a statement and is given up.

use lockkeeper_testkit::{GIVE_UP_AFTER, Scene, eventually, poll_times_and_drop};

/// The statement may be there: the next message that prepares it does not fail by that, and keeps the connection.
#[tokio::test]
async fn an_abandoned_prepare_costs_no_connection() {
    let scene = Scene::new(1).await;
    let keeper = &scene.keeper;
    let server = scene.database.server();
    for session in [false, true] {
        let key = format!("k{session}");
        let abandon = async |polls| {
            let lock = || keeper.advisory_lock(key.as_str());
            if session {
                let polled = poll_times_and_drop(lock().session().acquire(), polls).await;
                drop(polled.map(Result::unwrap));
            } else {
                let polled = poll_times_and_drop(lock().acquire(), polls).await;
                drop(polled.map(Result::unwrap));
            }
            let whole = async || scene.pool.status().available == 1;
            eventually("the connection is not back", whole).await;
        };
        // The first one on a connection asks for more, and prepares nothing.
        abandon(usize::MAX).await;
        let pid = keeper
            .advisory_lock("pid")
            .shared()
            .acquire()
            .await
            .unwrap();
        let before = pid.backend_pid();
        drop(pid);
        let log = server.log_len();
        for polls in [1, 1, usize::MAX, usize::MAX] {
            abandon(polls).await;
        }
        let guard = keeper
            .advisory_lock("pid")
            .shared()
            .acquire()
            .await
            .unwrap();
        assert_eq!(guard.backend_pid(), before, "session: {session}");
        drop(guard);
        let logged = server.log_since(log);
        assert!(
            !logged
                .lines()
                .any(|line| line.contains("lockkeeper_") && line.contains("already exists")),
            "{logged}"
        );
    }
    scene.nothing_left_within(GIVE_UP_AFTER).await;
}
