//! A TCP proxy between a client and its server, with the faults that a network has.
//!
//! It reads the messages that pass, so a fault can be placed at one of them: [`Proxy::fault`] names it by the end of its
//! text, [`Proxy::fault_later`] by its number. Everything else is for all connections at once: [`Proxy::delay`],
//! [`Proxy::stall`], [`Proxy::refuse`], [`Proxy::lead_to`], [`Proxy::forget_connections`].
//!
//! It runs on threads that block and not on the runtime of the test. So a delay is exact (a timer of the runtime counts
//! whole milliseconds), and the proxy passes messages on while the runtime stands still or its clock is stopped.
//!
//! | fault of a network | here |
//! |---|---|
//! | cut: both sides are closed | [`Fault::CutBefore`], [`Fault::CutDuring`], [`Fault::CutAnswer`], [`Fault::CutAfter`] |
//! | reset: both sides are told so by a RST | [`Fault::Reset`] |
//! | stall: nothing passes, nothing ends | [`Fault::Stall`] for one connection, [`Proxy::stall`] for all |
//! | swallow: a message is lost | [`Fault::Swallow`] |
//! | delay: a message is late | [`Fault::Hold`], [`Fault::Orphan`]; [`Proxy::delay`] for all |
//! | the connection is forgotten, as by a firewall | [`Proxy::forget_connections`] |

mod link;
mod messages;
mod upstream;

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use deadpool_postgres::Pool;
use tokio_postgres::Config;

use crate::database::pool_of;
use crate::server::Server;
use link::Link;

/// What becomes of a connection at one message of its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Both sides are closed, and the server does not get the message.
    CutBefore,
    /// The server gets the message, and both sides are closed at once.
    CutDuring,
    /// The server answers. The client gets nothing of the answer, and both sides are closed.
    CutAnswer,
    /// The client gets the whole answer, and both sides are closed.
    CutAfter,
    /// The server does not get the message, and both sides are told that the connection was reset (RST).
    Reset,
    /// The server does not get the message. Everything after it passes.
    Swallow,
    /// From this message on nothing passes in either direction, until [`Proxy::resume`] is called. The connection stays
    /// open.
    Stall,
    /// The server gets the message when [`Proxy::deliver`] is called. The connection stays open.
    Hold,
    /// The same, but the client's side is closed at once and the server's is not.
    Orphan,
}

/// The message that a fault has happened at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultSite {
    /// What the client has sent at once, the message included, such as `SELECT 1 D S`: the SQL of simple queries and of
    /// statements that are prepared, and one letter, the type, for any other message.
    pub text: String,
    /// The backend at the other end of the connection.
    pub backend: i32,
}

/// What has passed through a proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Runs of messages from a client with no answer delivered to it in between: the round trips, where the client waits
    /// for each answer.
    pub flights: u64,
    /// Bytes to the server.
    pub up: u64,
    /// Bytes from the server.
    pub down: u64,
}

/// A proxy on a port of its own. Dropping it closes all of its connections.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

/// What the threads of a proxy have in common.
#[derive(Debug, Default)]
struct Shared {
    rules: Mutex<Rules>,
    /// Tells of every change of the rules.
    changed: Condvar,
    flights: AtomicU64,
    up: AtomicU64,
    down: AtomicU64,
    refused: AtomicU64,
}

/// What happens to messages and connections.
#[derive(Debug, Default)]
struct Rules {
    host: String,
    port: u16,
    delay: Duration,
    delay_of_cancels: Duration,
    refusing: bool,
    stalled: bool,
    /// Connections of an earlier generation are forgotten.
    generation: u64,
    /// What the text of a message ends with, and what is done then; each once.
    faults: VecDeque<(String, Fault)>,
    /// The same at a message by its number, counted from 0.
    later: Option<(usize, Fault)>,
    /// Where the last of the faults has happened.
    met: Option<FaultSite>,
    /// How often connections that a fault has stalled were resumed.
    resumed: u64,
    /// How many messages that are held back may go.
    deliveries: usize,
    heard: Vec<String>,
    flights_told: u64,
    links: Vec<Weak<Link>>,
    closed: bool,
}

