//! A gateway whose authority and own certificate change while it delivers, as those of its sidecar do.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
};

use anyhow::{Context as _, Result};
use oncegate_e2e::{
    certificates::{Authority, Issued, Projected},
    eventually, http_client,
    program::Running,
    proxy::Proxy,
    upstream::Upstream,
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Guarded,
    reach::{deliver, gateway, send},
};

/// Webhooks one after the other, each of which has to be processed.
struct Deliveries {
    count: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    task: AbortOnDropHandle<Result<()>>,
}

impl Deliveries {
    fn begin(gateway: SocketAddr) -> Self {
        let (count, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let task = AbortOnDropHandle::new(tokio::spawn({
            let (count, stop) = (count.clone(), stop.clone());
            async move {
                while !stop.load(Relaxed) {
                    assert_eq!(send(gateway).await?, "200 processed");
                    count.fetch_add(1, Relaxed);
                }
                Ok(())
            }
        }));
        Self { count, stop, task }
    }

    /// Until some more have been made over a connection that was made after this.
    async fn go_on_over_a_new_connection(&self, proxy: &Proxy) {
        let connections = proxy.connections();
        proxy.reset();
        eventually("a new connection is made", async || (proxy.connections() > connections).then_some(())).await;
        let made = self.count.load(Relaxed);
        eventually("webhooks are delivered over it", async || {
            assert!(!self.task.is_finished(), "one was not delivered");
            (self.count.load(Relaxed) > made + 5).then_some(())
        })
        .await;
    }

    async fn end(self) -> Result<()> {
        self.stop.store(true, Relaxed);
        self.task.await?
    }
}

/// How often a program has taken over certificates.
fn taken_over(program: &Running) -> usize {
    program.output().lines().filter(|line| line.contains("certificates") && line.contains("were read again")).count()
}

async fn once_taken_over(program: &Running, before: usize) {
    eventually("the certificates are taken over", async || (taken_over(program) > before).then_some(())).await;
}

/// Each step alone would cut the two off from each other if the side that changes went on with what it had: at every
/// moment both trust what the other shows, and at the end neither trusts what there was in the beginning.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gateway_and_sidecar_move_to_another_authority_and_no_delivery_fails() -> Result<()> {
    let mut guarded = Guarded::start().await?;
    let upstream = Upstream::start().await?;
    let proxy = Proxy::start(guarded.program.address("sidecar").await?).await?;
    let successor = Authority::new()?;
    let (old, new) = (guarded.authority.pem().to_owned(), successor.pem().to_owned());
    let both = format!("{old}{new}");
    let client = |authority: &Authority| authority.client("spiffe://test/caller", false);
    let (first, second) = (client(&guarded.authority)?, client(&successor)?);
    let own = |authorities: &str, client: &Issued| {
        [("ca.crt", authorities), ("tls.crt", client.certificate.as_str()), ("tls.key", client.key.as_str())]
            .map(|(name, content)| (name, content.to_owned()))
    };
    let directory = guarded.directory.path().join("gateway");
    let mut files = Projected::new(&directory, &borrowed(&own(&old, &first)))?;
    let url = format!("https://127.0.0.1:{}", proxy.address().port());
    let path = |name: &str| directory.join(name).to_string_lossy().into_owned();
    let (ca, certificate, key) = (path("ca.crt"), path("tls.crt"), path("tls.key"));
    let settings = [
        ("SIDECAR_URL", url.as_str()),
        ("SIDECAR_CA_FILE", &ca),
        ("SIDECAR_CLIENT_CERT_FILE", &certificate),
        ("SIDECAR_CLIENT_KEY_FILE", &key),
        ("GATEWAY_SECRET_RELOAD", "20ms"),
        ("ADMIN_LISTEN", "127.0.0.1:0"),
    ];
    let mut running = gateway(&guarded, &upstream, &settings).await?;
    let (address, admin) = (running.address("gateway").await?, running.address("admin").await?);
    let deliveries = Deliveries::begin(address);

    // The sidecar trusts both, and still shows the certificate of the old one.
    let (before, server) = (taken_over(&guarded.program), guarded.authority.server()?);
    guarded.tls.replace(&[("tls.crt", &server.certificate), ("tls.key", &server.key), ("ca.crt", &both)])?;
    once_taken_over(&guarded.program, before).await;
    // The gateway trusts both and shows its new certificate.
    let before = taken_over(&running);
    files.replace(&borrowed(&own(&both, &second)))?;
    once_taken_over(&running, before).await;
    deliveries.go_on_over_a_new_connection(&proxy).await;
    // The sidecar trusts the new authority only and shows a certificate of it.
    let (before, server) = (taken_over(&guarded.program), successor.server()?);
    guarded.tls.replace(&[("tls.crt", &server.certificate), ("tls.key", &server.key), ("ca.crt", &new)])?;
    once_taken_over(&guarded.program, before).await;
    deliveries.go_on_over_a_new_connection(&proxy).await;
    // So does the gateway.
    let before = taken_over(&running);
    files.replace(&borrowed(&own(&new, &second)))?;
    once_taken_over(&running, before).await;
    deliveries.go_on_over_a_new_connection(&proxy).await;

    // What cannot be used changes nothing, is reported and counted.
    let failed = async || -> Result<u64> {
        let page = String::from_utf8(http_client::get(admin, "/metrics").await?.body.to_vec())?;
        let row = "oncegate_gateway_sidecar_reloads_total{files=\"certificates\",result=\"failed\"} ";
        Ok(page.lines().find_map(|line| line.strip_prefix(row)).context("a row")?.parse()?)
    };
    let before = failed().await?;
    files.replace(&borrowed(&own("no certificate", &second)))?;
    eventually("the failure is counted", async || (failed().await.ok()? > before).then_some(())).await;
    deliveries.go_on_over_a_new_connection(&proxy).await;
    deliveries.end().await?;

    // The certificate of the beginning is of no use any more: it was really another one that went on.
    let before = taken_over(&running);
    files.replace(&borrowed(&own(&new, &first)))?;
    once_taken_over(&running, before).await;
    proxy.reset();
    eventually("the old certificate is refused", async || {
        (deliver(&mut running).await.ok()? == "503 unavailable").then_some(())
    })
    .await;
    Ok(())
}

fn borrowed<'a>(files: &'a [(&'static str, String); 3]) -> [(&'static str, &'a str); 3] {
    files.each_ref().map(|(name, content)| (*name, content.as_str()))
}
