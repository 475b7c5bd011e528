//! Keys as other programs derive them, to share one lock with a Rails, Django, Go, Java, C# or Node program.
//!
//! A migration that must not run beside a Rails migration, a job that a Django program runs too: both sides have to
//! come to the same number, and each library has its own way from a name to a number. Each function here follows one of
//! them, and is tested with a value computed by that library or its test suite.
//!
//! | program | function |
//! |---|---|
//! | ActiveRecord migrations (Ruby) | [`rails_migrations`] |
//! | with_advisory_lock (Ruby) | [`with_advisory_lock`] |
//! | sqlx (Rust) | [`sqlx`], [`sqlx_migrate`] |
//! | django-pglock (Python) | [`django_pglock`] |
//! | sqlalchemy-dlock (Python) | [`sqlalchemy_dlock`] |
//! | golang-migrate, goose, river (Go) | [`golang_migrate`], [`goose`], [`river`], [`river_with_prefix`] |
//! | Flyway (Java) | [`flyway`] |
//! | DistributedLock (C#) | [`distributed_lock`] |
//! | advisory-lock (npm) | [`npm_advisory_lock`] |
//!
//! The keys carry a readable name, shown like a call: `rails_migrations("app")`. They follow the rule that two names
//! with one number are an error, and so does a foreign key that meets one of the application's own. Many of these
//! derivations have 32 bits or fewer, where that happens: with_advisory_lock gives `plumless` and `buckeroo` one key.
//!
//! A key is only half of the matter: the other program must lock it in the same database, and a transaction-scoped lock
//! here excludes a session-scoped one there (and the other way round).
//!
//! # Examples
//!
//! ```
//! use lockkeeper::compat;
//!
//! let key = compat::rails_migrations("postgres");
//! assert_eq!(key.as_i64(), Some(737_815_420_147_457_505));
//! assert_eq!(key.to_string(), r#"rails_migrations("postgres")"#);
//! ```

use blake2::Blake2b;
use blake2::digest::consts::U8;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha1::Sha1;
use sha2::{Digest as _, Sha256};

use super::{KeyId, LockKey};

/// The lock around `rails db:migrate`: int8 `2053462845 · crc32(database)`.
///
/// `database` is what `current_database()` says there. Source: rails/rails,
/// `activerecord/lib/active_record/migration.rb`, `generate_migrator_advisory_lock_id` (Rails 5.0 and later). Rails
/// holds it at session level, on a connection of its own.
///
/// # Examples
///
/// ```
/// assert_eq!(lockkeeper::compat::rails_migrations("postgres").as_i64(), Some(737_815_420_147_457_505));
/// ```
#[must_use]
pub fn rails_migrations(database: &str) -> LockKey {
    // Both factors are below 2^31 and 2^32: the product fits.
    let key = 2_053_462_845 * i64::from(crc32(database));
    LockKey::foreign("rails_migrations", &[database], KeyId::Int8(key))
}

/// `with_advisory_lock(name)` in Ruby: two int4, `crc32(name)` and the prefix, each without its highest bit.
///
/// `prefix` is the number that the environment variable `WITH_ADVISORY_LOCK_PREFIX` begins with: 0 if it is not set, and
/// also if it begins with anything but a digit (Ruby's `"myapp".to_i` is 0, so such a prefix separates nothing there).
/// Where the Ruby program gives a number for a name, the key is that number instead of a CRC: use
/// `LockKey::from((number & 0x7fff_ffff, prefix))`.
///
/// Source: ClosureTree/with_advisory_lock 7.5, `lib/with_advisory_lock/postgresql_advisory.rb`, `lock_keys_for`.
///
/// # Examples
///
/// ```
/// use lockkeeper::compat::with_advisory_lock;
///
/// assert_eq!(with_advisory_lock("test", 0).as_i32_pair(), Some((1_484_750_348, 0)));
/// assert!(with_advisory_lock("plumless", 0).same_lock(&with_advisory_lock("buckeroo", 0)));
/// ```
#[must_use]
pub fn with_advisory_lock(name: &str, prefix: i64) -> LockKey {
    let [.., a, b, c, d] = prefix.to_be_bytes();
    let prefix = low_31_bits(u32::from_be_bytes([a, b, c, d]));
    let id = KeyId::Int4(low_31_bits(crc32(name)), prefix);
    match prefix {
        0 => LockKey::foreign("with_advisory_lock", &[name], id),
        _ => LockKey::foreign("with_advisory_lock", &[&prefix.to_string(), name], id),
    }
}