impl Proxy {
    /// A proxy before a server.
    ///
    /// # Panics
    ///
    /// When this machine has no port to listen on.
    #[must_use]
    pub fn before(server: &Server) -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let port = listener.local_addr().map(|address| address.port());
        let shared = Arc::new(Shared::default());
        let proxy = Proxy {
            port: port.expect("a port that is listened on"),
            shared: Arc::clone(&shared),
        };
        proxy.lead_to(&server.host(), server.port());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if shared.rules().closed {
                    return;
                }
                if shared.rules().refusing {
                    // The client sees its connection closed.
                    shared.refused.fetch_add(1, Ordering::SeqCst);
                } else {
                    Link::start(Arc::clone(&shared), client);
                }
            }
        });
        proxy
    }

    /// The port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How to get to the same database, as the same user, through here.
    #[must_use]
    pub fn config(&self, direct: &Config) -> Config {
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

    /// A pool through here, like [`Database::pool`](crate::Database::pool).
    #[must_use]
    pub fn pool(&self, direct: &Config, size: usize) -> Pool {
        pool_of(self.config(direct), size)
    }

    /// Where new connections go from now on.
    pub fn lead_to(&self, host: &str, port: u16) {
        let mut rules = self.shared.rules();
        host.clone_into(&mut rules.host);
        rules.port = port;
    }

    /// Whether new connections are closed at once.
    pub fn refuse(&self, refusing: bool) {
        self.shared.rules().refusing = refusing;
    }

    /// How many connections have been refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::SeqCst)
    }

    /// Everything that is sent from now on arrives so much later, each way.
    pub fn delay(&self, delay: Duration) {
        self.shared.rules().delay = delay;
    }

    /// Requests to cancel arrive so much later still.
    pub fn delay_cancels(&self, delay: Duration) {
        self.shared.rules().delay_of_cancels = delay;
    }

    /// From now on nothing arrives any more, or all of it does again, what was sent meanwhile included.
    pub fn stall(&self, stalled: bool) {
        self.shared.rules().stalled = stalled;
        self.shared.changed.notify_all();
    }

    /// The connections of now are dead, as if a firewall had forgotten them. That shows when their client sends
    /// something: it is answered by the end of the connection.
    pub fn forget_connections(&self) {
        self.shared.rules().generation += 1;
    }

    /// What happens at the next message whose text ends so. Of several faults each waits for the one before.
    ///
    /// The text of a simple query is its SQL, and so is that of a statement that is prepared.
    pub fn fault(&self, text_ends_with: &str, fault: Fault) {
        let mut rules = self.shared.rules();
        rules.faults.push_back((text_ends_with.to_owned(), fault));
    }

    /// What happens at the message after so many others that ask for an answer: simple queries and Syncs count.
    pub fn fault_later(&self, messages: usize, fault: Fault) {
        self.shared.rules().later = Some((messages, fault));
    }

    /// How many faults have not happened.
    #[must_use]
    pub fn faults_left(&self) -> usize {
        let rules = self.shared.rules();
        rules.faults.len() + usize::from(rules.later.is_some())
    }

    /// Forgets the faults that have not happened.
    pub fn clear_faults(&self) {
        let mut rules = self.shared.rules();
        rules.faults.clear();
        rules.later = None;
    }

    /// Where the last of the faults that have happened did so.
    #[must_use]
    pub fn met(&self) -> Option<FaultSite> {
        self.shared.rules().met.clone()
    }

    /// Lets connections go on that [`Fault::Stall`] has stopped: all that was sent meanwhile arrives.
    pub fn resume(&self) {
        self.shared.rules().resumed += 1;
        self.shared.changed.notify_all();
    }

    /// Lets one message go that is kept back by [`Fault::Hold`] or [`Fault::Orphan`].
    pub fn deliver(&self) {
        self.shared.rules().deliveries += 1;
        self.shared.changed.notify_all();
    }

    /// What clients have sent since the last call, and in how many flights: the SQL of simple queries and prepared
    /// statements, and one letter, the type, for any other message.
    #[must_use]
    pub fn heard(&self) -> (Vec<String>, u64) {
        let mut rules = self.shared.rules();
        let flights = self.shared.flights.load(Ordering::SeqCst);
        let told = std::mem::replace(&mut rules.flights_told, flights);
        (std::mem::take(&mut rules.heard), flights - told)
    }

    /// What has passed so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        Traffic {
            flights: self.shared.flights.load(Ordering::SeqCst),
            up: self.shared.up.load(Ordering::SeqCst),
            down: self.shared.down.load(Ordering::SeqCst),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let links = {
            let mut rules = self.shared.rules();
            rules.closed = true;
            std::mem::take(&mut rules.links)
        };
        self.shared.changed.notify_all();
        for link in links.iter().filter_map(Weak::upgrade) {
            link.close();
        }
        // The thread that accepts sees that it is over when a client comes.
        let own = SocketAddr::from((Ipv4Addr::LOCALHOST, self.port));
        drop(TcpStream::connect_timeout(&own, Duration::from_secs(1)));
    }
}

impl Shared {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the rules are so; `None` when the proxy is dropped first.
    fn when<T>(&self, mut state: impl FnMut(&mut Rules) -> Option<T>) -> Option<T> {
        let mut rules = self.rules();
        loop {
            if rules.closed {
                return None;
            }
            if let Some(found) = state(&mut rules) {
                return Some(found);
            }
            rules = self
                .changed
                .wait(rules)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Counts the beginning of a flight, where `answered` says that the client has been told something since its last.
    fn count_flight(&self, answered: &AtomicBool) {
        if answered.swap(false, Ordering::SeqCst) {
            self.flights.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl Rules {
    /// The fault at a message with this text, and notes that it was heard.
    fn fault_at(
        &mut self,
        text: String,
        asks_for_an_answer: bool,
        site: FaultSite,
    ) -> Option<Fault> {
        let named = match self.faults.front() {
            Some((ends, _)) if text.ends_with(ends.as_str()) => self.faults.pop_front(),
            _ => None,
        };
        self.heard.push(text);
        let fault = match named {
            Some((_, fault)) => Some(fault),
            None if asks_for_an_answer => self.counted_down(),
            None => None,
        };
        if fault.is_some() {
            self.met = Some(site);
        }
        fault
    }

    fn counted_down(&mut self) -> Option<Fault> {
        let (left, fault) = self.later?;
        self.later = left.checked_sub(1).map(|left| (left, fault));
        self.later.is_none().then_some(fault)
    }
}
