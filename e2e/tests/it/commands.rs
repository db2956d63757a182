//! The commands of the people who run it, and the exit codes that their scripts rely on.

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    postgres::Database,
    program::{Finished, Oncegate},
    stripe,
};

use sqlx::Connection as _;

use crate::setup::{Everything, Ledger, on_each_ledger, word};

on_each_ledger!(
    health_tells_what_answers,
    cleanup_counts_and_is_refused_below_the_minimum,
    bounds_are_refused_by_the_names_of_their_options,
);

async fn run(everything: &Everything, arguments: &[&str]) -> Result<Finished> {
    Oncegate::new(everything.directory.path(), arguments.iter().copied())?
        .env("SIDECAR_URL", format!("http://{}", everything.sidecar))
        .run()
        .await
}

async fn health_tells_what_answers(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let gateway = format!("http://{}", everything.gateway);
    let finished = run(&everything, &["health", "--gateway", &gateway]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    let finished = run(&everything, &["health", "--json"]).await?;
    let shown: serde_json::Value = serde_json::from_str(&finished.stdout)?;
    assert_eq!((&shown[0]["part"], &shown[0]["healthy"]), (&"sidecar".into(), &true.into()), "{finished}");
    let finished = run(&everything, &["health", "--gateway", "http://127.0.0.1:1"]).await?;
    assert_eq!(finished.code, Some(3), "{finished}");
    // The one that is away hides nothing of the other.
    let away = ["health", "--json", "--sidecar", "http://127.0.0.1:1", "--gateway", &gateway];
    let finished = run(&everything, &away).await?;
    assert_eq!(finished.code, Some(3), "{finished}");
    let shown: serde_json::Value = serde_json::from_str(&finished.stdout)?;
    assert_eq!((&shown[0]["healthy"], &shown[0]["answer"]), (&false.into(), &"no answer".into()), "{finished}");
    assert_eq!((&shown[1]["part"], &shown[1]["healthy"]), (&"gateway".into(), &true.into()), "{finished}");
    let finished =
        run(&everything, &["health", "--sidecar", "http://127.0.0.1:1", "--gateway", "http://127.0.0.1:2"]).await?;
    assert_eq!(finished.code, Some(3), "{finished}");
    for expected in ["127.0.0.1:1", "127.0.0.1:2"] {
        assert!(finished.stdout.contains(expected) && finished.stderr.contains(expected), "{finished}");
    }
    Ok(())
}

async fn cleanup_counts_and_is_refused_below_the_minimum(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    let body = stripe::event(&stripe::event_id(), "payment_intent.succeeded");
    assert_eq!(word(&everything.send(&body).await?), "200 processed");

    let finished =
        run(&everything, &["cleanup", "--days", "30", "--provider", "stripe", "--dry-run", "--json"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    let shown: serde_json::Value = serde_json::from_str(&finished.stdout)?;
    assert_eq!((&shown["matched"], &shown["deleted"], &shown["dry_run"]), (&0.into(), &0.into(), &true.into()));
    let finished = run(&everything, &["cleanup", "--days", "30", "--states", "completed,dead"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(finished.stdout.contains("all"), "{finished}");

    let finished = run(&everything, &["cleanup", "--days", "1"]).await?;
    assert_eq!(finished.code, Some(1), "{finished}");
    for expected in ["INVALID_FIELD", "--days: "] {
        assert!(finished.stderr.contains(expected), "{expected}: {finished}");
    }
    assert_eq!(everything.events().await?, 1, "nothing was deleted");
    Ok(())
}

async fn bounds_are_refused_by_the_names_of_their_options(ledger: Ledger) -> Result<()> {
    let everything = Everything::start(ledger).await?;
    for command in ["history", "stats"] {
        for option in ["--since", "--until"] {
            let finished = run(&everything, &[command, option, "1960-01-01T00:00:00Z"]).await?;
            assert_eq!(finished.code, Some(1), "{finished}");
            assert!(finished.stderr.contains(&format!("{option}: is no valid time")), "{finished}");
        }
        let finished = run(&everything, &[command, "--since", "1h", "--until", "2h"]).await?;
        assert_eq!(finished.code, Some(2), "{finished}");
        assert!(finished.stderr.contains("--until: ") && finished.stderr.contains("before --since"), "{finished}");
    }
    Ok(())
}

#[tokio::test]
async fn a_cleanup_that_is_cut_short_tells_what_it_did() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let url = crate::bench::serve(crate::bench::Wrong::GoesAway).await?;
    for (json, told) in [(&[][..], "1234"), (&["--json"], "\"done\": false")] {
        let arguments = [&["cleanup", "--sidecar", &url], json].concat();
        let finished = Oncegate::new(directory.path(), arguments)?.run().await?;
        assert_eq!(finished.code, Some(3), "{finished}");
        assert!(finished.stdout.contains("1234") && finished.stdout.contains(told), "{finished}");
        assert!(finished.stderr.contains("the totals so far"), "{finished}");
    }
    Ok(())
}

#[tokio::test]
async fn cleanup_deletes_what_is_old_enough() -> Result<()> {
    let database = Database::create().await?;
    let mut connection = database.connect().await?;
    let everything = Everything::start(Ledger::Postgres(database)).await?;
    let (old, new) = (stripe::event_id(), stripe::event_id());
    for id in [&old, &new] {
        let body = stripe::event(id, "payment_intent.succeeded");
        assert_eq!(word(&everything.send(&body).await?), "200 processed");
    }
    sqlx::query(
        "update payment_webhook_events
         set create_time = create_time - interval '40 days', end_time = end_time - interval '40 days'
         where event_id = $1",
    )
    .bind(&old)
    .execute(&mut connection)
    .await?;

    for (arguments, deleted) in [(&["--dry-run"][..], 0), (&[], 1)] {
        let arguments = [&["cleanup", "--days", "30", "--provider", "stripe", "--json"], arguments].concat();
        let finished = run(&everything, &arguments).await?;
        assert_eq!(finished.code, Some(0), "{finished}");
        let shown: serde_json::Value = serde_json::from_str(&finished.stdout)?;
        assert_eq!((&shown["matched"], &shown["deleted"]), (&1.into(), &deleted.into()), "{finished}");
        assert_eq!(shown["providers"][0]["provider"], "stripe");
    }
    assert!(everything.history(&old).await?.is_none());
    assert!(everything.history(&new).await?.is_some());
    Ok(())
}

/// `--tenant "$TENANT"` of a script whose variable is not set must not ask for everybody's.
#[tokio::test]
async fn a_filter_that_is_given_and_empty_is_refused_before_anybody_is_asked() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for name in ["cleanup", "stats", "history"] {
        for filter in ["--tenant", "--provider"] {
            let arguments = [name, "--sidecar", "http://127.0.0.1:1", filter, ""];
            let finished = Oncegate::new(directory.path(), arguments)?.run().await?;
            assert_eq!(finished.code, Some(2), "{finished}");
            assert!(finished.stderr.contains(filter), "{finished}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn nobody_there_is_exit_code_3() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for command in ["health", "cleanup"] {
        let finished = Oncegate::new(directory.path(), [command, "--sidecar", "http://127.0.0.1:1"])?.run().await?;
        assert_eq!(finished.code, Some(3), "{finished}");
        assert!(finished.stderr.contains("http://127.0.0.1:1"), "{finished}");
    }
    Ok(())
}

#[tokio::test]
async fn migrate_makes_an_empty_database_usable() -> Result<()> {
    let database = Database::create_empty().await?;
    let directory = tempfile::tempdir()?;
    let command = |name| anyhow::Ok(Oncegate::new(directory.path(), [name])?.env("DATABASE_URL", database.url()));

    let refused = command("sidecar")?.env("SIDECAR_LISTEN", "127.0.0.1:0").run().await?;
    assert_eq!(refused.code, Some(1), "a schema that does not fit is no reason to start: {refused}");
    assert!(refused.stderr.contains("oncegate migrate"), "{refused}");

    let migrated = command("migrate")?.run().await?;
    assert_eq!(migrated.code, Some(0), "{migrated}");
    let again = command("migrate")?.run().await?;
    assert_eq!(again.code, Some(0), "{again}");
    assert_ne!(migrated.stdout, again.stdout, "it says what it did");

    let mut sidecar = command("sidecar")?.env("SIDECAR_LISTEN", "127.0.0.1:0").start()?;
    sidecar.address("sidecar").await?;
    let finished = sidecar.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    Ok(())
}

/// As a dump holds tables, for an hour perhaps: who wants them behind the migration must not wait as long.
#[tokio::test]
async fn a_migration_waits_for_a_table_and_holds_up_nobody_behind_it() -> Result<()> {
    let database = Database::create().await?;
    let (mut dump, mut behind) = (database.connect().await?, database.connect().await?);
    let mut dump = dump.begin().await?;
    sqlx::query("lock table oncegate_migrations in access exclusive mode").execute(&mut *dump).await?;
    let directory = tempfile::tempdir()?;
    let mut migrating = Oncegate::new(directory.path(), ["migrate"])?.env("DATABASE_URL", database.url()).start()?;
    migrating.line_where("it waits", |line| line.contains("waits for a lock")).await?;
    // Its own lock is held meanwhile, and nothing else is.
    sqlx::query("select count(*) from payment_webhook_resolutions").execute(&mut behind).await?;
    dump.commit().await?;
    let finished = migrating.finish(std::time::Duration::from_secs(30)).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    Ok(())
}

#[tokio::test]
async fn a_sidecar_that_waits_for_a_migration_ends_when_it_is_told_to() -> Result<()> {
    let database = Database::create().await?;
    let mut dump = database.connect().await?;
    let mut dump = dump.begin().await?;
    sqlx::query("lock table oncegate_migrations in access exclusive mode").execute(&mut *dump).await?;
    let directory = tempfile::tempdir()?;
    let mut sidecar = Oncegate::new(directory.path(), ["sidecar"])?
        .env("DATABASE_URL", database.url())
        .env("ONCEGATE_MIGRATE", "true")
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        .start()?;
    sidecar.line_where("it waits", |line| line.contains("waits for a lock")).await?;
    let finished = sidecar.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    Ok(())
}

/// A nightly export on a full disk is no export.
#[test]
fn what_cannot_be_written_is_a_failure_and_a_reader_that_leaves_is_none() -> Result<()> {
    let program = oncegate_e2e::program::find_program()?;
    let completions = || {
        let mut command = std::process::Command::new(&program);
        command.args(["completions", "bash"]).stderr(std::process::Stdio::piped());
        command
    };
    let full = std::fs::File::options().write(true).open("/dev/full")?;
    let finished = completions().stdout(full).output()?;
    let said = String::from_utf8_lossy(&finished.stderr);
    assert_eq!(finished.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot write the output: No space left on device"), "{said}");
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let finished = completions().stdout(writer).output()?;
    assert_eq!((finished.status.code(), finished.stderr.len()), (Some(0), 0));
    Ok(())
}

#[tokio::test]
async fn the_manual_shows_no_value_of_a_variable() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let finished = Oncegate::new(directory.path(), ["all", "--help"])?
        .env("UPSTREAM_URL", "http://app/hook?key=hunter2")
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:hunter2@h:4318")
        .run()
        .await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(finished.stdout.contains("[env: UPSTREAM_URL]"), "{}", finished.stdout);
    assert!(!finished.stdout.contains("hunter2"), "{}", finished.stdout);
    Ok(())
}

/// As a composed environment has them.
#[tokio::test]
async fn blank_settings_of_log_and_traces_are_none() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let mut sidecar = Oncegate::new(directory.path(), ["sidecar"])?
        .env("SIDECAR_LISTEN", "127.0.0.1:0")
        .env("ONCEGATE_LOG", "")
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", "")
        .env("OTEL_TRACES_SAMPLER", "")
        .start()?;
    sidecar.address("sidecar").await?;
    let finished = sidecar.stop().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(finished.stderr.contains("ended"), "{finished}");
    Ok(())
}

#[tokio::test]
async fn commands_on_the_store_mind_no_setting_but_the_stores() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for name in ["migrate", "check"] {
        let finished = Oncegate::new(directory.path(), [name])?
            .env("SIDECAR_LISTEN", "0.0.0.0:50051")
            .env("RETENTION_MIN", "0s")
            .env("REDIS_URL", "not-a-url")
            .run()
            .await?;
        assert_eq!(finished.code, Some(0), "{finished}");
    }
    Ok(())
}

#[tokio::test]
async fn an_empty_database_url_is_refused_and_makes_no_store() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for (name, setting) in [
        ("migrate", "DATABASE_URL"),
        ("check", "DATABASE_URL"),
        ("sidecar", "DATABASE_URL_FILE"),
        ("all", "DATABASE_URL"),
    ] {
        let finished = Oncegate::new(directory.path(), [name])?
            .env(setting, if setting == "DATABASE_URL" { " " } else { "" })
            // Of these an empty one is none.
            .env("REDIS_URL_FILE", "")
            .env("REDIS_PASSWORD_FILE", "")
            .env("UPSTREAM_URL", "http://127.0.0.1:1")
            .run()
            .await?;
        assert_eq!(finished.code, Some(2), "{finished}");
        assert!(finished.stderr.contains(&format!("{setting}: given and empty")), "{finished}");
        assert!(!finished.stderr.contains("REDIS"), "{finished}");
    }
    assert_eq!(std::fs::read_dir(directory.path())?.count(), 0);
    Ok(())
}

#[tokio::test]
async fn a_store_beside_a_database_is_refused_and_neither_is_touched() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let nobody = "postgres://oncegate:tr0ub4dor@127.0.0.1:1/oncegate";
    for name in ["migrate", "check", "sidecar"] {
        let command = Oncegate::new(directory.path(), [name, "--store", "mine.db"])?.env("DATABASE_URL", nobody);
        let finished = command.run().await?;
        assert_eq!(finished.code, Some(2), "{finished}");
        for expected in ["ONCEGATE_STORE: mine.db is given beside DATABASE_URL", "unset the other"] {
            assert!(finished.stderr.contains(expected), "{expected}: {finished}");
        }
        assert!(!finished.stderr.contains("tr0ub4dor"), "{finished}");
    }
    assert_eq!(std::fs::read_dir(directory.path())?.count(), 0);
    Ok(())
}

#[tokio::test]
async fn a_version_that_is_older_than_the_schema_asks_the_schema() -> Result<()> {
    let database = Database::create().await?;
    let mut admin = database.connect().await?;
    let newer = "insert into oncegate_migrations (version, description, success, checksum, execution_time)
        values (999, 'from the future', true, '', 0)";
    sqlx::query(newer).execute(&mut admin).await?;
    let directory = tempfile::tempdir()?;
    // Told to migrate at start, as somebody may be who goes back.
    let command = |name| {
        let command = Oncegate::new(directory.path(), [name])?.env("DATABASE_URL", database.url());
        anyhow::Ok(command.env("ONCEGATE_MIGRATE", "true").env("SIDECAR_LISTEN", "127.0.0.1:0"))
    };
    let mut sidecar = command("sidecar")?.start()?;
    sidecar.address("sidecar").await?;
    assert_eq!(sidecar.stop().await?.code, Some(0));
    assert_eq!(command("migrate")?.run().await?.code, Some(0));

    let from = "update oncegate_meta set value = '999' where key = 'schema_compatible_from'";
    sqlx::query(from).execute(&mut admin).await?;
    for name in ["sidecar", "migrate"] {
        let refused = command(name)?.run().await?;
        assert_eq!(refused.code, Some(1), "{refused}");
        assert!(refused.stderr.contains("999") && refused.stderr.contains("run a newer one"), "{refused}");
    }
    Ok(())
}

#[tokio::test]
async fn every_problem_of_the_configuration_is_listed() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let finished = Oncegate::new(directory.path(), ["gateway"])?.env("GATEWAY_LISTEN", "127.0.0.1:0").run().await?;
    assert_eq!(finished.code, Some(2), "{finished}");
    assert!(finished.stderr.contains("UPSTREAM_URL"), "{finished}");

    let finished = Oncegate::new(directory.path(), ["sidecar", "--no-such-option"])?.run().await?;
    assert_eq!(finished.code, Some(2), "{finished}");
    let finished = Oncegate::new(directory.path(), ["--help"])?.run().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(finished.stdout.contains("Exit codes"), "{finished}");
    Ok(())
}

