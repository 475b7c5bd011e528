//! Executing a policy: one root blocker at a time, with a snapshot after each step.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::baseline::{Baseline, Setting};
use super::escalation::EscalationState;
use super::load_hook::{HookResult, LoadChange, LoadHook};
use super::log::{Action, RunEnd, RunLog, RunLogBuilder, StepOutcome};
use super::plan::{self, Decision, Plan, Step};
use super::policy::ResolverPolicy;
use super::protection_rules::SessionFacts;
use super::target_status::{TargetId, TargetStatus, step_outcome, target_status};
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind};
use crate::graph::{Backend, LockTree};
use crate::monitor::Monitor;
use crate::monitor::recovery::RecoveryTracker;
use crate::monitor::wait_summary::WaitSummary;
use crate::postgres::timestamp::Age;
use crate::resolver::signal::SignalOutcome;
use crate::resolver::sql::sessions;
use crate::resolver::sql::signal::{Exclusions, Signal};

/// What to do after a step.
enum NextStep {
    /// Choose among the current root blockers.
    Others,
    /// Continue with the same root blocker.
    Same,
    End(RunEnd),
}

struct Run<'a> {
    monitor: &'a Monitor,
    policy: &'a ResolverPolicy,
    log: RunLogBuilder,
    recovery: RecoveryTracker,
    deadline: Deadline,
    signals: u32,
    /// In the last snapshot.
    waits: WaitSummary,
    /// Whether the last snapshot met the criterion, and whether enough snapshots in a row did.
    criterion_met: bool,
    recovered: bool,
    /// Root blockers that nothing more is to be done about.
    finished: HashSet<TargetId>,
    /// Root blockers for which the log already has the reason why they are left alone.
    logged: HashSet<TargetId>,
    /// Set once load is shed.
    load_hook: Option<LoadHook>,
}

pub(super) async fn run(monitor: &Monitor, policy: &ResolverPolicy) -> Result<RunLog, Error> {
    let recovery = RecoveryTracker::new(policy.criterion, policy.databases.clone())?;
    let deadline = Deadline::after(policy.deadline);
    let log = RunLogBuilder::new();
    let baseline = Baseline {
        activity: monitor.activity().await?,
        snapshot: monitor.snapshot().await?,
        settings: settings(monitor).await?,
    };
    let tree = baseline.snapshot.tree();
    let facts = facts_for(monitor, policy, &tree).await?;
    let plan = Plan::new(policy, &facts, &tree);
    let mut run = Run {
        monitor,
        policy,
        log,
        recovery,
        deadline,
        signals: 0,
        waits: *plan.waits(),
        criterion_met: false,
        recovered: false,
        finished: HashSet::new(),
        logged: HashSet::new(),
        load_hook: None,
    };
    let why = format!(
        "{} sessions, {} edges and {} settings kept",
        baseline.activity.len(),
        baseline.snapshot.edges().len(),
        baseline.settings.len()
    );
    run.log_action(Action::Baseline, None, why, StepOutcome::Done);
    let end = if policy.execute {
        run.execute().await
    } else {
        run.log_dry_run(&plan);
        RunEnd::DryRun
    };
    let log = RunLog {
        plan,
        baseline,
        elapsed: run.log.started.elapsed(),
        entries: run.log.entries,
        end,
        signals: run.signals,
        waits: run.waits,
    };
    tracing::info!(
        target: "lockkeeper::resolver",
        end = %log.end,
        signals = log.signals,
        waiting = log.waits.sessions(),
        "resolver: {}",
        log.end
    );
    Ok(log)
}

