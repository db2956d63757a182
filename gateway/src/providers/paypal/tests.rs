use http::HeaderValue;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    PKCS_RSA_SHA256, RsaKeySize, SigningKey as _, date_time_ymd,
};

use super::*;

/// Seconds at noon of 2026-02-02, within the validity of everything that is valid here.
const NOW: u64 = 1_770_033_600;
const LIVE_NAME: &str = "messageverificationcerts.paypal.com";
const URL: &str = "https://api.paypal.com/v1/notifications/certs/CERT-1";
const BODY: &[u8] = br#"{"id":"WH-1","event_type":"PAYMENT.CAPTURE.COMPLETED"}"#;

pub(super) fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
}

/// A root, and what it issues.
pub(super) struct Authority {
    root: CertifiedIssuer<'static, KeyPair>,
    leaf_key: KeyPair,
}

impl Authority {
    pub(super) fn new() -> Self {
        Self::with_leaf_key(RsaKeySize::_2048)
    }

    fn with_leaf_key(size: RsaKeySize) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "Test root");
        let root = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let leaf_key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, size).unwrap();
        Self { root, leaf_key }
    }

    pub(super) fn root(&self) -> String {
        self.root.pem()
    }

    /// A leaf for `name`, as PayPal's are, changed by `change`.
    pub(super) fn leaf(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> String {
        self.params(name, change).signed_by(&self.leaf_key, &self.root).unwrap().pem()
    }

    fn params(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = date_time_ymd(2026, 1, 1);
        params.not_after = date_time_ymd(2026, 12, 31);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        params
    }

    fn sign(&self, message: &str) -> String {
        STANDARD.encode(self.leaf_key.sign(message.as_bytes()).unwrap())
    }

    pub(super) fn trust(&self, environment: Environment) -> Trust {
        Trust::new(environment, Some(self.root().as_bytes()), None).unwrap()
    }
}

fn trusted(trust: &Trust, pem: &str) -> Result<(), Refusal> {
    trust.verify(&Chain::parse(pem.as_bytes()).unwrap(), now())
}

#[test]
fn w9_a_certificate_is_paypals_only_with_chain_name_dates_usage_and_key() {
    let authority = Authority::new();
    let trust = authority.trust(Environment::Live);
    let leaf = |name: &str, change: &dyn Fn(&mut CertificateParams)| authority.leaf(name, change);
    let same = |_: &mut CertificateParams| {};
    for (what, pem, wanted) in [
        ("good", leaf(LIVE_NAME, &same), Ok(())),
        ("the sandbox's", leaf("messageverificationcerts.sandbox.paypal.com", &same), Err(())),
        ("another of PayPal's", leaf("api.paypal.com", &same), Err(())),
        ("a wildcard", leaf("*.paypal.com", &same), Err(())),
        ("a longer name", leaf("messageverificationcerts.paypal.com.evil.example", &same), Err(())),
        (
            "a name in the subject only",
            leaf("evil.example", &|params| params.distinguished_name.push(DnType::CommonName, LIVE_NAME)),
            Err(()),
        ),
        ("expired", leaf(LIVE_NAME, &|params| params.not_after = date_time_ymd(2026, 2, 1)), Err(())),
        ("to come", leaf(LIVE_NAME, &|params| params.not_before = date_time_ymd(2026, 2, 3)), Err(())),
        (
            "for servers only",
            leaf(LIVE_NAME, &|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
            Ok(()),
        ),
        (
            "for clients only",
            leaf(LIVE_NAME, &|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]),
            Err(()),
        ),
        (
            "an authority's",
            leaf(LIVE_NAME, &|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
            Err(()),
        ),
        ("of another root", Authority::new().leaf(LIVE_NAME, same), Err(())),
        (
            "signed by itself",
            authority.params(LIVE_NAME, same).self_signed(&authority.leaf_key).unwrap().pem(),
            Err(()),
        ),
        (
            "no RSA",
            authority.params(LIVE_NAME, same).signed_by(&KeyPair::generate().unwrap(), &authority.root).unwrap().pem(),
            Err(()),
        ),
    ] {
        assert_eq!(trusted(&trust, &pem), wanted.map_err(|()| Refusal::UntrustedCertificate), "{what}");
        assert!(trusted(&Trust::in_nobody(Environment::Live), &pem).is_err(), "{what}");
        let public = Trust::new(Environment::Live, None, None).unwrap();
        assert!(trusted(&public, &pem).is_err(), "{what}: no public root");
    }
}

#[test]
fn short_keys_are_refused() {
    let root = include_bytes!("tests/small_key_root.pem");
    let trust = Trust::new(Environment::Live, Some(root), None).unwrap();
    let chain = Chain::parse(include_bytes!("tests/small_key_leaf.pem")).unwrap();
    // Long valid, so that nothing but the 1,024 bits is wrong with it.
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000);
    assert_eq!(trust.verify(&chain, now), Err(Refusal::UntrustedCertificate));
}