#[tokio::test]
async fn values_that_cannot_be_parsed_are_listed_with_the_rest_by_their_variables() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let command = |arguments: &[&'static str]| {
        let command = Oncegate::new(directory.path(), arguments.iter().copied())?
            .env("ONCEGATE_LOG_FORMAT", "text")
            .env("GATEWAY_LISTEN", "everywhere")
            .env("ADMIN_LISTEN", "9090")
            .env("LOCK_DURATION", "300")
            .env("REDIS_PORT", "tcp://user:hunter2@h")
            .env("SIDECAR_TLS_CLIENT_AUTH", "sometimes")
            .env("ONCEGATE_LOG", "warning")
            .env("OTEL_TRACES_SAMPLER_ARG", "2")
            .env("DATABASE_URL", "mysql://h");
        anyhow::Ok(command)
    };
    let finished = command(&["all"])?.run().await?;
    assert_eq!(finished.code, Some(2), "{finished}");
    for wanted in [
        "GATEWAY_LISTEN: \"everywhere\" given: invalid socket address syntax; write for example 127.0.0.1:8080",
        "ADMIN_LISTEN: \"9090\" given: invalid socket address syntax; write for example 127.0.0.1:9090",
        "LOCK_DURATION: \"300\" given: a unit is missing",
        "REDIS_PORT: cannot be used: invalid digit",
        "SIDECAR_TLS_CLIENT_AUTH: \"sometimes\" given, permitted are required, optional",
        "ONCEGATE_LOG: \"warning\" given: \"warning\" is neither a level (off, error, warn, info, debug, trace)",
        // What is found only after everything has been parsed.
        "OTEL_TRACES_SAMPLER_ARG: 2 given, permitted is 0 to 1",
        "DATABASE_URL: begins with mysql://",
        "UPSTREAM_URL: ",
    ] {
        assert_eq!(finished.stderr.matches(wanted).count(), 1, "{wanted}: {finished}");
    }
    // The option goes before the variable.
    let finished = command(&["all", "--gateway-listen", "127.0.0.1:0", "--log-level=info"])?.run().await?;
    assert_eq!(finished.code, Some(2), "{finished}");
    assert!(finished.stderr.contains("ADMIN_LISTEN"), "{finished}");
    assert!(!finished.stderr.contains("GATEWAY_LISTEN") && !finished.stderr.contains("ONCEGATE_LOG"), "{finished}");
    // What stands on the command line is named as it stands there.
    let finished = Oncegate::new(directory.path(), ["all", "--gateway-listen", "everywhere"])?.run().await?;
    assert_eq!(finished.code, Some(2), "{finished}");
    assert!(finished.stderr.contains("--gateway-listen"), "{finished}");
    Ok(())
}

