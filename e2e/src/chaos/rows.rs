//! What the ledger holds at the end, read independently of the product.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result};
use sqlx::{Connection as _, PgConnection, Row as _};

/// An event as the ledger has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Its state.
    pub state: String,
    /// Its token.
    pub token: i64,
    /// Attempts, as the event counts them.
    pub attempt_count: i32,
    /// Every attempt that is recorded, by its number.
    pub attempts: Vec<Attempt>,
    /// Every resolution, by its token.
    pub resolutions: Vec<Resolution>,
}

/// A recorded attempt. Times in microseconds of the database's clock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attempt {
    /// Its number.
    pub attempt: i32,
    /// Its token.
    pub token: i64,
    /// Its claim.
    pub claim_id: String,
    /// Its grant.
    pub start: i64,
    /// Its end, unless it is running.
    pub end: Option<i64>,
    /// How it ended, or `running`.
    pub outcome: String,
}

/// A recorded resolution.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolution {
    /// The token that it drew.
    pub token: i64,
    /// The state before it.
    pub from_state: String,
    /// The state after it.
    pub to_state: String,
    /// Why, which tells which call it was.
    pub reason: String,
    /// When.
    pub time: i64,
}

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// By event id.
    pub events: BTreeMap<String, Event>,
    /// Events by state, as the ledger counts them for Stats.
    pub counts: BTreeMap<String, i64>,
}

const STATES: [&str; 6] = ["pending", "processing", "completed", "failed", "unknown", "dead"];

/// The three selects, for either ledger: only the representation of times
/// differs.
fn statements(micros: impl Fn(&str) -> String) -> [String; 3] {
    let end = micros("case when state = 'processing' then null else coalesce(end_time, update_time) end");
    let latest = format!(
        "select event_id, state, fencing_token, attempt_count, claim_id, {}, {end}, outcome, id \
         from payment_webhook_events",
        micros("start_time")
    );
    let attempts = format!(
        "select event_row, attempt, fencing_token, claim_id, {}, {}, outcome from payment_webhook_attempts \
         order by event_row, attempt",
        micros("start_time"),
        micros("end_time")
    );
    let resolutions = format!(
        "select event_row, fencing_token, from_state, to_state, reason, {} from payment_webhook_resolutions \
         order by event_row, fencing_token",
        micros("time")
    );
    [latest, attempts, resolutions]
}

#[derive(Default)]
struct Builder {
    rows: Rows,
    names: BTreeMap<i64, String>,
    latest: BTreeMap<String, Attempt>,
}

impl Builder {
    fn event(&mut self, id: i64, name: String, event: Event, latest: Option<Attempt>) {
        self.names.insert(id, name.clone());
        if let Some(latest) = latest {
            self.latest.insert(name.clone(), latest);
        }
        self.rows.events.insert(name, event);
    }

    fn of(&mut self, id: i64) -> Result<&mut Event> {
        let name = self.names.get(&id).context("a row of an event that is not there")?;
        self.rows.events.get_mut(name).context("an event by its name")
    }

    fn finish(mut self) -> Rows {
        for (name, latest) in self.latest {
            if let Some(event) = self.rows.events.get_mut(&name) {
                event.attempts.push(latest);
            }
        }
        self.rows
    }
}

/// Reads a Postgres database.
pub async fn of_postgres(url: &str) -> Result<Rows> {
    let mut connection = PgConnection::connect(url).await.context("cannot connect to read the rows")?;
    let micros = |time: &str| format!("(extract(epoch from {time}) * 1000000)::bigint");
    let [latest, attempts, resolutions] = statements(micros);
    let mut all = Builder::default();
    let mut transaction = connection.begin().await?;
    sqlx::query("set transaction isolation level repeatable read").execute(&mut *transaction).await?;
    for row in sqlx::query(sqlx::AssertSqlSafe(latest)).fetch_all(&mut *transaction).await? {
        let event = Event {
            state: row.try_get(1)?,
            token: row.try_get(2)?,
            attempt_count: row.try_get(3)?,
            ..Event::default()
        };
        let latest = row.try_get::<Option<String>, _>(4)?.map(|claim_id| {
            anyhow::Ok(Attempt {
                attempt: event.attempt_count,
                token: event.token,
                claim_id,
                start: row.try_get(5)?,
                end: row.try_get(6)?,
                outcome: row.try_get(7)?,
            })
        });
        all.event(row.try_get(8)?, row.try_get(0)?, event, latest.transpose()?);
    }
    for row in sqlx::query(sqlx::AssertSqlSafe(attempts)).fetch_all(&mut *transaction).await? {
        all.of(row.try_get(0)?)?.attempts.push(Attempt {
            attempt: row.try_get(1)?,
            token: row.try_get(2)?,
            claim_id: row.try_get(3)?,
            start: row.try_get(4)?,
            end: row.try_get(5)?,
            outcome: row.try_get(6)?,
        });
    }
    for row in sqlx::query(sqlx::AssertSqlSafe(resolutions)).fetch_all(&mut *transaction).await? {
        all.of(row.try_get(0)?)?.resolutions.push(Resolution {
            token: row.try_get(1)?,
            from_state: row.try_get(2)?,
            to_state: row.try_get(3)?,
            reason: row.try_get(4)?,
            time: row.try_get(5)?,
        });
    }
    for state in STATES {
        let sql = format!("select coalesce(sum({state}), 0)::bigint from payment_webhook_counts");
        let count = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut *transaction).await?;
        all.rows.counts.insert(state.to_owned(), count);
    }
    transaction.commit().await?;
    connection.close().await?;
    Ok(all.finish())
}

/// Reads the embedded store's file.
pub fn of_sqlite(path: &Path) -> Result<Rows> {
    let connection = rusqlite::Connection::open(path)?;
    let [latest, attempts, resolutions] = statements(str::to_owned);
    let mut all = Builder::default();
    let mut statement = connection.prepare(&latest)?;
    let mut found = statement.query([])?;
    while let Some(row) = found.next()? {
        let event = Event { state: row.get(1)?, token: row.get(2)?, attempt_count: row.get(3)?, ..Event::default() };
        let latest = match row.get::<_, Option<String>>(4)? {
            None => None,
            Some(claim_id) => Some(Attempt {
                attempt: event.attempt_count,
                token: event.token,
                claim_id,
                start: row.get(5)?,
                end: row.get(6)?,
                outcome: row.get(7)?,
            }),
        };
        all.event(row.get(8)?, row.get(0)?, event, latest);
    }
    let mut statement = connection.prepare(&attempts)?;
    let mut found = statement.query([])?;
    while let Some(row) = found.next()? {
        all.of(row.get(0)?)?.attempts.push(Attempt {
            attempt: row.get(1)?,
            token: row.get(2)?,
            claim_id: row.get(3)?,
            start: row.get(4)?,
            end: row.get(5)?,
            outcome: row.get(6)?,
        });
    }
    let mut statement = connection.prepare(&resolutions)?;
    let mut found = statement.query([])?;
    while let Some(row) = found.next()? {
        all.of(row.get(0)?)?.resolutions.push(Resolution {
            token: row.get(1)?,
            from_state: row.get(2)?,
            to_state: row.get(3)?,
            reason: row.get(4)?,
            time: row.get(5)?,
        });
    }
    for state in STATES {
        let sql = format!("select coalesce(sum({state}), 0) from payment_webhook_counts");
        let count = connection.query_row(&sql, [], |row| row.get(0))?;
        all.rows.counts.insert(state.to_owned(), count);
    }
    Ok(all.finish())
}
