//! Any bytes as a log, in any format, whole and in pieces. With cargo-fuzz and a nightly compiler:
//! `cargo +nightly fuzz run server_log fuzz/seeds/server_log`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use lockkeeper::server_log::{LogEvent, Reader};

fn read(mut reader: Reader, pieces: &[&str]) -> Vec<LogEvent> {
    let mut events = Vec::new();
    for piece in pieces {
        events.extend(reader.push(piece));
    }
    events.extend(reader.finish());
    events
}

fuzz_target!(|data: &[u8]| {
    let Some((cut, data)) = data.split_first() else {
        return;
    };
    let text = String::from_utf8_lossy(data);
    // The first line is the prefix, too.
    let prefix = text.lines().next().unwrap_or_default();
    let mut at = text.len() * usize::from(*cut) / 256;
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    let (first, second) = text.split_at(at);
    for reader in [
        Reader::stderr("%m [%p] %q%u@%d %a "),
        Reader::stderr(prefix),
        Reader::stderr_of_any_prefix(),
        Reader::csv(),
        Reader::json(),
    ] {
        let whole = read(reader.clone(), &[&text]);
        let pieces = read(reader, &[first, second]);
        assert_eq!(whole, pieces);
        for event in whole {
            assert!(!event.to_string().is_empty());
        }
    }
});