#[tokio::test]
async fn settings_that_cannot_be_used_are_exit_code_2_and_named_without_a_secret() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let collector = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1");
    for (settings, wanted) in [
        (
            &[("DATABASE_URL_FILE", "/nonexistent")][..],
            "DATABASE_URL_FILE: cannot read /nonexistent: No such file or directory",
        ),
        (&[("REDIS_URL_FILE", "/nonexistent")], "REDIS_URL_FILE: cannot read /nonexistent: No such file or directory"),
        (
            &[("REDIS_HOST", "h"), ("REDIS_PASSWORD_FILE", "/nonexistent")],
            "REDIS_PASSWORD_FILE: cannot read /nonexistent: No such file or directory",
        ),
        (
            &[("DATABASE_URL", "postgres://u:hunter2@h:99999/db")],
            "DATABASE_URL: error with configuration: invalid port",
        ),
        (&[("DATABASE_URL", "postgres://u:hunter2@h/db?sslmode=bogus")], "bogus"),
        (&[("DATABASE_URL", "mysql://u:hunter2@h/db")], "DATABASE_URL: begins with mysql://, has to be postgres://"),
        (&[("DATABASE_URL", "u:hunter2@h/db")], "DATABASE_URL: not a URL"),
        (
            &[("DATABASE_URL", "postgres://h/db?sslmode=require&pasword=hunter2")],
            "DATABASE_URL: has parameters that are not known: pasword; known are sslmode,",
        ),
        (&[("REDIS_PORT", "6380")], "REDIS_PORT: given, and no REDIS_HOST"),
        (&[("REDIS_PASSWORD", "hunter2")], "REDIS_PASSWORD: given, and neither REDIS_URL nor REDIS_HOST"),
        (&[("REDIS_CA_FILE", "/nonexistent")], "REDIS_CA_FILE: given, and neither REDIS_URL nor REDIS_HOST"),
        (&[("REDIS_URL", "https://u:hunter2@h")], "REDIS_URL: begins with https://, and is no URL of Redis: redis://"),
        (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318")], "OTEL_EXPORTER_OTLP_ENDPOINT: collector:4318 given"),
        (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:hunter2@h:4318")], "OTEL_EXPORTER_OTLP_ENDPOINT: may not hold"),
        (
            &[("OTEL_EXPORTER_OTLP_ENDPOINT", "grpc://h:4317/x?key=hunter2")],
            "OTEL_EXPORTER_OTLP_ENDPOINT: grpc://h:4317/x?*** given",
        ),
        (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "a h?key=hunter2")], "OTEL_EXPORTER_OTLP_ENDPOINT: cannot be used"),
        (&[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "ftp://h")], "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT: ftp://h"),
        (&[("OTEL_TRACES_SAMPLER_ARG", "2")], "OTEL_TRACES_SAMPLER_ARG: 2 given, permitted is 0 to 1"),
        (&[collector, ("OTEL_EXPORTER_OTLP_HEADERS", "a=b,hunter2")], "OTEL_EXPORTER_OTLP_HEADERS: header 2"),
    ] {
        let command = Oncegate::new(directory.path(), ["sidecar"])?.env("SIDECAR_LISTEN", "127.0.0.1:0");
        let command = settings.iter().fold(command, |command, (name, value)| command.env(name, value));
        let finished = command.run().await?;
        assert_eq!(finished.code, Some(2), "{settings:?}: {finished}");
        assert!(finished.stderr.contains(wanted), "{wanted}: {finished}");
        assert!(!finished.stderr.contains("hunter2"), "{finished}");
    }
    for name in ["check", "migrate"] {
        let command =
            Oncegate::new(directory.path(), [name])?.env("DATABASE_URL", "postgres://h/db?sslpassword=hunter2");
        let finished = command.run().await?;
        assert_eq!(finished.code, Some(2), "{finished}");
        assert!(
            finished.stderr.contains("DATABASE_URL: has parameters that are not known: sslpassword;"),
            "{finished}"
        );
        assert!(!finished.stderr.contains("hunter2"), "{finished}");
    }
    Ok(())
}