/// `PgAdvisoryLock::new(name)` of sqlx: int8, 8 bytes, little-endian, of HKDF-SHA256 over the name, without salt, with
/// the info `SQLx (Rust) Postgres advisory lock`.
///
/// Source: launchbadge/sqlx 0.8, `sqlx-postgres/src/advisory_lock.rs`. For `PgAdvisoryLock::with_key` make the key from
/// the same numbers.
///
/// # Examples
///
/// ```
/// let key = lockkeeper::compat::sqlx("my first Postgres advisory lock!");
/// assert_eq!(key.as_i64(), Some(-5_560_419_505_042_474_287));
/// ```
#[must_use]
pub fn sqlx(name: &str) -> LockKey {
    // RFC 5869: “if not provided, [salt] is set to a string of HashLen zeros”; one block of output is enough.
    let pseudorandom_key = hmac_sha256([0; 32], &[name.as_bytes()]);
    let info: &[u8] = b"SQLx (Rust) Postgres advisory lock";
    let output = hmac_sha256(pseudorandom_key, &[info, &[1]]);
    LockKey::foreign("sqlx", &[name], int8_le(output))
}

/// The lock around `sqlx migrate run`: int8 `0x3d32ad9e · crc32(database)`.
///
/// `database` is what `current_database()` says there. Source: launchbadge/sqlx 0.8, `sqlx-postgres/src/migrate.rs`,
/// `generate_lock_id`.
///
/// # Examples
///
/// ```
/// assert_eq!(lockkeeper::compat::sqlx_migrate("postgres").as_i64(), Some(368_907_709_894_077_238));
/// ```
#[must_use]
pub fn sqlx_migrate(database: &str) -> LockKey {
    // Both factors are below 2^30 and 2^32: the product fits.
    let key = 0x3d32_ad9e * i64::from(crc32(database));
    LockKey::foreign("sqlx_migrate", &[database], KeyId::Int8(key))
}

/// `pglock.advisory(name)` of django-pglock: int8, the first 8 bytes, little-endian, of SHA-256 of the name.
///
/// As a decorator without a name, `pglock.advisory` takes `module.function` for the name. Source: Opus10/django-pglock
/// 1.7, `pglock/core.py`, `_cast_lock_id`.
///
/// # Examples
///
/// ```
/// assert_eq!(lockkeeper::compat::django_pglock("hello").as_i64(), Some(1_054_880_662_928_880_172));
/// ```
#[must_use]
pub fn django_pglock(name: &str) -> LockKey {
    let hash: [u8; 32] = Sha256::digest(name).into();
    LockKey::foreign("django_pglock", &[name], int8_le(hash))
}

/// The lock of golang-migrate: int8, the low 32 bits, unsigned, of `1486364155 · crc32(text)`, where the text is the
/// additional names and then the database, with a NUL between any two.
///
/// The drivers `postgres`, `pgx` and `pgx/v5` give the schema and the migrations table as additional names:
/// `["public", "schema_migrations"]` unless configured otherwise. The CockroachDB driver gives none.
///
/// Source: golang-migrate/migrate 4.19, `database/util.go`, `GenerateAdvisoryLockId`, and
/// `database/postgres/postgres.go`, `Lock`.
///
/// # Examples
///
/// ```
/// use lockkeeper::compat::golang_migrate;
///
/// assert_eq!(golang_migrate("database_name", &[]).as_i64(), Some(1_764_327_054));
/// let key = golang_migrate("app", &["public", "schema_migrations"]);
/// assert_eq!(key.to_string(), r#"golang_migrate("public", "schema_migrations", "app")"#);
/// ```
#[must_use]
pub fn golang_migrate(database: &str, additional_names: &[&str]) -> LockKey {
    let names = [additional_names, &[database]].concat();
    let key = crc32(&names.join("\0")).wrapping_mul(1_486_364_155);
    LockKey::foreign("golang_migrate", &names, KeyId::Int8(key.into()))
}

