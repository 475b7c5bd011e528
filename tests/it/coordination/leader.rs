//! One leader at a time, and the next one not before the last one knows.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use lockkeeper::{Error, ErrorKind, FencingToken, Keeper, Leader, Leadership, Term};
use lockkeeper_testkit::{
    ENDLESS, Proxy, Scene, Server, assert_error, eventually, in_time, is_pending,
    poll_times_and_drop, until_connected,
};
use tokio::sync::oneshot;

use super::process;

const KEY: (&str, &str) = ("lockkeeper leader", "l");
/// After which a leader steps down, here.
const STEPS_DOWN: Duration = Duration::from_millis(600);
/// After which its successor leads.
const TAKES_OVER: Duration = Duration::from_millis(650);

async fn scene() -> Scene {
    let scene = Scene::new(4).await;
    scene.keeper.fencing().set_up().await.unwrap();
    scene
}

/// A candidate that does not wait for long.
fn leader(keeper: &Keeper) -> Leader {
    keeper
        .leader("l")
        .step_down_after(STEPS_DOWN)
        .takeover_delay(TAKES_OVER)
        .poll_interval(Duration::from_millis(10))
}

async fn elected(leader: Leader) -> Leadership {
    in_time("the election", leader.campaign()).await.unwrap()
}

async fn holder(scene: &Scene) -> i32 {
    scene.holders(KEY).await[0]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_resigns_is_followed_at_once_and_who_is_only_dropped_after_the_delay() {
    let scene = scene().await;
    let other = process(&scene);
    // It would not come to its end.
    let patient = leader(&other).takeover_delay(ENDLESS);
    let first = elected(leader(&scene.keeper)).await;
    assert!(first.is_leader() && first.term().is_leader());
    let mut waiting = Box::pin(patient.clone().campaign());
    for _ in 0..20 {
        assert!(is_pending(&mut waiting).await);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let error = leader(&other)
        .wait(Duration::from_millis(30))
        .campaign()
        .await
        .unwrap_err();
    let text = "lock not granted in time: \"lockkeeper leader\"/\"l\": another process leads";
    assert_error(&error, ErrorKind::LockTimeout, text);

    let (term, token, mut loss) = (first.term().clone(), first.token(), first.loss());
    assert!(is_pending(&mut loss).await);
    first.resign().await.unwrap();
    assert!(!term.is_leader() && !loss.is_lost());
    in_time("the loss", loss).await;
    let second = in_time("the hand-over", waiting).await.unwrap();
    assert!(token < second.token());
    assert!(second.token().key().same_lock(&KEY.into()));
    drop(second);

    let mut waiting = Box::pin(patient.clone().campaign());
    let in_delay = async || {
        assert!(is_pending(&mut waiting).await, "it has not waited");
        scene
            .is_true("(SELECT counter = 3 FROM public.lockkeeper_fencing)")
            .await
    };
    eventually("the next one has no token", in_delay).await;
    // Whoever comes after one who has only waited waits as well.
    drop(waiting);
    scene.until_free(KEY).await;
    let started = Instant::now();
    let third = elected(leader(&other)).await;
    assert!(started.elapsed() >= TAKES_OVER);
    third.resign().await.unwrap();
    scene.nothing_left().await;
}

/// The server frees the lock, and the network tells the leader nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_cut_off_has_stepped_down_before_the_next_one_leads() {
    let scene = scene().await;
    for is_shorter in [false, true] {
        let proxy = Proxy::before(scene.database.server());
        let cut_off = Keeper::builder(proxy.pool(&scene.database.config(), 2))
            .watch(false)
            .build();
        let (steps_down, takes_over) = match is_shorter {
            true => (5 * STEPS_DOWN, 6 * STEPS_DOWN),
            false => (STEPS_DOWN, TAKES_OVER),
        };
        let patient = leader(&cut_off)
            .step_down_after(steps_down)
            .takeover_delay(takes_over);
        let first = elected(patient).await;
        let (term, loss) = (first.term().clone(), first.loss());
        let pid = holder(&scene).await;
        proxy.stall(true);
        scene.terminate(pid).await;
        let second = elected(leader(&scene.keeper)).await;
        // There are two where one process has a shorter delay than the other one's patience, as documented.
        assert_eq!(term.is_leader(), is_shorter);
        in_time("the loss", loss.clone()).await;
        assert!(loss.is_lost() && !first.is_leader());
        let error = in_time("the resignation", first.resign())
            .await
            .unwrap_err();
        assert_error(
            &error,
            ErrorKind::LockLost,
            "lock lost with its connection: \"lockkeeper leader\"/\"l\"",
        );
        assert!(second.is_leader());
        // The first one's token is refused.
        let checked = scene
            .keeper
            .transaction(async |tx| tx.check_fencing(term.token()).await);
        let error: Error = checked.await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Fenced);
        second.resign().await.unwrap();
        proxy.stall(false);
        scene.nothing_left().await;
    }
}

