//! `oncegate health`.

use std::time::Duration;

use http::Request;
use oncegate_runtime::config::Problem;
use serde::Serialize;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{
    failure::Failure,
    http_client::{HttpClient, SendError, with_default_path},
    output::{self, Column},
    sidecar_client::Sidecar,
};

/// Ask whether a sidecar, and a gateway, take work
///
/// Asks the sidecar by grpc.health.v1 and, where --gateway is given, the gateway by its health path. Exits with 0 if
/// all is well, 1 if one answers that it is not, 3 if one does not answer.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate health
  oncegate health --sidecar http://10.0.0.7:50051 --gateway http://10.0.0.7:8080")]
pub(crate) struct Health {
    #[command(flatten)]
    sidecar: Sidecar,

    /// A gateway to ask as well, with or without a path
    #[arg(long, value_name = "URL")]
    gateway: Option<String>,

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
        let mut parts = vec![self.ask_sidecar().await?];
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

    async fn ask_gateway(&self, url: &str) -> Result<Part, Failure> {
        let url = with_default_path(url, "/webhooks/payments/health")
            .map_err(|error| Problem::new("--gateway", format!("{error:#}")))?;
        let request = Request::get(&url)
            .body(Default::default())
            .map_err(|error| Problem::new("--gateway", error.to_string()))?;
        let answer = HttpClient::new(self.timeout).send(request).await.map_err(|error| {
            let (SendError::NotConnected(error) | SendError::NoAnswer(error)) = error;
            Failure::Unreachable(error.context(format!("cannot reach the gateway at {url}")))
        })?;
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let word = body["status"].as_str().unwrap_or_default();
        Ok(Part {
            part: "gateway",
            url: url.to_string(),
            healthy: answer.status.is_success(),
            answer: format!("{} {word}", answer.status.as_u16()).trim_end().to_owned(),
        })
    }
}
