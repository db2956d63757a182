//! An event of each provider, sent twice: what `dev` shows, and what `dev --once` checks.

use std::{
    iter,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use oncegate_api::v1::{Event, EventKey, HistoryRequest, HistoryResponse, State};
use oncegate_gateway::config::FlutterwaveVersion;
use oncegate_runtime::{config::Problem, secret::Secret};
use tokio::sync::mpsc;

use super::{application::Delivery, file::DevFile};
use crate::{
    failure::Failure,
    http_client::{HttpClient, with_default_path},
    message,
    output::{self, Column},
    simulate::{Webhook, flutterwave, paypal, paystack, standard_webhooks, stripe},
};

/// More than the gateway takes in the worst case.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A webhook to send, and how the sidecar identifies its event.
struct Sample {
    provider: &'static str,
    event_id: String,
    path: &'static str,
    webhook: Webhook,
}

/// What one of the two webhooks led to.
#[derive(Debug)]
struct Step {
    status: u16,
    answer: String,
    deliveries: Vec<Delivery>,
    event: Event,
}

/// Sends, shows and checks. Fails if anything was not as it should be.
pub(super) async fn run(
    gateway: &str,
    dev: &DevFile,
    deliveries: &mut mpsc::UnboundedReceiver<Delivery>,
    remembered: impl AsyncFn(HistoryRequest) -> Result<HistoryResponse>,
) -> Result<(), Failure> {
    let client = HttpClient::new(TIMEOUT);
    let mut shown = Vec::new();
    for sample in samples(dev, SystemTime::now())? {
        let url = with_default_path(gateway, sample.path)?;
        let mut steps = Vec::new();
        for _ in 0..2 {
            let reply = sample.webhook.send(&client, &url, true).await.map_err(|error| anyhow::anyhow!("{error}"))?;
            // The application answered before the gateway did, so what it got is in the channel by now. Others may be
            // sending to it as well.
            let deliveries = iter::from_fn(|| deliveries.try_recv().ok())
                .filter(|delivery| delivery.provider == sample.provider && delivery.event_id == sample.event_id)
                .collect();
            let key =
                EventKey { provider: sample.provider.into(), event_id: sample.event_id.clone(), ..Default::default() };
            let history = remembered(HistoryRequest { key: Some(key), ..Default::default() }).await?;
            let event = history.events.into_iter().next().and_then(|history| history.event);
            let event = event.context("the sidecar does not know the event")?;
            steps.push(Step { status: reply.status, answer: reply.answer, deliveries, event });
        }
        shown.push((sample.provider, steps));
    }
    show(&shown);
    let problems: Vec<String> = shown
        .iter()
        .flat_map(|(provider, steps)| problems(steps).into_iter().map(move |problem| format!("{provider}: {problem}")))
        .collect();
    if problems.is_empty() {
        output::line("Each event came twice, and reached the application once.");
        return Ok(());
    }
    for problem in problems {
        output::complain(problem);
    }
    Err(Failure::NotAsItShouldBe)
}

/// An event of each provider that `dev` has a route for.
fn samples(dev: &DevFile, now: SystemTime) -> Result<Vec<Sample>> {
    let secret = |provider| {
        let text = dev.secret(provider).with_context(|| format!("there is no secret for {provider}"))?;
        Secret::new(text).context("a secret that was made up is blank")
    };
    let problem = |problem: Problem| anyhow::anyhow!("{problem}");
    let signer = dev.paypal.as_ref().context("there is no certificate for PayPal")?.signer()?;

    let stripe = stripe::event_id();
    let paypal = paypal::event_id();
    let flutterwave = flutterwave::event_id();
    let paystack = paystack::reference();
    let standard = standard_webhooks::event_id();
    Ok(vec![
        Sample {
            provider: "stripe",
            path: stripe::PATH,
            webhook: stripe::webhook(stripe::event(&stripe, "payment_intent.succeeded", now), secret("stripe")?),
            event_id: stripe,
        },
        Sample {
            provider: "paypal",
            path: paypal::PATH,
            webhook: paypal::webhook(
                paypal::event(&paypal, "PAYMENT.CAPTURE.COMPLETED", now),
                secret("paypal")?,
                signer,
            )
            .map_err(problem)?,
            event_id: paypal,
        },
        Sample {
            provider: "flutterwave",
            path: flutterwave::PATH,
            webhook: flutterwave::webhook(
                flutterwave::event(&flutterwave, "charge.completed", now),
                secret("flutterwave")?,
                FlutterwaveVersion::V4,
            )
            .map_err(problem)?,
            event_id: flutterwave,
        },
        Sample {
            provider: "paystack",
            path: paystack::PATH,
            webhook: paystack::webhook(paystack::event(&paystack, "charge.success"), secret("paystack")?),
            // Paystack's events have no id of their own.
            event_id: format!("charge.success:{paystack}:success"),
        },
        Sample {
            provider: "standard_webhooks",
            path: standard_webhooks::PATH,
            webhook: standard_webhooks::webhook(
                &standard,
                standard_webhooks::event("invoice.paid"),
                &secret("standard_webhooks")?,
            )
            .map_err(problem)?,
            event_id: standard,
        },
    ])
}

fn show(shown: &[(&str, Vec<Step>)]) {
    output::line("An event of each provider, sent twice:");
    let columns = [
        Column::Text("provider"),
        Column::Text("webhook"),
        Column::Number("status"),
        Column::Text("answer"),
        Column::Number("deliveries"),
        Column::Text("state"),
        Column::Number("attempts"),
        Column::Number("fencing token"),
    ];
    let rows = shown.iter().flat_map(|(provider, steps)| {
        steps.iter().enumerate().map(|(index, step)| {
            vec![
                (*provider).to_owned(),
                if index == 0 { "first" } else { "duplicate" }.to_owned(),
                step.status.to_string(),
                step.answer.clone(),
                step.deliveries.len().to_string(),
                message::state(step.event.state()),
                step.event.attempt_count.to_string(),
                step.event.fencing_token.to_string(),
            ]
        })
    });
    output::table(&columns, rows);
}

/// Everything that is not as it should be.
fn problems(steps: &[Step]) -> Vec<String> {
    let mut problems = Vec::new();
    let mut expect = |what: &str, expected: &str, found: String| {
        if found != expected {
            problems.push(format!("{what} should be {expected}, and is {found}"));
        }
    };
    for (step, (name, answer, deliveries)) in
        steps.iter().zip([("the first", "200 processed", "1"), ("the duplicate", "200 already_processed", "0")])
    {
        expect(&format!("the answer to {name}"), answer, format!("{} {}", step.status, step.answer));
        expect(&format!("the deliveries of {name}"), deliveries, step.deliveries.len().to_string());
        expect("the event's attempts", "1", step.event.attempt_count.to_string());
        expect("the event's state", State::Completed.as_str_name(), step.event.state().as_str_name().to_owned());
        for delivery in &step.deliveries {
            expect("the attempt delivered", "1", delivery.attempt.clone());
            expect(
                "the fencing token delivered",
                &step.event.fencing_token.to_string(),
                delivery.fencing_token.clone(),
            );
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(status: u16, answer: &str, tokens: &[&str]) -> Step {
        let deliveries = tokens
            .iter()
            .map(|token| Delivery {
                provider: "stripe".into(),
                event_id: "evt_1".into(),
                event_type: "a.b".into(),
                attempt: "1".into(),
                fencing_token: (*token).to_owned(),
            })
            .collect();
        let event = Event { fencing_token: 7, attempt_count: 1, state: State::Completed.into(), ..Default::default() };
        Step { status, answer: answer.into(), deliveries, event }
    }

    #[test]
    fn only_one_delivery_and_one_duplicate_are_as_it_should_be() {
        let first = || step(200, "processed", &["7"]);
        assert_eq!(problems(&[first(), step(200, "already_processed", &[])]), [""; 0]);
        for wrong in [
            [first(), step(200, "already_processed", &["7"])],
            [first(), step(200, "processed", &[])],
            [first(), step(409, "in_progress", &[])],
            [step(200, "processed", &[]), step(200, "already_processed", &[])],
            [step(200, "processed", &["6"]), step(200, "already_processed", &[])],
            [step(500, "failed", &["7"]), step(200, "already_processed", &[])],
        ] {
            assert_eq!(problems(&wrong).len(), 1, "{wrong:?}");
        }
    }
}