/// Not so commands for people: the image asks for JSON, whatever is run in it.
#[tokio::test]
async fn a_service_that_cannot_start_says_so_in_the_form_of_its_log() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = taken.local_addr()?.to_string();
    for (settings, wanted) in [
        (&[("SIDECAR_LISTEN", "everywhere"), ("LOCK_DURATION", "soon")][..], &["SIDECAR_LISTEN", "LOCK_DURATION"][..]),
        (&[("REDIS_PORT", "1"), ("REDIS_CA_FILE", "/ca")], &["REDIS_PORT: given", "REDIS_CA_FILE: given"]),
        (&[("OTEL_EXPORTER_OTLP_ENDPOINT", "ftp://h")], &["OTEL_EXPORTER_OTLP_ENDPOINT: ftp://h"]),
        (&[("SIDECAR_LISTEN", &address)], &["SIDECAR_LISTEN: cannot listen on"]),
    ] {
        let command = |name| {
            let command = Oncegate::new(directory.path(), [name])?.env("SIDECAR_LISTEN", "127.0.0.1:0");
            anyhow::Ok(settings.iter().fold(command, |command, (name, value)| command.env(name, value)))
        };
        let finished = command("sidecar")?.run().await?;
        assert_eq!(finished.code, Some(2), "{finished}");
        for line in finished.stderr.lines() {
            serde_json::from_str::<serde_json::Value>(line).with_context(|| finished.to_string())?;
        }
        let line: serde_json::Value = serde_json::from_str(finished.stderr.lines().last().context("a line")?)?;
        assert_eq!((&line["level"], &line["exit_code"]), (&"ERROR".into(), &2.into()), "{line}");
        for wanted in wanted {
            assert!(line["problems"].as_str().is_some_and(|problems| problems.contains(wanted)), "{wanted}: {line}");
        }
        let finished = command("sidecar")?.env("ONCEGATE_LOG", "off").run().await?;
        assert!(finished.code == Some(2) && finished.stderr.contains(wanted[0]), "silence hides it not: {finished}");
    }
    let finished = Oncegate::new(directory.path(), ["stats", "--sidecar", "http://127.0.0.1:1"])?.run().await?;
    assert!(finished.code == Some(3) && finished.stderr.starts_with("oncegate: "), "{finished}");
    Ok(())
}

