//! Entry points for hostile input: whatever the bytes, nothing here panics, hangs, or allocates much more than it is given.
//! Only in tests, and with the feature `fuzzing`, which nothing but the fuzzer sets.

use std::{
    pin::pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll, Waker},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, HeaderName, HeaderValue};
use oncegate_runtime::secret::Secret;
use sha2::{Digest as _, Sha256};

use crate::providers::{
    Provider, Signed,
    flutterwave::{Flutterwave, Version},
    paypal::{
        Certificates, Environment, PayPal,
        cert_url::CertUrl,
        trust::{Chain, Trust},
    },
    paystack::Paystack,
    standard_webhooks::{self, StandardWebhooks},
    stripe::{self, Stripe},
};

/// The index of the provider whose header is the secret itself, and that secret.
const PLAIN: usize = 1;
const FLUTTERWAVE: &str = "hash";

/// One of each.
static PROVIDERS: LazyLock<Vec<Provider>> = LazyLock::new(|| {
    let secrets = |text: &str| vec![Secret::new(text).expect("it is not blank")];
    let trust = Arc::new(Trust::in_nobody(Environment::Live));
    let given = Certificates::Given(Arc::default());
    let paypal = PayPal::new(&secrets("8PT597110X687430LKGECATA"), Environment::Live, given, trust, None);
    let standard =
        StandardWebhooks::new(&secrets("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"), standard_webhooks::TOLERANCE);
    vec![
        Provider::Stripe(Stripe::new(&secrets("whsec_test"), stripe::TOLERANCE)),
        Provider::Flutterwave(Flutterwave::new(&secrets(FLUTTERWAVE), Version::V3)),
        Provider::Flutterwave(Flutterwave::new(&secrets(FLUTTERWAVE), Version::V4)),
        Provider::Paystack(Paystack::new(&secrets("sk_test"))),
        Provider::PayPal(Box::new(paypal.expect("the id is one"))),
        Provider::StandardWebhooks(standard.expect("the secret is one")),
    ]
});

/// Parses header lines, a blank line and a body, and gives them to every provider.
pub fn signature_headers(input: &[u8]) {
    let mut headers = HeaderMap::new();
    let mut rest = input;
    loop {
        let end = rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len());
        let (line, after) = rest.split_at(end);
        rest = after.get(1..).unwrap_or_default();
        if line.is_empty() {
            break;
        }
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name), HeaderValue::from_bytes(value)) {
            // The listener reads no request with more than 100 headers.
            if headers.len() < 100 {
                headers.append(name, value);
            }
        }
    }
    let now: SystemTime = UNIX_EPOCH + Duration::from_secs(1_770_000_000);
    for (place, provider) in PROVIDERS.iter().enumerate() {
        if let Ok(verification) = provider.begin(&headers) {
            let finish = pin!(verification.finish(rest, now));
            // The certificates are given beforehand: nothing has to be waited for.
            let Poll::Ready(verdict) = finish.poll(&mut Context::from_waker(Waker::noop())) else {
                panic!("it waits for something")
            };
            // None of the inputs is signed with these secrets.
            let plain = place == PLAIN && headers.get("verif-hash").is_some_and(|hash| hash == FLUTTERWAVE);
            assert!(verdict.is_err() || plain, "a signature that nobody made is accepted");
        }
    }
}

/// A verified body at every provider: the event's name fits the contract, and is the same each time.
pub fn event_key(input: &[u8]) {
    let digest = || Sha256::digest(input).into();
    let visible = |text: &str, most: usize| {
        (1..=most).contains(&text.len()) && text.bytes().all(|byte| (0x21..=0x7E).contains(&byte))
    };
    for provider in PROVIDERS.iter() {
        let signed = Signed::default();
        let Ok(identity) = provider.identify(&signed, input, digest) else { continue };
        assert!(visible(&identity.event_id, 255), "{:?}", identity.event_id);
        assert!(visible(&identity.event_type, 128), "{:?}", identity.event_type);
        assert_eq!(provider.identify(&signed, input, digest), Ok(identity));
        assert!(serde_json::from_slice::<serde::de::IgnoredAny>(input).is_ok(), "what is no JSON has no name");
    }
}

/// The address of a certificate. If it is accepted it is one of PayPal's, and exactly the given text is fetched.
pub fn certificate_url(input: &[u8]) {
    for environment in [Environment::Live, Environment::Sandbox] {
        let Some(url) = CertUrl::parse(input, environment) else { continue };
        assert_eq!(url.to_string().as_bytes(), input);
        assert!(url.host().ends_with(".paypal.com"));
        assert!(!url.name().contains(['.', '/', '\\', '?', '#', '@', '%']));
    }
}

/// The answer from the address of a certificate. Whatever parses as a chain is not trusted here, and verifies no signature.
pub fn certificate_chain(input: &[u8]) {
    static TRUST: LazyLock<Trust> =
        LazyLock::new(|| Trust::new(Environment::Live, None, None).expect("the public roots can be used"));
    let now: SystemTime = UNIX_EPOCH + Duration::from_secs(1_770_000_000);
    if let Some(chain) = Chain::parse(input) {
        assert!(TRUST.verify(&chain, now).is_err(), "a certificate that nobody issued is PayPal's");
        assert!(!chain.verify_signature(input, input), "it signs anything");
    }
}

#[cfg(test)]
mod tests {
    use oncegate_inputs::campaign;

    #[test]
    fn no_signature_header_does_harm() {
        campaign("signature_headers", super::signature_headers);
    }

    #[test]
    fn no_body_does_harm() {
        campaign("event_key", super::event_key);
    }

    #[test]
    fn no_certificate_does_harm() {
        campaign("certificate_chain", super::certificate_chain);
    }

    #[test]
    fn no_certificate_address_does_harm() {
        campaign("certificate_url", super::certificate_url);
    }
}
