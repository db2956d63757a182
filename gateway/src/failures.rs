//! How many failed requests a stranger may make, by source, route and time (W14).
//!
//! The signature of a request is known only when its body has been read, and a provider may share its address with anybody
//! (a NAT, a proxy in front of us). So no request is ever refused for what others did before: each is verified, and only
//! one that fails is held to the limit. Beyond it the answer is 429, nothing more is read of the request, its connection is
//! closed and no line is logged.
//!
//! What others do at the same moment does matter: room for bodies is bounded by source as well ([`crate::body`]).

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    sync::Arc,
    time::Duration,
};

use http::HeaderMap;
use oncegate_runtime::{buckets::Buckets, server::network};

use crate::route::Route;

/// How many sources have a bucket of their own at once.
const SOURCES_MAX: usize = 50_000;

/// How failures are limited.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FailureLimits {
    /// How many per minute, source and route, and how many at once. None: no limit.
    pub(crate) per_minute: Option<NonZeroU32>,
    /// How many proxies of our own stand in front; each appends the address that it saw to `X-Forwarded-For`.
    pub(crate) trusted_hops: usize,
}

/// An IPv4 address, or the 64 bits of an IPv6 address that a provider gives to one customer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Source(IpAddr);

impl Source {
    pub(crate) fn of(address: IpAddr) -> Self {
        Self(network(address))
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who sent a request, as far as we can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Origin {
    /// None: a Unix socket.
    pub(crate) source: Option<Source>,
    /// Whether many senders may share it: a process on this machine may be a proxy, and one of our own proxies may not have
    /// said whom it saw.
    pub(crate) shared: bool,
}

impl Origin {
    /// The source, unless many senders may share it.
    pub(crate) fn alone(self) -> Option<Source> {
        self.source.filter(|_| !self.shared)
    }
}

/// A route, by its place, and a source. None: the source is unknown (a Unix socket).
type Key = (usize, Option<Source>);

/// The buckets.
pub(crate) struct Failures {
    buckets: Option<Buckets<Key>>,
    trusted_hops: usize,
}

impl Failures {
    pub(crate) fn new(limits: FailureLimits) -> Self {
        let buckets = limits.per_minute.map(|count| Buckets::new(count, Duration::from_secs(60), SOURCES_MAX));
        Self { buckets, trusted_hops: limits.trusted_hops }
    }

    /// Counts a failure. If it is one too many, says how long until the next one is within the limit.
    pub(crate) fn add(&self, route: &Arc<Route>, headers: &HeaderMap, peer: Option<SocketAddr>) -> Option<Duration> {
        self.add_at(Arc::as_ptr(route).addr(), self.origin(headers, peer).source)
    }

    /// Who sent a request.
    pub(crate) fn origin(&self, headers: &HeaderMap, peer: Option<SocketAddr>) -> Origin {
        origin(headers, peer, self.trusted_hops)
    }

    fn add_at(&self, route: usize, source: Option<Source>) -> Option<Duration> {
        self.buckets.as_ref()?.take(&(route, source)).err()
    }
}

/// Who sent a request: the socket's peer, or the address that the outermost of our own proxies saw. Whatever stands before
/// that in the header was written by strangers.
fn origin(headers: &HeaderMap, peer: Option<SocketAddr>, trusted_hops: usize) -> Origin {
    let forwarded = || {
        // Read from the end, and only what our own proxy wrote: what stands before it need not even be text.
        let lines = headers.get_all("x-forwarded-for").iter().rev();
        let mut entries = lines.flat_map(|line| line.as_bytes().rsplit(|&byte| byte == b','));
        address(std::str::from_utf8(entries.nth(trusted_hops.checked_sub(1)?)?).ok()?.trim())
    };
    let forwarded = forwarded();
    let proxied = trusted_hops > 0 && forwarded.is_none();
    let address = forwarded.or(peer.map(|peer| peer.ip()));
    let shared = proxied || address.is_some_and(|address| address.to_canonical().is_loopback());
    Origin { source: address.map(Source::of), shared }
}

/// An address, with or without a port. Some proxies write brackets around IPv6 (RFC 3986) without one as well.
fn address(text: &str) -> Option<IpAddr> {
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse::<Ipv6Addr>().ok().map(IpAddr::from);
    text.parse().ok().or_else(|| text.parse::<SocketAddr>().ok().map(|address| address.ip())).or_else(bracketed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen_from(peer: [u8; 4], forwarded: &[&'static str], hops: usize) -> Origin {
        let mut headers = HeaderMap::new();
        for value in forwarded {
            headers.append("x-forwarded-for", http::HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        origin(&headers, Some((peer, 1234).into()), hops)
    }

    fn seen(forwarded: &[&'static str], hops: usize) -> String {
        seen_from([10, 0, 0, 9], forwarded, hops).source.unwrap().to_string()
    }

    #[test]
    fn w14_a_source_is_what_our_own_proxies_saw_and_nothing_that_a_stranger_writes() {
        assert_eq!(seen(&["1.1.1.1"], 0), "10.0.0.9", "no proxy is trusted unless configured");
        assert_eq!(seen(&["6.6.6.6, 1.1.1.1"], 1), "1.1.1.1");
        assert_eq!(seen(&["6.6.6.6", "1.1.1.1"], 1), "1.1.1.1", "lines are one list");
        assert_eq!(seen(&["6.6.6.6, 1.1.1.1", "10.0.0.2"], 2), "1.1.1.1", "lines are one list");
        assert_eq!(seen(&["\u{ff}, 1.1.1.1"], 1), "1.1.1.1", "what strangers write need not be ASCII");
        assert_eq!(seen(&["6.6.6.6, 1.1.1.1, 10.0.0.2"], 2), "1.1.1.1");
        assert_eq!(seen(&["1.1.1.1:4711"], 1), "1.1.1.1");
        assert_eq!(seen(&["[2001:db8:1:2:3::1]:4711"], 1), "2001:db8:1:2::");
        assert_eq!(seen(&["[2001:db8:1:2:3::1]"], 1), "2001:db8:1:2::");
        assert_eq!(seen(&["::ffff:1.1.1.1"], 1), "1.1.1.1");
        // Fewer entries than proxies, or rubbish: only the peer is certain.
        assert_eq!(seen(&["1.1.1.1"], 2), "10.0.0.9");
        for rubbish in ["unknown", "[1.1.1.1]", "[::1", "::1]", "[]"] {
            assert_eq!(seen(&[rubbish], 1), "10.0.0.9", "{rubbish}");
        }
        assert_eq!(seen(&["1.1.1.1, \u{ff}"], 1), "10.0.0.9");
        assert_eq!(seen(&[], 1), "10.0.0.9");
    }

    #[test]
    fn w15_a_source_that_may_be_everybody_is_told_from_one_that_is_alone() {
        let alone = |peer, forwarded: &[&'static str], hops| seen_from(peer, forwarded, hops).alone().is_some();
        assert!(alone([192, 0, 2, 1], &[], 0), "as connections are counted");
        assert!(alone([10, 0, 0, 9], &["6.6.6.6, 192.0.2.1"], 1));
        assert!(alone([127, 0, 0, 1], &["192.0.2.1"], 1), "a proxy on this machine says who it is");
        assert!(alone([10, 0, 0, 9], &["\u{ff}, 192.0.2.1"], 1), "nobody makes himself everybody");
        // Our own proxy, which speaks for everybody, and did not say whom it saw, or said too little or rubbish.
        assert!(!alone([10, 0, 0, 9], &[], 1));
        assert!(!alone([10, 0, 0, 9], &["192.0.2.1"], 2));
        assert!(!alone([10, 0, 0, 9], &["unknown"], 1));
        // This machine.
        assert!(!alone([127, 0, 0, 2], &[], 0));
        for own in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            assert!(!alone([10, 0, 0, 9], &[own], 1), "{own}");
        }
        assert_eq!(origin(&HeaderMap::new(), None, 0).alone(), None, "a Unix socket");
    }

    #[test]
    fn w14_each_source_and_route_has_its_own_limit_in_a_bounded_memory() {
        let failures = Failures::new(FailureLimits { per_minute: NonZeroU32::new(2), trusted_hops: 0 });
        let from = |number: u32| Some(Source(std::net::Ipv4Addr::from(number).into()));
        assert_eq!([failures.add_at(1, from(1)), failures.add_at(1, from(1))], [None, None]);
        let wait = failures.add_at(1, from(1)).unwrap();
        assert!(wait > Duration::from_secs(20) && wait <= Duration::from_secs(30), "{wait:?}");
        assert_eq!([failures.add_at(2, from(1)), failures.add_at(1, from(2))], [None, None]);
        let limit = u32::try_from(SOURCES_MAX).unwrap();
        let limited = (0..limit + 100).filter(|number| failures.add_at(3, from(*number)).is_some()).count();
        assert!(limited >= 90, "{limited}");
        // Those that were known before are not affected.
        assert!(failures.add_at(1, from(2)).is_none());
        let unlimited = Failures::new(FailureLimits { per_minute: None, trusted_hops: 0 });
        assert!((0..100).all(|_| unlimited.add_at(1, from(1)).is_none()));
    }
}
