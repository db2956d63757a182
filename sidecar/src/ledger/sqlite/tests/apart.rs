//! Batches that are taken apart, so that one item does not fail the others (L3): a bad one, or one on a damaged page.

use oncegate_runtime::metrics::Page as Metrics;

use super::*;

#[tokio::test]
async fn one_bad_item_does_not_fail_the_others() {
    let (_directory, path) = file();
    let (_queue, mut writer) = writer(&path);
    writer
        .conn
        .execute_batch(
            "create trigger bad before insert on payment_webhook_events when new.event_id = 'bad'
             begin select raise(abort, 'no such events'); end",
        )
        .unwrap();
    let mut answers = Vec::new();
    let mut calls = Vec::new();
    for number in 0..20 {
        let (reply, answer) = Reply::channel();
        let name = if number == 7 { "bad".to_owned() } else { format!("evt_{number}") };
        calls.push(Op::Claim(claim(&name, "claim"), reply));
        answers.push(answer);
    }
    writer.calls(calls);
    let mut last = FencingToken::NONE;
    for (number, mut answer) in answers.into_iter().enumerate() {
        match answer.try_recv().unwrap() {
            Ok(claimed) => {
                let Decision::Acquired(lock) = claimed.decision else { panic!("{claimed:?}") };
                assert!(lock.fencing_token > last, "in the order they came");
                last = lock.fencing_token;
            }
            Err(error) => assert!(number == 7 && matches!(error, Error::Internal(_)), "{number}: {error}"),
        }
    }
    let counted: i64 =
        writer.conn.query_row("select sum(processing) from payment_webhook_counts", [], |row| row.get(0)).unwrap();
    assert_eq!(counted, 19, "each once, though most were done twice");
}

/// The size of the file's pages.
fn page_size(file: &[u8]) -> usize {
    usize::from(u16::from_be_bytes([file[16], file[17]]))
}

/// Completes events, of which one has a result that takes many pages, and breaks the chain of these.
async fn damaged_event(path: &Path, events: usize, damaged: usize) {
    let ledger = SqliteLedger::open(path, &settings()).unwrap();
    for number in 0..events {
        let event_id = format!("evt_{number}");
        let lock = acquire(&ledger, &event_id).await;
        let result = StoredResult { code: 200, body: vec![b'A'; 60_000].into(), content_type: String::new() };
        let result = (number == damaged).then_some(result);
        ledger.mark(Mark { result, ..completion(&event_id, lock.fencing_token) }).await.unwrap();
    }
    ledger.close().await;
    let mut file = fs::read(path).unwrap();
    let size = page_size(&file);
    let is_of_the_result = |page: usize| file[page + 4..page + size].iter().all(|byte| *byte == b'A');
    let pages: Vec<usize> = (0..file.len()).step_by(size).filter(|page| is_of_the_result(*page)).collect();
    assert!(pages.len() > 10, "{pages:?}");
    // Where the number of the next page stands.
    file[pages[3]..][..4].copy_from_slice(&0x7fff_ffff_u32.to_be_bytes());
    fs::write(path, file).unwrap();
}

/// Overwrites the root of the index by which events are found. Returns the file as it was.
async fn damaged_file(path: &Path) -> Vec<u8> {
    let ledger = SqliteLedger::open(path, &settings()).unwrap();
    acquire(&ledger, "evt").await;
    ledger.close().await;
    let query = "select rootpage from sqlite_schema where name = 'sqlite_autoindex_payment_webhook_events_1'";
    let root: u32 = shell(path).query_row(query, [], |row| row.get(0)).unwrap();
    let before = fs::read(path).unwrap();
    let (mut file, size) = (before.clone(), page_size(&before));
    file[(root as usize - 1) * size..][..size].fill(0xff);
    fs::write(path, file).unwrap();
    before
}

/// Claims in one batch, each by a caller of its own.
fn ask(writer: &mut Writer, event_ids: &[String], caller: &str) -> Vec<Result<Decision, Error>> {
    let (calls, answers): (Vec<_>, Vec<_>) = event_ids
        .iter()
        .map(|event_id| {
            let (reply, answer) = Reply::channel();
            (Op::Claim(claim(event_id, caller), reply), answer)
        })
        .unzip();
    writer.calls(calls);
    answers.into_iter().map(|mut answer| answer.try_recv().unwrap().map(|claimed| claimed.decision)).collect()
}

