//! From options to settings that fit together.

use std::{str::FromStr, time::Duration};

use http::Uri;
use oncegate_runtime::{
    config::{Checks, Problem, Problems, Size, Span},
    secret::{ReadError, Secret, Source},
};

use super::{BodyLimits, HttpLimits, LockSettings, Options, Policy, Settings, UpstreamLimits};
use crate::{
    providers::{Provider, stripe::Stripe},
    route::{self, Route, Target},
    signing::Signer,
};

/// The path of Stripe's webhooks, known from the first version.
const STRIPE_PATH: &str = "/webhooks/payments/stripe";

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) fn settings(options: Options) -> Result<Settings, Problems> {
    let mut checks = Checks::new();
    let settings = settings_with(options, &mut checks);
    checks.finish()?;
    Ok(settings.expect("nothing is missing where no problem was found"))
}

/// `None` only together with a problem.
fn settings_with(options: Options, checks: &mut Checks) -> Option<Settings> {
    order(&options, checks);
    limits(&options, checks);
    let tenant = checks.take(tenant(&options.gateway_tenant));
    let holder = checks.take(holder(&options.gateway_holder));
    let sidecar_url = checks.take(sidecar_url(&options.sidecar_url));
    let target = target(&options, checks);
    let policy = Policy {
        in_progress: options.gateway_in_progress_status,
        held: options.gateway_held_status,
        refusal: options.upstream_refusal,
        unclear: options.upstream_unclear,
    };
    let stripe = stripe(&options, checks);
    let mut routes = Vec::new();
    if let (Some(tenant), Some(target), Some((provider, secrets))) = (tenant, target, stripe) {
        routes.push(Route { path: STRIPE_PATH.into(), tenant, provider, secrets, target, policy });
    }
    route::check(&routes, checks);

    let bytes = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
    Some(Settings {
        listen: options.gateway_listen,
        sidecar_url: sidecar_url?,
        sidecar_connect_timeout: options.sidecar_connect_timeout,
        routes,
        http: HttpLimits {
            connections_max: options.gateway_connections_max,
            first_byte_timeout: options.gateway_first_byte_timeout,
            header_timeout: options.gateway_header_timeout,
        },
        body: BodyLimits {
            bytes_max: bytes(options.gateway_body_bytes_max),
            budget_bytes: bytes(options.gateway_body_budget),
            timeout: options.gateway_body_timeout,
            first_byte_timeout: options.gateway_body_first_byte_timeout,
        },
        upstream: UpstreamLimits {
            timeout: options.upstream_timeout,
            connect_timeout: options.upstream_connect_timeout,
            idle_timeout: options.upstream_idle_timeout,
            body_bytes_max: bytes(options.upstream_body_bytes_max),
            body_timeout: options.upstream_body_timeout,
        },
        lock: LockSettings {
            duration: options.gateway_lock_duration,
            margin: options.gateway_lock_margin,
            holder: holder?,
        },
        sidecar_timeout: options.sidecar_timeout,
        wait_duration: options.gateway_wait_duration,
        answer_timeout: options.gateway_answer_timeout,
        deliveries_max: options.gateway_deliveries_max,
        drain: options.gateway_drain.unwrap_or(options.upstream_timeout),
        health_cache: options.gateway_health_cache,
        secret_reload: options.gateway_secret_reload,
    })
}

