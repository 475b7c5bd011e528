//! A connection to the server, of whichever kind it listens on.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;

use super::link::prepare_reset;

#[derive(Debug)]
pub(super) enum Upstream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Upstream {
    /// Connects to a host, or to the socket in a folder.
    pub(super) fn connect(host: &str, port: u16) -> io::Result<Self> {
        if host.starts_with('/') {
            return UnixStream::connect(format!("{host}/.s.PGSQL.{port}")).map(Self::Unix);
        }
        let stream = TcpStream::connect((host, port))?;
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    /// An error says that it is closed already.
    pub(super) fn close(&self) {
        match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both).ok(),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both).ok(),
        };
    }

    /// A socket in a folder knows no RST: it is closed.
    pub(super) fn prepare_reset(&self) {
        match self {
            Self::Tcp(stream) => prepare_reset(stream),
            Self::Unix(_) => self.close(),
        }
    }
}

impl Read for &Upstream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Upstream::Tcp(stream) => { stream }.read(buffer),
            Upstream::Unix(stream) => { stream }.read(buffer),
        }
    }
}

impl Write for &Upstream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Upstream::Tcp(stream) => { stream }.write(bytes),
            Upstream::Unix(stream) => { stream }.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
