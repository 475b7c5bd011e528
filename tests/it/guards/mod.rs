//! Guards and sections.

mod driver_methods;
mod holding;
mod savepoints;
mod sections;
mod warnings;

use lockkeeper::Error;
use lockkeeper_testkit::{Scene, sqlstate};

async fn notes(scene: &Scene) -> Vec<i32> {
    scene.column("SELECT n FROM note ORDER BY n").await
}

async fn scene_with_notes(pool_size: usize) -> Scene {
    let scene = Scene::new(pool_size).await;
    scene.run("CREATE TABLE note (n int4 PRIMARY KEY)").await;
    scene
}

fn divided_by_zero(error: &Error) -> bool {
    sqlstate(error) == "22012"
}