/// The session lock of goose (`lock.NewPostgresSessionLocker`) with its default id: int8 `4097083626`, the CRC-32 of
/// `goose`.
///
/// goose locks only if it is told to, and one can give it another id (`lock.WithLockID`). Source: pressly/goose 3.27,
/// `lock/session_locker_options.go`, `DefaultLockID`. Releases before 3.26 have another default: for these use
/// `LockKey::from(5_887_940_537_704_921_958)`.
///
/// # Examples
///
/// ```
/// assert_eq!(lockkeeper::compat::goose().as_i64(), Some(4_097_083_626));
/// ```
#[must_use]
pub fn goose() -> LockKey {
    LockKey::foreign("goose", &[], KeyId::Int8(4_097_083_626))
}

/// The lock of Flyway around a migration: int8 `77431708279161` (the letters `Flyway`) plus Java's `hashCode` of
/// `"schema"."table"`, where the table is that of the schema history.
///
/// Both are as in the catalog (`public`, `flyway_schema_history`), without quotes. Flyway holds the lock at session
/// level, or at transaction level with `flyway.postgresql.transactional.lock`: the key is the same.
///
/// Source: flyway/flyway 13.0, `PostgreSQLAdvisoryLockTemplate.java` and `PostgreSQLConnection.java`, `lock`.
///
/// # Examples
///
/// ```
/// let key = lockkeeper::compat::flyway("public", "flyway_schema_history");
/// assert_eq!(key.as_i64(), Some(77_433_833_903_597));
/// ```
#[must_use]
pub fn flyway(schema: &str, table: &str) -> LockKey {
    let quoted = [schema, table].map(|name| format!("\"{}\"", name.replace('"', "\"\"")));
    let key = 77_431_708_279_161 + i64::from(java_hash_code(&quoted.join(".")));
    LockKey::foreign("flyway", &[schema, table], KeyId::Int8(key))
}

/// `new PostgresAdvisoryLockKey(name, allowHashing: true)` of DistributedLock, which is also what its
/// `PostgresDistributedSynchronizationProvider` makes of a name.
///
/// Which derivation it is depends on the name (lengths are in UTF-16 code units):
///
/// | name | key |
/// |---|---|
/// | at most 9 characters, all ASCII | two int4: the characters, 7 bits each, a 0, and 1s to the end |
/// | 16 hexadecimal digits | that int8 |
/// | 8 hexadecimal digits, a comma, 8 digits | those two int4 |
/// | any other | int8: the first 8 bytes, little-endian, of SHA-1 of the name in UTF-8 |
///
/// The second and third kind are numbers, and the key has no name then. Without `allowHashing` the first three are the
/// same, and the fourth is an exception.
///
/// Source: madelson/DistributedLock.Postgres 1.3, `PostgresAdvisoryLockKey.cs`.
///
/// # Examples
///
/// ```
/// use lockkeeper::compat::distributed_lock;
///
/// let key = distributed_lock(&"漢".repeat(18));
/// assert_eq!(key.as_i64(), Some(-5_707_277_204_051_710_361));
/// assert_eq!(distributed_lock("00000003,ffffffff").as_i32_pair(), Some((3, -1)));
/// ```
#[must_use]
pub fn distributed_lock(name: &str) -> LockKey {
    if let Some(id) = distributed_lock_ascii(name) {
        return LockKey::foreign("distributed_lock", &[name], id);
    }
    if let Some(id) = distributed_lock_number(name) {
        return LockKey::from(id);
    }
    let hash: [u8; 20] = Sha1::digest(name).into();
    LockKey::foreign("distributed_lock", &[name], int8_le(hash))
}

/// The advisory lock hash of River over a text, without a prefix: int8, FNV-1 of 64 bits.
///
/// River hashes what it writes one after the other as one text: give the concatenation. Source: riverqueue/river 0.43,
/// `rivershared/util/hashutil/hash_util.go`, `AdvisoryLockHash`. For a client with `Config.AdvisoryLockPrefix` see
/// [`river_with_prefix`].
///
/// # Examples
///
/// ```
/// assert_eq!(lockkeeper::compat::river("hello").as_i64(), Some(8_883_723_591_023_973_575));
/// ```
#[must_use]
pub fn river(text: &str) -> LockKey {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash: u64, byte| {
            hash.wrapping_mul(0x0100_0000_01b3) ^ u64::from(byte)
        });
    LockKey::foreign("river", &[text], KeyId::Int8(hash.cast_signed()))
}

