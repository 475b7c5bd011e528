//! Doing it: one root blocker at a time, a look after each step.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::baseline::{Baseline, Setting};
use super::load::{LoadChange, Shedder, Told};
use super::log::{Action, Notes, RunEnd, RunLog, StepOutcome};
use super::place::{Identity, Place, fate, place};
use super::plan::{self, Plan, Step, Verdict};
use super::policy::ResolverPolicy;
use super::protect::Known;
use super::treatment::Treatment;
use crate::deadline::Deadline;
use crate::error::{Error, ErrorKind};
use crate::graph::{Backend, LockTree};
use crate::monitor::Monitor;
use crate::monitor::recovery::Course;
use crate::monitor::waits::Waits;
use crate::postgres::timestamp::Age;
use crate::resolver::signal::SignalOutcome;
use crate::resolver::sql::sessions;
use crate::resolver::sql::signal::{Signal, Spared};

/// How it goes on.
enum Next {
    /// With whoever is in the way now.
    Others,
    /// With the same one.
    Same,
    End(RunEnd),
}

struct Run<'a> {
    monitor: &'a Monitor,
    policy: &'a ResolverPolicy,
    notes: Notes,
    course: Course,
    deadline: Deadline,
    signals: u32,
    /// At the last look.
    waits: Waits,
    /// Whether that met the criterion, and whether it is over.
    calm: bool,
    recovered: bool,
    /// Those with whom nothing more is to be done.
    settled: HashSet<Identity>,
    /// Those of whom the log says why they are left alone.
    noted: HashSet<Identity>,
    /// Once load is shed.
    shedder: Option<Shedder>,
}

