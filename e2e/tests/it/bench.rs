//! `oncegate bench`: it finds nothing wrong where nothing is, and finds it where it is.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, Result};
use oncegate_api::v1::{
    self, Decision,
    idempotency_service_server::{IdempotencyService, IdempotencyServiceServer},
};
use oncegate_e2e::{
    eventually,
    program::{Finished, Oncegate},
    proxy::Proxy,
};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

use crate::setup::{Everything, Ledger, SECRET};

/// Short, and enough to be wrong in.
const SHORT: [&str; 9] =
    ["bench", "--json", "--duration", "300ms", "--warm-up", "100ms", "--keys", "20", "--concurrency"];

async fn bench(url: &str, arguments: &[&str]) -> Result<Finished> {
    let directory = tempfile::tempdir()?;
    let arguments = SHORT.into_iter().chain(["16", "--url", url]).chain(arguments.iter().copied());
    Oncegate::new(directory.path(), arguments)?.env("STRIPE_WEBHOOK_SECRET", SECRET).run().await
}

fn report(finished: &Finished) -> Result<serde_json::Value> {
    serde_json::from_str(&finished.stdout).with_context(|| format!("no JSON: {finished}"))
}

#[tokio::test]
async fn every_workload_over_grpc_is_answered_rightly() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let url = format!("http://{}", everything.sidecar);
    for (workload, operations) in [
        ("cycle", &["cycle", "check_and_lock", "mark_completed"][..]),
        ("claims", &["check_and_lock"]),
        ("duplicates", &["duplicate"]),
        ("storm", &["storm"]),
        ("mixed", &["cycle", "check_and_lock", "mark_completed", "duplicate"]),
    ] {
        let finished = bench(&url, &["--workload", workload, "--threads", "2"]).await?;
        assert_eq!(finished.code, Some(0), "{workload}: {finished}");
        let report = report(&finished)?;
        let lines = report["operations"].as_array().context("operations")?;
        let measured: Vec<&str> = lines.iter().filter_map(|line| line["operation"].as_str()).collect();
        assert_eq!(measured, operations, "{workload}");
        for line in lines {
            assert!(line["count"].as_u64() > Some(0) && line["p50_ms"].as_f64() <= line["max_ms"].as_f64(), "{line}");
        }
        let correctness = &report["correctness"];
        assert_eq!(correctness["ok"], true, "{workload}: {correctness}");
        assert_eq!(correctness["completions_acknowledged"], correctness["completions_checked"], "{workload}");
        assert_eq!(correctness["completions_left_out"], 0, "{workload}");
        // All but the one of the first call: claims completes what it has locked, after the measurement.
        assert!(correctness["completions_acknowledged"].as_u64() > Some(1), "{workload}");
        assert_eq!(report["interrupted"], false, "{workload}");
        assert_eq!(correctness["storms"].as_u64() > Some(0), workload == "storm", "{workload}");
        assert_eq!(report["errors"], serde_json::json!({}), "{workload}");
    }
    // What claims has locked as well: a cleanup takes nothing that is being processed.
    assert_eq!(being_processed(&everything).await?, 0);
    let finished = bench(&url, &["--workload", "claims", "--leave-locked"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert!(being_processed(&everything).await? > 0);
    Ok(())
}

/// How many events of the load are being processed.
async fn being_processed(everything: &Everything) -> Result<usize> {
    let request = v1::HistoryRequest {
        tenant: "bench".into(),
        states: vec![v1::State::Processing.into()],
        ..v1::HistoryRequest::default()
    };
    Ok(everything.client().await?.history(request).await?.into_inner().events.len())
}

#[tokio::test]
async fn the_sidecar_is_found_as_by_the_other_commands() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let directory = tempfile::tempdir()?;
    let command = |arguments: &[&'static str]| {
        let arguments = SHORT.into_iter().chain(["4"]).chain(arguments.iter().copied());
        Oncegate::new(directory.path(), arguments)
    };
    let finished = command(&[])?.env("SIDECAR_URL", format!("http://{}", everything.sidecar)).run().await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    assert_eq!(report(&finished)?["url"], format!("http://{}", everything.sidecar));
    let finished = command(&[])?.env("SIDECAR_URL", "ftp://sidecar").run().await?;
    assert_eq!(finished.code, Some(2), "{finished}");
    assert!(finished.stderr.contains("SIDECAR_URL: ftp://sidecar"), "{finished}");
    let finished = command(&["--url", "ftp://sidecar"])?.run().await?;
    assert!(finished.stderr.contains("--url: ftp://sidecar"), "{finished}");
    Ok(())
}

