use std::{path::Path, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::reload::FilesError;

const PATIENCE: Duration = Duration::from_secs(5);

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A certificate with its key, for either side.
    fn issue(&self, uri: &str) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.subject_alt_names.push(SanType::URI(uri.try_into().unwrap()));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

fn write(directory: &Path, name: &str, content: &str) -> std::path::PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

fn why(error: &FilesError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// No provider is installed in this process, and none has to be (T52).
#[tokio::test]
async fn t52_a_handshake_needs_no_installed_provider_and_tells_who_calls() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let ca = write(directory.path(), "ca", &authority.pem);
    let (certificate, key) = authority.issue("spiffe://test/server");
    let server = ServerTlsFiles {
        certificate: write(directory.path(), "cert", &certificate),
        key: write(directory.path(), "key", &key),
        client_ca: Some((ca.clone(), ClientAuth::Required)),
    };
    let server = ServerTls::read(&server, &[b"h2"]).unwrap();
    let (certificate, key) = authority.issue("spiffe://test/gateway");
    let identity = (write(directory.path(), "client-cert", &certificate), write(directory.path(), "client-key", &key));
    let client = ClientTls::read(&ClientTlsFiles { ca: Some(ca), identity: Some(identity) }, &[b"h2"]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let calling = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut stream = client.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
    };
    let answering = async {
        let (stream, _) = listener.accept().await.unwrap();
        let (mut stream, peer) = server.accept(stream, PATIENCE).await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        (said, peer.unwrap())
    };
    let ((), (said, peer)) = tokio::join!(calling, answering);
    assert_eq!(said, "hello");
    assert_eq!(peer.uris, ["spiffe://test/gateway"]);
    assert_eq!(peer.dns_names, ["localhost"]);
}

#[tokio::test]
async fn a_client_that_says_nothing_is_sent_away_in_time() {
    let directory = tempfile::tempdir().unwrap();
    let (certificate, key) = Authority::new().issue("spiffe://test/server");
    let files = ServerTlsFiles {
        certificate: write(directory.path(), "cert", &certificate),
        key: write(directory.path(), "key", &key),
        client_ca: None,
    };
    let server = ServerTls::read(&files, &[]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let _silent = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let ended = server.accept(stream, Duration::from_millis(50)).await;
    assert!(matches!(ended, Err(HandshakeError::TimedOut)));
}

/// Peers that connect and stay silent cost others nothing (W15), however many there
/// are.
#[tokio::test]
async fn w15_silent_peers_keep_nobody_from_a_handshake() {
    const SILENT: usize = 200;
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let (certificate, key) = authority.issue("spiffe://test/server");
    let files = ServerTlsFiles {
        certificate: write(directory.path(), "cert", &certificate),
        key: write(directory.path(), "key", &key),
        client_ca: None,
    };
    let server = ServerTls::read(&files, &[]).unwrap();
    let ca = write(directory.path(), "ca", &authority.pem);
    let client = ClientTls::read(&ClientTlsFiles { ca: Some(ca), identity: None }, &[]).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut silent = Vec::new();
    for _ in 0..SILENT {
        let peer = TcpStream::connect(address).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let server = server.clone();
        silent.push((peer, tokio::spawn(async move { server.accept(stream, PATIENCE * 100).await.is_ok() })));
    }
    // Each of them has been waited for once.
    tokio::task::yield_now().await;
    let calling = async {
        let stream = TcpStream::connect(address).await.unwrap();
        client.connect(ServerName::try_from("localhost").unwrap(), stream).await
    };
    let answering = async {
        let (stream, _) = listener.accept().await.unwrap();
        server.accept(stream, PATIENCE).await
    };
    let (called, answered) = tokio::join!(calling, answering);
    answered.expect("its own handshake in its own time");
    called.unwrap();
    assert!(silent.iter().all(|(_, waiting)| !waiting.is_finished()), "the others still have theirs");
}

#[test]
fn t52_what_cannot_work_is_said_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::new();
    let (certificate, key) = authority.issue("spiffe://test/a");
    let (_, other_key) = authority.issue("spiffe://test/b");
    for (certificate, key, wanted) in [
        (certificate.as_str(), other_key.as_str(), "certificate and key cannot be used together"),
        (&certificate, "", "there is no private key in the file"),
        ("", &key, "there is no certificate in the file"),
        (&key, &key, "there is no certificate in the file"),
        ("-----BEGIN CERTIFICATE-----\nx", &key, "the certificate is not PEM"),
    ] {
        let files = ServerTlsFiles {
            certificate: write(directory.path(), "cert", certificate),
            key: write(directory.path(), "key", key),
            client_ca: None,
        };
        let said = why(&ServerTls::read(&files, &[]).unwrap_err());
        assert!(said.contains(wanted), "{wanted} in {said}");
        assert!(!said.contains("BEGIN PRIVATE"), "{said}");
    }
}
