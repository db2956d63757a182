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
}

impl Health {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let mut parts = match &self.admin {
            Some(url) => vec![self.ask_process(url).await?],
            None => vec![self.ask_sidecar().await?],
        };
        if let Some(url) = &self.gateway {
            parts.push(self.ask_gateway(url).await?);
        }
        if self.json {
            output::json(&parts);
        } else {
            let rows = parts.iter().map(|part| vec![part.part.to_owned(), part.url.clone(), part.answer.clone()]);
            output::table(&[Column::Text("part"), Column::Text("address"), Column::Text("answer")], rows);
        }
        if parts.iter().all(|part| part.healthy) { Ok(()) } else { Err(Failure::NotAsItShouldBe) }
    }

    async fn ask_sidecar(&self) -> Result<Part, Failure> {
        let ask = async {
            let mut client = HealthClient::new(self.sidecar.connect().await?);
            // No name means the server as a whole.
            let answer = client.check(HealthCheckRequest { service: String::new() }).await;
            answer.map_err(|status| self.sidecar.failure(&status))
        };
        let answer = tokio::time::timeout(self.timeout, ask).await.map_err(|_| {
            let url = &self.sidecar.url;
            Failure::Unreachable(anyhow::anyhow!("the sidecar at {url} did not answer within {:?}", self.timeout))
        })??;
        let status = answer.into_inner().status();
        Ok(Part {
            part: "sidecar",
            url: self.sidecar.url.clone(),
            healthy: status == ServingStatus::Serving,
            answer: status.as_str_name().to_lowercase(),
        })
    }

    async fn ask_process(&self, url: &str) -> Result<Part, Failure> {
        let url = if url.is_empty() { format!("http://{}", reachable(self.admin_listen)) } else { url.to_owned() };
        let (url, answer) = self.get("--admin", &url, "/readyz").await?;
        let text = String::from_utf8_lossy(&answer.body);
        Ok(part("process", &url, &answer, text.lines().next().unwrap_or_default()))
    }

    async fn ask_gateway(&self, url: &str) -> Result<Part, Failure> {
        let (url, answer) = self.get("--gateway", url, "/webhooks/payments/health").await?;
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        Ok(part("gateway", &url, &answer, body["status"].as_str().unwrap_or_default()))
    }

    async fn get(&self, option: &'static str, url: &str, path: &str) -> Result<(http::Uri, Answer), Failure> {
        let wrong = |message: String| Problem::new(option, message);
        let url = with_default_path(url, path).map_err(|error| wrong(format!("{error:#}")))?;
        let request = Request::get(&url).body(Default::default()).map_err(|error| wrong(error.to_string()))?;
        let answer = HttpClient::new(self.timeout).send(request).await.map_err(|error| {
            let (SendError::NotConnected(error) | SendError::NoAnswer(error)) = error;
            Failure::Unreachable(error.context(format!("cannot reach {url}")))
        })?;
        Ok((url, answer))
    }
}

fn part(part: &'static str, url: &http::Uri, answer: &Answer, word: &str) -> Part {
    Part {
        part,
        url: url.to_string(),
        healthy: answer.status.is_success(),
        answer: format!("{} {word}", answer.status.as_u16()).trim_end().to_owned(),
    }
}

/// Where a listener can be reached from its own machine that is told to listen there.
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
