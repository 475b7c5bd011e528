//! The timeout of an idle transaction, where a text sets it.

use std::time::Duration;

use crate::postgres::sql::setting_duration;

const NAMES: [&str; 2] = [
    "idle_in_transaction_session_timeout",
    "IDLE_IN_TRANSACTION_SESSION_TIMEOUT",
];

/// What `SET [LOCAL] idle_in_transaction_session_timeout` or `set_config` in this text sets it to, as far as the text shows
/// it.
pub(crate) fn idle_timeout_set_by(sql: &str) -> Option<Duration> {
    let found = NAMES.iter().find_map(|name| {
        let at = sql.rfind(name)?;
        Some(&sql[at + name.len()..])
    });
    let separates = |c: char| c.is_whitespace() || matches!(c, '\'' | '"' | ',' | '=');
    let rest = found?.trim_start_matches(separates);
    let to = rest
        .get(..2)
        .filter(|word| word.eq_ignore_ascii_case("to"))
        .map(|_| &rest[2..]);
    let value = to.unwrap_or(rest).trim_start_matches(separates);
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == ' ';
    let end = value.find(|c| !is_part(c)).unwrap_or(value.len());
    let value: String = value[..end].split(' ').take(2).collect();
    setting_duration(&value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_text_sets_it_to() {
        for (sql, expected) in [
            (
                "SET LOCAL idle_in_transaction_session_timeout = '200ms'",
                Some(200),
            ),
            (
                "set idle_in_transaction_session_timeout to 300; SELECT 1",
                Some(300),
            ),
            ("SET IDLE_IN_TRANSACTION_SESSION_TIMEOUT='2 s'", Some(2000)),
            (
                "SELECT set_config('idle_in_transaction_session_timeout', '1min', true)",
                Some(60_000),
            ),
            ("SET idle_in_transaction_session_timeout = 0", Some(0)),
            ("SET idle_in_transaction_session_timeout TO DEFAULT", None),
            ("SHOW idle_in_transaction_session_timeout", None),
            ("SELECT 1", None),
        ] {
            let expected = expected.map(Duration::from_millis);
            assert_eq!(idle_timeout_set_by(sql), expected, "{sql}");
        }
    }
}
