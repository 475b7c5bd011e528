//! The rules that turn settings and privileges into findings.

use super::settings::{Effect, Pooler, SettingsFinding, SettingsFindingKind, Severity};
use crate::monitor::sql::settings::{
    self as sql, Membership, MonitoringRole, PoolSession, SettingRow,
};

/// Milliseconds: the server waits this long before it checks for a deadlock.
const SLOW_DETECTION: u64 = 2_000;
const FAST_DETECTION: u64 = 100;
/// The default of `max_locks_per_transaction`.
const DEFAULT_LOCKS: u64 = 64;

/// Which roles may change a setting (`pg_settings.context`), and so which statement does.
#[derive(Clone, Copy)]
enum SettingContext {
    /// Any role, for itself.
    User,
    /// Superusers, for the server or for a role.
    Superuser,
    /// Only the whole server, by a reload or a restart.
    Server(Effect),
}

/// The findings, worst first.
pub(super) fn findings(
    session: &PoolSession,
    values: &[SettingRow],
    role: &MonitoringRole,
    pooler: Pooler,
    missing_tcp_timeouts: Option<&str>,
) -> Vec<SettingsFinding> {
    let check = SettingsCheck { session, values };
    let mut findings: Vec<_> = [
        check.deadlock_timeout(),
        check.lock_timeout(),
        check.log_lock_waits(),
        check.log_line_prefix(),
        check.idle_in_transaction(),
        check.connection_check(),
        check.locks_per_transaction(role),
        stats_privilege(role),
        locks_privilege(role),
        signal_privilege(role),
        pooler_finding(pooler),
        standby(session),
        missing_tcp_timeouts.map(tcp_timeouts),
    ]
    .into_iter()
    .flatten()
    .collect();
    findings.sort_by_key(|finding| (std::cmp::Reverse(finding.severity), finding.kind));
    findings
}

struct SettingsCheck<'a> {
    session: &'a PoolSession,
    values: &'a [SettingRow],
}

