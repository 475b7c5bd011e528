//! The figures of a comparison.

use std::fmt;
use std::ops::AddAssign;

/// How well predictions agreed with what the server did. “Strong” locks are those from SHARE UPDATE EXCLUSIVE on.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Statements that succeeded and were compared.
    pub statements: usize,
    /// Those of them that were not understood.
    pub not_understood: usize,
    /// Statements that failed, or cannot run in a transaction block, and were not compared.
    pub not_compared: usize,
    /// Strong locks that were taken on relations that existed before.
    pub strong: usize,
    /// Those of them that were predicted, at least as strong.
    pub predicted: usize,
    /// Those that were not predicted, or not as strong, of statements that were not understood.
    pub unknown: usize,
    /// Those that were not predicted, of statements that were understood.
    pub missing: usize,
    /// Those that were predicted too weak, of statements that were understood.
    pub weak: usize,
    /// Understood statements with a strong lock that was missing or too weak.
    pub wrong_statements: usize,
    /// Strong locks that were predicted for statements that were understood.
    pub said: usize,
    /// Those of them that were taken in at least that mode.
    pub said_rightly: usize,
    /// Tables that were read or rewritten under a lock that blocks writers.
    pub work: usize,
    /// Those of them that an understood statement was said to treat briefly, or not at all.
    pub work_missed: usize,
    /// Tables that an understood statement was said to read or rewrite under such a lock, and did not.
    pub work_said_wrongly: usize,
    /// One line for each difference.
    pub differences: Vec<String>,
}

impl AddAssign for Figures {
    fn add_assign(&mut self, other: Figures) {
        self.statements += other.statements;
        self.not_understood += other.not_understood;
        self.not_compared += other.not_compared;
        self.strong += other.strong;
        self.predicted += other.predicted;
        self.unknown += other.unknown;
        self.missing += other.missing;
        self.weak += other.weak;
        self.wrong_statements += other.wrong_statements;
        self.said += other.said;
        self.said_rightly += other.said_rightly;
        self.work += other.work;
        self.work_missed += other.work_missed;
        self.work_said_wrongly += other.work_said_wrongly;
        self.differences.extend(other.differences);
    }
}

/// In percent with one digit, rounded down, so that 100.0 is all.
fn percent(part: usize, whole: usize) -> String {
    let tenths = (part * 1000).checked_div(whole).unwrap_or(1000);
    format!("{}.{} %", tenths / 10, tenths % 10)
}

/// The figures, without the differences.
impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} statements compared, {} of them not understood; {} not compared",
            self.statements, self.not_understood, self.not_compared
        )?;
        writeln!(
            f,
            "strong locks taken: {}; predicted at least as strong: {} ({}); unknown: {}; missing: {}; too weak: {}",
            self.strong,
            self.predicted,
            percent(self.predicted, self.strong),
            self.unknown,
            self.missing,
            self.weak
        )?;
        writeln!(
            f,
            "understood statements with a strong lock missing or too weak: {}",
            self.wrong_statements
        )?;
        writeln!(
            f,
            "strong locks predicted: {}; taken: {} ({})",
            self.said,
            self.said_rightly,
            percent(self.said_rightly, self.said)
        )?;
        write!(
            f,
            "rewrites and scans under a lock that blocks writers: {}; called brief or not predicted: {}; predicted and not \
             seen: {}",
            self.work, self.work_missed, self.work_said_wrongly
        )
    }
}