pub(super) async fn run(monitor: &Monitor, policy: &ResolverPolicy) -> Result<RunLog, Error> {
    let course = Course::new(policy.criterion, policy.databases.clone())?;
    let deadline = Deadline::after(policy.deadline);
    let notes = Notes::new();
    let baseline = Baseline {
        activity: monitor.activity().await?,
        snapshot: monitor.snapshot().await?,
        settings: settings(monitor).await?,
    };
    let tree = baseline.snapshot.tree();
    let known = known_of(monitor, policy, &tree).await?;
    let plan = Plan::new(policy, &known, &tree);
    let mut run = Run {
        monitor,
        policy,
        notes,
        course,
        deadline,
        signals: 0,
        waits: *plan.waits(),
        calm: false,
        recovered: false,
        settled: HashSet::new(),
        noted: HashSet::new(),
        shedder: None,
    };
    let why = format!(
        "{} sessions, {} edges and {} settings kept",
        baseline.activity.len(),
        baseline.snapshot.edges().len(),
        baseline.settings.len()
    );
    run.note(Action::Baseline, None, why, StepOutcome::Done);
    let end = if policy.execute {
        run.execute().await
    } else {
        run.say(&plan);
        RunEnd::DryRun
    };
    let log = RunLog {
        plan,
        baseline,
        took: run.notes.began.elapsed(),
        rows: run.notes.rows,
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
    /// A dry run: what would be done with those who are in the way now.
    fn say(&mut self, plan: &Plan) {
        for root in plan.roots() {
            match root.verdict() {
                Verdict::Act(steps) => {
                    for step in steps {
                        let action = match step {
                            Step::Wait(_) => Action::Wait,
                            Step::Cancel => Action::Cancel,
                            Step::Terminate => Action::Terminate,
                        };
                        let why = format!("{}: {step}", root.why());
                        self.note(action, Some(root.backend()), why, StepOutcome::DryRun);
                    }
                }
                verdict => self.leave(root.backend(), root.why(), verdict),
            }
        }
    }

    async fn execute(&mut self) -> RunEnd {
        if !self.waits.is_empty() {
            self.shed_load().await;
        }
        let end = self.work().await;
        if let Some(mut shedder) = self.shedder.take() {
            let (change, why) = match end {
                RunEnd::Recovered => (LoadChange::Resume, "it is over: heavy jobs may go on"),
                _ => (LoadChange::GaveUp, "it is not over, and the run ends"),
            };
            let told = shedder.tell(change).await;
            self.note(Action::ResumeLoad, None, why, outcome_of(told));
        }
        end
    }

    /// Once: at the beginning, or before the first one is dealt with where nobody waited then.
    async fn shed_load(&mut self) {
        if self.shedder.is_some() {
            return;
        }
        let Some(hook) = self.policy.hook.clone() else {
            return;
        };
        // Cancel safety: dropped with the run, it tells that this has given up.
        let shedder = Shedder::new(hook, self.policy.hook_timeout);
        let told = self.shedder.insert(shedder).tell(LoadChange::Shed).await;
        let why = "heavy jobs are to pause";
        self.note(Action::ShedLoad, None, why, outcome_of(told));
    }

    async fn work(&mut self) -> RunEnd {
        let mut idle_since: Option<Instant> = None;
        loop {
            let Some(tree) = self.look().await else {
                return RunEnd::Deadline;
            };
            if self.recovered {
                return RunEnd::Recovered;
            }
            match self.choose(&tree).await {
                Ok(Some(root)) => {
                    idle_since = None;
                    self.shed_load().await;
                    if let Next::End(end) = self.treat(root).await {
                        return end;
                    }
                    // What comes next is seen by a look that is none too soon after the last one.
                }
                Ok(None) if self.calm => idle_since = None,
                Ok(None) => {
                    // The server may be about to end a deadlock, or somebody to finish.
                    let since = idle_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= self.policy.settle {
                        return RunEnd::NothingLeftToDo;
                    }
                }
                Err(error) => self.failed(&error),
            }
            self.pause().await;
        }
    }

    /// The one to be dealt with next; notes why others are left alone.
    async fn choose(&mut self, tree: &LockTree) -> Result<Option<Backend>, Error> {
        if tree.is_empty() {
            return Ok(None);
        }
        let known = known_of(self.monitor, self.policy, tree).await?;
        let plan = Plan::new(self.policy, &known, tree);
        for root in plan.roots() {
            if self.settled.contains(&Identity::of(root.backend())) {
                continue;
            }
            match root.verdict() {
                Verdict::Act(_) => return Ok(Some(root.backend().clone())),
                verdict => self.leave(root.backend(), root.why(), verdict),
            }
        }
        Ok(None)
    }

    /// Deals with one root blocker until it is none any more, or nothing is left to be done about it.
    async fn treat(&mut self, first: Backend) -> Next {
        let who = Identity::of(&first);
        let began = Instant::now();
        let before = self.waits;
        let mut seen = first;
        let mut course = Treatment::default();
        loop {
            let Some(tree) = self.look().await else {
                return Next::End(RunEnd::Deadline);
            };
            let place = place(&tree, &who);
            if !course.waited && !matches!(place, Place::Root(_)) {
                let why = format!("left to finish for {}", Age(began.elapsed()));
                let waits = (Some(before), Some(self.waits));
                self.notes
                    .write(Action::Wait, Some(&seen), why, fate(&place), waits);
            }
            let Place::Root(backend) = place else {
                return self.next();
            };
            if self.recovered {
                return Next::End(RunEnd::Recovered);
            }
            seen = *backend;
            let verdict = match known_of(self.monitor, self.policy, &tree).await {
                Ok(known) => plan::verdict(self.policy, &known, &seen),
                Err(error) => {
                    self.failed(&error);
                    self.pause().await;
                    continue;
                }
            };
            let Verdict::Act(steps) = &verdict else {
                self.leave(&seen, "it has gone on to something else", &verdict);
                self.settled.insert(who);
                return Next::Others;
            };
            if let Some(left) = course.left_to_wait(steps, began.elapsed(), self.policy) {
                self.sleep(left.min(self.policy.poll)).await;
                continue;
            }
            if !course.waited {
                course.waited = true;
                let why = format!("left to finish for {}", Age(began.elapsed()));
                let waits = (Some(before), Some(self.waits));
                let outcome = StepOutcome::DidNotHelp;
                self.notes
                    .write(Action::Wait, Some(&seen), why, outcome, waits);
            }
            let Some(signal) = course.next_signal(steps) else {
                let verdict = "nothing that may be done has helped";
                self.leave_because(&seen, verdict);
                self.settled.insert(who);
                return Next::Others;
            };
            match self.send(signal, &seen, &who, &mut course).await {
                Next::Same => {}
                next => return next,
            }
        }
    }

    /// Signals, and waits to see what comes of it.
    async fn send(
        &mut self,
        signal: Signal,
        target: &Backend,
        who: &Identity,
        course: &mut Treatment,
    ) -> Next {
        if self.signals >= self.policy.most_signals {
            return Next::End(RunEnd::MostSignals);
        }
        let action = match signal {
            Signal::Cancel => Action::Cancel,
            Signal::Terminate => Action::Terminate,
        };
        let why = match signal {
            Signal::Cancel => "it has not finished by itself",
            Signal::Terminate if course.is_quick() => "no signal meets one of its statements",
            Signal::Terminate if course.cancelled => "a cancel has not helped",
            Signal::Terminate => "it is idle, so that there is nothing to cancel",
        };
        let spared = Spared {
            superusers: !self.policy.superusers,
            builds: !self.policy.migrations,
            // It may be about to commit; idle, it has a grace.
            finished: !course.is_quick(),
        };
        let before = self.waits;
        let outcome = match self.monitor.signal(signal, target, spared).await {
            Ok(outcome) => outcome,
            Err(error) => {
                // It may have been sent.
                self.signals += 1;
                let outcome = StepOutcome::Failed(error.to_string().into());
                self.notes
                    .write(action, Some(target), why, outcome, (Some(before), None));
                self.pause().await;
                return Next::Same;
            }
        };
        if !outcome.is_signalled() {
            let again = match outcome {
                SignalOutcome::Gone => true,
                SignalOutcome::Changed(_) | SignalOutcome::NothingRuns => {
                    course.missed(signal);
                    true
                }
                _ => false,
            };
            let outcome = StepOutcome::NotSignalled(outcome);
            self.notes
                .write(action, Some(target), why, outcome, (Some(before), None));
            if again {
                self.pause().await;
                return Next::Same;
            }
            self.settled.insert(who.clone());
            return Next::Others;
        }
        self.signals += 1;
        match signal {
            Signal::Cancel => course.cancelled = true,
            Signal::Terminate => course.terminated = true,
        }
        let sent = Instant::now();
        loop {
            let Some(tree) = self.look().await else {
                let outcome = StepOutcome::Failed("the time was over before it was seen".into());
                self.notes
                    .write(action, Some(target), why, outcome, (Some(before), None));
                return Next::End(RunEnd::Deadline);
            };
            let place = place(&tree, who);
            let is_root = matches!(place, Place::Root(_));
            if is_root && sent.elapsed() < self.policy.settle && !self.recovered {
                self.pause().await;
                continue;
            }
            let waits = (Some(before), Some(self.waits));
            self.notes
                .write(action, Some(target), why, fate(&place), waits);
            return if is_root && !self.recovered {
                Next::Same
            } else {
                self.next()
            };
        }
    }

    fn next(&self) -> Next {
        if self.recovered {
            Next::End(RunEnd::Recovered)
        } else {
            Next::Others
        }
    }

    /// Who waits for whom now; tries again until it can be seen. `None` when the time is over.
    async fn look(&mut self) -> Option<LockTree> {
        let mut noted = false;
        while !self.deadline.has_passed() {
            // A server that does not answer is not waited for beyond the deadline.
            let seen = self.monitor.snapshot();
            match self.deadline.bound(Duration::ZERO, seen).await? {
                Ok(snapshot) => {
                    let check = self.course.observe(&snapshot);
                    self.waits = *check.waits();
                    self.calm = check.met_for() > 0;
                    self.recovered = check.is_recovered();
                    return Some(snapshot.tree());
                }
                Err(error) => {
                    self.course.interrupt();
                    if !std::mem::replace(&mut noted, true) {
                        self.failed(&error);
                    }
                    self.pause().await;
                }
            }
        }
        None
    }

    async fn pause(&self) {
        self.sleep(self.policy.poll).await;
    }

    async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time.min(self.deadline.remaining())).await;
    }

    fn failed(&mut self, error: &Error) {
        let outcome = StepOutcome::Failed(error.to_string().into());
        self.notes
            .write(Action::Look, None, "", outcome, (None, None));
    }

    /// Notes once why somebody is left alone.
    fn leave(&mut self, backend: &Backend, why: &str, verdict: &Verdict) {
        if self.noted.insert(Identity::of(backend)) {
            let outcome = StepOutcome::LeftAlone(verdict.to_string().into());
            self.note(Action::LeaveAlone, Some(backend), why, outcome);
        }
    }

    fn leave_because(&mut self, backend: &Backend, why: &str) {
        let outcome = StepOutcome::LeftAlone(why.into());
        self.note(Action::LeaveAlone, Some(backend), "", outcome);
    }

    fn note(
        &mut self,
        action: Action,
        target: Option<&Backend>,
        why: impl Into<Box<str>>,
        outcome: StepOutcome,
    ) {
        let waits = (Some(self.waits), None);
        self.notes.write(action, target, why, outcome, waits);
    }
}

