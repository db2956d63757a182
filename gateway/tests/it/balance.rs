//! Several sidecars behind one name: each gets its share, one that dies costs no webhook, and a name that cannot be
//! resolved changes nothing.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use http::{Request, Response};
use hyper::{body::Incoming, service::service_fn};
use oncegate_api::{
    reason,
    v1::{
        CheckAndLockRequest, idempotency_service_client::IdempotencyServiceClient,
        idempotency_service_server::IdempotencyServiceServer,
    },
};
use oncegate_gateway::{
    Gateway,
    config::Options,
    sidecar::{Pool, Resolve},
};
use oncegate_runtime::{
    admin::Metrics,
    server::{self, TowerToHyperService, serve},
    shutdown::CancellationToken,
};
use tokio::{net::TcpListener, time::timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};

use crate::{
    application::Application,
    client::{PATIENCE, deliver},
    harness::options,
    sidecar::{Call, Scripted, Sidecar, error, unknown},
};

/// What the name resolves to at the moment: addresses, or nothing when it cannot be resolved.
#[derive(Clone, Default)]
struct Names {
    addresses: Arc<Mutex<Option<Vec<SocketAddr>>>>,
}

impl Names {
    fn set(&self, addresses: Option<&[&Served]>) {
        let addresses = addresses.map(|served| served.iter().map(|served| served.address).collect());
        *self.addresses.lock().unwrap() = addresses;
    }
}

impl Resolve for Names {
    fn resolve<'a>(
        &'a self,
        host: &'a str,
        _: u16,
    ) -> Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send + 'a>> {
        assert!(["sidecar.test", "gone.test"].contains(&host), "{host}");
        let found = self.addresses.lock().unwrap().clone().filter(|_| host == "sidecar.test");
        Box::pin(async move { found.ok_or_else(|| io::Error::other("no such name")) })
    }
}

/// A scripted sidecar on an address of its own.
struct Served {
    sidecar: Sidecar,
    address: SocketAddr,
    /// Closes the listener and breaks the connections.
    stop: CancellationToken,
}

impl Served {
    async fn start(ip: [u8; 4]) -> Self {
        Self::playing(Sidecar::default(), ip).await
    }

    /// A sidecar that shares its script with others: the first answer is for whichever is asked first.
    async fn playing(sidecar: Sidecar, ip: [u8; 4]) -> Self {
        let listener = TcpListener::bind(SocketAddr::from((ip, 0))).await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = TowerToHyperService::new(IdempotencyServiceServer::new(sidecar.clone()));
        let stop = CancellationToken::new();
        // No drain: what is under way is cut.
        tokio::spawn(serve(listener, service, server::Options::http2(Duration::ZERO), stop.clone()));
        Self { sidecar, address, stop }
    }

    /// Two that share a script.
    async fn two_playing(sidecar: &Sidecar) -> (Self, Self) {
        let playing = |ip| Self::playing(sidecar.clone(), ip);
        (playing([127, 0, 0, 1]).await, playing([127, 0, 0, 2]).await)
    }

    fn claims(&self) -> usize {
        self.sidecar.claims().len()
    }
}

struct Balanced {
    application: Application,
    address: SocketAddr,
    metrics: Metrics,
    _run: AbortOnDropHandle<()>,
}

impl Balanced {
    async fn start(names: &Names) -> Self {
        Self::at(SIDECARS, names).await
    }

    /// Before sidecars that stay the same.
    async fn among(sidecars: &[&Served]) -> Self {
        let names = Names::default();
        names.set(Some(sidecars));
        Self::start(&names).await
    }

