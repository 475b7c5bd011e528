//! The spans that tracing gets, and the types of their fields.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockkeeper::{Error, ErrorKind, Keeper};
use lockkeeper_testkit::{AppError, CapturedLog, Scene};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;

#[derive(Clone, Debug, PartialEq)]
enum Value {
    Number(f64),
    Text(String),
}

/// Of one span: its name, that of its parent, and its fields.
#[derive(Clone, Debug, Default)]
struct Seen {
    name: &'static str,
    parent: Option<&'static str>,
    fields: BTreeMap<&'static str, Value>,
}

impl Seen {
    fn number(&self, field: &str) -> f64 {
        match self.fields.get(field) {
            Some(Value::Number(number)) => *number,
            other => panic!("{field} is {other:?} in {self:?}"),
        }
    }

    fn text(&self, field: &str) -> &str {
        match self.fields.get(field) {
            Some(Value::Text(text)) => text,
            other => panic!("{field} is {other:?} in {self:?}"),
        }
    }
}

impl Visit for Seen {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.fields.insert(field.name(), Value::Number(value));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.record_f64(field, u32::try_from(value).unwrap().into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields
            .insert(field.name(), Value::Text(value.to_owned()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

/// The crate's spans, in the order in which they ended.
#[derive(Clone, Default)]
struct Ended(Arc<Mutex<Vec<Seen>>>);

impl Ended {
    fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Ended {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        let mut seen = Seen {
            name: span.name(),
            parent: span.parent().map(|parent| parent.name()),
            ..Seen::default()
        };
        attributes.record(&mut seen);
        span.extensions_mut().insert(seen);
    }

    fn on_record(&self, id: &Id, record: &Record<'_>, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        record.record(span.extensions_mut().get_mut::<Seen>().unwrap());
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let span = context.span(&id).unwrap();
        if span.metadata().target().starts_with("lockkeeper") {
            let seen = span.extensions().get::<Seen>().unwrap().clone();
            self.0.lock().unwrap().push(seen);
        }
    }
}

fn listen() -> (Ended, tracing::subscriber::DefaultGuard) {
    // Has a second subscriber made: see there.
    drop(CapturedLog::start());
    let ended = Ended::default();
    let subscriber = tracing_subscriber::registry().with(ended.clone());
    (ended, tracing::subscriber::set_default(subscriber))
}

#[tokio::test]
async fn a_section_and_its_attempts_have_spans() {
    let scene = Scene::new(3).await;
    let keeper = Keeper::builder(scene.pool.clone()).watch(false).build();
    let (ended, _listening) = listen();
    let section = keeper.with_advisory_lock(("invoice", 42_i64), async |tx| {
        tracing::span!(target: "lockkeeper::test", Level::INFO, "inside").in_scope(|| ());
        if tx.attempt() == 1 {
            tx.batch_execute("SELECT pg_sleep(0.05)").await?;
            let raise = "DO $$BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END$$";
            tx.batch_execute(raise).await?;
        }
        Ok::<_, Error>(())
    });
    section.await.unwrap();
    let spans = ended.take();
    let names: Vec<_> = spans.iter().map(|span| (span.name, span.parent)).collect();
    let attempt = [
        ("advisory_lock", Some("attempt")),
        ("inside", Some("attempt")),
        ("attempt", Some("transaction")),
    ];
    let run = [("transaction", None)];
    assert_eq!(names, [&attempt[..], &attempt[..], &run[..]].concat());
    for span in spans.iter().filter(|span| span.name != "inside") {
        assert_eq!(span.text("db.system.name"), "postgresql");
        assert_eq!(span.text("db.namespace"), scene.database.name());
    }
    let (lock, first, second, run) = (&spans[0], &spans[2], &spans[5], &spans[6]);
    assert_eq!(lock.text("db.operation.name"), "with_advisory_lock");
    assert_eq!(lock.text("key"), "\"invoice\"/\"42\"");
    assert_eq!(lock.number("keys"), 1.0);
    assert!(lock.number("waited_ms") > 0.0);
    assert!(first.number("waited_ms") >= lock.number("waited_ms"));
    assert!(first.number("held_ms") >= 50.0);
    assert_eq!(
        (first.number("attempt"), second.number("attempt")),
        (1.0, 2.0)
    );
    assert_eq!(first.text("error.type"), "40001");
    assert!(second.number("held_ms") > 0.0);
    assert!(!second.fields.contains_key("error.type"));
    assert_eq!(run.text("db.operation.name"), "with_advisory_lock");
    assert_eq!(run.number("attempts"), 2.0);
    assert!(!run.fields.contains_key("error.type"));
    scene.nothing_left().await;
}

#[tokio::test]
async fn what_fails_has_the_type_of_its_error() {
    let scene = Scene::new(3).await;
    let keeper = Keeper::builder(scene.pool.clone()).watch(false).build();
    let holder = scene.holder("k").await;
    let (ended, _listening) = listen();
    let wait = Duration::from_millis(50);
    let busy = keeper.advisory_lock("k").wait(wait);
    let outcome = busy.clone().run(async |_| Ok::<_, Error>(())).await;
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::LockTimeout);
    let spans = ended.take();
    assert_eq!(spans.len(), 3, "{spans:?}");
    for span in &spans {
        assert_eq!(span.text("error.type"), "LockTimeout");
    }
    assert!(spans[0].number("waited_ms") >= 50.0);
    assert!(!spans[1].fields.contains_key("held_ms"));

    assert!(busy.session().acquire().await.is_err());
    let spans = ended.take();
    assert_eq!(spans.len(), 1, "{spans:?}");
    assert_eq!(spans[0].text("db.operation.name"), "acquire_session");
    assert_eq!(spans[0].text("error.type"), "LockTimeout");

    for (sql, error) in [("SELECT 1/0", "22012"), ("SELECT 1", "_OTHER")] {
        let failing = keeper.transaction(async |tx| {
            tx.batch_execute(sql).await?;
            Err::<(), _>(AppError::Own(1))
        });
        assert!(failing.await.is_err());
        let spans = ended.take();
        let names: Vec<_> = spans.iter().map(|span| span.name).collect();
        assert_eq!(names, ["attempt", "transaction"]);
        for span in &spans {
            assert_eq!(span.text("error.type"), error);
        }
        assert_eq!(spans[1].text("db.operation.name"), "transaction");
    }
    drop(holder);
    scene.nothing_left().await;
}

/// Batches of a backfill, and statements of a schema change.
#[tokio::test]
async fn the_steps_of_long_changes_have_spans() {
    let scene = Scene::new(4).await;
    scene
        .run("CREATE TABLE t (id int PRIMARY KEY, n int); INSERT INTO t SELECT generate_series(1, 10)")
        .await;
    let keeper = Keeper::builder(scene.pool.clone()).watch(false).build();
    let (ended, _listening) = listen();
    let backfill = keeper.backfill("t", "id").set("n = 1");
    backfill.run().await.unwrap();
    let spans = ended.take();
    let batch = spans.iter().find(|span| span.name == "backfill_batch");
    let batch = batch.unwrap_or_else(|| panic!("{spans:?}"));
    assert_eq!(batch.number("batch"), 1.0);
    assert!(batch.number("rows") > 0.0);
    let within = |span: &&Seen| span.parent == Some("backfill_batch");
    assert!(spans.iter().any(|span| within(&span)), "{spans:?}");

    let change = keeper.schema().change("ALTER TABLE t ADD COLUMN extra int");
    change.await.unwrap();
    let spans = ended.take();
    let step = spans.iter().find(|span| span.name == "schema_step");
    let step = step.unwrap_or_else(|| panic!("{spans:?}"));
    assert_eq!(step.text("db.operation.name"), "ALTER");
    assert_eq!(step.number("attempts"), 1.0);
}