/// The advisory lock hash of River over a text, for a client with `Config.AdvisoryLockPrefix`: int8, the prefix in the
/// high 32 bits and FNV-1 of 32 bits in the low ones.
///
/// For River a prefix of 0 is none, and so here: the key is that of [`river`], where the source is named too.
///
/// # Examples
///
/// ```
/// assert_eq!(lockkeeper::compat::river_with_prefix(7, "hello").as_i64(), Some(33_134_637_415));
/// ```
#[must_use]
pub fn river_with_prefix(prefix: i32, text: &str) -> LockKey {
    if prefix == 0 {
        return river(text);
    }
    let hash = text.bytes().fold(0x811c_9dc5_u32, |hash: u32, byte| {
        hash.wrapping_mul(0x0100_0193) ^ u32::from(byte)
    });
    let key = (i64::from(prefix) << 32) | i64::from(hash);
    LockKey::foreign("river", &[&prefix.to_string(), text], KeyId::Int8(key))
}

/// `create_sadlock(connection, name)` of sqlalchemy-dlock on PostgreSQL: int8, BLAKE2b of 8 bytes, little-endian.
///
/// The other program uses the byte order of its machine: on a big-endian one (s390x) it has another key. Source:
/// tanbro/sqlalchemy-dlock 0.8, `src/sqlalchemy_dlock/lock/postgresql.py`.
///
/// # Examples
///
/// ```
/// assert_eq!(lockkeeper::compat::sqlalchemy_dlock("hello").as_i64(), Some(9_022_087_748_821_825_191));
/// ```
#[must_use]
pub fn sqlalchemy_dlock(name: &str) -> LockKey {
    let hash: [u8; 8] = Blake2b::<U8>::digest(name).into();
    LockKey::foreign("sqlalchemy_dlock", &[name], int8_le(hash))
}

/// The npm package `advisory-lock`: two int4, the first and the second 4 bytes, little-endian, of SHA-256 of the name.
///
/// Source: binded/advisory-lock 1.1.1, `src/index.js`, `strToKey`. Before 1.1.1 the second number was read from the
/// wrong place (byte 1 instead of 4): those versions do not share a lock with later ones, nor with this function.
///
/// # Examples
///
/// ```
/// let key = lockkeeper::compat::npm_advisory_lock("hello");
/// assert_eq!(key.as_i32_pair(), Some((-1_169_296_852, 245_608_543)));
/// ```
#[must_use]
pub fn npm_advisory_lock(name: &str) -> LockKey {
    let [a, b, c, d, e, f, g, h, ..]: [u8; 32] = Sha256::digest(name).into();
    let (first, second) = (
        i32::from_le_bytes([a, b, c, d]),
        i32::from_le_bytes([e, f, g, h]),
    );
    LockKey::foreign("npm_advisory_lock", &[name], KeyId::Int4(first, second))
}

/// Up to nine ASCII characters, 7 bits each from the high end, then a 0 and as many 1s as are left.
fn distributed_lock_ascii(name: &str) -> Option<KeyId> {
    const MAX_CHARS: usize = 9;

    if name.len() > MAX_CHARS || !name.is_ascii() {
        return None;
    }
    let characters = name
        .bytes()
        .fold(0, |key: u64, byte| (key << 7) | u64::from(byte));
    let key = (name.len()..MAX_CHARS).fold(characters << 1, |key, _| (key << 7) | 0x7f);
    Some(int4_pair(key))
}

