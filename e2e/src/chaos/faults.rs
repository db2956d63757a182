//! What goes wrong, for how long, and how it is undone.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::time::sleep;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{seed::Dice, world::World};
use crate::{
    postgres::Cluster,
    proxy::{Direction, Link, Proxy},
    redis::Redis,
};

/// A path between two parts.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A path is in trouble.
    Link(Way, Link),
    /// Its connections are reset.
    Reset(Way),
    /// A sidecar is frozen.
    FreezeSidecar(usize),
    /// A gateway is frozen.
    FreezeGateway(usize),
    /// A sidecar is killed, and comes back with a clock that is this many seconds off.
    KillSidecar(usize, i64),
    /// A gateway is killed, and comes back with a clock that is this many seconds off.
    KillGateway(usize, i64),
    /// Postgres is killed.
    KillPostgres,
    /// Postgres is stopped at once, as a fail-over does it.
    StopPostgres,
    /// Postgres accepts connections but stays silent.
    FreezePostgres,
    /// Postgres is killed, and a standby that had everything committed takes its place.
    PromoteStandby,
    /// All sessions are ended.
    EndSessions,
    /// Nobody gets a connection any more.
    FillPostgres,
    /// Sessions may only read.
    ReadOnlyPostgres,
    /// Redis is killed, and comes back empty.
    KillRedis,
    /// Redis accepts connections but stays silent.
    FreezeRedis,
    /// A replica takes the place of Redis, without what was written last.
    ReplaceRedis,
    /// Redis forgets everything.
    FlushRedis,
    /// Redis holds garbage, and the values of other events.
    ForgeRedis,
    /// Redis gets back its earlier content, including that of events replayed since, and keeps it for ever.
    RedisGoesBack,
}

