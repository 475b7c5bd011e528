//! The log's times, which are in `log_timezone` with the zone's abbreviation.

use std::time::{Duration, SystemTime};

use crate::postgres::timestamp;

/// Time zone abbreviations, and how many seconds each is ahead of UTC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct TimeZones {
    named: Vec<(String, i32)>,
}

impl TimeZones {
    pub(super) fn add(&mut self, name: String, seconds: i32) {
        self.named.retain(|(known, _)| *known != name);
        self.named.push((name, seconds));
    }

    /// Reads a time such as `2026-01-31 12:34:56.789 UTC`, or seconds since 1970.
    pub(super) fn time(&self, text: &str) -> Option<SystemTime> {
        if self.is_epoch(text) {
            let (seconds, millis) = text.split_once('.').unwrap_or((text, "0"));
            let since = Duration::from_secs(seconds.parse().ok()?)
                .checked_add(Duration::from_millis(millis.parse().ok()?))?;
            return SystemTime::UNIX_EPOCH.checked_add(since);
        }
        let (local, zone) = text.rsplit_once(' ')?;
        timestamp::in_zone(local, self.offset(zone)?)
    }

    #[expect(
        clippy::unused_self,
        reason = "callers ask the same value for everything about times"
    )]
    pub(super) fn is_epoch(&self, text: &str) -> bool {
        text.len() > 8 && text.chars().all(|c| c.is_ascii_digit() || c == '.')
    }

    fn offset(&self, zone: &str) -> Option<i32> {
        if let Some((_, seconds)) = self.named.iter().find(|(name, _)| name == zone) {
            return Some(*seconds);
        }
        if matches!(zone, "UTC" | "GMT" | "Z" | "UCT") {
            return Some(0);
        }
        // `+03`, `-0330`, `+05:45`: zones without an abbreviation.
        let sign = match zone.chars().next()? {
            '+' => 1,
            '-' => -1,
            _ => return None,
        };
        let digits: String = zone[1..].chars().filter(|c| *c != ':').collect();
        if !matches!(digits.len(), 2 | 4 | 6) || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let part = |at: usize| {
            digits
                .get(at..at + 2)
                .and_then(|part| part.parse::<i32>().ok())
        };
        let seconds = part(0)? * 3600 + part(2).unwrap_or(0) * 60 + part(4).unwrap_or(0);
        Some(sign * seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_with_and_without_a_known_zone() {
        let mut zones = TimeZones::default();
        zones.add("CET".into(), 7200);
        zones.add("CET".into(), 3600);
        let expected = SystemTime::UNIX_EPOCH + Duration::from_millis(1_769_862_896_789);
        for text in [
            "2026-01-31 12:34:56.789 UTC",
            "2026-01-31 13:34:56.789 CET",
            "2026-01-31 15:34:56.789 +03",
            "2026-01-31 09:04:56.789 -0330",
            "1769862896.789",
        ] {
            assert_eq!(zones.time(text), Some(expected), "{text}");
        }
        for text in [
            "",
            " ",
            "2026-01-31 12:34:56.789 JST",
            "2026-01-31 12:34:56.789",
            "2026-01-31 12:34:56.789 +3",
            "2026-01-31 12:34:56.789 +é",
            "99999999999999999999999",
            "1769862896.7.8",
            "2026-13-31 12:34:56 UTC",
        ] {
            assert_eq!(zones.time(text), None, "{text}");
        }
    }
}
