//! The log's times, which are in `log_timezone` with the zone's abbreviation.

use std::time::{Duration, SystemTime};

use crate::postgres::timestamp;

/// The abbreviations in which a server with the IANA time zones writes its times (`abbrev` of `pg_timezone_names`), since
/// 1990. A zone without an abbreviation has its offset: `+03`, `+0545`.
const ABBREVIATIONS: &str = "ACDT ACST ACWST ADT AEDT AEST AKDT AKST AMT AST AWDT AWST BST CAT CDT CEST CET CST CUT CVT \
     CWT ChST EAT EDT EEST EET EST FKT GMT GST HADT HAST HDT HKT HKST HST IDT IST JDT JST KDT KST LMT MDT MEST MESZ MET \
     MEZ MSD MSK MST NDT NST NZDT NZST PDT PHT PHST PKST PKT PST SAST SGT SST UCT UTC WAST WAT WEST WET WIB WIT WITA \
     Z Zulu";

/// The same of zones without an abbreviation.
const OFFSETS: &str = "00 01 0130 02 0230 03 0330 04 0430 05 0530 0545 06 0630 07 0730 08 0830 0845 09 0930 10 1030 11 \
     1130 12 1245 13 1345 14";

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

    /// The possible lengths of the time that the text begins with, best first: `2026-01-31 12:34:56.789 CET`, with or
    /// without the fraction. The zone can only be told from what follows by its name.
    pub(super) fn lengths(&self, text: &str) -> Vec<usize> {
        let Some(clock) = clock(text) else {
            return Vec::new();
        };
        let zone = &text[clock..];
        let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | ':' | '_');
        let whole = zone.find(|c| !is_part(c)).unwrap_or(zone.len()).min(32);
        let is_sign = zone.starts_with(['+', '-']);
        let letters = zone.find(|c: char| !c.is_ascii_alphabetic());
        let letters = letters.unwrap_or(zone.len()).min(whole);
        let is_possible = |name: &str| {
            let listed = |list: &str, name: &str| list.split(' ').any(|one| one == name);
            self.named.iter().any(|(known, _)| known == name)
                || listed(ABBREVIATIONS, name)
                || is_sign && listed(OFFSETS, &name[1..].replace(':', ""))
        };
        let mut lengths: Vec<_> = (1..=whole)
            .rev()
            .filter(|end| is_possible(&zone[..*end]))
            .collect();
        // A zone that no list has.
        if !is_sign && (2..=whole).contains(&letters) {
            lengths.push(letters);
        }
        if is_sign {
            let unlisted = [7, 5, 3].into_iter().filter(|end| *end <= whole);
            lengths.extend(unlisted.filter(|end| self.offset(&zone[..*end]).is_some()));
        }
        lengths.into_iter().map(|length| clock + length).collect()
    }

    /// The first time in the text: its beginning and its end.
    pub(super) fn find(&self, text: &str) -> Option<(usize, usize)> {
        let mut before = None;
        let mut starts = text.char_indices().filter(|(_, c)| {
            let after = before.replace(*c);
            c.is_ascii_digit() && !after.is_some_and(|c: char| c.is_ascii_alphanumeric())
        });
        starts.find_map(|(at, _)| Some((at, at + self.lengths(&text[at..]).first()?)))
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

/// The length of `2026-01-31 12:34:56.789 ` at the beginning, with or without the fraction.
fn clock(text: &str) -> Option<usize> {
    const SHAPE: &[u8] = b"dddd-dd-dd dd:dd:dd";
    let bytes = text.as_bytes();
    let is_shape = bytes.len() > SHAPE.len()
        && bytes.iter().zip(SHAPE).all(|(byte, shape)| match shape {
            b'd' => byte.is_ascii_digit(),
            other => byte == other,
        });
    let rest = is_shape.then(|| &text[SHAPE.len()..])?;
    let fraction = rest.strip_prefix('.').map_or(0, |digits| {
        1 + digits
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(digits.len())
    });
    rest[fraction..]
        .starts_with(' ')
        .then_some(SHAPE.len() + fraction + 1)
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
