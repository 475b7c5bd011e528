//! Every form of ALTER TABLE, and the other definitions, on relations of every kind: what is predicted is what the server
//! locks, rewrites and reads.

use lockkeeper::Keeper;
use lockkeeper_testkit::prediction::{measure_alone, statements};
use lockkeeper_testkit::{Server, pool_of};

const RELATIONS: [&str; 19] = [
    "bare",
    "parted",
    "parted_1",
    "heirs",
    "heir",
    "typed",
    "passing",
    "far",
    "full_1",
    "full_1_view",
    "full_1_stored",
    "full_1_child",
    "full_p",
    "full_p_1",
    "full_p_d",
    "full_h",
    "full_h_heir",
    "full_u",
    "counter",
];

#[tokio::test]
async fn predictions_agree_with_the_server_for_every_form_and_kind() {
    let server = Server::shared();
    let database = server.database().await;
    // One connection: temporary tables and uncommitted changes are seen by both sides.
    let pool = pool_of(database.config(), 1);
    let keeper = Keeper::builder(pool.clone()).build();
    let client = pool.get().await.unwrap();
    for statement in statements(include_str!("corpus.sql")) {
        let ran = client.batch_execute(&statement).await;
        ran.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    drop(client);
    let templates = include_str!("corpus.txt")
        .lines()
        .filter(|line| !line.starts_with('#'));
    let mut all = Vec::new();
    for template in templates {
        if !template.contains("{t}") {
            all.push(template.to_owned());
            continue;
        }
        // Bare relations have nothing that is named after them.
        let has = |relation: &&&str| {
            let of_kind = [
                ("MATERIALIZED VIEW", "stored"),
                ("VIEW", "view"),
                ("FOREIGN TABLE", "far"),
                ("SEQUENCE {t} ", "counter"),
            ];
            let kind = of_kind.iter().find(|(words, _)| template.contains(words));
            let has_parts = !template.contains("{t}_")
                || relation.starts_with("full")
                || **relation == "parted";
            has_parts && kind.is_none_or(|(_, name)| relation.ends_with(name))
        };
        let relations = RELATIONS.iter().filter(has);
        all.extend(relations.map(|relation| template.replace("{t}", relation)));
    }
    let figures = measure_alone(&keeper, &pool, &all).await;
    let client = pool.get().await.unwrap();
    client
        .batch_execute("DROP OWNED BY corpus_role; DROP ROLE corpus_role")
        .await
        .unwrap();
    let wrong: Vec<&String> = (figures.differences.iter())
        .filter(|line| !line.starts_with("NO WORK") && !line.starts_with("STRONG"))
        .collect();
    assert!(wrong.is_empty(), "{figures}\n{wrong:#?}");
    assert!(
        figures.said_rightly * 100 >= figures.said * 98,
        "{figures}\n{:#?}",
        figures.differences
    );
    // Most of the statements are possible for most of the kinds.
    assert!(
        figures.statements > 1200 && figures.strong > 2500 && figures.work > 100,
        "{figures}"
    );
}
