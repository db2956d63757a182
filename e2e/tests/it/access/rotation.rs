use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
};

use anyhow::{Context as _, Result};
use oncegate_e2e::{certificates::Authority, eventually};
use oncegate_runtime::tls::{ClientTls, ClientTlsFiles};
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

use super::{
    Guarded,
    caller::{attempt, pool},
    token,
};

impl Guarded {
    /// The certificate that is shown to a new connection.
    async fn shown(&self) -> Result<Vec<u8>> {
        let tls = ClientTls::read(&ClientTlsFiles { ca: Some(self.ca()), identity: None }, &[b"h2"])?;
        let stream = TcpStream::connect(self.url.trim_start_matches("https://")).await?;
        let stream = tls.connect("localhost".try_into()?, stream).await?;
        let certificates = stream.get_ref().1.peer_certificates().context("the server shows a certificate")?;
        Ok(certificates[0].to_vec())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_change_while_calls_go_on_and_none_fails() -> Result<()> {
    let mut guarded = Guarded::start().await?;
    let (url, ca) = (guarded.url.clone(), guarded.ca());
    let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let calling = AbortOnDropHandle::new(tokio::spawn({
        let (stop, calls, url, ca) = (stop.clone(), calls.clone(), url.clone(), ca.clone());
        async move {
            let lasting = pool(&url, &ca, None, Some(&token("caller")))?;
            while !stop.load(Relaxed) {
                // A connection that lasts, and a new one.
                let new = pool(&url, &ca, None, Some(&token("caller")))?;
                for pool in [&lasting, &new] {
                    assert_eq!(attempt(pool, "CheckAndLock").await?, '+');
                    calls.fetch_add(1, Relaxed);
                }
            }
            anyhow::Ok(())
        }
    }));
    for _ in 0..3 {
        let before = guarded.shown().await?;
        let server = guarded.authority.server()?;
        let trusted = guarded.authority.pem().to_owned();
        guarded.tls.replace(&[("tls.crt", &server.certificate), ("tls.key", &server.key), ("ca.crt", &trusted)])?;
        eventually("the new certificate is shown", async || {
            let shown = guarded.shown().await.ok()?;
            (shown != before).then_some(())
        })
        .await;
        // Goes on with it.
        let made = calls.load(Relaxed);
        eventually("calls are made with it", async || (calls.load(Relaxed) > made + 2).then_some(())).await;
    }

    // One without its key changes nothing, and is reported.
    let before = guarded.shown().await?;
    let (other, trusted) = (guarded.authority.server()?, guarded.authority.pem().to_owned());
    guarded.tls.replace(&[("tls.crt", &other.certificate), ("tls.key", "no key"), ("ca.crt", &trusted)])?;
    guarded.program.line_where("the bad certificate is reported", |line| line.contains("keeping the old ones")).await?;
    assert_eq!(guarded.shown().await?, before);

    stop.store(true, Relaxed);
    calling.await??;
    Ok(())
}

#[tokio::test]
async fn clients_of_an_authority_that_is_no_longer_trusted_cannot_connect() -> Result<()> {
    let mut guarded = Guarded::start().await?;
    let client = guarded.authority.client("spiffe://test/caller", false)?.write(guarded.directory.path(), "client")?;
    let trusted = async || attempt(&pool(&guarded.url, &guarded.ca(), Some(&client), None)?, "CheckAndLock").await;
    assert_eq!(trusted().await?, '+');
    let (server, successor) = (guarded.authority.server()?, Authority::new()?);
    guarded.tls.replace(&[("tls.crt", &server.certificate), ("tls.key", &server.key), ("ca.crt", successor.pem())])?;
    let refused = async || attempt(&pool(&guarded.url, &guarded.ca(), Some(&client), None)?, "CheckAndLock").await;
    eventually("new connections are refused", async || (refused().await.ok()? == 'X').then_some(())).await;
    Ok(())
}