impl Run<'_> {
    /// Logs what a run that is no dry run would do about the current root blockers.
    fn log_dry_run(&mut self, plan: &Plan) {
        for root in plan.roots() {
            match root.decision() {
                Decision::Act(steps) => {
                    for step in steps {
                        let action = match step {
                            Step::Wait(_) => Action::Wait,
                            Step::Cancel => Action::Cancel,
                            Step::Terminate => Action::Terminate,
                        };
                        let why = format!("{}: {step}", root.why());
                        self.log_action(action, Some(root.backend()), why, StepOutcome::DryRun);
                    }
                }
                decision => self.log_left_alone(root.backend(), root.why(), decision),
            }
        }
    }

    async fn execute(&mut self) -> RunEnd {
        if !self.waits.is_empty() {
            self.shed_load().await;
        }
        let end = self.resolve_roots().await;
        if let Some(mut load_hook) = self.load_hook.take() {
            let (change, why) = match end {
                RunEnd::Recovered => (LoadChange::Resume, "it is over: heavy jobs may go on"),
                _ => (LoadChange::GaveUp, "it is not over, and the run ends"),
            };
            let result = load_hook.call(change).await;
            self.log_action(Action::ResumeLoad, None, why, hook_outcome(result));
        }
        end
    }

    /// Called once: at the beginning, or before the first root blocker is resolved if no session waited then.
    async fn shed_load(&mut self) {
        if self.load_hook.is_some() {
            return;
        }
        let Some(hook) = self.policy.load_callback.clone() else {
            return;
        };
        // Cancel safety: if the run is dropped, so is the hook, which then tells the application that the run gave up.
        let load_hook = LoadHook::new(hook, self.policy.hook_timeout);
        let result = self
            .load_hook
            .insert(load_hook)
            .call(LoadChange::Shed)
            .await;
        let why = "heavy jobs are to pause";
        self.log_action(Action::ShedLoad, None, why, hook_outcome(result));
    }

    async fn resolve_roots(&mut self) -> RunEnd {
        let mut idle_since: Option<Instant> = None;
        loop {
            let Some(tree) = self.sample().await else {
                return RunEnd::Deadline;
            };
            if self.recovered {
                return RunEnd::Recovered;
            }
            match self.next_root(&tree).await {
                Ok(Some(root)) => {
                    idle_since = None;
                    self.shed_load().await;
                    if let NextStep::End(end) = self.resolve_root(root).await {
                        return end;
                    }
                    // The next snapshot is taken only after a pause, like any other.
                }
                Ok(None) if self.criterion_met => idle_since = None,
                Ok(None) => {
                    // The server may be about to end a deadlock, or a session may be about to finish.
                    let since = idle_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= self.policy.settle {
                        return RunEnd::NothingLeftToDo;
                    }
                }
                Err(error) => self.log_failure(&error),
            }
            self.pause().await;
        }
    }

    /// The next root blocker to resolve. Logs why others are left alone.
    async fn next_root(&mut self, tree: &LockTree) -> Result<Option<Backend>, Error> {
        if tree.is_empty() {
            return Ok(None);
        }
        let facts = self.facts(tree).await?;
        let plan = Plan::new(self.policy, &facts, tree);
        for root in plan.roots() {
            if self.finished.contains(&TargetId::of(root.backend())) {
                continue;
            }
            match root.decision() {
                Decision::Act(_) => return Ok(Some(root.backend().clone())),
                decision => self.log_left_alone(root.backend(), root.why(), decision),
            }
        }
        Ok(None)
    }

    /// Escalates against one root blocker until it blocks no more, or nothing is left to be done about it.
    async fn resolve_root(&mut self, first: Backend) -> NextStep {
        let target_id = TargetId::of(&first);
        let started = Instant::now();
        let before = self.waits;
        let mut seen = first;
        let mut escalation = EscalationState::default();
        loop {
            let Some(tree) = self.sample().await else {
                return NextStep::End(RunEnd::Deadline);
            };
            let status = target_status(&tree, &target_id);
            if !escalation.waited && !matches!(status, TargetStatus::RootBlocker(_)) {
                let why = format!("left to finish for {}", Age(started.elapsed()));
                let waits = (Some(before), Some(self.waits));
                self.log
                    .push(Action::Wait, Some(&seen), why, step_outcome(&status), waits);
            }
            let TargetStatus::RootBlocker(backend) = status else {
                return self.next();
            };
            if self.recovered {
                return NextStep::End(RunEnd::Recovered);
            }
            seen = *backend;
            let decision = match self.facts(&tree).await {
                Ok(facts) => plan::decision(self.policy, &facts, &seen),
                Err(error) => {
                    self.log_failure(&error);
                    self.pause().await;
                    continue;
                }
            };
            let Decision::Act(steps) = &decision else {
                self.log_left_alone(&seen, "it has gone on to something else", &decision);
                self.finished.insert(target_id);
                return NextStep::Others;
            };
            if let Some(remaining) =
                escalation.remaining_wait(steps, started.elapsed(), self.policy)
            {
                self.sleep(remaining.min(self.policy.poll)).await;
                continue;
            }
            if !escalation.waited {
                escalation.waited = true;
                let why = format!("left to finish for {}", Age(started.elapsed()));
                let waits = (Some(before), Some(self.waits));
                let outcome = StepOutcome::DidNotHelp;
                self.log
                    .push(Action::Wait, Some(&seen), why, outcome, waits);
            }
            let Some(signal) = escalation.next_signal(steps) else {
                let decision = "nothing that may be done has helped";
                self.log_abandoned(&seen, decision);
                self.finished.insert(target_id);
                return NextStep::Others;
            };
            match self.send(signal, &seen, &target_id, &mut escalation).await {
                NextStep::Same => {}
                next => return next,
            }
        }
    }

    /// Sends a signal and waits for its effect.
    async fn send(
        &mut self,
        signal: Signal,
        target: &Backend,
        target_id: &TargetId,
        escalation: &mut EscalationState,
    ) -> NextStep {
        if self.signals >= self.policy.max_signals {
            return NextStep::End(RunEnd::MaxSignals);
        }
        let action = match signal {
            Signal::Cancel => Action::Cancel,
            Signal::Terminate => Action::Terminate,
        };
        let why = match signal {
            Signal::Cancel => "it has not finished by itself",
            Signal::Terminate if escalation.is_too_quick() => {
                "no signal meets one of its statements"
            }
            Signal::Terminate if escalation.cancelled => "a cancel has not helped",
            Signal::Terminate => "it is idle, so that there is nothing to cancel",
        };
        let exclusions = Exclusions {
            superusers: !self.policy.allow_superusers,
            builds: !self.policy.allow_migrations,
            // A session that has just become idle may be about to commit; an idle one has a grace of its own.
            finished: !escalation.is_too_quick(),
        };
        let before = self.waits;
        let outcome = match self.monitor.signal(signal, target, exclusions).await {
            Ok(outcome) => outcome,
            Err(error) => {
                // It may have been sent.
                self.signals += 1;
                let outcome = StepOutcome::Failed(error.to_string().into());
                self.log
                    .push(action, Some(target), why, outcome, (Some(before), None));
                self.pause().await;
                return NextStep::Same;
            }
        };
        if !outcome.is_signalled() {
            let again = match outcome {
                SignalOutcome::Gone => true,
                SignalOutcome::Changed(_) | SignalOutcome::NothingRuns => {
                    escalation.record_miss(signal);
                    true
                }
                _ => false,
            };
            let outcome = StepOutcome::NotSignalled(outcome);
            self.log
                .push(action, Some(target), why, outcome, (Some(before), None));
            if again {
                self.pause().await;
                return NextStep::Same;
            }
            self.finished.insert(target_id.clone());
            return NextStep::Others;
        }
        self.signals += 1;
        match signal {
            Signal::Cancel => escalation.cancelled = true,
            Signal::Terminate => escalation.terminated = true,
        }
        let sent = Instant::now();
        loop {
            let Some(tree) = self.sample().await else {
                let outcome = StepOutcome::Failed("the time was over before it was seen".into());
                self.log
                    .push(action, Some(target), why, outcome, (Some(before), None));
                return NextStep::End(RunEnd::Deadline);
            };
            let status = target_status(&tree, target_id);
            let is_root = matches!(status, TargetStatus::RootBlocker(_));
            if is_root && sent.elapsed() < self.policy.settle && !self.recovered {
                self.pause().await;
                continue;
            }
            let waits = (Some(before), Some(self.waits));
            self.log
                .push(action, Some(target), why, step_outcome(&status), waits);
            return if is_root && !self.recovered {
                NextStep::Same
            } else {
                self.next()
            };
        }
    }

    fn next(&self) -> NextStep {
        if self.recovered {
            NextStep::End(RunEnd::Recovered)
        } else {
            NextStep::Others
        }
    }

    /// Takes a snapshot, and repeats that until one succeeds. `None` when the deadline has passed.
    async fn sample(&mut self) -> Option<LockTree> {
        let mut logged = false;
        while !self.deadline.has_passed() {
            // A server that does not answer is not waited for beyond the deadline.
            let seen = self.monitor.snapshot();
            match self.deadline.bound(Duration::ZERO, seen).await? {
                Ok(snapshot) => {
                    let check = self.recovery.observe(&snapshot);
                    self.waits = *check.waits();
                    self.criterion_met = check.met_for() > 0;
                    self.recovered = check.is_recovered();
                    return Some(snapshot.tree());
                }
                Err(error) => {
                    self.recovery.interrupt();
                    if !std::mem::replace(&mut logged, true) {
                        self.log_failure(&error);
                    }
                    self.pause().await;
                }
            }
        }
        None
    }

    /// What is known about the sessions of a tree, if the server says so before the deadline.
    async fn facts(&self, tree: &LockTree) -> Result<SessionFacts, Error> {
        let facts = facts_for(self.monitor, self.policy, tree);
        let facts = self.deadline.bound(Duration::ZERO, facts).await;
        facts.unwrap_or_else(|| {
            Err(Error::new(ErrorKind::ConnectionLost)
                .with_detail("no answer about the sessions before the deadline"))
        })
    }

    async fn pause(&self) {
        self.sleep(self.policy.poll).await;
    }

    async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time.min(self.deadline.remaining())).await;
    }

    fn log_failure(&mut self, error: &Error) {
        let outcome = StepOutcome::Failed(error.to_string().into());
        self.log
            .push(Action::Sample, None, "", outcome, (None, None));
    }

    /// Logs, once for each root blocker, why it is left alone.
    fn log_left_alone(&mut self, backend: &Backend, why: &str, decision: &Decision) {
        if self.logged.insert(TargetId::of(backend)) {
            let outcome = StepOutcome::LeftAlone(decision.to_string().into());
            self.log_action(Action::LeaveAlone, Some(backend), why, outcome);
        }
    }

    fn log_abandoned(&mut self, backend: &Backend, why: &str) {
        let outcome = StepOutcome::LeftAlone(why.into());
        self.log_action(Action::LeaveAlone, Some(backend), "", outcome);
    }

    fn log_action(
        &mut self,
        action: Action,
        target: Option<&Backend>,
        why: impl Into<Box<str>>,
        outcome: StepOutcome,
    ) {
        let waits = (Some(self.waits), None);
        self.log.push(action, target, why, outcome, waits);
    }
}

