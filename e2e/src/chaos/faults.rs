//! What goes wrong, for how long, and how it is put right again.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::time::{Instant, sleep};

use super::{seed::Dice, world::World};
use crate::proxy::{Direction, Link, Proxy};

/// A way between two parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From direct callers to a sidecar.
    CallersToSidecar(usize),
    /// From a gateway to its sidecar.
    GatewayToSidecar(usize),
    /// From a sidecar to Postgres.
    SidecarToPostgres(usize),
    /// From a sidecar to Redis.
    SidecarToRedis(usize),
    /// From providers to a gateway.
    ProvidersToGateway(usize),
    /// From a gateway to the application.
    GatewayToApplication(usize),
}

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A way is in trouble.
    Link(Way, Link),
    /// Its connections are reset.
    Reset(Way),
    /// A sidecar stands still.
    FreezeSidecar(usize),
    /// A gateway stands still.
    FreezeGateway(usize),
    /// A sidecar is killed, and comes back with a clock that is so many seconds wrong.
    KillSidecar(usize, i64),
    /// A gateway is killed, and comes back with a clock that is so many seconds wrong.
    KillGateway(usize, i64),
    /// Postgres is killed.
    KillPostgres,
    /// Postgres is stopped at once, as a fail-over does it.
    StopPostgres,
    /// All sessions are ended.
    EndSessions,
    /// Nobody gets a connection any more.
    FillPostgres,
    /// Sessions may read only.
    ReadOnlyPostgres,
    /// Redis is killed, and comes back empty.
    KillRedis,
    /// Redis accepts, and says nothing.
    FreezeRedis,
    /// Redis forgets everything.
    FlushRedis,
    /// Redis holds rubbish, and the values of other events.
    ForgeRedis,
    /// Redis holds again what it held before, of events that were replayed since as well, and for ever.
    RedisGoesBack,
}

/// A fault with its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// After the one before it.
    pub after: Duration,
    /// How long it lasts.
    pub lasts: Duration,
    /// What it is.
    pub fault: Fault,
}

impl Fault {
    /// Its kind, for the count.
    pub fn kind(&self) -> String {
        match self {
            Self::Link(way, link) => format!("{} {}", way.name(), link_name(*link)),
            Self::Reset(way) => format!("{} reset", way.name()),
            Self::FreezeSidecar(_) => "sidecar frozen".into(),
            Self::FreezeGateway(_) => "gateway frozen".into(),
            Self::KillSidecar(..) => "sidecar killed".into(),
            Self::KillGateway(..) => "gateway killed".into(),
            Self::KillPostgres => "postgres killed".into(),
            Self::StopPostgres => "postgres stopped".into(),
            Self::EndSessions => "postgres sessions ended".into(),
            Self::FillPostgres => "postgres full".into(),
            Self::ReadOnlyPostgres => "postgres read-only".into(),
            Self::KillRedis => "redis killed".into(),
            Self::FreezeRedis => "redis frozen".into(),
            Self::FlushRedis => "redis flushed".into(),
            Self::ForgeRedis => "redis forged".into(),
            Self::RedisGoesBack => "redis gone back".into(),
        }
    }