impl SettingsCheck<'_> {
    fn deadlock_timeout(&self) -> Option<SettingsFinding> {
        let (severity, why) = match self.number("deadlock_timeout")? {
            0..FAST_DETECTION => (
                Severity::Advice,
                "the server looks for deadlocks after each short wait, which costs all sessions when many wait",
            ),
            FAST_DETECTION..=SLOW_DETECTION => return None,
            _ => (
                Severity::Warning,
                "a deadlock stands for as long, with all who wait behind it, and log_lock_waits tells of longer waits \
                 only",
            ),
        };
        let kind = SettingsFindingKind::DeadlockTimeout;
        self.finding(
            kind,
            severity,
            "deadlock_timeout",
            why,
            "1s",
            SettingContext::Superuser,
        )
    }

    fn lock_timeout(&self) -> Option<SettingsFinding> {
        let deadlock = self.number("deadlock_timeout")?;
        let why = match self.number("lock_timeout")? {
            0 => {
                "statements outside this crate's own bounds wait for a lock for ever, and all who come later wait \
                 behind them"
            }
            wait if wait <= deadlock => {
                "it is not longer than deadlock_timeout, so that a deadlock ends as a lock timeout of all who take part, \
                 and nobody is told that it was one"
            }
            _ => return None,
        };
        let recommended = if deadlock < 5_000 {
            "10s".to_owned()
        } else {
            format!("{}ms", deadlock.saturating_mul(2))
        };
        let kind = SettingsFindingKind::LockTimeout;
        self.finding(
            kind,
            Severity::Warning,
            "lock_timeout",
            why,
            &recommended,
            SettingContext::User,
        )
    }

    fn log_lock_waits(&self) -> Option<SettingsFinding> {
        if self.get("log_lock_waits")?.value != "off" {
            return None;
        }
        self.finding(
            SettingsFindingKind::LogLockWaits,
            Severity::Warning,
            "log_lock_waits",
            "the server's log says nothing of long waits for locks, so that afterwards nobody knows who waited for whom",
            "on",
            SettingContext::Superuser,
        )
    }

    fn log_line_prefix(&self) -> Option<SettingsFinding> {
        let prefix = &self.get("log_line_prefix")?.value;
        // Logs in CSV and JSON have no prefix; the name is in a field of its own.
        let destinations = &self.get("log_destination")?.value;
        let prefixed = destinations.split(',').any(|destination| {
            let destination = destination.trim();
            !destination.eq_ignore_ascii_case("csvlog")
                && !destination.eq_ignore_ascii_case("jsonlog")
        });
        if !prefixed || includes_application_name(prefix) {
            return None;
        }
        let recommended = match prefix.trim_end() {
            "" => "%m [%p] %a ".to_owned(),
            prefix => format!("{prefix} %a "),
        };
        self.finding(
            SettingsFindingKind::LogLinePrefix,
            Severity::Advice,
            "log_line_prefix",
            "without %a the log's lines about deadlocks and waits do not say at which line of which program, which is what \
             application_name carries",
            &recommended,
            SettingContext::Server(Effect::Reload),
        )
    }

    fn idle_in_transaction(&self) -> Option<SettingsFinding> {
        let name = "idle_in_transaction_session_timeout";
        if self.number(name)? > 0 {
            return None;
        }
        self.finding(
            SettingsFindingKind::IdleInTransactionSessionTimeout,
            Severity::Warning,
            name,
            "a session that stands idle in its transaction keeps its locks for as long as its client lives",
            "5min",
            SettingContext::User,
        )
    }

    fn connection_check(&self) -> Option<SettingsFinding> {
        let name = "client_connection_check_interval";
        if self.number(name)? > 0 {
            return None;
        }
        self.finding(
            SettingsFindingKind::ClientConnectionCheckInterval,
            Severity::Advice,
            name,
            "a backend whose client was killed runs, and waits for locks, to the end of its statement, and keeps what it \
             holds until then",
            "10s",
            SettingContext::User,
        )
    }

    fn locks_per_transaction(&self, role: &MonitoringRole) -> Option<SettingsFinding> {
        let name = "max_locks_per_transaction";
        let number = self.number(name)?;
        let (entries, capacity) = role.lock_table.unwrap_or_default();
        let (recommended, why) = if entries.saturating_mul(2) > capacity {
            let why = format!(
                "the lock table has {} of {} entries in use; when it is full, statements fail with \"out of shared \
                 memory\", and nobody can log in",
                entries, capacity
            );
            (number.saturating_mul(2).max(DEFAULT_LOCKS), why)
        } else if number < DEFAULT_LOCKS {
            let why = "the lock table is smaller than usual, and shared by all: a dump, or a query over many partitions, \
                       can fill it";
            (DEFAULT_LOCKS, why.to_owned())
        } else {
            return None;
        };
        self.finding(
            SettingsFindingKind::MaxLocksPerTransaction,
            Severity::Warning,
            name,
            &why,
            &recommended.to_string(),
            SettingContext::Server(Effect::Restart),
        )
    }

    fn get(&self, name: &str) -> Option<&SettingRow> {
        self.values.iter().find(|setting| setting.name == name)
    }

    /// The value of a setting in milliseconds or without a unit.
    fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.value.parse().ok()
    }

    fn finding(
        &self,
        kind: SettingsFindingKind,
        severity: Severity,
        name: &'static str,
        why: &str,
        recommended: &str,
        context: SettingContext,
    ) -> Option<SettingsFinding> {
        let setting = self.get(name)?;
        let fix = self.fix(setting, recommended, context);
        let why = match fix {
            Ok(_) => why.to_owned(),
            Err(where_to) => format!("{why}; {where_to}, {recommended} for instance"),
        };
        Some(SettingsFinding {
            kind,
            severity,
            name,
            value: setting.shown.clone(),
            why,
            fix: fix.ok(),
        })
    }

    /// The statement that overrides the source of the value (PostgreSQL's source, the order of `GucSource`), or where
    /// it has to be changed by hand.
    fn fix(
        &self,
        setting: &SettingRow,
        recommended: &str,
        context: SettingContext,
    ) -> Result<(String, Effect), &'static str> {
        let PoolSession { role, database, .. } = self.session;
        let name = &setting.name;
        let of_role = |database| {
            let statement = sql::alter_role(role, database, name, recommended);
            Ok((statement, Effect::NewConnections))
        };
        let of_server = |effect| Ok((sql::alter_system(name, recommended), effect));
        match (&*setting.source, context) {
            ("client" | "session", _) => Err(
                "the connection itself sets it, by its connection string or a statement of the application's: change it \
                 there",
            ),
            ("database user", SettingContext::User | SettingContext::Superuser) => {
                of_role(Some(database))
            }
            ("user" | "database" | "global", SettingContext::Superuser)
            | (_, SettingContext::User) => of_role(None),
            ("command line" | "environment variable", _) => Err(
                "it is given on the server's command line: change it where the server is started",
            ),
            (_, SettingContext::Superuser) => of_server(Effect::Reload),
            (_, SettingContext::Server(effect)) => of_server(effect),
        }
    }
}

