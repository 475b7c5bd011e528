//! Timestamps and durations as text, and back.

use std::fmt;
#[cfg(feature = "incidents")]
use std::fmt::Write as _;
use std::time::{Duration, SystemTime};

/// `3.2s`, `5min 12s`, `3h 05min`, `2d 03h`.
pub(crate) struct Age(pub(crate) Duration);

impl fmt::Display for Age {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        match seconds {
            0 => write!(f, "{}ms", self.0.as_millis()),
            1..60 => write!(f, "{}.{}s", seconds, self.0.subsec_millis() / 100),
            60..3600 => write!(f, "{}min {:02}s", seconds / 60, seconds % 60),
            3600..86_400 => write!(f, "{}h {:02}min", seconds / 3600, seconds / 60 % 60),
            _ => write!(f, "{}d {:02}h", seconds / 86_400, seconds / 3600 % 24),
        }
    }
}

/// `2026-01-31T12:34:56.789012Z` (RFC 3339); times before 1970 are shown as 1970.
#[cfg(feature = "incidents")]
pub(crate) fn rfc3339(at: SystemTime) -> String {
    let since = at
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = date(days);
    let mut text = format!("{year:04}-{month:02}-{day:02}T");
    // Infallible: writing to a String.
    let _ = write!(
        text,
        "{:02}:{:02}:{:02}.{:06}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        since.subsec_micros()
    );
    text
}

/// Parses a local time such as `2026-01-31 12:34:56.789` of a zone that is this many seconds ahead of UTC. `None` for
/// anything else, and for times before 1970.
#[cfg(feature = "server-log")]
pub(crate) fn in_zone(text: &str, ahead: i32) -> Option<SystemTime> {
    let (day, time) = text.split_once([' ', 'T'])?;
    let (time, fraction) = time.split_once('.').unwrap_or((time, ""));
    let numbers = |text: &str, between: char| -> Option<[u64; 3]> {
        let mut parts = text.split(between).map(|part| {
            let is_number = !part.is_empty() && part.len() < 7;
            let is_number = is_number && part.bytes().all(|byte| byte.is_ascii_digit());
            is_number.then(|| part.parse().ok()).flatten()
        });
        let three = [parts.next()??, parts.next()??, parts.next()??];
        parts.next().is_none().then_some(three)
    };
    let [year, month, day] = numbers(day, '-')?;
    let [hours, minutes, seconds] = numbers(time, ':')?;
    if !(1970..10_000).contains(&year) || hours > 23 || minutes > 59 || seconds > 60 {
        return None;
    }
    let days = days(year, month, day)?;
    let local = days * 86_400 + hours * 3600 + minutes * 60 + seconds;
    let utc = i64::try_from(local).ok()?.checked_sub(i64::from(ahead))?;
    let is_fraction = fraction.len() <= 9 && fraction.bytes().all(|byte| byte.is_ascii_digit());
    let nanos: u32 = if is_fraction {
        format!("{fraction:0<9}").parse().ok()?
    } else {
        return None;
    };
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(u64::try_from(utc).ok()?, nanos))
}

/// The reverse of [`date`]; `None` if there is no such day.
#[cfg(feature = "server-log")]
fn days(year: u64, month: u64, day: u64) -> Option<u64> {
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    // As in `date`, years begin in March.
    let (shifted, month_of_march) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let (era, of_era) = (shifted / 400, shifted % 400);
    let of_year = (153 * month_of_march + 2) / 5 + day - 1;
    let days = era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year;
    let days = days.checked_sub(719_468)?;
    (date(days) == (year, month, day)).then_some(days)
}

/// The year, month and day of the Gregorian calendar, this many days after 1970-01-01.
fn date(days: u64) -> (u64, u64, u64) {
    // Years are counted from March, so that the leap day is the last day of its year. An era has 400 years.
    const ERA: u64 = 146_097;
    let shifted = days + 719_468;
    let (era, day) = (shifted / ERA, shifted % ERA);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, january) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    (era * 400 + year + january, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_dates() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (58, (1970, 2, 28)),
            (59, (1970, 3, 1)),
            (789, (1972, 2, 29)),
            (790, (1972, 3, 1)),
            (11_016, (2000, 2, 29)),
            (20_483, (2026, 1, 30)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(days), expected, "{days}");
        }
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_769_862_896_789_012);
        assert_eq!(rfc3339(at), "2026-01-31T12:34:56.789012Z");
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(rfc3339(before), "1970-01-01T00:00:00.000000Z");
    }

    #[test]
    fn every_day_follows_the_one_before() {
        let length = |year: u64, month| match month {
            2 if year.is_multiple_of(4)
                && (!year.is_multiple_of(100) || year.is_multiple_of(400)) =>
            {
                29
            }
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        let mut expected = (1970, 1, 1);
        for days in 0..200_000 {
            assert_eq!(date(days), expected, "{days}");
            expected = match expected {
                (year, 12, 31) => (year + 1, 1, 1),
                (year, month, day) if day == length(year, month) => (year, month + 1, 1),
                (year, month, day) => (year, month, day + 1),
            };
        }
    }

    #[test]
    fn times_are_parsed_back() {
        for days in (0..200_000).step_by(7) {
            let (year, month, day) = date(days);
            assert_eq!(super::days(year, month, day), Some(days));
        }
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_769_862_896_789_012);
        assert_eq!(in_zone("2026-01-31 12:34:56.789012", 0), Some(at));
        assert_eq!(in_zone("2026-01-31T14:34:56.789012", 7200), Some(at));
        for text in [
            "",
            "2026-01-31",
            "2026-02-30 12:34:56",
            "2026-00-01 12:34:56",
            "2026-01-31 24:00:00",
            "2026-01-31 12:34",
            "2026-01-31 12:34:56.x",
            "1969-12-31 23:59:59",
            "2026-01-31 12:34:56.1234567890",
            "+2026-01-31 12:34:56",
            "2026-01-31-01 12:34:56",
            "99999999-01-01 00:00:00",
        ] {
            assert_eq!(in_zone(text, 0), None, "{text}");
        }
        assert_eq!(in_zone("1970-01-01 00:30:00", 3600), None);
    }
}
