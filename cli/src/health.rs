//! `oncegate health`.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use http::Request;
use oncegate_runtime::config::Problem;
use serde::Serialize;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    failure::Failure,
    http_client::{Answer, HttpClient, SendError, with_default_path},
    output::{self, Column},
    sidecar_client::Sidecar,
};

/// Ask whether a sidecar, and a gateway, take work
///
/// Asks the sidecar by grpc.health.v1 and, where --gateway is given, the gateway by its health path. With --admin it asks a
/// process by its admin listener instead: what an engine that runs containers should ask, for it is the same for both
/// services, with and without TLS. Exits with 0 if all is well, 1 if one answers that it is not, 3 if one does not answer.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate health
  oncegate health --admin http://127.0.0.1:9090
  oncegate health --sidecar http://10.0.0.7:50051 --gateway http://10.0.0.7:8080")]
pub(crate) struct Health {
    #[command(flatten)]
    sidecar: Sidecar,

    /// A gateway to ask as well, with or without a path
    #[arg(long, value_name = "URL")]
    gateway: Option<String>,

    /// Ask a process, sidecar or gateway, by /readyz on its admin listener instead of a sidecar: without URL, where
    /// ADMIN_LISTEN says that it is, or on port 9090 of this machine
    #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = "")]
    admin: Option<String>,

    /// What the process in the same container was told.
    #[arg(long, env = "ADMIN_LISTEN", hide = true)]
    admin_listen: Option<SocketAddr>,

    /// How long to wait for each answer
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = oncegate_runtime::config::duration)]
    timeout: Duration,

    /// Show the answers as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Part {
    part: &'static str,
    url: String,
    healthy: bool,
    answer: String,
    /// Why there is no answer to what was asked.
    #[serde(skip)]
    failure: Option<Failure>,
}

impl Part {
    fn without_answer(part: &'static str, url: String, failure: Failure) -> Self {
        let answer = match failure {
            Failure::Unreachable(_) => "no answer",
            Failure::NotAsItShouldBe | Failure::Interrupted(_) | Failure::Failed(_) | Failure::Configuration(_) => {
                "refused"
            }
        };
        Self { part, url, healthy: false, answer: answer.to_owned(), failure: Some(failure) }
    }
}

impl Health {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        // All of them are asked, whatever the result of each: which ones are away shows where to look.
        let gateway = async {
            match &self.gateway {
                Some(url) => self.ask_gateway(url).await.map(Some),
                None => Ok(None),
            }
        };
        let (first, gateway) = match &self.admin {
            Some(url) => tokio::join!(self.ask_process(url), gateway),
            None => tokio::join!(self.ask_sidecar(), gateway),
        };
        let parts: Vec<Part> = [first?].into_iter().chain(gateway?).collect();
        if self.json {
            output::json(&parts);
        } else {
            let rows = parts.iter().map(|part| vec![part.part.to_owned(), part.url.clone(), part.answer.clone()]);
            output::table(&[Column::Text("part"), Column::Text("address"), Column::Text("answer")], rows);
        }
        let healthy = parts.iter().all(|part| part.healthy);
        let mut failures: Vec<Failure> = parts.into_iter().filter_map(|part| part.failure).collect();
        // The last one gives the exit code, and an unreachable target takes precedence over a refusal.
        failures.sort_by_key(|failure| matches!(failure, Failure::Unreachable(_)));
        match failures.pop() {
            Some(failure) => {
                for other in failures {
                    other.report();
                }
                Err(failure)
            }
            None if healthy => Ok(()),
            None => Err(Failure::NotAsItShouldBe),
        }
    }

    async fn ask_sidecar(&self) -> Result<Part, Failure> {
        let url = self.sidecar.url.clone();
        let ask = async {
            let mut client = HealthClient::new(self.sidecar.connect().await?);
            // No name means the server as a whole.
            let answer = client.check(HealthCheckRequest { service: String::new() }).await;
            answer.map_err(|status| self.sidecar.failure(&status))
        };
        let answer = tokio::time::timeout(self.timeout, ask).await.unwrap_or_else(|_| {
            let error = anyhow::anyhow!("the sidecar at {url} did not answer within {:?}", self.timeout);
            Err(Failure::Unreachable(error))
        });
        let status = match answer {
            Ok(answer) => answer.into_inner().status(),
            Err(failure @ Failure::Configuration(_)) => return Err(failure),
            Err(failure) => return Ok(Part::without_answer("sidecar", url, failure)),
        };
        let (healthy, answer) = (status == ServingStatus::Serving, status.as_str_name().to_lowercase());
        Ok(Part { part: "sidecar", url, healthy, answer, failure: None })
    }

    async fn ask_process(&self, url: &str) -> Result<Part, Failure> {
        let url = if url.is_empty() { format!("http://{}", reachable(self.admin_listen)) } else { url.to_owned() };
        let word =
            |answer: &Answer| String::from_utf8_lossy(&answer.body).lines().next().unwrap_or_default().to_owned();
        self.get("process", "--admin", &url, "/readyz", word).await
    }

    async fn ask_gateway(&self, url: &str) -> Result<Part, Failure> {
        let word = |answer: &Answer| {
            let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
            body["status"].as_str().unwrap_or_default().to_owned()
        };
        self.get("gateway", "--gateway", url, "/webhooks/payments/health", word).await
    }

    /// Asks by HTTP; `word` extracts the state from the answer.
    async fn get(
        &self,
        part: &'static str,
        option: &'static str,
        url: &str,
        path: &str,
        word: impl Fn(&Answer) -> String,
    ) -> Result<Part, Failure> {
        let wrong = |message: String| Problem::new(option, message);
        let url = with_default_path(url, path).map_err(|error| wrong(format!("{error:#}")))?;
        let request = Request::get(&url).body(Default::default()).map_err(|error| wrong(error.to_string()))?;
        let answer = match HttpClient::new(self.timeout).send(request).await {
            Ok(answer) => answer,
            Err(SendError::NotConnected(error) | SendError::NoAnswer(error)) => {
                let failure = Failure::Unreachable(error.context(format!("cannot reach {url}")));
                return Ok(Part::without_answer(part, url.to_string(), failure));
            }
        };
        let status = answer.status;
        let text = format!("{} {}", status.as_u16(), word(&answer)).trim_end().to_owned();
        Ok(Part { part, url: url.to_string(), healthy: status.is_success(), answer: text, failure: None })
    }
}

/// Where a listener with this address can be reached from its own machine.
fn reachable(listen: Option<SocketAddr>) -> SocketAddr {
    let mut address = listen.unwrap_or(SocketAddr::from((Ipv4Addr::LOCALHOST, 9_090)));
    match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_reached_by_loopback() {
        for (listen, wanted) in [
            (None, "127.0.0.1:9090"),
            (Some("0.0.0.0:1"), "127.0.0.1:1"),
            (Some("[::]:2"), "[::1]:2"),
            (Some("10.0.0.7:3"), "10.0.0.7:3"),
        ] {
            assert_eq!(reachable(listen.map(|text| text.parse().unwrap())).to_string(), wanted);
        }
    }
}
