//! `oncegate verify`.

use std::{
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use oncegate_gateway::{
    config::Environment,
    verify::{Case, Report, Values},
};
use oncegate_runtime::{
    config::{self, Checks, Problem},
    secret::{SecretSource, SecretText},
};

use crate::{failure::Failure, output};

const TRUST_ANCHORS_FILE: &str = "--trust-anchors-file";
const INTERMEDIATES_FILE: &str = "--intermediates-file";

/// Find out why a signature fails
///
/// Verifies a webhook with the code of the gateway and says what is wrong with it, and what to look at. Nothing is sent,
/// except that PayPal's certificate is fetched where no --cert-dir is given. The body has to be exactly what came: a
/// single changed byte, the end of a line included, makes another signature. Exits with 0 if the signature is valid, with
/// 1 if it is not.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate verify --provider stripe --secret-file whsec --header 'Stripe-Signature: t=...,v1=...' --body event.json
  oncegate verify --provider paystack --secret-file key --header \"X-Paystack-Signature: $SIGNATURE\" < event.json
  oncegate verify --provider stripe --secret-file whsec --header ... --body event.json --now 2026-11-24T15:00:00Z
  oncegate verify --cases cases.json

--cases takes an array of cases, as the signature vectors have them, and prints one line of JSON for each: id, verdict,
event_id and event_type as the provider sent them (null if it sends none), and key, the name of the event in the ledger.
It exits with 0 when all cases were read, whatever the verdicts are.")]
pub(crate) struct Verify {
    /// Who is said to have sent it
    #[arg(long, value_enum, value_name = "PROVIDER", required_unless_present = "cases")]
    provider: Option<Scheme>,

    /// The secret, several separated by commas; for PayPal the webhook id. Other users of the machine see arguments:
    /// prefer --secret-file
    #[arg(long, value_name = "SECRET", conflicts_with = "cases")]
    secret: Option<SecretText>,

    /// A file with the secrets
    #[arg(long, value_name = "FILE", conflicts_with = "cases")]
    secret_file: Option<PathBuf>,

    /// A header that came with it; may be given several times
    #[arg(long = "header", short = 'H', value_name = "NAME: VALUE", value_parser = header, conflicts_with = "cases")]
    headers: Vec<(String, String)>,

    /// A file with the body, exactly as it came; - is standard input, and so is the default
    #[arg(long, value_name = "FILE", conflicts_with = "cases")]
    body: Option<PathBuf>,

    /// The time at which it came: RFC 3339, or seconds since 1970 [default: now]
    #[arg(long, value_name = "TIME", value_parser = moment, conflicts_with = "cases")]
    now: Option<u64>,

    /// How old a signature may be [default: that of the provider]
    #[arg(long, value_name = "DURATION", value_parser = config::duration, conflicts_with = "cases")]
    tolerance: Option<Duration>,

    /// PayPal's environment
    #[arg(long, value_enum, value_name = "NAME", default_value = "live", conflicts_with = "cases")]
    environment: Environment,

    /// A directory with PayPal's certificates, instead of fetching them
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "cases")]
    cert_dir: Option<PathBuf>,

    /// A file with the roots that PayPal's certificates have to lead to, instead of the public ones
    #[arg(long, value_name = "FILE", conflicts_with = "cases")]
    trust_anchors_file: Option<PathBuf>,

    /// A file with the certificates between PayPal's and the roots, where PayPal's comes alone
    #[arg(long, value_name = "FILE", conflicts_with = "cases")]
    intermediates_file: Option<PathBuf>,

    /// A file with many cases; - is standard input
    #[arg(long, value_name = "FILE")]
    cases: Option<PathBuf>,

    /// Show the verdict as JSON
    #[arg(long)]
    json: bool,
}

/// How requests are signed, as a case names it.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Scheme {
    Stripe,
    #[value(name = "paypal")]
    PayPal,
    /// flutterwave-signature, over the body
    #[value(alias = "flutterwave_v4")]
    FlutterwaveV4,
    /// verif-hash, which proves nothing about the body
    #[value(alias = "flutterwave_v3")]
    FlutterwaveV3,
    Paystack,
    #[value(alias = "standard_webhooks")]
    StandardWebhooks,
}

