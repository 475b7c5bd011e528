//! The statements that are executed, read from the files beside this one.

use lockkeeper::{LockedRelation, StatementLock};

/// One line of a file.
#[derive(Debug)]
pub(super) struct Case {
    pub(super) statement: String,
    /// The first major version that knows it.
    pub(super) since: u32,
    /// What in the scene has which part in the statement.
    pub(super) roles: Vec<(LockedRelation, String)>,
    pub(super) sql: String,
    /// Puts the scene back as it was.
    pub(super) undo: String,
    pub(super) in_block: bool,
}

impl Case {
    pub(super) fn all() -> Vec<Self> {
        let lines = |text: &'static str, in_block| {
            text.lines()
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
                .map(move |line| Self::parse(line, in_block))
        };
        lines(include_str!("cases.txt"), true)
            .chain(lines(include_str!("outside.txt"), false))
            .collect()
    }

    fn parse(line: &str, in_block: bool) -> Self {
        let mut fields = line.split('|').map(str::trim);
        let mut next = || fields.next().unwrap_or_else(|| panic!("{line}: too short"));
        let (statement, roles, sql) = (next(), next(), next());
        let undo = if in_block { "" } else { next() };
        let (statement, since) = statement.split_once(" @").unwrap_or((statement, "14"));
        let roles = roles.split(' ').map(|part| {
            let (role, relation) = part
                .split_once('=')
                .unwrap_or_else(|| panic!("{line}: {part}"));
            (super::role(role), relation.to_owned())
        });
        let case = Self {
            statement: statement.to_owned(),
            since: since.parse().unwrap(),
            roles: roles.collect(),
            sql: sql.to_owned(),
            undo: undo.to_owned(),
            in_block,
        };
        assert!(fields.next().is_none(), "{line}: too long");
        case
    }

    /// The rows about it that hold in this major version.
    pub(super) fn locks(&self, major: u32) -> impl Iterator<Item = &'static StatementLock> {
        StatementLock::all()
            .filter(move |lock| lock.statement() == self.statement && lock.applies_to(major))
    }

    /// The row about this part of it.
    pub(super) fn lock(&self, on: LockedRelation, major: u32) -> Option<&'static StatementLock> {
        self.locks(major).find(|lock| lock.on() == on)
    }

    pub(super) fn needs_server_of_its_own(&self) -> bool {
        self.sql.contains("TABLESPACE")
    }
}