fn outcome_of(told: Told) -> StepOutcome {
    match told {
        Told::Done => StepOutcome::Done,
        Told::Panicked => StepOutcome::HookPanicked,
        Told::Slow => StepOutcome::HookSlow,
    }
}

/// What is known of those who take part, besides who waits for whom.
async fn known_of(
    monitor: &Monitor,
    policy: &ResolverPolicy,
    tree: &LockTree,
) -> Result<Known, Error> {
    let mut known = known(monitor, policy).await?;
    known.own = super::own(tree);
    Ok(known)
}

/// The same, but for what this process has.
pub(super) async fn known(monitor: &Monitor, policy: &ResolverPolicy) -> Result<Known, Error> {
    let reply = monitor.connections().ask(sessions::LOOK).await?;
    let around = sessions::surroundings(&reply).ok_or_else(|| {
        Error::new(ErrorKind::Database)
            .with_detail("the server's answer about its sessions cannot be read")
    })?;
    let advisory = if policy.migrations {
        Vec::new()
    } else {
        monitor.advisory_locks().await?
    };
    Ok(Known::new(policy, around, &advisory))
}

async fn settings(monitor: &Monitor) -> Result<Vec<Setting>, Error> {
    let reply = monitor.connections().ask(sessions::SETTINGS).await?;
    let settings = sessions::settings(&reply).map(|(name, value, unit, source)| Setting {
        name: name.into(),
        value: value.into(),
        unit: unit.map(Into::into),
        source: source.map(Into::into),
    });
    Ok(settings.collect())
}