#[test]
fn an_intermediate_comes_with_the_answer_or_from_the_configuration() {
    let authority = Authority::new();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.distinguished_name.push(DnType::CommonName, "Test intermediate");
    let between = CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), &authority.root).unwrap();
    let leaf = authority.params(LIVE_NAME, |_| {}).signed_by(&authority.leaf_key, &between).unwrap().pem();
    let trust = authority.trust(Environment::Live);
    assert_eq!(trusted(&trust, &leaf), Err(Refusal::UntrustedCertificate));
    assert_eq!(trusted(&trust, &format!("{leaf}{}", between.pem())), Ok(()));
    let configured =
        Trust::new(Environment::Live, Some(authority.root().as_bytes()), Some(between.pem().as_bytes())).unwrap();
    assert_eq!(trusted(&configured, &leaf), Ok(()));
}

#[test]
fn what_is_no_certificate_is_no_chain() {
    let leaf = Authority::new().leaf(LIVE_NAME, |_| {});
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let cut = &leaf[..leaf.len() / 2];
    for answer in ["", "<html>502 Bad Gateway</html>", broken, cut, &leaf.repeat(9), "\u{feff}", "-----BEGIN"] {
        assert!(Chain::parse(answer.as_bytes()).is_none(), "{answer}");
    }
    assert!(Chain::parse(format!("Subject: x\r\n{leaf}\r\n{leaf}").as_bytes()).is_some());
}

/// A request, and what is made of it.
struct Request {
    authority: Authority,
    headers: Vec<(&'static str, String)>,
}

impl Request {
    fn new() -> Self {
        Self::of(Authority::new())
    }

    fn of(authority: Authority) -> Self {
        let message = format!("id-1|2026-02-02T12:00:00Z|WID|{}", crc32fast::hash(BODY));
        let headers = vec![
            ("paypal-transmission-id", "id-1".to_owned()),
            ("paypal-transmission-time", "2026-02-02T12:00:00Z".to_owned()),
            ("paypal-transmission-sig", authority.sign(&message)),
            ("paypal-cert-url", URL.to_owned()),
            ("paypal-auth-algo", "SHA256withRSA".to_owned()),
        ];
        Self { authority, headers }
    }

