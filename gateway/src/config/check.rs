//! From options to settings that fit together.

use std::{
    num::{NonZeroU32, NonZeroUsize},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use oncegate_api::limits::{HOLDER_BYTES_MAX, LOCK_DURATION_MAX, LOCK_DURATION_MIN, WAIT_DURATION_MAX};
use oncegate_runtime::{
    config::{Checks, Problem, Problems, ShownDuration, ShownSize},
    tls::{ServerTls, ServerTlsFiles},
};

use super::{BodyLimits, ConfigFile, HttpLimits, LockSettings, Options, Settings, UpstreamLimits, routes};
use crate::{failures::FailureLimits, route, sidecar::ReachOptions};

/// What the listener speaks.
const PROTOCOLS: &[&[u8]] = &[b"http/1.1"];

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The limits of a time-out, in the settings and in a route.
pub(super) const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(1)..=DAY;

/// Why connecting to the application must take less time than its answer.
pub(super) const CONNECT_FIRST: &str =
    "a connection that was never made could not be told from an answer that never came";

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
    let holder = checks.take(holder(&options.gateway_holder));
    let sidecar = checks.take_all(sidecar(&options).validate());
    let tls = tls(&options, checks);
    let routes = routes::routes(&options, checks);
    route::check(&routes, checks);
    let longest = routes.iter().map(|route| route.application.timeout).max().unwrap_or(options.upstream_timeout);

    let bytes = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
    Some(Settings {
        listen: options.gateway_listen,
        sidecar: sidecar?,
        tls,
        routes,
        http: HttpLimits {
            connections_max: options.gateway_connections_max,
            connections_per_address: per_address(&options),
            first_byte_timeout: options.gateway_first_byte_timeout,
            header_timeout: options.gateway_header_timeout,
        },
        body: BodyLimits {
            bytes_max: bytes(options.gateway_body_bytes_max),
            budget_bytes: bytes(options.gateway_body_budget),
            bytes_per_source: per_source(&options).map(bytes),
            timeout: options.gateway_body_timeout,
            first_byte_timeout: options.gateway_body_first_byte_timeout,
        },
        failures: FailureLimits {
            per_minute: NonZeroU32::new(options.gateway_failures_per_minute),
            trusted_hops: options.gateway_trusted_hops,
        },
        upstream: UpstreamLimits {
            connect_timeout: options.upstream_connect_timeout,
            idle_timeout: options.upstream_idle_timeout,
            body_bytes_max: bytes(options.upstream_body_bytes_max),
            body_timeout: options.upstream_body_timeout,
        },
        lock: LockSettings { margin: options.gateway_lock_margin, holder: holder? },
        sidecar_timeout: options.sidecar_timeout,
        wait_duration: options.gateway_wait_duration,
        answer_timeout: options.gateway_answer_timeout,
        deliveries_max: options.gateway_deliveries_max,
        drain: options.gateway_drain.unwrap_or(longest),
        health_cache: options.gateway_health_cache,
        secret_reload: options.gateway_secret_reload,
        config_file: options
            .config
            .filter(|path| !path.as_os_str().is_empty())
            .map(|path| ConfigFile { path, fallback: options.gateway_enforcement }),
    })
}

/// How many connections one address may have (W15). Behind our own proxies the address is theirs.
fn per_address(options: &Options) -> Option<NonZeroUsize> {
    let quarter = || if options.gateway_trusted_hops == 0 { options.gateway_connections_max.div_ceil(4) } else { 0 };
    NonZeroUsize::new(options.gateway_connections_per_address.unwrap_or_else(quarter))
}

/// How much of the budget for bodies one source may hold before they are verified (W15): a quarter, but at least the
/// largest body, which would never fit otherwise. Behind our own proxies a source is the address that they saw. Without
/// them it is the address of the connection; there is no limit if connections are not limited by address either.
fn per_source(options: &Options) -> Option<u64> {
    let told_apart = options.gateway_trusted_hops > 0 || per_address(options).is_some();
    told_apart.then(|| options.gateway_body_budget.div_ceil(4).max(options.gateway_body_bytes_max))
}

/// The order of the time and size budgets.
fn order(options: &Options, checks: &mut Checks) {
    let timeout = options.upstream_timeout;
    routes::outlasts(
        ("UPSTREAM_TIMEOUT", timeout),
        ("GATEWAY_LOCK_DURATION", options.gateway_lock_duration),
        options.gateway_lock_margin,
        checks,
    );
    let call = options.gateway_wait_duration.saturating_add(options.sidecar_timeout);
    if call >= options.gateway_answer_timeout {
        checks.problem(
            "GATEWAY_WAIT_DURATION",
            format!(
                "{} given; with SIDECAR_TIMEOUT, which is {}, it has to stay below GATEWAY_ANSWER_TIMEOUT, which is {}: \
                 otherwise a waiting duplicate never gets its answer",
                ShownDuration(options.gateway_wait_duration),
                ShownDuration(options.sidecar_timeout),
                ShownDuration(options.gateway_answer_timeout),
            ),
        );
    }
    checks.less(
        ("UPSTREAM_CONNECT_TIMEOUT", ShownDuration(options.upstream_connect_timeout)),
        ("UPSTREAM_TIMEOUT", ShownDuration(timeout)),
        CONNECT_FIRST,
    );
    checks.less(
        ("SIDECAR_CONNECT_TIMEOUT", ShownDuration(options.sidecar_connect_timeout)),
        ("SIDECAR_TIMEOUT", ShownDuration(options.sidecar_timeout)),
        "a call that was never sent could not be told from one whose answer was lost",
    );
    if options.gateway_body_bytes_max > options.gateway_body_budget {
        checks.problem(
            "GATEWAY_BODY_BYTES_MAX",
            format!(
                "{} given, has to be at most GATEWAY_BODY_BUDGET, which is {}: otherwise the largest body never fits",
                ShownSize(options.gateway_body_bytes_max),
                ShownSize(options.gateway_body_budget),
            ),
        );
    }
}

