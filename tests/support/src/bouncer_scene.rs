//! What is seen from behind a PgBouncer.

use std::time::Instant;

use deadpool_postgres::Pool;
use lockkeeper::{ErrorKind, Keeper, KeeperBuilder};

use crate::assert_error::assert_error;
use crate::bouncer::{PgBouncer, PoolMode};
use crate::scene::Scene;
use crate::wait::{CLEANED_UP_WITHIN, GIVE_UP_AFTER, eventually_within, in_time_of};

/// A keeper behind a PgBouncer, and a scene whose own pool and observer go around it.
#[derive(Debug)]
pub struct BouncerScene {
    /// What goes around the PgBouncer.
    pub scene: Scene,
    /// The PgBouncer.
    pub bouncer: PgBouncer,
    /// A pool behind it.
    pub pool: Pool,
    /// A keeper of the application `behind`, over that pool.
    pub keeper: Keeper,
}

impl BouncerScene {
    /// A PgBouncer with these settings. `None`, which is reported as a skip of `test`, where there is no PgBouncer.
    pub async fn new(
        test: &str,
        mode: PoolMode,
        pool_size: usize,
        settings: &[(&str, &str)],
    ) -> Option<BouncerScene> {
        let scene = Scene::new(4).await;
        let server = scene.database.server();
        let bouncer = match server.pgbouncer_with(mode, scene.database.name(), settings) {
            Ok(bouncer) => bouncer,
            Err(skip) => {
                skip.report(test);
                return None;
            }
        };
        let pool = bouncer.pool(pool_size);
        Some(BouncerScene {
            keeper: Keeper::builder(pool.clone()).application("behind").build(),
            scene,
            bouncer,
            pool,
        })
    }

    /// A keeper that knows nothing of the pooler yet, over a pool of its own.
    #[must_use]
    pub fn fresh(&self, pool_size: usize) -> Keeper {
        self.fresh_with(pool_size, |builder| builder)
    }

    /// The same, configured.
    pub fn fresh_with(
        &self,
        pool_size: usize,
        configure: impl FnOnce(KeeperBuilder) -> KeeperBuilder,
    ) -> Keeper {
        configure(Keeper::builder(self.bouncer.pool(pool_size)).application("behind")).build()
    }

    /// Opens all of the pooler's backends, so that it has a choice.
    pub async fn open_backends(&self, backends: usize) {
        let pool = self.bouncer.pool(backends);
        let mut objects = Vec::new();
        for _ in 0..backends {
            let object = pool.get().await.expect("a connection");
            object.batch_execute("BEGIN").await.expect("a transaction");
            objects.push(object);
        }
        for object in objects {
            object.batch_execute("COMMIT").await.expect("its end");
        }
    }

    /// No advisory lock, no open transaction, no name of the keeper's on a backend, and both pools whole.
    pub async fn nothing_left(&self) {
        self.scene.nothing_left().await;
        eventually_within(
            CLEANED_UP_WITHIN,
            "a backend still has the keeper's name",
            async || {
                let named = "pg_stat_activity WHERE datname = current_database() AND application_name LIKE '%.rs:%'";
                self.scene.count(named).await == 0
            },
        )
        .await;
        let all = async {
            let mut objects = Vec::new();
            for _ in 0..self.pool.status().max_size {
                let object = self.pool.get().await.expect("a connection");
                // By turns: a session pooler may have fewer backends than there are clients.
                object.batch_execute("SELECT 1").await.expect("an answer");
                objects.push(object);
            }
        };
        let what = "the pool behind the pooler does not give all of its connections";
        in_time_of(CLEANED_UP_WITHIN, what, all).await;
    }
}

/// Lets a keeper find out what its pooler is: it does not wait for long for an answer, and refuses session locks as long
/// as it does not know.
pub async fn until_pooler_is_known(keeper: &Keeper) {
    let started = Instant::now();
    loop {
        let lock = keeper.advisory_lock("first").session();
        match lock.acquire().await {
            Ok(guard) => return guard.release().await.expect("a release"),
            Err(error) => {
                let undecided = "no second connection was to be had";
                assert_error(&error, ErrorKind::TransactionPooler, undecided);
                assert!(started.elapsed() < GIVE_UP_AFTER, "{error}");
            }
        }
    }
}