    async fn verdict(
        &self,
        ids: &[&str],
        tolerance: Option<u64>,
        change: impl FnOnce(&mut HeaderMap),
    ) -> Result<String, Refusal> {
        let mut headers = HeaderMap::new();
        for (name, value) in &self.headers {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        change(&mut headers);
        let ids: Vec<_> = ids.iter().map(|id| Secret::new(*id).unwrap()).collect();
        let answers = HashMap::from([(URL.to_owned(), self.authority.leaf(LIVE_NAME, |_| {}))]);
        let paypal = PayPal::new(
            &ids,
            Environment::Live,
            Certificates::Given(Arc::new(answers)),
            Arc::new(self.authority.trust(Environment::Live)),
            tolerance.map(Duration::from_secs),
        )
        .unwrap();
        paypal.begin(&headers)?.finish(BODY, now()).await.map(|(id, _)| id)
    }
}

#[tokio::test]
async fn w9_larger_keys_are_taken_up_to_where_they_are_permitted() {
    for size in [RsaKeySize::_3072, RsaKeySize::_4096] {
        let request = Request::of(Authority::with_leaf_key(size));
        assert_eq!(request.verdict(&["WID"], None, |_| {}).await, Ok("id-1".to_owned()), "{size:?}");
    }
}

// T38
#[tokio::test]
async fn headers_are_there_once_within_limits_and_pinned() {
    let request = Request::new();
    assert_eq!(request.verdict(&["WID"], None, |_| {}).await, Ok("id-1".to_owned()));
    assert_eq!(request.verdict(&["OTHER", "WID"], None, |_| {}).await, Ok("id-1".to_owned()));
    assert_eq!(request.verdict(&["OTHER"], None, |_| {}).await, Err(Refusal::BadSignature));
    assert_eq!(request.verdict(&[], None, |_| {}).await, Err(Refusal::MissingSecret));
    for (name, bytes_max) in HEADERS {
        let removed = request.verdict(&["WID"], None, |headers| drop(headers.remove(&name))).await;
        assert_eq!(removed, Err(Refusal::MissingHeader), "{name}");
        let repeat = |headers: &mut HeaderMap| {
            let value = headers[&name].clone();
            headers.append(&name, value);
        };
        assert_eq!(request.verdict(&["WID"], None, repeat).await, Err(Refusal::MalformedHeader), "{name}");
        let long = |headers: &mut HeaderMap| {
            headers.insert(&name, HeaderValue::from_str(&"x".repeat(bytes_max + 1)).unwrap());
        };
        assert_eq!(request.verdict(&["WID"], None, long).await, Err(Refusal::MalformedHeader), "{name}");
    }
    for (name, value, wanted) in [
        (ID, "id|1", Refusal::MalformedHeader),
        (ID, "", Refusal::MalformedHeader),
        (TIME, "2026-02-02 12:00", Refusal::MalformedHeader),
        (ID, "id-2", Refusal::BadSignature),
        (TIME, "2026-02-02T12:00:01Z", Refusal::BadSignature),
        (SIGNATURE, "no base64!", Refusal::BadSignature),
        (SIGNATURE, "AAAA", Refusal::BadSignature),
        (ALGORITHM, "SHA1withRSA", Refusal::UnsupportedAlgorithm),
        (ALGORITHM, "sha256withrsa", Refusal::UnsupportedAlgorithm),
        (ALGORITHM, "none", Refusal::UnsupportedAlgorithm),
        (CERT_URL, "https://evil.example/v1/notifications/certs/CERT-1", Refusal::UntrustedCertUrl),
        (CERT_URL, "https://api.sandbox.paypal.com/v1/notifications/certs/CERT-1", Refusal::UntrustedCertUrl),
        (CERT_URL, "https://api.paypal.com/v1/notifications/certs/CERT-2", Refusal::CertUnavailable(Lack::Name)),
    ] {
        let change = |headers: &mut HeaderMap| drop(headers.insert(&name, HeaderValue::from_static(value)));
        assert_eq!(request.verdict(&["WID"], None, change).await, Err(wanted), "{name}: {value}");
    }
    let bytes = |headers: &mut HeaderMap| drop(headers.insert(ID, HeaderValue::from_bytes(b"\xff").unwrap()));
    assert_eq!(request.verdict(&["WID"], None, bytes).await, Err(Refusal::MalformedHeader));
}

#[test]
fn w9_a_signature_that_no_permitted_key_could_have_made_is_refused_before_any_certificate_is_looked_for() {
    let request = Request::new();
    let ids = [Secret::new("WID").unwrap()];
    let given = Certificates::Given(Arc::default());
    let trust = Arc::new(request.authority.trust(Environment::Live));
    let paypal = PayPal::new(&ids, Environment::Live, given, trust, None).unwrap();
    let begin = |bytes: usize| {
        let mut headers = HeaderMap::new();
        for (name, value) in &request.headers {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers.insert(SIGNATURE, HeaderValue::from_str(&STANDARD.encode(vec![1; bytes])).unwrap());
        paypal.begin(&headers).map(drop)
    };
    for bytes in [0, 1, 128, 255] {
        assert_eq!(begin(bytes), Err(Refusal::BadSignature), "{bytes}");
    }
    // From 2,048 bits to 8,192.
    for bytes in [256, 384, 512, 1_024] {
        assert_eq!(begin(bytes), Ok(()), "{bytes}");
    }
    for bytes in [1_025, 1_026] {
        assert!(begin(bytes).is_err(), "{bytes}");
    }
}

#[tokio::test]
async fn age_is_limited_only_where_that_is_asked_for() {
    let mut request = Request::new();
    let time = "2026-02-02T11:50:00Z";
    let message = format!("id-1|{time}|WID|{}", crc32fast::hash(BODY));
    request.headers[1].1 = time.to_owned();
    request.headers[2].1 = request.authority.sign(&message);
    assert!(request.verdict(&["WID"], None, |_| {}).await.is_ok());
    assert!(request.verdict(&["WID"], Some(600), |_| {}).await.is_ok());
    assert_eq!(request.verdict(&["WID"], Some(599), |_| {}).await, Err(Refusal::TimestampOutOfTolerance));
    let no_time = |headers: &mut HeaderMap| drop(headers.insert(TIME, HeaderValue::from_static("yesterday")));
    assert_eq!(request.verdict(&["WID"], Some(600), no_time).await, Err(Refusal::MalformedHeader));
}
