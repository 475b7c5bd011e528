//! When the kernel gives a connection up whose peer is silent.

use std::time::Duration;

use tokio_postgres::Config;
#[cfg(feature = "monitor")]
use tokio_postgres::config::Host;

/// Probes without an answer after which a connection counts as dead.
const PROBES: u32 = 3;
/// The kernel counts in seconds.
const SECOND: Duration = Duration::from_secs(1);
/// Keepalives that begin later than this are as good as none; two hours are the driver's default.
#[cfg(feature = "monitor")]
const LATE: Duration = Duration::from_secs(600);

/// Has the operating system give up a connection over TCP whose peer has been silent for `longest`: a network that drops
/// packets, a host that lost its power, a failover that moved the address.
///
/// Call it on the `Config` of the pool, and on that of the
/// [`side_connection`](crate::KeeperBuilder::side_connection). Two settings are needed, since each is blind where the other
/// sees:
///
/// - **Keepalives** find a dead peer while the connection is idle, as that of a [`SessionGuard`](crate::SessionGuard) is,
///   or that of a statement that waits for its answer. The kernel sends none while data of ours is unacknowledged: a
///   statement that was sent into a dead network is not found by them.
/// - **`tcp_user_timeout`** is how long data may stay unacknowledged, instead of a quarter of an hour or so. It does not
///   wake a connection on which nothing is sent: without keepalives an idle guard notices nothing.
///
/// It sets `keepalives`, `keepalives_idle` to half of `longest`, `keepalives_interval` to a sixth and `keepalives_retries`
/// to 3, in whole seconds of at least one; `tcp_user_timeout` to `longest`; and `connect_timeout` too, where there is none.
/// Below 4 seconds an idle connection is given up after 4 all the same. The driver sets `tcp_user_timeout` on Linux only.
/// Nothing of this concerns a Unix-domain socket.
///
/// [`longest_silence`](crate::KeeperBuilder::longest_silence) bounds another thing: how long this crate waits for an answer,
/// also where the kernel at the other end still acknowledges, for a server that has stopped. It needs neither setting, but
/// it wakes nobody who waits for no answer. The same duration is a good choice for both.
///
/// # Examples
/// ```
/// use std::time::Duration;
///
/// let mut config = "host=db user=app dbname=shop".parse::<tokio_postgres::Config>()?;
/// lockkeeper::tcp_timeouts(&mut config, Duration::from_secs(15));
/// assert_eq!(config.get_tcp_user_timeout(), Some(&Duration::from_secs(15)));
/// # Ok::<(), tokio_postgres::Error>(())
/// ```
pub fn tcp_timeouts(config: &mut Config, longest: Duration) {
    let seconds = |time: Duration| Duration::from_secs(time.as_secs()).max(SECOND);
    config
        .keepalives(true)
        .keepalives_idle(seconds(longest / 2))
        .keepalives_interval(seconds(longest / (2 * PROBES)))
        .keepalives_retries(PROBES)
        .tcp_user_timeout(longest.max(SECOND));
    if config.get_connect_timeout().is_none() {
        config.connect_timeout(longest.max(SECOND));
    }
}

/// What a configuration lacks of [`tcp_timeouts`]; `None` where nothing, or where it leads to no host over TCP.
#[cfg(feature = "monitor")]
pub(super) fn missing_tcp_timeouts(config: &Config) -> Option<String> {
    let is_tcp = |host: &Host| matches!(host, Host::Tcp(_));
    if config.get_hostaddrs().is_empty() && !config.get_hosts().iter().any(is_tcp) {
        return None;
    }
    let mut missing = Vec::new();
    if !config.get_keepalives() {
        missing.push("no keepalives".to_owned());
    } else if config.get_keepalives_idle() > LATE {
        let idle = config.get_keepalives_idle().as_secs();
        missing.push(format!("keepalives_idle {idle}s"));
    }
    let user_timeout = config.get_tcp_user_timeout();
    if cfg!(target_os = "linux") && user_timeout.is_none_or(Duration::is_zero) {
        missing.push("no tcp_user_timeout".to_owned());
    }
    (!missing.is_empty()).then(|| missing.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        text.parse().expect("a connection string")
    }

    #[test]
    fn an_idle_connection_is_given_up_within_the_time() {
        for (millis, idle, interval, within) in
            [(15_000, 7, 2, 15), (60_000, 30, 10, 60), (10, 1, 1, 4)]
        {
            let longest = Duration::from_millis(millis);
            let mut config = config("host=db");
            tcp_timeouts(&mut config, longest);
            assert!(config.get_keepalives());
            assert_eq!(config.get_keepalives_idle().as_secs(), idle);
            let every = config.get_keepalives_interval().expect("an interval");
            assert_eq!((every.as_secs(), every.subsec_nanos()), (interval, 0));
            let probes = config.get_keepalives_retries().expect("a number");
            assert!(config.get_keepalives_idle() + every * probes <= Duration::from_secs(within));
            let longest = longest.max(SECOND);
            assert_eq!(config.get_tcp_user_timeout(), Some(&longest));
            assert_eq!(config.get_connect_timeout(), Some(&longest));
        }
    }

    #[test]
    fn a_connect_timeout_is_kept() {
        let mut config = config("host=db connect_timeout=3");
        tcp_timeouts(&mut config, Duration::from_secs(15));
        let kept = Duration::from_secs(3);
        assert_eq!(config.get_connect_timeout(), Some(&kept));
    }

    #[cfg(all(feature = "monitor", target_os = "linux"))]
    #[test]
    fn what_is_missing_is_said() {
        for (text, expected) in [
            (
                "host=db",
                Some("keepalives_idle 7200s, no tcp_user_timeout"),
            ),
            (
                "host=db keepalives=0",
                Some("no keepalives, no tcp_user_timeout"),
            ),
            (
                "host=db keepalives=0 tcp_user_timeout=9",
                Some("no keepalives"),
            ),
            (
                "host=/run/postgresql,db tcp_user_timeout=9",
                Some("keepalives_idle 7200s"),
            ),
            ("host=db keepalives_idle=60 tcp_user_timeout=9", None),
            ("host=/run/postgresql", None),
            ("user=app", None),
        ] {
            let missing = missing_tcp_timeouts(&config(text));
            assert_eq!(missing.as_deref(), expected, "{text}");
        }
        let mut good = config("host=db");
        tcp_timeouts(&mut good, Duration::from_secs(15));
        assert_eq!(missing_tcp_timeouts(&good), None);
    }
}
