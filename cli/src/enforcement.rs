//! `oncegate enforcement`.

use std::time::Duration;

use http::{Request, StatusCode};
use oncegate_gateway::Enforcement;
use oncegate_runtime::config::Problem;
use serde_json::Value;

use crate::{
    failure::Failure,
    http_client::{HttpClient, SendError, with_default_path},
    output::{self, Column},
};

/// Show or switch whether a gateway enforces or only observes
///
/// A route that observes delivers every verified webhook, duplicates included, and counts and logs what it would have
/// refused. Only a delivery that comes back with another body, which is a forgery, stays refused. Asks the gateway's admin
/// listener, and holds for that one process until it ends or is switched again; for all of a deployment, change
/// `enforcement` in the file of ONCEGATE_CONFIG, which is read again. To switch it, be where the gateway is
/// (`kubectl exec`), unless its ADMIN_CONTROL permits others.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate enforcement --admin http://127.0.0.1:9090
  oncegate enforcement observe --path /webhooks/payments/stripe
  oncegate enforcement enforce")]
pub(crate) struct EnforcementCommand {
    /// What to switch to [default: only show]
    to: Option<Enforcement>,

    /// Only this route [default: all of them]
    #[arg(long, value_name = "PATH", requires = "to")]
    path: Option<String>,

    /// The gateway's admin listener (its ADMIN_LISTEN)
    #[arg(long, value_name = "URL", env = "ADMIN_URL", default_value = "http://127.0.0.1:9090")]
    admin: String,

    /// Show the routes as JSON
    #[arg(long)]
    json: bool,
}

const TIMEOUT: Duration = Duration::from_secs(5);

impl EnforcementCommand {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        let wrong = |message: String| Problem::new("--admin", message);
        let url = with_default_path(&self.admin, "/enforcement").map_err(|error| wrong(format!("{error:#}")))?;
        let request = match self.to {
            None => Request::get(url.to_string()),
            Some(to) => {
                let path = self.path.map(|path| format!("&path={path}")).unwrap_or_default();
                Request::put(format!("{url}?to={}{path}", to.name()))
            }
        };
        let request = request.body(Default::default()).map_err(|error| wrong(error.to_string()))?;
        let answer = HttpClient::new(TIMEOUT).send(request).await.map_err(|error| {
            let (SendError::NotConnected(error) | SendError::NoAnswer(error)) = error;
            Failure::Unreachable(error.context(format!("cannot reach the admin listener at {url}")))
        })?;
        let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        if !answer.status.is_success() {
            let text = String::from_utf8_lossy(&answer.body);
            let reason = match body["error"].as_str() {
                Some(reason) => reason,
                None if answer.status == StatusCode::FORBIDDEN => text.trim_end(),
                None => "no gateway's admin listener",
            };
            return Err(anyhow::anyhow!("{url} answered {}: {reason}", answer.status.as_u16()).into());
        }
        if self.json {
            output::json(&body["routes"]);
            return Ok(());
        }
        let text = |route: &Value, key: &str| route[key].as_str().unwrap_or_default().to_owned();
        let routes = body["routes"].as_array().map(Vec::as_slice).unwrap_or_default();
        let columns = ["path", "tenant", "provider", "enforcement"];
        let rows = routes.iter().map(|route| columns.map(|column| text(route, column)).to_vec());
        output::table(&columns.map(Column::Text), rows);
        Ok(())
    }
}
