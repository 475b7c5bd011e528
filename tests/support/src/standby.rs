//! A hot standby of a private cluster.
//!
//! Made with `pg_basebackup`, or, where that program is missing (the servers from npm have only three), with the
//! functions that it uses itself: `pg_backup_start`, a copy of the data directory, `pg_backup_stop`.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use tokio_postgres::Client;

use crate::cluster::Cluster;
use crate::error::SetupError;
use crate::probe;

pub(crate) fn start(primary: &Cluster) -> Result<Cluster, SetupError> {
    let standby = Cluster::empty(primary.installation.clone())?;
    if primary.installation.program("pg_basebackup").is_file() {
        base_backup(primary, &standby)?;
    } else {
        copy(primary, &standby)?;
    }
    standby.configure(&[
        ("hot_standby", "on"),
        (
            "primary_conninfo",
            &format!("host=127.0.0.1 port={} user=postgres", primary.port),
        ),
    ])?;
    standby.launch_first()
}

fn base_backup(primary: &Cluster, standby: &Cluster) -> Result<(), SetupError> {
    let mut args: Vec<OsString> = vec!["-D".into(), standby.data().into(), "-p".into()];
    args.push(primary.port.to_string().into());
    for arg in [
        "-h",
        "127.0.0.1",
        "-U",
        "postgres",
        "--write-recovery-conf",
        "--wal-method=stream",
        "--checkpoint=fast",
        "--no-sync",
    ] {
        args.push(arg.into());
    }
    standby.guardian().run(
        &primary.installation.program("pg_basebackup"),
        args,
        &standby.guardian().dir().join("basebackup.log"),
    )
}

fn copy(primary: &Cluster, standby: &Cluster) -> Result<(), SetupError> {
    let (begin, end) = if primary.installation.major < 15 {
        (
            "pg_start_backup('standby', true, false)",
            "pg_stop_backup(false, false)",
        )
    } else {
        ("pg_backup_start('standby', true)", "pg_backup_stop(false)")
    };
    let config = primary.config();
    let label = probe::blocking(|| async {
        let told = |error: tokio_postgres::Error| SetupError::new(probe::describe(&error));
        // The backup belongs to the session that started it.
        let client: Client = probe::connect(&config).await.map_err(told)?;
        client
            .batch_execute(&format!("SELECT {begin}"))
            .await
            .map_err(told)?;
        copy_files(&primary.data(), standby)?;
        let row = client
            .query_one(&format!("SELECT labelfile FROM {end}"), &[])
            .await
            .map_err(told)?;
        Ok::<String, SetupError>(row.get(0))
    })?;
    let data = standby.data();
    for (name, text) in [("backup_label", label.as_str()), ("standby.signal", "")] {
        let path = data.join(name);
        fs::write(&path, text)
            .and_then(|()| standby.guardian().account().own(&path))
            .map_err(SetupError::because(path.display()))?;
    }
    Ok(())
}

/// Files may vanish and grow while they are copied: what the copy lacks comes with the write-ahead log, which is
/// streamed from where the backup began.
fn copy_files(from: &Path, standby: &Cluster) -> Result<(), SetupError> {
    // `cp -R` fails in the end when a file vanished on the way, but copies all the others.
    const SCRIPT: &str = r#"
        cp -R "$1" "$2"
        rm -rf "$2"/pg_wal/* "$2"/pg_replslot/* "$2"/postmaster.pid
        [ -f "$2/global/pg_control" ] && [ -f "$2/PG_VERSION" ]
    "#;
    let args: [OsString; 5] = [
        "-c".into(),
        SCRIPT.into(),
        "sh".into(),
        from.into(),
        standby.data().into(),
    ];
    standby.guardian().run(
        Path::new("/bin/sh"),
        args,
        &standby.guardian().dir().join("copy.log"),
    )
}