/// `XXXXXXXXXXXXXXXX` as one number, `XXXXXXXX,XXXXXXXX` as two, X being a hexadecimal digit.
fn distributed_lock_number(name: &str) -> Option<KeyId> {
    // .NET's `int.TryParse` with `AllowHexSpecifier`: digits only, no sign, but NULs may follow them.
    let parse = |digits: &str| {
        let digits = digits.trim_end_matches('\0');
        let only_digits = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        let value = u32::from_str_radix(digits, 16).ok()?;
        only_digits.then_some(value)
    };
    let halves =
        |high: &str, low: &str| Some((u64::from(parse(high)?) << 32) | u64::from(parse(low)?));
    if !name.is_ascii() {
        return None;
    }
    match (name.len(), name.split_at_checked(8)?) {
        (16, (high, low)) => Some(KeyId::Int8(halves(high, low)?.cast_signed())),
        (17, (high, low)) => Some(int4_pair(halves(high, low.strip_prefix(',')?)?)),
        _ => None,
    }
}

/// Java's `String.hashCode`: over UTF-16 code units, wrapping.
fn java_hash_code(text: &str) -> i32 {
    text.encode_utf16().fold(0, |hash: i32, unit| {
        hash.wrapping_mul(31).wrapping_add(i32::from(unit))
    })
}

/// CRC-32 as in zlib.
fn crc32(text: &str) -> u32 {
    crc32fast::hash(text.as_bytes())
}

fn low_31_bits(number: u32) -> i32 {
    (number & 0x7fff_ffff).cast_signed()
}

/// The high and the low half of a number as two int4.
fn int4_pair(key: u64) -> KeyId {
    let [a, b, c, d, e, f, g, h] = key.to_be_bytes();
    KeyId::Int4(
        i32::from_be_bytes([a, b, c, d]),
        i32::from_be_bytes([e, f, g, h]),
    )
}

/// The first 8 bytes, little-endian.
fn int8_le<const N: usize>(hash: [u8; N]) -> KeyId {
    const { assert!(N >= 8) };
    let start = hash.first_chunk().copied().unwrap_or_default();
    KeyId::Int8(i64::from_le_bytes(start))
}