fn hook_outcome(result: HookResult) -> StepOutcome {
    match result {
        HookResult::Done => StepOutcome::Done,
        HookResult::Panicked => StepOutcome::HookPanicked,
        HookResult::Slow => StepOutcome::HookSlow,
    }
}

/// What is known about the sessions of a tree besides their waits.
async fn facts_for(
    monitor: &Monitor,
    policy: &ResolverPolicy,
    tree: &LockTree,
) -> Result<SessionFacts, Error> {
    let mut facts = session_facts(monitor, policy).await?;
    facts.own_sessions = super::own_sessions_in(tree);
    Ok(facts)
}

/// The same without the sessions that this process owns.
pub(super) async fn session_facts(
    monitor: &Monitor,
    policy: &ResolverPolicy,
) -> Result<SessionFacts, Error> {
    let reply = monitor.connections().look(sessions::SESSIONS).await?;
    let sessions = sessions::read_sessions(&reply).ok_or_else(|| {
        Error::new(ErrorKind::Database)
            .with_detail("the server's answer about its sessions cannot be read")
    })?;
    let advisory = if policy.allow_migrations {
        Vec::new()
    } else {
        monitor.advisory_locks().await?
    };
    Ok(SessionFacts::new(policy, sessions, &advisory))
}

async fn settings(monitor: &Monitor) -> Result<Vec<Setting>, Error> {
    let reply = monitor.connections().look(sessions::LOCK_SETTINGS).await?;
    let settings = sessions::read_settings(&reply).map(|(name, value, unit, source)| Setting {
        name: name.into(),
        value: value.into(),
        unit: unit.map(Into::into),
        source: source.map(Into::into),
    });
    Ok(settings.collect())
}
