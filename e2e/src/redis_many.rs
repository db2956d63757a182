//! Several Redis servers together: a Cluster of six, and a primary with its replica under three Sentinels. Real ones,
//! which elect and fail over by themselves.

use std::{fmt::Write as _, fs, net::Ipv4Addr};

use anyhow::{Context as _, Result, bail};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::{Duration, Instant, sleep, timeout},
};

use crate::{
    eventually::{DEADLINE, within},
    postgres::free_port,
    redis::{find_program, line_from},
    supervised::{Directory, Supervised},
};

/// How long a server is silent before the others act, in milliseconds.
const SILENCE: &str = "2000";
/// Electing takes longer than most things that tests wait for.
const FAILOVER_DEADLINE: Duration = Duration::from_secs(60);

/// One server.
#[derive(Debug)]
struct Node {
    port: u16,
    server: Option<Supervised>,
    // Last, so that it is removed after the server has ended.
    _directory: Directory,
}

impl Node {
    /// Starts a server with a configuration of its own, `settings` given its port.
    async fn start(settings: impl Fn(u16) -> Result<String>, sentinel: bool) -> Result<Self> {
        let program = find_program()?;
        let end = Instant::now() + DEADLINE;
        loop {
            let directory = Directory::new("oncegate-redis-")?;
            let port = free_port()?;
            let mut text = settings(port)?;
            write!(text, "\nport {port}\nbind {}\ndir {}\n", Ipv4Addr::LOCALHOST, directory.path().display())?;
            if !sentinel {
                text.push_str("save \"\"\nappendonly no\n");
            }
            let file = directory.path().join("redis.conf");
            fs::write(&file, text)?;
            let mut command = vec![program.display().to_string(), file.display().to_string()];
            command.extend(sentinel.then(|| "--sentinel".to_owned()));
            let log = directory.path().join("log");
            let mut server = Supervised::start(&command, &directory, &log, "KILL", None)?;
            loop {
                if matches!(line_from(port, "PING").await.as_deref(), Ok("+PONG")) {
                    return Ok(Self { port, server: Some(server), _directory: directory });
                }
                // Another process may have taken the port.
                if server.has_exited() {
                    break;
                }
                sleep(Duration::from_millis(10)).await;
            }
            if Instant::now() >= end {
                bail!("Redis did not start:\n{}", fs::read_to_string(log).unwrap_or_default());
            }
        }
    }

    fn kill(&mut self) -> Result<()> {
        self.server.take().context("the server is not running")?.stop("KILL")
    }

    /// The whole of a bulk answer.
    async fn ask(&self, command: &str) -> Result<String> {
        let exchange = async {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).await?;
            stream.write_all(format!("{command}\r\n").as_bytes()).await?;
            let mut length = String::new();
            while !length.ends_with("\r\n") {
                length.push(char::from(stream.read_u8().await?));
            }
            let length = length.trim_end().strip_prefix('$').with_context(|| format!("{command}: {length}"))?;
            let mut text = vec![0; length.parse()?];
            stream.read_exact(&mut text).await?;
            anyhow::Ok(String::from_utf8(text)?)
        };
        timeout(DEADLINE, exchange).await.context("Redis did not answer")?
    }

    async fn ok(&self, command: &str) -> Result<()> {
        match line_from(self.port, command).await?.as_str() {
            "+OK" => Ok(()),
            other => bail!("{command}: {other}"),
        }
    }
}

/// Three primaries with a replica each.
#[derive(Debug)]
pub struct RedisCluster {
    primaries: Vec<Node>,
    replicas: Vec<Node>,
}

