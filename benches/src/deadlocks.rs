//! Deadlocks at random moments, and how much of each its report tells.
//!
//! One transaction takes the first of two rows and waits for the second; another, which has the second, asks for the first
//! some time later, and commits as soon as it has it. The server finds the circle one `deadlock_timeout` after the *first*
//! wait began, and by the time its error arrives nothing of it is left to be seen.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lockkeeper::incident::{IncidentEdge, Participant};
use lockkeeper::{Incident, IncidentKind, Keeper, Tx};
use lockkeeper_testkit::{Database, Server};
use tokio::sync::{Barrier, Notify, mpsc};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Config, NoTls};

use crate::alarm::Alarm;
use crate::markdown::Table;
use crate::random::Random;
use crate::{Effort, Failure, Observer};

/// When the second wait begins, in milliseconds after the first.
const LATER: (usize, usize) = (20, 990);
/// How long a report may take to be handed out.
const REPORT: Duration = Duration::from_secs(2);

const AMOUNT: i64 = 10;
// No two are alike, so that it can be told which one a report means; without literals, which reports do not show.
const FIRST_OF_ONE: &str = "UPDATE checking SET n = n - $2 WHERE id = $1";
const SECOND_OF_ONE: &str = "UPDATE saving SET n = n + $2 WHERE id = $1";
const FIRST_OF_OTHER: &str = "UPDATE saving SET n = n - $2 WHERE id = $1";
const SECOND_OF_OTHER: &str = "UPDATE checking SET n = n + $2 WHERE id = $1";
/// The `application_name` of a session outside.
const OUTSIDE: &str = "nightly-transfer";

/// Who has the other half of the deadlock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
    /// Another transaction of the same keeper.
    ThisProcess,
    /// A connection that no keeper knows of.
    Outside,
}

impl Other {
    /// Both.
    pub const ALL: [Self; 2] = [Self::ThisProcess, Self::Outside];
}

impl fmt::Display for Other {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::ThisProcess => "in this process",
            Self::Outside => "plain tokio-postgres",
        })
    }
}

/// What one report tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// That it was a deadlock.
    pub deadlock: bool,
    /// The circle, each edge of it as it was seen on the server.
    pub cycle: bool,
    /// The statement with which the other side had its part in it.
    pub statement: bool,
    /// Where the other side's transaction was asked for; of a session outside, its `application_name`.
    pub site: bool,
}

impl Told {
    /// Everything.
    #[must_use]
    pub fn is_all(self) -> bool {
        self.deadlock && self.cycle && self.statement && self.site
    }

    /// By the report of a deadlock in which the other side had this statement and came from there.
    fn by(incident: &Incident, statement: &str, site: &Site) -> Self {
        let cycle = incident.cycle();
        let them = incident
            .participants()
            .iter()
            .find(|participant| !participant.is_victim());
        Self {
            deadlock: incident.kind() == IncidentKind::Deadlock,
            cycle: cycle.len() == 2 && cycle.iter().all(IncidentEdge::was_seen),
            statement: them.and_then(Participant::statement) == Some(statement),
            site: them.is_some_and(|them| site.is_of(them)),
        }
    }
}

/// Where a transaction comes from.
#[derive(Debug)]
enum Site {
    /// These lines of this file.
    Lines(Range<u32>),
    /// A session with this `application_name`.
    Named(&'static str),
}

impl Site {
    fn is_of(&self, participant: &Participant) -> bool {
        match self {
            Self::Named(name) => participant.application_name() == Some(name),
            Self::Lines(lines) => participant
                .call_site()
                .and_then(|site| site.rsplit_once(':'))
                .is_some_and(|(file, line)| {
                    file == file!() && line.parse().is_ok_and(|line| lines.contains(&line))
                }),
        }
    }
}

/// One deadlock.
#[derive(Clone, Debug)]
pub struct Round {
    /// How long after the first the second wait began.
    pub later: Duration,
    /// What the report told; `None` where there was none.
    pub told: Option<Told>,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Who had the other half.
    pub other: Other,
    /// The deadlocks.
    pub rounds: Vec<Round>,
    /// Rounds besides in which no transaction of the keeper failed, but the session outside did: its wait had begun too
    /// late to be part of the circle when the server looked for one.
    pub not_ours: usize,
}

impl Outcome {
    fn count(&self, told: impl Fn(&Told) -> bool) -> usize {
        let rounds = self.rounds.iter();
        rounds.filter_map(|round| round.told).filter(told).count()
    }

