//! What several processes agree on.

mod fencing;
mod leader;
mod once;
mod semaphore;

use lockkeeper::{Keeper, SessionGuard};
use lockkeeper_testkit::Scene;

/// A keeper as another process has it, with a pool of its own.
fn process(scene: &Scene) -> Keeper {
    Keeper::builder(scene.database.pool(3))
        .application("test")
        .build()
}

async fn take(keeper: &Keeper, key: &str) -> SessionGuard {
    keeper.advisory_lock(key).session().acquire().await.unwrap()
}