fn hmac_sha256(key: [u8; 32], message: &[&[u8]]) -> [u8; 32] {
    // HMAC fills a short key with zeros up to the 64 bytes of a SHA-256 block; filled already, it is never refused.
    let mut block = [0; 64];
    block[..key.len()].copy_from_slice(&key);
    let start = Hmac::<Sha256>::new(&block.into());
    let mac = message
        .iter()
        .fold(start, |mac, part| mac.chain_update(part));
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::super::names;
    use super::*;

    /// Values that the libraries' own tests or their languages' standard libraries give.
    #[test]
    fn vectors_of_the_libraries() {
        let int8 = [
            (rails_migrations("postgres"), 737_815_420_147_457_505),
            (
                sqlx("my first Postgres advisory lock!"),
                -5_560_419_505_042_474_287,
            ),
            (sqlx_migrate("postgres"), 368_907_709_894_077_238),
            // From somebody else's test of the same derivation.
            (sqlx_migrate("zone"), 2_771_974_297_191_923_538),
            (django_pglock("hello"), 1_054_880_662_928_880_172),
            (golang_migrate("database_name", &[]), 1_764_327_054),
            (
                golang_migrate("database_name", &["schema_name_1"]),
                2_453_313_553,
            ),
            (
                golang_migrate("database_name", &["schema_name_2"]),
                235_207_038,
            ),
            (
                golang_migrate("postgres", &["public", "schema_migrations"]),
                143_310_882,
            ),
            (goose(), 4_097_083_626),
            (
                flyway("public", "flyway_schema_history"),
                77_433_833_903_597,
            ),
            (
                distributed_lock(&"漢".repeat(18)),
                -5_707_277_204_051_710_361,
            ),
            (river("hello"), 8_883_723_591_023_973_575),
            (river_with_prefix(7, "hello"), 33_134_637_415),
            (sqlalchemy_dlock("hello"), 9_022_087_748_821_825_191),
        ];
        for (key, expected) in int8 {
            assert_eq!(key.as_i64(), Some(expected), "{key}");
        }
        let int4 = [
            (with_advisory_lock("test", 0), (1_484_750_348, 0)),
            (npm_advisory_lock("hello"), (-1_169_296_852, 245_608_543)),
        ];
        for (key, expected) in int4 {
            assert_eq!(key.as_i32_pair(), Some(expected), "{key}");
        }
    }

    #[test]
    fn goose_is_a_crc() {
        assert_eq!(goose().as_i64(), Some(crc32("goose").into()));
    }

    #[test]
    fn prefixes_are_masked_as_in_ruby() {
        let second = |prefix| {
            with_advisory_lock("test", prefix)
                .as_i32_pair()
                .map(|pair| pair.1)
        };
        assert_eq!(second(42), Some(42));
        assert_eq!(second(-1), Some(i32::MAX));
        assert_eq!(second(0x1_8000_0005), Some(5));
        assert_eq!(
            with_advisory_lock("test", 1 << 31),
            with_advisory_lock("test", 0)
        );
        assert_eq!(
            with_advisory_lock("test", 5).to_string(),
            r#"with_advisory_lock("5", "test")"#
        );
    }

    #[test]
    fn distributed_lock_takes_numbers_as_numbers() {
        // The library's own equalities.
        assert_eq!(distributed_lock(&"0".repeat(16)), LockKey::from(0));
        assert_eq!(distributed_lock("0000000000000001"), LockKey::from(1));
        assert_eq!(distributed_lock("ffffffffFFFFFFFF"), LockKey::from(-1));
        assert_eq!(distributed_lock("00000000,00000000"), LockKey::from((0, 0)));
        assert_eq!(
            distributed_lock("00000003,ffffffff"),
            LockKey::from((3, -1))
        );
        assert_eq!(
            distributed_lock("1234567\x0000000001"),
            LockKey::from((0x123_4567 << 32) | 1)
        );
        // No numbers: hashed.
        for name in [
            "+000000000000001",
            "0000000,000000000",
            "000000000000000g",
            "00000000;00000000",
            "漢字漢字漢字漢字漢字漢字漢字漢字",
        ] {
            assert_eq!(distributed_lock(name).name(), Some(name));
            assert!(distributed_lock(name).as_i64().is_some());
        }
    }

    #[test]
    fn distributed_lock_packs_short_names() {
        let pair = |name: &str| distributed_lock(name).as_i32_pair();
        assert_eq!(pair(""), Some((i32::MAX, -1)));
        assert_eq!(pair(&"\0".repeat(9)), Some((0, 0)));
        // 'a' = 1100001: 1100001 0 and 56 ones.
        assert_eq!(pair("a"), Some((0xc2ff_ffff_u32.cast_signed(), -1)));
        assert_eq!(pair("漢"), None);
        assert_eq!(pair("ten-chars!"), None);
        let mut keys: Vec<_> = (1..128_u8)
            .flat_map(|c| (1..=9).map(move |n| char::from(c).to_string().repeat(n)))
            .map(|name| pair(&name))
            .collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), 127 * 9);
    }

    #[test]
    fn java_hash_codes() {
        assert_eq!(java_hash_code(""), 0);
        assert_eq!(java_hash_code("hello"), 99_162_322);
        assert_eq!(java_hash_code("😀"), 1_772_899);
        assert_eq!(
            java_hash_code("\"public\".\"flyway_schema_history\""),
            2_125_624_436
        );
    }

    #[test]
    fn foreign_names_meet_as_collisions() {
        let one = with_advisory_lock("plumless", 0);
        let other = with_advisory_lock("buckeroo", 0);
        let registration = names::register(&one).expect("the first of its number");
        let collision = names::register(&other).expect_err("the same number");
        assert_eq!((collision.refused, collision.known), (other, one));
        drop(registration);
        let registration = names::register(&river("x")).expect("a name of its own");
        drop(names::register(&river_with_prefix(0, "x")).expect("the same name"));
        drop(registration);
    }

    #[test]
    fn names_look_foreign() {
        assert_eq!(goose().to_string(), "goose()");
        assert_eq!(
            (goose().namespace(), goose().name()),
            (Some("goose"), Some("goose"))
        );
        let key = flyway("public", "flyway_schema_history");
        assert_eq!(
            key.to_string(),
            r#"flyway("public", "flyway_schema_history")"#
        );
        assert_eq!(
            (key.namespace(), key.name()),
            (Some("flyway"), Some("flyway_schema_history"))
        );
        let many = golang_migrate("d", &["a", "b", "c"]);
        let number = many.as_i64().expect("one int8");
        assert_eq!(
            many.to_string(),
            format!(r#"golang_migrate("a", "b", "c", …) [4 bytes, key {number}]"#)
        );
    }
}
