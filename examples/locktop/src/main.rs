//! A live view of who waits for whom, of the advisory locks and of the server's health, in the terminal; and, behind a
//! question, what ends the waiting: cancelling or terminating a session.
//!
//! ```text
//! cargo run -p locktop                              a scene on a throw-away server
//! DATABASE_URL=postgres://… cargo run -p locktop    your own server
//! cargo run -p locktop -- --once                    one picture, as text, and the end
//! ```
//!
//! It connects without TLS. Keys are on the last line of the screen. Statements are shown on demand only (`s`): their literals are data.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example talks to people"
)]

mod app;
mod scene;
#[cfg(test)]
mod tests;
mod view;

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use deadpool_postgres::{Manager, Pool};
use lockkeeper::{Keeper, Monitor};
use lockkeeper_testkit::Server;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{self, Event};
use tokio::sync::mpsc;
use tokio_postgres::{Config, NoTls};

use app::{Action, App, Command, Look};

const EVERY: Duration = Duration::from_secs(1);

type AnyError = Box<dyn std::error::Error>;

/// What the loop is told.
enum News {
    Terminal(Event),
    Looked(Box<Result<Look, lockkeeper::Error>>),
    Done(String),
}

#[tokio::main]
async fn main() -> ExitCode {
    match locktop().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("locktop: {}", app::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn locktop() -> Result<(), AnyError> {
    let mut once = false;
    for argument in env::args().skip(1) {
        match argument.as_str() {
            "--once" => once = true,
            _ => return Err(format!("{argument} is not known; usage: locktop [--once]").into()),
        }
    }
    let (monitor, waiters) = match env::var("DATABASE_URL") {
        Ok(url) if !url.is_empty() => (monitor(url.parse()?)?, 0),
        _ => {
            // Until the program ends: the actors play on it.
            let database = Box::leak(Box::new(
                Server::shared_with_progress(|step| eprintln!("{step}"))
                    .database()
                    .await,
            ));
            scene::start(database).await?;
            (monitor(database.config())?, scene::WAITERS)
        }
    };
    if once {
        return print(&monitor, waiters).await;
    }
    // Puts the terminal back, also when something panics.
    let terminal = ratatui::try_init()?;
    let result = run(terminal, monitor).await;
    ratatui::restore();
    result
}

/// Looks over a connection of its own, so that it sees when all others are stuck.
fn monitor(mut config: Config) -> Result<Monitor, AnyError> {
    lockkeeper::tcp_timeouts(&mut config, Duration::from_secs(15));
    let pool = Pool::builder(Manager::new(config.clone(), NoTls))
        .max_size(1)
        .build()?;
    let keeper = Keeper::builder(pool)
        .application("locktop")
        .side_connection(config, NoTls)
        .build();
    // The server knows numbers only; names are given by those who know them.
    Ok(keeper.monitor().names(["nightly-report", "leader"]))
}

/// One picture as text, when so many wait.
async fn print(monitor: &Monitor, waiters: usize) -> Result<(), AnyError> {
    let mut look = Look::take(monitor).await?;
    for _ in 0..300 {
        if look.health.lock_waiters() >= waiters {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        look = Look::take(monitor).await?;
    }
    let size = |name: &str, usual| {
        let given = env::var(name).ok().and_then(|value| value.parse().ok());
        given.unwrap_or(usual)
    };
    let (columns, lines) = (size("COLUMNS", 132), size("LINES", 44));
    let mut terminal = Terminal::new(TestBackend::new(columns, lines))?;
    let mut app = App::new(EVERY);
    app.looked(Ok(look));
    terminal.draw(|frame| view::draw(frame, &mut app))?;
    print!("{}", view::text(terminal.backend().buffer()));
    Ok(())
}

async fn run(mut terminal: ratatui::DefaultTerminal, monitor: Monitor) -> Result<(), AnyError> {
    let (tell, mut news) = mpsc::unbounded_channel();
    let keys = tell.clone();
    // The terminal is read by a thread: it can only be waited for by blocking.
    drop(std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            if keys.send(News::Terminal(event)).is_err() {
                break;
            }
        }
    }));
    let mut app = App::new(EVERY);
    let mut tick = tokio::time::interval(EVERY);
    // One look at a time: a server in trouble is not to be asked twice.
    let mut looking = false;
    loop {
        terminal.draw(|frame| view::draw(frame, &mut app))?;
        let mut look = false;
        tokio::select! {
            _ = tick.tick() => look = !app.paused,
            Some(news) = news.recv() => match news {
                News::Looked(seen) => {
                    looking = false;
                    app.looked(*seen);
                }
                News::Done(message) => {
                    app.message = Some(message);
                    look = true;
                }
                News::Terminal(Event::Key(key)) => match app.key(key) {
                    Some(Command::Quit) => return Ok(()),
                    Some(Command::Refresh) => look = true,
                    Some(Command::Signal(action, backend)) => {
                        let (monitor, tell) = (monitor.clone(), tell.clone());
                        drop(tokio::spawn(async move {
                            // Compares with what was seen, in the statement that signals.
                            let outcome = match action {
                                Action::Cancel => monitor.cancel(&backend).await,
                                Action::Terminate => monitor.terminate(&backend).await,
                            };
                            let message = match outcome {
                                Ok(outcome) => format!("{}: {outcome}", backend.id()),
                                Err(error) => app::chain(&error),
                            };
                            tell.send(News::Done(message)).ok();
                        }));
                    }
                    None => {}
                },
                // Resized, for instance: drawn anew above.
                News::Terminal(_) => {}
            },
        }
        if look && !looking {
            looking = true;
            let (monitor, tell) = (monitor.clone(), tell.clone());
            drop(tokio::spawn(async move {
                let look = Look::take(&monitor).await;
                tell.send(News::Looked(Box::new(look))).ok();
            }));
        }
    }
}
