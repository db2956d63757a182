use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use super::*;
use crate::providers::paypal::{
    Environment,
    tests::{Authority, now},
};

const NAME: &str = "messageverificationcerts.paypal.com";

fn url(name: &str) -> CertUrl {
    let text = format!("https://api.paypal.com/v1/notifications/certs/{name}");
    CertUrl::parse(text.as_bytes(), Environment::Live).unwrap()
}

/// A store over answers by name, and how often it asked.
fn store(answer: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> (Arc<Store>, Arc<AtomicUsize>, Authority) {
    let authority = Authority::new();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    let source = Source::Test(Box::new(move |url| {
        count.fetch_add(1, Relaxed);
        let answer = answer(url.name()).map(Bytes::from).ok_or(Lack::Name);
        Box::pin(async move {
            // Long enough that others come meanwhile; the clock of these tests stands still otherwise.
            tokio::time::sleep(Duration::from_millis(10)).await;
            answer
        })
    }));
    let trust = Arc::new(authority.trust(Environment::Live));
    (Store::new(source, trust), asked, authority)
}

/// What the test's answers are made of: set once the authority is known.
type Answer = Arc<std::sync::OnceLock<String>>;

fn good() -> (Arc<Store>, Arc<AtomicUsize>) {
    let leaf = Answer::default();
    let given = leaf.clone();
    let (store, asked, authority) =
        store(move |name| name.starts_with("CERT-").then(|| given.get().cloned()).flatten());
    leaf.set(authority.leaf(NAME, |_| {})).unwrap();
    (store, asked)
}

#[tokio::test(start_paused = true)]
async fn w9_many_who_want_the_same_cause_one_fetch() {
    let (store, asked) = good();
    let wanted = url("CERT-1");
    let all = (0..50).map(|_| {
        let (store, wanted) = (store.clone(), wanted.clone());
        tokio::spawn(async move { store.get(&wanted, now(), None).await.is_ok() })
    });
    for one in all.collect::<Vec<_>>() {
        assert!(one.await.unwrap());
    }
    assert_eq!(asked.load(Relaxed), 1);
    // Whoever asked first may hang up; the fetch goes on.
    let other = url("CERT-2");
    assert!(tokio::time::timeout(Duration::from_millis(1), store.get(&other, now(), None)).await.is_err());
    assert!(store.get(&other, now(), None).await.is_ok());
    assert_eq!(asked.load(Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn w9_a_fetch_that_landed_since_the_caller_looked_is_not_made_again() {
    let (store, asked) = good();
    let wanted = url("CERT-1");
    assert!(store.get(&wanted, now(), None).await.is_ok());
    // Its caller has found nothing kept, and asks for a fetch when another thread's has just ended.
    let mut flight = store.flight(&wanted, now(), None).unwrap();
    assert!(matches!(&*flight.wait_for(Option::is_some).await.unwrap(), Some(Ok(_))));
    assert_eq!(asked.load(Relaxed), 1);
    assert_eq!(store.lock().kept.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn w9_failures_are_remembered_for_seconds_only() {
    let leaf = Answer::default();
    let given = leaf.clone();
    let (store, asked, authority) = store(move |_| Some(given.get().cloned().unwrap_or("<html>".to_owned())));
    for _ in 0..3 {
        let refusal = store.get(&url("CERT-1"), now(), None).await.err();
        assert_eq!(refusal, Some(Refusal::CertUnavailable(Lack::Source)), "a page is PayPal's trouble");
    }
    assert_eq!(asked.load(Relaxed), 1);
    leaf.set(authority.leaf(NAME, |_| {})).unwrap();
    tokio::time::advance(FAILURE_KEPT).await;
    assert!(store.get(&url("CERT-1"), now(), None).await.is_ok());
    assert_eq!(asked.load(Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn an_untrusted_certificate_is_remembered_but_never_kept() {
    let (store, asked, _) = store(|_| Some(Authority::new().leaf(NAME, |_| {})));
    for _ in 0..3 {
        assert_eq!(store.get(&url("CERT-1"), now(), None).await.err(), Some(Refusal::UntrustedCertificate));
    }
    assert_eq!(asked.load(Relaxed), 1);
    assert!(store.lock().kept.is_empty());
}

#[tokio::test(start_paused = true)]
async fn w9_a_stranger_who_varies_the_address_is_bounded_and_evicts_nobody() {
    let (store, asked) = good();
    assert!(store.get(&url("CERT-1"), now(), None).await.is_ok());
    for number in 0..1_000 {
        let refusal = store.get(&url(&format!("x{number}")), now(), None).await.err();
        // Within the bounds and beyond them (W14).
        assert_eq!(refusal, Some(Refusal::CertUnavailable(Lack::Name)), "{number}");
    }
    let fetched = asked.load(Relaxed);
    assert!(fetched <= 12, "{fetched}");
    assert!(store.lock().failures.len() <= FAILURES_MAX);
    assert!(store.lock().flights.is_empty());
    // The genuine one is still there, and another one can be fetched before long.
    assert!(store.get(&url("CERT-1"), now(), None).await.is_ok());
    assert_eq!(asked.load(Relaxed), fetched);
    tokio::time::advance(FETCH_PAUSE).await;
    assert!(store.get(&url("CERT-2"), now(), None).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn w9_a_stranger_who_makes_names_up_leaves_fetches_for_others() {
    let (store, asked) = good();
    let sender = |last: u8| Some(Sender::of([203, 0, 113, last].into()));
    for number in 0..1_000 {
        assert!(store.get(&url(&format!("x{number}")), now(), sender(1)).await.is_err());
    }
    let most = usize::try_from(FETCHES_BURST - LEFT_FOR_OTHERS).unwrap();
    // While his flood lasts, a few more fetches may begin.
    assert!(asked.load(Relaxed) <= most + 1, "{}", asked.load(Relaxed));
    // PayPal's certificate, while that goes on.
    assert!(store.get(&url("CERT-1"), now(), sender(2)).await.is_ok());
    // Even from his own address, within the one a second that is permitted: PayPal may share it.
    tokio::time::advance(2 * FETCH_PAUSE).await;
    assert!(store.get(&url("CERT-2"), now(), sender(1)).await.is_ok());
    // Nor is it remembered for ever, or for many senders.
    for last in 0..=255 {
        store.lock().suspect(sender(last), Instant::now() + SUSPECT_KEPT);
    }
    assert_eq!(store.lock().suspects.len(), SUSPECTS_MAX);
    tokio::time::advance(SUSPECT_KEPT).await;
    assert!(store.lock().may_fetch(sender(255), Instant::now()));
}

#[tokio::test(start_paused = true)]
async fn only_a_handful_is_kept() {
    let (store, _) = good();
    for number in 0..20 {
        assert!(store.get(&url(&format!("CERT-{number}")), now(), None).await.is_ok(), "{number}");
        tokio::time::advance(FETCH_PAUSE).await;
    }
    assert_eq!(store.lock().kept.len(), KEPT_MAX);
}

#[tokio::test(start_paused = true)]
async fn trust_ends_with_the_certificate() {
    let (store, asked) = good();
    assert!(store.get(&url("CERT-1"), now(), None).await.is_ok());
    let next_year = now() + Duration::from_secs(365 * 24 * 60 * 60);
    assert_eq!(store.get(&url("CERT-1"), next_year, None).await.err(), Some(Refusal::UntrustedCertificate));
    assert_eq!(asked.load(Relaxed), 2, "asked again, for there might be another one");
    assert!(store.lock().kept.is_empty());
}

#[tokio::test]
async fn a_directory_is_all_that_is_asked_where_there_is_one() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("CERT-1"), authority.leaf(NAME, |_| {})).unwrap();
    std::fs::write(directory.path().join("CERT-2.pem"), authority.leaf(NAME, |_| {})).unwrap();
    std::fs::write(directory.path().join("CERT-3"), vec![b'x'; BYTES_MAX + 1]).unwrap();
    let trust = Arc::new(authority.trust(Environment::Live));
    let store = Store::new(Source::Directory(directory.path().to_owned()), trust);
    assert!(store.get(&url("CERT-1"), now(), None).await.is_ok());
    assert!(store.get(&url("CERT-2"), now(), None).await.is_ok());
    // A name that does not exist counts against its sender; a file that cannot be used does not.
    let long = "x".repeat(400);
    for (name, lack) in [("CERT-3", Lack::Source), ("CERT-4", Lack::Name), ("pem", Lack::Name), (&long, Lack::Name)] {
        let refusal = store.get(&url(name), now(), None).await.err();
        assert_eq!(refusal, Some(Refusal::CertUnavailable(lack)), "{name}");
    }
}

#[tokio::test]
async fn strangers_cannot_use_up_how_often_a_directory_is_read() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("CERT-1"), authority.leaf(NAME, |_| {})).unwrap();
    let trust = Arc::new(authority.trust(Environment::Live));
    let store = Store::new(Source::Directory(directory.path().to_owned()), trust);
    for number in 0..1_000 {
        assert!(store.get(&url(&format!("x{number}")), now(), None).await.is_err());
    }
    assert!(store.lock().failures.len() <= FAILURES_MAX);
    assert!(store.get(&url("CERT-1"), now(), None).await.is_ok());
}

#[tokio::test]
async fn the_end_of_what_is_in_the_directory_is_that_of_the_last_of_paypals() {
    let authority = Authority::new();
    let directory = tempfile::tempdir().unwrap();
    let at = |year: i32| u64::try_from(rcgen::date_time_ymd(year, 1, 1).unix_timestamp()).ok();
    let put = |file: &str, name: &str, year: i32| {
        let leaf = authority.leaf(name, |params| params.not_after = rcgen::date_time_ymd(year, 1, 1));
        std::fs::write(directory.path().join(file), leaf).unwrap();
    };
    put("of-somebody", "elsewhere.example", 2050);
    std::fs::write(directory.path().join("README"), "no certificate").unwrap();
    std::fs::create_dir(directory.path().join("older")).unwrap();
    let source = Source::Directory(directory.path().to_owned());
    let store = Store::new(source, Arc::new(authority.trust(Environment::Live)));
    assert_eq!(store.directory_end(), None);
    // Even for one that has expired: an operator has to hear of that.
    for (file, year) in [("CERT-1", 2026), ("CERT-2.pem", 2045)] {
        put(file, NAME, year);
        store.look();
        assert_eq!(store.directory_end(), at(year));
    }
    std::fs::remove_file(directory.path().join("CERT-2.pem")).unwrap();
    store.look();
    assert_eq!(store.directory_end(), at(2026));
}