fn stats_privilege(role: &MonitoringRole) -> Option<SettingsFinding> {
    privilege(
        role,
        role.reads_all_stats,
        SettingsFindingKind::ReadAllStats,
        Severity::Warning,
        "pg_read_all_stats",
        "of the sessions of other roles neither state nor statement nor times are to be seen, so that reports have gaps",
    )
}

fn locks_privilege(role: &MonitoringRole) -> Option<SettingsFinding> {
    role.lock_table.is_none().then(|| SettingsFinding {
        kind: SettingsFindingKind::ReadLocks,
        severity: Severity::Warning,
        name: "pg_locks",
        value: format!("not to be read by {}", crate::postgres::sql::identifier(&role.name)),
        why: "who holds a lock, and who waits, is not to be seen: errors name no blockers, there are no reports, and nothing \
              can be monitored"
            .to_owned(),
        fix: Some((sql::grant_pg_locks(&role.name), Effect::Immediate)),
    })
}

fn signal_privilege(role: &MonitoringRole) -> Option<SettingsFinding> {
    privilege(
        role,
        role.signals,
        SettingsFindingKind::SignalBackend,
        Severity::Advice,
        "pg_signal_backend",
        "the sessions of other roles can be neither cancelled nor terminated",
    )
}

fn privilege(
    role: &MonitoringRole,
    has: Membership,
    kind: SettingsFindingKind,
    severity: Severity,
    name: &'static str,
    why: &str,
) -> Option<SettingsFinding> {
    let value = match has {
        Membership::Full => return None,
        Membership::Uninherited => "not inherited by",
        Membership::None => "not granted to",
    };
    let why = if has == Membership::None && !role.inherits && role.version < 160_000 {
        format!("{why}; the role is NOINHERIT, which is to be mended next")
    } else {
        why.to_owned()
    };
    Some(SettingsFinding {
        kind,
        severity,
        name,
        value: format!("{value} {}", crate::postgres::sql::identifier(&role.name)),
        why,
        fix: Some((sql::grant(name, has, role), Effect::Immediate)),
    })
}

fn pooler_finding(pooler: Pooler) -> Option<SettingsFinding> {
    let (severity, value, why) = match pooler {
        Pooler::Direct => return None,
        Pooler::SharesSessions => (
            Severity::Warning,
            "shares server sessions",
            "one server session serves several clients in turn: session locks are refused, and what SET sets is left to \
             others; use transaction locks, connect to the server directly, or set the pooler to session mode",
        ),
        Pooler::KeepsSessions => (
            Severity::Note,
            "keeps a server session for each client",
            "cancel requests take the way through it; give the side connection the server's own address",
        ),
        Pooler::Unknown => (
            Severity::Note,
            "one stands between",
            "whether it keeps one server session for each client was not to be proven; if not, session locks are refused; \
             give the side connection the server's own address",
        ),
    };
    Some(SettingsFinding {
        kind: SettingsFindingKind::Pooler,
        severity,
        name: "pooler",
        value: value.to_owned(),
        why: why.to_owned(),
        fix: None,
    })
}

fn tcp_timeouts(missing: &str) -> SettingsFinding {
    SettingsFinding {
        kind: SettingsFindingKind::TcpTimeouts,
        severity: Severity::Advice,
        name: "side connection",
        value: missing.to_owned(),
        why: "keepalives find a dead server while a connection is idle, tcp_user_timeout while data is unacknowledged: \
              without both a network that drops packets is noticed late or never; call lockkeeper::tcp_timeouts on the \
              Config of the side connection, and on the pool's, which is not to be seen here"
            .to_owned(),
        fix: None,
    }
}

