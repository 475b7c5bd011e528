//! A far server: a TCP proxy that holds all bytes back for a fixed time in each direction, and counts them.
//!
//! It uses threads that block and not the runtime: a timer of whole milliseconds would blur what is to be counted.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
#[cfg(unix)]
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use lockkeeper_testkit::Server;

use crate::Failure;

/// The proxy. It runs until the process ends.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) port: u16,
    counters: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    flights: AtomicU64,
    up: AtomicU64,
    down: AtomicU64,
}

/// What has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// Runs of bytes from a client with no answer delivered to it in between.
    pub(crate) flights: u64,
    /// Bytes to the server.
    pub(crate) up: u64,
    /// Bytes from the server.
    pub(crate) down: u64,
}

impl Proxy {
    /// Listens on a free port and connects to `server` for each client.
    pub(crate) fn start(server: &Server, delay: Duration) -> Result<Self, Failure> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let counters = Arc::new(Counters::default());
        let proxy = Self {
            port,
            counters: Arc::clone(&counters),
        };
        let (host, to_port) = (server.host(), server.port());
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                // A client whose server cannot be reached sees its connection closed.
                if let Ok(server) = Upstream::connect(&host, to_port) {
                    relay(client, server, delay, &counters);
                }
            }
        });
        Ok(proxy)
    }

    pub(crate) fn traffic(&self) -> Traffic {
        Traffic {
            flights: self.counters.flights.load(Ordering::SeqCst),
            up: self.counters.up.load(Ordering::SeqCst),
            down: self.counters.down.load(Ordering::SeqCst),
        }
    }
}

/// The two directions of one connection, two threads each.
fn relay(client: TcpStream, server: Upstream, delay: Duration, counters: &Arc<Counters>) {
    let (Ok(to_client), Ok(to_server)) = (client.try_clone(), server.try_clone()) else {
        return;
    };
    // An error leaves Nagle's algorithm on, which would show as a longer delay.
    client.set_nodelay(true).ok();
    // Whether the client has been told something since it last sent something.
    let answered = Arc::new(AtomicBool::new(true));

    let (asked, up) = (Arc::clone(&answered), Arc::clone(counters));
    hold_back(
        client,
        to_server,
        delay,
        move |bytes| {
            if asked.swap(false, Ordering::SeqCst) {
                up.flights.fetch_add(1, Ordering::SeqCst);
            }
            up.up.fetch_add(bytes, Ordering::SeqCst);
        },
        |_| {},
        |server| server.close(),
    );
    let down = Arc::clone(counters);
    hold_back(
        server,
        to_client,
        delay,
        |_| {},
        move |bytes| {
            answered.store(true, Ordering::SeqCst);
            down.down.fetch_add(bytes, Ordering::SeqCst);
        },
        |client| {
            client.shutdown(Shutdown::Both).ok();
        },
    );
}

/// One direction: a thread that reads and notes the time, and one that writes when it has come.
fn hold_back<R, W>(
    mut from: R,
    mut to: W,
    delay: Duration,
    read: impl Fn(u64) + Send + 'static,
    delivered: impl Fn(u64) + Send + 'static,
    end: impl Fn(&W) + Send + 'static,
) where
    R: Read + Send + 'static,
    W: Write + Send + 'static,
{
    let (queue, due) = channel::<(Instant, Vec<u8>)>();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            let at = Instant::now() + delay;
            read(u64::try_from(length).unwrap_or_default());
            if queue.send((at, buffer[..length].to_vec())).is_err() {
                return;
            }
        }
    });
    thread::spawn(move || {
        for (at, bytes) in due {
            thread::sleep(at.saturating_duration_since(Instant::now()));
            // Before the bytes themselves, which may be answered at once.
            delivered(u64::try_from(bytes.len()).unwrap_or_default());
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        end(&to);
    });
}

/// A connection to the server, of whichever kind it listens on.
enum Upstream {
    Tcp(TcpStream),
    #[cfg(unix)]
    Unix(UnixStream),
}

impl Upstream {
    fn connect(host: &str, port: u16) -> std::io::Result<Self> {
        #[cfg(unix)]
        if host.starts_with('/') {
            return UnixStream::connect(format!("{host}/.s.PGSQL.{port}")).map(Self::Unix);
        }
        let stream = TcpStream::connect((host, port))?;
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    fn try_clone(&self) -> std::io::Result<Self> {
        match self {
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
            #[cfg(unix)]
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
        }
    }

    fn close(&self) {
        // An error says that it is closed already.
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both).ok(),
            #[cfg(unix)]
            Self::Unix(stream) => stream.shutdown(Shutdown::Both).ok(),
        };
    }
}

impl Read for Upstream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            #[cfg(unix)]
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Upstream {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            #[cfg(unix)]
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.flush(),
            #[cfg(unix)]
            Self::Unix(stream) => stream.flush(),
        }
    }
}