impl Scheme {
    fn name(self) -> &'static str {
        match self {
            Self::Stripe => "stripe",
            Self::PayPal => "paypal",
            Self::FlutterwaveV4 => "flutterwave_v4",
            Self::FlutterwaveV3 => "flutterwave_v3",
            Self::Paystack => "paystack",
            Self::StandardWebhooks => "standard_webhooks",
        }
    }
}

/// A header as it stands in a request.
fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("a header is written as 'Name: value'")?;
    let name = name.trim();
    if name.parse::<http::HeaderName>().is_err() {
        return Err("this is no name of a header".into());
    }
    // White space around a value is not part of it (RFC 9110, 5.5).
    Ok((name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_owned()))
}

/// A time in seconds since 1970.
fn moment(text: &str) -> Result<u64, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(seconds);
    }
    let time: Timestamp =
        text.parse().map_err(|_| "neither a time like 2026-11-24T15:00:00Z nor seconds since 1970")?;
    time.as_second().try_into().map_err(|_| "before 1970".into())
}

impl Verify {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        if let Some(path) = &self.cases {
            return verify_all(path).await;
        }
        let report = self.case()?.verify().await;
        if self.json {
            output::json(&report);
        } else {
            show(&report);
        }
        if report.verdict == "valid" { Ok(()) } else { Err(Failure::NotAsItShouldBe) }
    }

    fn case(&self) -> Result<Case, Failure> {
        let Some(provider) = self.provider else {
            return Err(Problem::new("--provider", "needed to know how it is signed").into());
        };
        let secrets = match SecretSource::choose("--secret", self.secret.clone(), self.secret_file.clone())? {
            None => Vec::new(),
            Some(source) => source
                .read_list()
                .map_err(|error| Problem::from_error("--secret-file", &error))?
                .iter()
                .map(|secret| secret.expose().to_owned())
                .collect(),
        };
        // The gateway does not start with any of these either: a verdict would be about them, and not about the request.
        let mut checks = Checks::new();
        let trust_anchors_pem = pem(TRUST_ANCHORS_FILE, self.trust_anchors_file.as_deref(), &mut checks);
        let extra_intermediates_pem = pem(INTERMEDIATES_FILE, self.intermediates_file.as_deref(), &mut checks);
        if let Some(directory) = self.cert_dir.as_deref().filter(|directory| !directory.is_dir()) {
            checks.problem("--cert-dir", format!("{} is no directory", directory.display()));
        }
        let mut case = Case {
            provider: provider.name().into(),
            secrets,
            tolerance_secs: self.tolerance.map(|tolerance| tolerance.as_secs()),
            now_unix: self.now.unwrap_or_else(|| {
                // A clock before 1970 verifies at 1970.
                SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
            }),
            environment: Some(
                match self.environment {
                    Environment::Live => "live",
                    Environment::Sandbox => "sandbox",
                }
                .into(),
            ),
            cert_dir: self.cert_dir.clone(),
            fetch_certificates: self.cert_dir.is_none(),
            extra_intermediates_pem,
            trust_anchors_pem,
            ..Default::default()
        };
        checks.take(case.check_certificates(TRUST_ANCHORS_FILE, INTERMEDIATES_FILE));
        checks.finish()?;
        // After everything that can be wrong without it: it may have to be typed.
        let body = read(self.body.as_deref().unwrap_or(Path::new("-")))
            .map_err(|error| Problem::new("--body", format!("{error:#}")))?;
        case.body_base64 = BASE64_STANDARD.encode(body);
        for (name, value) in &self.headers {
            let values = case.headers.entry(name.clone()).or_insert_with(|| Values::Many(Vec::new()));
            if let Values::Many(values) = values {
                values.push(value.clone());
            }
        }
        Ok(case)
    }
}

/// The verdict for people.
fn show(report: &Report) {
    output::line(report.verdict);
    if !report.explanation.is_empty() {
        output::line(format_args!("\n{}", report.explanation.trim_end()));
    }
    let sent = [("event id", &report.event_id), ("event type", &report.event_type), ("key", &report.key)];
    if sent.iter().any(|(_, value)| value.is_some()) {
        output::line("");
        for (name, value) in sent {
            // Text from the provider must not create lines of its own.
            output::line(format_args!("{name:10}  {}", output::one_line(value.as_deref().unwrap_or("-"))));
        }
    }
}