/// Limits of single values.
fn limits(options: &Options, checks: &mut Checks) {
    let mut spans = |setting, value, range: RangeInclusive<Duration>| {
        checks.within(setting, ShownDuration(value), ShownDuration(*range.start())..=ShownDuration(*range.end()));
    };
    // W3: a wider window is a wider window for whoever recorded a request.
    spans("STRIPE_TOLERANCE", options.stripe_tolerance, SECOND..=routes::TOLERANCE_MAX);
    if let Some(tolerance) = options.paypal_tolerance {
        spans("PAYPAL_TOLERANCE", tolerance, SECOND..=routes::PAYPAL_TOLERANCE_MAX);
    }
    // The contract's limits.
    spans("GATEWAY_LOCK_DURATION", options.gateway_lock_duration, LOCK_DURATION_MIN..=LOCK_DURATION_MAX);
    spans("GATEWAY_WAIT_DURATION", options.gateway_wait_duration, Duration::ZERO..=WAIT_DURATION_MAX);
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
        spans(setting, value, TIMEOUTS);
    }
    spans("GATEWAY_HEALTH_CACHE", options.gateway_health_cache, Duration::ZERO..=DAY);
    if let Some(drain) = options.gateway_drain {
        spans("GATEWAY_DRAIN", drain, Duration::ZERO..=DAY);
    }
    let size = |bytes| ShownSize(bytes);
    checks.within("GATEWAY_BODY_BYTES_MAX", ShownSize(options.gateway_body_bytes_max), size(1)..=size(16 << 20));
    checks.within("GATEWAY_BODY_BUDGET", ShownSize(options.gateway_body_budget), size(1 << 10)..=size(1 << 40));
    checks.within("UPSTREAM_BODY_BYTES_MAX", ShownSize(options.upstream_body_bytes_max), size(0)..=size(16 << 20));
    checks.within("GATEWAY_CONNECTIONS_MAX", options.gateway_connections_max, 1..=1_000_000);
    checks.within("GATEWAY_TRUSTED_HOPS", options.gateway_trusted_hops, 0..=16);
    checks.within("GATEWAY_DELIVERIES_MAX", options.gateway_deliveries_max, 1..=1_000_000);
}

/// The contract's limits on a holder.
fn holder(name: &str) -> Result<String, Problem> {
    if name.is_empty() || name.len() > HOLDER_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(Problem::new(
            "HOSTNAME",
            format!("{name:?} given, permitted are 1 to {HOLDER_BYTES_MAX} bytes without control characters"),
        ));
    }
    Ok(name.to_owned())
}

/// TLS on the public listener, if there is a certificate for it.
fn tls(options: &Options, checks: &mut Checks) -> Option<ServerTls> {
    let given = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
    match (given(&options.gateway_tls_cert_file), given(&options.gateway_tls_key_file)) {
        (None, None) => None,
        (Some(_), None) => {
            checks.problem("GATEWAY_TLS_KEY_FILE", "missing: the certificate in GATEWAY_TLS_CERT_FILE needs its key");
            None
        }
        (None, Some(_)) => {
            checks.problem("GATEWAY_TLS_CERT_FILE", "missing: the key in GATEWAY_TLS_KEY_FILE needs its certificate");
            None
        }
        (Some(certificate), Some(key)) => {
            let files = ServerTlsFiles { certificate: certificate.clone(), key: key.clone(), client_ca: None };
            let read = ServerTls::read(&files, PROTOCOLS);
            let settings = [("GATEWAY_TLS_CERT_FILE", &*certificate), ("GATEWAY_TLS_KEY_FILE", &*key)];
            read.map_err(|error| checks.push(Problem::from_error(error.setting(&settings), &error))).ok()
        }
    }
}

fn sidecar(options: &Options) -> ReachOptions {
    ReachOptions {
        url: options.sidecar_url.clone(),
        ca_file: options.sidecar_ca_file.clone(),
        cert_file: options.sidecar_client_cert_file.clone(),
        key_file: options.sidecar_client_key_file.clone(),
        token: options.sidecar_token.clone(),
        token_file: options.sidecar_token_file.clone(),
        insecure: options.sidecar_insecure,
        connect_timeout: options.sidecar_connect_timeout,
        resolve_interval: options.sidecar_resolve_interval,
        reload: options.gateway_secret_reload,
    }
}
