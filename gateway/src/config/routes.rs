//! From settings to routes: the four providers with settings of their own, and the routes in the file.

use std::{borrow::Cow, path::PathBuf, sync::Arc, time::Duration};

use http::Uri;
use oncegate_api::limits::TENANT_BYTES_MAX;
use oncegate_runtime::{
    config::{Checks, Problem, ShownDuration},
    reload::read_file,
    secret::{Secret, SecretSource},
};

use super::{Environment, FlutterwaveVersion, Options, Policy, file};
use crate::{
    enforcement::Switch,
    providers::{
        BadSecret, Provider, ProviderKind, each_is_one,
        flutterwave::Flutterwave,
        paypal::{self, Fetcher, PayPal, trust::Trust, trust::TrustError},
        paystack::{Paystack, one_mode},
        standard_webhooks::StandardWebhooks,
        stripe::Stripe,
    },
    route::{Application, Route, Secrets},
    signing::Signer,
};

/// The prefix of the paths of named routes, as in the first version.
pub(super) const PREFIX: &str = "/webhooks/payments/";

/// W3: a wider window is a wider window for whoever recorded a request.
pub(super) const TOLERANCE_MAX: Duration = Duration::from_secs(15 * 60);
/// PayPal tries for three days, and may sign once for all tries. Beyond the time that events are kept, no duplicate is
/// recognised anyway.
pub(super) const PAYPAL_TOLERANCE_MAX: Duration = Duration::from_secs(30 * 86_400);