/// Verifies each case, and shows a line for it.
async fn verify_all(path: &Path) -> Result<(), Failure> {
    let text = read(path).map_err(|error| Problem::new("--cases", format!("{error:#}")))?;
    for case in cases(&text).map_err(|error| Problem::new("--cases", format!("{}: {error:#}", path.display())))? {
        if output::json_line(&case.verify().await).is_err() {
            // Nobody reads any more.
            break;
        }
    }
    Ok(())
}

/// The cases of a file, or an error that names the one that is not a case.
fn cases(text: &[u8]) -> Result<Vec<Case>> {
    let cases: Vec<serde_json::Value> = serde_json::from_slice(text).context("not an array of cases")?;
    let parse = |(place, case): (usize, serde_json::Value)| {
        let name = case["id"].as_str().map_or_else(|| format!("number {}", place + 1), str::to_owned);
        serde_json::from_value(case).with_context(|| format!("case {name}"))
    };
    cases.into_iter().enumerate().map(parse).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path == Path::new("-") {
        let mut bytes = Vec::new();
        io::stdin().read_to_end(&mut bytes).context("cannot read standard input")?;
        return Ok(bytes);
    }
    read_file(path)
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The text of a file with certificates. None where there is no such file, or together with a problem.
fn pem(option: &'static str, path: Option<&Path>, checks: &mut Checks) -> Option<String> {
    let bytes = checks.take(read_file(path?).map_err(|error| Problem::new(option, format!("{error:#}"))))?;
    // Around the certificates there may be comments, in any encoding.
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        verify: Verify,
    }

    #[test]
    fn headers_and_times_are_read_as_they_are_written() {
        assert_eq!(header("Verif-Hash:  a: b "), Ok(("verif-hash".to_owned(), "a: b".to_owned())));
        assert_eq!(header("x:"), Ok(("x".to_owned(), String::new())));
        assert!(header("no colon").is_err() && header("a b: c").is_err());
        assert_eq!(moment("1700000000"), Ok(1_700_000_000));
        assert_eq!(moment("2023-11-14T22:13:20Z"), Ok(1_700_000_000));
        assert!(moment("1960-01-01T00:00:00Z").is_err() && moment("today").is_err());
    }

    #[test]
    fn it_is_one_request_or_many_cases() {
        let parse = |arguments: &[&str]| Command::try_parse_from([&["verify"], arguments].concat());
        assert!(parse(&["--cases", "-"]).is_ok());
        assert!(parse(&["--provider", "flutterwave_v3"]).is_ok());
        for wrong in [&[][..], &["--provider", "acme"], &["--cases", "-", "--secret", "x"], &["--secret", "x"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn a_request_is_verified_as_the_gateway_does() {
        let directory = tempfile::tempdir().unwrap();
        let (body, secret) = (directory.path().join("body"), directory.path().join("secret"));
        fs::write(&body, "{\"id\":\"evt_1\",\"type\":\"a.b\"}").unwrap();
        fs::write(&secret, "whsec_test\n").unwrap();
        // printf '1700000000.{"id":"evt_1","type":"a.b"}' | openssl dgst -sha256 -hmac whsec_test
        let signature =
            "Stripe-Signature: t=1700000000,v1=e44a473077d32b2c128bb92903a1f68ba5c09ecf9c4746dbbd55ccc78823ff36";
        let verify = async |now: &str, signature: &str| {
            let arguments = [
                "verify",
                "--provider",
                "stripe",
                "--secret-file",
                secret.to_str().unwrap(),
                "--body",
                body.to_str().unwrap(),
                "--header",
                signature,
                "--now",
                now,
            ];
            Command::parse_from(arguments).verify.case().unwrap().verify().await
        };
        let report = verify("1700000299", signature).await;
        assert_eq!((report.verdict, report.event_id.as_deref()), ("valid", Some("evt_1")));
        assert_eq!(verify("1700000301", signature).await.verdict, "timestamp_out_of_tolerance");
        let forged = signature.replace("v1=", "v1=00");
        assert_eq!(verify("1700000299", &forged).await.verdict, "bad_signature");
    }

    /// A vector of PayPal's whose certificate comes without its intermediate: a directory with its parts in files, and the
    /// arguments without those for certificates.
    fn paypal() -> (tempfile::TempDir, Vec<String>) {
        let vectors = concat!(env!("CARGO_MANIFEST_DIR"), "/../gateway/tests/vectors/webhook_signatures.json");
        let vectors = cases_as_json(&fs::read(vectors).unwrap());
        let vector = vectors.iter().find(|case| case["id"] == "dev-paypal-01").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| fs::write(directory.path().join(name), bytes).unwrap();
        write("body", &BASE64_STANDARD.decode(vector["body_base64"].as_str().unwrap()).unwrap());
        write("roots", vector["trust_anchors_pem"].as_str().unwrap().as_bytes());
        write("between", vector["extra_intermediates_pem"].as_str().unwrap().as_bytes());
        write("none", b"no certificate");
        for (url, certificate) in vector["cert_responses"].as_object().unwrap() {
            write(url.rsplit('/').next().unwrap(), certificate.as_str().unwrap().as_bytes());
        }
        let mut arguments: Vec<String> =
            ["verify", "--provider", "paypal", "--environment", "sandbox"].map(String::from).into();
        let body = directory.path().join("body").display().to_string();
        let text = |name: &str| vector[name].as_str().map_or_else(|| vector[name].to_string(), str::to_owned);
        arguments.extend(["--body".into(), body, "--now".into(), text("now_unix")]);
        arguments.extend(["--secret".into(), text("webhook_id")]);
        for (name, value) in vector["headers"].as_object().unwrap() {
            arguments.extend(["--header".into(), format!("{name}: {}", value.as_str().unwrap())]);
        }
        (directory, arguments)
    }

    fn cases_as_json(text: &[u8]) -> Vec<serde_json::Value> {
        serde_json::from_slice(text).unwrap()
    }

    #[tokio::test]
    async fn a_certificate_that_comes_alone_is_verified_with_its_intermediates() {
        let (directory, arguments) = paypal();
        let verify = async |options: &[(&str, &str)]| {
            let mut arguments = arguments.clone();
            for (option, name) in options {
                arguments.extend([(*option).to_owned(), directory.path().join(name).display().to_string()]);
            }
            Command::parse_from(arguments).verify.case().unwrap().verify().await
        };
        let given = [("--cert-dir", ""), ("--trust-anchors-file", "roots")];
        let alone = verify(&given).await;
        assert_eq!(alone.verdict, "untrusted_certificate");
        assert!(alone.explanation.contains("--intermediates-file"), "{}", alone.explanation);
        assert_eq!(verify(&[&given[..], &[("--intermediates-file", "between")]].concat()).await.verdict, "valid");
    }

    #[test]
    fn certificates_that_a_gateway_would_not_start_with_are_problems_of_their_options() {
        let (directory, arguments) = paypal();
        let problems = |option: &str, name: &str| {
            let path = directory.path().join(name).display().to_string();
            let arguments = arguments.iter().cloned().chain([option.to_owned(), path]);
            match Command::parse_from(arguments).verify.case() {
                Err(Failure::Configuration(problems)) => problems.iter().map(|problem| problem.to_string()).collect(),
                Err(other) => panic!("{other:?}"),
                Ok(_) => Vec::new(),
            }
        };
        for option in ["--trust-anchors-file", "--intermediates-file"] {
            assert_eq!(problems(option, "none"), [format!("{option}: holds no certificate in PEM")]);
            assert!(problems(option, "nowhere")[0].starts_with(&format!("{option}: cannot read ")));
            assert!(problems(option, "roots").is_empty());
        }
        for name in ["nowhere", "roots"] {
            let path = directory.path().join(name);
            assert_eq!(problems("--cert-dir", name), [format!("--cert-dir: {} is no directory", path.display())]);
        }
    }

    #[test]
    fn a_case_that_is_none_is_named() {
        let cases = |text: &str| cases(text.as_bytes()).map(|cases| cases.len()).map_err(|error| format!("{error:#}"));
        assert_eq!(cases(r#"[{"id":"a","provider":"stripe","unknown":1},{}]"#), Ok(2));
        assert!(cases(r#"[{},{"id":"b","headers":7}]"#).unwrap_err().contains("case b"));
        assert!(cases("{}").unwrap_err().contains("not an array"));
    }
}
