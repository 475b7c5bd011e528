//! Where a pool's connections lead to, for the error of one that cannot be opened.

use deadpool_postgres::Pool;

/// The hosts and ports of a pool's configuration: `db1:5432, db2:5433`.
///
/// The pool shows its configuration in its `Debug` text only, where a password is masked. In that text a list such as
/// `host: [Tcp("db")]` cannot be a part of another field, since those escape their quotes. The numbers behind it follow no text.
pub(super) fn hosts(pool: &Pool) -> Option<String> {
    read(&format!("{:?}", pool.manager()))
}

fn read(debug: &str) -> Option<String> {
    let starts = ["Tcp(\"", "Unix(\"", "]"];
    let at = starts
        .iter()
        .filter_map(|start| debug.find(&format!(", host: [{start}")))
        .min()?;
    let list = |name: &str| {
        let (_, rest) = debug[at..].split_once(&format!(", {name}: ["))?;
        Some(rest)
    };
    let mut hosts = Vec::new();
    let mut rest = list("host")?;
    while let Some(item) = starts[..2]
        .iter()
        .find_map(|start| rest.strip_prefix(*start))
    {
        let (host, behind) = item.split_once("\")")?;
        hosts.push(host.to_owned());
        rest = behind.strip_prefix(", ").unwrap_or(behind);
    }
    let items = |name: &str| -> Vec<String> {
        let items = list(name).and_then(|rest| Some(rest.split_once(']')?.0));
        let items = items.unwrap_or_default().split(", ");
        items
            .filter(|item| !item.is_empty())
            .map(str::to_owned)
            .collect()
    };
    let addresses = items("hostaddr");
    if hosts.is_empty() {
        hosts = addresses;
    }
    let ports = items("port");
    let named = hosts.iter().enumerate().map(|(at, host)| {
        // One port counts for all hosts.
        let port = ports.get(at).or(ports.first());
        format!("{host}:{}", port.map_or("5432", String::as_str))
    });
    let named: Vec<_> = named.collect();
    (!named.is_empty()).then(|| named.join(", "))
}

#[cfg(test)]
mod tests {
    use deadpool_postgres::{Manager, Pool};
    use tokio_postgres::{Config, NoTls};

    use super::*;

    fn hosts_of(config: &str) -> Option<String> {
        let config: Config = config.parse().expect("a configuration");
        let manager = Manager::new(config, NoTls);
        let pool = Pool::builder(manager).max_size(1).build();
        hosts(&pool.expect("a pool without timeouts"))
    }

    #[test]
    fn the_hosts_of_a_pool() {
        for (config, expected) in [
            ("host=db user=a password=secret", Some("db:5432")),
            ("host=db,other port=1,2", Some("db:1, other:2")),
            ("host=db,other port=7", Some("db:7, other:7")),
            ("host=/run/postgresql", Some("/run/postgresql:5432")),
            ("hostaddr=127.0.0.1 port=9", Some("127.0.0.1:9")),
            ("host=db options='x, host: [Tcp(\"no\")]'", Some("db:5432")),
            ("user=a", None),
        ] {
            assert_eq!(hosts_of(config).as_deref(), expected, "{config}");
        }
    }
}
