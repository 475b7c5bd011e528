//! One client's connection through the proxy.
//!
//! Four threads: two read, and decide by what they read; two write what has become due. Each direction has a queue from
//! its reader to its writer, so whatever ends a connection comes behind what was sent before it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::messages::{Message, Messages};
use super::upstream::Upstream;
use super::{Fault, FaultSite, Shared};

/// A connection, of which both sides are open.
pub(super) struct Link {
    shared: Arc<Shared>,
    client: TcpStream,
    server: Upstream,
    generation: u64,
    /// It is encrypted, so its messages cannot be told apart.
    is_opaque: bool,
    answers: Mutex<Answers>,
    /// The backend, from when it has said which it is.
    backend: AtomicI32,
    /// The client has been told something since it last sent something.
    answered: AtomicBool,
    /// Nothing gets to the client any more.
    stalled: AtomicBool,
    /// The client's side was closed, and the server's stays open.
    orphaned: AtomicBool,
    /// It ends by a RST, so nothing else may end it.
    reset: AtomicBool,
}

/// Each login, simple query and Sync is answered by one ReadyForQuery.
#[derive(Default)]
struct Answers {
    asked: u64,
    ready: u64,
    /// The connection ends with this answer.
    last: Option<(Fault, u64)>,
}

impl Answers {
    fn is_last_asked(&self) -> bool {
        self.last.is_some_and(|(_, last)| self.asked >= last)
    }
}

/// What a reader has for its writer.
enum Parcel {
    Bytes(Instant, Vec<u8>),
    End(Instant),
    Reset,
}

/// Where a writer writes to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Up,
    Down,
}

impl Link {
    /// Connects a client with the server, and passes on what they send until one of them ends.
    pub(super) fn start(shared: Arc<Shared>, client: TcpStream) {
        thread::spawn(move || {
            let (link, rest) = Self::open(shared, client)?;
            let link = Arc::new(link);
            link.register()?;
            let (up, to_server) = channel();
            let (down, to_client) = channel();
            let [writes_up, writes_down, reads_down] = [(); 3].map(|()| Arc::clone(&link));
            thread::spawn(move || writes_up.write(Direction::Up, to_server));
            thread::spawn(move || writes_down.write(Direction::Down, to_client));
            thread::spawn(move || reads_down.read_server(&down));
            link.read_client(rest, &up);
            Some(())
        });
    }

    /// Passes on the client's first message, whatever it is: a login, a request to cancel, or a question about encryption
    /// and what follows its answer. The server is connected to when that message is due.
    fn open(shared: Arc<Shared>, client: TcpStream) -> Option<(Self, Messages)> {
        // Without it Nagle's algorithm would show as a longer delay.
        client.set_nodelay(true).ok();
        let (generation, host, port) = {
            let rules = shared.rules();
            (rules.generation, rules.host.clone(), rules.port)
        };
        let mut messages = Messages::of_client();
        let mut server = None;
        let answered = AtomicBool::new(true);
        let mut asked = 0;
        let is_opaque = loop {
            let first = read_one(&client, &mut messages)?;
            shared.count_flight(&answered);
            shared.count_up(first.bytes.len());
            shared.wait_until_due(first.is_cancel())?;
            if server.is_none() {
                server = Some(Upstream::connect(&host, port).ok()?);
            }
            let mut upstream = server.as_ref()?;
            upstream.write_all(&first.bytes).ok()?;
            if !first.asks_for_encryption() {
                asked += u64::from(first.asks_for_an_answer());
                break false;
            }
            let mut answer = [0];
            upstream.read_exact(&mut answer).ok()?;
            shared.wait_until_due(false)?;
            answered.store(true, Ordering::SeqCst);
            shared.count_down(1);
            (&client).write_all(&answer).ok()?;
            if &answer == b"S" {
                break true;
            }
        };
        let link = Self {
            shared,
            client,
            server: server?,
            generation,
            is_opaque,
            answers: Mutex::new(Answers {
                asked,
                ..Answers::default()
            }),
            backend: AtomicI32::new(0),
            answered,
            stalled: AtomicBool::new(false),
            orphaned: AtomicBool::new(false),
            reset: AtomicBool::new(false),
        };
        Some((link, messages))
    }

