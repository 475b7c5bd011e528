//! What a run has done.

use std::fmt;
use std::time::{Duration, Instant};

use super::baseline::Baseline;
use super::plan::Plan;
use crate::graph::Backend;
use crate::monitor::waits::Waits;
use crate::postgres::timestamp::Age;
use crate::resolver::signal::SignalOutcome;

/// What was done, or would have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// The baseline was kept: nothing was changed before.
    Baseline,
    /// The application was told to pause heavy jobs.
    ShedLoad,
    /// A root blocker was left to finish.
    Wait,
    /// A statement was cancelled.
    Cancel,
    /// A session was terminated.
    Terminate,
    /// A root blocker was left alone.
    LeaveAlone,
    /// The server was looked at.
    Look,
    /// The application was told that it may resume heavy jobs, or that the run has given up.
    ResumeLoad,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StepOutcome {
    /// Nothing was done: it is what would have been.
    DryRun,
    /// It was done.
    Done,
    /// The root blocker is in nobody's way any more.
    Helped,
    /// It is in the way still.
    DidNotHelp,
    /// No signal was sent.
    NotSignalled(SignalOutcome),
    /// It was left alone, for this reason.
    LeftAlone(Box<str>),
    /// The application's hook panicked, and the run went on.
    HookPanicked,
    /// The application's hook took too long, and the run went on.
    HookSlow,
    /// The server could not be asked.
    Failed(Box<str>),
}

/// Why a run has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RunEnd {
    /// It is over: the criterion holds.
    Recovered,
    /// It was a dry run.
    DryRun,
    /// Those that are left in the way must not be touched, or nothing helped with them.
    NothingLeftToDo,
    /// As many signals were sent as the policy allows.
    MostSignals,
    /// The time that the policy gives is over.
    Deadline,
}

/// A row of a [`RunLog`].
#[derive(Clone, Debug)]
pub struct LogRow {
    pub(super) after: Duration,
    pub(super) action: Action,
    pub(super) target: Option<Backend>,
    pub(super) why: Box<str>,
    pub(super) outcome: StepOutcome,
    pub(super) before: Option<Waits>,
    pub(super) waits: Option<Waits>,
}

/// Everything that a run has done, in order, and how it was before.
///
/// Each row is a `tracing` event of level `INFO` and target `lockkeeper::resolver` too, at the time.
#[derive(Clone, Debug)]
pub struct RunLog {
    pub(super) plan: Plan,
    pub(super) baseline: Baseline,
    pub(super) rows: Vec<LogRow>,
    pub(super) end: RunEnd,
    pub(super) took: Duration,
    pub(super) signals: u32,
    pub(super) waits: Waits,
}

impl LogRow {
    /// How long after the run began it was written.
    #[must_use]
    pub fn after(&self) -> Duration {
        self.after
    }

    /// What was done.
    #[must_use]
    pub fn action(&self) -> Action {
        self.action
    }

    /// To whom, as it was seen then.
    #[must_use]
    pub fn target(&self) -> Option<&Backend> {
        self.target.as_ref()
    }

    /// Why.
    #[must_use]
    pub fn why(&self) -> &str {
        &self.why
    }

    /// What came of it.
    #[must_use]
    pub fn outcome(&self) -> &StepOutcome {
        &self.outcome
    }

    /// How much was waited before.
    #[must_use]
    pub fn waits_before(&self) -> Option<&Waits> {
        self.before.as_ref()
    }

    /// How much was waited afterwards.
    #[must_use]
    pub fn waits_after(&self) -> Option<&Waits> {
        self.waits.as_ref()
    }

    /// Whether fewer waited afterwards, or for less long. `None` where that is not known, or nothing was done.
    #[must_use]
    pub fn waits_fell(&self) -> Option<bool> {
        Some(self.waits?.have_fallen_since(self.before.as_ref()?))
    }
}

impl RunLog {
    /// What was planned when the run began.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How it was before.
    #[must_use]
    pub fn baseline(&self) -> &Baseline {
        &self.baseline
    }

    /// What was done, in order.
    #[must_use]
    pub fn rows(&self) -> &[LogRow] {
        &self.rows
    }

    /// Why it has ended.
    #[must_use]
    pub fn end(&self) -> &RunEnd {
        &self.end
    }

