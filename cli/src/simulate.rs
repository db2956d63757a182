//! `oncegate simulate`: genuinely signed webhooks, as often and as badly as providers send them.

pub(crate) mod flutterwave;
pub(crate) mod paypal;
pub(crate) mod paystack;
pub(crate) mod standard_webhooks;
pub(crate) mod stripe;

use std::{
    env,
    io::Read as _,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Uri, header::CONTENT_TYPE};
use http_body_util::Full;
use oncegate_runtime::{
    config::Problem,
    secret::{Secret, SecretSource, SecretText},
};
use serde::Serialize;
use tokio::sync::Barrier;

use crate::{
    dev::file::{self, DevFile},
    failure::Failure,
    http_client::{HttpClient, SendError, with_default_path},
    output::{self, Column},
};

/// Send genuinely signed webhooks to a gateway
///
/// Exits with 0 if every answer was 200 (with --bad-signature: 401), else with 1.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate simulate stripe --duplicates 5
  oncegate simulate paypal --duplicates 63 --concurrent
  oncegate simulate flutterwave --bad-signature
  oncegate simulate paystack --help")]
pub(crate) struct Simulate {
    #[command(subcommand)]
    provider: Provider,
}

#[derive(clap::Subcommand, Debug)]
enum Provider {
    Stripe(stripe::Stripe),
    #[command(name = "paypal")]
    PayPal(paypal::PayPal),
    Flutterwave(flutterwave::Flutterwave),
    Paystack(paystack::Paystack),
    StandardWebhooks(standard_webhooks::StandardWebhooks),
}

impl Simulate {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        match self.provider {
            Provider::Stripe(stripe) => stripe.run().await,
            Provider::PayPal(paypal) => paypal.run().await,
            Provider::Flutterwave(flutterwave) => flutterwave.run().await,
            Provider::Paystack(paystack) => paystack.run().await,
            Provider::StandardWebhooks(standard) => standard.run().await,
        }
    }
}

/// What can be asked for with every provider.
#[derive(clap::Args, Debug)]
struct Sending {
    /// The gateway, with or without a path [default: the gateway of `oncegate dev` in this directory, or
    /// http://127.0.0.1:8080]
    #[arg(long, value_name = "URL")]
    url: Option<String>,

    /// Send the event this many times more
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = clap::value_parser!(u32).range(..=10_000))]
    duplicates: u32,

    /// Send all at once instead of one after the other
    #[arg(long)]
    concurrent: bool,

    /// Sign wrongly, and expect 401
    #[arg(long)]
    bad_signature: bool,

    /// Send this file's content as it stands instead of an event made up; - is standard input
    #[arg(long, value_name = "FILE")]
    body: Option<PathBuf>,

    /// How long to wait for each answer
    #[arg(long, default_value = "30s", value_name = "DURATION", value_parser = oncegate_runtime::config::duration)]
    timeout: Duration,

    /// Show the answers as JSON
    #[arg(long)]
    json: bool,
}

/// Where to send to, and what is known about it.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) url: Uri,
    dev: Option<DevFile>,
}

impl Target {
    /// The gateway at this URL, or else that of `dev` in this directory, or else the default; with a default path if the
    /// URL has none.
    pub(crate) fn find(url: Option<&str>, path: &str) -> Result<Self, Failure> {
        let directory = env::current_dir().context("cannot find the current directory")?;
        let dev = DevFile::read(&directory)?;
        let url = match (url, &dev) {
            (Some(url), _) => url,
            (None, Some(DevFile { gateway: Some(url), .. })) => url,
            (None, _) => "http://127.0.0.1:8080",
        };
        let url = with_default_path(url, path).map_err(|error| Problem::new("--url", format!("{error:#}")))?;
        Ok(Self { url, dev })
    }

    /// The secret to sign with: the one given, or the one of `dev`.
    pub(crate) fn secret(
        &self,
        provider: &str,
        setting: &'static str,
        value: Option<SecretText>,
        file: Option<PathBuf>,
    ) -> Result<Secret, Failure> {
        if let Some(source) = SecretSource::choose(setting, value, file)? {
            let secrets = source.read_list().map_err(|error| Problem::from_error(setting, &error))?;
            // If several are live, any of them is accepted.
            return secrets.into_iter().next().ok_or_else(|| Problem::new(setting, "holds no secret").into());
        }
        let secret = self.dev.as_ref().and_then(|dev| dev.secret(provider)).and_then(|text| Secret::new(text).ok());
        secret.ok_or_else(|| {
            Problem::new(
                setting,
                format!("needed to sign with: set it, or run this where `oncegate dev` has left its {}", file::NAME),
            )
            .into()
        })
    }
}

/// A request that can be sent again and again.
pub(crate) struct Webhook {
    body: Bytes,
    sign: Box<SignFn>,
}

/// Makes the headers that prove where a body comes from, for a given time, genuine or not.
type SignFn = dyn Fn(SystemTime, bool) -> Vec<(HeaderName, HeaderValue)> + Send + Sync;

impl Webhook {
    /// Signs and sends it, once.
    pub(crate) async fn send(&self, client: &HttpClient, url: &Uri, genuine: bool) -> Result<Reply, SendError> {
        let mut request = Request::new(Full::new(self.body.clone()));
        *request.method_mut() = http::Method::POST;
        *request.uri_mut() = url.clone();
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        request.headers_mut().extend((self.sign)(SystemTime::now(), genuine));
        let began = Instant::now();
        let answer = client.send(request).await?;
        let elapsed = began.elapsed();
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        Ok(Reply {
            status: answer.status.as_u16(),
            answer: body["status"].as_str().unwrap_or("-").to_owned(),
            milliseconds: round(elapsed),
        })
    }
}

