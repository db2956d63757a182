//! Stripe's signatures, implemented independently from their description so that a mistake in the product's code is
//! not repeated here.

use std::time::{SystemTime, UNIX_EPOCH};

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// The header that carries the signature.
pub const HEADER: &str = "stripe-signature";

/// The value of the header for `body`, signed now.
pub fn sign(secret: &str, body: &[u8]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock stands after 1970").as_secs();
    sign_at(secret, body, now)
}

/// The value of the header for `body`, signed at a time in seconds.
pub fn sign_at(secret: &str, body: &[u8], time: u64) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("HMAC takes a key of any length");
    mac.update(time.to_string().as_bytes());
    mac.update(b".");
    mac.update(body);
    format!("t={time},v1={}", hex::encode(mac.finalize().into_bytes()))
}

/// A unique event id.
pub fn event_id() -> String {
    format!("evt_{}", uuid::Uuid::new_v4().simple())
}

/// The body of a snapshot event, as Stripe sends it.
pub fn event(id: &str, event_type: &str) -> Vec<u8> {
    let event = serde_json::json!({
        "id": id,
        "object": "event",
        "api_version": "2026-08-27",
        "created": 1_790_000_000,
        "data": { "object": { "id": format!("pi_{id}"), "object": "payment_intent", "amount": 4200, "currency": "eur" } },
        "livemode": false,
        "pending_webhooks": 1,
        "request": { "id": null, "idempotency_key": null },
        "type": event_type,
    });
    serde_json::to_vec_pretty(&event).expect("a JSON value can be written")
}