    async fn at(sidecars: &str, names: &Names) -> Self {
        let application = Application::start().await;
        let options = Options {
            sidecar_url: sidecars.into(),
            sidecar_resolve_interval: Duration::from_millis(20),
            sidecar_connect_timeout: Duration::from_millis(500),
            ..options(&application.url())
        };
        let settings = options.validate().unwrap();
        let pool = Pool::with_resolver(settings.sidecar.clone(), names.clone());
        let metrics = pool.metrics();
        let gateway = Gateway::bind(settings, pool).await.unwrap();
        let address = gateway.local_addr();
        let run = tokio::spawn(async move { gateway.run(CancellationToken::new()).await.unwrap() });
        Self { application, address, metrics, _run: AbortOnDropHandle::new(run) }
    }

    async fn deliver(&self, count: usize, name: &str) {
        for number in 0..count {
            let answer = deliver(self.address, &format!("evt_{name}_{number}")).await;
            assert_eq!(answer.status, 200, "{name} {number}: {answer:?}");
        }
    }

    fn metric(&self, name: &str) -> u64 {
        let text = (self.metrics)();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
    }

    async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let met = async {
            while !condition(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, met).await.unwrap_or_else(|_| panic!("not in time: {what}\n{}", (self.metrics)()));
    }
}

const SIDECARS: &str = "http://sidecar.test:50051";
const ADDRESSES: &str = "oncegate_gateway_sidecar_addresses";

#[tokio::test]
async fn calls_are_shared_and_a_new_sidecar_gets_its_part() {
    let (first, second) = (Served::start([127, 0, 0, 1]).await, Served::start([127, 0, 0, 2]).await);
    let names = Names::default();
    names.set(Some(&[&first, &second]));
    let balanced = Balanced::start(&names).await;
    balanced.deliver(40, "shared").await;
    // Forty flips of a coin: one side less than four times is one in a hundred million.
    assert!(first.claims() >= 4 && second.claims() >= 4, "{} {}", first.claims(), second.claims());

    let third = Served::start([127, 0, 0, 3]).await;
    names.set(Some(&[&first, &second, &third]));
    balanced.until("the new address is known", |balanced| balanced.metric(ADDRESSES) == 3).await;
    balanced.deliver(60, "joined").await;
    assert!(third.claims() >= 4, "{}", third.claims());

    // No longer behind the name: no call goes there any more.
    names.set(Some(&[&third]));
    balanced.until("the old addresses are forgotten", |balanced| balanced.metric(ADDRESSES) == 1).await;
    let before = first.sidecar.calls().len() + second.sidecar.calls().len();
    balanced.deliver(10, "left").await;
    assert_eq!(first.sidecar.calls().len() + second.sidecar.calls().len(), before);
}

#[tokio::test]
async fn a_sidecar_that_dies_costs_no_webhook() {
    let (dying, living) = (Served::start([127, 0, 0, 1]).await, Served::start([127, 0, 0, 2]).await);
    let balanced = Balanced::among(&[&dying, &living]).await;
    balanced.deliver(20, "before").await;
    // The name still resolves to both, as in the seconds after a crash. Its listener goes away first; its connections break
    // while claims are under way that it never answers.
    dying.sidecar.claim(Scripted::Hang);
    dying.sidecar.claim(Scripted::Hang);
    let under_way: Vec<_> =
        (0..8).map(|number| tokio::spawn(deliver(balanced.address, &format!("evt_under_way_{number}")))).collect();
    timeout(PATIENCE, dying.sidecar.until(|calls| {
        calls.iter().filter(|call| matches!(call, Call::Claim(claim, _) if claim.key.as_ref().unwrap().event_id.contains("under_way"))).count() >= 1
    }))
    .await
    .unwrap();
    dying.stop.cancel();
    for answer in under_way {
        assert_eq!(answer.await.unwrap().status, 200);
    }
    balanced.deliver(30, "after").await;
    assert!(balanced.metric("oncegate_gateway_sidecar_retries_total") >= 1);
    assert_eq!(balanced.application.deliveries().len(), 58, "each event once");
}