/// The name of a setting in messages, by its purpose.
pub(super) type Name<'a> = &'a dyn Fn(&'static str) -> Cow<'static, str>;

/// The settings of single providers.
#[derive(Debug, Clone)]
pub(super) struct Scheme {
    /// None: no limit.
    pub(super) tolerance: Option<Duration>,
    pub(super) signature: Option<FlutterwaveVersion>,
    pub(super) environment: Environment,
    pub(super) cert_dir: Option<PathBuf>,
    pub(super) trust_anchors_file: Option<PathBuf>,
    pub(super) intermediates_file: Option<PathBuf>,
}

impl Scheme {
    /// What the settings say.
    pub(super) fn new(kind: ProviderKind, options: &Options) -> Self {
        let path = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        Self {
            tolerance: match kind {
                ProviderKind::PayPal => options.paypal_tolerance,
                ProviderKind::Stripe => Some(options.stripe_tolerance),
                ProviderKind::StandardWebhooks | ProviderKind::Flutterwave | ProviderKind::Paystack => {
                    Some(crate::providers::standard_webhooks::TOLERANCE)
                }
            },
            signature: options.flutterwave_signature,
            environment: options.paypal_environment,
            cert_dir: path(&options.paypal_cert_dir),
            trust_anchors_file: path(&options.paypal_trust_anchors_file),
            intermediates_file: path(&options.paypal_intermediates_file),
        }
    }
}

/// All routes. If there are none, that is a problem.
pub(super) fn routes(options: &Options, checks: &mut Checks) -> Vec<Route> {
    let tenant = checks.take(tenant("GATEWAY_TENANT", &options.gateway_tenant));
    let policy = Policy {
        in_progress: options.gateway_in_progress_status,
        held: options.gateway_held_status,
        refusal: options.upstream_refusal,
        unclear: options.upstream_unclear,
    };
    // Read first, because it decides whether an application has to be named here.
    let path = options.config.as_ref().filter(|path| !path.as_os_str().is_empty());
    let file = path.and_then(|path| checks.take_all(file::read(path)));
    // Of a file that cannot be read nobody knows what it would name. That has been said, and nothing is guessed beside it.
    let unread = path.is_some() && file.is_none();
    let elsewhere = unread || file.as_ref().is_some_and(file::File::names_every_application);
    let enforcement = file.as_ref().and_then(|file| file.enforcement).unwrap_or(options.gateway_enforcement);
    let providers = providers(options, checks);
    let url = application_url(options, providers.given == 0 && elsewhere, checks);
    // Of its own: it signs for the applications that routes name themselves, too.
    let signing = signing(options, checks);
    let application = url.zip(signing.as_ref()).map(|(url, Signing { signer, secrets })| Application {
        url,
        signer: signer.clone(),
        signer_secrets: secrets.clone(),
        timeout: options.upstream_timeout,
        lock_duration: options.gateway_lock_duration,
    });
    if providers.given == 0 && !unread && !file.as_ref().is_some_and(file::File::has_routes) {
        let in_file = match path {
            Some(path) => format!("add a [[route]] to {}, the file of ONCEGATE_CONFIG", path.display()),
            None => "name a file with [[route]] in ONCEGATE_CONFIG".to_owned(),
        };
        checks.problem(
            "routes",
            format!(
                "there is none: without a provider's secret no webhook can be verified; set STRIPE_WEBHOOK_SECRET, \
                 PAYPAL_WEBHOOK_ID, FLUTTERWAVE_WEBHOOK_SECRET or PAYSTACK_WEBHOOK_SECRET (or one of them with _FILE), or \
                 {in_file}"
            ),
        );
    }
    let mut routes = Vec::new();
    if let (Some(tenant), Some(application)) = (&tenant, &application) {
        for (provider, secrets) in providers.usable {
            let path = format!("{PREFIX}{}", provider.name()).into();
            let enforcement = Switch::new(enforcement);
            let (tenant, application) = (tenant.clone(), application.clone());
            routes.push(Route { path, tenant, provider, secrets, application, policy, enforcement });
        }
    }
    if let Some(file) = file {
        let (tenant, application) = (options.gateway_tenant.as_str(), application.as_ref());
        let defaults = file::Defaults { options, tenant, application, signing: signing.as_ref(), policy, enforcement };
        routes.extend(checks.take_all(file.routes(&defaults)).into_iter().flatten());
    }
    routes
}

struct Providers {
    /// How many have a secret, usable or not.
    given: usize,
    usable: Vec<(Provider, Secrets)>,
}

/// The providers that the settings have secrets for (G3).
fn providers(options: &Options, checks: &mut Checks) -> Providers {
    let mut providers = Providers { given: 0, usable: Vec::new() };
    for (kind, name, value, file) in [
        (
            ProviderKind::Stripe,
            "STRIPE_WEBHOOK_SECRET",
            &options.stripe_webhook_secret,
            &options.stripe_webhook_secret_file,
        ),
        (ProviderKind::PayPal, "PAYPAL_WEBHOOK_ID", &options.paypal_webhook_id, &options.paypal_webhook_id_file),
        (
            ProviderKind::Flutterwave,
            "FLUTTERWAVE_WEBHOOK_SECRET",
            &options.flutterwave_webhook_secret,
            &options.flutterwave_webhook_secret_file,
        ),
        (
            ProviderKind::Paystack,
            "PAYSTACK_WEBHOOK_SECRET",
            &options.paystack_webhook_secret,
            &options.paystack_webhook_secret_file,
        ),
    ] {
        let source = match SecretSource::choose(name, value.clone(), file.clone()) {
            Ok(None) => continue,
            Ok(Some(source)) => Some(source),
            Err(problem) => checks.take(Err(problem)),
        };
        providers.given += 1;
        let names = |of: &'static str| match of {
            "secrets" => Cow::Borrowed(name),
            "signature" => Cow::Borrowed("FLUTTERWAVE_SIGNATURE"),
            "tolerance" if kind == ProviderKind::PayPal => Cow::Borrowed("PAYPAL_TOLERANCE"),
            other => Cow::Owned(format!("PAYPAL_{}", other.to_ascii_uppercase())),
        };
        let provider = source.and_then(|source| provider(kind, source, &Scheme::new(kind, options), &names, checks));
        providers.usable.extend(provider);
    }
    providers
}

/// A provider with its secrets. None only together with a problem.
pub(super) fn provider(
    kind: ProviderKind,
    source: SecretSource,
    scheme: &Scheme,
    name: Name<'_>,
    checks: &mut Checks,
) -> Option<(Provider, Secrets)> {
    let secrets = checks.take(read(&name("secrets"), &source));
    let provider = provider_with(kind, secrets.as_deref(), scheme, name, checks)?;
    Some((provider, Secrets { source, read: secrets? }))
}

