//! What does not depend on the process: its clock, and how it was linked.

use std::{fs, path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use oncegate_e2e::{program::Oncegate, stripe, upstream};
use rcgen::{CertificateParams, CertifiedIssuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

use crate::setup::{Everything, Ledger, on_each_ledger, word};

/// T11. The clocks of the pods do not matter, because nobody looks at them: of the sidecar's sources only the embedded
/// store's clock, which is that store's database clock and has tests of its own, reads the system's.
#[test]
fn nothing_that_decides_reads_the_clock_of_its_pod() {
    fn look(directory: &Path, found: &mut Vec<String>) {
        for entry in fs::read_dir(directory).expect("a directory of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                look(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a source");
                let reads = ["SystemTime::now", "UNIX_EPOCH.elapsed", "Timestamp::now", "Utc::now"];
                if reads.iter().any(|read| text.contains(read)) {
                    found.push(path.to_string_lossy().replace('\\', "/"));
                }
            }
        }
    }
    let mut found = Vec::new();
    look(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../sidecar/src"), &mut found);
    let decides = |path: &&String| {
        ["/event", "/ledger", "/coordinator", "/cache", "/grpc", "/maintenance"].iter().any(|part| path.contains(part))
    };
    let deciding: Vec<_> =
        found.iter().filter(decides).filter(|path| !path.ends_with("ledger/sqlite/clock.rs")).collect();
    // Whether a token of the API has expired is for the clock of who was given it; it decides on no event.
    let deciding: Vec<_> = deciding.into_iter().filter(|path| !path.ends_with("grpc/access.rs")).collect();
    assert!(deciding.is_empty(), "{deciding:?}");
    assert!(found.iter().any(|path| path.ends_with("ledger/sqlite/clock.rs")), "the search finds nothing at all");
}

/// An application by https, with a certification authority of its own in a file.
async fn application(roots: &Path) -> Result<String> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let root = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let leaf = CertificateParams::new(vec!["localhost".to_owned()])?.signed_by(&key, &root)?;
    fs::write(roots, root.pem())?;
    // By name, whatever is installed in this process.
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![leaf.der().clone()],
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der())),
        )?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let port = listener.local_addr()?.port();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut stream = acceptor.accept(stream).await?;
                let mut request = Vec::new();
                while !request.ends_with(b"}") {
                    if stream.read_buf(&mut request).await? == 0 {
                        break;
                    }
                }
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await?;
                stream.shutdown().await
            });
        }
    });
    Ok(format!("https://localhost:{port}/payments"))
}

on_each_ledger!(an_application_by_https_is_reached_and_one_of_strangers_is_not);

/// T52. TLS works as the program is linked, whichever providers of cryptography are in it.
async fn an_application_by_https_is_reached_and_one_of_strangers_is_not(ledger: Ledger) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let roots = directory.path().join("roots.pem");
    let url = application(&roots).await?;
    let everything = Everything::start_as(ledger, |command: Oncegate| {
        command.env("UPSTREAM_URL", url).env("SSL_CERT_FILE", roots.to_string_lossy())
    })
    .await?;
    let body = stripe::event(&stripe::event_id(), "charge.succeeded");
    assert_eq!(word(&everything.send(&body).await?), "200 processed");

    let strange = application(&directory.path().join("others.pem")).await?;
    let everything = Everything::start_as(Ledger::Sqlite, |command: Oncegate| {
        command.env("UPSTREAM_URL", strange).env("SSL_CERT_FILE", roots.to_string_lossy())
    })
    .await?;
    assert_eq!(word(&everything.send(&body).await?), "500 failed");
    assert!(!everything.program.output().contains("panicked"), "{}", everything.program.output());
    Ok(())
}

/// T52. What cannot work is said at the start, and not by a panic at the first delivery.
#[tokio::test]
async fn without_trust_roots_an_application_by_https_is_a_clear_refusal_to_start() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let empty = directory.path().join("empty.pem");
    fs::write(&empty, "")?;
    let finished = Oncegate::new(directory.path(), ["gateway"])?
        .env("GATEWAY_LISTEN", "127.0.0.1:0")
        .env("UPSTREAM_URL", "https://localhost:1/")
        .env("STRIPE_WEBHOOK_SECRET", "whsec_of_no_use")
        .env("SSL_CERT_FILE", empty.to_string_lossy())
        .run()
        .await?;
    assert_eq!(finished.code, Some(1), "{finished}");
    assert!(finished.stderr.contains("trust roots") && finished.stderr.contains("SSL_CERT_FILE"), "{finished}");
    assert!(!finished.stderr.contains("panicked"), "{finished}");
    Ok(())
}

/// T52. And where nobody has chosen a provider for the process, as in this one.
#[tokio::test]
async fn a_gateway_can_be_made_in_a_process_that_chose_no_provider() -> Result<()> {
    let options = oncegate_gateway::config::Options {
        gateway_listen: "127.0.0.1:0".parse()?,
        upstream_url: Some(upstream::refused_url()?.replace("http:", "https:")),
        stripe_webhook_secret: Some("whsec_of_no_use".into()),
        ..oncegate_gateway::config::Options::default()
    };
    let settings = options.validate().ok().context("usable options")?;
    let channel = oncegate_gateway::sidecar::channel(&settings);
    assert!(oncegate_gateway::Gateway::bind(settings, channel).await.is_ok());
    Ok(())
}
