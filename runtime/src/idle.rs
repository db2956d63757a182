//! Lets an idle thread poll for work for a while before it sleeps.
//!
//! Waking a thread takes 20 to 40 µs on a virtual machine, more than most calls need. While calls come one after the other, or
//! wait for an answer of the store, the next work arrives before sleeping would pay off, and a thread that keeps asking the
//! kernel for it instead of sleeping gets it at once. Seastar does so (`--idle-poll-time-us`), and so does Linux for the
//! processors of its guests (<https://docs.kernel.org/virt/kvm/halt-polling.html>), whose rule is followed here: the time a
//! thread polls grows when it slept too early, and shrinks when nothing came. So polling costs a process with little to do next
//! to nothing, and a busy one only uses spare time of its core, since it yields before each look and goes to sleep once
//! somebody else took the core. Between control groups (containers, and sessions where the kernel groups those) the kernel
//! yields by its own rules, so others may have to wait for the rest of a time slice.

use std::{
    future::Future as _,
    mem,
    pin::pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Waker},
    thread,
    time::{Duration, Instant},
};

use tokio::{runtime::Builder, task};

/// The smallest limit above zero, with which polling begins: about as long as being woken takes.
const FIRST: Duration = Duration::from_micros(50);

/// The longest time between two looks with nothing to do in between. Anything longer is taken for work.
const LOOK_MAX: Duration = Duration::from_micros(5);

/// A thread goes without sleeping for at most this many times the longest polling time. If there is work, that costs one wait
/// that ends at once. Where each look takes as long as work does (under an emulator, or with system calls filtered or traced),
/// it reveals that there is none.
const AWAKE: u32 = 16;

/// If yielding took longer than this, somebody else had the core.
const OTHERS: Duration = Duration::from_micros(20);

static POLLED_NANOS: AtomicU64 = AtomicU64::new(0);

/// How long the threads of this process have polled while idle: roughly this much of the processor time it used.
#[must_use]
pub fn polled() -> Duration {
    Duration::from_nanos(POLLED_NANOS.load(Ordering::Relaxed))
}

/// Makes the thread of a runtime poll for work for at most `longest` before it sleeps; not at all if that is zero.
///
/// Only for current-thread runtimes. The threads of other runtimes already look for each other's work, and would wake each
/// other by this.
///
/// Uses both of the runtime's hooks for a parking thread.
pub fn poll_before_sleep(builder: &mut Builder, longest: Duration) {
    if longest.is_zero() {
        return;
    }
    // Locked only by the one thread that drives the runtime, so nobody ever waits for it.
    let pace = Arc::new(Mutex::new(Pace::new(longest)));
    let before = Arc::clone(&pace);
    builder.on_thread_park(move || {
        if look(&mut before.lock().unwrap_or_else(PoisonError::into_inner)) {
            // A deferred task makes the runtime ask for events without sleeping, and then find itself idle again.
            let next = pin!(task::yield_now());
            let _ = next.poll(&mut Context::from_waker(Waker::noop()));
        }
    });
    builder.on_thread_unpark(move || pace.lock().unwrap_or_else(PoisonError::into_inner).woken(Instant::now));
}