#[tokio::test]
async fn print_config_shows_every_setting_and_no_secret() -> Result<()> {
    let directory = tempfile::tempdir()?;
    for command in ["all", "sidecar", "gateway"] {
        let finished = Oncegate::new(directory.path(), [command, "--print-config"])?
            .env("DATABASE_URL", "postgres://pay:hidden-password@db/payments")
            .env("STRIPE_WEBHOOK_SECRET", "whsec_hidden-secret")
            .env("REDIS_PASSWORD", "hidden-too")
            .env("UPSTREAM_URL", "http://hidden-user:hidden@app:3000/hook?key=hidden-in-a-query")
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:hidden@collector:4318")
            .env("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://collector:4318/v1/traces?key=hidden")
            .env("LOCK_DURATION", "7m")
            .run()
            .await?;
        assert_eq!(finished.code, Some(0), "{}", finished.stderr);
        assert!(!finished.stdout.contains("hidden"), "{}", finished.stdout);
        if command != "gateway" {
            let line = finished.stdout.lines().find(|line| line.contains(" LOCK_DURATION ")).unwrap_or_default();
            assert!(line.contains("7m") && line.contains("environment"), "{}", finished.stdout);
            assert!(finished.stdout.contains("DATABASE_URL"), "{}", finished.stdout);
        }
        assert!(finished.stdout.contains("http://***@collector:4318"), "{}", finished.stdout);
        for of_all in ["ONCEGATE_LOG ", "ONCEGATE_LOG_FORMAT "] {
            assert!(finished.stdout.contains(of_all), "{of_all}: {}", finished.stdout);
        }
        assert!(finished.stdout.contains("http://collector:4318/v1/traces?***"), "{}", finished.stdout);
        if command != "sidecar" {
            assert!(finished.stdout.contains("STRIPE_WEBHOOK_SECRET"), "{}", finished.stdout);
            assert!(finished.stdout.contains("http://***@app:3000/hook?***"), "{}", finished.stdout);
        }
    }
    Ok(())
}