impl RedisCluster {
    /// Starts the six, and waits until all of them see all slots served.
    ///
    /// # Errors
    ///
    /// A server does not start, or they do not find together.
    pub async fn start() -> Result<Self> {
        let settings = |_| {
            // An explicit port for the bus: the default, ten thousand above, may not be a valid port.
            let bus = free_port()?;
            Ok(format!(
                "cluster-enabled yes\ncluster-port {bus}\ncluster-node-timeout {SILENCE}\ncluster-config-file nodes.conf\n\
                 cluster-replica-validity-factor 0"
            ))
        };
        let mut nodes = Vec::new();
        for _ in 0..6 {
            nodes.push(Node::start(settings, false).await?);
        }
        let replicas = nodes.split_off(3);
        let cluster = Self { primaries: nodes, replicas };
        for (number, slots) in ["0 5460", "5461 10922", "10923 16383"].iter().enumerate() {
            cluster.primaries[number].ok(&format!("CLUSTER ADDSLOTSRANGE {slots}")).await?;
        }
        let first = &cluster.primaries[0];
        for node in cluster.nodes().skip(1) {
            let bus = node.ask("CLUSTER NODES").await?;
            let bus = bus.split('@').nth(1).and_then(|rest| rest.split([' ', ',']).next()).context("a bus port")?;
            first.ok(&format!("CLUSTER MEET {} {} {bus}", Ipv4Addr::LOCALHOST, node.port)).await?;
        }
        for (primary, replica) in cluster.primaries.iter().zip(&cluster.replicas) {
            let id = primary.ask("CLUSTER MYID").await?;
            within(FAILOVER_DEADLINE, async || replica.ok(&format!("CLUSTER REPLICATE {id}")).await.ok())
                .await
                .context("a replica does not get to know its primary")?;
        }
        cluster.settled(6).await?;
        for replica in &cluster.replicas {
            within(FAILOVER_DEADLINE, async || {
                replica.ask("INFO replication").await.ok()?.contains("master_link_status:up").then_some(())
            })
            .await
            .context("a replica does not follow its primary")?;
        }
        Ok(cluster)
    }

    fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.primaries.iter().chain(&self.replicas)
    }

    /// Waits until every living node sees every slot served, by nodes that know each other, replicas included.
    async fn settled(&self, known: usize) -> Result<()> {
        within(FAILOVER_DEADLINE, async || {
            for node in self.nodes().filter(|node| node.server.is_some()) {
                let info = node.ask("CLUSTER INFO").await.ok()?;
                let members = format!("cluster_known_nodes:{known}");
                let info: Vec<_> = info.lines().collect();
                if !info.contains(&"cluster_state:ok") || !info.contains(&members.as_str()) {
                    return None;
                }
            }
            Some(())
        })
        .await
        .context("the cluster does not settle")
    }

    /// Kills a primary and waits until its replica serves its slots.
    ///
    /// # Errors
    ///
    /// It does not come to that.
    pub async fn fail_over(&mut self, number: usize) -> Result<()> {
        self.primaries[number].kill()?;
        let replica = &self.replicas[number];
        within(FAILOVER_DEADLINE, async || {
            replica.ask("INFO replication").await.ok()?.contains("role:master").then_some(())
        })
        .await
        .context("the replica was not promoted")?;
        self.settled(6).await
    }

    /// Begins to move the slot of some key from the first primary to the second, that key first, and returns the slot.
    ///
    /// # Errors
    ///
    /// The first one has no key, or they do not do it.
    pub async fn begin_to_move_a_slot(&self) -> Result<u16> {
        let (from, to) = (&self.primaries[0], &self.primaries[1]);
        let key = from.ask("RANDOMKEY").await?;
        let slot = line_from(from.port, &format!("CLUSTER KEYSLOT {key}")).await?;
        let slot = slot.trim_start_matches(':').parse()?;
        to.ok(&format!("CLUSTER SETSLOT {slot} IMPORTING {}", from.ask("CLUSTER MYID").await?)).await?;
        from.ok(&format!("CLUSTER SETSLOT {slot} MIGRATING {}", to.ask("CLUSTER MYID").await?)).await?;
        from.ok(&format!("MIGRATE {} {} {key} 0 5000", Ipv4Addr::LOCALHOST, to.port)).await?;
        Ok(slot)
    }

    /// Ends what [`begin_to_move_a_slot`](Self::begin_to_move_a_slot) began.
    ///
    /// # Errors
    ///
    /// They do not do it.
    pub async fn end_the_move(&self, slot: u16) -> Result<()> {
        let owner = self.primaries[1].ask("CLUSTER MYID").await?;
        for node in [&self.primaries[1], &self.primaries[0]] {
            node.ok(&format!("CLUSTER SETSLOT {slot} NODE {owner}")).await?;
        }
        Ok(())
    }

    /// Keys over all living primaries.
    ///
    /// # Errors
    ///
    /// One does not answer.
    pub async fn keys(&self) -> Result<usize> {
        let mut keys = 0;
        for node in self.nodes().filter(|node| node.server.is_some()) {
            if node.ask("INFO replication").await?.contains("role:master") {
                keys += line_from(node.port, "DBSIZE").await?.trim_start_matches(':').parse::<usize>()?;
            }
        }
        Ok(keys)
    }

    /// What to set `REDIS_URL` to: one node, and others to ask if it is away.
    #[must_use]
    pub fn url(&self) -> String {
        let ports: Vec<_> = self.nodes().map(|node| node.port).collect();
        let others: Vec<_> = ports[1..].iter().map(|port| format!("node={}:{port}", Ipv4Addr::LOCALHOST)).collect();
        format!("redis-cluster://{}:{}?{}", Ipv4Addr::LOCALHOST, ports[0], others.join("&"))
    }
}