    /// Throws one.
    pub fn random(dice: &mut Dice, count: usize) -> Planned {
        let number = dice.index(count);
        let way = *dice.one_of(&[
            Way::CallersToSidecar(number),
            Way::GatewayToSidecar(number),
            Way::SidecarToPostgres(number),
            Way::SidecarToRedis(number),
            Way::ProvidersToGateway(number),
            Way::GatewayToApplication(number),
        ]);
        let direction = *dice.one_of(&[Direction::Request, Direction::Reply]);
        let cut = Link::CutAfter(direction, dice.between(0, 3_000));
        let delay = Link::Delay(dice.millis(5, 400));
        let link = *dice.one_of(&[
            delay,
            Link::Stall,
            Link::StallOne(direction),
            cut,
            cut,
            Link::HalfClose(direction),
            Link::Throttle(2_000),
            Link::Refuse,
        ]);
        let skew = dice.between(0, 1_200);
        // A signature is good for five minutes to either side; a gateway whose clock is further off refuses it, rightly.
        let (any_skew, small_skew) =
            (i64::try_from(skew).unwrap_or(0) - 600, i64::try_from(skew % 480).unwrap_or(0) - 240);
        let fault = match dice.between(0, 99) {
            0..40 => Fault::Link(way, link),
            40..48 => Fault::Reset(way),
            48..54 => Fault::FreezeSidecar(number),
            54..60 => Fault::FreezeGateway(number),
            60..66 => Fault::KillSidecar(number, any_skew),
            66..71 => Fault::KillGateway(number, small_skew),
            71..75 => Fault::KillPostgres,
            75..78 => Fault::StopPostgres,
            78..81 => Fault::EndSessions,
            81..84 => Fault::FillPostgres,
            84..87 => Fault::ReadOnlyPostgres,
            87..90 => Fault::KillRedis,
            90..93 => Fault::FreezeRedis,
            93..95 => Fault::FlushRedis,
            95..97 => Fault::ForgeRedis,
            _ => Fault::RedisGoesBack,
        };
        // Some outlast a lock.
        let longest = if dice.percent(20) { 4_500 } else { 1_200 };
        Planned { after: dice.millis(0, 300), lasts: dice.millis(100, longest), fault }
    }

    /// Does it, for its time, and puts it right again.
    ///
    /// # Errors
    /// What cannot be put right.
    pub async fn strike(&self, world: &mut World, lasts: Duration) -> Result<()> {
        match *self {
            Self::Link(way, link) => {
                way.proxy(world).set(link);
                sleep(lasts).await;
                way.proxy(world).set(Link::Up);
                // What a half-closed or cut connection has left behind is in nobody's way.
            }
            Self::Reset(way) => way.proxy(world).reset(),
            Self::FreezeSidecar(number) => {
                let program = world.sidecars[number].program.as_ref().context("a sidecar that runs")?;
                program.freeze()?;
                sleep(lasts).await;
                program.thaw()?;
            }
            Self::FreezeGateway(number) => {
                let program = world.gateways[number].program.as_ref().context("a gateway that runs")?;
                program.freeze()?;
                sleep(lasts).await;
                program.thaw()?;
            }
            Self::KillSidecar(number, skew) => {
                world.sidecars[number].program.take().context("a sidecar that runs")?.kill().await?;
                sleep(lasts).await;
                world.sidecars[number].skew = skew;
                world.start_sidecar(number).await?;
            }
            Self::KillGateway(number, skew) => {
                world.gateways[number].program.take().context("a gateway that runs")?.kill().await?;
                sleep(lasts).await;
                world.gateways[number].skew = skew;
                world.start_gateway(number).await?;
            }
            Self::KillPostgres => {
                world.cluster.kill()?;
                sleep(lasts).await;
                world.cluster.restart().await?;
            }
            Self::StopPostgres => {
                world.cluster.stop()?;
                sleep(lasts).await;
                world.cluster.restart().await?;
            }
            Self::EndSessions => end_sessions(world).await?,
            Self::FillPostgres => fill(world, lasts).await?,
            Self::ReadOnlyPostgres => {
                set_read_only(world, true).await?;
                end_sessions(world).await?;
                sleep(lasts).await;
                set_read_only(world, false).await?;
            }
            Self::KillRedis => {
                world.redis.kill()?;
                sleep(lasts).await;
                world.redis.restart().await?;
            }
            Self::FreezeRedis => {
                world.redis.freeze()?;
                sleep(lasts).await;
                world.redis.thaw()?;
            }
            Self::FlushRedis => drop(world.redis.command("FLUSHALL").await?),
            Self::ForgeRedis => drop(world.redis.command(FORGE).await?),
            Self::RedisGoesBack => {
                world.redis.command(KEEP).await?;
                sleep(lasts).await;
                world.redis.command(BRING_BACK).await?;
            }
        }
        Ok(())
    }
}

