use super::*;

const TOKEN: &str = "a-token-of-the-test";

fn directory(text: &str) -> Directory {
    file::parse(text).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(text: &str) -> String {
    file::parse(text).expect_err(text).to_string()
}

fn at(text: &str) -> Timestamp {
    text.parse().expect("a time")
}

#[test]
fn identities_are_known_by_token_digest_and_certificate() {
    let digest = hex::encode(Sha256::digest("another-token-of-the-test"));
    let directory = directory(&format!(
        r#"
        [[identity]]
        name = "gateway"
        role = "caller"
        tenants = ["default", "eu"]
        token = "{TOKEN}"

        [[identity]]
        name = "ops"
        role = "operator"
        token_sha256 = ["{digest}"]
        certificates = ["uri:spiffe://cluster/ops", "dns:ops.example.com"]
        expires = 2030-01-01T00:00:00Z
        "#
    ));
    let now = at("2029-12-31T23:59:59Z");
    let by = |header: &str| directory.identify(Some(header.as_bytes()), None, now).map(|found| found.name.clone());
    assert_eq!(by(&format!("Bearer {TOKEN}")).as_deref(), Ok("gateway"));
    assert_eq!(by("bearer another-token-of-the-test").as_deref(), Ok("ops"));
    for header in ["", "Bearer", "Bearer ", TOKEN, "Basic a-token-of-the-test", "Bearer a-token-of-the-tesT"] {
        assert_eq!(by(header), Err(Unknown::UnknownToken), "{header}");
    }
    let certificate = |uris: &[&str], dns_names: &[&str]| {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Arc::new(ClientCertificate { uris: owned(uris), dns_names: owned(dns_names) })
    };
    for (shown, known) in [
        (certificate(&["spiffe://cluster/ops"], &[]), true),
        (certificate(&["spiffe://cluster/other"], &["ops.example.com"]), true),
        (certificate(&["ops.example.com"], &["spiffe://cluster/ops"]), false),
        (certificate(&[], &["OPS.example.org"]), false),
        (certificate(&[], &[]), false),
    ] {
        assert_eq!(directory.identify(None, Some(&shown), now).is_ok(), known, "{shown:?}");
        let token = directory.identify(Some(b"Bearer wrong"), Some(&shown), now);
        assert_eq!(token, Err(Unknown::UnknownToken), "a token goes before a certificate");
    }
    assert_eq!(directory.identify(None, None, now), Err(Unknown::NoCredentials));
    let later = directory.identify(Some(b"Bearer another-token-of-the-test"), None, at("2030-01-01T00:00:00Z"));
    assert!(matches!(later, Err(Unknown::Expired(identity)) if identity.name == "ops"));
    assert!(!format!("{directory:?}").contains(&digest));
}

#[test]
fn everything_wrong_with_the_file_is_said_and_no_token_is_shown() {
    for (text, wanted) in [
        ("", "no [[identity]]"),
        ("[[identity]]\nname = \"a\"\nrole = \"caller\"\ntoken = \"0123456789abcdef\"", "bound to tenants"),
        ("[[identity]]\nname = \"a\"\nrole = \"operator\"", "to be known by"),
        ("[[identity]]\nname = \"a\"\nrole = \"operator\"\ntoken = \"s3cret\"", "at least 16"),
        ("[[identity]]\nname = \"a\"\nrole = \"operator\"\ntoken_sha256 = \"s3cret\"", "64 hexadecimal"),
        ("[[identity]]\nname = \"a\"\nrole = \"operator\"\ncertificates = [\"ops\"]", "uri:spiffe"),
        ("[[identity]]\nname = \"a\"\nrole = \"admin\"\ntoken = \"0123456789s3cret\"", "line 3"),
        ("[[identity]]\nname = \"a\"\nrole = \"operator\"\ntokens = \"0123456789s3cret\"", "line 4"),
        (
            "[[identity]]\nname = \"a\"\nrole = \"cleanup\"\ntoken = \"0123456789s3cret\"\nexpires = 2030-01-01",
            "offset",
        ),
        (
            "[[identity]]\nname = \"a\"\nrole = \"cleanup\"\ntoken = \"0123456789s3cret\"\n\
             [[identity]]\nname = \"a\"\nrole = \"operator\"\ntoken = \"0123456789s3cret\"",
            "also another's",
        ),
    ] {
        let said = refused(text);
        assert!(said.contains(wanted), "{wanted} in {said}");
        assert!(!said.contains("s3cret"), "{said}");
    }
}

#[test]
fn w20_a_role_permits_what_it_needs_and_no_more() {
    use Method::{CheckAndLock, Cleanup, ExtendLock, History, MarkCompleted, MarkFailed, Resolve, Stats};
    for (role, permitted, reflection) in [
        (Role::Caller, &[CheckAndLock, ExtendLock, MarkCompleted, MarkFailed, History, Stats][..], false),
        (Role::Operator, &[History, Resolve, Stats, Cleanup], true),
        (Role::Cleanup, &[Cleanup], false),
    ] {
        for method in Method::ALL {
            assert_eq!(role.permits(Called::Api(*method)), permitted.contains(method), "{role} {method:?}");
        }
        assert!(role.permits(Called::Health), "{role}");
        assert_eq!(role.permits(Called::Reflection), reflection, "{role}");
        assert!(!role.permits(Called::Unknown), "{role}");
    }
}

#[test]
fn the_example_of_the_documents_can_be_used() {
    let document = include_str!("../../../docs/security.md");
    let example = document.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    // Readers have to put in a token of their own: as it stands, the published example admits nobody.
    let problems = refused(example);
    for unset in ["token_sha256 is the SHA-256", "token has at least 16 characters"] {
        assert!(problems.contains(unset), "{problems}");
    }
    let filled = example.replace("DIGEST OF gateway", &"0a".repeat(32));
    let filled = filled.replace("THE TOKEN ITSELF, where the file is a secret anyway", "a-token-of-the-tests");
    let directory = directory(&filled);
    assert_eq!((directory.tokens.len(), directory.certificates.len()), (2, 2));
    for (role, says) in [(Role::Caller, "`caller`"), (Role::Operator, "`operator`"), (Role::Cleanup, "`cleanup`")] {
        assert!(document.contains(&format!("| {says} |")), "{role}");
    }
}
