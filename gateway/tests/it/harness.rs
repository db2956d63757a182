//! A gateway between an application and a sidecar.

use std::net::SocketAddr;

use oncegate_api::v1::idempotency_service_server::IdempotencyServiceServer;
use oncegate_gateway::{Gateway, RunError, config::Options, sidecar::Connection};
use oncegate_runtime::shutdown::CancellationToken;
use tokio::{task::JoinHandle, time::timeout};

use crate::{
    application::Application,
    client::{self, Answer, PATIENCE, SECRET},
    sidecar::Sidecar,
};

/// Everything in one process, on ports of its own.
pub(crate) struct Harness {
    pub(crate) application: Application,
    pub(crate) sidecar: Sidecar,
    pub(crate) address: SocketAddr,
    pub(crate) shutdown: CancellationToken,
    metrics: oncegate_runtime::admin::Metrics,
    control: oncegate_runtime::admin::Control,
    run: JoinHandle<Result<(), RunError>>,
}

/// Options for a gateway on a free port.
pub(crate) fn options(upstream: &str) -> Options {
    Options {
        gateway_listen: "127.0.0.1:0".parse().unwrap(),
        upstream_url: Some(upstream.to_owned()),
        stripe_webhook_secret: Some(SECRET.into()),
        ..Options::default()
    }
}

impl Harness {
    /// With the defaults.
    pub(crate) async fn start() -> Self {
        Self::with(|options| options).await
    }

    /// With options of the test.
    pub(crate) async fn with(change: impl FnOnce(Options) -> Options) -> Self {
        let application = Application::start().await;
        let options = change(options(&application.url()));
        let sidecar = Sidecar::default();
        let settings = options.validate().unwrap();
        let service = Connection::over(IdempotencyServiceServer::new(sidecar.clone()));
        let gateway = Gateway::bind(settings, service).await.unwrap();
        let (address, shutdown) = (gateway.local_addr(), CancellationToken::new());
        let (metrics, control) = (gateway.metrics(), gateway.control());
        let run = tokio::spawn(gateway.run(shutdown.clone()));
        Self { application, sidecar, address, shutdown, metrics, control, run }
    }

    /// Sends the signed webhook of an event.
    pub(crate) async fn deliver(&self, id: &str) -> Answer {
        client::deliver(self.address, id).await
    }

    /// Sends raw bytes.
    pub(crate) async fn send(&self, bytes: impl AsRef<[u8]>) -> Answer {
        client::send(self.address, bytes).await
    }

    /// Makes all routes observe from now on.
    pub(crate) fn observe(&self) {
        let answer = (self.control)(&http::Method::PUT, &http::Uri::from_static("/enforcement?to=observe"));
        assert_eq!(answer.map(|answer| answer.status().as_u16()), Some(200));
    }

    /// The value of a metric: the sum of all rows that have the labels.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let text = (self.metrics)();
        let (family, labels) = name.split_once('{').unwrap_or((name, "}"));
        let labels: Vec<&str> = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty()).collect();
        let rows = text.lines().filter_map(|line| {
            let (row, value) = line.rsplit_once(' ')?;
            let (found, row_labels) = row.split_once('{').unwrap_or((row, "}"));
            let row_labels: Vec<&str> = row_labels.trim_end_matches('}').split(',').collect();
            let wanted = found == family && labels.iter().all(|label| row_labels.contains(label));
            wanted.then(|| value.parse::<u64>().unwrap())
        });
        let rows: Vec<u64> = rows.collect();
        assert!(!rows.is_empty(), "no {name} in {text}");
        rows.iter().sum()
    }

    /// Waits until the gateway has ended.
    pub(crate) async fn ended(self) -> Result<(), RunError> {
        timeout(PATIENCE, self.run).await.expect("the gateway ends in time").unwrap()
    }
}
