//! What belongs to a table besides its rows and columns, with the statement that gives another table the same.
//!
//! The queries run with an empty `search_path`: operators are those of `pg_catalog`, and every name in a definition has
//! its schema. The functions that show definitions open their relations, so they can wait for locks on these.

use tokio_postgres::SimpleQueryMessage;

use crate::postgres::sql::{literal, rows, set_local, text};
use crate::postgres::table_name::TableName;

/// One thing that a table has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trait {
    /// `index`, `grant`, …
    pub(crate) kind: String,
    /// What it is, in words that are the same for a table that has the same.
    pub(crate) what: String,
    /// The statements that give it to the new table; `None` if no plain statement does.
    pub(crate) copy: Option<Copy>,
}

/// How something is given to the new table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    /// Before the tables are swapped.
    Before(String),
    /// A constraint that is added NOT VALID before the tables are swapped, and then validated.
    Validated(String, String),
    /// In the transaction that swaps the tables.
    WithSwap(String),
}

/// What these tables have, the first one's traits first: one message with two answers.
pub(crate) fn traits(old: u32, new: u32, new_name: &TableName, lock_timeout: i32) -> String {
    let mut sql = String::new();
    set_local(&mut sql, "lock_timeout", &lock_timeout.to_string());
    set_local(&mut sql, "search_path", "''");
    let query = |oid: u32| {
        QUERY
            .replace("{oid}", &oid.to_string())
            .replace("{new}", &literal(&new_name.to_string()))
            .replace("{new_oid}", &new.to_string())
    };
    format!("{sql}{}; {}", query(old), query(new))
}

/// Reads the two answers of [`traits`].
pub(crate) fn read_traits(reply: &[SimpleQueryMessage]) -> (Vec<Trait>, Vec<Trait>) {
    let mut answers = reply
        .split(|message| matches!(message, SimpleQueryMessage::CommandComplete(_)))
        .map(|answer| rows(answer).filter_map(read).collect::<Vec<_>>());
    // The two settings come first.
    answers.next();
    answers.next();
    (
        answers.next().unwrap_or_default(),
        answers.next().unwrap_or_default(),
    )
}

fn read(row: &tokio_postgres::SimpleQueryRow) -> Option<Trait> {
    let copy = text(row, "copy");
    let copy = match (text(row, "phase").as_deref(), copy) {
        (Some("before"), Some(sql)) => Some(Copy::Before(sql)),
        (Some("swap"), Some(sql)) => Some(Copy::WithSwap(sql)),
        (Some("validate"), Some(sql)) => {
            let (add, validate) = sql.split_once('\u{1}')?;
            Some(Copy::Validated(add.to_owned(), validate.to_owned()))
        }
        _ => None,
    };
    Some(Trait {
        kind: text(row, "kind")?,
        what: text(row, "what")?,
        copy,
    })
}

/// What belongs to the table `{oid}`. `{new}` is the name of the table that the statements are for.
const QUERY: &str = r#"
WITH r AS (
  SELECT c.*, n.nspname, pg_catalog.format('%I.%I', n.nspname, c.relname) AS q
  FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = {oid}),
a AS (
  SELECT a.*, pg_catalog.format('%I', a.attname) AS col,
    EXISTS (SELECT FROM pg_catalog.pg_attribute AS b WHERE b.attrelid = {new_oid} AND b.attnum > 0 AND NOT b.attisdropped
            AND b.attname = a.attname) AS is_in_new
  FROM pg_catalog.pg_attribute AS a WHERE a.attrelid = {oid} AND a.attnum > 0 AND NOT a.attisdropped),
sequences AS (
  SELECT a.col, a.attname, a.attidentity, d.objid AS oid, s.seqrelid,
    pg_catalog.format('%I.%I', n.nspname, c.relname) AS q,
    pg_catalog.pg_sequence_last_value(d.objid) AS last_value
  FROM pg_catalog.pg_depend AS d JOIN a ON a.attnum = d.refobjsubid AND a.is_in_new
  JOIN pg_catalog.pg_sequence AS s ON s.seqrelid = d.objid
  JOIN pg_catalog.pg_class AS c ON c.oid = d.objid JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  WHERE d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refclassid = d.classid AND d.refobjid = {oid}
    AND d.deptype IN ('a', 'i')),
