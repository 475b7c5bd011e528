//! Incidents, and what provokes them.

use std::sync::{Arc, Mutex, PoisonError};

use lockkeeper::{Incident, Keeper, KeeperBuilder};
use tokio_postgres::{Client, NoTls};

use crate::database::Database;
use crate::scene::Scene;
use crate::wait::eventually;

/// A scene with a table `account (id, balance, note)` of three rows, whose keeper has a side connection and whose incidents
/// are kept.
#[derive(Debug)]
pub struct IncidentScene {
    /// The rest of it.
    pub scene: Scene,
    incidents: Arc<Mutex<Vec<Incident>>>,
}

impl IncidentScene {
    /// One in the shared server, with a pool of so many connections.
    pub async fn new(pool_size: usize) -> IncidentScene {
        IncidentScene::with(pool_size, |builder, database| {
            builder.side_connection(database.config(), NoTls)
        })
        .await
    }

    /// The same, with a keeper that is configured.
    pub async fn with(
        pool_size: usize,
        configure: impl FnOnce(KeeperBuilder, &Database) -> KeeperBuilder,
    ) -> IncidentScene {
        let scene = Scene::new(pool_size).await;
        scene
            .run(
                "CREATE TABLE account (id int PRIMARY KEY, balance int NOT NULL, note text); \
                 INSERT INTO account SELECT id, 100 FROM generate_series(1, 3) AS id",
            )
            .await;
        // Room for a cycle to be closed and sampled on a slow machine. The other side of it has no deadlock check, so one
        // that is closed after our side's check is there for ever.
        scene.set("deadlock_timeout", "3s").await;
        let mut scene = IncidentScene {
            scene,
            incidents: Arc::default(),
        };
        let builder = scene.kept(scene.scene.builder());
        scene.scene.keeper = configure(builder, &scene.scene.database).build();
        scene
    }

    /// A builder of a keeper whose incidents are kept here.
    pub fn kept(&self, builder: KeeperBuilder) -> KeeperBuilder {
        let kept = Arc::clone(&self.incidents);
        builder.on_incident(move |incident| {
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.push(incident.clone());
        })
    }

    /// The incidents so far.
    #[must_use]
    pub fn incidents(&self) -> Vec<Incident> {
        let kept = self.incidents.lock();
        kept.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The incidents, once there are so many.
    pub async fn after(&self, count: usize) -> Vec<Incident> {
        let what = format!("not {count} incidents are reported");
        eventually(&what, async || self.incidents().len() >= count).await;
        self.incidents()
    }

    /// The keeper that reports them.
    #[must_use]
    pub fn keeper(&self) -> &Keeper {
        &self.scene.keeper
    }

    /// A session that does not use the library, and has no deadlock check: of a deadlock the other one is the victim.
    pub async fn stranger(&self, sql: &str) -> Client {
        let client = self.scene.database.connect().await;
        for sql in ["SET deadlock_timeout = '1h'", sql] {
            client.batch_execute(sql).await.expect(sql);
        }
        client
    }
}