fn provider_with(
    kind: ProviderKind,
    secrets: Option<&[Secret]>,
    scheme: &Scheme,
    name: Name<'_>,
    checks: &mut Checks,
) -> Option<Provider> {
    let bad = |error: BadSecret| Problem::from_error(name("secrets"), &error);
    Some(match kind {
        ProviderKind::Stripe => {
            checks.take(each_is_one(secrets?).map_err(bad))?;
            Provider::Stripe(Stripe::new(secrets?, scheme.tolerance?))
        }
        ProviderKind::Paystack => {
            checks.take(each_is_one(secrets?).map_err(bad))?;
            checks.take(one_mode(secrets?).map_err(bad))?;
            Provider::Paystack(Paystack::new(secrets?))
        }
        ProviderKind::StandardWebhooks => {
            Provider::StandardWebhooks(checks.take(StandardWebhooks::new(secrets?, scheme.tolerance?).map_err(bad))?)
        }
        ProviderKind::Flutterwave => {
            let Some(version) = scheme.signature else {
                checks.problem(
                    name("signature"),
                    "not set, and has no default: v4 (header flutterwave-signature, signs the body) or v3 (header \
                     verif-hash, repeats the secret and proves nothing about the body)",
                );
                return None;
            };
            Provider::Flutterwave(Flutterwave::new(secrets?, version))
        }
        ProviderKind::PayPal => {
            let trust = trust(scheme, name, checks);
            let source = match &scheme.cert_dir {
                Some(directory) if !directory.is_dir() => {
                    checks.problem(name("cert_dir"), format!("{} is no directory", directory.display()));
                    None
                }
                Some(directory) => Some(paypal::store::Source::Directory(directory.clone())),
                None => {
                    let fetcher = Fetcher::new().map_err(|error| Problem::from_error(name("cert_dir"), &error));
                    checks.take(fetcher).map(|fetcher| paypal::store::Source::Network(Box::new(fetcher)))
                }
            };
            let trust = Arc::new(trust?);
            let certificates = PayPal::certificates(source?, &trust);
            let paypal = PayPal::new(secrets?, scheme.environment, certificates, trust, scheme.tolerance);
            Provider::PayPal(Box::new(checks.take(paypal.map_err(bad))?))
        }
    })
}

/// Whom to believe about PayPal's certificates.
fn trust(scheme: &Scheme, name: Name<'_>, checks: &mut Checks) -> Option<Trust> {
    let mut read = |path: &Option<PathBuf>, of| match path {
        None => Some(None),
        Some(path) => {
            let read = read_file(path);
            let read = read.map_err(|error| Problem::new(name(of), format!("cannot read {}: {error}", path.display())));
            checks.take(read).map(Some)
        }
    };
    let anchors = read(&scheme.trust_anchors_file, "trust_anchors_file");
    let intermediates = read(&scheme.intermediates_file, "intermediates_file");
    let trust = Trust::new(scheme.environment, anchors?.as_deref(), intermediates?.as_deref());
    checks.take(trust.map_err(|error| match error {
        TrustError::Anchors(error) => Problem::from_error(name("trust_anchors_file"), &error),
        TrustError::Intermediates(error) => Problem::from_error(name("intermediates_file"), &error),
    }))
}

/// Where the application is. None together with a problem, or where `needless`.
fn application_url(options: &Options, needless: bool, checks: &mut Checks) -> Option<Uri> {
    let given = options.upstream_url.as_deref().filter(|text| !text.trim().is_empty());
    match given {
        Some(text) => checks.take(url("UPSTREAM_URL", text)),
        None if needless => None,
        None => {
            checks.problem(
                "UPSTREAM_URL",
                "not set: without an application to deliver to there is nothing to do; write for example \
                 http://127.0.0.1:3000/webhooks",
            );
            None
        }
    }
}

/// What signs deliveries, with its secrets; neither where the application does not ask who delivers.
#[derive(Clone, Default)]
pub(super) struct Signing {
    pub(super) signer: Option<Signer>,
    pub(super) secrets: Option<Secrets>,
}

