//! No address may take all the connections of a listener (W15): a socket that sends a byte now and then holds its place
//! until a time-out, so a peer that can open enough of them keeps everybody else out.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::metrics::Counter;

/// What belongs to one customer of a network: an IPv4 address, or the 64 bits of an IPv6 address that are given to one.
#[must_use]
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        address @ IpAddr::V4(_) => address,
    }
}

/// How many connections of a listener each address may have at once. Connections beyond that are closed as soon as they are
/// accepted.
///
/// Not for a listener behind a proxy, where everybody has the proxy's address.
pub struct Shares {
    max: NonZeroUsize,
    exempt: fn(IpAddr) -> bool,
    /// As many entries as there are connections, at most.
    held: Mutex<HashMap<IpAddr, usize>>,
    refused: Counter,
}

impl Shares {
    /// Allows this many for each address, except for this machine's own processes: a proxy may be one of them.
    #[must_use]
    pub fn new(max: NonZeroUsize) -> Arc<Self> {
        Self::with_exemption(max, |address| address.is_loopback())
    }

    /// The same, with a custom exemption.
    #[must_use]
    pub fn with_exemption(max: NonZeroUsize, exempt: fn(IpAddr) -> bool) -> Arc<Self> {
        Arc::new(Self { max, exempt, held: Mutex::default(), refused: Counter::new() })
    }

    /// How many each address may have.
    #[must_use]
    pub fn max(&self) -> usize {
        self.max.get()
    }

    /// Connections closed so far for exceeding a share.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.get()
    }

    /// Takes a connection's part of its address's share; if that is used up, counts a refusal.
    pub(super) fn take(self: &Arc<Self>, peer: SocketAddr) -> Option<Share> {
        // A listener on IPv6 sees IPv4 as ::ffff:a.b.c.d.
        let address = peer.ip().to_canonical();
        if (self.exempt)(address) {
            return Some(Share { of: None });
        }
        let network = network(address);
        let mut held = self.held();
        let count = held.entry(network).or_default();
        // An entry is never left at 0, and at least one is always permitted.
        if *count >= self.max.get() {
            self.refused.add();
            return None;
        }
        *count += 1;
        Some(Share { of: Some((self.clone(), network)) })
    }

    fn held(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        // A count is changed in one step.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Shares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shares").field("max", &self.max).finish_non_exhaustive()
    }
}

/// A connection's part of a share. Given back when dropped.
pub(super) struct Share {
    of: Option<(Arc<Shares>, IpAddr)>,
}

impl Drop for Share {
    fn drop(&mut self) {
        let Some((shares, network)) = &self.of else { return };
        let mut held = shares.held();
        if let Some(count) = held.get_mut(network) {
            *count -= 1;
            if *count == 0 {
                held.remove(network);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(text: &str) -> SocketAddr {
        SocketAddr::new(text.parse().unwrap(), 4711)
    }

    fn shares(max: usize) -> Arc<Shares> {
        Shares::new(NonZeroUsize::new(max).unwrap())
    }

    #[test]
    fn w15_an_address_has_its_share_and_gives_back_what_it_no_longer_uses() {
        let shares = shares(2);
        let first = shares.take(peer("192.0.2.1")).unwrap();
        let second = shares.take(peer("192.0.2.1")).unwrap();
        assert!(shares.take(peer("192.0.2.1")).is_none());
        assert!(shares.take(peer("::ffff:192.0.2.1")).is_none(), "the same one");
        assert_eq!(shares.refused(), 2);
        let other = shares.take(peer("192.0.2.2")).expect("somebody else's share is untouched");
        drop(first);
        let third = shares.take(peer("192.0.2.1")).expect("one has ended");
        assert!(shares.take(peer("192.0.2.1")).is_none());
        assert_eq!(shares.held().len(), 2);
        drop((second, third, other));
        assert!(shares.held().is_empty(), "nothing is kept of who has gone");
        assert_eq!(shares.refused(), 3);
    }

    #[test]
    fn w15_of_ipv6_the_network_counts_that_one_customer_has() {
        let shares = shares(1);
        let _first = shares.take(peer("2001:db8:1:2::1")).unwrap();
        assert!(shares.take(peer("2001:db8:1:2:ffff::9")).is_none());
        assert!(shares.take(peer("2001:db8:1:3::1")).is_some());
    }

    #[test]
    fn w15_this_machine_is_not_held_to_a_share() {
        let shares = shares(1);
        for own in ["127.0.0.1", "127.0.0.2", "::1", "::ffff:127.0.0.1"] {
            let held: Vec<_> = (0..10).map(|_| shares.take(peer(own)).expect(own)).collect();
            drop(held);
        }
        assert_eq!((shares.refused(), shares.held().len()), (0, 0));
    }
}