/// A process that stands still knows when it resumes, before it does anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_frozen_does_not_believe_that_it_leads() {
    let scene = scene().await;
    let (config, (leads, led)) = (scene.database.config(), mpsc::channel());
    let (thaw, thawed) = mpsc::channel::<()>();
    // A runtime of its own, which stands still with its thread.
    let frozen = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(async {
            let keeper = Keeper::new(lockkeeper_testkit::pool_of(config, 2));
            let leadership = elected(leader(&keeper)).await;
            let before = leadership.is_leader();
            leads.send(leadership.token()).unwrap();
            thawed.recv().unwrap();
            let after = leadership.is_leader();
            assert!(leadership.loss().is_lost());
            (before, after)
        })
    });
    let old = tokio::task::spawn_blocking(move || led.recv().unwrap())
        .await
        .unwrap();
    scene.terminate(holder(&scene).await).await;
    let second = elected(leader(&scene.keeper)).await;
    assert!(old < second.token());
    thaw.send(()).unwrap();
    let (before, after) = tokio::task::spawn_blocking(|| frozen.join().unwrap())
        .await
        .unwrap();
    assert_eq!((before, after), (true, false));
    second.resign().await.unwrap();
    scene.nothing_left().await;
}

/// The work of a runtime that stood still takes no further step.
#[tokio::test]
async fn work_that_was_frozen_takes_no_further_step() {
    let scene = scene().await;
    let terms = AtomicU32::new(0);
    let went_on = AtomicBool::new(false);
    let ran = leader(&scene.keeper).run(async |term: Term| {
        if terms.fetch_add(1, Ordering::Relaxed) > 0 {
            return Ok::<_, Error>(term.token());
        }
        std::thread::sleep(2 * STEPS_DOWN);
        tokio::task::yield_now().await;
        went_on.store(true, Ordering::Relaxed);
        std::future::pending().await
    });
    let token = in_time("the second term", ran).await.unwrap();
    assert!(!went_on.into_inner());
    assert_eq!((terms.into_inner(), token.counter()), (2, 2));
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_loop_leads_again_after_each_loss_and_ends_with_its_work() {
    let server = Server::start(&[]).unwrap();
    let scene = Scene::on(&server, 4).await;
    scene.keeper.fencing().set_up().await.unwrap();
    let terms: Arc<Mutex<Vec<Term>>> = Arc::default();
    let (finish, finished) = oneshot::channel::<()>();
    let finished = Arc::new(tokio::sync::Mutex::new(finished));
    let run = tokio::spawn({
        let (keeper, terms, pool) = (scene.keeper.clone(), Arc::clone(&terms), scene.pool.clone());
        async move {
            let leader = leader(&keeper);
            let run = leader.run(async |term: Term| {
                let number = {
                    let mut terms = terms.lock().unwrap();
                    terms.push(term);
                    terms.len()
                };
                if number == 2 {
                    // Notices the end of the server before the term does, perhaps.
                    let object = pool.get().await.map_err(|_| AnError)?;
                    object
                        .batch_execute("SELECT pg_sleep(3600)")
                        .await
                        .map_err(|_| AnError)?;
                }
                (&mut *finished.lock().await).await.map_err(|_| AnError)?;
                Ok::<_, AnError>(7)
            });
            run.await
        }
    });
    let until_term = async |number: usize| {
        let leads = async || terms.lock().unwrap().len() == number;
        eventually("no next term", leads).await;
    };
    until_term(1).await;
    scene.terminate(holder(&scene).await).await;
    until_term(2).await;
    server.stop();
    server.restart();
    until_term(3).await;
    let tokens: Vec<FencingToken> = terms.lock().unwrap().iter().map(Term::token).collect();
    assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    let lead: Vec<bool> = terms.lock().unwrap().iter().map(Term::is_leader).collect();
    assert_eq!(lead, [false, false, true]);
    finish.send(()).unwrap();
    assert_eq!(in_time("the end", run).await.unwrap().unwrap(), 7);
    // It has resigned.
    let observer = until_connected(&scene.database.config()).await;
    let resigned = observer
        .query_one("SELECT resigned FROM public.lockkeeper_fencing", &[])
        .await;
    assert!(resigned.unwrap().get::<_, bool>(0));
    let scene = Scene { observer, ..scene };
    scene.nothing_left().await;
}

#[derive(Debug, thiserror::Error)]
#[error("an error of the work")]
struct AnError;

impl From<Error> for AnError {
    fn from(_: Error) -> Self {
        Self
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_error_of_the_work_ends_the_loop_and_the_term() {
    let scene = scene().await;
    let ran = leader(&scene.keeper).run(async |_| Err::<(), _>(AnError));
    in_time("the end", ran).await.unwrap_err();
    scene.nothing_left().await;
    // In order: the next one does not wait.
    let patient = leader(&process(&scene)).takeover_delay(ENDLESS);
    drop(elected(patient).await);
    scene.nothing_left().await;
    // Its own last term is none to wait for, if nobody has led since.
    drop(elected(leader(&scene.keeper)).await);
    scene.nothing_left().await;
    let terms = AtomicU32::new(0);
    let own = leader(&scene.keeper);
    let ran = own.run(async |_| match terms.fetch_add(1, Ordering::Relaxed) {
        0 => {
            scene.terminate(holder(&scene).await).await;
            std::future::pending().await
        }
        _ => Ok::<_, Error>(()),
    });
    in_time("the end", ran).await.unwrap();
    assert_eq!(terms.into_inner(), 2);
    scene.nothing_left().await;
}

#[tokio::test]
async fn what_is_missing_or_cannot_be_is_an_error() {
    let scene = Scene::new(2).await;
    let error = leader(&scene.keeper).campaign().await.unwrap_err();
    assert_error(
        &error,
        ErrorKind::FencingNotSetUp,
        "call keeper.fencing().set_up()",
    );
    let ran = leader(&scene.keeper).run(async |_| Ok::<_, Error>(()));
    assert_eq!(ran.await.unwrap_err().kind(), ErrorKind::FencingNotSetUp);
    let error = leader(&scene.keeper)
        .step_down_after(Duration::ZERO)
        .campaign()
        .await;
    assert_error(&error.unwrap_err(), ErrorKind::Config, "at least 30 ms");
    let error = leader(&scene.keeper)
        .poll_interval(Duration::ZERO)
        .campaign()
        .await;
    assert_error(&error.unwrap_err(), ErrorKind::Config, "at least 10 ms");
    for delay in [Duration::ZERO, STEPS_DOWN] {
        let error = leader(&scene.keeper)
            .takeover_delay(delay)
            .campaign()
            .await
            .unwrap_err();
        let text = "takeover_delay has to be longer than step_down_after";
        assert_error(&error, ErrorKind::Config, text);
    }
    // Times that fit by themselves, and those that no clock reaches.
    for patience in [ENDLESS, Duration::MAX / 2] {
        let patient = scene.keeper.leader("l").step_down_after(patience);
        let error = patient.campaign().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FencingNotSetUp, "{error:?}");
    }
    scene.nothing_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_at_any_point_a_candidate_leaves_nothing() {
    let scene = scene().await;
    // Whoever led before has not resigned: it waits, too.
    for resigns in [true, false] {
        for polls in 0.. {
            let campaign = leader(&scene.keeper)
                .step_down_after(STEPS_DOWN / 3)
                .takeover_delay(STEPS_DOWN / 2);
            let elected = poll_times_and_drop(campaign.campaign(), polls).await;
            let completed = elected.is_some();
            match elected {
                Some(leadership) if resigns => leadership.unwrap().resign().await.unwrap(),
                other => drop(other),
            }
            scene.nothing_left().await;
            if completed {
                break;
            }
        }
    }
    for polls in 0.. {
        let leadership = elected(leader(&scene.keeper)).await;
        let term = leadership.term().clone();
        let resigned = poll_times_and_drop(leadership.resign(), polls).await;
        assert!(!term.is_leader());
        scene.nothing_left().await;
        if let Some(resigned) = resigned {
            resigned.unwrap();
            break;
        }
    }
    let leadership = elected(leader(&scene.keeper)).await;
    let work = tokio::spawn(leadership.loss());
    drop(leadership);
    in_time("the loss", work).await.unwrap();
    scene.nothing_left().await;
}

/// A candidate that may wait for a short time only does not wait for the takeover delay either.
#[tokio::test]
async fn a_candidates_wait_covers_the_takeover_delay() {
    let scene = scene().await;
    drop(elected(leader(&scene.keeper)).await);
    scene.nothing_left().await;
    let brief = leader(&scene.keeper)
        .takeover_delay(ENDLESS)
        .wait(Duration::from_millis(100));
    let error = in_time("the end of the wait", brief.campaign())
        .await
        .unwrap_err();
    let text = "the takeover delay is not over, and the leader before has not resigned";
    assert_error(&error, ErrorKind::LockTimeout, text);
    scene.nothing_left().await;
}

/// What keeps the lock of a term ends with its runtime, and the term with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_the_runtime_ends_the_term() {
    let scene = scene().await;
    let config = scene.database.config();
    let leads = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        // The clock does not end it.
        let leadership = runtime.block_on(async {
            let keeper = Keeper::new(lockkeeper_testkit::pool_of(config, 2));
            elected(keeper.leader("l").step_down_after(ENDLESS)).await
        });
        assert!(leadership.is_leader());
        leadership
    });
    let leadership = tokio::task::spawn_blocking(|| leads.join().unwrap())
        .await
        .unwrap();
    in_time("the loss", leadership.loss()).await;
    assert!(!leadership.is_leader() && leadership.loss().is_lost());
    scene.nothing_left().await;
}