#[tokio::test]
async fn a_load_whose_connection_is_broken_goes_on_over_another_one() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let proxy = Proxy::start(everything.sidecar).await?;
    let url = format!("http://{}", proxy.address());
    let breaks = async {
        eventually("the load runs", async || (proxy.requested() > 10_000).then_some(())).await;
        let made = proxy.connections();
        proxy.reset();
        made
    };
    let (finished, made) = tokio::join!(bench(&url, &["--workload", "cycle"]), breaks);
    let finished = finished?;
    assert_eq!(finished.code, Some(0), "{finished}");
    let report = report(&finished)?;
    assert_eq!(report["correctness"]["ok"], true, "{report}");
    assert!(report["operations"][0]["count"].as_u64() > Some(0), "{report}");
    assert!(proxy.connections() > made, "{report}");
    let errors = report["errors"].as_object().context("errors")?;
    assert!(errors.keys().all(|code| code == "Unavailable, no reason given"), "{report}");
    Ok(())
}

#[tokio::test]
async fn every_workload_over_http_is_answered_rightly() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let url = format!("http://{}", everything.gateway);
    let mut acknowledged = 0;
    for workload in ["cycle", "duplicates", "storm", "mixed"] {
        let finished = bench(&url, &["--target", "http", "--workload", workload]).await?;
        assert_eq!(finished.code, Some(0), "{workload}: {finished}");
        let correctness = &report(&finished)?["correctness"];
        assert_eq!(correctness["ok"], true, "{workload}: {correctness}");
        acknowledged += correctness["completions_acknowledged"].as_u64().unwrap_or_default();
    }
    // Each of them was delivered, and nothing else was.
    assert_eq!(everything.upstream.requests().len() as u64, acknowledged);
    Ok(())
}

#[tokio::test]
async fn an_event_that_is_granted_twice_is_found() -> Result<()> {
    let careless = serve(Wrong::GrantsTwice).await?;
    for workload in ["duplicates", "storm", "mixed", "cycle"] {
        let finished = bench(&careless, &["--workload", workload]).await?;
        assert_eq!(finished.code, Some(1), "{workload}: {finished}");
        let correctness = &report(&finished)?["correctness"];
        assert_eq!(correctness["ok"], false, "{workload}: {correctness}");
        assert!(correctness["double_grants"].as_u64() > Some(0), "{workload}: {correctness}");
    }
    Ok(())
}

