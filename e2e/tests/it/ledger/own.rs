//! What a sidecar knows of its own grants, and expects of the next claims, is never what is answered where it is not so any more.

use futures::future::join_all;
use oncegate_e2e::postgres::Database;
use oncegate_sidecar::{
    event::{Claim, Decision, Ending, Event, Lock, Mark, Micros, Refusal, State},
    ledger::{Error, Ledger, postgres::PostgresLedger},
};

use super::{HOUR, claim, comparable, completion, connected, extension, key, mark, result};

struct Two {
    first: PostgresLedger,
    second: PostgresLedger,
    database: Database,
}

async fn two() -> Two {
    let database = Database::create().await.unwrap();
    Two { first: connected(&database).await, second: connected(&database).await, database }
}

impl Two {
    async fn close(self) {
        self.first.close().await;
        self.second.close().await;
    }
}

async fn acquire(ledger: &PostgresLedger, claim: Claim) -> Lock {
    match ledger.claim(claim).await.unwrap().decision {
        Decision::Acquired(lock) => lock,
        other => panic!("not granted: {other:?}"),
    }
}

async fn kept(ledger: &PostgresLedger, event_id: &str) -> Event {
    ledger.history_of(key(event_id)).await.unwrap().expect("it was granted").event
}

/// A completion of an own grant finds its row by ranges of time and number: rows of one moment would all be passed over for each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_that_are_granted_together_are_created_one_after_another() {
    let two = two().await;
    let grant = async |ids: std::ops::Range<u32>| {
        join_all(ids.map(async |number| two.first.claim(claim(&key(&format!("evt_{number:03}")), "a")).await.unwrap()))
            .await
    };
    // New events alone, as is expected of the first ones; then both, in equal parts, for as long as it takes to expect that.
    grant(0..100).await;
    for round in 1..=20 {
        grant(round * 50..(round + 2) * 50).await;
    }
    let moments =
        two.database.query("select count(*) || ' ' || count(distinct create_time) from payment_webhook_events");
    assert_eq!(moments.await.unwrap(), "1100 1100");
    two.close().await;
}

// I2
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_takeover_by_another_sidecar_revokes_what_this_one_granted() {
    let two = two().await;
    let id = |number: usize| format!("evt_{number}");
    let mut locks = Vec::new();
    for number in 0..24 {
        let expired = Claim { lock_duration: Micros::ZERO, ..claim(&key(&id(number)), "a") };
        locks.push(acquire(&two.first, expired).await);
        if number % 2 == 0 {
            let taken = acquire(&two.second, claim(&key(&id(number)), "b")).await;
            assert!(taken.fencing_token > locks[number].fencing_token);
        }
    }
    let complete = async |number: usize| two.first.mark(completion(&key(&id(number)), &locks[number])).await;
    // Alone, then many at once.
    let mut answers = vec![complete(0).await, complete(1).await];
    answers.extend(join_all((2..24).map(complete)).await);
    for (number, answer) in answers.into_iter().enumerate() {
        let event = kept(&two.second, &id(number)).await;
        match answer {
            Ok(marked) => {
                assert_eq!((number % 2, marked.event.state, event.state), (1, State::Completed, State::Completed))
            }
            Err(Error::Refused(Refusal::LockLost { .. })) => {
                assert_eq!((number % 2, event.state), (0, State::Processing))
            }
            Err(other) => panic!("{number}: {other}"),
        }
    }
    two.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn completions_of_one_batch_tell_all_that_stands_in_their_events() {
    let two = two().await;
    let mut marks = Vec::new();
    for number in 0..24_u8 {
        let key = key(&format!("evt_{number}"));
        let given = Claim {
            fingerprint: Some([number; 32]),
            payload_digest: Some([7; 32]),
            metadata: Some(r#"{"amount":"4200"}"#.into()),
            ..claim(&key, "a")
        };
        let lock = acquire(&two.first, given).await;
        // What others change while it is processed.
        two.second.extend(extension(&key, &lock, Micros(HOUR.0 + 1_000_000 * i64::from(number)))).await.unwrap();
        for _ in 0..number % 3 {
            let again = two.second.claim(claim(&key, "b")).await.unwrap().decision;
            assert!(matches!(again, Decision::InProgress { .. }), "{again:?}");
        }
        let metadata = (number % 2 == 0).then(|| format!(r#"{{"booking":{number}}}"#));
        let result = (number % 4 < 2).then(|| result(201, &[number]));
        marks.push(Mark { result, ..mark(&key, &lock, Ending::Completed { metadata }) });
    }
    for number in 0..24_i64 {
        oncegate_e2e::eventually("duplicates are counted", async || {
            (kept(&two.first, &format!("evt_{number}")).await.duplicate_count == number % 3).then_some(())
        })
        .await;
    }
    // Alone, then many at once, new events among them.
    let last = marks.pop().expect("there are some");
    let mut answers = vec![two.first.mark(last).await];
    let (at_once, _) = futures::join!(
        join_all(marks.into_iter().map(|mark| two.first.mark(mark))),
        join_all((0..9).map(|number| acquire(&two.first, claim(&key(&format!("new_{number}")), "a")))),
    );
    answers.extend(at_once);
    assert_eq!(answers.len(), 24);
    for answer in answers {
        let (marked, of) =
            (answer.unwrap(), |event: &Event| (event.duplicate_count, event.mismatch_count, event.last_mismatch_time));
        assert!(!marked.repeated);
        let kept = kept(&two.second, &marked.event.key.event_id).await;
        assert_eq!(comparable(&marked.event), comparable(&kept));
        assert_eq!(of(&marked.event), of(&kept));
    }
    two.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_events_are_granted_where_only_known_ones_were_expected() {
    let two = two().await;
    let known = key("known");
    let lock = acquire(&two.first, claim(&known, "a")).await;
    two.first.mark(completion(&known, &lock)).await.unwrap();
    // Until nothing else is expected.
    for _ in 0..32 {
        assert_eq!(two.first.claim(claim(&known, "b")).await.unwrap().decision, Decision::AlreadyCompleted);
    }
    for round in 0..4 {
        let claims = (0..16).map(async |number| {
            let again = two.first.claim(claim(&known, &format!("again_{number}"))).await.unwrap();
            assert_eq!(again.decision, Decision::AlreadyCompleted);
            acquire(&two.first, claim(&key(&format!("new_{round}_{number}")), "a")).await
        });
        assert_eq!(join_all(claims).await.len(), 16);
    }
    two.close().await;
}