/// The order of the time and size budgets (section 10 of the design).
fn order(options: &Options, checks: &mut Checks) {
    // A lock that ends while the application may still be at work lets a second attempt in beside it (G8).
    let (timeout, margin) = (options.upstream_timeout, options.gateway_lock_margin);
    if timeout.saturating_add(margin) >= options.gateway_lock_duration {
        checks.problem(
            "UPSTREAM_TIMEOUT",
            format!(
                "{} given; with GATEWAY_LOCK_MARGIN, which is {}, it has to stay below GATEWAY_LOCK_DURATION, which is \
                 {}: otherwise a second attempt could start while the first is still at work",
                Span(timeout),
                Span(margin),
                Span(options.gateway_lock_duration),
            ),
        );
    }
    let call = options.gateway_wait_duration.saturating_add(options.sidecar_timeout);
    if call >= options.gateway_answer_timeout {
        checks.problem(
            "GATEWAY_WAIT_DURATION",
            format!(
                "{} given; with SIDECAR_TIMEOUT, which is {}, it has to stay below GATEWAY_ANSWER_TIMEOUT, which is {}: \
                 otherwise a waiting duplicate never gets its answer",
                Span(options.gateway_wait_duration),
                Span(options.sidecar_timeout),
                Span(options.gateway_answer_timeout),
            ),
        );
    }
    checks.less(
        ("UPSTREAM_CONNECT_TIMEOUT", Span(options.upstream_connect_timeout)),
        ("UPSTREAM_TIMEOUT", Span(timeout)),
        "a connection that was never made could not be told from an answer that never came",
    );
    checks.less(
        ("SIDECAR_CONNECT_TIMEOUT", Span(options.sidecar_connect_timeout)),
        ("SIDECAR_TIMEOUT", Span(options.sidecar_timeout)),
        "a call that was never sent could not be told from one whose answer was lost",
    );
    if options.gateway_body_bytes_max > options.gateway_body_budget {
        checks.problem(
            "GATEWAY_BODY_BYTES_MAX",
            format!(
                "{} given, has to be at most GATEWAY_BODY_BUDGET, which is {}: otherwise the largest body never fits",
                Size(options.gateway_body_bytes_max),
                Size(options.gateway_body_budget),
            ),
        );
    }
}

/// Limits of single values.
fn limits(options: &Options, checks: &mut Checks) {
    let mut spans = |setting, value, range: std::ops::RangeInclusive<Duration>| {
        checks.within(setting, Span(value), Span(*range.start())..=Span(*range.end()));
    };
    let some = Duration::from_millis(1);
    // W3: a wider window is a wider window for whoever recorded a request.
    spans("STRIPE_TOLERANCE", options.stripe_tolerance, SECOND..=15 * 60 * SECOND);
    // The contract's limits.
    spans("GATEWAY_LOCK_DURATION", options.gateway_lock_duration, SECOND..=DAY);
    spans("GATEWAY_WAIT_DURATION", options.gateway_wait_duration, Duration::ZERO..=30 * SECOND);
    for (setting, value) in [
        ("UPSTREAM_TIMEOUT", options.upstream_timeout),
        ("UPSTREAM_CONNECT_TIMEOUT", options.upstream_connect_timeout),
        ("UPSTREAM_IDLE_TIMEOUT", options.upstream_idle_timeout),
        ("UPSTREAM_BODY_TIMEOUT", options.upstream_body_timeout),
        ("GATEWAY_LOCK_MARGIN", options.gateway_lock_margin),
        ("GATEWAY_ANSWER_TIMEOUT", options.gateway_answer_timeout),
        ("SIDECAR_TIMEOUT", options.sidecar_timeout),
        ("SIDECAR_CONNECT_TIMEOUT", options.sidecar_connect_timeout),
        ("GATEWAY_BODY_TIMEOUT", options.gateway_body_timeout),
        ("GATEWAY_BODY_FIRST_BYTE_TIMEOUT", options.gateway_body_first_byte_timeout),
        ("GATEWAY_HEADER_TIMEOUT", options.gateway_header_timeout),
        ("GATEWAY_FIRST_BYTE_TIMEOUT", options.gateway_first_byte_timeout),
        ("GATEWAY_SECRET_RELOAD", options.gateway_secret_reload),
    ] {
        spans(setting, value, some..=DAY);
    }
    spans("GATEWAY_HEALTH_CACHE", options.gateway_health_cache, Duration::ZERO..=DAY);
    if let Some(drain) = options.gateway_drain {
        spans("GATEWAY_DRAIN", drain, Duration::ZERO..=DAY);
    }
    let size = |bytes| Size(bytes);
    checks.within("GATEWAY_BODY_BYTES_MAX", Size(options.gateway_body_bytes_max), size(1)..=size(16 << 20));
    checks.within("GATEWAY_BODY_BUDGET", Size(options.gateway_body_budget), size(1 << 10)..=size(1 << 40));
    checks.within("UPSTREAM_BODY_BYTES_MAX", Size(options.upstream_body_bytes_max), size(0)..=size(16 << 20));
    checks.within("GATEWAY_CONNECTIONS_MAX", options.gateway_connections_max, 1..=1_000_000);
    checks.within("GATEWAY_DELIVERIES_MAX", options.gateway_deliveries_max, 1..=1_000_000);
}