#[tokio::test]
async fn a_sidecar_whose_calls_are_given_up_is_left_alone_though_its_connection_stands() {
    let living = Served::start([127, 0, 0, 2]).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hanging = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let counting = asked.clone();
    let service = service_fn(move |_: Request<Incoming>| {
        counting.fetch_add(1, Relaxed);
        std::future::pending::<Result<Response<String>, Infallible>>()
    });
    tokio::spawn(serve(listener, service, server::Options::http2(Duration::ZERO), CancellationToken::new()));
    let names = Names::default();
    *names.addresses.lock().unwrap() = Some(vec![hanging, living.address]);
    let options = Options { sidecar_url: SIDECARS.into(), ..options("http://127.0.0.1:1/") };
    let pool = Pool::with_resolver(options.validate().unwrap().sidecar, names);
    let mut client = IdempotencyServiceClient::new(pool);
    // The call has no deadline of its own, which would make the client end it as well.
    for _ in 0..40 {
        let call = client.check_and_lock(CheckAndLockRequest::default());
        drop(timeout(Duration::from_millis(50), call).await);
    }
    // A coin toss for each call would send it twenty; after ten failures it would be left alone for half a minute.
    let asked = asked.load(Relaxed);
    assert!((1..=8).contains(&asked), "{asked} of 40");
    assert!(living.claims() >= 32);
}

#[tokio::test]
async fn addresses_stay_when_the_name_cannot_be_resolved() {
    let served = Served::start([127, 0, 0, 1]).await;
    let names = Names::default();
    let balanced = Balanced::start(&names).await;
    // No address is known yet, so nothing was sent.
    assert_eq!(deliver(balanced.address, "evt_early").await.status, 503);
    names.set(Some(&[&served]));
    balanced.until("the name is resolved", |balanced| balanced.metric(ADDRESSES) == 1).await;
    balanced.deliver(3, "known").await;
    names.set(None);
    let failed = "oncegate_gateway_sidecar_resolutions_failed_total";
    let before = balanced.metric(failed);
    balanced.until("resolutions fail", |balanced| balanced.metric(failed) > before + 1).await;
    balanced.deliver(5, "kept").await;
    assert_eq!(balanced.metric(ADDRESSES), 1);
}

#[tokio::test]
async fn a_name_that_cannot_be_resolved_keeps_no_old_addresses_of_another() {
    let (old, new) = (Served::start([127, 0, 0, 1]).await, Served::start([127, 0, 0, 2]).await);
    let names = Names::default();
    names.set(Some(&[&old]));
    let balanced = Balanced::at("http://sidecar.test:50051,http://gone.test:50051", &names).await;
    balanced.until("one of the names is resolved", |balanced| balanced.metric(ADDRESSES) == 1).await;
    balanced.deliver(3, "old").await;
    names.set(Some(&[&new]));
    let failed = "oncegate_gateway_sidecar_resolutions_failed_total";
    let before = balanced.metric(failed);
    balanced.until("it was resolved again", |balanced| balanced.metric(failed) > before + 1).await;
    assert_eq!(balanced.metric(ADDRESSES), 1);
    balanced.deliver(10, "new").await;
    assert_eq!((old.claims(), new.claims()), (3, 10));
}

#[tokio::test]
async fn an_overloaded_sidecar_is_not_asked_again_but_another_is_with_the_same_claim() {
    let (first, second) = (Served::start([127, 0, 0, 1]).await, Served::start([127, 0, 0, 2]).await);
    for served in [&first, &second] {
        let overloaded = error(Code::Unavailable, reason::OVERLOADED, &[], Some(Duration::from_millis(100)));
        served.sidecar.claim(Scripted::Error(overloaded));
    }
    let balanced = Balanced::among(&[&first, &second]).await;
    // Both are overloaded once; the third try finds one that is not.
    balanced.deliver(1, "busy").await;
    let mut claims = first.sidecar.claims();
    claims.extend(second.sidecar.claims());
    assert_eq!(claims.len(), 3);
    assert!(claims.iter().all(|claim| claim.claim_id == claims[0].claim_id));
    assert!(first.claims() >= 1 && second.claims() >= 1);
}