#[tokio::test]
async fn events_that_were_not_prepared_are_no_double_grants() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let url = format!("http://{}", everything.sidecar);
    for workload in ["duplicates", "mixed"] {
        let finished = bench(&url, &["--workload", workload, "--run", workload, "--prepared"]).await?;
        assert_eq!(finished.code, Some(1), "{workload}: {finished}");
        let correctness = &report(&finished)?["correctness"];
        assert_eq!((&correctness["double_grants"], &correctness["ok"]), (&0.into(), &false.into()), "{correctness}");
        let not_prepared = correctness["not_prepared"].as_u64();
        assert!((Some(1)..=Some(20)).contains(&not_prepared), "each counts once: {correctness}");
        assert!(finished.stderr.contains("these events were not prepared"), "{workload}: {finished}");
    }
    let finished = bench(&url, &["--workload", "duplicates", "--run", "before"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    let finished = bench(&url, &["--workload", "duplicates", "--run", "before", "--prepared"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    // A service that grants again what it has granted is found out all the same.
    let careless = serve(Wrong::GrantsTwice).await?;
    let finished = bench(&careless, &["--workload", "duplicates", "--run", "before", "--prepared"]).await?;
    assert_eq!(finished.code, Some(1), "{finished}");
    let correctness = &report(&finished)?["correctness"];
    assert!(correctness["double_grants"].as_u64() > Some(0), "{correctness}");
    Ok(())
}

#[tokio::test]
async fn a_completion_that_is_lost_is_found() -> Result<()> {
    let forgetful = serve(Wrong::ForgetsCompletions).await?;
    let finished = bench(&forgetful, &["--workload", "cycle"]).await?;
    assert_eq!(finished.code, Some(1), "{finished}");
    let correctness = &report(&finished)?["correctness"];
    assert!(correctness["lost"].as_u64() > Some(0), "{correctness}");
    assert_eq!(correctness["double_grants"], 0, "{correctness}");
    let finished = bench(&forgetful, &["--workload", "storm"]).await?;
    assert_eq!(finished.code, Some(1), "{finished}");
    Ok(())
}

#[tokio::test]
async fn a_completion_that_is_lost_late_is_found_in_a_sample() -> Result<()> {
    let forgetful = serve(Wrong::ForgetsLater).await?;
    // One for each caller: were it its first one, it would be among those that are remembered.
    let finished = bench(&forgetful, &["--workload", "cycle", "--check-max", "16"]).await?;
    assert_eq!(finished.code, Some(1), "{finished}");
    let correctness = &report(&finished)?["correctness"];
    assert!(correctness["lost"].as_u64() > Some(0), "{correctness}");
    Ok(())
}

#[tokio::test]
async fn how_many_completions_were_left_out_is_said() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let url = format!("http://{}", everything.sidecar);
    let finished = bench(&url, &["--workload", "cycle", "--check-max", "16"]).await?;
    assert_eq!(finished.code, Some(0), "{finished}");
    let correctness = &report(&finished)?["correctness"];
    assert_eq!(correctness["completions_checked"], 16, "one for each caller: {correctness}");
    let left_out = correctness["completions_left_out"].as_u64();
    assert!(left_out > Some(0), "{correctness}");
    assert_eq!(correctness["completions_acknowledged"].as_u64(), left_out.map(|count| count + 16), "{correctness}");
    assert_eq!(
        (&correctness["ok"], &correctness["completions_not_checked"]),
        (&true.into(), &0.into()),
        "{correctness}"
    );
    // People are told as well; and if none was, there is nothing to say.
    let directory = tempfile::tempdir()?;
    for (check_max, said) in [("16", true), ("1000000", false)] {
        let arguments = SHORT.into_iter().filter(|argument| *argument != "--json");
        let arguments = arguments.chain(["16", "--url", &url, "--check-max", check_max]);
        let finished = Oncegate::new(directory.path(), arguments)?.run().await?;
        assert_eq!(finished.code, Some(0), "{finished}");
        assert!(finished.stdout.contains("correct: "), "{finished}");
        assert_eq!(finished.stdout.contains("--check-max left out "), said, "{finished}");
    }
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_asked_for_again_is_not_called_correct() -> Result<()> {
    let gone = serve(Wrong::GoesAway).await?;
    let finished = bench(&gone, &["--workload", "cycle"]).await?;
    assert_eq!(finished.code, Some(1), "{finished}");
    let report = report(&finished)?;
    let correctness = &report["correctness"];
    assert_eq!(correctness["completions_not_checked"], correctness["completions_acknowledged"], "{correctness}");
    assert!(
        correctness["completions_acknowledged"].as_u64() > Some(16),
        "one caller's tries stand for the rest of its own"
    );
    assert_eq!((&correctness["ok"], &correctness["lost"]), (&false.into(), &0.into()), "{correctness}");
    assert!(report["errors"]["not asked for again: Unavailable, no reason given"].as_u64() > Some(0), "{report}");
    // People are told what it is; that the service is wrong, nobody knows.
    let gone = serve(Wrong::GoesAway).await?;
    let directory = tempfile::tempdir()?;
    let arguments = SHORT.into_iter().filter(|argument| *argument != "--json").chain(["16", "--url", &gone]);
    let finished = Oncegate::new(directory.path(), arguments)?.run().await?;
    assert_eq!(finished.code, Some(1), "{finished}");
    assert!(finished.stdout.contains("could not be checked: "), "{finished}");
    assert!(!finished.stdout.contains("CORRECT"), "{finished}");
    Ok(())
}

#[tokio::test]
async fn what_cannot_work_is_found_by_the_first_call() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let [sidecar, gateway] = [everything.sidecar, everything.gateway].map(|address| format!("http://{address}"));
    // It accepts connections, and says nothing.
    let accepts_only = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let silent = format!("http://{}", accepts_only.local_addr()?);
    let directory = tempfile::tempdir()?;
    // A minute is all that a command may take here.
    let long = ["bench", "--duration", "1h", "--url"];
    for (url, more, code, said) in [
        // Nobody is there, or somebody who speaks another protocol.
        (&silent, &["--timeout", "50ms"][..], 3, "the first call failed, and nothing was measured: no answer in time"),
        (&silent, &["--timeout", "50ms", "--target", "http"], 3, "no answer in time"),
        (&gateway, &["--workload", "cycle"], 3, "the first call failed"),
        (&sidecar, &["--target", "http"], 3, "the first call failed"),
        // They are there, and refuse.
        (&gateway, &["--target", "http", "--secret", "whsec_wrong"], 1, "the first call failed"),
        (&sidecar, &["--provider", "No Such", "--workload", "duplicates"], 1, "InvalidArgument INVALID_FIELD"),
    ] {
        let arguments = [&long[..], &[url.as_str()], more].concat();
        let command = Oncegate::new(directory.path(), arguments)?.env("STRIPE_WEBHOOK_SECRET", SECRET);
        let finished = command.run().await?;
        assert_eq!(finished.code, Some(code), "{more:?}: {finished}");
        assert!(finished.stderr.contains(said), "{more:?}: {finished}");
    }
    Ok(())
}

#[tokio::test]
async fn a_name_that_was_used_before_is_said_to_be() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    for (target, address) in [("grpc", everything.sidecar), ("http", everything.gateway)] {
        let url = format!("http://{address}");
        for workload in ["cycle", "duplicates"] {
            let run = format!("{target}{workload}");
            let arguments = ["--target", target, "--workload", workload, "--run", &run];
            let finished = bench(&url, &arguments).await?;
            assert_eq!(finished.code, Some(0), "{finished}");
            let finished = bench(&url, &arguments).await?;
            assert_eq!(finished.code, Some(1), "{finished}");
            assert!(finished.stderr.contains("--run: a run of this name has been before"), "{finished}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_run_that_is_interrupted_says_so() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let url = format!("http://{}", everything.sidecar);
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let directory = tempfile::tempdir()?;
        let arguments = ["bench", "--json", "--warm-up", "0s", "--duration", "1h", "--progress", "20ms", "--url", &url];
        let mut running = Oncegate::new(directory.path(), arguments)?.start()?;
        // Nobody looks at a terminal here: lines tell how far it is.
        running.line_where("something was measured", |line| line.contains(" s left")).await?;
        running.signal(signal)?;
        let finished = running.finish(Duration::from_secs(30)).await?;
        assert_eq!(finished.code, Some(code), "{finished}");
        let report = report(&finished)?;
        assert_eq!((&report["interrupted"], &report["correctness"]["ok"]), (&true.into(), &true.into()), "{report}");
        assert!(finished.stderr.contains("cut the measurement short"), "{finished}");
    }
    Ok(())
}

#[tokio::test]
async fn a_terminal_shows_how_far_it_is_whatever_becomes_of_the_result() -> Result<()> {
    let everything = Everything::start(Ledger::Sqlite).await?;
    let url = format!("http://{}", everything.sidecar);
    let directory = tempfile::tempdir()?;
    // The line that changes is removed at the end. A dumb terminal cannot change one, and gets one after the other.
    for (terminal, changes) in [("xterm", true), ("dumb", false)] {
        let arguments =
            ["bench", "--json", "--duration", "3s", "--warm-up", "0s", "--progress", "100ms", "--url", &url];
        let finished = Oncegate::new(directory.path(), arguments)?.on_terminal(terminal).run().await?;
        assert_eq!(finished.code, Some(0), "{terminal}: {finished}");
        let shown = &finished.stderr;
        assert!(shown.contains(" a second, ") && shown.contains(" s left"), "{terminal}: {shown:?}");
        assert_eq!(shown.trim_end_matches('\n').ends_with("\x1b[2K"), changes, "{terminal}: {shown:?}");
        assert_eq!(shown.contains('\x1b'), changes, "{terminal}: {shown:?}");
        let result = report(&finished)?;
        assert_eq!(result["correctness"]["ok"], true, "{result}");
    }
    Ok(())
}

#[tokio::test]
async fn options_that_mean_nothing_or_too_much_are_refused_by_name() -> Result<()> {
    // Before anybody is called: nobody is there.
    let url = "http://127.0.0.1:1";
    for (arguments, said) in [
        (
            &["--target", "http", "--connections", "4"][..],
            "--connections: 4 given: over HTTP each caller has a connection of its own; use --concurrency",
        ),
        (
            &["--target", "http", "--provider", "paypal"],
            "--provider: \"paypal\" given: over HTTP the webhooks are Stripe's",
        ),
        (&["--body-size", "1KiB"], "--body-size: 1024 bytes given: only webhooks have one; use --target http"),
        (&["--duplicate-share", "0.5"], "--duplicate-share: 0.5 given: use it with --workload mixed"),
        (&["--leave-locked"], "--leave-locked: given: use it with --workload claims"),
        (&["--run", "a", "--prepared", "--workload", "storm"], "--prepared: given: use it with --workload duplicates"),
        (&["--warm-up", "721h"], "--warm-up: 30days 1h given, permitted is 0s to 30days"),
        (&["--duration", "721h"], "--duration: 30days 1h given, permitted is 100ms to 30days"),
    ] {
        let directory = tempfile::tempdir()?;
        let command = ["bench", "--url", url].into_iter().chain(arguments.iter().copied());
        let finished = Oncegate::new(directory.path(), command)?.env("STRIPE_WEBHOOK_SECRET", SECRET).run().await?;
        assert_eq!(finished.code, Some(2), "{arguments:?}: {finished}");
        assert!(finished.stderr.contains(said), "{arguments:?}: {finished}");
    }
    // They are as good as any where they mean something, and nobody is reached.
    for arguments in [
        &["--connections", "4"][..],
        &["--provider", "paypal"],
        &["--target", "http", "--body-size", "1KiB"],
        &["--workload", "mixed", "--duplicate-share", "0.5"],
        &["--workload", "claims", "--leave-locked"],
        &["--workload", "mixed", "--run", "a", "--prepared"],
        &["--warm-up", "0s"],
        &["--warm-up", "30d"],
    ] {
        let directory = tempfile::tempdir()?;
        let command = ["bench", "--url", url].into_iter().chain(arguments.iter().copied());
        let finished = Oncegate::new(directory.path(), command)?.env("STRIPE_WEBHOOK_SECRET", SECRET).run().await?;
        assert_eq!(finished.code, Some(3), "{arguments:?}: {finished}");
    }
    Ok(())
}

#[tokio::test]
async fn what_cannot_be_measured_has_exit_codes_of_its_own() -> Result<()> {
    let finished = bench("http://127.0.0.1:1", &[]).await?;
    assert_eq!(finished.code, Some(3), "{finished}");
    let finished = bench("http://127.0.0.1:1", &["--target", "http"]).await?;
    assert_eq!(finished.code, Some(3), "{finished}");
    let finished = bench("http://127.0.0.1:1", &["--workload", "mixed", "--duplicate-share", "2"]).await?;
    assert_eq!(finished.code, Some(2), "{finished}");
    assert!(finished.stderr.contains("--duplicate-share"), "{finished}");
    Ok(())
}

/// What a service does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Wrong {
    /// It grants every event to everybody.
    GrantsTwice,
    /// It grants each event once, and says of completed ones that they are being processed.
    ForgetsCompletions,
    /// The same, but it remembers what it granted first.
    ForgetsLater,
    /// It does all that it is asked to, until it is asked for what it has done; and it never comes to the end of a cleanup.
    GoesAway,
}

/// How many events a service that forgets later remembers: the first ones of each caller.
const REMEMBERED: usize = 32;

/// A service of the same contract that does not keep it.
struct Service {
    wrong: Wrong,
    /// By event id, how many others were granted before.
    granted: Arc<Mutex<HashMap<String, usize>>>,
    token: AtomicI64,
}

pub(crate) async fn serve(wrong: Wrong) -> Result<String> {
    let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
    let address = listener.local_addr()?;
    let service = Service { wrong, granted: Arc::default(), token: AtomicI64::new(1) };
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(IdempotencyServiceServer::new(service))
            .serve_with_incoming(TcpIncoming::from(listener)),
    );
    Ok(format!("http://{address}"))
}

fn no_such<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("not here"))
}