/// Whether to look once more, after letting everybody else who wants the core have it.
fn look(pace: &mut Pace) -> bool {
    let now = Instant::now();
    let mut look = pace.idle(now);
    if look {
        thread::yield_now();
        look = pace.gave_way(now, Instant::now());
    }
    let polled = mem::take(&mut pace.polled);
    if !polled.is_zero() {
        POLLED_NANOS.fetch_add(u64::try_from(polled.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
    look
}

/// How long a thread looks for work before it sleeps.
#[derive(Debug)]
struct Pace {
    longest: Duration,
    /// The current limit, adapted to the last idle times.
    limit: Duration,
    idle: Option<Idle>,
    /// When the thread first became idle since it last slept.
    awake: Option<Instant>,
    /// How long the thread has polled since this was last taken.
    polled: Duration,
}

/// A time without work.
#[derive(Debug, Clone, Copy)]
struct Idle {
    since: Instant,
    /// When the last look began.
    seen: Instant,
    asleep: bool,
}

impl Pace {
    fn new(longest: Duration) -> Self {
        Self { longest, limit: Duration::ZERO, idle: None, awake: None, polled: Duration::ZERO }
    }

    /// Called when there is nothing to do: whether to keep looking rather than sleep.
    fn idle(&mut self, now: Instant) -> bool {
        let idle = match self.idle {
            Some(idle) if now.duration_since(idle.seen) < LOOK_MAX => idle,
            worked => {
                if let Some(Idle { since, seen, .. }) = worked {
                    self.polled += seen.duration_since(since);
                    self.ended(seen.duration_since(since));
                }
                Idle { since: now, seen: now, asleep: false }
            }
        };
        let length = now.duration_since(idle.since);
        let awake = now.duration_since(*self.awake.get_or_insert(now));
        let asleep = length >= self.limit || awake >= AWAKE * self.longest;
        if asleep {
            self.polled += length;
        }
        self.idle = Some(Idle { asleep, ..idle });
        !asleep
    }

    /// Called after yielding the core: whether to keep looking, or sleep because somebody else wanted it.
    fn gave_way(&mut self, before: Instant, now: Instant) -> bool {
        let asleep = now.duration_since(before) > OTHERS;
        if let Some(idle) = &mut self.idle {
            idle.seen = now;
            idle.asleep = asleep;
            if asleep {
                self.polled += before.duration_since(idle.since);
            }
        }
        !asleep
    }

    /// The runtime has looked, or slept.
    fn woken(&mut self, now: impl FnOnce() -> Instant) {
        if let Some(idle) = self.idle.take_if(|idle| idle.asleep) {
            self.awake = None;
            self.ended(now().duration_since(idle.since));
        }
    }

    /// There was nothing to do for this long.
    fn ended(&mut self, length: Duration) {
        if length > self.longest {
            self.limit /= 2;
            if self.limit < FIRST {
                self.limit = Duration::ZERO;
            }
        } else if length > self.limit {
            self.limit = (self.limit * 2).max(FIRST).min(self.longest);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{SocketAddr, TcpStream},
    };

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    const LONGEST: Duration = Duration::from_millis(1);
    const MICROSECOND: Duration = Duration::from_micros(1);

    /// One idle time, during which the thread polls as long as it may; returns how long that was. Work follows.
    fn idle_for(pace: &mut Pace, now: &mut Instant, length: Duration) -> Duration {
        *now += 100 * MICROSECOND;
        let since = *now;
        let end = since + length;
        while *now < end {
            if !pace.idle(*now) {
                let polled = now.duration_since(since);
                *now = end;
                pace.woken(|| end);
                return polled;
            }
            *now += MICROSECOND;
            assert!(pace.gave_way(*now, *now));
        }
        length
    }

    #[test]
    fn a_thread_looks_longer_where_it_slept_too_early() {
        let (mut pace, mut now) = (Pace::new(LONGEST), Instant::now());
        let polled: Vec<_> =
            (0..5).map(|_| idle_for(&mut pace, &mut now, Duration::from_micros(180)).as_micros()).collect();
        assert_eq!(polled, [0, 50, 100, 180, 180]);
        // It is counted once it is over, which is noticed when there is nothing to do again.
        assert!(pace.idle(now + LONGEST));
        assert_eq!(pace.polled.as_micros(), 510);
    }

    #[test]
    fn a_thread_never_looks_longer_than_it_may() {
        for longest in [20, 50, 70, 1_000].map(Duration::from_micros) {
            let (mut pace, mut now) = (Pace::new(longest), Instant::now());
            for _ in 0..10 {
                idle_for(&mut pace, &mut now, longest);
            }
            assert_eq!(idle_for(&mut pace, &mut now, Duration::from_secs(1)), longest);
        }
    }

    #[test]
    fn a_thread_stops_looking_where_nothing_comes() {
        let (mut pace, mut now) = (Pace::new(LONGEST), Instant::now());
        for _ in 0..10 {
            idle_for(&mut pace, &mut now, LONGEST);
        }
        let polled: Vec<_> = (0..7).map(|_| idle_for(&mut pace, &mut now, 10 * LONGEST).as_micros()).collect();
        assert_eq!(polled, [1_000, 500, 250, 125, 63, 0, 0]);
    }

    #[test]
    fn a_thread_sleeps_when_somebody_else_wants_the_core() {
        let (mut pace, now) = (Pace::new(LONGEST), Instant::now());
        pace.limit = LONGEST;
        assert!(pace.idle(now));
        assert!(pace.gave_way(now, now + OTHERS));
        let later = now + OTHERS + MICROSECOND;
        assert!(pace.idle(later));
        assert!(!pace.gave_way(later, later + OTHERS + MICROSECOND));
        // Time that others had is not counted as the thread's own.
        assert_eq!(pace.polled, later.duration_since(now));
        // And it learns from how long it slept, as from every sleep.
        pace.woken(|| now + 2 * LONGEST);
        assert_eq!(pace.limit, LONGEST / 2);
    }

    #[test]
    fn a_thread_sleeps_now_and_then_whatever_a_look_takes() {
        let (mut pace, mut now) = (Pace::new(LONGEST), Instant::now());
        pace.limit = LONGEST;
        let mut slept = Vec::new();
        while pace.limit > Duration::ZERO {
            let began = now;
            while pace.idle(now) {
                assert!(now.duration_since(began) < AWAKE * LONGEST, "it never sleeps");
                now += LOOK_MAX;
                assert!(pace.gave_way(now, now));
                now += LOOK_MAX;
                pace.woken(|| unreachable!("nobody slept"));
            }
            slept.push(now.duration_since(began));
            // Nothing comes.
            now += 2 * LONGEST;
            pace.woken(|| now);
        }
        assert_eq!(slept, [AWAKE * LONGEST; 5]);
    }

    #[test]
    fn a_look_is_no_end_of_idleness() {
        let (mut pace, now) = (Pace::new(LONGEST), Instant::now());
        pace.limit = LONGEST;
        assert!(pace.idle(now));
        pace.woken(|| unreachable!("nobody slept"));
        assert_eq!(pace.idle.map(|idle| idle.since), Some(now));
    }

    /// Whether a thread has polled for work by the time it has answered this many calls, one after the other, on a runtime that
    /// polls for up to `longest`.
    fn looks_between_calls(longest: Duration, calls: usize) -> bool {
        let mut builder = Builder::new_current_thread();
        poll_before_sleep(&mut builder, longest);
        let runtime = builder.enable_all().build().unwrap();
        let before = polled();
        runtime.block_on(async {
            let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
            let address = listener.local_addr().unwrap();
            let caller = task::spawn_blocking(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                stream.set_nodelay(true).unwrap();
                (0..calls).any(|_| {
                    let mut byte = [7];
                    stream.write_all(&byte).unwrap();
                    stream.read_exact(&mut byte).unwrap();
                    polled() > before
                })
            });
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            let mut byte = [0];
            while stream.read_exact(&mut byte).await.is_ok() {
                stream.write_all(&byte).await.unwrap();
            }
            // A timer ends as well, whether the thread looks or sleeps.
            tokio::time::sleep(Duration::from_millis(2)).await;
            caller.await.unwrap()
        })
    }

    #[test]
    fn a_runtime_looks_between_calls_only_where_it_is_told_to() {
        assert!(!looks_between_calls(Duration::ZERO, 200));
        // As many as it takes even while others have the cores.
        assert!(looks_between_calls(LONGEST, 1_000_000));
    }
}