/// Every value becomes its neighbour's, some become rubbish, and some expire never.
const FORGE: &str = "EVAL \"local k = redis.call('KEYS', '*') local f = redis.call('GET', k[1] or '') \
    for i = 1, #k do local n = redis.call('GET', k[i % #k + 1]) if i % 3 == 0 then n = 'rubbish' end \
    if n then redis.call('SET', k[i], n) end end return #k\" 0";

/// Keeps a copy of each event's first entry that is no tombstone, beside it.
const KEEP: &str = "EVAL \"for _, k in ipairs(redis.call('KEYS', 'oncegate:*')) do local v = redis.call('GET', k) \
    if v and #v > 10 and string.byte(v, 10) % 2 == 0 then redis.call('SET', 'kept:' .. k, v, 'NX') end end return 1\" 0";

/// Puts the copies back, whatever is there now.
const BRING_BACK: &str = "EVAL \"for _, k in ipairs(redis.call('KEYS', 'kept:*')) do \
    redis.call('SET', string.sub(k, 6), redis.call('GET', k)) end return 1\" 0";

/// The administrator's own way in: as a superuser it has connections of its own, beyond those of everybody else.
async fn administer(world: &World, sql: &str) -> Result<()> {
    let mut admin =
        PgConnection::connect(&world.cluster.url("postgres")).await.context("the administrator's session")?;
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut admin).await?;
    admin.close().await?;
    Ok(())
}

async fn end_sessions(world: &World) -> Result<()> {
    let sql = format!(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{}' and application_name <> 'filler'",
        world.database.name()
    );
    administer(world, &sql).await
}

async fn set_read_only(world: &World, read_only: bool) -> Result<()> {
    // For sessions to come; those that stand are ended apart from it.
    let value = if read_only { "on" } else { "off" };
    let name = world.database.name();
    administer(world, &format!("alter database {name} set default_transaction_read_only = {value}")).await
}

/// Takes every connection that there is, also those that others had, and keeps them for this long.
async fn fill(world: &World, lasts: Duration) -> Result<()> {
    // First, because it will not get in later.
    let mut admin =
        PgConnection::connect(&world.cluster.url("postgres")).await.context("the administrator's session")?;
    let url = format!("{}?application_name=filler", world.database_url());
    let others = "select pg_terminate_backend(pid) from pg_stat_activity \
        where backend_type = 'client backend' and application_name <> 'filler' and pid <> pg_backend_pid()";
    let end = Instant::now() + lasts;
    let mut sessions = Vec::new();
    while Instant::now() < end {
        while let Ok(session) = PgConnection::connect(&url).await {
            sessions.push(session);
        }
        // What they leave is taken in the next round.
        sqlx::raw_sql(others).execute(&mut admin).await?;
        sleep(Duration::from_millis(30)).await;
    }
    Ok(())
}

fn link_name(link: Link) -> &'static str {
    match link {
        Link::Up => "up",
        Link::Delay(_) => "delayed",
        Link::Stall => "stalled",
        Link::StallOne(_) => "stalled one way",
        Link::CutAfter(..) => "cut",
        Link::HalfClose(_) => "half-closed",
        Link::Throttle(_) => "throttled",
        Link::Refuse => "refused",
    }
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::CallersToSidecar(_) => "callers-sidecar",
            Self::GatewayToSidecar(_) => "gateway-sidecar",
            Self::SidecarToPostgres(_) => "sidecar-postgres",
            Self::SidecarToRedis(_) => "sidecar-redis",
            Self::ProvidersToGateway(_) => "providers-gateway",
            Self::GatewayToApplication(_) => "gateway-application",
        }
    }

    fn proxy(self, world: &World) -> &Proxy {
        match self {
            Self::CallersToSidecar(number) => &world.sidecars[number].from_callers,
            Self::GatewayToSidecar(number) => &world.sidecars[number].from_gateway,
            Self::SidecarToPostgres(number) => &world.sidecars[number].to_postgres,
            Self::SidecarToRedis(number) => &world.sidecars[number].to_redis,
            Self::ProvidersToGateway(number) => &world.gateways[number].from_providers,
            Self::GatewayToApplication(number) => &world.gateways[number].to_application,
        }
    }
}

/// Faults by kind.
pub type Counts = BTreeMap<String, u64>;
