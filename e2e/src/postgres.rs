//! A Postgres server for the tests, with a database for each.
//!
//! [`Database::create`] is what most tests want. Databases come from a template that was migrated once, so one costs a copy
//! of a small directory. They are in a cluster of the test process's own, on a free port, in a directory removed with it;
//! or in the server that `TEST_DATABASE_URL` names. A test that stops or kills its server starts a [`Cluster`].

pub mod replication;

use std::{
    env,
    ffi::OsStr,
    fs,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use oncegate_installed::User;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::{runtime, sync::OnceCell, time::Instant};

use crate::{
    certificates::{Files, Issued},
    eventually::DEADLINE,
    supervised::{Directory, Supervised, send_signal},
};

/// The variable that names a server to use instead of starting one.
const GIVEN_SERVER: &str = "TEST_DATABASE_URL";

/// Starting a cluster on two busy cores takes seconds, not one.
const START_DEADLINE: Duration = Duration::from_secs(60);

const HOW_TO_INSTALL: &str = "PostgreSQL's server programs (initdb, postgres) were not found: looked in `pg_config --bindir`, \
     /usr/lib/postgresql/*/bin, /usr/pgsql-*/bin, Homebrew's directories and PATH. Install them (Debian: apt-get install postgresql; \
     Fedora: dnf install postgresql-server; macOS: brew install postgresql), or name a server in TEST_DATABASE_URL, or \
     run scripts/test, which installs them";

/// Options of a cluster.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Wait for the disk, as a production server does. If off, a crash of the machine would lose the tests' data, which
    /// nobody needs, and a commit costs microseconds. (A killed *process* loses nothing either way.)
    pub fsync: bool,
    /// Further settings, as in postgresql.conf.
    pub settings: Vec<(String, String)>,
    /// The certificate for TLS, for clients that ask for it.
    pub tls: Option<Issued>,
}

/// A Postgres server of its own.
#[derive(Debug)]
pub struct Cluster {
    programs: PathBuf,
    user: Option<User>,
    options: Options,
    port: u16,
    server: Option<Supervised>,
    // Last, so that it is removed after the server has ended.
    directory: Directory,
}