/// The name of the one primary that the Sentinels watch.
const WATCHED: &str = "oncegate";

/// A primary, its replica, and three Sentinels of which two have to agree.
#[derive(Debug)]
pub struct RedisSentinel {
    primary: Node,
    replica: Node,
    sentinels: Vec<Node>,
}

impl RedisSentinel {
    /// Starts the five, and waits until every Sentinel knows the replica and the others.
    ///
    /// # Errors
    ///
    /// A server does not start, or they do not find together.
    pub async fn start() -> Result<Self> {
        let primary = Node::start(|_| Ok(String::new()), false).await?;
        let address = format!("{} {}", Ipv4Addr::LOCALHOST, primary.port);
        let replica = Node::start(|_| Ok(format!("replicaof {address}")), false).await?;
        let mut sentinels = Vec::new();
        for _ in 0..3 {
            let settings = |_| {
                Ok(format!(
                    "sentinel monitor {WATCHED} {address} 2\nsentinel down-after-milliseconds {WATCHED} {SILENCE}\n\
                     sentinel failover-timeout {WATCHED} 5000"
                ))
            };
            sentinels.push(Node::start(settings, true).await?);
        }
        let together = Self { primary, replica, sentinels };
        within(FAILOVER_DEADLINE, async || {
            for sentinel in &together.sentinels {
                let info = sentinel.ask("INFO sentinel").await.ok()?;
                if !info.contains("slaves=1,sentinels=3") {
                    return None;
                }
            }
            let linked = together.replica.ask("INFO replication").await.ok()?.contains("master_link_status:up");
            linked.then_some(())
        })
        .await
        .context("the Sentinels do not find together")?;
        Ok(together)
    }

    /// Kills the primary and waits until the replica has taken its place and every Sentinel says so.
    ///
    /// # Errors
    ///
    /// It does not come to that.
    pub async fn fail_over(&mut self) -> Result<()> {
        self.primary.kill()?;
        let new = format!("address={}:{}", Ipv4Addr::LOCALHOST, self.replica.port);
        within(FAILOVER_DEADLINE, async || {
            for sentinel in &self.sentinels {
                if !sentinel.ask("INFO sentinel").await.ok()?.contains(&new) {
                    return None;
                }
            }
            self.replica.ask("INFO replication").await.ok()?.contains("role:master").then_some(())
        })
        .await
        .context("the replica was not promoted")
    }

    /// Keys of the primary that there is now.
    ///
    /// # Errors
    ///
    /// It does not answer.
    pub async fn keys(&self) -> Result<usize> {
        let node = if self.primary.server.is_some() { &self.primary } else { &self.replica };
        Ok(line_from(node.port, "DBSIZE").await?.trim_start_matches(':').parse()?)
    }

    /// What to set `REDIS_URL` to.
    #[must_use]
    pub fn url(&self) -> String {
        let [first, others @ ..] = &*self.sentinels else { unreachable!("there are three") };
        let others: Vec<_> = others.iter().map(|node| format!("node={}:{}", Ipv4Addr::LOCALHOST, node.port)).collect();
        format!(
            "redis-sentinel://{}:{}?sentinelServiceName={WATCHED}&{}",
            Ipv4Addr::LOCALHOST,
            first.port,
            others.join("&")
        )
    }
}
