//! Asking a server from code that is not async.

use std::thread;
use std::time::Duration;

use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

/// Runs `work` to its end on a thread of its own, since the caller's may belong to a runtime already.
pub(crate) fn blocking<F>(work: impl FnOnce() -> F + Send) -> F::Output
where
    F: Future,
    F::Output: Send,
{
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime of one thread needs nothing but a few file descriptors")
                .block_on(work())
        });
        match worker.join() {
            Ok(output) => output,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// A client whose connection task runs on the current runtime.
pub(crate) async fn connect(config: &Config) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(async move {
        // A lost connection shows itself in the client's next call.
        connection.await.ok();
    });
    Ok(client)
}

/// Connects, asks one question and returns the first column of the first row, within three seconds.
pub(crate) async fn ask(config: &Config, question: &str) -> Result<String, String> {
    let answer = async {
        let client = connect(config).await?;
        client.simple_query(question).await
    };
    let messages = tokio::time::timeout(Duration::from_secs(3), answer)
        .await
        .map_err(|_| "no answer within 3 seconds".to_owned())?
        .map_err(|error| describe(&error))?;
    messages
        .iter()
        .find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        })
        .ok_or_else(|| format!("no row for {question}"))
}

/// tokio-postgres keeps the server's words in the source of its error.
pub(crate) fn describe(error: &tokio_postgres::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