impl Cluster {
    /// Makes a cluster and starts it.
    pub async fn start(options: Options) -> Result<Self> {
        let programs = oncegate_installed::postgres_programs().context(HOW_TO_INSTALL)?;
        let directory = Directory::new("oncegate-postgres-")?;
        // The owner of the directory just made is the user running this.
        let user = if fs::metadata(directory.path())?.uid() == 0 {
            Some(oncegate_installed::postgres_user().context(
                "Postgres does not run as root, and there is neither a user postgres nor nobody to run it as",
            )?)
        } else {
            None
        };
        if let Some(User { uid, gid }) = user {
            chown(directory.path(), Some(uid), Some(gid))?;
        }
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700))?;
        let mut cluster = Self { programs, user, options, port: 0, server: None, directory };
        cluster.init()?;
        if let Some(tls) = cluster.options.tls.take() {
            let files = cluster.write_certificate(&tls)?;
            let names = ["ssl_cert_file", "ssl_key_file"].map(str::to_owned);
            let files = [&files.certificate, &files.key].map(|path| path.to_string_lossy().into_owned());
            cluster.options.settings.push(("ssl".into(), "on".into()));
            cluster.options.settings.extend(names.into_iter().zip(files));
        }
        cluster.restart().await?;
        Ok(cluster)
    }

    fn init(&self) -> Result<()> {
        let mut command = Command::new(self.programs.join("initdb"));
        command
            .arg("--pgdata")
            .arg(self.data())
            .args(["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"])
            .current_dir(self.directory.path())
            .env("TZ", "UTC");
        self.run_as_user(&mut command);
        let output = command.output().context("cannot run initdb")?;
        ensure!(
            output.status.success(),
            "initdb failed in {}: {}{}",
            self.directory.path().display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    fn write_certificate(&self, tls: &Issued) -> Result<Files> {
        let files = tls.write(self.directory.path(), "server")?;
        if let Some(User { uid, gid }) = self.user {
            chown(&files.key, Some(uid), Some(gid))?;
        }
        // The server accepts no key that others can read.
        fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600))?;
        Ok(files)
    }

    /// Replaces the certificate of a server that has one, for new connections.
    pub async fn replace_certificate(&self, tls: &Issued) -> Result<()> {
        self.write_certificate(tls)?;
        execute(&self.url("postgres"), "SELECT pg_reload_conf()").await
    }

    fn run_as_user(&self, command: &mut Command) {
        if let Some(user) = self.user {
            std::os::unix::process::CommandExt::gid(command, user.gid);
            std::os::unix::process::CommandExt::uid(command, user.uid);
        }
    }

    /// Starts the server again after [`stop`](Self::stop) or [`kill`](Self::kill), on the same port and data.
    pub async fn restart(&mut self) -> Result<()> {
        let end = Instant::now() + DEADLINE;
        let fixed_port = self.port != 0;
        loop {
            if !fixed_port {
                self.port = free_port()?;
            }
            match self.try_start().await {
                Ok(()) => return Ok(()),
                // Another process may have taken the port, and the processes of a killed server take a moment to notice.
                Err(_) if Instant::now() < end => tokio::time::sleep(Duration::from_millis(100)).await,
                Err(error) => return Err(error),
            }
        }
    }

    async fn try_start(&mut self) -> Result<()> {
        ensure!(self.server.is_none(), "the server is running");
        let path = |path: &Path| path.to_string_lossy().into_owned();
        let mut command = vec![
            path(&self.programs.join("postgres")),
            "-D".into(),
            path(&self.data()),
            "-p".into(),
            self.port.to_string(),
            "-h".into(),
            Ipv4Addr::LOCALHOST.to_string(),
            "-k".into(),
            path(self.directory.path()),
        ];
        let on_off = if self.options.fsync { "on" } else { "off" };
        let mut settings = vec![
            ("fsync".to_owned(), on_off.to_owned()),
            ("full_page_writes".to_owned(), on_off.to_owned()),
            ("max_connections".to_owned(), "300".to_owned()),
            ("log_line_prefix".to_owned(), "%m [%p] %q%d ".to_owned()),
        ];
        settings.extend(self.options.settings.iter().cloned());
        for (name, value) in settings {
            command.extend(["-c".to_owned(), format!("{name}={value}")]);
        }
        let mut server = Supervised::start(&command, &self.directory, &self.log(), "QUIT", self.user)?;
        let end = Instant::now() + START_DEADLINE;
        loop {
            if server.has_exited() {
                bail!("Postgres did not start:\n{}", self.log_tail());
            }
            match connect(&self.url("postgres")).await {
                Ok(connection) => {
                    connection.close().await?;
                    self.server = Some(server);
                    return Ok(());
                }
                Err(_) if Instant::now() < end => tokio::time::sleep(Duration::from_millis(20)).await,
                Err(error) => {
                    return Err(error.context(format!(
                        "Postgres took no connection within {START_DEADLINE:?}:\n{}",
                        self.log_tail()
                    )));
                }
            }
        }
    }

    /// Stops the server at once, as a fail-over does: its connections are cut, but everything committed is kept.
    pub fn stop(&mut self) -> Result<()> {
        self.server.take().context("the server is not running")?.stop("INT")
    }

    /// Kills the server, and returns when its processes are gone; a restart recovers everything committed.
    pub fn kill(&mut self) -> Result<()> {
        self.server.take().context("the server is not running")?.stop("KILL")?;
        // The sessions' processes outlive their parent for a moment, and may even finish their current statement.
        let data = self.data().canonicalize()?;
        let end = std::time::Instant::now() + DEADLINE;
        while !working_in(&data).is_empty() {
            ensure!(std::time::Instant::now() < end, "processes of the killed server are left");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Overwrites a file of the stopped server, named as within its data directory, with what is no page.
    pub fn damage(&self, file: &str) -> Result<()> {
        ensure!(self.server.is_none(), "the server is running");
        let mut file = fs::OpenOptions::new().write(true).open(self.data().join(file))?;
        let size = usize::try_from(file.metadata()?.len())?;
        // Over what is there: the file stays the server's own.
        Ok(file.write_all(&vec![0xa5; size])?)
    }

    /// Suspends every process of the server: the kernel accepts connections, but nobody answers, until
    /// [`thaw`](Self::thaw).
    pub fn freeze(&mut self) -> Result<()> {
        let server = self.server.as_mut().context("the server is not running")?;
        // The main process first, so that it starts no more of them.
        server.signal("STOP")?;
        for process in working_in(&self.data().canonicalize()?) {
            // One may have ended by itself.
            let _ = send_signal(process, "STOP");
        }
        Ok(())
    }

    /// Ends what [`freeze`](Self::freeze) began.
    pub fn thaw(&mut self) -> Result<()> {
        for process in working_in(&self.data().canonicalize()?) {
            let _ = send_signal(process, "CONT");
        }
        self.server.as_mut().context("the server is not running")?.signal("CONT")
    }

    /// How to reach a database of the cluster.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@{}:{}/{database}", Ipv4Addr::LOCALHOST, self.port)
    }

    /// A migrated database in this cluster.
    pub async fn database(&self) -> Result<Database> {
        let database = Database::create_from(&self.url("postgres"), None).await?;
        migrate(database.url()).await?;
        Ok(database)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The parent of all of the server's processes.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(Supervised::pid)
    }

    /// The end of the server's log.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("log")
    }
}

