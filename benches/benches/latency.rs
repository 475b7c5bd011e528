//! The calls under criterion, each peer by itself. `table` has the ratios, for which they take turns.

use std::sync::Arc;
use std::time::Duration;

use criterion::Criterion;
use lockkeeper_benches::{Case, Failure, Observer, Pools, latency};
use lockkeeper_testkit::Server;
use tokio::runtime::Runtime;

fn main() -> Result<(), Failure> {
    let runtime = Runtime::new()?;
    let database = runtime.block_on(Server::shared().database());
    let observer = runtime.block_on(Observer::new(&database))?;
    // The pools of sqlx want a runtime around them when they are made.
    let _in_it = runtime.enter();

    let mut criterion = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500))
        .configure_from_args();
    for case in Case::ALL {
        let pools = Arc::new(Pools::new(&database.config(), latency::POOL)?);
        let mut group = criterion.benchmark_group(case.id());
        for peer in case.peers() {
            group.bench_function(peer.name(), |bencher| {
                bencher.iter_custom(|times| {
                    let pools = Arc::clone(&pools);
                    let times = u32::try_from(times).unwrap_or(u32::MAX);
                    let calls = runtime.spawn(async move { pools.repeat(case, peer, times).await });
                    match runtime.block_on(calls) {
                        Ok(Ok(took)) => took,
                        Ok(Err(error)) => panic!("{case}, {peer}: {error}"),
                        Err(error) => panic!("{case}, {peer}: {error}"),
                    }
                });
            });
        }
        group.finish();
        runtime.block_on(pools.close());
    }
    criterion.final_summary();
    runtime.block_on(observer.nothing_is_left())
}