/// What a sidecar says that does not reach its store.
fn store_away() -> Status {
    error(Code::Unavailable, reason::STORE_UNAVAILABLE, &[], Some(Duration::from_secs(7)))
}

#[tokio::test]
async fn a_sidecar_that_is_cut_off_from_the_store_costs_no_webhook_and_is_used_again_when_it_is_back() {
    let (cut_off, healthy) = (Served::start([127, 0, 0, 1]).await, Served::start([127, 0, 0, 2]).await);
    let balanced = Balanced::among(&[&cut_off, &healthy]).await;
    cut_off.sidecar.outage(Some(store_away()));
    balanced.deliver(100, "cut_off").await;
    // Claims and marks. A coin toss for each would send it a hundred. Left alone for 200 ms, and twice as long each time, it is
    // asked six times in the first ten seconds, and then once in five.
    let asked = cut_off.sidecar.calls().len();
    assert!((1..=12).contains(&asked), "{asked} of 200");
    // Whatever was asked of both was one and the same claim.
    let mut claims: Vec<_> = healthy.sidecar.claims().into_iter().map(|claim| claim.claim_id).collect();
    assert!(cut_off.sidecar.claims().iter().all(|claim| claims.contains(&claim.claim_id)));
    claims.sort();
    claims.dedup();
    assert_eq!((claims.len(), balanced.application.deliveries().len()), (100, 100), "each event once");

    cut_off.sidecar.outage(None);
    let used = async {
        while cut_off.sidecar.calls().len() == asked {
            balanced.deliver(1, "back").await;
        }
    };
    timeout(PATIENCE, used).await.unwrap();
    let before = cut_off.claims();
    balanced.deliver(40, "shared").await;
    assert!(cut_off.claims() - before >= 4, "{} of 40", cut_off.claims() - before);
}

#[tokio::test]
async fn a_mark_that_one_sidecar_cannot_store_is_stored_by_another_at_once() {
    let sidecar = Sidecar::default();
    let (first, second) = Served::two_playing(&sidecar).await;
    let balanced = Balanced::among(&[&first, &second]).await;
    sidecar.mark(Scripted::Error(store_away()));
    balanced.deliver(1, "marked").await;
    assert_eq!(balanced.metric("oncegate_gateway_sidecar_retries_total"), 1);
    assert_eq!(sidecar.completions().len(), 2);

    // Nobody knows what became of this one: the gateway repeats it, with its own pauses.
    sidecar.mark(unknown());
    balanced.deliver(1, "unknown").await;
    timeout(
        PATIENCE,
        sidecar.until(|calls| calls.iter().filter(|call| matches!(call, Call::Completed(_))).count() == 4),
    )
    .await
    .unwrap();
    assert_eq!(balanced.metric("oncegate_gateway_sidecar_retries_total"), 1);
}

#[tokio::test]
async fn an_outage_of_the_store_is_passed_on_within_the_budget_and_sets_nobody_aside() {
    let (first, second) = (Served::start([127, 0, 0, 1]).await, Served::start([127, 0, 0, 2]).await);
    let balanced = Balanced::among(&[&first, &second]).await;
    for served in [&first, &second] {
        served.sidecar.outage(Some(store_away()));
    }
    let one = deliver(balanced.address, "evt_down").await;
    assert_eq!((one.status, one.header("retry-after")), (503, Some("7")), "{one:?}");
    assert_eq!((first.claims(), second.claims()), (1, 1), "one other was asked");

    let answers = futures_of((0..200).map(|number| deliver(balanced.address, &format!("evt_down_{number}")))).await;
    for answer in &answers {
        assert_eq!((answer.status, answer.header("retry-after")), (503, Some("7")), "{answer:?}");
    }
    let retries = balanced.metric("oncegate_gateway_sidecar_retries_total");
    // Five a second are always permitted, which makes fifty in ten seconds, and a tenth of the calls.
    assert!((2..=75).contains(&retries), "{retries}");
    assert_eq!(first.claims() + second.claims(), 201 + usize::try_from(retries).unwrap());
    assert!(balanced.metric("oncegate_gateway_sidecar_retries_refused_total") > 0);

    for served in [&first, &second] {
        served.sidecar.outage(None);
    }
    let before = [first.claims(), second.claims()];
    balanced.deliver(40, "back").await;
    let [one, other] = [first.claims() - before[0], second.claims() - before[1]];
    assert!(one >= 4 && other >= 4, "{one} {other}");
}