names AS (
  SELECT c.oid, c.relname, n.nspname,
    CASE WHEN pg_catalog.octet_length(c.relname::pg_catalog.text) < 60 THEN c.relname || '_new'
      ELSE 'lockkeeper_new_' || pg_catalog.md5(c.relname) END AS new_name,
    CASE WHEN pg_catalog.octet_length(c.relname::pg_catalog.text) < 60 THEN c.relname || '_old'
      ELSE 'lockkeeper_old_' || pg_catalog.md5(c.relname) END AS old_name
  FROM pg_catalog.pg_index AS i JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid
  JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE i.indrelid = {oid} AND i.indisvalid)
SELECT kind, what, phase, copy FROM (
  SELECT 1 AS place, 'owner' AS kind, pg_catalog.pg_get_userbyid(r.relowner)::pg_catalog.text AS what, 'before' AS phase,
    pg_catalog.format('ALTER TABLE %s OWNER TO %I', {new}, pg_catalog.pg_get_userbyid(r.relowner)) AS copy FROM r
  UNION ALL
  SELECT 2, 'grant', pg_catalog.concat(g.privilege_type, ' to ', w.who, CASE WHEN g.is_grantable THEN ' with grant option' END),
    'before', pg_catalog.format('GRANT %s ON %s TO %s%s', g.privilege_type, {new}, w.who,
      CASE WHEN g.is_grantable THEN ' WITH GRANT OPTION' END)
  FROM r CROSS JOIN pg_catalog.aclexplode(r.relacl) AS g CROSS JOIN LATERAL (SELECT CASE g.grantee WHEN 0 THEN 'PUBLIC'
    ELSE pg_catalog.format('%I', pg_catalog.pg_get_userbyid(g.grantee)) END AS who) AS w WHERE g.grantee <> r.relowner
  UNION ALL
  SELECT 3, 'grant', pg_catalog.concat(g.privilege_type, ' (', a.col, ') to ', w.who,
      CASE WHEN g.is_grantable THEN ' with grant option' END),
    'before', pg_catalog.format('GRANT %s (%s) ON %s TO %s%s', g.privilege_type, a.col, {new}, w.who,
      CASE WHEN g.is_grantable THEN ' WITH GRANT OPTION' END)
  FROM a CROSS JOIN r CROSS JOIN pg_catalog.aclexplode(a.attacl) AS g CROSS JOIN LATERAL (SELECT CASE g.grantee WHEN 0
    THEN 'PUBLIC' ELSE pg_catalog.format('%I', pg_catalog.pg_get_userbyid(g.grantee)) END AS who) AS w
  WHERE a.is_in_new AND g.grantee <> r.relowner
  UNION ALL
  SELECT 5, 'policy', pg_catalog.concat(s.name, s.rest), 'before',
    pg_catalog.format('CREATE POLICY %s ON %s%s', s.name, {new}, s.rest)
  FROM pg_catalog.pg_policy AS p CROSS JOIN LATERAL (SELECT pg_catalog.format('%I', p.polname) AS name, pg_catalog.concat(
      CASE WHEN p.polpermissive THEN ' AS PERMISSIVE' ELSE ' AS RESTRICTIVE' END,
      CASE p.polcmd WHEN 'r' THEN ' FOR SELECT' WHEN 'a' THEN ' FOR INSERT' WHEN 'w' THEN ' FOR UPDATE'
        WHEN 'd' THEN ' FOR DELETE' ELSE ' FOR ALL' END,
      ' TO ', (SELECT pg_catalog.string_agg(CASE o.role WHEN 0 THEN 'PUBLIC'
        ELSE pg_catalog.format('%I', pg_catalog.pg_get_userbyid(o.role)) END, ', ') FROM pg_catalog.unnest(p.polroles) AS o (role)),
      ' USING (' || pg_catalog.pg_get_expr(p.polqual, p.polrelid) || ')',
      ' WITH CHECK (' || pg_catalog.pg_get_expr(p.polwithcheck, p.polrelid) || ')') AS rest) AS s
  WHERE p.polrelid = {oid}
  UNION ALL
  SELECT 6, 'row-level security', 'enabled', 'before', pg_catalog.format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', {new})
  FROM r WHERE r.relrowsecurity
  UNION ALL
  SELECT 7, 'row-level security', 'forced', 'before', pg_catalog.format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', {new})
  FROM r WHERE r.relforcerowsecurity
  UNION ALL
  SELECT 8, 'not null', a.col, 'before', pg_catalog.format('ALTER TABLE %s ALTER COLUMN %s SET NOT NULL', {new}, a.col)
  FROM a WHERE a.attnotnull AND a.is_in_new
  UNION ALL
  SELECT 9, 'default', a.col || ': ' || e.text, 'before',
    pg_catalog.format('ALTER TABLE %s ALTER COLUMN %s SET DEFAULT %s', {new}, a.col, e.text)
  FROM a JOIN pg_catalog.pg_attrdef AS d ON d.adrelid = {oid} AND d.adnum = a.attnum
  CROSS JOIN LATERAL (SELECT pg_catalog.pg_get_expr(d.adbin, d.adrelid) AS text) AS e
  WHERE a.attgenerated = '' AND a.is_in_new
  UNION ALL
  SELECT 10, 'generated column', a.col || ': ' || pg_catalog.pg_get_expr(d.adbin, d.adrelid), NULL, NULL
  FROM a JOIN pg_catalog.pg_attrdef AS d ON d.adrelid = {oid} AND d.adnum = a.attnum WHERE a.attgenerated <> '' AND a.is_in_new
  UNION ALL
  SELECT 11, 'identity', a.col || CASE a.attidentity WHEN 'a' THEN ': always' ELSE ': by default' END, 'before',
    pg_catalog.format('ALTER TABLE %s ALTER COLUMN %s ADD GENERATED %s AS IDENTITY', {new}, a.col,
      CASE a.attidentity WHEN 'a' THEN 'ALWAYS' ELSE 'BY DEFAULT' END)
  FROM a WHERE a.attidentity <> '' AND a.is_in_new
  UNION ALL
  SELECT 12, 'identity', s.col || ': its sequence goes on after ' || s.last_value, 'swap', pg_catalog.format(
    'SELECT pg_catalog.setval(pg_catalog.pg_get_serial_sequence(%L, %L), s.last_value, s.is_called) FROM %s AS s',
    {new}, s.attname, s.q)
  FROM sequences AS s WHERE s.attidentity <> '' AND s.last_value IS NOT NULL
  UNION ALL
  SELECT 13, 'owned sequence', s.q || ' of ' || s.col, 'swap',
    pg_catalog.format('ALTER SEQUENCE %s OWNED BY %s.%s', s.q, {new}, s.col)
  FROM sequences AS s WHERE s.attidentity = ''
  UNION ALL
  SELECT 14, 'constraint', d.text, 'before',
    pg_catalog.format('ALTER TABLE %s ADD CONSTRAINT %I %s', {new}, w.new_name, d.text)
  FROM pg_catalog.pg_constraint AS k JOIN names AS w ON w.oid = k.conindid CROSS JOIN LATERAL (SELECT pg_catalog.pg_get_constraintdef(k.oid) AS text) AS d
  WHERE k.conrelid = {oid} AND k.contype IN ('p', 'u', 'x')
  UNION ALL
  SELECT 15, 'constraint', d.what, 'before',
    pg_catalog.format('ALTER TABLE %s ADD CONSTRAINT %I %s', {new}, k.conname, d.text)
  FROM pg_catalog.pg_constraint AS k CROSS JOIN LATERAL (SELECT pg_catalog.pg_get_constraintdef(k.oid) AS text) AS e
  CROSS JOIN r CROSS JOIN LATERAL (SELECT
    pg_catalog.replace(e.text, ' REFERENCES ' || r.q || '(', ' REFERENCES this table(') AS what,
    pg_catalog.replace(e.text, ' REFERENCES ' || r.q || '(', pg_catalog.format(' REFERENCES %s(', {new})) AS text) AS d
  WHERE k.conrelid = {oid} AND (k.contype = 'c' OR k.contype = 'f' AND NOT k.convalidated)
  UNION ALL
  SELECT 16, 'constraint', d.what, 'validate', pg_catalog.format('ALTER TABLE %s ADD CONSTRAINT %I %s NOT VALID', {new},
      k.conname, d.text) || pg_catalog.chr(1) || pg_catalog.format('ALTER TABLE %s VALIDATE CONSTRAINT %I', {new}, k.conname)
  FROM pg_catalog.pg_constraint AS k CROSS JOIN LATERAL (SELECT pg_catalog.pg_get_constraintdef(k.oid) AS text) AS e
  CROSS JOIN r CROSS JOIN LATERAL (SELECT
    pg_catalog.replace(e.text, ' REFERENCES ' || r.q || '(', ' REFERENCES this table(') AS what,
    pg_catalog.replace(e.text, ' REFERENCES ' || r.q || '(', pg_catalog.format(' REFERENCES %s(', {new})) AS text) AS d
  WHERE k.conrelid = {oid} AND k.contype = 'f' AND k.convalidated
  UNION ALL
  SELECT 17, 'index', s.what, 'before', pg_catalog.format('CREATE %sINDEX %I ON %s%s', s.kind,
    w.new_name, {new}, s.rest)
  FROM r JOIN pg_catalog.pg_index AS i ON i.indrelid = r.oid AND i.indisvalid
  JOIN pg_catalog.pg_class AS c ON c.oid = i.indexrelid JOIN names AS w ON w.oid = c.oid
  CROSS JOIN LATERAL (SELECT pg_catalog.pg_get_indexdef(i.indexrelid) AS text,
    CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END AS kind) AS d
  CROSS JOIN LATERAL (SELECT d.kind, pg_catalog.substr(d.text, pg_catalog.length(pg_catalog.format('CREATE %sINDEX %I ON %s%s',
    d.kind, c.relname, CASE WHEN r.relkind = 'p' THEN 'ONLY ' ELSE '' END, r.q)) + 1) AS rest) AS e
  CROSS JOIN LATERAL (SELECT e.kind, e.rest, pg_catalog.concat(pg_catalog.lower(e.kind),
    pg_catalog.substr(e.rest, pg_catalog.length(' USING ') + 1)) AS what) AS s
  WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_constraint AS k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x')
    AND k.conrelid = r.oid)
  UNION ALL
  SELECT 18, 'statistics', pg_catalog.format('%I', s.stxname), NULL, NULL
  FROM pg_catalog.pg_statistic_ext AS s WHERE s.stxrelid = {oid}
  UNION ALL
  SELECT 19, 'trigger', pg_catalog.replace(d.text, ' ON ' || r.q || ' ', ' ON this table ') || e.state, 'swap',
    pg_catalog.replace(d.text, ' ON ' || r.q || ' ', pg_catalog.format(' ON %s ', {new}))
    || CASE t.tgenabled WHEN 'O' THEN '' ELSE pg_catalog.format('; ALTER TABLE %s %s TRIGGER %I', {new},
      CASE t.tgenabled WHEN 'D' THEN 'DISABLE' WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, t.tgname) END
  FROM r JOIN pg_catalog.pg_trigger AS t ON t.tgrelid = r.oid AND NOT t.tgisinternal
  CROSS JOIN LATERAL (SELECT pg_catalog.pg_get_triggerdef(t.oid) AS text) AS d
  CROSS JOIN LATERAL (SELECT CASE t.tgenabled WHEN 'O' THEN '' WHEN 'D' THEN ' (disabled)' WHEN 'R' THEN ' (replica)'
    ELSE ' (always)' END AS state) AS e
  UNION ALL
  SELECT 20, 'rule', pg_catalog.format('%I', w.rulename), NULL, NULL
  FROM pg_catalog.pg_rewrite AS w WHERE w.ev_class = {oid}
  UNION ALL
  SELECT 21, 'publication', pg_catalog.concat(pg_catalog.format('%I', p.pubname), CASE WHEN x.is_part THEN ' (of some rows or columns)' END),
    'swap', CASE WHEN NOT x.is_part THEN pg_catalog.format('ALTER PUBLICATION %I ADD TABLE %s', p.pubname, {new}) END
  FROM pg_catalog.pg_publication_rel AS l JOIN pg_catalog.pg_publication AS p ON p.oid = l.prpubid
  CROSS JOIN LATERAL (SELECT COALESCE(pg_catalog.to_jsonb(l) ->> 'prqual', pg_catalog.to_jsonb(l) ->> 'prattrs') IS NOT NULL
    AS is_part) AS x WHERE l.prrelid = {oid}
  UNION ALL
  SELECT 22, 'replica identity', CASE r.relreplident WHEN 'f' THEN 'full' WHEN 'n' THEN 'nothing' ELSE 'of an index' END, 'swap',
    CASE r.relreplident WHEN 'f' THEN pg_catalog.format('ALTER TABLE %s REPLICA IDENTITY FULL', {new})
      WHEN 'n' THEN pg_catalog.format('ALTER TABLE %s REPLICA IDENTITY NOTHING', {new}) END
  FROM r WHERE r.relreplident <> 'd'
  UNION ALL
  SELECT 23, 'storage option', o.opt, 'before', pg_catalog.format('ALTER TABLE %s SET (%s)', {new}, o.opt)
  FROM r CROSS JOIN pg_catalog.unnest(r.reloptions) AS o (opt)
  UNION ALL
  SELECT 24, 'storage option', 'toast.' || o.opt, 'before', pg_catalog.format('ALTER TABLE %s SET (toast.%s)', {new}, o.opt)
  FROM r JOIN pg_catalog.pg_class AS s ON s.oid = r.reltoastrelid CROSS JOIN pg_catalog.unnest(s.reloptions) AS o (opt)
  UNION ALL
  SELECT 25, 'storage', CASE r.relpersistence WHEN 'u' THEN 'unlogged' ELSE 'logged' END, NULL, NULL FROM r
  UNION ALL
  SELECT 26, 'storage', 'tablespace ' || pg_catalog.format('%I', s.spcname), NULL, NULL
  FROM r JOIN pg_catalog.pg_tablespace AS s ON s.oid = r.reltablespace
  UNION ALL
  SELECT 27, 'statistics target', a.col || ': ' || a.attstattarget, 'before',
    pg_catalog.format('ALTER TABLE %s ALTER COLUMN %s SET STATISTICS %s', {new}, a.col, a.attstattarget)
  FROM a WHERE a.attstattarget >= 0 AND a.is_in_new
  UNION ALL
  SELECT 28, 'column option', a.col || ': ' || o.opt, 'before',
    pg_catalog.format('ALTER TABLE %s ALTER COLUMN %s SET (%s)', {new}, a.col, o.opt)
  FROM a CROSS JOIN pg_catalog.unnest(a.attoptions) AS o (opt) WHERE a.is_in_new
  UNION ALL
  SELECT 29, 'comment', 'on the table: ' || d.text, 'before', pg_catalog.format('COMMENT ON TABLE %s IS %L', {new}, d.text)
  FROM (SELECT pg_catalog.obj_description({oid}, 'pg_class') AS text) AS d WHERE d.text IS NOT NULL
  UNION ALL
  SELECT 30, 'comment', 'on ' || a.col || ': ' || d.text, 'before',
    pg_catalog.format('COMMENT ON COLUMN %s.%s IS %L', {new}, a.col, d.text)
  FROM a CROSS JOIN LATERAL (SELECT pg_catalog.col_description({oid}, a.attnum) AS text) AS d
  WHERE d.text IS NOT NULL AND a.is_in_new
  UNION ALL
  SELECT 31, 'partition of', i.inhparent::pg_catalog.regclass::pg_catalog.text, NULL, NULL
  FROM pg_catalog.pg_inherits AS i WHERE i.inhrelid = {oid}
  UNION ALL
  SELECT 32, 'children', i.inhrelid::pg_catalog.regclass::pg_catalog.text, NULL, NULL
  FROM pg_catalog.pg_inherits AS i WHERE i.inhparent = {oid}
  UNION ALL
  SELECT DISTINCT 33, 'reader', CASE c.relkind WHEN 'm' THEN 'materialized view ' WHEN 'v' THEN 'view ' ELSE 'rule of ' END
    || pg_catalog.format('%I.%I', n.nspname, c.relname), NULL, NULL
  FROM pg_catalog.pg_depend AS d JOIN pg_catalog.pg_rewrite AS w ON w.oid = d.objid
  JOIN pg_catalog.pg_class AS c ON c.oid = w.ev_class JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
  WHERE d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
    AND d.refobjid = {oid} AND w.ev_class <> {oid}
  UNION ALL
  SELECT DISTINCT 34, 'reader', 'function ' || d.objid::pg_catalog.regprocedure::pg_catalog.text, NULL, NULL
  FROM pg_catalog.pg_depend AS d JOIN r ON true
  WHERE d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
    AND (d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass AND d.refobjid = r.oid
      OR d.refclassid = 'pg_catalog.pg_type'::pg_catalog.regclass AND d.refobjid IN (SELECT y.oid FROM pg_catalog.pg_type AS y
        WHERE y.oid = r.reltype OR y.typelem = r.reltype AND y.typcategory = 'A'))
  UNION ALL
  SELECT 35, 'name', pg_catalog.format('%I', w.relname), 'swap', pg_catalog.format(
    'ALTER INDEX %I.%I RENAME TO %I; ALTER INDEX IF EXISTS %I.%I RENAME TO %I', w.nspname, w.relname, w.old_name,
    w.nspname, w.new_name, w.relname)
  FROM names AS w WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n
    ON n.oid = c.relnamespace WHERE n.nspname = w.nspname AND c.relname = w.old_name)
) AS all_of_them ORDER BY place, what"#;