/// What signs by the settings. `None` together with a problem.
fn signing(options: &Options, checks: &mut Checks) -> Option<Signing> {
    let (secret, file) = (options.upstream_secret.clone(), options.upstream_secret_file.clone());
    match checks.take(SecretSource::choose("UPSTREAM_SECRET", secret, file))? {
        None => Some(Signing::default()),
        Some(source) => signer("UPSTREAM_SECRET", source, checks),
    }
}

/// What signs with the secrets of `source`. `None` together with a problem.
pub(super) fn signer(setting: &str, source: SecretSource, checks: &mut Checks) -> Option<Signing> {
    let secrets = checks.take(read(setting, &source))?;
    let signer = Signer::new(&secrets).map_err(|error| Problem::new(setting.to_owned(), error.to_string()));
    let signer = checks.take(signer)?;
    Some(Signing { signer: Some(signer), secrets: Some(Secrets { source, read: secrets }) })
}

/// A lock that expires while the application may still be at work lets a second attempt begin beside the first (G8).
fn may_overlap(timeout: Duration, margin: Duration, lock: Duration) -> bool {
    timeout.saturating_add(margin) >= lock
}

/// What is told of it at the time-out.
pub(super) fn outlasts(
    timeout: (impl Into<Cow<'static, str>>, Duration),
    lock: (&str, Duration),
    margin: Duration,
    checks: &mut Checks,
) {
    if may_overlap(timeout.1, margin, lock.1) {
        checks.problem(
            timeout.0,
            format!(
                "{} given; with GATEWAY_LOCK_MARGIN, which is {}, it has to stay below {}, which is {}: otherwise a second \
                 attempt could start while the first is still at work",
                ShownDuration(timeout.1),
                ShownDuration(margin),
                lock.0,
                ShownDuration(lock.1),
            ),
        );
    }
}

/// The same at the lock of a route, where the time-out is that of the settings.
pub(super) fn outlasted(
    lock: (impl Into<Cow<'static, str>>, Duration),
    timeout: Duration,
    margin: Duration,
    checks: &mut Checks,
) {
    if may_overlap(timeout, margin, lock.1) {
        checks.problem(
            lock.0,
            format!(
                "{} given, has to be more than UPSTREAM_TIMEOUT, which is {}, and GATEWAY_LOCK_MARGIN, which is {}, \
                 together: otherwise a second attempt could start while the first is still at work",
                ShownDuration(lock.1),
                ShownDuration(timeout),
                ShownDuration(margin),
            ),
        );
    }
}

/// The contract's limits on a tenant.
pub(super) fn tenant(setting: impl Into<Cow<'static, str>>, name: &str) -> Result<String, Problem> {
    let permitted = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > TENANT_BYTES_MAX || !name.bytes().all(permitted) {
        return Err(Problem::new(
            setting,
            format!(
                "{name:?} given, permitted are 1 to {TENANT_BYTES_MAX} letters, digits, dots, underscores and hyphens"
            ),
        ));
    }
    Ok(name.to_owned())
}

/// Messages never repeat a URL with user information, which is a password.
pub(super) fn url(setting: impl Into<Cow<'static, str>>, text: &str) -> Result<Uri, Problem> {
    let why = match crate::url::parse(text) {
        Ok((uri, _)) if matches!(uri.scheme_str(), Some("http" | "https")) => return Ok(uri),
        Ok(_) => "has to begin with http:// or https://".to_owned(),
        Err(bad) => bad.to_string(),
    };
    Err(Problem::new(setting, format!("{why}; write for example http://127.0.0.1:3000/webhooks")))
}

fn read(setting: &str, source: &SecretSource) -> Result<Vec<Secret>, Problem> {
    source.read_list().map_err(|error| Problem::from_error(setting.to_owned(), &error))
}

/// What several texts are as secrets, trimmed as those of the environment; None without any that is not blank.
pub(super) fn several(texts: &[String]) -> Option<SecretSource> {
    let secrets: Vec<Secret> = texts.iter().filter_map(|text| Secret::new(text.trim()).ok()).collect();
    (!secrets.is_empty()).then(|| SecretSource::Values(secrets.into()))
}