    /// So that it ends with the proxy; `None` where that has ended.
    fn register(self: &Arc<Self>) -> Option<()> {
        let mut rules = self.shared.rules();
        rules.links.retain(|link| link.strong_count() > 0);
        rules.links.push(Arc::downgrade(self));
        (!rules.closed).then_some(())
    }

    pub(super) fn close(&self) {
        if self.reset.load(Ordering::SeqCst) {
            return;
        }
        self.client.shutdown(Shutdown::Both).ok();
        self.server.close();
    }

    /// The last of its threads that ends closes both sockets, and so sends the RST.
    fn reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
        prepare_reset(&self.client);
        self.server.prepare_reset();
    }

    fn read_client(&self, mut messages: Messages, up: &Sender<Parcel>) {
        let mut buffer = vec![0; 64 * 1024];
        // Since the last message that asked for an answer.
        let mut said = Vec::new();
        loop {
            while let Some(message) = self.next(&mut messages) {
                if self.pass_up(message, up, &mut said).is_none() {
                    return;
                }
            }
            match (&self.client).read(&mut buffer) {
                Ok(length @ 1..) => messages.push(&buffer[..length]),
                _ => break,
            }
        }
        // An error says that the writer has ended, and so the connection.
        up.send(self.end()).ok();
    }

    fn read_server(&self, down: &Sender<Parcel>) {
        let mut messages = Messages::default();
        let mut buffer = vec![0; 64 * 1024];
        loop {
            while let Some(message) = self.next(&mut messages) {
                if self.pass_down(message, down).is_none() {
                    return;
                }
            }
            match (&self.server).read(&mut buffer) {
                Ok(length @ 1..) => messages.push(&buffer[..length]),
                _ => break,
            }
        }
        down.send(self.end()).ok();
    }

    fn next(&self, messages: &mut Messages) -> Option<Message> {
        if self.is_opaque {
            messages.take_all()
        } else {
            messages.next()
        }
    }

    /// Passes a client's message on as the rules say; `None` when there is nothing more to read.
    fn pass_up(&self, message: Message, up: &Sender<Parcel>, said: &mut Vec<String>) -> Option<()> {
        self.shared.count_flight(&self.answered);
        self.shared.count_up(message.bytes.len());
        let asks = message.asks_for_an_answer();
        if self.answers().is_last_asked() {
            // The client may be faster than the cut: what it sends after its last answer stays here.
            return Some(());
        }
        let text = message.text();
        said.push(text.clone());
        let site = FaultSite {
            text: said.join(" "),
            backend: self.backend.load(Ordering::SeqCst),
        };
        if asks {
            said.clear();
        }
        let fault = {
            let mut rules = self.shared.rules();
            if rules.generation != self.generation {
                drop(rules);
                self.close();
                return None;
            }
            rules.fault_at(text, asks, site)
        };
        if asks && fault != Some(Fault::Swallow) {
            self.answers().asked += 1;
        }
        match fault {
            None => {}
            Some(Fault::CutBefore) => {
                up.send(self.end()).ok()?;
                return None;
            }
            Some(Fault::CutDuring) => {
                // The server may be faster than the cut: its answer stays here.
                self.stalled.store(true, Ordering::SeqCst);
                up.send(self.bytes(message)).ok()?;
                up.send(self.end()).ok()?;
                return None;
            }
            Some(fault @ (Fault::CutAnswer | Fault::CutAfter)) => {
                let mut answers = self.answers();
                // What asks for no answer is answered with the next that does.
                answers.last = Some((fault, answers.asked + u64::from(!asks)));
            }
            Some(Fault::Reset) => {
                up.send(Parcel::Reset).ok()?;
                return None;
            }
            Some(Fault::Swallow) => return Some(()),
            Some(Fault::Stall) => self.stall()?,
            Some(Fault::Hold) => self.shared.wait_for_delivery()?,
            Some(Fault::Orphan) => {
                self.orphaned.store(true, Ordering::SeqCst);
                self.client.shutdown(Shutdown::Both).ok();
                self.shared.wait_for_delivery()?;
                up.send(self.bytes(message)).ok()?;
                return None;
            }
        }
        up.send(self.bytes(message)).ok()
    }

    /// Lets nothing pass until the proxy resumes; `None` when it is dropped first.
    fn stall(&self) -> Option<()> {
        let resumed = self.shared.rules().resumed;
        self.stalled.store(true, Ordering::SeqCst);
        self.shared.when(|rules| {
            (rules.resumed > resumed).then(|| self.stalled.store(false, Ordering::SeqCst))
        })?;
        self.shared.changed.notify_all();
        Some(())
    }

    /// Passes the server's message on; `None` when the connection ends with it.
    fn pass_down(&self, message: Message, down: &Sender<Parcel>) -> Option<()> {
        let is_ready = message.is_ready_for_query();
        if let Some(pid) = message.backend() {
            self.backend.store(pid, Ordering::SeqCst);
        }
        let (is_kept_back, is_last) = {
            let mut answers = self.answers();
            let at = answers.ready + 1;
            answers.ready += u64::from(is_ready);
            (
                answers.last == Some((Fault::CutAnswer, at)),
                is_ready && answers.last.is_some_and(|(_, last)| last == at),
            )
        };
        if !is_kept_back {
            down.send(self.bytes(message)).ok()?;
        }
        if is_last {
            down.send(self.end()).ok()?;
            return None;
        }
        Some(())
    }

    fn write(&self, direction: Direction, parcels: Receiver<Parcel>) {
        for parcel in parcels {
            let due = match &parcel {
                Parcel::Bytes(due, _) | Parcel::End(due) => *due,
                Parcel::Reset => Instant::now(),
            };
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let passes = self.shared.when(|rules| {
                let stalled = direction == Direction::Down && self.stalled.load(Ordering::SeqCst);
                (!rules.stalled && !stalled).then_some(())
            });
            if passes.is_none() {
                return;
            }
            let written = match (parcel, direction) {
                (Parcel::Bytes(_, bytes), Direction::Up) => (&self.server).write_all(&bytes),
                (Parcel::Bytes(_, bytes), Direction::Down) => {
                    // Before the bytes themselves, which may be answered at once.
                    self.answered.store(true, Ordering::SeqCst);
                    self.shared.count_down(bytes.len());
                    match (&self.client).write_all(&bytes) {
                        Err(_) if self.orphaned.load(Ordering::SeqCst) => Ok(()),
                        written => written,
                    }
                }
                (Parcel::End(_), _) => return self.close(),
                (Parcel::Reset, _) => return self.reset(),
            };
            if written.is_err() {
                return self.close();
            }
        }
    }

    fn bytes(&self, message: Message) -> Parcel {
        Parcel::Bytes(self.due(), message.bytes)
    }

    fn end(&self) -> Parcel {
        Parcel::End(self.due())
    }

    fn due(&self) -> Instant {
        Instant::now() + self.shared.rules().delay
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn count_up(&self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.up.fetch_add(bytes, Ordering::SeqCst);
    }

    fn count_down(&self, bytes: usize) {
        let bytes = u64::try_from(bytes).unwrap_or(u64::MAX);
        self.down.fetch_add(bytes, Ordering::SeqCst);
    }

    /// Waits for as long as something sent now is on its way.
    fn wait_until_due(&self, is_cancel: bool) -> Option<()> {
        let delay = {
            let rules = self.rules();
            let more = if is_cancel {
                rules.delay_of_cancels
            } else {
                Duration::ZERO
            };
            rules.delay + more
        };
        thread::sleep(delay);
        self.when(|rules| (!rules.stalled).then_some(()))
    }

    fn wait_for_delivery(&self) -> Option<()> {
        self.when(|rules| {
            rules.deliveries = rules.deliveries.checked_sub(1)?;
            Some(())
        })
    }
}

/// A client's first message, or the one after its question about encryption.
fn read_one(mut client: &TcpStream, messages: &mut Messages) -> Option<Message> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        if let Some(message) = messages.next() {
            return Some(message);
        }
        let length = client.read(&mut buffer).ok()?;
        if length == 0 {
            return None;
        }
        messages.push(&buffer[..length]);
    }
}

/// With a linger time of zero, closing a socket sends a RST. Who reads from it reads its end, so that it can be closed.
pub(super) fn prepare_reset(stream: &TcpStream) {
    let socket = socket2::SockRef::from(stream);
    socket.set_linger(Some(Duration::ZERO)).ok();
    stream.shutdown(Shutdown::Read).ok();
}