/// A fault with its timing.
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
            Self::FreezePostgres => "postgres frozen".into(),
            Self::PromoteStandby => "postgres standby promoted".into(),
            Self::EndSessions => "postgres sessions ended".into(),
            Self::FillPostgres => "postgres full".into(),
            Self::ReadOnlyPostgres => "postgres read-only".into(),
            Self::KillRedis => "redis killed".into(),
            Self::FreezeRedis => "redis frozen".into(),
            Self::ReplaceRedis => "redis replaced by a replica".into(),
            Self::FlushRedis => "redis flushed".into(),
            Self::ForgeRedis => "redis forged".into(),
            Self::RedisGoesBack => "redis gone back".into(),
        }
    }

    /// Draws one.
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
        let link = Link::random(dice);
        let skew = dice.between(0, 1_200);
        // A signature is valid for five minutes either way; a gateway whose clock is further off rightly refuses it.
        let (any_skew, small_skew) =
            (i64::try_from(skew).unwrap_or(0) - 600, i64::try_from(skew % 480).unwrap_or(0) - 240);
        let fault = match dice.between(0, 99) {
            0..36 => Fault::Link(way, link),
            36..43 => Fault::Reset(way),
            43..49 => Fault::FreezeSidecar(number),
            49..55 => Fault::FreezeGateway(number),
            55..61 => Fault::KillSidecar(number, any_skew),
            61..66 => Fault::KillGateway(number, small_skew),
            66..70 => Fault::KillPostgres,
            70..73 => Fault::StopPostgres,
            73..76 => Fault::FreezePostgres,
            76..79 => Fault::PromoteStandby,
            79..81 => Fault::EndSessions,
            81..84 => Fault::FillPostgres,
            84..87 => Fault::ReadOnlyPostgres,
            87..90 => Fault::KillRedis,
            90..92 => Fault::FreezeRedis,
            92..94 => Fault::ReplaceRedis,
            94..96 => Fault::FlushRedis,
            96..98 => Fault::ForgeRedis,
            _ => Fault::RedisGoesBack,
        };
        // Some outlast a lock.
        let longest = if dice.percent(20) { 4_500 } else { 1_200 };
        Planned { after: dice.millis(0, 300), lasts: dice.millis(100, longest), fault }
    }

    /// What it affects: of the faults that strike at once, no two affect the same target.
    pub fn target(&self) -> Target {
        match self {
            Self::Link(way, _) | Self::Reset(way) => Target::Way(*way),
            Self::FreezeSidecar(number) | Self::KillSidecar(number, _) => Target::Sidecar(*number),
            Self::FreezeGateway(number) | Self::KillGateway(number, _) => Target::Gateway(*number),
            Self::KillPostgres
            | Self::StopPostgres
            | Self::FreezePostgres
            | Self::PromoteStandby
            | Self::EndSessions
            | Self::FillPostgres
            | Self::ReadOnlyPostgres => Target::Postgres,
            Self::KillRedis
            | Self::FreezeRedis
            | Self::ReplaceRedis
            | Self::FlushRedis
            | Self::ForgeRedis
            | Self::RedisGoesBack => Target::Redis,
        }
    }

    /// Whether other faults have to end first: a starting process needs what it depends on.
    pub fn ends_last(&self) -> bool {
        matches!(self, Self::KillSidecar(..) | Self::KillGateway(..))
    }

    /// Begins the fault.
    ///
    /// # Errors
    /// When it cannot be begun.
    pub async fn begin(&self, world: &mut World) -> Result<Begun> {
        match *self {
            Self::Link(way, link) => way.proxy(world).set(link),
            Self::Reset(way) => way.proxy(world).reset(),
            Self::FreezeSidecar(number) => {
                world.sidecars[number].program.as_ref().context("a sidecar that runs")?.freeze()?;
            }
            Self::FreezeGateway(number) => {
                world.gateways[number].program.as_ref().context("a gateway that runs")?.freeze()?;
            }
            Self::KillSidecar(number, _) => {
                world.sidecars[number].program.take().context("a sidecar that runs")?.kill().await?;
            }
            Self::KillGateway(number, _) => {
                world.gateways[number].program.take().context("a gateway that runs")?.kill().await?;
            }
            Self::KillPostgres => world.cluster.kill()?,
            Self::StopPostgres => world.cluster.stop()?,
            Self::FreezePostgres => world.cluster.freeze()?,
            Self::PromoteStandby => return Ok(Begun::Standby(Box::new(world.lose_primary().await?))),
            Self::EndSessions => end_sessions(world).await?,
            Self::FillPostgres => return Ok(Begun::Filling(fill(world).await?)),
            Self::ReadOnlyPostgres => {
                set_read_only(world, true).await?;
                end_sessions(world).await?;
            }
            Self::KillRedis => world.redis.kill()?,
            Self::FreezeRedis => world.redis.freeze()?,
            Self::ReplaceRedis => return Ok(Begun::Replica(world.redis.detached_replica().await?)),
            Self::FlushRedis => drop(world.redis.command("FLUSHALL").await?),
            Self::ForgeRedis => drop(world.redis.command(FORGE).await?),
            Self::RedisGoesBack => drop(world.redis.command(KEEP).await?),
        }
        Ok(Begun::Plain)
    }

    /// Undoes the fault.
    ///
    /// # Errors
    /// When it cannot be undone.
    pub async fn end(&self, world: &mut World, begun: Begun) -> Result<()> {
        match (*self, begun) {
            // What a half-closed or cut connection left behind does no harm.
            (Self::Link(way, _), _) => way.proxy(world).set(Link::Up),
            (Self::FreezeSidecar(number), _) => {
                world.sidecars[number].program.as_ref().context("a sidecar that runs")?.thaw()?;
            }
            (Self::FreezeGateway(number), _) => {
                world.gateways[number].program.as_ref().context("a gateway that runs")?.thaw()?;
            }
            (Self::KillSidecar(number, skew), _) => {
                world.sidecars[number].skew = skew;
                world.start_sidecar(number).await?;
            }
            (Self::KillGateway(number, skew), _) => {
                world.gateways[number].skew = skew;
                world.start_gateway(number).await?;
            }
            (Self::KillPostgres | Self::StopPostgres, _) => world.cluster.restart().await?,
            (Self::FreezePostgres, _) => world.cluster.thaw()?,
            (Self::PromoteStandby, Begun::Standby(standby)) => world.promote(*standby).await?,
            (Self::FillPostgres, Begun::Filling(filler)) => {
                filler.stop.cancel();
                filler.task.await??;
            }
            (Self::ReadOnlyPostgres, _) => set_read_only(world, false).await?,
            (Self::KillRedis, _) => world.redis.restart().await?,
            (Self::FreezeRedis, _) => world.redis.thaw()?,
            (Self::ReplaceRedis, Begun::Replica(replica)) => world.replace_redis(replica)?,
            (Self::RedisGoesBack, _) => drop(world.redis.command(BRING_BACK).await?),
            (
                Self::Reset(_)
                | Self::EndSessions
                | Self::FlushRedis
                | Self::ForgeRedis
                | Self::PromoteStandby
                | Self::FillPostgres
                | Self::ReplaceRedis,
                _,
            ) => {}
        }
        Ok(())
    }
}