/// The contract's limits of a tenant.
fn tenant(name: &str) -> Result<String, Problem> {
    let permitted = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > 64 || !name.bytes().all(permitted) {
        return Err(Problem::new(
            "GATEWAY_TENANT",
            format!("{name:?} given, permitted are 1 to 64 letters, digits, dots, underscores and hyphens"),
        ));
    }
    Ok(name.to_owned())
}

/// The contract's limits of a holder.
fn holder(name: &str) -> Result<String, Problem> {
    if name.is_empty() || name.len() > 128 || name.chars().any(char::is_control) {
        return Err(Problem::new(
            "HOSTNAME",
            format!("{name:?} given, permitted are 1 to 128 bytes without control characters"),
        ));
    }
    Ok(name.to_owned())
}

/// Messages never repeat a URL with user information in it: that is a password.
fn url(setting: &'static str, text: &str) -> Result<Uri, Problem> {
    let problem = |why: &str| Err(Problem::new(setting, why));
    let Ok(uri) = Uri::from_str(text.trim()) else {
        return problem("not a URL; write for example http://127.0.0.1:3000/webhooks");
    };
    match uri.scheme_str() {
        Some("http" | "https") => {}
        _ => return problem("has to begin with http:// or https://"),
    }
    match uri.authority() {
        Some(authority) if authority.host().is_empty() => problem("names no host"),
        Some(authority) if authority.as_str().contains('@') => {
            problem("may not hold a user name or password: they would end up in logs")
        }
        Some(_) => Ok(uri),
        None => problem("names no host"),
    }
}

fn sidecar_url(text: &str) -> Result<Uri, Problem> {
    let uri = url("SIDECAR_URL", text)?;
    if uri.scheme_str() == Some("https") {
        return Err(Problem::new(
            "SIDECAR_URL",
            format!("{uri} given, only http:// is spoken: keep the sidecar in the gateway's pod"),
        ));
    }
    Ok(uri)
}

/// The application, with what signs the hop to it.
fn target(options: &Options, checks: &mut Checks) -> Option<Target> {
    let given = options.upstream_url.as_deref().filter(|text| !text.trim().is_empty());
    let url = match given {
        Some(text) => checks.take(url("UPSTREAM_URL", text)),
        None => {
            checks.problem(
                "UPSTREAM_URL",
                "not set: without an application to deliver to there is nothing to do; write for example \
                 http://127.0.0.1:3000/webhooks",
            );
            None
        }
    };
    let source = checks.take(Source::choose(
        "UPSTREAM_SECRET",
        options.upstream_secret.clone(),
        options.upstream_secret_file.clone(),
    ))?;
    let signer = match source {
        None => None,
        Some(source) => {
            let secrets = checks.take(read("UPSTREAM_SECRET", &source))?;
            Some(
                checks
                    .take(Signer::new(&secrets).map_err(|error| Problem::new("UPSTREAM_SECRET", error.to_string())))?,
            )
        }
    };
    Some(Target { url: url?, signer })
}

/// Stripe, when there is a secret for it (G3).
fn stripe(options: &Options, checks: &mut Checks) -> Option<(Provider, Source)> {
    let source = checks.take(Source::choose(
        "STRIPE_WEBHOOK_SECRET",
        options.stripe_webhook_secret.clone(),
        options.stripe_webhook_secret_file.clone(),
    ))?;
    let Some(source) = source else {
        // The only provider there is so far; with more it takes a secret for one of them.
        checks.problem(
            "STRIPE_WEBHOOK_SECRET",
            "not set, and neither is STRIPE_WEBHOOK_SECRET_FILE: without a provider's secret no webhook can be verified",
        );
        return None;
    };
    let secrets = checks.take(read("STRIPE_WEBHOOK_SECRET", &source))?;
    Some((Provider::Stripe(Stripe::new(&secrets, options.stripe_tolerance)), source))
}

fn read(setting: &'static str, source: &Source) -> Result<Vec<Secret>, Problem> {
    source.read_list().map_err(|error| match &error {
        ReadError::Io { source, .. } => Problem::new(setting, format!("{error}: {source}")),
        ReadError::Blank { .. } => Problem::new(setting, error.to_string()),
    })
}