/// How many transactions were given up for damage that was not looked for any further.
fn damaged_transactions(writer: &Writer) -> u64 {
    let mut page = Metrics::new();
    writer.metrics.render(&mut page, true, 0);
    let page = page.finish();
    let line = page.lines().find_map(|line| line.strip_prefix("oncegate_ledger_failures_total{kind=\"damaged\"} "));
    line.unwrap().parse().unwrap()
}

#[tokio::test]
async fn only_the_callers_of_an_event_on_a_damaged_page_are_told() {
    const DAMAGED: usize = 7;
    let (_directory, path) = file();
    damaged_event(&path, 20, DAMAGED).await;
    let (_queue, mut writer) = writer(&path);
    let known: Vec<String> = (0..20).map(|number| format!("evt_{number}")).collect();
    for round in 0..3 {
        // Of duplicates alone, which a transaction reads that may not write, and with others, one that may.
        let mut new: Vec<String> = (0..20).map(|number| format!("evt_new_{round}_{number}")).collect();
        new[DAMAGED] = known[DAMAGED].clone();
        for (event_ids, is_new) in [(&known, false), (&new, true)] {
            for (number, answer) in ask(&mut writer, event_ids, &format!("caller_{round}")).into_iter().enumerate() {
                match answer {
                    Err(Error::Internal(told)) if number == DAMAGED => {
                        assert!(told.ends_with("with code 11"), "{told}")
                    }
                    Ok(Decision::AlreadyCompleted) if number != DAMAGED && !is_new => {}
                    Ok(Decision::Acquired(_)) if number != DAMAGED && is_new => {}
                    other => panic!("{round}, {number}: {other:?}"),
                }
            }
        }
    }
    assert_eq!(damaged_transactions(&writer), 6);
    // Its counts are lost, and not those of the others: answers from a cache are counted of events that were not read.
    writer.tally.duplicate(&key(&known[DAMAGED]), None);
    assert!(writer.flush() && writer.tally.is_empty());
    let counted: i64 =
        writer.conn.query_row("select sum(duplicates) from payment_webhook_counts", [], |row| row.get(0)).unwrap();
    assert_eq!(counted, 3 * 19);
    // Alone, it may be the only one that is damaged, and then no longer, until another is read.
    for told in ["granted before", "damaged", "damaged", "unavailable", "granted before", "damaged"] {
        let event_id = if told == "granted before" { "evt_new_0_1" } else { "evt_7" };
        let answer = ask(&mut writer, &[event_id.to_owned()], "alone").remove(0);
        let is_told = match &answer {
            Ok(Decision::InProgress { .. }) => told == "granted before",
            Err(Error::Internal(_)) => told == "damaged",
            Err(Error::Unavailable { .. }) => told == "unavailable",
            Ok(_) | Err(_) => false,
        };
        assert!(is_told, "{told}: {answer:?}");
    }
    drop(writer);
    // A listing is not taken apart.
    let ledger = SqliteLedger::open(&path, &settings()).unwrap();
    assert!(matches!(ledger.history_of(key("evt_7")).await, Err(Error::Unavailable { .. })));
    assert!(ledger.history_of(key("evt_1")).await.unwrap().is_some());
    ledger.close().await;
}

#[tokio::test]
async fn a_file_of_which_nothing_can_be_read_is_unavailable() {
    let (_directory, path) = file();
    let before = damaged_file(&path).await;
    let (queue, mut writer) = writer(&path);
    let event_ids: Vec<String> = (0..64).map(|number| format!("evt_{number}")).collect();
    for answer in ask(&mut writer, &event_ids, "claim") {
        assert!(matches!(answer, Err(Error::Unavailable { .. })), "{answer:?}");
    }
    assert_eq!(damaged_transactions(&writer), 16, "the rest is not tried");
    for number in 0..6 {
        let answer = ask(&mut writer, &event_ids[..1], "claim").remove(0);
        let told = matches!(answer, Err(Error::Unavailable { .. })) || number < 2 && answer.is_err();
        assert!(told, "{number}: {answer:?}");
    }
    // What could not be counted is kept for when it can.
    for event_id in &event_ids {
        writer.tally.duplicate(&key(event_id), None);
    }
    assert!(!writer.flush());
    assert_eq!((damaged_transactions(&writer), writer.tally.len()), (16 + 6 + 16, 64));
    drop((queue, writer));
    fs::write(&path, before).unwrap();
    let (_queue, mut writer) = self::writer(&path);
    let answers = ask(&mut writer, &event_ids, "claim");
    assert!(answers.iter().all(|answer| matches!(answer, Ok(Decision::Acquired(_)))), "{answers:?}");
}