/// What a fault affects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A path between two parts.
    Way(Way),
    /// A sidecar's process.
    Sidecar(usize),
    /// A gateway's process.
    Gateway(usize),
    /// Postgres.
    Postgres,
    /// Redis.
    Redis,
}

/// What is needed to end a fault that has begun.
#[derive(Debug)]
pub enum Begun {
    /// Nothing.
    Plain,
    /// The standby to be promoted.
    Standby(Box<Cluster>),
    /// The replica that takes over.
    Replica(Redis),
    /// The one that takes every connection.
    Filling(Filler),
}

/// See [`Fault::FillPostgres`].
#[derive(Debug)]
pub struct Filler {
    stop: CancellationToken,
    task: AbortOnDropHandle<Result<()>>,
}

/// Every value becomes its neighbour's, some become garbage, and some never expire.
const FORGE: &str = "EVAL \"local k = redis.call('KEYS', '*') local f = redis.call('GET', k[1] or '') \
    for i = 1, #k do local n = redis.call('GET', k[i % #k + 1]) if i % 3 == 0 then n = 'rubbish' end \
    if n then redis.call('SET', k[i], n) end end return #k\" 0";

/// Keeps a copy of each event's first entry that is not a tombstone.
const KEEP: &str = "EVAL \"for _, k in ipairs(redis.call('KEYS', 'oncegate:*')) do local v = redis.call('GET', k) \
    if v and #v > 10 and string.byte(v, 10) % 2 == 0 then redis.call('SET', 'kept:' .. k, v, 'NX') end end return 1\" 0";

/// Restores the copies, whatever is there now.
const BRING_BACK: &str = "EVAL \"for _, k in ipairs(redis.call('KEYS', 'kept:*')) do \
    redis.call('SET', string.sub(k, 6), redis.call('GET', k)) end return 1\" 0";

/// The administrator's own access: as a superuser it has reserved connections.
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
    // For new sessions; existing ones are ended separately.
    let value = if read_only { "on" } else { "off" };
    let name = world.database.name();
    administer(world, &format!("alter database {name} set default_transaction_read_only = {value}")).await
}

/// Takes every connection there is, including those that others had, and keeps them until stopped.
async fn fill(world: &World) -> Result<Filler> {
    // Done first, because it could not get in later.
    let mut admin =
        PgConnection::connect(&world.cluster.url("postgres")).await.context("the administrator's session")?;
    let url = format!("{}?application_name=filler", world.database_url());
    let others = "select pg_terminate_backend(pid) from pg_stat_activity \
        where backend_type = 'client backend' and application_name <> 'filler' and pid <> pg_backend_pid()";
    let stop = CancellationToken::new();
    let stopped = stop.clone();
    let task = tokio::spawn(async move {
        let mut sessions = Vec::new();
        while !stopped.is_cancelled() {
            while let Ok(session) = PgConnection::connect(&url).await {
                sessions.push(session);
            }
            // What they free is taken in the next round.
            sqlx::raw_sql(others).execute(&mut admin).await?;
            sleep(Duration::from_millis(30)).await;
        }
        Ok(())
    });
    Ok(Filler { stop, task: AbortOnDropHandle::new(task) })
}

impl Link {
    /// Draws some kind of trouble.
    pub(crate) fn random(dice: &mut Dice) -> Self {
        let direction = *dice.one_of(&[Direction::Request, Direction::Reply]);
        let cut = Link::CutAfter(direction, dice.between(0, 3_000));
        let delay = Link::Delay(dice.millis(5, 400));
        *dice.one_of(&[
            delay,
            Link::Stall,
            Link::StallOne(direction),
            cut,
            cut,
            Link::HalfClose(direction),
            Link::Throttle(2_000),
            Link::Refuse,
        ])
    }
}

/// The kind of trouble, for the count.
pub(crate) fn link_name(link: Link) -> &'static str {
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
