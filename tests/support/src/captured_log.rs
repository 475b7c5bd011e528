//! What a thread logs.

use std::io;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use tracing::subscriber::DefaultGuard;

/// What was logged while it was captured.
#[derive(Clone, Debug, Default)]
pub struct CapturedLog(Arc<Mutex<Vec<u8>>>);

impl CapturedLog {
    /// Captures everything that this thread logs from now on, until the second value is dropped.
    #[must_use]
    pub fn start() -> (CapturedLog, DefaultGuard) {
        // While there is only one subscriber, a place in the code that is first reached by a thread without it is silenced
        // for all threads: so there is another one.
        static ANOTHER: LazyLock<tracing::Dispatch> = LazyLock::new(|| {
            let sink = tracing_subscriber::fmt().with_writer(io::sink);
            tracing::Dispatch::new(sink.finish())
        });
        LazyLock::force(&ANOTHER);
        let log = CapturedLog::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    /// Its lines so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl io::Write for CapturedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