    /// Whether the criterion held at its end: nobody waits, or as the policy says.
    #[must_use]
    pub fn is_recovered(&self) -> bool {
        self.end == RunEnd::Recovered
    }

    /// How many signals were sent.
    #[must_use]
    pub fn signals(&self) -> u32 {
        self.signals
    }

    /// How long it took.
    #[must_use]
    pub fn took(&self) -> Duration {
        self.took
    }

    /// How much was waited when it was last looked at.
    #[must_use]
    pub fn waits(&self) -> &Waits {
        &self.waits
    }
}

/// The rows while a run is under way.
pub(super) struct Notes {
    pub(super) began: Instant,
    pub(super) rows: Vec<LogRow>,
}

impl Notes {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            rows: Vec::new(),
        }
    }

    /// Writes a row, and tells of it.
    pub(super) fn write(
        &mut self,
        action: Action,
        target: Option<&Backend>,
        why: impl Into<Box<str>>,
        outcome: StepOutcome,
        waits: (Option<Waits>, Option<Waits>),
    ) {
        let row = LogRow {
            after: self.began.elapsed(),
            action,
            target: target.cloned(),
            why: why.into(),
            outcome,
            before: waits.0,
            waits: waits.1,
        };
        tracing::info!(
            target: "lockkeeper::resolver",
            action = ?row.action,
            pid = row.target.as_ref().and_then(Backend::pid),
            session = row.target.as_ref().map(tracing::field::display),
            why = %row.why,
            outcome = %row.outcome,
            waiting_before = row.before.map(|waits| waits.sessions()),
            waiting_after = row.waits.map(|waits| waits.sessions()),
            "resolver: {row}"
        );
        self.rows.push(row);
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Baseline => "baseline",
            Self::ShedLoad => "shed load",
            Self::Wait => "wait",
            Self::Cancel => "cancel",
            Self::Terminate => "terminate",
            Self::LeaveAlone => "leave alone",
            Self::Look => "look",
            Self::ResumeLoad => "resume load",
        })
    }
}

impl fmt::Display for StepOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DryRun => f.write_str("not done, this is a dry run"),
            Self::Done => f.write_str("done"),
            Self::Helped => f.write_str("it is in nobody's way any more"),
            Self::DidNotHelp => f.write_str("it is in the way still"),
            Self::NotSignalled(outcome) => outcome.fmt(f),
            Self::LeftAlone(why) => f.write_str(why),
            Self::HookPanicked => f.write_str("the hook panicked"),
            Self::HookSlow => f.write_str("the hook takes long, going on without it"),
            Self::Failed(why) => write!(f, "failed: {why}"),
        }
    }
}

impl fmt::Display for RunEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Recovered => "recovered",
            Self::DryRun => "dry run, nothing was done",
            Self::NothingLeftToDo => "not recovered, and nothing left that may be done",
            Self::MostSignals => "not recovered, as many signals sent as the policy allows",
            Self::Deadline => "not recovered in the time that the policy gives",
        })
    }
}

/// `+12.0s cancel pid 4711 (billing src/pay.rs:42): keeps 3 sessions waiting, runs a statement: it is in nobody's way any more; 3 sessions
/// wait, … → nobody waits`
impl fmt::Display for LogRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "+{} {}", Age(self.after), self.action)?;
        if let Some(target) = &self.target {
            write!(f, " {}", target.id())?;
            if let Some(name) = target.application_name().filter(|name| !name.is_empty()) {
                write!(f, " ({})", name.escape_debug())?;
            }
        }
        if !self.why.is_empty() {
            write!(f, ": {}", self.why)?;
        }
        write!(f, ": {}", self.outcome)?;
        match (&self.before, &self.waits) {
            (Some(before), Some(after)) => write!(f, "; {before} → {after}"),
            (Some(waits), None) | (None, Some(waits)) => write!(f, "; {waits}"),
            (None, None) => Ok(()),
        }
    }
}

/// The plan, a line for each row, and how it ended.
impl fmt::Display for RunLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.plan.fmt(f)?;
        for row in &self.rows {
            writeln!(f, "{row}")?;
        }
        let signals = match self.signals {
            0 => "no signal".to_owned(),
            1 => "1 signal".to_owned(),
            n => format!("{n} signals"),
        };
        writeln!(
            f,
            "{} after {}, {signals} sent; {}",
            self.end,
            Age(self.took),
            self.waits
        )
    }
}