/// A database of a test's own, dropped with the value.
#[derive(Debug)]
pub struct Database {
    name: String,
    admin_url: String,
    url: String,
}

impl Database {
    /// A migrated database in the server that all tests of this process share.
    pub async fn create() -> Result<Self> {
        let shared = Shared::get().await?;
        Self::create_from(&shared.admin_url, Some(&shared.template)).await
    }

    /// A database with nothing in it.
    pub async fn create_empty() -> Result<Self> {
        Self::create_from(&Shared::get().await?.admin_url, None).await
    }

    /// A database with nothing in it, that keeps text in this encoding.
    pub async fn create_in(encoding: &str) -> Result<Self> {
        let template = format!("template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'");
        Self::create_from(&Shared::get().await?.admin_url, Some(&template)).await
    }

    async fn create_from(admin_url: &str, template: Option<&str>) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("oncegate_test_{}_{number}_{:08x}", process::id(), rand::random::<u32>());
        let template = template.unwrap_or("template0");
        execute(admin_url, &format!("CREATE DATABASE {name} TEMPLATE {template}")).await?;
        Ok(Self { url: with_database(admin_url, &name)?, admin_url: admin_url.to_owned(), name })
    }

    /// What to set `DATABASE_URL` to.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A connection independent of the product.
    pub async fn connect(&self) -> Result<PgConnection> {
        connect(&self.url).await
    }

    /// The one value of a query, as text.
    pub async fn query(&self, sql: &str) -> Result<String> {
        let mut connection = self.connect().await?;
        let sql = format!("SELECT ({sql})::text");
        let value = sqlx::query_scalar::<_, Option<String>>(AssertSqlSafe(sql)).fetch_one(&mut connection).await?;
        connection.close().await?;
        Ok(value.unwrap_or_default())
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let sql = format!("DROP DATABASE IF EXISTS {} WITH (FORCE)", self.name);
        // Does not wait for a standby that a failed test left behind or removed.
        let separator = if self.admin_url.contains('?') { '&' } else { '?' };
        let admin_url = format!("{}{separator}options=-c%20synchronous_commit%3Dlocal", self.admin_url);
        // One runtime cannot be blocked on from within another, and a test must not end before its database is dropped.
        let dropped = thread::spawn(move || {
            runtime::Builder::new_current_thread().enable_all().build().map_err(anyhow::Error::from).and_then(
                |runtime| runtime.block_on(async { tokio::time::timeout(DEADLINE, execute(&admin_url, &sql)).await? }),
            )
        })
        .join();
        if !matches!(dropped, Ok(Ok(()))) {
            tracing::warn!(database = %self.name, "a test's database was not dropped");
        }
    }
}

