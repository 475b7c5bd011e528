//! The picture and the keys, without a terminal.

#![allow(
    clippy::unwrap_used,
    reason = "a test says what went wrong by panicking"
)]

use std::sync::Arc;
use std::time::Duration;

use lockkeeper::Monitor;
use lockkeeper_testkit::Server;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use crate::app::{Action, App, Command, Look};
use crate::view;

mod common;

use common::{Scene, eventually, pid_of, until_it_waits};

const SOON: Duration = Duration::from_secs(30);

fn picture(app: &mut App, columns: u16, lines: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
    terminal.draw(|frame| view::draw(frame, app)).unwrap();
    view::text(terminal.backend().buffer())
}

fn press(app: &mut App, code: KeyCode) -> Option<Command> {
    app.key(KeyEvent::new(code, KeyModifiers::NONE))
}

fn letter(app: &mut App, letter: char) -> Option<Command> {
    press(app, KeyCode::Char(letter))
}

fn selected(app: &App) -> Option<i32> {
    app.backend()?.pid()
}

/// Sessions that each wait for an advisory lock that the first holds.
struct Play {
    scene: Scene,
    monitor: Monitor,
}

impl Play {
    async fn new() -> Self {
        let server = tokio::task::block_in_place(|| Server::start(&[]).unwrap());
        let scene = Scene::on(&server, 2).await;
        let monitor = scene.keeper.monitor();
        Self { scene, monitor }
    }

    /// Holder and waiter of a key, the holder with something to hide.
    async fn pair(&self, key: i32, waiters: usize) -> (i32, i32) {
        let holder = self.scene.database.connect().await;
        let pid = pid_of(&holder).await;
        let sql = format!(
            "SET application_name = 'holder {key}'; BEGIN; SELECT 'secret', pg_advisory_xact_lock({key})"
        );
        holder.batch_execute(&sql).await.unwrap();
        let mut last = 0;
        for _ in 0..waiters {
            let waiter = Arc::new(self.scene.database.connect().await);
            last = pid_of(&waiter).await;
            let sql = format!("SELECT pg_advisory_lock({key})");
            drop(tokio::spawn(
                async move { waiter.batch_execute(&sql).await },
            ));
            until_it_waits(&self.scene.observer, last, SOON).await;
        }
        // It stays until its backend is told to go.
        drop(tokio::spawn(async move {
            while !holder.is_closed() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }));
        (pid, last)
    }

    async fn look(&self, app: &mut App) {
        // Opening a connection may take longer than a look may.
        self.scene.pool_is_whole_within(SOON).await;
        app.looked(Look::take(&self.monitor).await);
        assert_eq!(app.trouble, None);
    }
}

#[test]
fn there_is_a_picture_at_every_size_and_before_anything_was_seen() {
    let mut app = App::new(Duration::from_secs(1));
    for (columns, lines) in [(1, 1), (4, 2), (20, 6), (80, 24), (300, 100)] {
        picture(&mut app, columns, lines);
    }
    assert!(picture(&mut app, 80, 24).contains("nothing seen yet"));
    for code in [KeyCode::Down, KeyCode::Up, KeyCode::End, KeyCode::Home] {
        assert_eq!(press(&mut app, code), None);
    }
    assert_eq!(letter(&mut app, 'c'), None);
    assert!(app.question.is_none() && app.message.is_some());
    assert_eq!(letter(&mut app, 'q'), Some(Command::Quit));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_choose_a_session_and_nothing_is_done_without_a_yes() {
    let play = Play::new().await;
    let (holder, waiter) = play.pair(7, 1).await;
    let mut app = App::new(Duration::from_secs(1));
    play.look(&mut app).await;
    let text = picture(&mut app, 120, 40);
    for shown in [
        format!("> pid {holder} blocks 1  holder 7 (idle in transaction "),
        format!("└ pid {waiter}, waits "),
        "for ExclusiveLock on advisory lock 7".to_owned(),
        "who waits for whom (2)".to_owned(),
        "advisory locks (2)".to_owned(),
        format!("7 held in ExclusiveLock by pid {holder}"),
        "1 session waiting for a lock".to_owned(),
    ] {
        assert!(text.contains(&shown), "{shown}\n{text}");
    }
    // Literals are data.
    assert!(!text.contains("secret"), "{text}");
    letter(&mut app, 's');
    assert!(picture(&mut app, 120, 40).contains("'secret'"));
    letter(&mut app, 's');
    assert!(!picture(&mut app, 120, 40).contains("'secret'"));

    assert_eq!(selected(&app), Some(holder));
    for (code, expected) in [
        (KeyCode::Down, waiter),
        (KeyCode::Down, waiter),
        (KeyCode::Home, holder),
        (KeyCode::End, waiter),
        (KeyCode::PageUp, holder),
        (KeyCode::PageDown, waiter),
        (KeyCode::Tab, holder),
        (KeyCode::Down, waiter),
        (KeyCode::BackTab, waiter),
        (KeyCode::Up, holder),
    ] {
        assert_eq!(press(&mut app, code), None);
        assert_eq!(selected(&app), Some(expected), "{code:?}");
    }
    for no in ['n', 'c', 'q', 'x'] {
        assert_eq!(letter(&mut app, 't'), None);
        let text = picture(&mut app, 120, 40);
        assert!(
            text.contains("terminate?") && text.contains("y does it"),
            "{text}"
        );
        assert_eq!(letter(&mut app, no), None, "{no}");
        assert!(app.question.is_none());
    }
    // A key that is let go is no key.
    letter(&mut app, 't');
    let released = KeyEvent::new_with_kind(
        KeyCode::Char('y'),
        KeyModifiers::NONE,
        KeyEventKind::Release,
    );
    assert_eq!(app.key(released), None);
    assert!(app.question.is_some());
    let Some(Command::Signal(Action::Terminate, backend)) = letter(&mut app, 'y') else {
        panic!("no signal");
    };
    assert_eq!(backend.pid(), Some(holder));
    // And what is asked for is what happens.
    let outcome = play.monitor.terminate(&backend).await.unwrap();
    assert!(outcome.is_signalled(), "{outcome}");
    eventually(SOON, "it is still in the way", async || {
        play.look(&mut app).await;
        picture(&mut app, 120, 40).contains("who waits for whom (0)")
    })
    .await;
    assert_eq!(selected(&app), None);
    for (columns, lines) in [(1, 1), (30, 10), (120, 12)] {
        picture(&mut app, columns, lines);
    }
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(app.key(control_c), Some(Command::Quit));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_selection_goes_with_its_session() {
    let play = Play::new().await;
    let (holder, waiter) = play.pair(7, 1).await;
    let mut app = App::new(Duration::from_secs(1));
    play.look(&mut app).await;
    press(&mut app, KeyCode::Down);
    assert_eq!(selected(&app), Some(waiter));
    // A worse one, which comes before it now.
    let (worse, _) = play.pair(8, 2).await;
    play.look(&mut app).await;
    assert_eq!(selected(&app), Some(waiter));
    press(&mut app, KeyCode::Home);
    assert_eq!(selected(&app), Some(worse));
    press(&mut app, KeyCode::End);
    press(&mut app, KeyCode::Up);
    assert_eq!(selected(&app), Some(holder));
}