#[tonic::async_trait]
impl IdempotencyService for Service {
    type CleanupStream = futures::stream::Iter<std::vec::IntoIter<Result<v1::CleanupResponse, Status>>>;

    async fn check_and_lock(
        &self,
        request: Request<v1::CheckAndLockRequest>,
    ) -> Result<Response<v1::CheckAndLockResponse>, Status> {
        let event_id = request.into_inner().key.unwrap_or_default().event_id;
        let (first, before) = {
            let mut granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
            let all = granted.len();
            let before = *granted.entry(event_id).or_insert(all);
            (granted.len() > all, before)
        };
        let mut response = v1::CheckAndLockResponse::default();
        if first || self.wrong == Wrong::GrantsTwice {
            response.set_decision(Decision::Acquired);
            let fencing_token = self.token.fetch_add(1, Ordering::Relaxed);
            response.lock = Some(v1::Lock { fencing_token, attempt: 1, ..v1::Lock::default() });
        } else if self.wrong == Wrong::GoesAway {
            return Err(Status::unavailable("gone"));
        } else if self.wrong == Wrong::ForgetsLater && before < REMEMBERED {
            response.set_decision(Decision::AlreadyCompleted);
        } else {
            response.set_decision(Decision::InProgress);
        }
        Ok(Response::new(response))
    }