/// The server and the template that all tests of a process share.
struct Shared {
    admin_url: String,
    template: String,
    // Ends with the process: see `supervised`.
    _cluster: Option<Cluster>,
}

impl Shared {
    async fn get() -> Result<&'static Self> {
        static SHARED: OnceCell<Shared> = OnceCell::const_new();
        SHARED.get_or_try_init(Self::start).await
    }

    async fn start() -> Result<Self> {
        let (admin_url, cluster) = match env::var(GIVEN_SERVER) {
            Ok(url) if !url.is_empty() => (url, None),
            _ => {
                let cluster = Cluster::start(Options::default()).await?;
                (cluster.url("postgres"), Some(cluster))
            }
        };
        let template = make_template(&admin_url).await.context("cannot make the template of the tests' databases")?;
        Ok(Self { admin_url, template, _cluster: cluster })
    }
}

/// Creates the migrated database that the others are copied from, and returns its name.
///
/// Its name identifies its migrations, so in a server that outlives the tests it is created once per change of them. It
/// gets that name only when complete.
async fn make_template(admin_url: &str) -> Result<String> {
    let name = format!("oncegate_template_{}", migrations_digest()?);
    let mut connection = connect(admin_url).await?;
    // Held until the connection closes: of several test processes on one server, only one creates it.
    sqlx::query("SELECT pg_advisory_lock(6877416)").execute(&mut connection).await?;
    let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
        .bind(&name)
        .fetch_one(&mut connection)
        .await?;
    if !exists {
        let draft = Database::create_from(admin_url, None).await?;
        migrate(draft.url()).await?;
        for sql in [
            // A connection to the template would make copying it fail.
            format!("ALTER DATABASE {} ALLOW_CONNECTIONS false", draft.name),
            format!("ALTER DATABASE {} RENAME TO {name}", draft.name),
        ] {
            sqlx::query(AssertSqlSafe(sql)).execute(&mut connection).await?;
        }
    }
    connection.close().await?;
    Ok(name)
}

/// Applies the migrations to a database, as `oncegate migrate` does.
pub async fn migrate(url: &str) -> Result<()> {
    oncegate_sidecar::ledger::postgres::migrate::run(url).await.context("cannot migrate the database")?;
    Ok(())
}

fn migrations() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../migrations/postgres")
}

fn migrations_digest() -> Result<String> {
    use sha2::Digest as _;

    let mut files: Vec<PathBuf> = fs::read_dir(migrations())
        .context("cannot list the migrations")?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    let mut digest = sha2::Sha256::new();
    for file in files {
        digest.update(file.file_name().map(OsStr::as_encoded_bytes).unwrap_or_default());
        digest.update(fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    Ok(hex::encode(&digest.finalize()[..8]))
}

async fn connect(url: &str) -> Result<PgConnection> {
    match tokio::time::timeout(DEADLINE, PgConnection::connect(url)).await {
        Ok(connection) => connection.context("cannot connect to Postgres"),
        Err(_) => bail!("Postgres did not answer within {DEADLINE:?}"),
    }
}

async fn execute(url: &str, sql: &str) -> Result<()> {
    let mut connection = connect(url).await?;
    sqlx::query(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.with_context(|| sql.to_owned())?;
    connection.close().await?;
    Ok(())
}

/// The same server, another database.
fn with_database(url: &str, database: &str) -> Result<String> {
    let (rest, query) = match url.split_once('?') {
        Some((rest, query)) => (rest, format!("?{query}")),
        None => (url, String::new()),
    };
    let (scheme, rest) = rest.split_once("://").with_context(|| format!("{GIVEN_SERVER} is not a URL"))?;
    let authority = rest.split_once('/').map_or(rest, |(authority, _)| authority);
    Ok(format!("{scheme}://{authority}/{database}{query}"))
}

/// The processes with this working directory, where the system tells (Linux).
fn working_in(directory: &Path) -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let there = processes.filter(|one| fs::read_link(one.path().join("cwd")).is_ok_and(|cwd| cwd == directory));
    there.filter_map(|process| process.file_name().to_str()?.parse().ok()).collect()
}

/// A port that was free a moment ago.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}
