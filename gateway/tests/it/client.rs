//! A client that sends exactly the bytes it is told to.

use std::{net::SocketAddr, time::Duration};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// The secret of every gateway in these tests.
pub(crate) const SECRET: &str = "whsec_test";

/// No wait in these tests should take longer: then the test fails instead of hanging.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The path of Stripe's webhooks.
pub(crate) const STRIPE: &str = "/webhooks/payments/stripe";

/// A parsed answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    /// The value of a header, if there is exactly one.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(key, _)| key == name);
        let (_, value) = found.next()?;
        assert!(found.next().is_none(), "{name} stands twice");
        Some(value)
    }

    /// Status and body, for comparison.
    pub(crate) fn said(&self) -> (u16, &str) {
        (self.status, &self.body)
    }

    fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no complete answer in {text:?}"));
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines
            .map(|line| {
                let (name, value) = line.split_once(": ").unwrap();
                (name.to_ascii_lowercase(), value.to_owned())
            })
            .collect();
        Self { status, headers, body: body.to_owned() }
    }
}

/// The body of an event.
pub(crate) fn event(id: &str) -> String {
    format!(r#"{{"id":"{id}","object":"event","type":"charge.succeeded","data":{{"object":{{}}}}}}"#)
}

/// The value of `Stripe-Signature` for `body`, made now.
pub(crate) fn signature(secret: &str, body: &str) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(format!("{now}.{body}").as_bytes());
    format!("t={now},v1={}", hex::encode(mac.finalize().into_bytes()))
}

/// A request whose connection is closed after the answer.
pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> String {
    let mut text = format!("{method} {path} HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if !headers.iter().any(|(name, _)| matches!(*name, "content-length" | "transfer-encoding")) {
        text.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    text.push_str("\r\n");
    text.push_str(body);
    text
}

/// A signed webhook.
pub(crate) fn webhook(body: &str) -> String {
    let signature = signature(SECRET, body);
    request("POST", STRIPE, &[("stripe-signature", &signature), ("content-type", "application/json")], body)
}

/// Sends `bytes`, and reads until the gateway closes.
pub(crate) async fn send(gateway: SocketAddr, bytes: impl AsRef<[u8]>) -> Answer {
    let mut stream = TcpStream::connect(gateway).await.unwrap();
    // The gateway may answer and close before it has read everything.
    let _ = stream.write_all(bytes.as_ref()).await;
    let mut answer = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("an answer in time");
    if let Err(error) = read {
        assert!(!answer.is_empty(), "no answer: {error}");
    }
    Answer::parse(&answer)
}

/// Sends the signed webhook of an event.
pub(crate) fn deliver(gateway: SocketAddr, id: &str) -> impl Future<Output = Answer> + use<> {
    send(gateway, webhook(&event(id)))
}