    /// Deadlocks of which the report told everything.
    #[must_use]
    pub fn complete(&self) -> usize {
        self.count(|told| told.is_all())
    }
}

/// A server for it, whose `deadlock_timeout` is known to be 1 s.
///
/// # Errors
/// It does not start.
pub fn server() -> Result<Server, Failure> {
    Ok(Server::start(&[("deadlock_timeout", "1s")])?)
}

/// Both kinds, one after another.
///
/// # Errors
/// Whatever goes wrong besides the deadlocks.
pub async fn measure(
    database: &Database,
    observer: &Observer,
    effort: Effort,
) -> Result<Vec<Outcome>, Failure> {
    observer
        .client
        .batch_execute(
            "CREATE TABLE checking (id bigint PRIMARY KEY, n bigint NOT NULL); \
             CREATE TABLE saving (id bigint PRIMARY KEY, n bigint NOT NULL); \
             INSERT INTO checking SELECT id, 0 FROM generate_series(1, 100) AS id; \
             INSERT INTO saving SELECT id, 0 FROM generate_series(1, 100) AS id",
        )
        .await?;
    let mut outcomes = Vec::new();
    for other in Other::ALL {
        outcomes.push(of_kind(other, database, observer, effort.of(40, 3)).await?);
    }
    Ok(outcomes)
}

async fn of_kind(
    other: Other,
    database: &Database,
    observer: &Observer,
    deadlocks: usize,
) -> Result<Outcome, Failure> {
    let (sender, mut reports) = mpsc::unbounded_channel();
    let pool = database.pool(4);
    let keeper = Keeper::builder(pool.clone())
        .side_connection(database.config(), NoTls)
        .on_incident(move |incident| {
            // An error says that nobody is interested any more.
            sender.send(incident.clone()).ok();
        })
        .build();
    let mut config = database.config();
    config.application_name(OUTSIDE);
    let outside = connect(&config).await?;

    let alarm = Alarm::new();
    let mut random = Random::new(7);
    let mut outcome = Outcome {
        other,
        rounds: Vec::new(),
        not_ours: 0,
    };
    while outcome.rounds.len() < deadlocks {
        if outcome.not_ours > deadlocks {
            return Err("the session outside is always the one that fails".into());
        }
        let later = random.below(LATER.1 - LATER.0 + 1) + LATER.0;
        let later = Duration::from_millis(u64::try_from(later)?);
        let pair = Arc::new(Pair {
            row: i64::try_from(outcome.rounds.len())? + 1,
            ..Pair::default()
        });

        let first = tokio::spawn(one(keeper.clone(), Arc::clone(&pair)));
        let closing = async {
            pair.both_have_one.wait().await;
            let waited = observer.first_wait().await?;
            alarm.after(later.saturating_sub(waited)).await;
            pair.close.notify_one();
            Ok::<_, Failure>(())
        };
        let (second, closed) = match other {
            Other::ThisProcess => {
                let other = other_of_this_process(keeper.clone(), Arc::clone(&pair));
                tokio::join!(other, closing)
            }
            Other::Outside => tokio::join!(other_outside(&outside, &pair), closing),
        };
        closed?;
        let (one, other) = (first.await??, second?);
        let (statement, site) = match (one.failed, other.failed) {
            (true, _) => (SECOND_OF_OTHER, &other.site),
            (false, true) if matches!(other.site, Site::Lines(_)) => (SECOND_OF_ONE, &one.site),
            (false, true) => {
                outcome.not_ours += 1;
                continue;
            }
            (false, false) => return Err("the two did not deadlock".into()),
        };
        let report = tokio::time::timeout(REPORT, reports.recv()).await;
        outcome.rounds.push(Round {
            later,
            told: report
                .ok()
                .flatten()
                .map(|report| Told::by(&report, statement, site)),
        });
    }
    pool.close();
    Ok(outcome)
}

/// What the two sides share.
struct Pair {
    row: i64,
    /// Both sides, and who watches the clock.
    both_have_one: Barrier,
    /// It is time for the second wait.
    close: Notify,
}

impl Default for Pair {
    fn default() -> Self {
        Self {
            row: 1,
            both_have_one: Barrier::new(3),
            close: Notify::new(),
        }
    }
}

/// What became of one side.
#[derive(Debug)]
struct Side {
    site: Site,
    /// Whether it was the victim, and had to run again.
    failed: bool,
}

/// The side that waits first.
async fn one(keeper: Keeper, pair: Arc<Pair>) -> Result<Side, Failure> {
    let runs = AtomicUsize::new(0);
    let (runs, pair) = (&runs, &pair);
    let from = line!();
    keeper
        .transaction(async move |tx: &mut Tx| {
            tx.execute(FIRST_OF_ONE, &[&pair.row, &AMOUNT]).await?;
            if runs.fetch_add(1, Ordering::Relaxed) == 0 {
                pair.both_have_one.wait().await;
            }
            tx.execute(SECOND_OF_ONE, &[&pair.row, &AMOUNT]).await?;
            Ok::<_, lockkeeper::Error>(())
        })
        .await?;
    Ok(Side {
        site: Site::Lines(from..line!()),
        failed: runs.load(Ordering::Relaxed) > 1,
    })
}

/// The side that closes the circle, as another transaction of the keeper.
async fn other_of_this_process(keeper: Keeper, pair: Arc<Pair>) -> Result<Side, Failure> {
    let runs = AtomicUsize::new(0);
    let (runs, pair) = (&runs, &pair);
    let from = line!();
    keeper
        .transaction(async move |tx: &mut Tx| {
            tx.execute(FIRST_OF_OTHER, &[&pair.row, &AMOUNT]).await?;
            if runs.fetch_add(1, Ordering::Relaxed) == 0 {
                pair.both_have_one.wait().await;
                pair.close.notified().await;
            }
            tx.execute(SECOND_OF_OTHER, &[&pair.row, &AMOUNT]).await?;
            Ok::<_, lockkeeper::Error>(())
        })
        .await?;
    Ok(Side {
        site: Site::Lines(from..line!()),
        failed: runs.load(Ordering::Relaxed) > 1,
    })
}

/// The side that closes the circle, as a session that no keeper knows of.
async fn other_outside(client: &Client, pair: &Pair) -> Result<Side, Failure> {
    client.batch_execute("BEGIN").await?;
    client
        .execute(FIRST_OF_OTHER, &[&pair.row, &AMOUNT])
        .await?;
    pair.both_have_one.wait().await;
    pair.close.notified().await;
    let closed = client.execute(SECOND_OF_OTHER, &[&pair.row, &AMOUNT]).await;
    // COMMIT of a transaction that has failed is a ROLLBACK.
    client.batch_execute("COMMIT").await?;
    let failed = match closed {
        Ok(_) => false,
        Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => true,
        Err(error) => return Err(error.into()),
    };
    Ok(Side {
        site: Site::Named(OUTSIDE),
        failed,
    })
}

async fn connect(config: &Config) -> Result<Client, Failure> {
    let (client, connection) = config.connect(NoTls).await?;
    // Ends with the client.
    drop(tokio::spawn(connection));
    Ok(client)
}

impl Observer {
    /// Waits until somebody waits, and says for how long that one has by then.
    async fn first_wait(&self) -> Result<Duration, Failure> {
        self.waiting(1).await?;
        let row = self
            .client
            .query_one(
                "SELECT EXTRACT(epoch FROM clock_timestamp() - a.waitstart)::float8 \
                 FROM pg_locks AS a WHERE NOT a.granted",
                &[],
            )
            .await?;
        // NULL for the moment between beginning to wait and noting when.
        let waited: Option<f64> = row.get(0);
        Ok(Duration::from_secs_f64(waited.unwrap_or_default()))
    }
}

/// Everything, a row for each kind.
#[must_use]
pub fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new([
        "the other side",
        "deadlocks",
        "reported as such",
        "full cycle seen",
        "its statement",
        "its call site",
        "all of it",
        "not all: second wait after",
        "not ours to report",
    ]);
    for outcome in outcomes {
        let missed: Vec<_> = outcome
            .rounds
            .iter()
            .filter(|round| !round.told.is_some_and(Told::is_all))
            .map(|round| format!("{} ms", round.later.as_millis()))
            .collect();
        table.row([
            outcome.other.to_string(),
            outcome.rounds.len().to_string(),
            outcome.count(|told| told.deadlock).to_string(),
            outcome.count(|told| told.cycle).to_string(),
            outcome.count(|told| told.statement).to_string(),
            outcome.count(|told| told.site).to_string(),
            outcome.complete().to_string(),
            missed.join(", "),
            outcome.not_ours.to_string(),
        ]);
    }
    table
}