fn standby(session: &PoolSession) -> Option<SettingsFinding> {
    session.standby.then(|| SettingsFinding {
        kind: SettingsFindingKind::Standby,
        severity: Severity::Note,
        name: "standby",
        value: "in recovery".to_owned(),
        why: "advisory locks are refused here, since they would exclude nobody on the primary; what mends roles is to \
              be run on the primary"
            .to_owned(),
        fix: None,
    })
}

/// Whether a `log_line_prefix` has `%a`, which may be padded: `%-20a`. `%%` stands for itself.
fn includes_application_name(prefix: &str) -> bool {
    let mut rest = prefix;
    while let Some((_, escape)) = rest.split_once('%') {
        let escape = escape.trim_start_matches('-');
        let escape = escape.trim_start_matches(|c: char| c.is_ascii_digit());
        let mut letters = escape.chars();
        if letters.next() == Some('a') {
            return true;
        }
        rest = letters.as_str();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(name: &str, value: &str, source: &str) -> SettingRow {
        SettingRow {
            name: name.to_owned(),
            value: value.to_owned(),
            shown: value.to_owned(),
            source: source.to_owned(),
        }
    }

    fn session() -> PoolSession {
        PoolSession {
            role: "The \"App\"".to_owned(),
            database: "shop".to_owned(),
            standby: false,
            pid: 7,
        }
    }

    fn role() -> MonitoringRole {
        MonitoringRole {
            name: "The \"App\"".to_owned(),
            reads_all_stats: Membership::Full,
            signals: Membership::Full,
            inherits: true,
            version: 150_018,
            lock_table: Some((10, 100)),
        }
    }

    fn found(values: &[SettingRow]) -> Vec<SettingsFinding> {
        findings(&session(), values, &role(), Pooler::Direct, None)
    }

    /// The fix for one setting whose value has this source.
    fn statement(name: &str, value: &str, source: &str) -> Option<String> {
        let mut values = vec![setting(name, value, source)];
        if name == "lock_timeout" {
            values.push(setting("deadlock_timeout", "1000", "default"));
        }
        let findings = found(&values);
        let [finding] = &findings[..] else {
            panic!("{findings:?}");
        };
        assert_eq!(finding.statement().is_none(), finding.effect().is_none());
        finding.statement().map(str::to_owned)
    }

    #[test]
    fn a_fix_overrides_the_source_of_the_value() {
        let role = r#"ALTER ROLE "The ""App""" SET lock_timeout = '10s'"#;
        let here = r#"ALTER ROLE "The ""App""" IN DATABASE "shop" SET lock_timeout = '10s'"#;
        for source in [
            "default",
            "configuration file",
            "command line",
            "database",
            "user",
        ] {
            assert_eq!(
                statement("lock_timeout", "0", source).as_deref(),
                Some(role)
            );
        }
        let source = "database user";
        assert_eq!(
            statement("lock_timeout", "0", source).as_deref(),
            Some(here)
        );
        for source in ["client", "session"] {
            assert_eq!(statement("lock_timeout", "0", source), None);
        }
        let server = "ALTER SYSTEM SET log_lock_waits = 'on'";
        let role = r#"ALTER ROLE "The ""App""" SET log_lock_waits = 'on'"#;
        for (source, fix) in [
            ("default", Some(server)),
            ("configuration file", Some(server)),
            ("user", Some(role)),
            ("command line", None),
            ("session", None),
        ] {
            assert_eq!(statement("log_lock_waits", "off", source).as_deref(), fix);
        }
        let name = "max_locks_per_transaction";
        assert_eq!(statement(name, "10", "command line"), None);
        assert_eq!(
            statement(name, "10", "default").as_deref(),
            Some("ALTER SYSTEM SET max_locks_per_transaction = '64'")
        );
    }

    #[test]
    fn a_finding_without_a_statement_names_the_place_to_change() {
        let finding = &found(&[setting("log_lock_waits", "off", "command line")])[0];
        assert!(finding.why().contains("where the server is started"));
        assert!(
            finding.to_string().ends_with("on for instance"),
            "{finding}"
        );
    }

    #[test]
    fn timeouts_outside_their_range_are_found() {
        let at = |deadlock: &str, lock: &str| {
            let values = [
                setting("deadlock_timeout", deadlock, "default"),
                setting("lock_timeout", lock, "default"),
            ];
            let findings = found(&values);
            let kinds: Vec<_> = findings.iter().map(SettingsFinding::kind).collect();
            kinds
        };
        use SettingsFindingKind::{DeadlockTimeout, LockTimeout};
        assert_eq!(at("1000", "10000"), []);
        assert_eq!(at("100", "101"), []);
        assert_eq!(at("2000", "2001"), []);
        assert_eq!(at("2001", "10000"), [DeadlockTimeout]);
        assert_eq!(at("99", "10000"), [DeadlockTimeout]);
        assert_eq!(at("1000", "0"), [LockTimeout]);
        assert_eq!(at("1000", "1000"), [LockTimeout]);
        assert_eq!(at("60000", "30000"), [DeadlockTimeout, LockTimeout]);
        let values = [
            setting("deadlock_timeout", "60000", "default"),
            setting("lock_timeout", "0", "default"),
        ];
        let longer = found(&values)[1].statement().map(str::to_owned);
        assert!(longer.is_some_and(|statement| statement.ends_with("'120000ms'")));
    }

    #[test]
    fn a_prefix_is_read_as_the_server_reads_it() {
        for shows in ["%a", "%m [%p] %-20a", "%%%a", "%q%10a "] {
            assert!(includes_application_name(shows), "{shows}");
        }
        for silent in ["", "%m [%p] ", "100%%a", "%", "%-", "a%", "%ä%"] {
            assert!(!includes_application_name(silent), "{silent}");
        }
        let with = |destination| {
            found(&[
                setting("log_line_prefix", "it's \\ %m", "default"),
                setting("log_destination", destination, "default"),
            ])
        };
        assert_eq!(with("csvlog, jsonlog"), []);
        let findings = with("csvlog, stderr");
        assert_eq!(
            findings[0].statement(),
            Some(r"ALTER SYSTEM SET log_line_prefix = E'it''s \\ %m %a '")
        );
    }

    #[test]
    fn a_grant_to_a_role_that_does_not_inherit_says_so() {
        use Membership::{None, Uninherited};
        let statement = |signals, inherits, version| {
            let role = MonitoringRole {
                signals,
                inherits,
                version,
                ..role()
            };
            let findings = findings(&session(), &[], &role, Pooler::Direct, Option::None);
            findings[0].statement().map(str::to_owned)
        };
        let role = r#""The ""App""""#;
        for (has, inherits, version, fix) in [
            (
                None,
                true,
                140_000,
                format!("GRANT pg_signal_backend TO {role}"),
            ),
            (
                None,
                true,
                180_000,
                format!("GRANT pg_signal_backend TO {role}"),
            ),
            (
                None,
                false,
                140_000,
                format!("GRANT pg_signal_backend TO {role}"),
            ),
            (
                Uninherited,
                false,
                140_000,
                format!("ALTER ROLE {role} INHERIT"),
            ),
            (
                None,
                false,
                160_000,
                format!("GRANT pg_signal_backend TO {role} WITH INHERIT TRUE"),
            ),
            (
                Uninherited,
                true,
                160_000,
                format!("GRANT pg_signal_backend TO {role} WITH INHERIT TRUE"),
            ),
        ] {
            assert_eq!(statement(has, inherits, version), Some(fix));
        }
    }

    #[test]
    fn a_full_lock_table_needs_more_than_the_default() {
        let values = [setting("max_locks_per_transaction", "128", "default")];
        let full = MonitoringRole {
            lock_table: Some((51, 100)),
            ..role()
        };
        let findings = findings(&session(), &values, &full, Pooler::Direct, None);
        assert_eq!(
            findings[0].statement(),
            Some("ALTER SYSTEM SET max_locks_per_transaction = '256'")
        );
        assert!(findings[0].why().contains("51 of 100"));
        assert_eq!(found(&values), []);
    }
}
