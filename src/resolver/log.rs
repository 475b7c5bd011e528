//! The log of a run.

use std::fmt;
use std::time::{Duration, Instant};

use super::baseline::Baseline;
use super::plan::Plan;
use crate::graph::Backend;
use crate::monitor::wait_summary::WaitSummary;
use crate::postgres::timestamp::Age;
use crate::resolver::signal::SignalOutcome;

/// What was done, or would have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// The baseline was recorded, before anything was changed.
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
    /// A snapshot of the server was taken.
    Sample,
    /// The application was told that it may resume heavy jobs, or that the run has given up.
    ResumeLoad,
}

/// The result of an action.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StepOutcome {
    /// Nothing was done: this is what would have been.
    DryRun,
    /// It was done.
    Done,
    /// The root blocker blocks no other session any more.
    Helped,
    /// It still blocks others.
    DidNotHelp,
    /// No signal was sent.
    NotSignalled(SignalOutcome),
    /// It was left alone, for this reason.
    LeftAlone(Box<str>),
    /// The application's hook panicked, and the run continued.
    HookPanicked,
    /// The application's hook took too long, and the run continued.
    HookSlow,
    /// The query to the server failed.
    Failed(Box<str>),
}

/// Why a run has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RunEnd {
    /// The incident is over: the criterion holds.
    Recovered,
    /// It was a dry run.
    DryRun,
    /// The remaining root blockers must not be signalled, or nothing helped.
    NothingLeftToDo,
    /// As many signals were sent as the policy allows.
    MaxSignals,
    /// The policy's deadline has passed.
    Deadline,
}

/// An entry of a [`RunLog`].
#[derive(Clone, Debug)]
pub struct RunLogEntry {
    pub(super) after: Duration,
    pub(super) action: Action,
    pub(super) target: Option<Backend>,
    pub(super) why: Box<str>,
    pub(super) outcome: StepOutcome,
    pub(super) waits_before: Option<WaitSummary>,
    pub(super) waits_after: Option<WaitSummary>,
}

/// Everything that a run has done, in order, and the state of the server before it.
///
/// Each entry is also a `tracing` event of level `INFO` and target `lockkeeper::resolver`, emitted when it is written.
#[derive(Clone, Debug)]
pub struct RunLog {
    pub(super) plan: Plan,
    pub(super) baseline: Baseline,
    pub(super) entries: Vec<RunLogEntry>,
    pub(super) end: RunEnd,
    pub(super) elapsed: Duration,
    pub(super) signals: u32,
    pub(super) waits: WaitSummary,
}

impl RunLogEntry {
    getters! {
        /// How long after the start of the run the entry was written.
        after: Duration;

        /// What was done.
        action: Action;

        /// The session or prepared transaction that it concerns, as it was observed then.
        target: Option<&Backend>;

        /// The reason.
        why: &str;

        /// The result.
        outcome: &StepOutcome;

        /// The lock waits before it.
        waits_before: Option<&WaitSummary>;

        /// The lock waits after it.
        waits_after: Option<&WaitSummary>;
    }

    /// Whether fewer sessions waited afterwards, or for less long. `None` if that is not known, or nothing was done.
    #[must_use]
    pub fn waits_fell(&self) -> Option<bool> {
        Some(
            self.waits_after?
                .has_fallen_since(self.waits_before.as_ref()?),
        )
    }
}

impl RunLog {
    getters! {
        /// What was planned when the run began.
        plan: &Plan;

        /// The state of the server before the run.
        baseline: &Baseline;

        /// What was done, in order.
        entries: &[RunLogEntry];

        /// Why it has ended.
        end: &RunEnd;
    }

    /// Whether the criterion held at the end: no session waits, or as the policy defines it.
    #[must_use]
    pub fn is_recovered(&self) -> bool {
        self.end == RunEnd::Recovered
    }

    getters! {
        /// How many signals were sent.
        signals: u32;

        /// How long the run took.
        elapsed: Duration;

        /// The lock waits in the last snapshot.
        waits: &WaitSummary;
    }
}

/// The log while a run is in progress.
pub(super) struct RunLogBuilder {
    pub(super) started: Instant,
    pub(super) entries: Vec<RunLogEntry>,
}

impl RunLogBuilder {
    pub(super) fn new() -> Self {
        Self {
            started: Instant::now(),
            entries: Vec::new(),
        }
    }

    /// Appends an entry, and emits its `tracing` event.
    pub(super) fn push(
        &mut self,
        action: Action,
        target: Option<&Backend>,
        why: impl Into<Box<str>>,
        outcome: StepOutcome,
        waits: (Option<WaitSummary>, Option<WaitSummary>),
    ) {
        let entry = RunLogEntry {
            after: self.started.elapsed(),
            action,
            target: target.cloned(),
            why: why.into(),
            outcome,
            waits_before: waits.0,
            waits_after: waits.1,
        };
        tracing::info!(
            target: "lockkeeper::resolver",
            action = ?entry.action,
            pid = entry.target.as_ref().and_then(Backend::pid),
            session = entry.target.as_ref().map(tracing::field::display),
            why = %entry.why,
            outcome = %entry.outcome,
            waiting_before = entry.waits_before.map(|waits| waits.sessions()),
            waiting_after = entry.waits_after.map(|waits| waits.sessions()),
            "resolver: {entry}"
        );
        self.entries.push(entry);
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
            Self::Sample => "sample",
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
            Self::MaxSignals => "not recovered, as many signals sent as the policy allows",
            Self::Deadline => "not recovered in the time that the policy gives",
        })
    }
}

/// `+12.0s cancel pid 4711 (billing src/pay.rs:42): keeps 3 sessions waiting, runs a statement: it is in nobody's way any more; 3 sessions
/// wait, … → nobody waits`
impl fmt::Display for RunLogEntry {
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
        match (&self.waits_before, &self.waits_after) {
            (Some(before), Some(after)) => write!(f, "; {before} → {after}"),
            (Some(waits), None) | (None, Some(waits)) => write!(f, "; {waits}"),
            (None, None) => Ok(()),
        }
    }
}

/// The plan, a line for each entry, and how the run ended.
impl fmt::Display for RunLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.plan.fmt(f)?;
        for entry in &self.entries {
            writeln!(f, "{entry}")?;
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
            Age(self.elapsed),
            self.waits
        )
    }
}