#[tokio::test]
async fn the_only_sidecar_is_not_asked_again_about_a_store_that_is_away() {
    let served = Served::start([127, 0, 0, 1]).await;
    let balanced = Balanced::among(&[&served]).await;
    served.sidecar.claim(Scripted::Error(store_away()));
    let answer = deliver(balanced.address, "evt_down").await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("7")), "{answer:?}");
    assert_eq!(served.claims(), 1);
    balanced.deliver(1, "back").await;
}

#[tokio::test]
async fn g9_a_try_that_may_have_locked_is_not_forgotten_for_a_later_one_that_did_nothing() {
    let sidecar = Sidecar::default();
    let (first, second) = Served::two_playing(&sidecar).await;
    let balanced = Balanced::among(&[&first, &second]).await;
    for (code, reason, tries) in [
        // Asked twice: another sidecar might reach the store, or might not be overloaded.
        (Code::Unavailable, reason::STORE_UNAVAILABLE, 2),
        (Code::Unavailable, reason::OVERLOADED, 2),
        (Code::ResourceExhausted, reason::QUOTA_EXCEEDED, 1),
        (Code::Unauthenticated, reason::UNAUTHENTICATED, 1),
    ] {
        // What a proxy or a mesh says when it has lost the sidecar: the claim may have been granted.
        sidecar.claim(Scripted::Error(Status::unavailable("upstream connect error or disconnect/reset")));
        for _ in 0..tries {
            sidecar.claim(Scripted::Error(error(code, reason, &[], Some(Duration::from_secs(1)))));
        }
        let before = sidecar.claims().len();
        let answer = deliver(balanced.address, &format!("evt_{reason}")).await;
        assert_eq!(answer.status, 200, "{reason}: {answer:?}");
        let claims = sidecar.claims().split_off(before);
        assert_eq!(claims.len(), tries + 2, "{reason}: asked again, and granted");
        assert!(claims.iter().all(|claim| claim.claim_id == claims[0].claim_id), "{reason}: {claims:?}");
    }
    assert_eq!(balanced.application.deliveries().len(), 4, "each event once");
}

#[tokio::test]
async fn retries_stay_within_their_budget_when_everything_fails() {
    let served = Served::start([127, 0, 0, 1]).await;
    let balanced = Balanced::among(&[&served]).await;
    served.stop.cancel();
    let answers = futures_of((0..200).map(|number| deliver(balanced.address, &format!("evt_{number}")))).await;
    assert!(answers.iter().all(|answer| answer.status == 503), "{answers:?}");
    let retries = balanced.metric("oncegate_gateway_sidecar_retries_total");
    // Five a second are always permitted, which makes fifty in ten seconds, and a tenth of the calls.
    assert!((1..=75).contains(&retries), "{retries}");
    assert!(balanced.metric("oncegate_gateway_sidecar_retries_refused_total") > 0);
}

async fn futures_of<T: Send + 'static>(all: impl Iterator<Item = impl Future<Output = T> + Send + 'static>) -> Vec<T> {
    let tasks: Vec<_> = all.map(tokio::spawn).collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.unwrap());
    }
    results
}
