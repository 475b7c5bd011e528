//! Says which PostgreSQL the tests use here.

use std::io::Write;

use lockkeeper_testkit::{Server, SetupError};

fn main() -> Result<(), SetupError> {
    let server = Server::try_shared()?;
    let kind = if server.is_private() {
        "private"
    } else {
        "of DATABASE_URL"
    };
    // A reader who has gone away needs no answer.
    writeln!(std::io::stdout(), "{} {kind}", server.major()).ok();
    Ok(())
}
