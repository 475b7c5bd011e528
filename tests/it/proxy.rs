//! A TCP proxy that reads what passes between a client and its server: it cuts a connection, or holds it up, at the
//! message it is told to, and keeps what the clients have said.

use std::collections::VecDeque;
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use lockkeeper_testkit::Database;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_postgres::{Config, NoTls};

/// What becomes of a connection, seen from one message of its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The server does not get the message.
    Before,
    /// The server gets it, and both sides are closed at once.
    During,
    /// The server has answered, and the client does not get it.
    Answer,
    /// The client has the whole answer.
    After,
    /// Nothing happens any more, and the connection stays open.
    Silence,
    /// The client's side is closed, the server's is not. The server gets the message when [`Proxy::deliver`] says so.
    Late,
    /// Nothing ends: the server gets the message when [`Proxy::deliver`] says so.
    Held,
}

/// Listens on a port of its own.
pub(crate) struct Proxy {
    port: u16,
    state: Arc<State>,
}

struct State {
    target: Mutex<(String, u16)>,
    /// What the text of a message ends with, and what is done then; each once.
    cuts: Mutex<VecDeque<(&'static str, Cut)>>,
    /// The same at a message by its number, counted from 0: simple queries and Syncs count.
    later: Mutex<Option<(usize, Cut)>>,
    refusing: AtomicBool,
    deliver: Notify,
    /// The texts of simple queries (`Q`) and parsed statements (`P`), and the types of all other messages.
    said: Mutex<Vec<String>>,
    /// How often a client has sent something after an answer: the round trips, where it waits for each answer.
    flights: AtomicU64,
}

impl Proxy {
    pub(crate) async fn start(host: &str, port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let state = Arc::new(State {
            target: Mutex::new((host.to_owned(), port)),
            cuts: Mutex::default(),
            later: Mutex::default(),
            refusing: AtomicBool::new(false),
            deliver: Notify::new(),
            said: Mutex::default(),
            flights: AtomicU64::new(0),
        });
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if shared.refusing.load(Ordering::Relaxed) {
                    continue;
                }
                let state = Arc::clone(&shared);
                // An error is the end of one side, and so of the other.
                tokio::spawn(async move {
                    let target = state.target.lock().unwrap().clone();
                    let server = TcpStream::connect(target).await?;
                    client.set_nodelay(true)?;
                    server.set_nodelay(true)?;
                    forward(&state, client, server).await
                });
            }
        });
        Self { port: own, state }
    }

    /// Before the server of a database.
    pub(crate) async fn before(database: &Database) -> Self {
        let server = database.server();
        Self::start(&server.host(), server.port()).await
    }

    /// What happens at the next message whose text ends so. Of several each waits for the one before.
    pub(crate) fn cut(&self, text: &'static str, cut: Cut) {
        self.state.cuts.lock().unwrap().push_back((text, cut));
    }

    /// What happens at the message after so many others that ask for an answer.
    pub(crate) fn cut_later(&self, messages: usize, cut: Cut) {
        *self.state.later.lock().unwrap() = Some((messages, cut));
    }

    /// How many cuts have not been made.
    pub(crate) fn cuts_left(&self) -> usize {
        let later = usize::from(self.state.later.lock().unwrap().is_some());
        self.state.cuts.lock().unwrap().len() + later
    }

    /// Makes no cuts any more.
    pub(crate) fn forget(&self) {
        self.state.cuts.lock().unwrap().clear();
        *self.state.later.lock().unwrap() = None;
    }

    /// Passes on what was kept back by [`Cut::Late`] or [`Cut::Held`].
    pub(crate) fn deliver(&self) {
        self.state.deliver.notify_one();
    }

    /// Whether new connections are closed at once.
    pub(crate) fn refuse(&self, refusing: bool) {
        self.state.refusing.store(refusing, Ordering::Relaxed);
    }

    /// Where new connections go from now on.
    pub(crate) fn lead_to(&self, host: &str, port: u16) {
        *self.state.target.lock().unwrap() = (host.to_owned(), port);
    }

    /// What was said since the last call, and in how many flights.
    pub(crate) fn heard(&self) -> (Vec<String>, u64) {
        let said = std::mem::take(&mut *self.state.said.lock().unwrap());
        (said, self.state.flights.swap(0, Ordering::Relaxed))
    }

    /// How to get to the same database, as the same user, through here.
    pub(crate) fn config(&self, direct: &Config) -> Config {
        let mut config = Config::new();
        config.host("127.0.0.1").port(self.port);
        if let Some(user) = direct.get_user() {
            config.user(user);
        }
        if let Some(password) = direct.get_password() {
            config.password(password);
        }
        if let Some(database) = direct.get_dbname() {
            config.dbname(database);
        }
        config
    }

    pub(crate) fn pool(&self, direct: &Config, size: usize) -> Pool {
        pool(self.config(direct), size)
    }
}

