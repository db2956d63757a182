//! Applications that answer badly: what they say is recorded as it is, and 200 is said only of what is completed (I6).

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use oncegate_api::v1::{Outcome, State};
use oncegate_e2e::{program::Oncegate, stripe};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use crate::setup::{Everything, Ledger, on_each_ledger, word};

/// What an application does with the connection, once a request is there.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// 200, and a body that never ends.
    HangsInBody,
    /// 200, and more than anybody wants to read.
    Floods,
    /// 200 and headers, and then a reset, in the middle of the body.
    ResetsInBody,
    /// A hundred thousand times "continue", and then 200.
    Continues,
    /// "Continue" without an end.
    ContinuesForEver,
    /// 200, when the lock is over.
    AnswersTooLate,
    /// Half of the status line, and then nothing.
    HalfALine,
    /// What is no HTTP.
    Rubbish,
    /// A header of a megabyte.
    LargeHead,
    /// Closes without a word.
    Closes,
    /// A redirect to where it would be delivered again.
    Redirects,
    /// A switch of protocols that nobody asked for.
    Switches,
}

async fn serve(listener: TcpListener, manner: Manner) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            // The far side may be gone at any time.
            let _ = answer(stream, manner).await;
        });
    }
}

async fn answer(mut stream: TcpStream, manner: Manner) -> Result<()> {
    let mut request = vec![0; 64 * 1024];
    let mut length = 0;
    while !request[..length].ends_with(b"}") {
        match stream.read(&mut request[length..]).await? {
            0 => return Ok(()),
            more => length += more,
        }
    }
    let head = |length: u64| format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
    match manner {
        Manner::HangsInBody => {
            stream.write_all((head(100) + "half").as_bytes()).await?;
            std::future::pending::<()>().await;
        }
        Manner::Floods => {
            stream.write_all(head(100 * 1024 * 1024).as_bytes()).await?;
            for _ in 0..1_600 {
                stream.write_all(&[b'x'; 64 * 1024]).await?;
            }
        }
        Manner::ResetsInBody => {
            stream.write_all((head(100) + "half").as_bytes()).await?;
            tokio::time::sleep(Duration::from_millis(50)).await;
            stream.set_zero_linger()?;
        }
        Manner::Continues => {
            for _ in 0..1_000 {
                stream.write_all("HTTP/1.1 100 Continue\r\n\r\n".repeat(100).as_bytes()).await?;
            }
            stream.write_all((head(2) + "ok").as_bytes()).await?;
        }
        Manner::ContinuesForEver => loop {
            stream.write_all("HTTP/1.1 100 Continue\r\n\r\n".repeat(100).as_bytes()).await?;
            tokio::time::sleep(Duration::from_millis(1)).await;
        },
        Manner::AnswersTooLate => {
            tokio::time::sleep(Duration::from_millis(3_500)).await;
            stream.write_all((head(2) + "ok").as_bytes()).await?;
        }
        Manner::HalfALine => {
            stream.write_all(b"HTTP/1.1 20").await?;
            std::future::pending::<()>().await;
        }
        Manner::Rubbish => stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await?,
        Manner::LargeHead => {
            let large = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(1024 * 1024));
            stream.write_all(large.as_bytes()).await?;
        }
        Manner::Closes => {}
        Manner::Redirects => {
            stream.write_all(b"HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n").await?;
        }
        Manner::Switches => {
            stream
                .write_all(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n")
                .await?;
        }
    }
    Ok(())
}

/// `oncegate all` in front of such an application, with short limits.
async fn in_front_of(manner: Manner, ledger: Ledger) -> Result<(Everything, JoinHandle<()>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}/payments", listener.local_addr()?);
    let application = tokio::spawn(serve(listener, manner));
    let everything = Everything::start_as(ledger, |command: Oncegate| {
        command
            .env("UPSTREAM_URL", url)
            .env("UPSTREAM_TIMEOUT", "1s")
            .env("UPSTREAM_CONNECT_TIMEOUT", "500ms")
            .env("UPSTREAM_BODY_TIMEOUT", "500ms")
            .env("GATEWAY_LOCK_DURATION", "3s")
            .env("GATEWAY_LOCK_MARGIN", "1s")
    })
    .await?;
    Ok((everything, application))
}

/// T44, of one manner: the gateway's word, and the state and the outcome that are kept.
async fn is_answered(manner: Manner, ledger: Ledger, said: &str, state: State, outcome: Outcome) -> Result<()> {
    let (everything, application) = in_front_of(manner, ledger).await?;
    let id = stripe::event_id();
    let body = stripe::event(&id, "charge.succeeded");
    let began = Instant::now();
    let answer = everything.send(&body).await?;
    assert_eq!(word(&answer), said, "{manner:?}");
    assert!(began.elapsed() < Duration::from_secs(5), "{manner:?}: {:?}", began.elapsed());
    let history = everything.history(&id).await?.context("the event")?;
    assert_eq!(history.event.context("the event")?.state(), state, "{manner:?}");
    let outcomes: Vec<Outcome> = history.attempts.iter().map(|attempt| attempt.outcome()).collect();
    assert_eq!(outcomes, [outcome], "{manner:?}");
    application.abort();
    Ok(())
}

macro_rules! manners {
    ($($name:ident: $manner:ident, $said:literal, $state:ident, $outcome:ident;)+) => {
        on_each_ledger!($($name),+);
        $(
            /// T44
            async fn $name(ledger: Ledger) -> Result<()> {
                is_answered(Manner::$manner, ledger, $said, State::$state, Outcome::$outcome).await
            }
        )+
    };
}

manners! {
    a_body_that_never_ends_does_not_undo_the_status: HangsInBody, "200 processed", Completed, Completed;
    a_body_of_100_mib_is_not_read: Floods, "200 processed", Completed, Completed;
    a_reset_in_the_body_does_not_undo_the_status: ResetsInBody, "200 processed", Completed, Completed;
    a_storm_of_1xx_is_waited_out: Continues, "200 processed", Completed, Completed;
    a_storm_of_1xx_without_an_end_is_given_up: ContinuesForEver, "500 failed", Failed, FailedRetryable;
    an_answer_after_the_lock_is_none: AnswersTooLate, "500 failed", Failed, FailedRetryable;
    half_a_status_line_is_no_answer: HalfALine, "500 failed", Failed, FailedRetryable;
    what_is_no_http_is_no_answer: Rubbish, "500 failed", Failed, FailedRetryable;
    a_head_of_a_megabyte_is_no_answer: LargeHead, "500 failed", Failed, FailedRetryable;
    a_close_without_a_word_is_no_answer: Closes, "500 failed", Failed, FailedRetryable;
    a_redirect_is_not_followed: Redirects, "500 failed", Failed, FailedRetryable;
    a_switch_of_protocols_is_no_success: Switches, "500 failed", Failed, FailedRetryable;
}