/// How a webhook was answered.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Reply {
    /// The HTTP status.
    pub(crate) status: u16,
    /// The gateway's own word for the outcome.
    pub(crate) answer: String,
    /// How long it took.
    pub(crate) milliseconds: f64,
}

impl Sending {
    fn target(&self, path: &str) -> Result<Target, Failure> {
        Target::find(self.url.as_deref(), path)
    }

    fn body(&self) -> Result<Option<Bytes>, Failure> {
        let Some(path) = &self.body else { return Ok(None) };
        let body = if path.as_os_str() == "-" {
            let mut body = Vec::new();
            std::io::stdin().read_to_end(&mut body).map(|_| body)
        } else {
            std::fs::read(path)
        };
        let body = body.map_err(|error| Problem::new("--body", format!("cannot read {}: {error}", path.display())))?;
        Ok(Some(body.into()))
    }

    /// Sends the webhook as often as asked for and shows the answers.
    async fn send(&self, target: &Target, webhook: Webhook) -> Result<(), Failure> {
        let mut replies = self.replies(&target.url, webhook).await;
        // Nobody is there: one line says so better than a table with a row for each.
        if replies.iter().all(|reply| matches!(reply, Err(SendError::NotConnected(_))))
            && let Some(Err(SendError::NotConnected(error))) = replies.pop()
        {
            return Err(Failure::Unreachable(error.context(format!("no gateway answers at {}", target.url))));
        }
        let expected = if self.bad_signature { 401 } else { 200 };
        let report = Report::new(target.url.to_string(), &replies, expected);
        if self.json {
            output::json(&report);
        } else {
            report.show();
        }
        if report.as_expected { Ok(()) } else { Err(Failure::NotAsItShouldBe) }
    }

    async fn replies(&self, url: &Uri, webhook: Webhook) -> Vec<Result<Reply, SendError>> {
        let count = 1 + self.duplicates as usize;
        let client = HttpClient::new(self.timeout);
        let genuine = !self.bad_signature;
        let mut replies = Vec::with_capacity(count);
        if !self.concurrent {
            for _ in 0..count {
                replies.push(webhook.send(&client, url, genuine).await);
            }
            return replies;
        }
        let webhook = Arc::new(webhook);
        let start = Arc::new(Barrier::new(count));
        let tasks: Vec<_> = (0..count)
            .map(|_| {
                let (webhook, client, url, start) =
                    (Arc::clone(&webhook), client.clone(), url.clone(), Arc::clone(&start));
                tokio::spawn(async move {
                    start.wait().await;
                    webhook.send(&client, &url, genuine).await
                })
            })
            .collect();
        for task in tasks {
            replies.push(task.await.unwrap_or_else(|error| Err(SendError::NoAnswer(error.into()))));
        }
        replies
    }
}

/// The results, for programs and for people.
#[derive(Debug, Serialize)]
struct Report {
    url: String,
    replies: Vec<Line>,
    /// How often each word was the answer, in order of first appearance.
    summary: Vec<Count>,
    as_expected: bool,
}

#[derive(Debug, Serialize)]
struct Line {
    #[serde(flatten)]
    reply: Option<Reply>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Count {
    answer: String,
    count: usize,
}

impl Report {
    fn new(url: String, replies: &[Result<Reply, SendError>], expected: u16) -> Self {
        let mut summary: Vec<Count> = Vec::new();
        for reply in replies {
            let word = reply.as_ref().map_or("no answer", |reply| &reply.answer);
            match summary.iter_mut().find(|count| count.answer == word) {
                Some(count) => count.count += 1,
                None => summary.push(Count { answer: word.to_owned(), count: 1 }),
            }
        }
        let as_expected = replies.iter().all(|reply| matches!(reply, Ok(reply) if reply.status == expected));
        let replies = replies
            .iter()
            .map(|reply| match reply {
                Ok(reply) => Line { reply: Some(reply.clone()), error: None },
                Err(error) => Line { reply: None, error: Some(error.to_string()) },
            })
            .collect();
        Self { url, replies, summary, as_expected }
    }

    fn show(&self) {
        let rows = self.replies.iter().enumerate().map(|(index, line)| {
            let number = (index + 1).to_string();
            match line {
                Line { reply: Some(reply), .. } => {
                    vec![number, reply.status.to_string(), reply.answer.clone(), format!("{:.1}", reply.milliseconds)]
                }
                Line { error, .. } => vec![number, "-".into(), error.clone().unwrap_or_default(), "-".into()],
            }
        });
        output::table(
            &[Column::Number("#"), Column::Number("status"), Column::Text("answer"), Column::Number("ms")],
            rows,
        );
        let words: Vec<String> =
            self.summary.iter().map(|Count { answer, count }| format!("{count} {answer}")).collect();
        output::line(words.join(", "));
    }
}

/// A signature as it is, or one of the right form with its last bit wrong.
fn spoil_unless(genuine: bool, mut signature: Vec<u8>) -> Vec<u8> {
    if !genuine && let Some(last) = signature.last_mut() {
        *last ^= 1;
    }
    signature
}

/// A number like those that providers give their objects.
fn number() -> u32 {
    rand::random_range(1_000_000..=u32::MAX)
}

/// To a tenth of a millisecond: the rest is noise.
fn round(elapsed: Duration) -> f64 {
    (elapsed.as_secs_f64() * 10_000.0).round() / 10.0
}