impl State {
    /// Counts a message.
    fn counted_down(&self) -> Option<Cut> {
        let mut later = self.later.lock().unwrap();
        let (left, cut) = (*later)?;
        *later = left.checked_sub(1).map(|left| (left, cut));
        later.is_none().then_some(cut)
    }
}

/// A pool whose connections are not looked at before they are given out.
pub(crate) fn pool(config: Config, size: usize) -> Pool {
    let recycling = ManagerConfig {
        recycling_method: RecyclingMethod::Fast,
    };
    Pool::builder(Manager::from_config(config, NoTls, recycling))
        .max_size(size)
        .runtime(Runtime::Tokio1)
        .build()
        .unwrap()
}

/// Bytes that become messages (PostgreSQL's documentation, "Message Formats").
#[derive(Default)]
struct Frames {
    bytes: Vec<u8>,
    /// The client's first message has no type.
    first: bool,
}

impl Frames {
    fn next(&mut self) -> Option<Vec<u8>> {
        let typed = usize::from(!self.first);
        let length = self.bytes.get(typed..typed + 4)?.try_into().ok()?;
        let length = typed + usize::try_from(u32::from_be_bytes(length)).ok()?;
        if self.bytes.len() < length {
            return None;
        }
        self.first = false;
        let rest = self.bytes.split_off(length);
        Some(std::mem::replace(&mut self.bytes, rest))
    }
}

/// The SQL text of a message.
fn text(message: &[u8]) -> String {
    let body = match message.first() {
        Some(b'Q') => &message[5..message.len() - 1],
        // Behind the statement's name.
        Some(b'P') => message[5..].split(|byte| *byte == 0).nth(1).unwrap_or(&[]),
        Some(kind) => std::slice::from_ref(kind),
        None => &[],
    };
    String::from_utf8_lossy(body).into_owned()
}

async fn forward(state: &State, mut client: TcpStream, mut server: TcpStream) -> io::Result<()> {
    let mut up = Frames {
        first: true,
        ..Frames::default()
    };
    let mut down = Frames::default();
    // Each simple query and each Sync is answered by one ReadyForQuery, and so is the login.
    let (mut asked, mut ready) = (0_u64, 0_u64);
    let mut cutting: Option<(Cut, u64)> = None;
    let mut answered = true;
    loop {
        tokio::select! {
            read = client.read_buf(&mut up.bytes) => {
                if read? == 0 {
                    return Ok(());
                }
                loop {
                    let login = up.first;
                    let Some(message) = up.next() else { break };
                    if std::mem::take(&mut answered) {
                        state.flights.fetch_add(1, Ordering::Relaxed);
                    }
                    if login || matches!(message[0], b'Q' | b'S') {
                        asked += 1;
                    }
                    if login {
                        server.write_all(&message).await?;
                        continue;
                    }
                    let said = text(&message);
                    let cut = {
                        let mut cuts = state.cuts.lock().unwrap();
                        match cuts.front() {
                            Some((ends, _)) if said.ends_with(ends) => cuts.pop_front(),
                            _ if matches!(message[0], b'Q' | b'S') => {
                                state.counted_down().map(|cut| ("", cut))
                            }
                            _ => None,
                        }
                    };
                    state.said.lock().unwrap().push(said);
                    match cut {
                        Some((_, Cut::Before)) => return Ok(()),
                        Some((_, Cut::During)) => {
                            server.write_all(&message).await?;
                            return Ok(());
                        }
                        Some((_, Cut::Silence)) => std::future::pending().await,
                        Some((_, Cut::Late)) => {
                            drop(client);
                            state.deliver.notified().await;
                            server.write_all(&message).await?;
                            let mut rest = Vec::new();
                            server.read_to_end(&mut rest).await?;
                            return Ok(());
                        }
                        Some((_, Cut::Held)) => state.deliver.notified().await,
                        Some((_, cut)) => cutting = Some((cut, asked)),
                        None => {}
                    }
                    server.write_all(&message).await?;
                }
            }
            read = server.read_buf(&mut down.bytes) => {
                if read? == 0 {
                    return Ok(());
                }
                while let Some(message) = down.next() {
                    answered = true;
                    if cutting.is_some_and(|(cut, at)| cut == Cut::Answer && ready + 1 == at) {
                        // The answer to the message, or its beginning: its end is waited for.
                        if message[0] == b'Z' {
                            return Ok(());
                        }
                        continue;
                    }
                    client.write_all(&message).await?;
                    if message[0] == b'Z' {
                        ready += 1;
                        if cutting == Some((Cut::After, ready)) {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }
}