    async fn mark_completed(
        &self,
        _: Request<v1::MarkCompletedRequest>,
    ) -> Result<Response<v1::MarkCompletedResponse>, Status> {
        Ok(Response::new(v1::MarkCompletedResponse::default()))
    }

    async fn extend_lock(&self, _: Request<v1::ExtendLockRequest>) -> Result<Response<v1::ExtendLockResponse>, Status> {
        no_such()
    }

    async fn mark_failed(&self, _: Request<v1::MarkFailedRequest>) -> Result<Response<v1::MarkFailedResponse>, Status> {
        no_such()
    }

    async fn history(&self, _: Request<v1::HistoryRequest>) -> Result<Response<v1::HistoryResponse>, Status> {
        no_such()
    }

    async fn resolve(&self, _: Request<v1::ResolveRequest>) -> Result<Response<v1::ResolveResponse>, Status> {
        no_such()
    }

    async fn stats(&self, _: Request<v1::StatsRequest>) -> Result<Response<v1::StatsResponse>, Status> {
        no_such()
    }

    async fn cleanup(&self, _: Request<v1::CleanupRequest>) -> Result<Response<Self::CleanupStream>, Status> {
        let so_far = v1::CleanupResponse { deleted_count: 1_234, ..v1::CleanupResponse::default() };
        Ok(Response::new(futures::stream::iter(vec![Ok(so_far), Err(Status::unavailable("gone"))])))
    }
}
